"""Checkpoints that are whole or not there: written beside, fsynced, renamed, with digests.

A checkpoint is a folder ``checkpoints/iteration-000070`` of safetensors files, ``state.json`` and
``manifest.json`` with the SHA-256 of each. Nothing in it is pickled. What several learner ranks
share out is in a file of each, ``weights-00001-of-00002.safetensors``; any number can go on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo_ray.common.errors import CheckpointError
from flowgrpo_ray.common.paths import share_mode
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.run.state import read_json

if TYPE_CHECKING:
    from flowgrpo_ray.common.types import Float32, LearnerState

PREFIX = "iteration-"
BEST = "best"  # in place of an iteration's number
ARRAYS = ("weights", "ema", "exp_avg", "exp_avg_sq")
FOLLOWER = "follower"  # an array set that some objectives have
BEHAVIOUR = "behaviour"  # and one that is there with max_lag 1
SETS = (*ARRAYS, FOLLOWER, BEHAVIOUR)
NUMBERS = ("updates", "loss_scale", "scale_held", "behaviour_version")


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
    # The best evaluation that was saved: by which checkpoint.best, after how many iterations, 0 for
    # none yet, and how good.
    best_by: str = ""
    best_iteration: int = 0
    best_value: float = 0.0
    tie: dict[str, Any] = field(default_factory=dict)  # of a weight that adapts: its controller

    @property
    def best(self) -> dict[str, Any] | None:
        """For summary.json."""
        return best_in(asdict(self))


def best_in(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a ``state.json`` says of the best checkpoint: ``reward``, ``iteration``, ``value``."""
    if not state.get("best_iteration"):
        return None
    found = ("best_by", "best_iteration", "best_value")
    return dict(zip(("reward", "iteration", "value"), (state[key] for key in found), strict=True))


def save_checkpoint(
    folder: Path,
    shares: Sequence[LearnerState],
    progress: Progress,
    keep: int,
    protect: Collection[int] = (),
) -> Path:
    """Write the checkpoint of ``progress.iteration`` under ``folder``; keep the newest ``keep``.

    ``shares`` are those of the learner's ranks (``Learner.share``), in order.
    Beside these the best one is kept, and of each iteration in ``protect`` the newest checkpoint
    up to it. One that cannot be written whole (a full disk) leaves nothing behind:
    ``CheckpointError``.
    """
    from safetensors import SafetensorError

    final = folder / f"{PREFIX}{progress.iteration:06d}"
    partial = folder / f".{final.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f".{PREFIX}*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir()
        _write(partial, shares, progress)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = list_checkpoints(folder)
        newest = f"the last one is {kept[-1]}" if kept else "there is none before it"
        raise CheckpointError(
            f"{final} could not be written: {error}. Nothing else is harmed, {newest}: free space "
            "on that disk and continue with --resume"
        ) from error
    if final.exists():  # the same iteration, saved before a crash
        shutil.rmtree(final)
    partial.rename(final)
    _fsync(folder)
    protected = {
        newest_checkpoint(folder, iteration) for iteration in {*protect, progress.best_iteration}
    }
    for old in list_checkpoints(folder)[:-keep]:
        if old not in protected:
            shutil.rmtree(old)
    return final


def _write(partial: Path, shares: Sequence[LearnerState], progress: Progress) -> None:
    """All files of a checkpoint, on disk."""
    from safetensors.numpy import save_file

    for name in SETS:
        parts = [part for share in shares if (part := getattr(share, name))]
        if not parts and name in ARRAYS:
            parts = [{}]
        for number, part in enumerate(parts, 1):
            of = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
            save_file(part, partial / f"{name}{of}.safetensors")
    numbers = {name: getattr(shares[0], name) for name in NUMBERS}
    _write_json(partial / "state.json", {**numbers, **asdict(progress)})
    files = sorted(path for path in partial.iterdir())
    share_mode(files, like=partial / "state.json")
    _write_json(partial / "manifest.json", {path.name: _sha256(path) for path in files})
    for path in [*files, partial / "manifest.json", partial]:
        _fsync(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under ``folder``, oldest first."""
    found = (path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdecimal())
    return sorted((p for p in found if p.is_dir() and not p.is_symlink()), key=checkpoint_iteration)


def checkpoint_iteration(path: Path) -> int:
    """After how many iterations the checkpoint at ``path`` was saved."""
    return int(path.name.removeprefix(PREFIX))


def newest_checkpoint(folder: Path, iteration: int) -> Path | None:
    """The newest checkpoint under ``folder`` of at most ``iteration``, if there is one."""
    known = reversed(list_checkpoints(folder))
    return next((path for path in known if checkpoint_iteration(path) <= iteration), None)


def best_checkpoint(folder: Path) -> dict[str, Any] | None:
    """What the newest checkpoint under ``folder`` says of the best one, if that is there."""
    saved = list_checkpoints(folder)
    if not saved:
        return None
    try:
        best = best_in(read_json(saved[-1] / "state.json") or {})
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{saved[-1]}: cannot be read ({error}). {_REMEDY}") from error
    return best if best and best["iteration"] in map(checkpoint_iteration, saved) else None


def load_checkpoint(path: Path) -> tuple[LearnerState, Progress]:
    """A checkpoint whose every byte is what was saved; ``CheckpointError`` otherwise."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from flowgrpo_ray.common.types import LearnerState

    row = verify(path)
    kinds = {field.name: field.type for field in (*fields(LearnerState), *fields(Progress))}
    try:
        if odd := [name for name, value in row.items() if not _is(value, kinds[name])]:
            raise TypeError(f"{odd[0]} = {row[odd[0]]!r} in state.json")
        numbers = {name: row.pop(name) for name in NUMBERS}
        present = {file.name for file in path.iterdir()}
        arrays = {
            name: joined(load_file(path / file) for file in files_of(name, present))
            for name in SETS
        }
        if (numbers["behaviour_version"] >= 0) != bool(arrays[BEHAVIOUR]):
            raise KeyError(BEHAVIOUR)
        if any(array.dtype != "float32" for of in arrays.values() for array in of.values()):
            raise TypeError("arrays that are not float32")
        return LearnerState(**arrays, **numbers), Progress(**row)
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: written by another version of flowgrpo_ray ({error}). Continue it with that "
            "one, or train anew under another name"
        ) from error


def files_of(name: str, files: Iterable[str]) -> list[str]:
    """Those of ``files`` that hold an array set, in order: all of its parts, or none."""
    pattern = re.compile(rf"{name}(?:-(\d{{5}})-of-(\d{{5}}))?\.safetensors")
    found = {file: match for file in files if (match := pattern.fullmatch(file))}
    numbered = sorted((m[1] or "00001", m[2] or "00001") for m in found.values())
    whole = [(f"{number:05d}", f"{len(found):05d}") for number in range(1, len(found) + 1)]
    return sorted(found) if numbered == whole else []


def joined(parts: Iterable[Mapping[str, Float32]]) -> dict[str, Float32]:
    """Whole arrays from the ranks' shares, in rank order: of some a slice each, of others all."""
    import numpy as np

    slices: dict[str, list[Float32]] = {}
    for part in parts:
        for name, array in part.items():
            slices.setdefault(name, []).append(array)
    return {name: of[0] if len(of) == 1 else np.concatenate(of) for name, of in slices.items()}


def verify(path: Path) -> dict[str, Any]:
    """Check every file against the manifest; the content of ``state.json``."""
    manifest_file = path / "manifest.json"
    try:
        manifest = parse(manifest_file.read_bytes())
        if not isinstance(manifest, dict) or any(Path(name).name != name for name in manifest):
            raise ValueError("it is no table of this folder's files")
        needed = {f"{name}.safetensors" for name in ARRAYS if not files_of(name, manifest)}
        for name in sorted({*needed, "state.json", *manifest}):
            file = path / name
            if not file.is_file() or _sha256(file) != manifest.get(name):
                raise CheckpointError(f"{file}: missing or not what was saved. {_REMEDY}")
        state = parse((path / "state.json").read_bytes())
        if not isinstance(state, dict):
            raise ValueError("state.json holds no object")
        return state
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{manifest_file}: cannot be read ({error}). {_REMEDY}") from error


def _is(value: object, kind: Any) -> bool:
    """Whether a value of state.json is of a field's type, which is written as text."""
    if kind in ("int", "str"):
        return type(value).__name__ == kind
    if kind == "float":
        return type(value) in (int, float)
    return isinstance(value, dict) and all(v is None or _is(v, "float") for v in value.values())


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
