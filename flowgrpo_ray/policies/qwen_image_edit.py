"""Qwen-Image-Edit: Qwen-Image whose language model reads the image to change with the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowgrpo_ray.common.types import NEGATIVE, Condition, Images
from flowgrpo_ray.policies.arrays import as_array
from flowgrpo_ray.policies.base import Configs
from flowgrpo_ray.policies.editing import SOURCES, EditingPolicy
from flowgrpo_ray.policies.loading import from_pretrained, load_tokenizer, write_published
from flowgrpo_ray.policies.qwen_image import QwenImagePolicy

PROCESSOR = "processor"  # the part that makes tokens and patches of prompt and images
PATCH = 28  # pixels along the side of what becomes a token of the language model
MARKS = 16  # tokens at most around an image, as "Picture 1: ", and of the template's end


class QwenImageEditPolicy(EditingPolicy, QwenImagePolicy):
    """``QwenImageEditPipeline``'s parts. Its language model and its autoencoder see the source at
    the size of the image drawn; the pipeline shows both a copy of about 1024 x 1024 pixels.

    Prompts are read whole, with their images, as is the one that guidance leads away from.
    """

    pipeline = "QwenImageEditPipeline"
    sources = range(1, 2)

    def reading(self) -> None:
        return None  # of any length

    def export_parts(self) -> dict[str, Any]:
        return {PROCESSOR: None}

    def load_readers(self) -> dict[str, Any]:
        return {**super().load_readers(), PROCESSOR: self.load_processor()}

    def load_processor(self) -> Any:
        """transformers' own without videos, which need torchvision. Images are resized by Pillow on
        every machine, so that all make the same encodings."""
        from transformers import Qwen2VLProcessor
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )
        from transformers.processing_utils import ProcessorMixin

        class Processor(Qwen2VLProcessor):
            def __init__(self, image_processor: Any, tokenizer: Any) -> None:
                self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
                self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
                    [self.image_token, self.video_token]
                )
                ProcessorMixin.__init__(self, image_processor, tokenizer)

        images = from_pretrained(Qwen2VLImageProcessorPil, self.model, PROCESSOR)
        return Processor(images, load_tokenizer(self.model, self.tokenizer))

    def read(self, prompt: str, sources: Images) -> Condition:
        images = [self.seen(Image.fromarray(image)) for image in sources]
        texts = {"embeds": prompt, f"{NEGATIVE}embeds": self.compared}
        return {
            name: as_array(self.encoder.encode_prompt(text, images)[0][0])
            for name, text in texts.items()
            if text is not None
        }

    def seen(self, image: Image.Image) -> Image.Image:
        """A source as the language model is shown it."""
        return image

    def seen_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Its height and width."""
        return size

    def source_latents(self, image: Any) -> Tensor:
        return super().source_latents(image).squeeze(2)

    def source_pixels(self, image: Image.Image, processor: Any) -> Tensor:
        return super().source_pixels(image, processor).unsqueeze(2)  # one frame

    def shapes(self, x: Tensor, condition: dict[str, Tensor]) -> list[tuple[int, ...]]:
        _, count, _, h, w = condition[SOURCES].shape
        return [*super().shapes(x, condition), *[(1, h // 2, w // 2)] * count]

    def example_edit(
        self, batch: int, configs: Configs, sources: int, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """With the tokens of the images in those of the prompts."""
        rows, columns = (max(1, round(side / PATCH)) for side in self.seen_size(size))
        more = sources * (rows * columns + MARKS)
        condition = super().example_edit(batch, configs, sources, size)
        for name in [name for name in condition if name != SOURCES]:
            b, tokens, *width = condition[name].shape
            shape = (b, tokens + more, *width)
            condition[name] = torch.ones(shape, dtype=condition[name].dtype)
        return condition

    def save_pipeline(self, folder: Path) -> None:
        super().save_pipeline(folder)
        write_published(self.model, PROCESSOR, folder)


class QwenImageEditPlusPolicy(QwenImageEditPolicy):
    """``QwenImageEditPlusPipeline``'s parts (2509, 2511): up to three images, which its language
    model sees at 384 x 384 pixels, as in the pipeline, and its autoencoder at the size of the image
    drawn, where the pipeline would show it 1024 x 1024."""

    pipeline = "QwenImageEditPlusPipeline"
    sources = range(1, 4)

    def seen(self, image: Image.Image) -> Image.Image:
        height, width = self.seen_size((image.height, image.width))
        return self.encoder.image_processor.resize(image, height, width)

    def seen_size(self, size: tuple[int, int]) -> tuple[int, int]:
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
            CONDITION_IMAGE_SIZE,
            calculate_dimensions,
        )

        width, height = calculate_dimensions(CONDITION_IMAGE_SIZE, size[1] / size[0])
        return height, width
