"""Checkpoints that are whole or not there: written beside, fsynced, renamed, with digests.

A checkpoint is a folder ``checkpoints/iteration-000070`` of safetensors files, ``state.json`` and
``manifest.json`` with the SHA-256 of each. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowgrpo_ray.errors import CheckpointError
from flowgrpo_ray.types import LearnerState

PREFIX = "iteration-"
ARRAYS = ("weights", "ema", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside the learner's state."""

    iteration: int
    images: int
    seconds: float  # wall clock of all attempts, starts included
    failed_groups: int
    spec_identity: str
    prompts_digest: str
    eval_before: dict[str, float] = field(default_factory=dict)
    eval_last: dict[str, float] = field(default_factory=dict)


def save_checkpoint(folder: Path, state: LearnerState, progress: Progress, keep: int) -> Path:
    """Write the checkpoint of ``progress.iteration`` under ``folder``; keep the newest ``keep``."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{PREFIX}{progress.iteration:06d}"
    partial = folder / f".{final.name}.partial"
    for leftover in folder.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(leftover)
    partial.mkdir()
    for name in ARRAYS:
        save_file(getattr(state, name), partial / f"{name}.safetensors")
    _write_json(partial / "state.json", {"updates": state.updates, **asdict(progress)})
    files = sorted(path for path in partial.iterdir())
    _write_json(partial / "manifest.json", {path.name: _sha256(path) for path in files})
    for path in [*files, partial / "manifest.json", partial]:
        _fsync(path)
    if final.exists():  # the same iteration, saved before a crash
        shutil.rmtree(final)
    partial.rename(final)
    _fsync(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under ``folder``, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def load_checkpoint(path: Path) -> tuple[LearnerState, Progress]:
    """A checkpoint whose every byte is what was saved; ``CheckpointError`` otherwise."""
    from safetensors.numpy import load_file

    row = verify(path)
    arrays = {name: load_file(path / f"{name}.safetensors") for name in ARRAYS}
    updates = row.pop("updates")
    return LearnerState(**arrays, updates=updates), Progress(**row)


def verify(path: Path) -> dict[str, Any]:
    """Check every file against the manifest; the content of ``state.json``."""
    manifest_file = path / "manifest.json"
    try:
        manifest = json.loads(manifest_file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{manifest_file}: cannot be read ({error}). {_REMEDY}") from error
    for name in [*(f"{array}.safetensors" for array in ARRAYS), "state.json"]:
        file = path / name
        if not file.is_file() or _sha256(file) != manifest.get(name):
            raise CheckpointError(f"{file}: missing or not what was saved. {_REMEDY}")
    return json.loads((path / "state.json").read_text())


_REMEDY = "Delete that checkpoint's folder to fall back to the one before."


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
