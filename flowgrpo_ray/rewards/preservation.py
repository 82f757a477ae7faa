"""What an edit leaves as it was: the structural similarity of source and image.

    score = mean over channels, and over the pixels outside the mask, of
            (2 mx my + c1) (2 sxy + c2) / ((mx^2 + my^2 + c1) (sx^2 + sy^2 + c2))

SSIM of Wang et al. 2004 (doi 10.1109/TIP.2003.819861): means, variances and covariance of 8-bit
values under a Gaussian of 1.5 pixels, 11 pixels wide; c1 = (0.01 * 255)^2, c2 = (0.03 * 255)^2.
Within the mask the source stands in for the image, so what is there, and may change, has no part in
the score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowgrpo_ray.common.sources import mask_of
from flowgrpo_ray.rewards.golden import Golden, Rankings, noise_picture

MASK = "mask"
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


class PreservationReward:
    """Structural similarity of each image and the first source image of its prompt."""

    takes_sources = True
    reads = (MASK,)

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        sources: np.ndarray,
    ) -> np.ndarray:
        """Scores in [-1, 1], float32 [b], of `images`, uint8 [b, H, W, 3]; 1: nothing changed.

        NaN where the mask leaves nothing to compare.
        """
        rows = zip(images, sources[:, 0], metadata, strict=True)
        return np.array([_kept(*row) for row in rows], np.float32)

    @staticmethod
    def check_prompt(prompt: str, metadata: Mapping[str, Any]) -> None:
        """ValueError for a mask that is none."""
        if MASK in metadata:
            mask_of(metadata[MASK], (1, 1))

    def golden(self) -> Rankings:
        """The source itself above one that is changed in its lower half, and that above noise."""
        source = np.repeat(np.repeat(noise_picture((8, 8)), 8, axis=0), 8, axis=1)
        half = source.copy()
        half[32:] = 255 - half[32:]
        pictures = (source, half, noise_picture((64, 64)))
        return [[Golden(picture, "", sources=source[None]) for picture in pictures]]


def _kept(image: np.ndarray, source: np.ndarray, metadata: Mapping[str, Any]) -> float:
    if MASK not in metadata:
        return float(similarity(source, image).mean())
    mask = mask_of(metadata[MASK], (image.shape[0], image.shape[1]))
    if mask.all():
        return np.nan
    return float(similarity(source, np.where(mask[..., None], source, image))[~mask].mean())


def similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """SSIM around each pixel, float64 [H, W, 3], of images uint8 [H, W, 3]; edges are mirrored."""
    from scipy.ndimage import gaussian_filter

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, truncate=3.5, axes=(0, 1))

    x, y = one.astype(np.float64), other.astype(np.float64)
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    return (2 * mx * my + C1) * (2 * vxy + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))
