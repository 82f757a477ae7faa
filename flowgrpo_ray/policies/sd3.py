"""Stable Diffusion 3 and 3.5, and the tiny model that ships with this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowgrpo_ray.errors import SpecError
from flowgrpo_ray.policies.base import Policy, lora_config, lora_state, merge_lora
from flowgrpo_ray.policies.loading import from_pretrained
from flowgrpo_ray.types import Condition, Images

TIMESTEPS = 1000  # the network was trained on timestep = 1000 sigma


class SD3Policy(Policy):
    """``StableDiffusion3Pipeline``'s parts. Latents are ``[b, 16, H / 8, W / 8]`` for SD3.5."""

    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        return from_pretrained(SD3Transformer2DModel, self.model, "transformer", dtype=dtype)

    def load_encoder(self) -> None:
        from diffusers import StableDiffusion3Pipeline

        self.encoder = from_pretrained(
            StableDiffusion3Pipeline, self.model, None, dtype=self.dtype, transformer=None, vae=None
        ).to(self.device)
        self.encoder.set_progress_bar_config(disable=True)

    def drop_encoder(self) -> None:
        del self.encoder

    def load_decoder(self) -> None:
        from diffusers import AutoencoderKL

        vae = from_pretrained(AutoencoderKL, self.model, "vae", dtype=self.dtype)
        self.vae = vae.to(self.device).eval().requires_grad_(False)

    def block_classes(self) -> tuple[type[nn.Module], ...]:
        from diffusers.models.attention import JointTransformerBlock

        return (JointTransformerBlock,)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Condition]:
        names = ("embeds", "negative_embeds", "pooled", "negative_pooled")
        guided = self.guidance > 1
        conditions: list[Condition] = []
        for prompt in prompts:
            encoded = self.encoder.encode_prompt(
                prompt,
                None,
                None,
                do_classifier_free_guidance=guided,
                max_sequence_length=self.model.max_sequence_length,
            )
            conditions.append(
                {
                    name: tensor[0].float().cpu().numpy()
                    for name, tensor in zip(names, encoded, strict=True)
                    if tensor is not None
                }
            )
        return conditions

    def sigmas(self, steps: int, size: tuple[int, int]) -> tuple[float, ...]:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = from_pretrained(FlowMatchEulerDiscreteScheduler, self.model, "scheduler")
        scheduler.set_timesteps(steps)
        return tuple(scheduler.sigmas.tolist())

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        network: Any = self.network.config
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        multiple = factor * network.patch_size
        if size[0] % multiple or size[1] % multiple:
            raise SpecError(
                f"sampling.size = {list(size)} does not fit {self.model.path}: "
                f"height and width must be multiples of {multiple}"
            )
        if max(size) // multiple > network.pos_embed_max_size:
            raise SpecError(
                f"sampling.size = {list(size)} is too large for {self.model.path}: height and "
                f"width may be up to {network.pos_embed_max_size * multiple} pixels"
            )
        return (network.in_channels, size[0] // factor, size[1] // factor)

    def velocity(self, x: Tensor, sigma: float, condition: dict[str, Tensor]) -> Tensor:
        embeds, pooled = condition["embeds"], condition["pooled"]
        guided = self.guidance > 1
        if guided:  # one batch of both, unconditional first, as the pipeline does
            x = torch.cat([x, x])
            embeds = torch.cat([condition["negative_embeds"], embeds])
            pooled = torch.cat([condition["negative_pooled"], pooled])
        with self.autocast():
            v = self.network(
                hidden_states=x.to(self.dtype),
                timestep=torch.full((len(x),), sigma, device=x.device) * TIMESTEPS,
                encoder_hidden_states=embeds.to(self.dtype),
                pooled_projections=pooled.to(self.dtype),
                return_dict=False,
            )[0]
        if guided:
            unconditional, conditional = v.chunk(2)
            v = unconditional + self.guidance * (conditional - unconditional)
        return v

    @torch.no_grad()
    def decode(self, x: Tensor) -> Images:
        config = self.vae.config
        latents = x.to(self.dtype) / config.scaling_factor + config.shift_factor
        images = self.vae.decode(latents, return_dict=False)[0].float()
        pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def save_lora(self, folder: Path) -> None:
        from diffusers import StableDiffusion3Pipeline

        assert self.tuning.kind == "lora"
        config = lora_config(self.tuning, self.lora_targets).to_dict()
        StableDiffusion3Pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=dict(lora_state(self.network)),
            transformer_lora_adapter_metadata=config,
        )

    def save_pipeline(self, folder: Path) -> None:
        from diffusers import StableDiffusion3Pipeline

        merge_lora(self.network)
        pipeline = from_pretrained(
            StableDiffusion3Pipeline,
            self.model,
            None,
            dtype=self.dtype,
            transformer=self.network.to(self.dtype),
        )
        pipeline.save_pretrained(folder)
