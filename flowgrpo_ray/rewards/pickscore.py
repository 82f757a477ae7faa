"""The PickScore reward: how much would people prefer this image for its prompt?

    reward = exp(logit scale) * cosine(image, text) / 26

PickScore (Kirstain et al. 2023, arXiv 2305.01569) is a CLIP-H tuned on choices between pairs of
images; the division by 26 is the scale on which Flow-GRPO trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowgrpo_ray.rewards.clip import ClipEncoder
from flowgrpo_ray.rewards.colours import colour_rankings
from flowgrpo_ray.rewards.golden import Rankings
from flowgrpo_ray.rewards.loading import pick_device

SCALE = 26.0


class PickScoreReward:
    """Scores each image against its own prompt.

    path: the PickScore weights, a local folder or a hub id.
    processor: the folder or hub id of their tokenizer and image processor.
    revision: of `path`, where that is a hub id.
    device: `cuda`, `cuda:1`, `cpu`; by default a GPU if there is one.
    dtype: of the weights: `float32`, `bfloat16` or `float16`. The cosine is always float32.
    batch: images that go through the model at once.
    """

    def __init__(
        self,
        path: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch: int = 32,
    ) -> None:
        self._clip = ClipEncoder(
            ("path", path, revision),
            ("processor", processor, None),
            device=pick_device(device),
            dtype=dtype,
            batch=batch,
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
