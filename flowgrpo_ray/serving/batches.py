"""Calls of one replica as the batches that its reward is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowgrpo_ray.rewards import describe, needs_sources, takes_sources
from flowgrpo_ray.serving.args import RewardServiceArgs
from flowgrpo_ray.serving.types import Metadata


@dataclass(frozen=True)
class Call:
    """What one call, or a part of a large one, asks to score."""

    images: np.ndarray  # uint8 [b, H, W, 3]
    prompts: Sequence[str]
    metadata: Metadata
    sources: np.ndarray | None = None  # uint8 [b, n, H, W, 3]

    def parts(self, size: int) -> list[Call]:
        """Calls of up to ``size`` of its images."""
        slices = [slice(i, i + size) for i in range(0, len(self.images), size)]
        return [
            Call(
                self.images[part],
                self.prompts[part],
                self.metadata[part],
                None if self.sources is None else self.sources[part],
            )
            for part in slices
        ]


@dataclass(frozen=True)
class Scored:
    """A call's scores, float32 [b], and its share of the reward's working time."""

    scores: np.ndarray
    seconds: float


def image_count(calls: list[Call]) -> int:
    return sum(len(call.images) for call in calls)


def by_size(calls: list[Call]) -> list[list[int]]:
    """Indices of the calls, together where their images have the same height and width, and as
    many sources."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, call in enumerate(calls):
        sources = () if call.sources is None else call.sources.shape[1:]
        groups.setdefault(call.images.shape[1:] + sources, []).append(i)
    return list(groups.values())


def joined(calls: list[Call]) -> Call:
    """Calls of one size as one."""
    if len(calls) == 1:
        return calls[0]
    sources = [call.sources for call in calls if call.sources is not None]
    return Call(
        np.concatenate([call.images for call in calls]),
        [prompt for call in calls for prompt in call.prompts],
        [data for call in calls for data in call.metadata],
        np.concatenate(sources) if sources else None,
    )


def shares(together: Scored, calls: list[Call]) -> list[Scored]:
    """Each call's part of what was scored together."""
    ends = np.cumsum([len(call.images) for call in calls])
    parts = np.split(together.scores, ends[:-1])
    per_image = together.seconds / len(together.scores)
    return [Scored(part, per_image * len(part)) for part in parts]


def check_sources(args: RewardServiceArgs, call: Call) -> None:
    """ValueError for source images that a reward lacks or does not take, or that do not fit the
    images."""
    if call.sources is None:
        if needs_sources(args.reward, args.options):
            raise ValueError(f"{args.name} compares with source images, and this call has none")
        return
    count, *size = call.images.shape
    if not takes_sources(args.reward):
        raise ValueError(f"{args.name} takes no source images, and this call has some")
    each = call.sources.shape[1] if call.sources.ndim == 5 else 0
    if call.sources.dtype != np.uint8 or not each or call.sources.shape != (count, each, *size):
        raise ValueError(
            f"sources must be uint8 [b, n, H, W, 3] of images {list(call.images.shape)}, got "
            f"{describe(call.sources)}"
        )
