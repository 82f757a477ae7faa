"""The rank of any reward within its group.

    score = (rank - 1) / (n - 1) of the n images of a prompt that have a score, the best one 1

What a pointwise reward says is kept in order and loses its scale: a reward whose differences are
tiny for one prompt and huge for another weighs the same in both. Equal scores share the mean of
their ranks; where all are equal each is worth 1/2, so that such a group has no spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.rewards import (
    ask,
    build,
    check_options,
    is_over_group,
    keys_read,
    needs_sources,
    prompt_check,
    read_check,
)
from flowgrpo_ray.rewards.golden import Rankings, golden_of


class RankReward:
    """Ranks the images of a group by another reward."""

    over_group = True
    takes_sources = True

    def __init__(
        self,
        reward: Annotated[
            str, Field(description="the one that scores each image: built in, or `module:Class`")
        ],
        options: Annotated[Mapping[str, Any] | None, Field(description="of that reward")] = None,
    ) -> None:
        self._reward = build(reward, options)

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        sources: np.ndarray | None = None,
    ) -> np.ndarray:
        """Ranks in [0, 1], float32 [b], of the images of one group, uint8 [b, H, W, 3].

        NaN for an image that the reward could not score; it is left out of the ranking.
        """
        return ranks(ask(self._reward, images, prompts, metadata, sources))

    @staticmethod
    def check_prompt(prompt: str, metadata: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """ValueError for a prompt that the ranked reward could never score."""
        prompt_check(options["reward"], options.get("options"))(prompt, metadata)

    @staticmethod
    def check_read(
        prompt: str, metadata: Mapping[str, Any], read: str, options: Mapping[str, Any]
    ) -> None:
        """ValueError where the model does not read what the ranked reward asks for."""
        read_check(options["reward"], options.get("options"))(prompt, metadata, read)

    @staticmethod
    def reads(options: Mapping[str, Any]) -> frozenset[str] | None:
        """What the ranked reward reads."""
        return keys_read(options["reward"], options.get("options"))

    @staticmethod
    def needs_sources(options: Mapping[str, Any]) -> bool:
        """Whether the ranked reward does."""
        return needs_sources(options["reward"], options.get("options"))

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """ValueError for a reward that cannot be ranked, or that does not take its options."""
        name = options["reward"]
        try:
            if is_over_group(name):
                raise ValueError(f"reward = {name!r} compares images itself: rank a pointwise one")
            check_options(name, options["options"] or {})
        except SpecError as error:
            raise ValueError(str(error)) from error

    def golden(self) -> Rankings:
        """Those of the ranked reward; its scores have no bounds here."""
        free = {"low": -np.inf, "high": np.inf}
        return [[replace(image, **free) for image in row] for row in golden_of(self._reward)]


def ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks in [0, 1], float32 [b], of scores [b], mean ranks for equal ones; NaN stays NaN."""
    valid = np.isfinite(scores)
    of_valid = np.asarray(scores, np.float64)[valid]
    below = (of_valid[:, None] > of_valid).sum(1)
    equal = (of_valid[:, None] == of_valid).sum(1)
    found = np.full(len(scores), np.nan, np.float32)
    found[valid] = (below + (equal - 1) / 2) / (len(of_valid) - 1) if len(of_valid) > 1 else 0.5
    return found
