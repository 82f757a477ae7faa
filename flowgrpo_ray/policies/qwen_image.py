"""Qwen-Image, with the guidance of its pipeline: of two passes, rescaled to the length of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowgrpo_ray.common.types import Condition, Images
from flowgrpo_ray.policies.arrays import as_array, pad
from flowgrpo_ray.policies.base import Configs
from flowgrpo_ray.policies.lengths import Tokens
from flowgrpo_ray.policies.loading import load_tokenizer
from flowgrpo_ray.policies.pipeline import JOINT_ATTENTION, PackedPolicy, as_images

NEGATIVE_TOKENS = 6  # of the negative prompt's encoding, with the end of the template


class QwenImagePolicy(PackedPolicy):
    """``QwenImagePipeline``'s parts. Latents are ``[b, 16, H / 8, W / 8]``.

    A condition holds the prompt's own tokens; prompts of one length need neither padding nor mask.
    """

    pipeline = "QwenImagePipeline"
    call_arguments = ("true_cfg_scale={guidance}", 'negative_prompt=" "')
    transformer = "QwenImageTransformer2DModel"
    autoencoder = "AutoencoderKLQwenImage"
    blocks = ("QwenImageTransformerBlock",)
    max_tokens = 1024
    negative_prompt = " "
    lora_targets = (
        *JOINT_ATTENTION,
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )

    @property
    def factor(self) -> int:
        return 2 ** len(self.vae.config.temperal_downsample)

    def tokens_of(self, prompt: str) -> int:
        text = self.encoder.prompt_template_encode.format(prompt)
        return len(self.encoder.tokenizer(text).input_ids)

    def load_tokens(self) -> Tokens:
        import diffusers

        cls: Any = diffusers.QwenImagePipeline
        tokenizer = load_tokenizer(self.model, self.tokenizer)
        bare = cls(None, None, None, tokenizer, None)  # which knows its template
        return Tokens(tokenizer, bare.prompt_template_encode, bare.prompt_template_encode_start_idx)

    def encode_batch(self, prompts: Sequence[str]) -> list[Condition]:
        """``[tokens, dim]`` each, without those of the pipeline's template before the prompt."""
        embeds, _ = self.encoder.encode_prompt(
            list(prompts), max_sequence_length=self.model.max_sequence_length
        )
        return [{"embeds": as_array(own)} for own in embeds]

    def collate(self, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        collated: dict[str, Tensor] = {}
        for name in conditions[0]:
            collated[name], mask = pad([condition[name] for condition in conditions])
            if mask is not None:
                collated[f"{name}_mask"] = mask
        return collated

    def velocity(self, x: Tensor, sigma: float | Tensor, condition: dict[str, Tensor]) -> Tensor:
        """``u + g (c - u)`` of two passes, each token of it rescaled to the length of ``c``."""
        v = conditional = self._predict(x, sigma, condition, "embeds")
        if self.guidance > 1:
            unconditional = self._predict(x, sigma, condition, "negative_embeds")
            v = unconditional + self.guidance * (conditional - unconditional)
            v = v * (_length(conditional) / _length(v))
        return self.unpack(v, x)

    def _predict(
        self, x: Tensor, sigma: float | Tensor, condition: dict[str, Tensor], of: str
    ) -> Tensor:
        """One pass of the network: the velocity as tokens ``[b, h w / 4, 4 C]``."""
        with self.autocast():
            return self.network(
                hidden_states=self.tokens(x, condition),
                timestep=self.timestep(x, sigma),
                encoder_hidden_states=condition[of].to(self.dtype),
                encoder_hidden_states_mask=condition.get(f"{of}_mask"),
                img_shapes=[self.shapes(x, condition)] * len(x),
                return_dict=False,
            )[0]

    def shapes(self, x: Tensor, condition: dict[str, Tensor]) -> list[tuple[int, ...]]:
        """Frames, rows and columns of each image that a sample's tokens are of."""
        return [(1, x.shape[2] // 2, x.shape[3] // 2)]

    @torch.no_grad()
    def decode(self, x: Tensor) -> Images:
        z = x.to(self.decoder_dtype)[:, :, None]  # the autoencoder is one of videos
        mean, std = (
            torch.tensor(values, device=z.device)[:, None, None, None]
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        z = z / (1 / std.to(z.dtype)) + mean.to(z.dtype)  # rounded as in the pipeline
        return as_images(self.vae.decode(z, return_dict=False)[0][:, :, 0])

    def example_condition(self, batch: int, configs: Configs) -> dict[str, Tensor]:
        """Prompts of several lengths, so that there is a mask."""
        width = configs["transformer/config.json"]["joint_attention_dim"]
        tokens = self.model.max_sequence_length
        condition = {
            "embeds": torch.empty(batch, tokens, width, dtype=self.encoder_dtype),
            "embeds_mask": torch.ones(batch, tokens, dtype=torch.bool),
        }
        if self.guidance > 1:  # one space, and the end of the template
            given = self.model.negative_prompt is not None
            own = (batch, tokens if given else NEGATIVE_TOKENS, width)
            condition["negative_embeds"] = torch.empty(own, dtype=self.encoder_dtype)
        return condition


def _length(tokens: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
