"""Builds the environments of ``environments`` with uv: what each installs, whether it works."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flowgrpo_ray.common.errors import RewardEnvironmentError
from flowgrpo_ray.rewards.environments import (
    BUILTIN,
    MANIFEST,
    Kind,
    Manifest,
    base_sites,
    build_command,
    fault_of,
    folder_of,
    locked,
    packages_in,
    python_version,
    read_manifest,
    site_packages,
)

PINS = Path(__file__).parent / "pins"
# What an actor imports before it builds its reward: an overlay's versions must suit these too.
ACTOR_NEEDS = ("ray", "numpy", "pydantic", "fastapi", "python-multipart")
# Ray refuses to talk to another version of itself; another torch would be gigabytes.
AS_IN_BASE = ("ray", "torch", "torchvision", "torchaudio", "triton")


def build(
    name: str,
    requirements: Sequence[str] = (),
    *,
    standalone: bool = False,
    rebuild: bool = False,
) -> Manifest:
    """Builds environment `name`, unless it is there and sound; a failure changes nothing.

    Without requirements those of a built-in environment, or of the one that is there, are taken.
    """
    folder = folder_of(name)
    with locked(name):
        old = read_manifest(name)
        kind, wanted = _wanted(name, requirements, standalone, old)
        if old and not rebuild and fault_of(name) is None:
            if (old.kind, old.requirements) != (kind, wanted):
                raise RewardEnvironmentError(
                    f"environment {name!r} is there already, {old.kind}, with "
                    f"{', '.join(old.requirements)}; to replace it add --rebuild"
                )
            return old
        partial, replaced = (folder.parent / f".{name}.{end}" for end in ("partial", "replaced"))
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        manifest = _install(name, partial, kind, wanted)
        (partial / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", "utf-8")
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
        return manifest


def _wanted(
    name: str, requirements: Sequence[str], standalone: bool, old: Manifest | None
) -> tuple[Kind, list[str]]:
    """Kind and requirements to build `name` with."""
    if name in BUILTIN:
        if requirements or standalone:
            raise RewardEnvironmentError(
                f"environment {name!r} is built in and has its own requirements; "
                "give yours another name"
            )
        return BUILTIN[name].kind, [line for _, line in _requires(name)]
    if requirements:
        return ("standalone" if standalone else "overlay"), list(requirements)
    if old is None or standalone:
        raise RewardEnvironmentError(
            f"environment {name!r} is not built in ({', '.join(BUILTIN)} are): say what to "
            f"install: {build_command(name)}"
        )
    return old.kind, old.requirements


def _install(name: str, folder: Path, kind: Kind, requirements: list[str]) -> Manifest:
    """Makes the environment in `folder`, which may be renamed afterwards, and tries it."""
    base = packages_in(base_sites()) if kind == "overlay" else {}
    resolved = _resolve(name, requirements, base)
    shared: dict[str, str] = {}
    own: list[str] = []
    for line in resolved:
        package, _, version = line.partition("==")
        if version and _public(base.get(package, "")) == version:
            shared[package] = base[package]
        else:
            own.append(line)
    _uv(name, "venv", "--relocatable", "--python", sys.executable, str(folder))
    python, packages = folder / "bin" / "python", site_packages(folder, python_version())
    if own:
        file = folder / "requirements.txt"
        file.write_text("\n".join(own) + "\n", "utf-8")
        options = ["--no-deps", "--compile-bytecode", "--python", str(python)]
        _uv(name, "pip", "install", *options, "-r", str(file))
    if kind == "overlay":
        # Not bare paths: addsitedir also reads the base's own .pth files, as editable installs are.
        lines = [f"import site; site.addsitedir({str(path)!r})" for path in base_sites()]
        (packages / "base.pth").write_text("\n".join(lines) + "\n", "utf-8")
    imports = BUILTIN[name].imports if name in BUILTIN else ()
    _try(name, python, ("flowgrpo_ray", "ray", *imports) if kind == "overlay" else imports)
    here = packages_in([packages])
    return Manifest(kind, requirements, here, shared, python_version(), sys.prefix)


def _resolve(name: str, requirements: list[str], base: Mapping[str, str]) -> list[str]:
    """The complete set of packages as uv's lines `name==version`, near to the base's versions."""
    constraints = [f"{key}=={_public(base[key])}" for key in AS_IN_BASE if key in base]
    if name in BUILTIN:
        constraints += (PINS / f"{name}.txt").read_text("utf-8").splitlines()
    needed = [line for key, line in _requires("") if key in ACTOR_NEEDS] if base else []
    with tempfile.TemporaryDirectory() as scratch:
        file, pins, out = (Path(scratch, part) for part in ("in.txt", "pins.txt", "out.txt"))
        file.write_text("\n".join([*requirements, *needed]) + "\n", "utf-8")
        pins.write_text("\n".join(constraints) + "\n", "utf-8")
        # uv prefers the versions that it finds in its output file.
        known = [f"{key}=={_public(version)}" for key, version in base.items()]
        out.write_text("\n".join(known) + "\n", "utf-8")
        options = ["--no-header", "--no-annotate", "--python", sys.executable]
        _uv(name, "pip", "compile", *options, "-c", str(pins), "-o", str(out), str(file))
        return out.read_text("utf-8").split("\n")[:-1]


def _requires(extra: str) -> list[tuple[str, str]]:
    """(name, requirement) of what this package requires, for `extra` or without any."""
    wanted = f'extra == "{extra}"' if extra else "None"
    found = []
    for line in importlib.metadata.requires("flowgrpo-ray") or []:
        requirement = Requirement(line)
        marker, requirement.marker = requirement.marker, None
        if str(marker) == wanted:
            found.append((canonicalize_name(requirement.name), str(requirement)))
    if not found:
        raise RewardEnvironmentError(
            f"the installed flowgrpo-ray has no extra {extra!r}: install it again (make install)"
        )
    return found


def _uv(name: str, *arguments: str) -> None:
    import uv

    run = subprocess.run(
        [uv.find_uv_bin(), *arguments, "--quiet"], capture_output=True, text=True, check=False
    )
    if run.returncode:
        what = "uv " + " ".join(itertools.takewhile(str.isalpha, arguments))
        raise RewardEnvironmentError(f"environment {name!r}: {what} failed:\n{run.stderr.strip()}")


def _try(name: str, python: Path, imports: Iterable[str]) -> None:
    """RewardEnvironmentError if the Python of an environment cannot import these modules."""
    code = "".join(f"import {module}\n" for module in imports)
    # Isolated: neither the current folder nor PYTHONPATH may stand in for what is missing.
    run = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RewardEnvironmentError(
            f"environment {name!r}: its Python fails at import {', '.join(imports)}:\n"
            f"{run.stderr.strip()}"
        )


def _public(version: str) -> str:
    """Without the local part, which no registry knows: 2.15.0 of 2.15.0+cu130."""
    return version.partition("+")[0]
