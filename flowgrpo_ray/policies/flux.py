"""FLUX.1: the guidance-distilled dev model, and schnell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.types import Condition
from flowgrpo_ray.policies.base import Configs, as_array
from flowgrpo_ray.policies.pipeline import JOINT_ATTENTION, PackedPolicy


class FluxPolicy(PackedPolicy):
    """``FluxPipeline``'s parts. Latents are ``[b, 16, H / 8, W / 8]``.

    The guidance scale is an input of the network (dev), so that one pass is enough.
    """

    pipeline = "FluxPipeline"
    transformer = "FluxTransformer2DModel"
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    lora_targets = (
        *JOINT_ATTENTION,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )

    @classmethod
    def passes(cls, guidance: float) -> int:
        return 1

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        network: Any = super().load_network(dtype)
        if self.guidance != 1 and not network.config.guidance_embeds:
            raise SpecError(
                f"sampling.guidance = {self.guidance}: {self.model.path} was distilled to draw "
                "without guidance (guidance_embeds of its transformer is false); set it to 1"
            )
        return network

    def encode_batch(self, prompts: Sequence[str]) -> list[Condition]:
        embeds, pooled, _ = self.encoder.encode_prompt(
            list(prompts), max_sequence_length=self.model.max_sequence_length
        )
        return [
            {"embeds": as_array(e), "pooled": as_array(p)}
            for e, p in zip(embeds, pooled, strict=True)
        ]

    def velocity(self, x: Tensor, sigma: float | Tensor, condition: dict[str, Tensor]) -> Tensor:
        from diffusers import FluxPipeline

        b, _, h, w = x.shape
        network: Any = self.network
        embeds = condition["embeds"]
        guidance = None
        if network.config.guidance_embeds:
            guidance = torch.full((b,), self.guidance, device=x.device)
        # Positions stay float32: bfloat16 has no odd integers above 256.
        ids = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, x.device, torch.float32)
        with self.autocast():
            v = network(
                hidden_states=self.pack(x),
                timestep=self.timestep(x, sigma),
                guidance=guidance,
                encoder_hidden_states=embeds.to(self.dtype),
                pooled_projections=condition["pooled"].to(self.dtype),
                txt_ids=ids.new_zeros(embeds.shape[1], 3),
                img_ids=ids,
                return_dict=False,
            )[0]
        return self.unpack(v, x)

    def example_condition(self, batch: int, configs: Configs) -> dict[str, Tensor]:
        network: Any = self.network.config
        embeds = (batch, self.model.max_sequence_length, network.joint_attention_dim)
        pooled = (batch, network.pooled_projection_dim)
        return {
            "embeds": torch.empty(embeds, dtype=self.encoder_dtype),
            "pooled": torch.empty(pooled, dtype=self.encoder_dtype),
        }
