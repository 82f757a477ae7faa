"""LoRA files that a run starts from, in the layouts of several programs, local or of the hub.

Reading checks that the adapters are plain ones: ``alpha / rank * B @ A`` on layers of the denoiser.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.paths import local_path
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.policies.hub import LORA_FILES
from flowgrpo_ray.policies.lora_names import DIFFUSERS_PREFIX, PEFT_PREFIX, Native, half, place

if TYPE_CHECKING:
    from flowgrpo_ray.spec.sections import ModelSpec

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS, DIFFUSERS_CONFIG = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
VARIANTS = ("use_dora", "use_rslora", "alpha_pattern")  # of peft, which scale otherwise
OF_ENCODERS = ("text_encoder", "lora_te")  # how their layers' names begin
PLAIN = re.compile(r"(.+)\.lora_[AB]\.weight")
ALPHA = ".alpha"  # a tensor of one number beside a layer's A and B


@dataclass(frozen=True)
class LoraFile:
    """Adapters of one rank and alpha."""

    place: str  # as model.lora has it
    weights: Mapping[str, Tensor]  # LAYER.lora_A.weight [rank, in], LAYER.lora_B.weight [out, rank]
    rank: int
    alpha: float

    @property
    def layers(self) -> list[str]:
        """Names of the layers that they adapt."""
        return sorted({name.partition(".lora_")[0] for name in self.weights})

    @property
    def endings(self) -> list[str]:
        """Their names without the block's, as ``tuning.targets`` has them."""
        return sorted({re.sub(r"^.*?\.\d+\.", "", layer) for layer in self.layers})

    def at(self, alpha: float) -> LoraFile:
        """The same change of each weight, ``alpha / rank * B @ A``, written for another alpha.

        Bit for bit where the quotient of both alphas is a power of two; else each entry of B is
        rounded once, by 2^-24 of its size.
        """
        if alpha == self.alpha:
            return self
        weights = {
            name: _times(tensor, self.alpha / alpha) if ".lora_B." in name else tensor
            for name, tensor in self.weights.items()
        }
        return replace(self, weights=weights, alpha=alpha)


def _times(tensor: Tensor, factor: float) -> Tensor:
    """In float32, rounded once."""
    return (tensor.double() * factor).float()


def read_lora(model: ModelSpec, network: nn.Module, pipeline: str, native: Native) -> LoraFile:
    """The adapters of layers of ``network`` that ``model.lora`` names; ``ModelError`` if they are
    not to be had.

    ``native`` has the published names of these layers. What has other names yet is left to
    ``pipeline``, the family's class in diffusers if it has one.
    """
    assert model.lora is not None
    try:
        file = _weights_file(_downloaded(model))
        tensors, config = load_file(file), _config(file)
        _check_kinds(tensors)
        halves = _fold(tensors, config)
        weights = place(halves, network, native)
        if weights is None:
            weights = _converted(halves, pipeline)
        return _plain(model.lora, weights, config or {})
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"model.lora = {model.lora!r}: no LoRA can be read from it. Give a folder or file as "
            "flowgrpo-ray export, diffusers, peft or kohya writes it, or the id of a hub model "
            f"that this machine can reach. Cause: {error}"
        ) from error


def _downloaded(model: ModelSpec) -> Path:
    """The local file or folder; what looks like a hub id is downloaded, as ``model.path`` is."""
    assert model.lora is not None
    local = local_path(model.lora)
    if local is not None:
        return local
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.lora, allow_patterns=LORA_FILES, ignore_patterns=["*/*"]))


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError("there is no such file or folder")
    if (path / PEFT_CONFIG).is_file():
        return path / PEFT_WEIGHTS
    known = path / DIFFUSERS_WEIGHTS
    found = [known] if known.is_file() else sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(f"the folder holds {len(found)} safetensors files; name one")
    return found[0]


def _config(file: Path) -> dict[str, Any] | None:
    """peft's description of the adapters: beside the file or in its header; ``None`` if there is
    neither. Then the names of the tensors must not be peft's, whose alpha is told nowhere else."""
    beside = file.with_name(PEFT_CONFIG)
    if file.name == PEFT_WEIGHTS and beside.is_file():
        config = parse(beside.read_bytes())
    else:
        with safe_open(file, framework="pt") as opened:
            header = (opened.metadata() or {}).get(DIFFUSERS_CONFIG)
            if any(name.startswith(PEFT_PREFIX) for name in opened.keys()):  # noqa: SIM118
                raise ValueError(f"it is in peft's layout: a folder with {PEFT_CONFIG}")
        if header is None:
            return None
        config = parse(header.encode())
    if not isinstance(config, dict):
        raise ValueError(f"{PEFT_CONFIG} or the header holds no object")
    return {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in config.items()}


def _check_kinds(tensors: Mapping[str, Tensor]) -> None:
    """``ValueError`` for what is no part of plain adapters of the denoiser: diffusers' readers pass
    over some of these in silence."""
    encoders = [name for name in tensors if name.startswith(OF_ENCODERS)]
    odd = [n for n in tensors if not n.endswith(ALPHA) and ("lora" not in n or ".weight" not in n)]
    odd += [n for n in tensors if "magnitude" in n or "lora_mid" in n]
    if not tensors or encoders or odd:
        found = repr((encoders + odd)[0]) if tensors else "nothing"
        raise ValueError(
            f"it holds {found}, and what can be trained on are plain adapters, lora_A and lora_B "
            "(or lora_down and lora_up) of the denoiser's layers alone"
        )


def _fold(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """The tensors without alphas of single layers, which become part of their B."""
    alphas = {n.removesuffix(ALPHA): t for n, t in tensors.items() if n.endswith(ALPHA)}
    halves = {n: t for n, t in tensors.items() if not n.endswith(ALPHA)}
    ranks = {found[0]: len(t) for n, t in halves.items() if (found := half(n)) and found[1] == "A"}
    if alphas and config is not None:
        raise ValueError("it has an alpha for each layer and another for all")
    for layer, tensor in alphas.items():
        alpha = tensor.item() if tensor.numel() == 1 else math.nan
        if not ranks.get(layer) or not 0 < alpha < math.inf:
            raise ValueError(f"{layer}{ALPHA} is {alpha}, for rank {ranks.get(layer)}")
    for name, tensor in halves.items():
        layer, side = half(name) or ("", "")
        if side == "B" and layer in alphas:
            halves[name] = _times(tensor, alphas[layer].item() / ranks[layer])
    return halves


def _converted(halves: Mapping[str, Tensor], pipeline: str) -> dict[str, Tensor]:
    """Under our layers' names, by diffusers."""
    named: Mapping[str, Tensor] = halves
    if pipeline:
        import diffusers

        try:
            named = getattr(diffusers, pipeline).lora_state_dict(dict(halves))
        except (AssertionError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(f"diffusers cannot convert its names: {error}") from error
    odd = [n for n in named if not (n.startswith(DIFFUSERS_PREFIX) and PLAIN.fullmatch(n))]
    if odd:
        raise ValueError(
            f"it holds {odd[0]!r}, which names no layer of this model, or more than one. Known are "
            f"the layers' names in {DIFFUSERS_PREFIX}LAYER.lora_A.weight, diffusion_model.LAYER "
            "and, flat as kohya writes them, in lora_unet_LAYER.lora_down.weight"
        )
    return {name.removeprefix(DIFFUSERS_PREFIX): tensor for name, tensor in named.items()}


def _plain(place: str, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoraFile:
    halves = {name.replace(".lora_A.", ".lora_B.") for name in weights}
    if 2 * len(halves) != len(weights):
        lacking = next(
            n for n in sorted(halves) if not {n, n.replace("_B.", "_A.")} <= set(weights)
        )
        raise ValueError(f"{lacking.partition('.lora_')[0]} lacks its A or its B")
    flat = [
        n for n, tensor in weights.items() if tensor.ndim != 2 or not tensor.is_floating_point()
    ]
    if flat:
        raise ValueError(f"{flat[0]} is no matrix of numbers")
    variants = [key for key in VARIANTS if config.get(key)]
    if variants:
        raise ValueError(f"it uses {', '.join(variants)}; only plain LoRA can be trained on")
    ranks = {len(weight) for name, weight in weights.items() if ".lora_A." in name}
    if len(ranks) != 1:
        raise ValueError(f"its layers have ranks {sorted(ranks)}; one for all is needed")
    rank = ranks.pop()
    alpha = float(config.get("lora_alpha", rank))
    if not 0 < alpha < math.inf or rank < 1:
        raise ValueError(f"its rank is {rank} and its lora_alpha {alpha:g}; both must be above 0")
    return LoraFile(place, weights, rank, alpha)
