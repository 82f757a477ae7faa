"""What a submitted job takes along: its spec, its prompt files and the user's classes.

Everything else a run needs is on the cluster: this program, models, environments of rewards.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.paths import BUILTIN, PACKAGE, expand, local_path
from flowgrpo_ray.spec.families import FAMILIES
from flowgrpo_ray.spec.file import dump_spec
from flowgrpo_ray.spec.hub_sets import HUB
from flowgrpo_ray.spec.prompt_files import load_prompts
from flowgrpo_ray.spec.sources import files_of
from flowgrpo_ray.spec.training import TrainingSpec

SPEC = "spec.yaml"


def pack(spec: TrainingSpec, folder: Path) -> list[str]:
    """Fill the empty ``folder`` with what the job needs to run ``spec`` there; what was put in.

    Prompt files below the current folder keep their place, so that the spec stays the same; source
    images keep theirs beside the prompt file.
    """
    check_reachable(spec)
    edits = FAMILIES[spec.model.family].sources != range(1)
    prompts = spec.prompts.with_files(lambda path: _take(path, folder, with_sources=edits))
    moved = spec.model_copy(update={"prompts": prompts})
    (folder / SPEC).write_text(dump_spec(moved), encoding="utf-8")
    for module in _own_modules(spec):
        if module.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(module, folder / module.name, ignore=ignored)
        else:
            shutil.copy(module, folder / module.name)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def check_reachable(spec: TrainingSpec) -> None:
    """``SpecError`` for a model in a folder that is named relative to this machine's."""
    for key, path in (("model.path", spec.model.path), ("model.lora", spec.model.lora)):
        if path is None or path.startswith((BUILTIN, "/")) or local_path(path) is None:
            continue
        raise SpecError(
            f"{key} = {path!r} is a folder or file of this machine, and models are not uploaded: "
            "put it where every node of the cluster sees it and give its absolute path, or a hub id"
        )


def _take(path: str, folder: Path, *, with_sources: bool) -> str:
    """Copy a prompt file, and the images that it names; its path from ``folder``, or as it is if
    the cluster has it too."""
    if path.startswith((BUILTIN, HUB)):
        return path
    found, here = Path(path).expanduser().resolve(), Path.cwd()
    place = found.relative_to(here) if found.is_relative_to(here) else Path("prompts", found.name)
    target = folder / place
    if target.exists() and target.read_bytes() != found.read_bytes():
        raise SpecError(
            f"two prompt files outside this folder are called {found.name!r}: rename one"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(found, target)
    prompts = load_prompts(path, "prompts") if with_sources else []
    for name in dict.fromkeys(name for prompt in prompts for name in files_of(prompt)):
        if not expand(name).is_absolute():  # else the cluster has it too
            _take_source(found.parent / name, target.parent / name, folder)
    return str(place)


def _take_source(file: Path, target: Path, folder: Path) -> None:
    """Copy an image to ``target``, in ``folder``."""
    target = Path(os.path.normpath(target))
    if not target.is_relative_to(folder):
        raise SpecError(
            f"the source image '{file}' cannot keep its place in what is uploaded: put it below "
            "the folder of its prompt file, or give an absolute path that the cluster has too"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, target)


def _own_modules(spec: TrainingSpec) -> Iterator[Path]:
    """The file or package folder of each class of the user's that is not an installed one."""
    paths = {reward.reward or name for name, reward in spec.rewards.items()}
    paths.add(spec.objective.kind)
    for top in sorted({path.partition(":")[0].split(".")[0] for path in paths if ":" in path}):
        found = importlib.util.find_spec(top)
        assert found is not None, "the spec was checked: the class could be imported"
        folders = list(found.submodule_search_locations or [])  # of a package; a module has none
        place = Path(folders[0] if folders else found.origin or "")
        if not any(place.is_relative_to(installed) for installed in _installed()):
            yield place


def _installed() -> list[str | Path]:
    """Where installed packages are, this program among them: the cluster has its own."""
    library = sysconfig.get_path("stdlib")
    return [PACKAGE, library, *site.getsitepackages(), site.getusersitepackages()]
