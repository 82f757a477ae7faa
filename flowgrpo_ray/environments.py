"""Environments of their own, for rewards whose packages conflict with the base environment.

The base is the environment that this program runs in. An overlay is a virtual environment of the
same Python that holds only the packages which differ from the base's; all others it finds there,
this package and ray among them, so that a Ray actor can run in it. A standalone environment has
nothing of the base: it is for a program that runs as a server of its own.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flowgrpo_ray.errors import RewardEnvironmentError
from flowgrpo_ray.strict_json import parse

FOLDER_VARIABLE = "FLOWGRPO_ENVIRONMENTS"
MANIFEST = "environment.json"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
PINS = Path(__file__).parent / "assets" / "environments"
Kind = Literal["overlay", "standalone"]
# What an actor imports before it builds its reward: an overlay's versions must suit these too.
ACTOR_NEEDS = ("ray", "numpy", "pydantic", "fastapi", "python-multipart")
# Ray refuses to talk to another version of itself; another torch would be gigabytes.
AS_IN_BASE = ("ray", "torch", "torchvision", "torchaudio", "triton")


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
            f"environment {name!r}: {fault}. Build it: {_build_command(name)}"
        )
    return str(environments_folder() / name / "bin" / "python")


def fault_of(name: str) -> str | None:
    """What keeps environment `name` from being used; None: nothing."""
    return next(_faults(name), None)


def _faults(name: str) -> Iterator[str]:
    """What is wrong with environment `name`; what follows the first may follow from it."""
    folder = _folder(name)
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
    here = _packages([_site_packages(folder, manifest.python)])
    for package, version in manifest.packages.items():
        if here.get(package) != version:
            yield f"its package {package} {version} is gone"


def _misfits(manifest: Manifest) -> Iterator[str]:
    """Where the base is not the one that an overlay was built over."""
    if manifest.python != _python_version():
        yield f"it was built for Python {manifest.python}, and this is {_python_version()}"
    if manifest.base != sys.prefix:
        yield f"it was built over {manifest.base}, and this program runs in {sys.prefix}"
    base = _packages(_base_sites())
    for package, version in manifest.shared.items():
        if base.get(package) != version:
            found = base.get(package, "none")
            yield f"it was built over {package} {version}, and the base now has {found}"


def read_manifest(name: str) -> Manifest | None:
    """The manifest of environment `name`; None if it has none that can be read."""
    try:
        return Manifest(**parse((_folder(name) / MANIFEST).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def names() -> list[str]:
    """The built-in environments, and all others that are in the folder."""
    folder = environments_folder()
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted({*BUILTIN, *filter(NAME.fullmatch, there)})


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
    folder = _folder(name)
    with _locked(name):
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


def size_of(name: str) -> int:
    """Bytes of the files of environment `name`; uv's cache may hold the same ones, linked."""
    walk = os.walk(_folder(name))
    return sum(os.lstat(os.path.join(path, file)).st_size for path, _, fs in walk for file in fs)


def remove(name: str) -> None:
    """Deletes environment `name`."""
    folder = _folder(name)
    if not folder.is_dir():
        raise RewardEnvironmentError(f"environment {name!r}: there is no folder {folder}")
    with _locked(name):
        shutil.rmtree(folder)


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
            f"install: {_build_command(name)}"
        )
    return old.kind, old.requirements


def _install(name: str, folder: Path, kind: Kind, requirements: list[str]) -> Manifest:
    """Makes the environment in `folder`, which may be renamed afterwards, and tries it."""
    base = _packages(_base_sites()) if kind == "overlay" else {}
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
    python, packages = folder / "bin" / "python", _site_packages(folder, _python_version())
    if own:
        file = folder / "requirements.txt"
        file.write_text("\n".join(own) + "\n", "utf-8")
        options = ["--no-deps", "--compile-bytecode", "--python", str(python)]
        _uv(name, "pip", "install", *options, "-r", str(file))
    if kind == "overlay":
        # Not bare paths: addsitedir also reads the base's own .pth files, as editable installs are.
        lines = [f"import site; site.addsitedir({str(path)!r})" for path in _base_sites()]
        (packages / "base.pth").write_text("\n".join(lines) + "\n", "utf-8")
    imports = BUILTIN[name].imports if name in BUILTIN else ()
    _try(name, python, ("flowgrpo_ray", "ray", *imports) if kind == "overlay" else imports)
    here = _packages([packages])
    return Manifest(kind, requirements, here, shared, _python_version(), sys.prefix)


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


def _packages(sites: Iterable[Path]) -> dict[str, str]:
    """{normalised name: version} of the packages in these folders; of doubles the first."""
    found: dict[str, str] = {}
    for path in sites:
        for entry in os.listdir(path) if path.is_dir() else ():
            if entry.endswith(".dist-info"):
                name, _, version = entry.removesuffix(".dist-info").rpartition("-")
                found.setdefault(canonicalize_name(name), version)
    return found


def _base_sites() -> list[Path]:
    """The folders that hold the packages of this environment."""
    paths = [sysconfig.get_path("purelib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        paths.append(site.getusersitepackages())
    return [path for path in map(Path, dict.fromkeys(paths)) if path.is_dir()]


def _site_packages(folder: Path, python: str) -> Path:
    return folder / "lib" / f"python{python}" / "site-packages"


def _python_version() -> str:
    """As 3.11: packages are compiled for it."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _public(version: str) -> str:
    """Without the local part, which no registry knows: 2.15.0 of 2.15.0+cu130."""
    return version.partition("+")[0]


def _folder(name: str) -> Path:
    if not NAME.fullmatch(name):
        raise RewardEnvironmentError(
            f"environment {name!r}: a name is made of small letters, digits, '_' and '-'"
        )
    return environments_folder() / name


def _build_command(name: str) -> str:
    known = name in BUILTIN or read_manifest(name) is not None
    more = "" if known else " --requirement 'PACKAGE==VERSION'"
    return f"flowgrpo-ray rewards env build {name}{more}"


@contextmanager
def _locked(name: str) -> Iterator[None]:
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
