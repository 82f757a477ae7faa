"""The CLIPScore reward: how near is an image to its prompt, to a CLIP that nobody tuned?

    reward = exp(logit scale) * cosine(image, text) / 30

The logit of CLIP ViT-L/14, on the scale of Flow-GRPO's public code. (The CLIPScore of Hessel et al.
2021 is another multiple of the same cosine: 2.5 * max(cosine, 0), with ViT-B/32.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowgrpo_ray.rewards.clip import ClipEncoder
from flowgrpo_ray.rewards.colours import colour_rankings
from flowgrpo_ray.rewards.golden import Rankings
from flowgrpo_ray.rewards.loading import pick_device

SCALE = 30.0


class ClipScoreReward:
    """Scores each image against its own prompt.

    Flow-GRPO's code resizes images as float tensors, this one with Pillow, as CLIP was trained:
    scores differ slightly.

    path: a CLIP with its tokenizer and image processor, a local folder or a hub id.
    revision: of `path`, where that is a hub id.
    device: `cuda`, `cuda:1`, `cpu`; by default a GPU if there is one.
    dtype: of the weights: `float32`, `bfloat16` or `float16`. The cosine is always float32.
    batch: images that go through the model at once.
    """

    def __init__(
        self,
        path: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch: int = 32,
    ) -> None:
        source = ("path", path, revision)
        self._clip = ClipEncoder(
            source, source, device=pick_device(device), dtype=dtype, batch=batch
        )

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Scores, float32 [b], of `images`, uint8 [b, H, W, 3]; NaN: the model gave no numbers."""
        return self._clip.logits(images, prompts) / np.float32(SCALE)

    def golden(self) -> Rankings:
        """Flat colours, each above another one for its own name."""
        return colour_rankings()
