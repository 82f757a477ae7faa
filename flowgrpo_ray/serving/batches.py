"""Calls of one replica as the batches that its reward is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowgrpo_ray.serving.types import Metadata


@dataclass(frozen=True)
class Call:
    """What one call, or a part of a large one, asks to score."""

    images: np.ndarray  # uint8 [b, H, W, 3]
    prompts: Sequence[str]
    metadata: Metadata


@dataclass(frozen=True)
class Scored:
    """A call's scores, float32 [b], and its share of the reward's working time."""

    scores: np.ndarray
    seconds: float


def image_count(calls: list[Call]) -> int:
    return sum(len(call.images) for call in calls)


def by_size(calls: list[Call]) -> list[list[int]]:
    """Indices of the calls, together where their images have the same height and width."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, call in enumerate(calls):
        groups.setdefault(call.images.shape[1:], []).append(i)
    return list(groups.values())


def shares(together: Scored, calls: list[Call]) -> list[Scored]:
    """Each call's part of what was scored together."""
    ends = np.cumsum([len(call.images) for call in calls])
    parts = np.split(together.scores, ends[:-1])
    per_image = together.seconds / len(together.scores)
    return [Scored(part, per_image * len(part)) for part in parts]
