"""The CLIP-IQA reward: does a CLIP take the image for a good photo rather than a bad one?

    reward = softmax(exp(logit scale) * (cosine(image, good), cosine(image, bad)))[0]

CLIP-IQA (Wang et al. 2022, arXiv 2207.12396) needs no reference image and no prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowgrpo_ray.rewards.clip import CLIP_L, ClipEncoder
from flowgrpo_ray.rewards.loading import pick_device


class ClipIqaReward:
    """Rates each image alone, from 0 to 1; prompts do not enter.

    The authors' is a ResNet-50 CLIP without position embedding, for images of any size. Here it is
    any CLIP of transformers, on what its image processor makes of an image.

    good, bad: the two texts; the authors also have `Sharp photo.` and `Blurry photo.`, and others.
    path: a CLIP with its tokenizer and image processor, a local folder or a hub id.
    revision: of `path`, where that is a hub id.
    device: `cuda`, `cuda:1`, `cpu`; by default a GPU if there is one.
    dtype: of the weights: `float32`, `bfloat16` or `float16`. The cosine is always float32.
    batch: images that go through the model at once.
    """

    SIZE = CLIP_L

    def __init__(
        self,
        good: str = "Good photo.",
        bad: str = "Bad photo.",
        path: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch: int = 32,
    ) -> None:
        source = ("path", path, revision)
        place = pick_device(device)
        self._clip = ClipEncoder.load(source, source, device=place, dtype=dtype, batch=batch)
        self._texts = self._clip.texts([good, bad])

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Scores in [0, 1], float32 [b], of `images`, uint8 [b, H, W, 3]; NaN: no numbers."""
        if not len(images):
            return np.zeros(0, np.float32)
        logits = self._clip.scale * self._clip.images(list(images)) @ self._texts.T
        return logits.softmax(dim=-1)[:, 0].cpu().numpy()
