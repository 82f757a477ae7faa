"""Flat colours and their names: golden images for any model that compares images with texts."""

from __future__ import annotations

import numpy as np

from flowgrpo_ray.rewards.golden import Golden, Rankings

COLOURS = {
    **{"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 160, 0), "pink": (255, 130, 200)},
    **{"yellow": (255, 230, 0), "purple": (120, 0, 150)},
    **{"black": (0, 0, 0), "white": (255, 255, 255)},
}
PAIRS = (("red", "blue"), ("green", "pink"), ("yellow", "purple"), ("black", "white"))
"""Colours that nobody takes for one another."""


def colour_rankings() -> Rankings:
    """Each colour of `PAIRS` above the other of its pair, for the prompt that names it.

    Both ways: a model that only likes one picture more than the other fails one of the two.
    """
    return [
        [Golden(flat(shown), f"a plain {named} background") for shown in (named, other)]
        for pair in PAIRS
        for named, other in (pair, pair[::-1])
    ]


def flat(colour: str) -> np.ndarray:
    """A picture of one colour, uint8 [64, 64, 3]."""
    return np.full((64, 64, 3), COLOURS[colour], np.uint8)
