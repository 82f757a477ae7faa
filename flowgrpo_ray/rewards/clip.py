"""A CLIP model of transformers as rewards use it: how near is an image to its text?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from flowgrpo_ray.rewards.colours import colour_rankings
from flowgrpo_ray.rewards.golden import Rankings
from flowgrpo_ray.rewards.loading import (
    ModelSize,
    Source,
    check_tokenizer,
    load,
    load_model,
    pick_device,
)
from flowgrpo_ray.rewards.pixels import Pixels, by_transformers

if TYPE_CHECKING:
    import torch

CLIP_L = ModelSize(427_616_513, 16_842_752)  # ViT-L/14
CLIP_H = ModelSize(986_109_441, 21_053_440)  # ViT-H/14


class ClipEncoder:
    """A CLIP model of transformers: unit vectors, float32, of images and of texts.

    `pixels` prepares the images, as the published code of a reward does. Texts are padded to the
    longest of a call; as the text model looks back only, any padding gives the same vectors.

    clip: the model, float32, which came from `model`.
    processor: where its tokenizer is.
    """

    def __init__(
        self,
        clip: Any,
        model: Source,
        processor: Source,
        pixels: Pixels,
        *,
        device: torch.device,
        dtype: str,
        batch: int,
    ) -> None:
        import torch
        from transformers import CLIPTokenizer

        # The logit scale is read before the weights are cast: a rounded logarithm is 1% off.
        self.scale = float(clip.logit_scale.exp())
        self.width = clip.config.projection_dim
        self._model = clip.to(device=device, dtype=getattr(torch, dtype))
        self._max_length = clip.config.text_config.max_position_embeddings
        self._pixels = pixels
        self._tokenizer = load(CLIPTokenizer, processor)
        check_tokenizer(self._tokenizer, clip.config.text_config.vocab_size, processor, model)
        self._device, self._dtype, self._batch = device, getattr(torch, dtype), batch

    @classmethod
    def load(
        cls,
        model: Source,
        processor: Source,
        prepare: Callable[[Source], Pixels] = by_transformers,
        *,
        device: torch.device,
        dtype: str,
        batch: int,
    ) -> ClipEncoder:
        """One whose weights, tokenizer and image processor have the names of transformers."""
        from transformers import CLIPModel

        clip, pixels = load_model(CLIPModel, model), prepare(processor)
        return cls(clip, model, processor, pixels, device=device, dtype=dtype, batch=batch)

    def logits(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """exp(logit scale) * cosine, float32 [n], of each image and its text, as `cosines`."""
        return np.float32(self.scale) * self.cosines(images, prompts)

    def cosines(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Cosine of each image, uint8 [n, H, W, 3], and its text: float32 [n].

        NaN where the model gives no numbers.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts")
        if not len(images):
            return np.zeros(0, np.float32)
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self.texts(list(place))[[place[prompt] for prompt in prompts]]
        return (self.images(list(images)) * texts).sum(dim=-1).cpu().numpy()

    def images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Unit vectors [n, d] of images, each uint8 [h, w, 3] of any size; NaN where undefined."""

        def features(part: Sequence[np.ndarray]) -> Any:
            pixels = self._pixels(part).to(device=self._device, dtype=self._dtype)
            return self._model.get_image_features(pixel_values=pixels)

        return self._unit_vectors(features, images)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [n, d] of texts, each cut to the length that the text model takes."""

        def features(part: Sequence[str]) -> Any:
            tokens = self._tokenizer(
                list(part),
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            )
            return self._model.get_text_features(**tokens.to(self._device))

        return self._unit_vectors(features, texts)

    def _unit_vectors(self, features: Any, inputs: Sequence[Any]) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            parts = [
                features(inputs[i : i + self._batch]).pooler_output.float()
                for i in range(0, len(inputs), self._batch)
            ]
            vectors = torch.cat(parts)
            # Not normalize(): it would make a zero of a vector without direction, this a NaN.
            return vectors / vectors.norm(dim=-1, keepdim=True)


class PromptMatch:
    """A reward that scores each image against its own prompt by the logit of a CLIP.

    A class below it has the options, what they are by default, and the scale.
    """

    SCALE: ClassVar[float]  # the logit is divided by it

    def __init__(
        self,
        model: Source,
        processor: Source,
        device: str | None,
        dtype: str,
        batch: int,
        prepare: Callable[[Source], Pixels] = by_transformers,
    ) -> None:
        place = pick_device(device)
        self._clip = ClipEncoder.load(
            model, processor, prepare, device=place, dtype=dtype, batch=batch
        )

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Scores, float32 [b], of `images`, uint8 [b, H, W, 3]; NaN: the model gave no numbers."""
        return self._clip.logits(images, prompts) / np.float32(self.SCALE)

    def golden(self) -> Rankings:
        """Flat colours, each above another one for its own name."""
        return colour_rankings()
