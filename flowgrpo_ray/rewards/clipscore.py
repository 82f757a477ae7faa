"""The CLIPScore reward: how near is an image to its prompt, to a CLIP that nobody tuned?

    reward = exp(logit scale) * cosine(image, text) / 30

The logit of CLIP ViT-L/14, on the scale of Flow-GRPO's public code. (The CLIPScore of Hessel et al.
2021 is another multiple of the same cosine: 2.5 * max(cosine, 0), with ViT-B/32.)
"""

from __future__ import annotations

from flowgrpo_ray.rewards.clip import CLIP_L, PromptMatch


class ClipScoreReward(PromptMatch):
    """Scores each image against its own prompt.

    Flow-GRPO's code resizes images as float tensors, this one with Pillow, as CLIP was trained:
    scores differ slightly.

    path: a CLIP with its tokenizer and image processor, a local folder or a hub id.
    revision: of `path`, where that is a hub id.
    device: `cuda`, `cuda:1`, `cpu`; by default a GPU if there is one.
    dtype: of the weights: `float32`, `bfloat16` or `float16`. The cosine is always float32.
    batch: images that go through the model at once.
    """

    SCALE = 30.0
    SIZE = CLIP_L

    def __init__(
        self,
        path: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch: int = 32,
    ) -> None:
        source = ("path", path, revision)
        super().__init__(source, source, device, dtype, batch)
