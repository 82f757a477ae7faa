"""The CLIP-IQA reward: does a CLIP take the image for a good photo rather than a bad one?

    reward = softmax(exp(logit scale) * (cosine(image, good), cosine(image, bad)))[0]

CLIP-IQA (Wang et al. 2022, arXiv 2207.12396) needs no reference image and no prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from flowgrpo_ray.rewards.clip import CLIP_L, ClipEncoder
from flowgrpo_ray.rewards.loading import Batch, CosineDtype, Device, Revision, pick_device


class ClipIqaReward:
    """Rates each image alone, from 0 to 1; prompts do not enter.

    The authors' is a ResNet-50 CLIP without position embedding, for images of any size. Here it is
    any CLIP of transformers, on what its image processor makes of an image.
    """

    SIZE = CLIP_L

    def __init__(
        self,
        good: Annotated[
            str, Field(description="of a good image; the authors also have `Sharp photo.`")
        ] = "Good photo.",
        bad: Annotated[str, Field(description="of a bad one, `Blurry photo.`")] = "Bad photo.",
        path: Annotated[
            str,
            Field(description="a CLIP with its tokenizer and image processor: folder or hub id"),
        ] = "openai/clip-vit-large-patch14",
        revision: Revision = None,
        device: Device = None,
        dtype: CosineDtype = "float32",
        batch: Batch = 32,
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
