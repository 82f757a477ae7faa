"""What run folders hold that nobody needs any more: runs that never trained, older checkpoints."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowgrpo_ray.run.checkpoint import best_checkpoint, list_checkpoints, newest_checkpoint
from flowgrpo_ray.run.folder import LOCK, RunFolder
from flowgrpo_ray.run.tracking import METRICS, SUMMARY, read_rows
from flowgrpo_ray.run.watch import readings_of


@dataclass(frozen=True)
class Leftover:
    """A folder that may go: why, and its bytes."""

    path: Path
    why: str
    size: int


def leftovers(root: Path, *, checkpoints: bool = False) -> list[Leftover]:
    """What may go below ``root``: runs that finished no iteration, and with ``checkpoints`` all but
    the newest one, the best and those from before an alarm of the watch, of runs that are finished.
    A run that trains keeps all."""
    return [
        Leftover(path, why, sum(os.lstat(file).st_size for file in _files(path)))
        for spec in sorted(root.glob("*/spec.yaml"))
        if not _trains(folder := RunFolder(spec.parent))
        for path, why in _of(folder, checkpoints)
    ]


def prune(found: Sequence[Leftover]) -> int:
    """Delete what was found; the bytes that are free now."""
    for leftover in found:
        shutil.rmtree(leftover.path)
    return sum(leftover.size for leftover in found)


def _of(folder: RunFolder, checkpoints: bool) -> Iterator[tuple[Path, str]]:
    if not folder.started and not list_checkpoints(folder.checkpoints):
        yield folder.path, "finished no iteration"
    elif checkpoints and (folder.path / SUMMARY).exists():
        kept = _kept(folder)
        for path in list_checkpoints(folder.checkpoints)[:-1]:
            if path not in kept:
                yield path, "older than the last checkpoint"


def _kept(folder: RunFolder) -> set[Path | None]:
    """The checkpoints that the watch protects, as the last evaluation says, and the best one."""
    rows = read_rows(folder.path / METRICS) if (folder.path / METRICS).exists() else []
    last = next((row for row in reversed(rows) if row.get("watch")), {})
    iterations = {reading.best_iteration for reading in readings_of(last).values()}
    if best := best_checkpoint(folder.checkpoints):
        iterations.add(best["iteration"])
    return {newest_checkpoint(folder.checkpoints, iteration) for iteration in iterations}


def _files(folder: Path) -> Iterator[str]:
    for path, _, files in os.walk(folder):
        yield from (os.path.join(path, file) for file in files)


def _trains(folder: RunFolder) -> bool:
    """Whether a process holds the run's lock."""
    lock = folder.path / LOCK
    if not lock.exists():
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
