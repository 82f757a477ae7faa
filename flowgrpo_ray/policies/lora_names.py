"""What programs call the layers of a network in their LoRA files, and which layers these are.

Layer names are those of this package's network, or those of the published model ("native"), in
which several of ours may be one, dotted as they are or flat (kohya: ``_`` for each dot).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

Native = Mapping[str, tuple[str, ...]]  # by a published name, {} for a block's number: our layers

DIFFUSERS_PREFIX, PEFT_PREFIX = "transformer.", "base_model.model."
DOTTED = (DIFFUSERS_PREFIX, PEFT_PREFIX, "diffusion_model.")
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
HALF = re.compile(r"(.+)\.lora(?:_([AB])(?:\.default)?|[_.](down|up))\.weight")
SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}


def half(name: str) -> tuple[str, str] | None:
    """The layer as the file calls it, and ``A`` or ``B``; ``None`` for another kind of tensor."""
    found = HALF.fullmatch(name)
    return (found[1], SIDES[found[2] or found[3]]) if found else None


def place(
    named: Mapping[str, Tensor], network: nn.Module, native: Native
) -> dict[str, Tensor] | None:
    """``named`` as LAYER.lora_A.weight and LAYER.lora_B.weight of our layers; ``None`` if one of
    them has no name that stands for exactly one place of ``network``.

    Where a published layer is several of ours, each has its A, and its own rows of B.
    """
    linear = {n: len(m.weight) for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    dotted = _dotted(linear, native)
    flats = Counter(name.replace(".", "_") for name in dotted)
    flat = {f: layers for name, layers in dotted.items() if flats[f := name.replace(".", "_")] == 1}
    placed: dict[str, Tensor] = {}
    for name, tensor in named.items():
        found = half(name)
        layers = _find(found[0], dotted, flat) if found else None
        if found is None or layers is None:
            return None
        parts = [tensor] * len(layers)
        if found[1] == "B" and len(layers) > 1:
            rows = [linear[layer] for layer in layers]
            if sum(rows) != len(tensor):
                raise ValueError(f"{name} has {len(tensor)} rows, and {sum(rows)} here")
            parts = torch.split(tensor, rows)
        for layer, part in zip(layers, parts, strict=True):
            if (key := f"{layer}.lora_{found[1]}.weight") in placed:
                raise ValueError(f"it adapts {layer} twice, once as {name!r}")
            placed[key] = part
    return placed


def _dotted(linear: Mapping[str, int], native: Native) -> dict[str, tuple[str, ...]]:
    """Our names and the published ones, with the layers of ``linear`` that they stand for."""
    dotted: dict[str, tuple[str, ...]] = {name: (name,) for name in linear}
    numbers = {number for name in linear for number in re.findall(r"\.(\d+)\.", name)}
    for pattern, ours in native.items():
        for number in numbers:
            layers = tuple(layer.format(number) for layer in ours)
            if linear.keys() >= set(layers):
                dotted[pattern.format(number)] = layers
    return dotted


def _find(
    name: str, dotted: Mapping[str, tuple[str, ...]], flat: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...] | None:
    for prefixes, known in ((DOTTED, dotted), (FLAT, flat)):
        for prefix in prefixes:
            if name.startswith(prefix):
                return known.get(name.removeprefix(prefix))
    return dotted.get(name)
