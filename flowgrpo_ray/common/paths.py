"""What a path names: a file of this package, a local file or folder, a hub id; where runs go."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from flowgrpo_ray.common.errors import RunFolderError, SpecError

PACKAGE = Path(__file__).parents[1]
BUILTIN = "builtin:"


def builtin_path(path: str) -> Path | None:
    """``builtin:x`` names the file or folder ``x`` of ``tiny/assets``; else ``None``."""
    if not path.startswith(BUILTIN):
        return None
    name = Path(path.removeprefix(BUILTIN))
    if name.is_absolute() or ".." in name.parts:
        raise SpecError(f"{path!r}: {BUILTIN} names a file of this package, and this leads out")
    return PACKAGE / "tiny" / "assets" / name


def expand(path: str | Path) -> Path:
    """With ``~`` replaced; one of an unknown user stays as it is, and is found not to be there."""
    return Path(os.path.expanduser(path))


def local_path(path: str) -> Path | None:
    """The file or folder that ``path`` names, there or not; ``None`` for a hub id, owner/name."""
    builtin = builtin_path(path)
    if builtin is not None:
        return builtin
    local = expand(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    # Not ``Path.exists``, to which a name that no file can have is an error.
    return local if looks_local or os.path.exists(local) else None


def share_mode(files: Iterable[Path], like: Path) -> None:
    """Give ``files`` the mode of ``like``, a file that this process made: that of its umask.

    safetensors writes beside and renames, and what it makes is for its owner alone (0600).
    """
    mode = stat.S_IMODE(like.stat().st_mode)
    for file in files:
        file.chmod(mode)


def in_job() -> bool:
    """Whether this process is the driver of a Ray job, which runs in a copy of its folder."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def runs_root(given: Path | None) -> Path:
    """The folder of the run folders: what was given, else FLOWGRPO_RUNS, else a default.

    ``SpecError`` for a relative one in a Ray job: the folder that a job runs in is deleted.
    """
    named = given or (Path(text) if (text := os.environ.get("FLOWGRPO_RUNS")) else None)
    if not in_job():
        return named or Path("runs")
    root = (named or Path("~/flowgrpo-runs")).expanduser()
    if not root.is_absolute():
        key = "--runs" if given else "FLOWGRPO_RUNS"
        raise SpecError(
            f"{key} = {str(root)!r}: in a Ray job this must be an absolute path, on storage that "
            "outlives the job; Ray deletes the folder that a job runs in"
        )
    return root


def existing_runs(given: Path | None) -> Path:
    """``runs_root``; ``RunFolderError`` if it is no folder."""
    root = runs_root(given)
    if not root.is_dir():
        raise RunFolderError(f"no folder at {root}: give a run folder or a folder of them")
    return root
