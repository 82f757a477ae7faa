"""Environments of their own, for rewards whose packages conflict with the base environment.

The base is the environment that this program runs in. An overlay is a virtual environment of the
same Python that holds only the packages which differ from the base's; all others it finds there,
this package and ray among them, so that a Ray actor can run in it. A standalone environment has
nothing of the base: it is for a program that runs as a server of its own.

Here is what uses an environment that is there; ``environment_build`` makes them.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.utils import canonicalize_name

from flowgrpo_ray.common.errors import RewardEnvironmentError
from flowgrpo_ray.common.strict_json import parse

FOLDER_VARIABLE = "FLOWGRPO_ENVIRONMENTS"
MANIFEST = "environment.json"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
Kind = Literal["overlay", "standalone"]


@dataclass(frozen=True)
class BuiltIn:
    """An environment whose requirements are the extra of its name of this package."""

    kind: Kind
    imports: tuple[str, ...] = ()


BUILTIN = {
    "paddleocr": BuiltIn("overlay", imports=("paddleocr",)),
    # Its kernels load where there is CUDA alone: importing it here would prove nothing.
    "sglang": BuiltIn("standalone"),
}


@dataclass(frozen=True)
class Manifest:
    """What an environment is and was made for; packages are {normalised name: version}."""

    kind: Kind
    requirements: list[str]
    packages: dict[str, str]  # that it holds itself
    shared: dict[str, str]  # that it takes from the base
    python: str
    base: str


def environments_folder() -> Path:
    """Where environments live: FLOWGRPO_ENVIRONMENTS, or a folder of the user's cache."""
    default = "~/.cache/flowgrpo_ray/environments"
    return Path(os.environ.get(FOLDER_VARIABLE) or default).expanduser().absolute()


def python_of(name: str) -> str:
    """Path of the Python of environment `name`, after checks that take milliseconds.

    RewardEnvironmentError with what is wrong and the command that repairs it. To be called before
    Ray is given the path: with one that does not work an actor stays pending for ever.
    """
    if fault := fault_of(name):
        raise RewardEnvironmentError(
            f"environment {name!r}: {fault}. Build it: {build_command(name)}"
        )
    return str(environments_folder() / name / "bin" / "python")


def fault_of(name: str) -> str | None:
    """What keeps environment `name` from being used; None: nothing."""
    return next(_faults(name), None)


def _faults(name: str) -> Iterator[str]:
    """What is wrong with environment `name`; what follows the first may follow from it."""
    folder = folder_of(name)
    if not folder.is_dir():
        yield f"it is not built: there is no folder {folder}"
    manifest = read_manifest(name)
    if manifest is None:
        yield f"{folder} has no readable {MANIFEST}: it was not built to its end"
        return
    python = folder / "bin" / "python"
    if not os.access(python, os.X_OK):
        yield f"{python} is missing, or leads to no program"
    if manifest.kind == "overlay":
        yield from _misfits(manifest)
    here = packages_in([site_packages(folder, manifest.python)])
    for package, version in manifest.packages.items():
        if here.get(package) != version:
            yield f"its package {package} {version} is gone"


def _misfits(manifest: Manifest) -> Iterator[str]:
    """Where the base is not the one that an overlay was built over."""
    if manifest.python != python_version():
        yield f"it was built for Python {manifest.python}, and this is {python_version()}"
    if manifest.base != sys.prefix:
        yield f"it was built over {manifest.base}, and this program runs in {sys.prefix}"
    base = packages_in(base_sites())
    for package, version in manifest.shared.items():
        if base.get(package) != version:
            found = base.get(package, "none")
            yield f"it was built over {package} {version}, and the base now has {found}"


def read_manifest(name: str) -> Manifest | None:
    """The manifest of environment `name`; None if it has none that can be read."""
    try:
        return Manifest(**parse((folder_of(name) / MANIFEST).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def names() -> list[str]:
    """The built-in environments, and all others that are in the folder."""
    folder = environments_folder()
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted({*BUILTIN, *filter(NAME.fullmatch, there)})


def size_of(name: str) -> int:
    """Bytes of the files of environment `name`; uv's cache may hold the same ones, linked."""
    walk = os.walk(folder_of(name))
    return sum(os.lstat(os.path.join(path, file)).st_size for path, _, fs in walk for file in fs)


def remove(name: str) -> None:
    """Deletes environment `name`."""
    folder = folder_of(name)
    if not folder.is_dir():
        raise RewardEnvironmentError(f"environment {name!r}: there is no folder {folder}")
    with locked(name):
        shutil.rmtree(folder)


def packages_in(sites: Iterable[Path]) -> dict[str, str]:
    """{normalised name: version} of the packages in these folders; of doubles the first."""
    found: dict[str, str] = {}
    for path in sites:
        for entry in os.listdir(path) if path.is_dir() else ():
            if entry.endswith(".dist-info"):
                name, _, version = entry.removesuffix(".dist-info").rpartition("-")
                found.setdefault(canonicalize_name(name), version)
    return found


def base_sites() -> list[Path]:
    """The folders that hold the packages of this environment."""
    paths = [sysconfig.get_path("purelib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        paths.append(site.getusersitepackages())
    return [path for path in map(Path, dict.fromkeys(paths)) if path.is_dir()]


def site_packages(folder: Path, python: str) -> Path:
    """Where the environment in `folder` holds its packages."""
    return folder / "lib" / f"python{python}" / "site-packages"


def python_version() -> str:
    """As 3.11: packages are compiled for it."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def folder_of(name: str) -> Path:
    """The folder of environment `name`, built or not."""
    if not NAME.fullmatch(name):
        raise RewardEnvironmentError(
            f"environment {name!r}: a name is made of small letters, digits, '_' and '-'"
        )
    return environments_folder() / name


def build_command(name: str) -> str:
    """The command that builds environment `name`, for messages."""
    known = name in BUILTIN or read_manifest(name) is not None
    more = "" if known else " --requirement 'PACKAGE==VERSION'"
    return f"flowgrpo-ray rewards env build {name}{more}"


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Nobody else builds or removes environment `name` meanwhile."""
    root = environments_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / f".{name}.lock").open("w")
    except OSError as error:
        raise RewardEnvironmentError(
            f"environments are kept in {root}, which cannot be written ({error.strerror}); name "
            f"another folder: {FOLDER_VARIABLE}=..."
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
