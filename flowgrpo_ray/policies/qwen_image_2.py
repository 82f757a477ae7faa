"""Qwen-Image-2.1: one stream of text and image, unpatched latents, and pictures with an alpha."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.types import Condition, Images
from flowgrpo_ray.policies.arrays import as_array
from flowgrpo_ray.policies.base import Configs
from flowgrpo_ray.policies.hub import read_config
from flowgrpo_ray.policies.lengths import Tokens
from flowgrpo_ray.policies.loading import INDEX, load_tokenizer, write_published
from flowgrpo_ray.policies.lora_names import Native
from flowgrpo_ray.policies.pipeline import TwoPassPolicy, as_bytes
from flowgrpo_ray.policies.qwen_image import QwenImagePolicy

TURN = 9  # tokens around an empty prompt: the user's turn, a space, the beginning of an answer


class QwenImage2Policy(TwoPassPolicy):
    """``QwenImage21Pipeline``'s parts. Latents are ``[b, 64, H / 16, W / 16]``, a token each.

    A condition holds the prompt's own tokens; prompts of one length need neither padding nor mask.
    """

    pipeline = "QwenImage21Pipeline"
    call_arguments = ("true_cfg_scale={guidance}", 'negative_prompt=""')
    call_takes_length = False
    transformer = "QwenImage21Transformer2DModel"
    autoencoder = "AutoencoderKLQwenImage21"
    blocks = ("QwenImage21TransformerBlock",)
    tokenizer = "processor"
    max_tokens = 8191  # the pipeline knows no limit, and the network no more positions
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"),
    )
    native_layers: ClassVar[Native] = {
        "transformer_blocks.{}.img_mlp.gate_up": (
            "transformer_blocks.{}.img_mlp.gate_layer",
            "transformer_blocks.{}.img_mlp.proj",
        )
    }
    collate = QwenImagePolicy.collate

    @property
    def factor(self) -> int:
        return self.vae.config.scale_factor_spatial

    # --- parts

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        from flowgrpo_ray.policies.qwen_image_2_network import draw_from_text

        return draw_from_text(super().load_network(dtype))

    def skeleton(self, configs: Configs, dtype: torch.dtype) -> None:
        from flowgrpo_ray.policies.qwen_image_2_network import draw_from_text

        super().skeleton(configs, dtype)
        draw_from_text(self.network)

    def load_processor(self) -> Any:
        """Without the readers of pictures and videos, which text does not need."""
        from flowgrpo_ray.policies.qwen_image_2_network import Words

        return Words(load_tokenizer(self.model, self.tokenizer))

    def export_parts(self) -> dict[str, Any]:
        return {self.tokenizer: self.load_processor()}

    def load_readers(self) -> dict[str, Any]:
        return {**super().load_readers(), self.tokenizer: self.load_processor()}

    def save_pipeline(self, folder: Path) -> None:
        super().save_pipeline(folder)
        write_published(self.model, self.tokenizer, folder)

    # --- prompts

    def load_tokens(self) -> Tokens:
        import diffusers

        cls: Any = diffusers.QwenImage21Pipeline
        bare = cls(
            None, None, None, processor=self.load_processor(), transformer=None
        )  # knows its template
        return Tokens(bare.processor.tokenizer, bare.prompt_template_t2i, bare._drop_idx)

    def tokens_of(self, prompt: str) -> int:
        text = self.encoder.prompt_template_t2i.format(prompt or " ")
        return len(self.encoder.processor.tokenizer(text).input_ids)

    def encode_batch(self, prompts: Sequence[str]) -> list[Condition]:
        """``[tokens, dim]`` each, without those of the pipeline's system message."""
        embeds, *_ = self.encoder.encode_prompt(list(prompts))
        return [{"embeds": as_array(own[: self.model.max_sequence_length])} for own in embeds]

    def example_condition(self, batch: int, configs: Configs) -> dict[str, Tensor]:
        """Prompts of several lengths, so that there is a mask."""
        width = configs["transformer/config.json"]["context_in_dim"]
        tokens = self.model.max_sequence_length
        condition = {
            "embeds": torch.empty(batch, tokens, width, dtype=self.encoder_dtype),
            "embeds_mask": torch.ones(batch, tokens, dtype=torch.bool),
        }
        if self.passes(self.guidance) > 1:
            own = TURN if self.model.negative_prompt is None else tokens
            condition["negative_embeds"] = torch.empty(batch, own, width, dtype=self.encoder_dtype)
        return condition

    # --- images

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        self.check_size(size, 2 * self.factor)
        network: Any = self.network.config
        return (network.in_channels, size[0] // self.factor, size[1] // self.factor)

    def sigmas(self, steps: int, size: tuple[int, int]) -> tuple[float, ...]:
        _, height, width = self.latent_shape(size)
        levels = read_config(self.model, INDEX).get("sample_sigmas")
        if levels is None:
            levels = np.linspace(1, 1 / steps, steps).tolist()
        elif len(levels) != steps:
            raise SpecError(
                f"{self.model.path} was distilled to draw in {len(levels)} steps, and not in "
                f"{steps} (sample_sigmas of its {INDEX}): set sampling.steps and evaluation.steps "
                f"to {len(levels)}"
            )
        return self.shifted(levels, height * width)

    def pack(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).flatten(2).transpose(1, 2)

    def unpack(self, tokens: Tensor, x: Tensor) -> Tensor:
        return tokens.transpose(1, 2).reshape(x.shape)

    def _predict(
        self, x: Tensor, sigma: float | Tensor, condition: dict[str, Tensor], of: str
    ) -> Tensor:
        """One pass of the network: the velocity as tokens ``[b, h w, C]``."""
        tokens = self.pack(x)
        with self.autocast():
            found = self.network(
                hidden_states=tokens,
                encoder_hidden_states=condition[of].to(self.dtype),
                timestep=self.timestep(x, sigma),
                img_shapes=[[(1, *x.shape[2:])]] * len(x),
                encoder_hidden_states_mask=condition.get(f"{of}_mask"),
                return_dict=False,
            )[0]
        return found[:, -tokens.shape[1] :]

    @torch.no_grad()
    def decode(self, x: Tensor) -> Images:
        """On white, where the autoencoder's alpha lets it through."""
        z = x.to(self.decoder_dtype)[:, :, None]  # the autoencoder is one of videos
        mean, std = (
            torch.tensor(values, device=z.device)[:, None, None, None].to(z.dtype)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        pixels = self.vae.decode(z * std + mean, return_dict=False)[0][:, :, 0]
        colour, alpha = (pixels * 0.5 + 0.5).clamp(0, 1).split([3, 1], 1)
        return as_bytes(colour * alpha + (1 - alpha))
