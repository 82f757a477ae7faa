"""The ImageReward reward: how would people rate an image for its prompt, from experts' rankings?

    reward = (head(h) - 0.16717362830052426) / 1.0333394966054072

ImageReward (Xu et al. 2023, arXiv 2304.05977) is a BLIP: a vision transformer, and a BERT that
reads the prompt and looks at the patches; h is the BERT's first output, and the head has the shape
of the aesthetic predictor's. The two constants are those of the authors' code (THUDM/ImageReward).
Here BLIP is that of transformers, filled with the authors' checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.rewards.aesthetic import score_head
from flowgrpo_ray.rewards.colours import colour_rankings
from flowgrpo_ray.rewards.golden import Rankings
from flowgrpo_ray.rewards.loading import (
    Batch,
    Device,
    Dtype,
    ModelSize,
    Revision,
    Source,
    check_tokenizer,
    fill,
    load,
    pick_device,
    read_weights,
)
from flowgrpo_ray.rewards.pixels import processed, torchvision_processor

if TYPE_CHECKING:
    import torch

FILE = "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35  # that a prompt is padded or cut to
EXTRA_TOKENS = ["[DEC]", "[ENC]"]  # that BLIP adds to BERT's
HEAD_WIDTH = 64  # of an attention head, in ViT-L and BERT alike

PUBLISHED_NAMES = {
    "visual_encoder.embeddings.class_embedding": "visual_encoder.cls_token",
    "visual_encoder.embeddings.position_embedding": "visual_encoder.pos_embed",
    "visual_encoder.embeddings.patch_embedding": "visual_encoder.patch_embed.proj",
    "visual_encoder.encoder.layers": "visual_encoder.blocks",
    "visual_encoder.post_layernorm": "visual_encoder.norm",
    **{"self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj"},
    **{"layer_norm1": "norm1", "layer_norm2": "norm2"},
}
"""What the checkpoint calls parts of transformers' BLIP; all other parts have the same name."""

UNUSED = (
    *("blip.vision_proj.weight", "blip.vision_proj.bias"),
    *("blip.text_proj.weight", "blip.text_proj.bias"),
    "blip.text_encoder.embeddings.position_ids",
)
"""Weights of BLIP's training, and a list of numbers, that the score does not need."""


class ImageRewardReward:
    """Scores each image for its own prompt."""

    SIZE = ModelSize(446_206_689, 12_166_720)

    def __init__(
        self,
        path: Annotated[
            str,
            Field(
                description="the authors' `ImageReward.pt` (1.8 GB), its weights as .safetensors, "
                "or a folder or hub id that holds `ImageReward.pt`"
            ),
        ] = "THUDM/ImageReward",
        revision: Revision = None,
        tokenizer: Annotated[
            str, Field(description="the folder or hub id of the uncased BERT's tokenizer")
        ] = "google-bert/bert-base-uncased",
        device: Device = None,
        dtype: Annotated[
            Dtype, Field(description="of BLIP's weights; the head stays float32")
        ] = "float32",
        batch: Batch = 32,
    ) -> None:
        import torch
        from transformers import BertTokenizer

        self._device, self._dtype, self._batch = pick_device(device), getattr(torch, dtype), batch
        source: Source = ("path", path, revision)
        self._vision, self._text, self._head = blip_from(read_weights(source, FILE), source)
        self._vision.to(device=self._device, dtype=self._dtype)
        self._text.to(device=self._device, dtype=self._dtype)
        self._head.to(self._device)
        side = self._vision.config.image_size
        crop = {"height": side, "width": side}
        processor = torchvision_processor()(size={"shortest_edge": side}, crop_size=crop)
        self._pixels = processed(processor)
        names: Source = ("tokenizer", tokenizer, None)
        self._tokenizer = load(BertTokenizer, names)
        known = self._text.config.vocab_size - len(EXTRA_TOKENS)
        check_tokenizer(self._tokenizer, known, names, source)
        self._tokenizer.add_tokens(EXTRA_TOKENS, special_tokens=True)

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Scores, float32 [b], of `images`, uint8 [b, H, W, 3]; NaN: the model gave no numbers."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts")
        starts = range(0, len(images), self._batch)
        parts = [
            self._score(images[i : i + self._batch], prompts[i : i + self._batch]) for i in starts
        ]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    def golden(self) -> Rankings:
        """Flat colours, each above another one for its own name."""
        return colour_rankings()

    def _score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        import torch

        pixels = self._pixels(list(images))
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        ).to(self._device)
        with torch.inference_mode():
            patches = self._vision(
                pixel_values=pixels.to(device=self._device, dtype=self._dtype)
            ).last_hidden_state
            words = self._text(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                encoder_hidden_states=patches,
                is_decoder=False,  # each word sees all words; true would hide those after it
            ).last_hidden_state
            ratings = self._head["layers"](words[:, 0].float())[:, 0]
        return ((ratings - MEAN) / STD).cpu().numpy()


def blip_from(weights: Mapping[str, torch.Tensor], source: Source) -> tuple[Any, Any, Any]:
    """BLIP's vision and text models and the head, float32, filled with the authors' `weights`.

    Their sizes are those of the weights. ModelError names a weight that is missing or too many.
    """
    from torch import nn
    from transformers import BlipTextModel, BlipVisionModel

    vision_config, text_config = configs(weights, source)
    vision = BlipVisionModel(vision_config)
    text = BlipTextModel(text_config, add_pooling_layer=False)
    head = score_head(text_config.hidden_size)
    blip = nn.ModuleDict({"visual_encoder": vision, "text_encoder": text})
    model = nn.ModuleDict({"blip": blip, "mlp": head}).eval().requires_grad_(False)
    used = {name: value for name, value in weights.items() if name not in UNUSED}
    fill(model, used, source, published_name)
    return vision, text, head


def configs(weights: Mapping[str, torch.Tensor], source: Source) -> tuple[Any, Any]:
    """The configurations of BLIP's vision and text models that `weights` fit."""
    from transformers import BlipTextConfig, BlipVisionConfig

    def shape(name: str) -> torch.Size:
        if name not in weights:
            option, place, _ = source
            raise ModelError(f"{option} = {place!r}: no checkpoint of ImageReward: it lacks {name}")
        return weights[name].shape

    def depth(prefix: str) -> int:
        numbers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in weights)
        return 1 + max((int(number[1]) for number in numbers if number), default=0)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    width, _, patch, _ = shape(f"{vision}.patch_embed.proj.weight")
    patches = shape(f"{vision}.pos_embed")[1] - 1
    vocabulary, text_width = shape(f"{text}.embeddings.word_embeddings.weight")
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shape(f"{vision}.blocks.0.mlp.fc1.weight")[0],
        num_hidden_layers=depth(f"{vision}.blocks"),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=round(patches**0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # as the authors'; transformers has 1e-5
    ), BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=shape(f"{text}.encoder.layer.0.intermediate.dense.weight")[0],
        num_hidden_layers=depth(f"{text}.encoder.layer"),
        num_attention_heads=text_width // HEAD_WIDTH,
        max_position_embeddings=shape(f"{text}.embeddings.position_embeddings.weight")[0],
        layer_norm_eps=1e-12,
        is_decoder=True,  # else there is no cross-attention
    )


def published_name(name: str) -> str:
    """What the checkpoint calls a weight of the model that `blip_from` makes."""
    for own, published in PUBLISHED_NAMES.items():
        name = name.replace(own, published)
    return name
