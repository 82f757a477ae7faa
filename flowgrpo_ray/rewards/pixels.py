"""Images as a CLIP takes them, prepared as the published code of each reward does.

That code differs in what resizes (Pillow, or torch on numbers in [0, 1]), in how a centre crop
rounds and in whether an image is cropped at all; scores differ in their third or fourth digit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flowgrpo_ray.rewards.loading import Source, load

if TYPE_CHECKING:
    import torch

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
Pixels = Callable[[Sequence[np.ndarray]], "torch.Tensor"]
"""Of images, each uint8 [h, w, 3] of any size, what a model takes: float32 [n, 3, s, s]."""


def by_transformers(source: Source) -> Pixels:
    """As the image processor at `source` says; Pillow resizes, also where torchvision is there."""
    from transformers import CLIPImageProcessorPil

    return processed(load(CLIPImageProcessorPil, source))


def by_torchvision(source: Source) -> Pixels:
    """The same, with torchvision's centre crop."""
    return processed(load(torchvision_processor(), source))


def processed(processor: Any) -> Pixels:
    """What an image processor of transformers makes of images."""

    def pixels(images: Sequence[np.ndarray]) -> torch.Tensor:
        # A strip of 3 rows would be taken for channels if the format were left to be guessed.
        return processor(
            images=list(images), input_data_format="channels_last", return_tensors="pt"
        )["pixel_values"]

    return pixels


def torchvision_processor() -> Any:
    """CLIP's image processor of transformers, except that it crops as torchvision does."""
    from transformers import CLIPImageProcessorPil

    class TorchvisionCrop(CLIPImageProcessorPil):
        def center_crop(self, image: np.ndarray, size: Any, **_: Any) -> np.ndarray:
            return centre(image, size.height, size.width)

    return TorchvisionCrop


def centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of `image`, [c, h, w], padded with 0 where it is smaller, as torchvision's.

    Half a row rounds to the even number: of 3 rows too many the first 2 go, where transformers'
    own crop takes off 1.
    """
    lacks = [max(want - has, 0) for has, want in zip(image.shape[1:], (height, width), strict=True)]
    image = np.pad(image, [(0, 0), *((lack // 2, lack - lack // 2) for lack in lacks)])
    top, left = round((image.shape[1] - height) / 2), round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]


def longest_side(side: int) -> Pixels:
    """The whole image: bicubic until its longer side is `side`, black beside it."""

    def pixels(images: Sequence[np.ndarray]) -> torch.Tensor:
        def size(height: int, width: int) -> tuple[int, int]:
            scale = side / max(height, width)
            return round(height * scale), round(width * scale)

        return resized(images, size, "bicubic", (side, side), MEAN, STD)

    return pixels


def bilinear(source: Source) -> Pixels:
    """The shorter side and centre that the processor at `source` names, resized bilinearly."""
    from transformers import CLIPImageProcessorPil

    processor = load(CLIPImageProcessorPil, source)
    side, crop = processor.size["shortest_edge"], processor.crop_size

    def size(height: int, width: int) -> tuple[int, int]:
        short = min(height, width)
        return int(side * height / short), int(side * width / short)

    def pixels(images: Sequence[np.ndarray]) -> torch.Tensor:
        shape = crop["height"], crop["width"]
        return resized(images, size, "bilinear", shape, processor.image_mean, processor.image_std)

    return pixels


def resized(
    images: Sequence[np.ndarray],
    size: Callable[[int, int], tuple[int, int]],
    mode: str,
    shape: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """torchvision's transforms of numbers in [0, 1], where nothing is rounded or clamped.

    Resized in `mode`, antialiased, to the `size` of its height and width; centre of `shape`;
    normalised by `mean` and `std`. images: uint8 [h, w, 3] each; float32 [n, 3, *shape].
    """
    import torch

    shift, scale = (np.asarray(values, np.float32)[:, None, None] for values in (mean, std))

    def one(image: np.ndarray) -> np.ndarray:
        planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255
        scaled = torch.nn.functional.interpolate(
            planes[None], size(*image.shape[:2]), mode=mode, antialias=True
        )[0]
        return (centre(scaled.numpy(), *shape) - shift) / scale

    return torch.from_numpy(np.stack([one(image) for image in images]))
