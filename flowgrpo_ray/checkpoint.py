"""Checkpoints that are whole or not there: written beside, fsynced, renamed, with digests.

A checkpoint is a folder ``checkpoints/iteration-000070`` of safetensors files, ``state.json`` and
``manifest.json`` with the SHA-256 of each. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo_ray.errors import CheckpointError

if TYPE_CHECKING:
    from flowgrpo_ray.types import LearnerState

PREFIX = "iteration-"
ARRAYS = ("weights", "ema", "exp_avg", "exp_avg_sq")
NUMBERS = ("updates", "loss_scale", "scale_held")


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside the learner's state."""

    iteration: int
    images: int
    seconds: float  # wall clock of all attempts, starts included
    failed_groups: int
    spec_identity: str
    prompts_digest: str
    eval_before: dict[str, float | None] = field(default_factory=dict)
    eval_last: dict[str, float | None] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    state: LearnerState,
    progress: Progress,
    keep: int,
    protect: Collection[int] = (),
) -> Path:
    """Write the checkpoint of ``progress.iteration`` under ``folder``; keep the newest ``keep``.

    Beside these, of each iteration in ``protect`` the newest checkpoint up to it is kept.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{PREFIX}{progress.iteration:06d}"
    partial = folder / f".{final.name}.partial"
    for leftover in folder.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(leftover)
    partial.mkdir()
    for name in ARRAYS:
        save_file(getattr(state, name), partial / f"{name}.safetensors")
    numbers = {name: getattr(state, name) for name in NUMBERS}
    _write_json(partial / "state.json", {**numbers, **asdict(progress)})
    files = sorted(path for path in partial.iterdir())
    _write_json(partial / "manifest.json", {path.name: _sha256(path) for path in files})
    for path in [*files, partial / "manifest.json", partial]:
        _fsync(path)
    if final.exists():  # the same iteration, saved before a crash
        shutil.rmtree(final)
    partial.rename(final)
    _fsync(folder)
    protected = {newest_checkpoint(folder, iteration) for iteration in protect}
    for old in list_checkpoints(folder)[:-keep]:
        if old not in protected:
            shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under ``folder``, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def checkpoint_iteration(path: Path) -> int:
    """After how many iterations the checkpoint at ``path`` was saved."""
    return int(path.name.removeprefix(PREFIX))


def newest_checkpoint(folder: Path, iteration: int) -> Path | None:
    """The newest checkpoint under ``folder`` of at most ``iteration``, if there is one."""
    known = [path for path in list_checkpoints(folder) if path.name[len(PREFIX) :].isdigit()]
    return next((p for p in reversed(known) if checkpoint_iteration(p) <= iteration), None)


def load_checkpoint(path: Path) -> tuple[LearnerState, Progress]:
    """A checkpoint whose every byte is what was saved; ``CheckpointError`` otherwise."""
    from safetensors.numpy import load_file

    from flowgrpo_ray.types import LearnerState

    row = verify(path)
    arrays = {name: load_file(path / f"{name}.safetensors") for name in ARRAYS}
    try:
        numbers = {name: row.pop(name) for name in NUMBERS}
        return LearnerState(**arrays, **numbers), Progress(**row)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: written by another version of flowgrpo_ray ({error}). Continue it with that "
            "one, or train anew under another name"
        ) from error


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
