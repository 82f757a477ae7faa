"""What this machine gives a private cluster: a folder for its sockets, processors; what is told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from flowgrpo_ray.estimate import store
from flowgrpo_ray.spec.training import TrainingSpec, required_resources

LONGEST = 107  # bytes of a socket's path
OF_RAY = "/flowgrpo-abcdefgh/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
MOST = LONGEST - len(OF_RAY)
DEFAULT = Path("/tmp")


def temporary_root() -> Path:
    """Where the private cluster's folder is made: TMPDIR, or /tmp where that cannot hold it."""
    given = Path(os.environ.get("TMPDIR") or DEFAULT).absolute()
    return DEFAULT if _fault(given) else given


def _fault(folder: Path) -> str | None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return "no folder that can be written to"
    if len(os.fsencode(folder)) > MOST:
        return f"too long for the paths of Ray's sockets: {MOST} bytes at most"
    return None


def notes(spec: TrainingSpec) -> Iterator[str]:
    """What a person should know of this machine before ``spec`` runs on it."""
    if too_small := store.told(spec):
        yield too_small
    given = os.environ.get("TMPDIR")
    if given and (fault := _fault(Path(given).absolute())):
        yield f"TMPDIR = {given!r} is {fault}. Ray's files go to {DEFAULT}"
    asked, there = required_resources(spec)["CPU"], os.cpu_count() or 1
    if asked > there:
        count = sum(kind.count for kind in spec.actors.values())
        count += sum(reward.replicas for reward in spec.rewards.values())
        yield (
            f"{count} processes of this run ask for {asked:g} CPUs, and this machine has {there}: "
            "they take turns, and starting them takes long. Lower cluster.*.count or "
            "rewards.*.replicas"
        )
