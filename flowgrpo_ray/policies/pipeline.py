"""What the policies over diffusers' pipelines share: loading, noise levels, decoding, export.

An adapter names its pipeline's classes and writes ``encode``, ``latent_shape``, ``velocity`` and
how latents are scaled; parts are loaded from the folders that ``from_pretrained`` knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowgrpo_ray.errors import SpecError
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.policies.loading import from_pretrained
from flowgrpo_ray.policies.lora import lora_config, lora_state, merge_lora
from flowgrpo_ray.types import Images

TIMESTEPS = 1000  # the networks were trained on timestep = 1000 sigma


class PipelinePolicy(Policy):
    """A policy whose parts are those of one diffusers pipeline.

    The class names are looked up in diffusers when a part is loaded: importing it takes seconds.
    """

    pipeline: ClassVar[str]
    transformer: ClassVar[str]
    autoencoder: ClassVar[str] = "AutoencoderKL"
    blocks: ClassVar[tuple[str, ...]]  # class names of the transformer's repeated blocks

    # --- parts

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        return from_pretrained(_diffusers(self.transformer), self.model, "transformer", dtype=dtype)

    def load_encoder(self) -> None:
        unused = {"transformer": None, "vae": None}
        self.encoder = from_pretrained(
            _diffusers(self.pipeline), self.model, None, dtype=self.encoder_dtype, **unused
        ).to(self.device)
        self.encoder.set_progress_bar_config(disable=True)

    def drop_encoder(self) -> None:
        del self.encoder

    def load_decoder(self) -> None:
        cls = _diffusers(self.autoencoder)
        vae = from_pretrained(cls, self.model, "vae", dtype=self.decoder_dtype)
        self.vae = vae.to(self.device).eval().requires_grad_(False)

    def block_classes(self) -> tuple[type[nn.Module], ...]:
        return tuple({type(m) for m in self.network.modules() if type(m).__name__ in self.blocks})

    # --- noise levels and images

    def sigmas(self, steps: int, size: tuple[int, int]) -> tuple[float, ...]:
        scheduler = self.scheduler()
        scheduler.set_timesteps(steps)
        return tuple(scheduler.sigmas.tolist())

    def scheduler(self) -> Any:
        """The model's own scheduler; with the spec's shift, if that names one."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        found = from_pretrained(FlowMatchEulerDiscreteScheduler, self.model, "scheduler")
        if self.model.shift is None:
            return found
        fixed = {"shift": self.model.shift, "use_dynamic_shifting": False}
        return type(found).from_config(found.config, **fixed)

    def check_size(self, size: tuple[int, int], multiple: int) -> None:
        """``SpecError`` unless height and width are multiples of ``multiple`` pixels."""
        if size[0] % multiple or size[1] % multiple:
            raise SpecError(
                f"sampling.size = {list(size)} does not fit {self.model.path}: "
                f"height and width must be multiples of {multiple}"
            )

    @torch.no_grad()
    def decode(self, x: Tensor) -> Images:
        config = self.vae.config
        latents = x.to(self.decoder_dtype) / config.scaling_factor + config.shift_factor
        return as_images(self.vae.decode(latents, return_dict=False)[0])

    # --- export

    def save_lora(self, folder: Path) -> None:
        assert self.tuning.kind == "lora"
        _diffusers(self.pipeline).save_lora_weights(
            folder,
            transformer_lora_layers=dict(lora_state(self.network)),
            transformer_lora_adapter_metadata=lora_config(self.tuning, self.lora_targets).to_dict(),
        )

    def save_pipeline(self, folder: Path) -> None:
        merge_lora(self.network)
        from_pretrained(
            _diffusers(self.pipeline),
            self.model,
            None,
            dtype=self.dtype,
            transformer=self.network.to(self.dtype),
        ).save_pretrained(folder)


def _diffusers(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def as_images(pixels: Tensor) -> Images:
    """Decoded ``[b, 3, H, W]`` in -1..1, of any dtype, to uint8 ``[b, H, W, 3]``."""
    scaled = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
