"""SANA: linear attention, latents of a thirty-second of an image's side, prompts behind an
instruction."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from flowgrpo_ray.common.types import Condition, Images
from flowgrpo_ray.policies.arrays import as_array
from flowgrpo_ray.policies.base import Configs
from flowgrpo_ray.policies.hub import read_config
from flowgrpo_ray.policies.lengths import Tokens
from flowgrpo_ray.policies.loading import INDEX, from_pretrained, load_tokenizer
from flowgrpo_ray.policies.pipeline import TIMESTEPS, PipelinePolicy, as_images


class SanaPolicy(PipelinePolicy):
    """``SanaPipeline``'s parts, with Euler steps. Latents are ``[b, 32, H / 32, W / 32]``.

    A condition holds ``max_sequence_length`` tokens of the encoder and a mask of those that are no
    filling. As the pipeline does by default, prompts are read behind its instruction, and what
    guidance leads away from is not.
    """

    pipeline = "SanaPipeline"
    call_arguments = ("guidance_scale={guidance}", "use_resolution_binning=False")
    read_by = ()
    call_scheduler = "FlowMatchEulerDiscreteScheduler(shift={shift})"
    transformer = "SanaTransformer2DModel"
    autoencoder = "AutoencoderDC"
    blocks = ("SanaTransformerBlock",)
    max_tokens = 300  # what the network was trained with; the pipeline knows no limit
    lora_targets = tuple(
        f"{attention}.{layer}"
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
    )

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        return _exact(super().load_network(dtype))

    def skeleton(self, configs: Configs, dtype: torch.dtype) -> None:
        super().skeleton(configs, dtype)
        _exact(self.network)

    # --- prompts

    @cached_property
    def instruction(self) -> list[str] | None:
        from diffusers import SanaPipeline

        call = inspect.signature(SanaPipeline.__call__)
        return call.parameters["complex_human_instruction"].default

    @cached_property
    def _negative(self) -> Condition:
        instruction, self.instruction = self.instruction, None
        found = super()._negative
        self.instruction = instruction
        return found

    def load_tokens(self) -> Tokens:
        assert self.instruction is not None
        tokenizer, before = load_tokenizer(self.model, self.tokenizer), "\n".join(self.instruction)
        # As the pipeline counts: the last ones of the instruction may be among those read.
        return _LowerCase(tokenizer, before + "{}", len(tokenizer.encode(before)) - 2)

    def encode_batch(self, prompts: Sequence[str]) -> list[Condition]:
        embeds, mask, _, _ = self.encoder.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.model.max_sequence_length,
            complex_human_instruction=self.instruction,
        )
        return [
            {"embeds": as_array(e), "mask": as_array(m)} for e, m in zip(embeds, mask, strict=True)
        ]

    def example_condition(self, batch: int, configs: Configs) -> dict[str, Tensor]:
        width = configs["transformer/config.json"]["caption_channels"]
        tokens = self.model.max_sequence_length
        condition = {
            "embeds": torch.empty(batch, tokens, width, dtype=self.encoder_dtype),
            "mask": torch.ones(batch, tokens, dtype=torch.int64),
        }
        if self.guidance > 1:
            condition |= {f"negative_{n}": torch.empty_like(t) for n, t in condition.items()}
        return condition

    # --- images

    @property
    def factor(self) -> int:
        return 2 ** (len(self.vae.config.encoder_block_out_channels) - 1)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        network: Any = self.network.config
        self.check_size(size, self.factor * network.patch_size)
        return (network.in_channels, size[0] // self.factor, size[1] // self.factor)

    def scheduler(self) -> Any:
        """Of Euler steps, with the shift of the model's own scheduler, whose steps are others."""
        import diffusers

        _, name = read_config(self.model, INDEX)["scheduler"]
        config = from_pretrained(getattr(diffusers, name), self.model, "scheduler").config
        shift = self.model.shift or config.get("flow_shift", config.get("shift"))
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)

    def velocity(self, x: Tensor, sigma: float | Tensor, condition: dict[str, Tensor]) -> Tensor:
        network: Any = self.network.config
        embeds, mask = condition["embeds"], condition["mask"]
        levels, guided = self.levels(sigma, x), self.guidance > 1
        latents = x
        if guided:  # one batch of both, unconditional first, as the pipeline does
            latents, levels = torch.cat([x, x]), torch.cat([levels, levels])
            embeds = torch.cat([condition["negative_embeds"], embeds])
            mask = torch.cat([condition["negative_mask"], mask])
        with self.autocast():
            v = self.network(
                hidden_states=latents.to(self.dtype),
                encoder_hidden_states=embeds.to(self.dtype),
                timestep=levels * TIMESTEPS * network.timestep_scale,
                encoder_attention_mask=mask,
                return_dict=False,
            )[0].float()
        if guided:
            unconditional, conditional = v.chunk(2)
            v = unconditional + self.guidance * (conditional - unconditional)
        return v[:, : x.shape[1]]  # the rest, if there is one, is a variance

    @torch.no_grad()
    def decode(self, x: Tensor) -> Images:
        z = x.to(self.decoder_dtype) / self.vae.config.scaling_factor
        return as_images(self.vae.decode(z, return_dict=False)[0])


class _LowerCase(Tokens):
    """As the pipeline writes prompts before they become tokens."""

    def cut(self, prompt: str, limit: int) -> tuple[int, int] | None:
        return super().cut(prompt.lower().strip(), limit)


class LinearAttention:
    """``relu(q) (relu(k)^T v)``, each row over its sum: in float32 as diffusers has it, which
    autocast would make half precision."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        query, key, value = (
            project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        dtype = value.dtype
        query, key, value = (
            part.transpose(1, 2).unflatten(1, (attn.heads, -1)) for part in (query, key, value)
        )
        with torch.autocast(value.device.type, enabled=False):
            query, key, value = relu(query).float(), relu(key).float(), value.float()
            value = pad(value, (0, 0, 0, 1), value=1.0)
            found = (value @ key.transpose(2, 3)) @ query
            found = found[:, :, :-1] / (found[:, :, -1:] + 1e-15)
        return attn.to_out[0](found.flatten(1, 2).transpose(1, 2).to(dtype))


def _exact(network: Any) -> nn.Module:
    for block in network.transformer_blocks:
        block.attn1.set_processor(LinearAttention())
    return network
