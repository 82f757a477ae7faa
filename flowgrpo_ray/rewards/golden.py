"""Golden images: a model that loads but scores nonsense is found before it scores a sample.

A reward may have a method `golden()` that returns rankings of pictures: within each, every picture
must score above the next, and each within its bounds. A deployment scores them when it starts, and
again from time to time while it is idle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.rewards import ask


@dataclass(frozen=True, eq=False)
class Golden:
    """A picture, uint8 [H, W, 3], whose score is known to lie within [low, high]."""

    image: np.ndarray
    prompt: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    low: float = -math.inf
    high: float = math.inf
    sources: np.ndarray | None = None  # uint8 [n, H, W, 3], of which it is an edit


Rankings = Sequence[Sequence[Golden]]
"""Each a list of pictures by falling score."""


def golden_of(reward: object) -> Rankings:
    """The rankings that a reward brings; none if it has no method `golden`."""
    own: Callable[[], Rankings] | None = getattr(reward, "golden", None)
    return own() if own else []


def noise_picture(size: tuple[int, int]) -> np.ndarray:
    """A picture of nothing, uint8 [H, W, 3], the same at every call."""
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


def score_golden(reward: Callable[..., np.ndarray], rankings: Rankings) -> np.ndarray:
    """Scores, float32 [n], of all pictures in their order; those of one size in one call, or each
    ranking in one, if the reward compares the images of a group."""
    if getattr(reward, "over_group", False) and len(rankings) > 1:
        return np.concatenate([score_golden(reward, [ranking]) for ranking in rankings])
    pictures = [picture for ranking in rankings for picture in ranking]
    scores = np.zeros(len(pictures), np.float32)
    shapes = [(p.image.shape, None if p.sources is None else p.sources.shape) for p in pictures]
    for shape in dict.fromkeys(shapes):
        places = [i for i, of in enumerate(shapes) if of == shape]
        group = [pictures[i] for i in places]
        images = np.stack([picture.image for picture in group])
        given = [picture.sources for picture in group if picture.sources is not None]
        texts, metadata = [p.prompt for p in group], [p.metadata for p in group]
        scores[places] = ask(reward, images, texts, metadata, np.stack(given) if given else None)
    return scores


def check_golden(rankings: Rankings, scores: np.ndarray) -> None:
    """RewardError for a score out of its bounds, or not above the next one's of its ranking."""
    values = iter(scores.tolist())
    for ranking in rankings:
        previous = math.inf
        for place, (picture, score) in enumerate(zip(ranking, values, strict=False)):
            what = f"golden image {place} of the prompt {picture.prompt!r} scores {score:.4g}"
            if not picture.low <= score <= picture.high or not math.isfinite(score):
                raise RewardError(f"{what}, not within [{picture.low:g}, {picture.high:g}]")
            if not score < previous:
                raise RewardError(f"{what}, not below the {previous:.4g} of the one before it")
            previous = score
