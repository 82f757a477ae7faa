"""BAGEL, text to image: a language model whose second expert draws.

Prompts are read by the network itself. Its understanding expert is never trained, so a prompt's
condition is that expert's keys and values, computed once. The published code is
ByteDance-Seed/Bagel; its constants are repeated here where no file of the model holds them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.types import Condition, Images
from flowgrpo_ray.policies.arrays import as_array, pad
from flowgrpo_ray.policies.bagel_weights import (
    CHANNELS,
    CONFIG,
    GRID,
    PATCH,
    PROMPT_MARKS,
    load_autoencoder,
    load_tokenizer,
    make_autoencoder,
    save_model,
)
from flowgrpo_ray.policies.base import Configs, Policy
from flowgrpo_ray.policies.lengths import Reading, Tokens
from flowgrpo_ray.policies.lora import merge_lora, portable_lora
from flowgrpo_ray.policies.lora_file import PEFT_WEIGHTS
from flowgrpo_ray.policies.lora_names import PEFT_PREFIX
from flowgrpo_ray.policies.pipeline import decode

SHIFT = 3.0  # of the noise levels
PIXELS = 16  # side of a latent patch


class BagelPolicy(Policy):
    """BAGEL-7B-MoT in its published files. Latents are ``[b, 16, H / 8, W / 8]``."""

    config_files = (CONFIG,)
    ways_in = ("read",)
    encoded_at_once = 1
    negative_prompt = None  # guidance leads away from a picture of nothing said
    lora_targets = (
        "self_attn.q_proj_moe_gen",
        "self_attn.k_proj_moe_gen",
        "self_attn.v_proj_moe_gen",
        "self_attn.o_proj_moe_gen",
        "mlp_moe_gen.gate_proj",
        "mlp_moe_gen.up_proj",
        "mlp_moe_gen.down_proj",
    )

    # --- parts

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        """In ``dtype`` what full tuning trains; the rest, never trained, in the model's own."""
        from flowgrpo_ray.policies.bagel_network import load_network

        return load_network(self.model, lambda name: dtype if generates(name) else self.dtype)

    def load_encoder(self) -> None:
        if self.encoder_dtype != self.dtype:
            raise SpecError(
                f"model.encoder_dtype = {self.model.encoder_dtype!r}: BAGEL reads prompts with the "
                f"network that draws, in model.dtype = {self.model.dtype!r}. Leave it out"
            )
        self.tokenizer = load_tokenizer(self.model)
        held = hasattr(self, "network")
        network = self.network if held else self.load_network(self.dtype).to(self.device).eval()
        self.reader: Any = network

    def drop_encoder(self) -> None:
        del self.tokenizer, self.reader

    def load_decoder(self) -> None:
        vae = load_autoencoder(self.model, self.decoder_dtype)
        self.vae = vae.to(self.device).eval().requires_grad_(False)

    def block_classes(self) -> tuple[type[nn.Module], ...]:
        from flowgrpo_ray.policies.bagel_network import BagelDecoderLayer

        return (BagelDecoderLayer,)

    def skeleton(self, configs: Configs, dtype: torch.dtype) -> None:
        """The autoencoder has no config file: it is the published one."""
        from transformers import Qwen2Config

        from flowgrpo_ray.policies.bagel_network import BagelNetwork

        self.network = BagelNetwork(Qwen2Config(**configs[CONFIG]), (0, 0)).eval()
        for name, parameter in self.network.named_parameters():
            parameter.data = parameter.data.to(dtype if generates(name) else self.dtype)
        self.vae = make_autoencoder(self.decoder_dtype).eval().requires_grad_(False)

    # --- training

    def full_parameters(self) -> Iterator[nn.Parameter]:
        """The generation expert, as Flow-GRPO's recipe does; prompts are read as before."""
        return (p for name, p in self.network.named_parameters() if generates(name))

    def tune(self, seed: int, *, with_reference: bool) -> None:
        super().tune(seed, with_reference=with_reference)
        reading = [name for name in self.trainable() if not generates(name)]
        if reading:
            raise SpecError(
                f"tuning.targets: {_adapted(reading[0])} belongs to the expert that reads prompts, "
                "whose output is computed once per prompt. Name layers of _moe_gen"
            )

    # --- prompts

    def reading(self) -> Reading:
        limit = self.model.max_sequence_length
        return Reading(limit, sys.maxsize, lambda: Tokens(load_tokenizer(self.model)))

    def encode_batch(self, prompts: Sequence[str]) -> list[Condition]:
        """``past``: keys and values ``[P, layers, 2, heads, features]`` of the prompt's tokens.

        ``model.max_sequence_length`` counts them without the two marks around them.
        """
        start, end = self.tokenizer.convert_tokens_to_ids(list(PROMPT_MARKS))
        conditions: list[Condition] = []
        for prompt in prompts:
            words = self.tokenizer.encode(prompt)[: self.model.max_sequence_length]
            tokens = torch.tensor([start, *words, end], device=self.device)
            with self.autocast():
                conditions.append({"past": as_array(self.reader.read(tokens))})
        return conditions

    def collate(self, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """What the network takes of its prompts, under the names of its arguments."""
        past, mask = pad([condition["past"] for condition in conditions])
        position = torch.tensor([len(condition["past"]) for condition in conditions])
        collated = {"past": past, "position": position}
        return collated if mask is None else {**collated, "mask": mask}

    def example_condition(self, batch: int, configs: Configs) -> dict[str, Tensor]:
        """Prompts of several lengths, so that there is a mask."""
        config = configs[CONFIG]
        tokens = self.model.max_sequence_length + len(PROMPT_MARKS)
        head = config["hidden_size"] // config["num_attention_heads"]
        shape = (config["num_hidden_layers"], 2, config["num_key_value_heads"], head)
        return {
            "past": torch.empty(batch, tokens, *shape, dtype=self.dtype),
            "position": torch.full((batch,), tokens),
            "mask": torch.ones(batch, tokens, dtype=torch.bool),
        }

    # --- noise levels, latents and velocity

    def sigmas(self, steps: int, size: tuple[int, int]) -> tuple[float, ...]:
        """``s t / (1 + (s - 1) t)`` over equal steps of t, with shift s.

        The public code counts noise levels, not steps: its ``num_timesteps`` 50 means 49 steps.
        """
        shift = SHIFT if self.model.shift is None else self.model.shift
        t = torch.linspace(1, 0, steps + 1)
        return tuple((shift * t / (shift * t + (1 - t))).tolist())  # so that 1 gives exactly 1

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        if size[0] % PIXELS or size[1] % PIXELS or max(size) > GRID * PIXELS:
            raise SpecError(
                f"sampling.size = {list(size)} does not fit {self.model.path}: height and width "
                f"must be multiples of {PIXELS}, up to {GRID * PIXELS}"
            )
        return (CHANNELS, size[0] * PATCH // PIXELS, size[1] * PATCH // PIXELS)

    def velocity(self, x: Tensor, sigma: float | Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Guided at all noise levels, as Flow-GRPO's recipe is; BAGEL's own demonstration stops
        guiding at 0.4."""
        v = self._evaluate(x, sigma, condition)
        if self.guidance > 1:
            no_prompt = {"position": torch.zeros_like(condition["position"])}
            v = guide(v.float(), self._evaluate(x, sigma, no_prompt).float(), self.guidance)
        return v

    def _evaluate(self, x: Tensor, sigma: float | Tensor, prompt: dict[str, Tensor]) -> Tensor:
        """One call of the network."""
        rows, columns = (torch.arange(side // PATCH, device=x.device) for side in x.shape[2:])
        places = (rows[:, None] * GRID + columns).flatten()
        time = self.levels(sigma, x)
        with self.autocast():
            v = self.network(pack(x.to(self.dtype)), time, places, **prompt)
        return unpack(v, x.shape)

    def decode(self, x: Tensor) -> Images:
        return decode(self.vae, x)

    # --- export

    def save_lora(self, folder: Path) -> None:
        """In peft's layout, for a module with the published names (``PeftModel``)."""
        from safetensors.torch import save_file

        assert self.tuning.kind == "lora"
        weights, config = portable_lora(self.network, self.tuning, self.lora_targets)
        config.save_pretrained(str(folder))
        named = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in weights.items()}
        save_file(named, folder / PEFT_WEIGHTS, metadata={"format": "pt"})

    def save_pipeline(self, folder: Path) -> None:
        """The published files again, what was trained in ``model.dtype``."""
        names = {_adapted(name) for name in self.trainable()}
        merge_lora(self.network)
        state = self.network.state_dict()
        trained = {name: state[name].to("cpu", self.dtype).contiguous() for name in names}
        save_model(self.model, trained, folder)


def generates(name: str) -> bool:
    """Whether a parameter belongs to the generation expert: the only ones that are ever trained."""
    return "_moe_gen" in name


def _adapted(name: str) -> str:
    """The parameter that one of an adapter changes; any other itself."""
    layer, adapter, _ = name.partition(".lora_")
    return f"{layer}.weight" if adapter else name


def guide(v: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """``u + s (v - u)``, scaled down where its norm over a whole sample exceeds that of ``v``."""
    guided = unconditional + scale * (v - unconditional)
    norm, larger = (t.flatten(1).norm(dim=1) for t in (v, guided))
    ratio = (norm / (larger + 1e-8)).clamp(max=1)
    return guided * ratio.view(-1, *[1] * (v.ndim - 1))


def pack(x: Tensor) -> Tensor:
    """Latents ``[b, c, H, W]`` to patches ``[b, n, PATCH * PATCH * c]``, channels fastest."""
    b, channels, height, width = x.shape
    grid = x.reshape(b, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, PATCH * PATCH * channels)


def unpack(patches: Tensor, shape: Sequence[int]) -> Tensor:
    """What ``pack`` was given: latents of ``shape``."""
    b, channels, height, width = shape
    grid = patches.reshape(b, height // PATCH, width // PATCH, PATCH, PATCH, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(shape)
