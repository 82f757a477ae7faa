"""FLUX.1: the guidance-distilled dev model, and schnell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.types import Condition
from flowgrpo_ray.policies.arrays import as_array
from flowgrpo_ray.policies.base import Configs
from flowgrpo_ray.policies.lora_names import Native
from flowgrpo_ray.policies.pipeline import JOINT_ATTENTION, PackedPolicy


def double(*layers: str) -> tuple[str, ...]:
    return tuple(f"transformer_blocks.{{}}.{layer}" for layer in layers)


def single(*layers: str) -> tuple[str, ...]:
    return tuple(f"single_transformer_blocks.{{}}.{layer}" for layer in layers)


ATTENTION: Native = {  # of double blocks
    "double_blocks.{}.img_attn.qkv": double("attn.to_q", "attn.to_k", "attn.to_v"),
    "double_blocks.{}.img_attn.proj": double("attn.to_out.0"),
    "double_blocks.{}.txt_attn.qkv": double(
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"
    ),
    "double_blocks.{}.txt_attn.proj": double("attn.to_add_out"),
}


class FluxPolicy(PackedPolicy):
    """``FluxPipeline``'s parts. Latents are ``[b, 16, H / 8, W / 8]``.

    The guidance scale is an input of the network (dev), so that one pass is enough.
    """

    pipeline = "FluxPipeline"
    read_by = ("ComfyUI", "Forge")
    transformer = "FluxTransformer2DModel"
    tokenizer = "tokenizer_2"  # of T5; CLIP's 77 tokens are a summary
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    lora_targets = (
        *JOINT_ATTENTION,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    native_layers: ClassVar[Native] = {
        **ATTENTION,
        "double_blocks.{}.img_mlp.0": double("ff.net.0.proj"),
        "double_blocks.{}.img_mlp.2": double("ff.net.2"),
        "double_blocks.{}.img_mod.lin": double("norm1.linear"),
        "double_blocks.{}.txt_mlp.0": double("ff_context.net.0.proj"),
        "double_blocks.{}.txt_mlp.2": double("ff_context.net.2"),
        "double_blocks.{}.txt_mod.lin": double("norm1_context.linear"),
        "single_blocks.{}.linear1": single("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "single_blocks.{}.linear2": single("proj_out"),
        "single_blocks.{}.modulation.lin": single("norm.linear"),
    }

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
        network: Any = self.network
        embeds = condition["embeds"]
        guidance = None
        if network.config.guidance_embeds:
            guidance = torch.full((len(x),), self.guidance, device=x.device)
        ids = self.positions(x, condition)
        with self.autocast():
            v = network(
                hidden_states=self.tokens(x, condition),
                timestep=self.timestep(x, sigma),
                guidance=guidance,
                encoder_hidden_states=embeds.to(self.dtype),
                pooled_projections=condition["pooled"].to(self.dtype),
                txt_ids=ids.new_zeros(embeds.shape[1], 3),
                img_ids=ids,
                return_dict=False,
            )[0]
        return self.unpack(v, x)

    def positions(self, x: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Of the image's tokens, ``[tokens, 3]``; float32, as bfloat16 has no odd integers above
        256."""
        from diffusers import FluxPipeline

        b, _, h, w = x.shape
        return FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, x.device, torch.float32)

    def example_condition(self, batch: int, configs: Configs) -> dict[str, Tensor]:
        network: Any = self.network.config
        embeds = (batch, self.model.max_sequence_length, network.joint_attention_dim)
        pooled = (batch, network.pooled_projection_dim)
        return {
            "embeds": torch.empty(embeds, dtype=self.encoder_dtype),
            "pooled": torch.empty(pooled, dtype=self.encoder_dtype),
        }
