"""What the policies over diffusers' pipelines share: loading, noise levels, decoding, export.

An adapter names its pipeline's classes and writes ``encode``, ``latent_shape``, ``velocity`` and
how latents are scaled; parts are loaded from the folders that ``from_pretrained`` knows.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.types import Images
from flowgrpo_ray.policies.base import Configs, Policy
from flowgrpo_ray.policies.lengths import Reading, Tokens
from flowgrpo_ray.policies.loading import from_pretrained, load_tokenizer
from flowgrpo_ray.policies.lora import merge_lora, portable_lora

TIMESTEPS = 1000  # the networks were trained on timestep = 1000 sigma
JOINT_ATTENTION = (  # projections of image and text, as diffusers' joint attention blocks name them
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)


class PipelinePolicy(Policy):
    """A policy whose parts are those of one diffusers pipeline.

    The class names are looked up in diffusers when a part is loaded: importing it takes seconds.
    """

    pipeline: ClassVar[str]
    transformer: ClassVar[str]
    autoencoder: ClassVar[str] = "AutoencoderKL"
    blocks: ClassVar[tuple[str, ...]]  # class names of the transformer's repeated blocks
    max_tokens: ClassVar[int] = 512  # the longest prompt that the pipeline takes
    tokenizer: ClassVar[str] = "tokenizer"  # the part whose tokens max_sequence_length counts
    thinks: ClassVar[bool | None] = None  # as its chat template is told; None: there is none
    call_arguments = ("guidance_scale={guidance}",)
    config_files = ("transformer/config.json", "vae/config.json")

    vae: Any

    # --- parts

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        return from_pretrained(_diffusers(self.transformer), self.model, "transformer", dtype=dtype)

    def load_encoder(self) -> None:
        if self.model.max_sequence_length > self.max_tokens:
            raise SpecError(
                f"model.max_sequence_length = {self.model.max_sequence_length}: {self.pipeline} "
                f"takes at most {self.max_tokens} tokens"
            )
        given = {"transformer": None, **self.load_readers()}
        self.encoder = from_pretrained(
            _diffusers(self.pipeline), self.model, None, dtype=self.encoder_dtype, **given
        ).to(self.device)
        self.encoder.set_progress_bar_config(disable=True)

    def load_readers(self) -> dict[str, Any]:
        """Parts that encoding needs, if not as the pipeline itself would load them."""
        return {"vae": None}

    def export_parts(self) -> dict[str, Any]:
        """Parts that are not loaded to be written again with an exported pipeline."""
        return {}

    def drop_encoder(self) -> None:
        del self.encoder

    def reading(self) -> Reading | None:
        return Reading(self.model.max_sequence_length, self.max_tokens, self.load_tokens)

    def load_tokens(self) -> Tokens:
        """The tokenizer alone, with the pipeline's template if it has one."""
        tokenizer = load_tokenizer(self.model, self.tokenizer)
        if self.thinks is None:
            return Tokens(tokenizer)
        said = [{"role": "user", "content": "{}"}]
        options = {"add_generation_prompt": True, "enable_thinking": self.thinks}
        return Tokens(tokenizer, tokenizer.apply_chat_template(said, tokenize=False, **options))

    def load_decoder(self) -> None:
        self.vae = self.load_autoencoder()

    def load_autoencoder(self) -> Any:
        cls = _diffusers(self.autoencoder)
        vae = from_pretrained(cls, self.model, "vae", dtype=self.decoder_dtype)
        return vae.to(self.device).eval().requires_grad_(False)

    def block_classes(self) -> tuple[type[nn.Module], ...]:
        module = importlib.import_module(_diffusers(self.transformer).__module__)
        return tuple(getattr(module, name) for name in self.blocks)

    def skeleton(self, configs: Configs, dtype: torch.dtype) -> None:
        network = _diffusers(self.transformer).from_config(configs["transformer/config.json"])
        vae = _diffusers(self.autoencoder).from_config(configs["vae/config.json"])
        # Not their own ``to``, which warns of an empty list of modules to keep in float32.
        self.network = nn.Module.to(network, dtype).eval()
        self.vae = nn.Module.to(vae, self.decoder_dtype).eval().requires_grad_(False)

    # --- noise levels and images

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

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

    def shifted(self, levels: Sequence[float], tokens: int) -> tuple[float, ...]:
        """``levels`` and 0 after the scheduler's shift: its own by an image's ``tokens``, or one
        for every size."""
        scheduler = self.scheduler()
        config = scheduler.config
        if len(levels) == 1 and config.shift_terminal:
            raise SpecError(
                f"{self.model.path} cannot draw in one step, as its noise levels end at "
                f"shift_terminal = {config.shift_terminal}: set evaluation.steps to 2 or more"
            )
        scheduler.set_timesteps(sigmas=levels, mu=self.mu(tokens, len(levels), config))
        return tuple(scheduler.sigmas.tolist())

    def mu(self, tokens: int, steps: int, config: Any) -> float:
        """The logarithm of the shift for an image of ``tokens``; ``config`` is the scheduler's."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        return calculate_shift(
            tokens,
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )

    def check_size(self, size: tuple[int, int], multiple: int, most: int | None = None) -> None:
        """``SpecError`` unless height and width are multiples of ``multiple`` pixels, and at most
        ``most`` of them."""
        if size[0] % multiple or size[1] % multiple:
            raise SpecError(
                f"sampling.size = {list(size)} does not fit {self.model.path}: "
                f"height and width must be multiples of {multiple}"
            )
        if most is not None and max(size) > most * multiple:
            raise SpecError(
                f"sampling.size = {list(size)} is too large for {self.model.path}: height and "
                f"width may be up to {most * multiple} pixels"
            )

    def decode(self, x: Tensor) -> Images:
        return decode(self.vae, x)

    # --- export

    def save_lora(self, folder: Path) -> None:
        assert self.tuning.kind == "lora"
        weights, config = portable_lora(self.network, self.tuning, self.lora_targets)
        _diffusers(self.pipeline).save_lora_weights(
            folder,
            transformer_lora_layers=dict(weights),
            transformer_lora_adapter_metadata=config.to_dict(),
        )

    def save_pipeline(self, folder: Path) -> None:
        merge_lora(self.network)
        from_pretrained(
            _diffusers(self.pipeline),
            self.model,
            None,
            dtype=self.dtype,
            transformer=self.network.to(self.dtype),
            **self.export_parts(),
        ).save_pretrained(folder)


class PackedPolicy(PipelinePolicy):
    """A pipeline whose network sees 2 x 2 latents as one token, and whose noise levels are shifted
    by the number of an image's tokens.

    Latents are ``[b, C, h, w]`` to all others; they are packed only inside ``velocity``.
    """

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        self.check_size(size, 2 * self.factor)
        network: Any = self.network.config
        return (network.in_channels // 4, size[0] // self.factor, size[1] // self.factor)

    def sigmas(self, steps: int, size: tuple[int, int]) -> tuple[float, ...]:
        self.latent_shape(size)  # an error if it cannot be drawn
        tokens = size[0] * size[1] // (2 * self.factor) ** 2
        return self.shifted(np.linspace(1, 1 / steps, steps).tolist(), tokens)

    def timestep(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """``[b]``: sigma, rounded as the pipelines do by way of the timestep."""
        timestep = self.levels(sigma, x) * TIMESTEPS
        return timestep.to(self.dtype) / TIMESTEPS

    def tokens(self, x: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """What the network is given as image."""
        return self.pack(x)

    def pack(self, x: Tensor) -> Tensor:
        """``[b, C, h, w]`` to the network's tokens ``[b, h w / 4, 4 C]``."""
        return _diffusers(self.pipeline)._pack_latents(x.to(self.dtype), *x.shape)

    def unpack(self, tokens: Tensor, x: Tensor) -> Tensor:
        """The first tokens, as many as ``pack`` makes of ``x``, to its shape."""
        tokens = tokens[:, : x[0].numel() // tokens.shape[2]]
        return _diffusers(self.pipeline)._unpack_latents(tokens, *x.shape[2:], 1).reshape(x.shape)


class TwoPassPolicy(PackedPolicy):
    """Guidance by a pass of the network for each of the two prompts, each at its own length."""

    def velocity(self, x: Tensor, sigma: float | Tensor, condition: dict[str, Tensor]) -> Tensor:
        """``u + g (c - u)`` of two passes."""
        v = self._predict(x, sigma, condition, "embeds")
        if self.passes(self.guidance) > 1:
            unconditional = self._predict(x, sigma, condition, "negative_embeds")
            v = unconditional + self.guidance * (v - unconditional)
        return self.unpack(v, x)

    @abstractmethod
    def _predict(
        self, x: Tensor, sigma: float | Tensor, condition: dict[str, Tensor], of: str
    ) -> Tensor:
        """One pass for the prompt ``condition[of]``: the velocity as tokens."""


def _diffusers(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


@torch.no_grad()
def decode(vae: Any, x: Tensor) -> Images:
    """Latents ``[b, *D]`` through an ``AutoencoderKL``, in its dtype."""
    latents = x.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return as_images(vae.decode(latents, return_dict=False)[0])


def as_images(pixels: Tensor) -> Images:
    """Decoded ``[b, 3, H, W]`` in -1..1 to uint8 ``[b, H, W, 3]``, scaled in the decoder's dtype as
    the pipelines do."""
    return as_bytes((pixels * 0.5 + 0.5).clamp(0, 1))


def as_bytes(colours: Tensor) -> Images:
    """``[b, 3, H, W]`` in 0..1 to uint8 ``[b, H, W, 3]``."""
    scaled = (colours.float() * 255).round().byte()
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
