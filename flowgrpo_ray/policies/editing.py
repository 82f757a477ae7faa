"""What policies over editing pipelines share: the images that a prompt changes, as latents.

The network sees their tokens behind those of the image that is drawn, and answers for all; only
the first ones are the velocity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowgrpo_ray.common.types import Condition, Images
from flowgrpo_ray.policies.arrays import as_array
from flowgrpo_ray.policies.base import Configs
from flowgrpo_ray.policies.pipeline import PackedPolicy

SOURCES = "sources"  # [n, C, h, w] of a condition: latents of the images to change


class EditingPolicy(PackedPolicy):
    """A condition holds the latents of its source images, ``sources [n, C, h, w]``, as the
    pipeline's autoencoder encodes them: the mode of its distribution, scaled, in
    ``decoder_dtype``."""

    def load_readers(self) -> dict[str, Any]:
        return {"vae": self.load_autoencoder()}

    @torch.no_grad()
    def encode_edit(self, prompt: str, sources: Images) -> Condition:
        latents = torch.cat([self.source_latents(image) for image in sources])
        return {SOURCES: as_array(latents), **self.read(prompt, sources)}

    def read(self, prompt: str, sources: Images) -> Condition:
        """What the text encoders make of a prompt, alone or with its images."""
        (text,) = self.encode_batch([prompt])
        return {**text, **self._negative}

    def source_latents(self, image: np.ndarray) -> Tensor:
        """``[1, C, h, w]`` of one image ``[H, W, 3]``."""
        pipe = self.encoder
        pixels = self.source_pixels(Image.fromarray(image), pipe.image_processor)
        return pipe._encode_vae_image(pixels.to(self.device, pipe.vae.dtype), None)

    def source_pixels(self, image: Image.Image, processor: Any) -> Tensor:
        """What the autoencoder is given, ``[1, 3, H, W]``; ``processor`` is the pipeline's."""
        return processor.preprocess(image, image.height, image.width)

    def source_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which the autoencoder sees an image of ``size``."""
        return size

    def tokens(self, x: Tensor, condition: dict[str, Tensor]) -> Tensor:
        sources = condition.get(SOURCES)
        images = [x] if sources is None else [x, *sources.unbind(1)]
        return torch.cat([self.pack(image) for image in images], dim=1)

    def example_edit(
        self, batch: int, configs: Configs, sources: int, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        shape = (batch, sources, *self.latent_shape(self.source_size(size)))
        latents = torch.empty(shape, dtype=self.decoder_dtype)
        return {**self.example_condition(batch, configs), SOURCES: latents}
