"""The PickScore reward: how much would people prefer this image for its prompt?

    reward = exp(logit scale) * cosine(image, text) / 26

PickScore (Kirstain et al. 2023, arXiv 2305.01569) is a CLIP-H tuned on choices between pairs of
images; the division by 26 is the scale on which Flow-GRPO trains.
"""

from __future__ import annotations

from flowgrpo_ray.rewards.clip import PromptMatch
from flowgrpo_ray.rewards.loading import ModelSize


class PickScoreReward(PromptMatch):
    """Scores each image against its own prompt.

    path: the PickScore weights, a local folder or a hub id.
    processor: the folder or hub id of their tokenizer and image processor.
    revision: of `path`, where that is a hub id.
    device: `cuda`, `cuda:1`, `cpu`; by default a GPU if there is one.
    dtype: of the weights: `float32`, `bfloat16` or `float16`. The cosine is always float32.
    batch: images that go through the model at once.
    """

    SCALE = 26.0
    SIZE = ModelSize(986_109_441, 21_053_440)

    def __init__(
        self,
        path: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch: int = 32,
    ) -> None:
        super().__init__(
            ("path", path, revision), ("processor", processor, None), device, dtype, batch
        )
