"""What travels between a reward's replicas and those who call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Metadata = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Sources:
    """The source images of a call: each array is of one prompt, uint8 [n, H, W, 3] or a reference
    to it, and `of` has for each image of the call the place of its own among them."""

    arrays: Sequence[Any]
    of: Sequence[int]


def app_name(reward: str) -> str:
    """Name of the Serve application that serves a reward."""
    return f"reward-{reward}"


@dataclass(frozen=True)
class Answer:
    """A replica's answer to one call."""

    scores: np.ndarray  # float32 [b]
    replica: str
    busy_s: float  # the call's share of the time that the reward worked
    seconds: float  # from the call's arrival at the replica to its answer
    heard: Mapping[str, str]  # what its libraries have warned of, by place


@dataclass(frozen=True)
class ReplicaStats:
    """What one replica has done since it started."""

    replica: str
    pid: int
    environment: str | None
    calls: int  # answered
    images: int  # of these
    failures: int  # calls that raised
    ongoing: int  # calls that are waited for now
    seconds: float  # since the start
    busy_s: float  # of these, in which the reward worked
    latencies: tuple[float, ...]  # seconds of the last calls, at most 1000
    last_error: str
