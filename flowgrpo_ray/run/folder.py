"""One folder per run: its resolved spec, rows, samples, checkpoints and logs."""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from flowgrpo_ray.common.errors import RunFolderError
from flowgrpo_ray.common.files import write_atomic
from flowgrpo_ray.common.types import LearnerState
from flowgrpo_ray.run.checkpoint import Progress, list_checkpoints, load_checkpoint
from flowgrpo_ray.run.state import OBJECTIVE, leads_out
from flowgrpo_ray.run.tracking import METRICS, read_rows
from flowgrpo_ray.spec.file import dump_spec, flat_keys, load_spec
from flowgrpo_ray.spec.training import TrainingSpec

LOCK = ".lock"


class RunFolder:
    """``root/<name>``, held by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def spec_file(self) -> Path:
        return self.path / "spec.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def started(self) -> bool:
        """Whether the run has finished an iteration, and so may not be begun anew."""
        metrics = self.path / METRICS
        if not metrics.exists():
            return False
        return any(row["kind"] == "train" for row in read_rows(metrics))

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @classmethod
    def claim(
        cls, root: Path, spec: TrainingSpec, *, resume: bool, overwrite: bool = False
    ) -> RunFolder:
        """The folder of a run that is about to train; refuses what would mix two runs, unless it
        may ``overwrite`` the one that is there."""
        folder = cls(root / spec.name)
        if overwrite and folder.spec_file.exists():
            folder._empty()
        held = folder.read_spec() if folder.spec_file.exists() and folder.started else None
        if held and held.identity() != spec.identity():
            odd = difference(held.essence(), spec.essence())
            odd = odd or "it was written by another version of this program"
            raise RunFolderError(
                f"{folder.path} already holds another run's spec: {odd}. "
                "Choose another name (--set name=...), or --overwrite"
            )
        if held and not resume:
            raise RunFolderError(
                f"{folder.path} already holds this run: continue it with --resume, choose another "
                "name (--set name=...), or --overwrite"
            )
        folder.path.mkdir(parents=True, exist_ok=True)
        for path in folder.path.iterdir():
            if not path.is_dir() and leads_out(path):
                raise RunFolderError(
                    f"{path} is a link to {path.readlink()}, outside of the run folder, and would "
                    "be written to: remove it"
                )
        folder._lock()
        if held and spec.cluster.cpu_linear == "auto":
            spec = spec.with_linear(held.cluster.cpu_linear)
        folder.write_spec(spec)
        return folder

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """A folder that some run has written."""
        folder = cls(path)
        if not folder.spec_file.is_file():
            raise RunFolderError(f"{path} is not a run folder: it has no spec.yaml")
        return folder

    def read_spec(self) -> TrainingSpec:
        return load_spec(str(self.spec_file))

    def write_spec(self, spec: TrainingSpec) -> None:
        """And beside it the card of its objective, which a reader may not have installed."""
        write_atomic(self.spec_file, dump_spec(spec).encode())
        card = json.dumps(spec.objective.card(), indent=2, ensure_ascii=False)
        write_atomic(self.path / OBJECTIVE, card.encode() + b"\n")

    def latest(self) -> tuple[LearnerState, Progress] | None:
        """The newest checkpoint, verified; ``None`` if there is none."""
        found = list_checkpoints(self.checkpoints)
        return load_checkpoint(found[-1]) if found else None

    def near(self) -> list[str]:
        """Runs beside this one whose names are like its own."""
        there = (spec.parent.name for spec in self.path.parent.glob("*/spec.yaml"))
        return difflib.get_close_matches(self.path.name, [n for n in there if n != self.path.name])

    def _empty(self) -> None:
        """Delete the run, which nobody may be training, but for its lock."""
        self._lock()
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        self.release()

    def _lock(self) -> None:
        """Kept until this process ends, however it ends."""
        self._lock_file = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_file)
            raise RunFolderError(f"{self.path}: another process is training in it") from None

    def release(self) -> None:
        os.close(self._lock_file)


def resume_command(folder: Path) -> str | None:
    """What continues the run in a folder from its last checkpoint; ``None`` without a spec."""
    spec = folder / "spec.yaml"
    if not spec.is_file():
        return None
    root = folder.resolve().parent
    return f"flowgrpo-ray train {quote(str(spec))} --runs {quote(str(root))} --resume"


def difference(held: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """The first key that differs in parts of two specs, for an error."""
    old, new = flat_keys(held), flat_keys(asked)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key} is {old.get(key)!r} there and {new.get(key)!r} here"
    return None
