"""The colour reward of small signs: has the background the colour that the prompt names?

It is watched beside the OCR reward of the embedded model: optimising legibility alone washes
the colours out, and this number shows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowgrpo_ray.rewards.golden import Golden, Rankings
from flowgrpo_ray.rewards.ocr_text import QUOTED
from flowgrpo_ray.rewards.signs import COLOURS


class SignColourReward:
    """1 - mean |background - colour| / 255, over the background's pixels and R, G, B.

    Background are the top and the bottom eighth of the rows: the text of a sign stands in its
    middle and, other than left and right, never reaches there.
    """

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Scores in [0, 1], float32 [b], of `images`, uint8 [b, H, W, 3]."""
        wanted = np.array([COLOURS[named_colour(prompt)] for prompt in prompts], dtype=np.int64)
        rows = max(1, images.shape[1] // 8)
        background = np.concatenate([images[:, :rows], images[:, -rows:]], axis=1)
        # In integers, so that a score does not depend on what else is in the batch.
        error = np.abs(background - wanted.reshape(-1, 1, 1, 3)).mean(axis=(1, 2, 3))
        return (1 - error / 255).astype(np.float32)

    @staticmethod
    def check_prompt(prompt: str, metadata: Mapping[str, Any]) -> None:
        """ValueError for a prompt that names no known colour."""
        named_colour(prompt)

    def golden(self) -> Rankings:
        """For a red sign plain red is worth 1, and plain blue less."""
        red, blue = (np.full((8, 12, 3), COLOURS[name], np.uint8) for name in ("red", "blue"))
        prompt = 'red sign "407"'
        return [[Golden(red, prompt, low=1, high=1), Golden(blue, prompt)]]


def named_colour(prompt: str) -> str:
    """The first colour that `prompt` names outside its quoted text."""
    for word in re.findall(r"\w+", QUOTED.sub(" ", prompt).lower()):
        if word in COLOURS:
            return word
    raise ValueError(f"no colour of {', '.join(COLOURS)} in the prompt {prompt!r}")
