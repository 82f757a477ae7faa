"""Z-Image and Z-Image-Turbo: one stream of image and text, whose network takes lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgrpo_ray.common.types import NEGATIVE, Condition
from flowgrpo_ray.policies.arrays import as_array, as_tensor
from flowgrpo_ray.policies.base import Configs
from flowgrpo_ray.policies.lora_names import Native
from flowgrpo_ray.policies.pipeline import TIMESTEPS, PipelinePolicy


class ZImagePolicy(PipelinePolicy):
    """``ZImagePipeline``'s parts. Latents are ``[b, 16, H / 8, W / 8]``.

    A condition holds the prompt's own tokens, without the padding that the encoder sees. The
    pipeline's guidance scale is what ours has beyond 1.
    """

    pipeline = "ZImagePipeline"
    thinks = True
    call_arguments = ("guidance_scale={beyond_one}",)
    transformer = "ZImageTransformer2DModel"
    blocks = ("ZImageTransformerBlock",)
    # The pipeline knows no limit; the published networks have 1536 positions, of which one stays
    # free before the text, one is the image's, and the text takes 32 at a time.
    max_tokens = 1504
    lora_targets = (
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )
    native_layers: ClassVar[Native] = {
        f"{blocks}.{{}}.attention.{theirs}": tuple(f"{blocks}.{{}}.attention.{o}" for o in ours)
        for blocks in ("layers", "noise_refiner", "context_refiner")
        for theirs, ours in (("qkv", ("to_q", "to_k", "to_v")), ("out", ("to_out.0",)))
    }

    def encode_batch(self, prompts: Sequence[str]) -> list[Condition]:
        """``[tokens, dim]`` each; the encoder sees all prompts padded to one length."""
        embeds, _ = self.encoder.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.model.max_sequence_length,
        )
        return [{"embeds": as_array(own)} for own in embeds]

    def collate(self, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """``{name.i: [1, tokens, dim]}``, as the network is given each prompt apart and pads them
        itself: no mask, whose lengths would have to be fetched from a GPU."""
        return {
            f"{name}.{i}": as_tensor(array)[None]
            for i, condition in enumerate(conditions)
            for name, array in condition.items()
        }

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        network: Any = self.network.config
        self.check_size(size, 2 * self.factor, min(network.axes_lens[1:]))
        return (network.in_channels, size[0] // self.factor, size[1] // self.factor)

    def sigmas(self, steps: int, size: tuple[int, int]) -> tuple[float, ...]:
        _, h, w = self.latent_shape(size)
        return self.shifted(torch.linspace(1, 1 / steps, steps).tolist(), h * w // 4)

    def velocity(self, x: Tensor, sigma: float | Tensor, condition: dict[str, Tensor]) -> Tensor:
        """``-(c + (g - 1) (c - u))`` of the network's ``c`` and ``u``, which point at the data."""
        samples, guided = range(len(x)), self.guidance > 1
        # Its time runs from 0 at noise to 1 at data; rounded as in the pipeline.
        time = (TIMESTEPS - self.levels(sigma, x) * TIMESTEPS) / TIMESTEPS
        names = [f"embeds.{i}" for i in samples]
        if guided:  # one batch of both, unconditional last, as the pipeline does
            x, time = torch.cat([x, x]), torch.cat([time, time])
            names += [f"{NEGATIVE}embeds.{i}" for i in samples]
        latents = x.to(self.dtype)[:, :, None]  # of one frame
        texts = [condition[name][0].to(self.dtype) for name in names]
        with self.autocast():
            found = self.network(list(latents), time, texts, return_dict=False)[0]
        v = torch.stack(found)[:, :, 0].float()
        if guided:
            conditional, unconditional = v.chunk(2)
            v = conditional + (self.guidance - 1) * (conditional - unconditional)
        return -v

    def example_condition(self, batch: int, configs: Configs) -> dict[str, Tensor]:
        width = configs["transformer/config.json"]["cap_feat_dim"]
        shape = (1, self.model.max_sequence_length, width)
        names = ("embeds", f"{NEGATIVE}embeds") if self.guidance > 1 else ("embeds",)
        return {
            f"{name}.{i}": torch.empty(shape, dtype=self.encoder_dtype)
            for name in names
            for i in range(batch)
        }
