"""The JPEG rewards: how small, or how large, is an image as a JPEG file?

    jpeg_incompressibility = bytes / 1000
    jpeg_compressibility   = -bytes / 1000 / 500

The two tasks without a model of DDPO (Black et al. 2023, arXiv 2305.13301): files of quality 95, in
kilobytes. DDPO's compressibility is -bytes / 1000; Flow-GRPO's public code divides it by 500, so
that it can be weighted against rewards of about 1, and so does this one.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowgrpo_ray.rewards.colours import flat
from flowgrpo_ray.rewards.golden import Golden, Rankings, noise_picture

QUALITY = 95
COMPRESSIBILITY_SCALE = 500


class JpegIncompressibilityReward:
    """Kilobytes of the image as a JPEG file. Prompts do not enter."""

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Scores above 0, float32 [b], of `images`, uint8 [b, H, W, 3]."""
        return np.array([kilobytes(image) for image in images], np.float32)

    def golden(self) -> Rankings:
        """Noise above one colour."""
        return [[Golden(noise_picture((64, 64)), ""), Golden(flat("red"), "", low=0)]]


class JpegCompressibilityReward:
    """Minus the kilobytes of the image as a JPEG file, over 500. Prompts do not enter."""

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Scores below 0, float32 [b], of `images`, uint8 [b, H, W, 3]."""
        return np.array([-kilobytes(i) / COMPRESSIBILITY_SCALE for i in images], np.float32)

    def golden(self) -> Rankings:
        """One colour above noise."""
        return [[Golden(flat("red"), "", high=0), Golden(noise_picture((64, 64)), "")]]


def kilobytes(image: np.ndarray) -> float:
    """Size, in 1000 bytes, of an image uint8 [H, W, 3] as Pillow writes it at quality 95."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=QUALITY)
    return file.tell() / 1000
