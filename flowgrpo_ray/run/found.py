"""Which folders are run folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowgrpo_ray.common.errors import RunFolderError
from flowgrpo_ray.run.state import LIVE
from flowgrpo_ray.run.tracking import METRICS

DEEPEST = 3  # folders below the root in which runs are looked for


def is_run(folder: Path) -> bool:
    """Whether a run has written here, if only that it starts."""
    return any((folder / name).is_file() for name in (METRICS, LIVE, ".lock"))


def find_runs(root: Path) -> dict[str, Path]:
    """Every run folder below `root`, or `root` itself, by its path below `root` or its name."""
    if is_run(root):
        return {root.resolve().name: root}
    return {path.relative_to(root).as_posix(): path for path in _runs_below(root, DEEPEST)}


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    """Follows no link, so that every name stays below the root."""
    if not os.access(folder, os.R_OK | os.X_OK):  # other people's
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink() or not path.is_dir():
            continue
        if is_run(path):
            yield path
        elif depth > 1:
            yield from _runs_below(path, depth - 1)


def mark_of(path: Path) -> tuple[int, int] | None:
    """Changes when the file does; ``None`` if it is not there."""
    try:
        stat = path.stat()
    except OSError:  # not there, or a link in a circle
        return None
    return stat.st_mtime_ns, stat.st_size


@contextmanager
def as_written(folder: Path) -> Iterator[None]:
    """Within it, rows that hold something else than a run writes are a ``RunFolderError``: anyone
    may have written them, and they are not looked at one by one."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
        raise RunFolderError(
            f"{folder}: its rows or pictures are not those of a run ({type(error).__name__}: "
            f"{error}). Restore its files"
        ) from error
