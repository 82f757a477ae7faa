"""The aesthetic reward: how would people rate an image from 1 to 10, whatever its prompt?

    reward = head(v / |v|),  v the image embedding of CLIP ViT-L/14

The head is the public predictor `sac+logos+ava1-l14-linearMSE` (C. Schuhmann 2022): five linear
layers without activations, trained on ratings. Its number is given as it is, neither scaled nor cut
off, as in DDPO (Black et al. 2023, arXiv 2305.13301) and in Flow-GRPO's public code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from flowgrpo_ray.rewards.clip import CLIP_L, ClipEncoder
from flowgrpo_ray.rewards.colours import flat
from flowgrpo_ray.rewards.golden import Golden, Rankings, noise_picture
from flowgrpo_ray.rewards.loading import (
    Batch,
    Device,
    Dtype,
    Revision,
    fill,
    pick_device,
    read_weights,
)
from flowgrpo_ray.rewards.pixels import by_torchvision

if TYPE_CHECKING:
    import torch

HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"


class AestheticReward:
    """Rates each image alone; prompts do not enter."""

    SIZE = CLIP_L

    def __init__(
        self,
        head: Annotated[
            str,
            Field(
                description="`sac+logos+ava1-l14-linearMSE.pth` from the [authors' repository]"
                "(https://github.com/christophschuhmann/improved-aesthetic-predictor); or a "
                ".safetensors file, or a folder or hub id that holds `head_file`"
            ),
        ],
        head_file: Annotated[str, Field(description="its name there")] = HEAD_FILE,
        head_revision: Revision = None,
        clip: Annotated[
            str, Field(description="the CLIP that the head was trained on: a folder or a hub id")
        ] = "openai/clip-vit-large-patch14",
        clip_revision: Revision = None,
        device: Device = None,
        dtype: Annotated[
            Dtype, Field(description="of CLIP's weights; the head stays float32")
        ] = "float32",
        batch: Batch = 32,
    ) -> None:
        place = pick_device(device)
        source = ("head", head, head_revision)
        weights = read_weights(source, head_file)
        clip_source = ("clip", clip, clip_revision)
        self._clip = ClipEncoder.load(
            clip_source, clip_source, by_torchvision, device=place, dtype=dtype, batch=batch
        )
        self._head = score_head(self._clip.width)
        fill(self._head, weights, source)
        self._head.to(place)

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Ratings, float32 [b], of `images`, uint8 [b, H, W, 3]; NaN: CLIP gave no numbers."""
        if not len(images):
            return np.zeros(0, np.float32)
        ratings = self._head["layers"](self._clip.images(list(images)))
        return ratings[:, 0].cpu().numpy()

    def golden(self) -> Rankings:
        """Any picture is rated from 1 to 10; a head without training stays near 0."""
        pictures = (noise_picture((64, 64)), flat("red"), flat("white"))
        return [[Golden(picture, "", low=1, high=10)] for picture in pictures]


def score_head(width: int) -> torch.nn.ModuleDict:
    """width -> 1024 -> 128 -> 64 -> 16 -> 1, for inference; its weights `layers.0.weight`, ..."""
    from torch import nn

    layers = nn.Sequential(
        # Dropout takes places in the numbering of the published weights: layers 0, 2, 4, 6, 7.
        *(nn.Linear(width, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout()),
        *(nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1)),
    )
    return nn.ModuleDict({"layers": layers}).eval().requires_grad_(False)
