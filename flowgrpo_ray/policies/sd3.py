"""Stable Diffusion 3 and 3.5, and the tiny model that ships with this package."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgrpo_ray.common.types import Condition
from flowgrpo_ray.policies.arrays import as_array
from flowgrpo_ray.policies.base import Configs
from flowgrpo_ray.policies.hub import read_config
from flowgrpo_ray.policies.lengths import Reading, Tokens
from flowgrpo_ray.policies.loading import INDEX, load_tokenizer
from flowgrpo_ray.policies.lora_names import Native
from flowgrpo_ray.policies.pipeline import JOINT_ATTENTION, TIMESTEPS, PipelinePolicy


class SD3Policy(PipelinePolicy):
    """``StableDiffusion3Pipeline``'s parts. Latents are ``[b, 16, H / 8, W / 8]`` for SD3.5."""

    pipeline = "StableDiffusion3Pipeline"
    transformer = "SD3Transformer2DModel"
    blocks = ("JointTransformerBlock",)
    config_files = (*PipelinePolicy.config_files, "text_encoder/config.json")
    tokenizer = "tokenizer_3"  # of T5; CLIP's 77 tokens are a summary
    lora_targets = JOINT_ATTENTION
    native_layers: ClassVar[Native] = {
        f"joint_blocks.{{}}.{theirs}": tuple(f"transformer_blocks.{{}}.{name}" for name in ours)
        for theirs, ours in (
            ("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
            ("x_block.attn.proj", ("attn.to_out.0",)),
            ("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
            ("x_block.attn2.proj", ("attn2.to_out.0",)),
            ("x_block.mlp.fc1", ("ff.net.0.proj",)),
            ("x_block.mlp.fc2", ("ff.net.2",)),
            ("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
            ("context_block.attn.proj", ("attn.to_add_out",)),
            ("context_block.mlp.fc1", ("ff_context.net.0.proj",)),
            ("context_block.mlp.fc2", ("ff_context.net.2",)),
        )
    }

    @cached_property
    def has_t5(self) -> bool:
        """Whether the folder holds it; else zeros stand for what it would read."""
        return bool((read_config(self.model, INDEX).get("text_encoder_3") or [None])[0])

    def load_encoder(self) -> None:
        super().load_encoder()
        if not self.has_t5:  # the pipeline asks the network how wide the zeros are
            config = read_config(self.model, "transformer/config.json")
            width = SimpleNamespace(joint_attention_dim=config["joint_attention_dim"])
            self.encoder.transformer = SimpleNamespace(config=width)

    def reading(self) -> Reading | None:
        if self.has_t5:
            return super().reading()
        clip = read_config(self.model, "text_encoder/config.json")["max_position_embeddings"]
        return Reading(clip, clip, lambda: Tokens(load_tokenizer(self.model, "tokenizer")))

    def encode_batch(self, prompts: Sequence[str]) -> list[Condition]:
        embeds, _, pooled, _ = self.encoder.encode_prompt(
            list(prompts),
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.model.max_sequence_length,
        )
        return [
            {"embeds": as_array(e), "pooled": as_array(p)}
            for e, p in zip(embeds, pooled, strict=True)
        ]

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        network: Any = self.network.config
        multiple = self.factor * network.patch_size
        self.check_size(size, multiple, network.pos_embed_max_size)
        return (network.in_channels, size[0] // self.factor, size[1] // self.factor)

    def velocity(self, x: Tensor, sigma: float | Tensor, condition: dict[str, Tensor]) -> Tensor:
        embeds, pooled = condition["embeds"], condition["pooled"]
        levels, guided = self.levels(sigma, x), self.guidance > 1
        if guided:  # one batch of both, unconditional first, as the pipeline does
            x, levels = torch.cat([x, x]), torch.cat([levels, levels])
            embeds = torch.cat([condition["negative_embeds"], embeds])
            pooled = torch.cat([condition["negative_pooled"], pooled])
        with self.autocast():
            v = self.network(
                hidden_states=x.to(self.dtype),
                timestep=levels * TIMESTEPS,
                encoder_hidden_states=embeds.to(self.dtype),
                pooled_projections=pooled.to(self.dtype),
                return_dict=False,
            )[0]
        if guided:
            unconditional, conditional = v.chunk(2)
            v = unconditional + self.guidance * (conditional - unconditional)
        return v

    def example_condition(self, batch: int, configs: Configs) -> dict[str, Tensor]:
        network: Any = self.network.config
        clip = configs["text_encoder/config.json"]["max_position_embeddings"]
        tokens = clip + self.model.max_sequence_length  # of both CLIPs, then of T5
        embeds = torch.empty(batch, tokens, network.joint_attention_dim, dtype=self.encoder_dtype)
        pooled = torch.empty(batch, network.pooled_projection_dim, dtype=self.encoder_dtype)
        condition = {"embeds": embeds, "pooled": pooled}
        if self.guidance > 1:
            condition |= {f"negative_{n}": torch.empty_like(t) for n, t in condition.items()}
        return condition
