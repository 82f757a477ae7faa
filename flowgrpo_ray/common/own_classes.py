"""Classes that a spec names by their import path, ``module:Class``: a user's own, or ours."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from flowgrpo_ray.common.errors import SpecError, raised


def import_class(what: str, name: str, builtin: Mapping[str, str]) -> type:
    """The class that ``name`` stands for: a key of ``builtin``, whose values are import paths, or
    an import path itself. ``what`` it is called in a ``SpecError``."""
    module_name, _, class_name = builtin.get(name, name).partition(":")
    if not all(map(str.isidentifier, [*module_name.split("."), class_name])):
        raise SpecError(
            f"unknown {what} {name!r}{nearest(name, builtin)}; "
            f"built in: {', '.join(builtin) or 'none'}; your own class: 'module:Class'"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # it is the user's code: anything
        raise SpecError(
            f"{what} {name!r}: cannot import {module_name!r}: {raised(error)}. Put the module "
            "beside the spec, or for one in this folder set PYTHONPATH=$PWD"
        ) from error
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        classes = [name for name, _ in inspect.getmembers(module, inspect.isclass)]
        raise SpecError(
            f"{what} {name!r}: {module_name!r} has no class {class_name!r}"
            f"{nearest(class_name, classes)}"
        )
    return found


def look_in(folder: Path) -> None:
    """Have modules of ``folder`` found, by this process and by those that it starts, after all
    others."""
    place = str(folder.resolve())
    if place in sys.path:
        return
    sys.path.append(place)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, place])


def nearest(name: str, known: Iterable[str]) -> str:
    """``, did you mean 'x'?``, or nothing when no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
