"""The CLIPScore reward: how near is an image to its prompt, to a CLIP that nobody tuned?

    reward = exp(logit scale) * cosine(image, text) / 30

The logit of CLIP ViT-L/14, on the scale of Flow-GRPO's public code. (The CLIPScore of Hessel et al.
2021 is another multiple of the same cosine: 2.5 * max(cosine, 0), with ViT-B/32.)
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from flowgrpo_ray.rewards.clip import CLIP_L, PromptMatch
from flowgrpo_ray.rewards.loading import Batch, CosineDtype, Device, Revision
from flowgrpo_ray.rewards.pixels import bilinear


class ClipScoreReward(PromptMatch):
    """Scores each image against its own prompt.

    As in Flow-GRPO's code images are resized bilinearly, as numbers that are not rounded; CLIP was
    trained on Pillow's bicubic ones.
    """

    SCALE = 30.0
    SIZE = CLIP_L

    def __init__(
        self,
        path: Annotated[
            str,
            Field(description="CLIP with its tokenizer and image processor: a folder or a hub id"),
        ] = "openai/clip-vit-large-patch14",
        revision: Revision = None,
        device: Device = None,
        dtype: CosineDtype = "float32",
        batch: Batch = 32,
    ) -> None:
        source = ("path", path, revision)
        super().__init__(source, source, device, dtype, batch, bilinear)
