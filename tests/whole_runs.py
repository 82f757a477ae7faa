"""What the tests of whole runs share: their environment, and what a run folder says."""

from __future__ import annotations

import json
import os
from pathlib import Path

from flowgrpo_ray.checkpoint import list_checkpoints
from flowgrpo_ray.tracking import read_rows


def alone() -> dict[str, str]:
    """The environment of a command that starts a Ray of its own, with a token of its own."""
    hidden = ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_ADDRESS")
    return {key: value for key, value in os.environ.items() if key not in hidden}


def trained(run: Path) -> int:
    """The last iteration in the metrics file; -1 before there is any row."""
    path = run / "metrics.jsonl"
    return max((row["iteration"] for row in read_rows(path)), default=-1) if path.exists() else -1


def final_digests(run: Path, iterations: int) -> dict[str, str]:
    """SHA-256 of weights, averages and optimizer state, from the last checkpoint's manifest."""
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert newest.name == f"iteration-{iterations:06d}"
    manifest: dict[str, str] = json.loads((newest / "manifest.json").read_text())
    del manifest["state.json"]  # holds clock times
    return manifest
