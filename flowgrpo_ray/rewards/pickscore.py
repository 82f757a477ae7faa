"""The PickScore reward: how much would people prefer this image for its prompt?

    reward = exp(logit scale) * cosine(image, text) / 26

PickScore (Kirstain et al. 2023, arXiv 2305.01569) is a CLIP-H tuned on choices between pairs of
images; the division by 26 is the scale on which Flow-GRPO trains.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from flowgrpo_ray.rewards.clip import CLIP_H, PromptMatch
from flowgrpo_ray.rewards.loading import Batch, CosineDtype, Device, Revision


class PickScoreReward(PromptMatch):
    """Scores each image against its own prompt."""

    SCALE = 26.0
    SIZE = CLIP_H

    def __init__(
        self,
        path: Annotated[
            str, Field(description="the weights, 3.9 GB: a folder or a hub id")
        ] = "yuvalkirstain/PickScore_v1",
        processor: Annotated[
            str, Field(description="the folder or hub id of their tokenizer and image processor")
        ] = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        revision: Revision = None,
        device: Device = None,
        dtype: CosineDtype = "float32",
        batch: Batch = 32,
    ) -> None:
        super().__init__(
            ("path", path, revision), ("processor", processor, None), device, dtype, batch
        )
