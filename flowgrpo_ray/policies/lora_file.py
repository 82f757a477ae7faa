"""LoRA files that a run starts from, in diffusers' layout or peft's, local or of the hub.

Reading checks that the adapters are plain ones: ``alpha / rank * B @ A`` on layers of the denoiser.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.paths import local_path
from flowgrpo_ray.common.strict_json import parse

if TYPE_CHECKING:
    from flowgrpo_ray.spec.sections import ModelSpec

PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PREFIX = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "base_model.model.",
)
DIFFUSERS_WEIGHTS, DIFFUSERS_PREFIX = "pytorch_lora_weights.safetensors", "transformer."
VARIANTS = ("use_dora", "use_rslora", "alpha_pattern")  # of peft, which scale otherwise
PLAIN = re.compile(r"(.+)\.lora_[AB]\.weight")


@dataclass(frozen=True)
class LoraFile:
    """Adapters of one rank and alpha."""

    place: str  # as model.lora has it
    weights: dict[str, Tensor]  # LAYER.lora_A.weight [rank, in], LAYER.lora_B.weight [out, rank]
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


def read_lora(model: ModelSpec, pipeline: str) -> LoraFile:
    """The adapters that ``model.lora`` names; ``ModelError`` if they are not to be had.

    ``pipeline`` is the diffusers class that knows the layouts of this family's LoRA files; a family
    without one takes peft's layout.
    """
    assert model.lora is not None
    place = model.lora
    try:
        file = _weights_file(_downloaded(model))
        config_file = file.with_name(PEFT_CONFIG)
        if file.name == PEFT_WEIGHTS and config_file.is_file():
            config = parse(config_file.read_bytes())
            weights, prefix = load_file(file), PEFT_PREFIX
        elif pipeline:
            weights, config = _read_diffusers(file, pipeline)
            prefix = DIFFUSERS_PREFIX
        else:
            raise ValueError(f"this family takes peft's layout: a folder with {PEFT_CONFIG}")
        return _plain(place, weights, config, prefix)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"model.lora = {place!r}: no LoRA can be read from it. Give a folder or file as "
            "flowgrpo-ray export, diffusers or peft writes it, or the id of a hub model that this "
            f"machine can reach. Cause: {error}"
        ) from error


def _downloaded(model: ModelSpec) -> Path:
    """The local file or folder; what looks like a hub id is downloaded, as ``model.path`` is."""
    assert model.lora is not None
    local = local_path(model.lora)
    if local is not None:
        return local
    from huggingface_hub import snapshot_download

    files = ["*.safetensors", PEFT_CONFIG]
    return Path(snapshot_download(model.lora, allow_patterns=files, ignore_patterns=["*/*"]))


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


def _read_diffusers(file: Path, pipeline: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and peft's config from the file's metadata (empty if it has none)."""
    import diffusers

    cls = getattr(diffusers, pipeline)
    # Classes that know alphas of single layers return them in between; the others ignore the ask.
    weights, *alphas, metadata = cls.lora_state_dict(
        str(file), use_safetensors=True, return_alphas=True, return_lora_metadata=True
    )
    if any(alphas):
        raise ValueError("it has an alpha per layer; merge it with diffusers' fuse_lora instead")
    return weights, {
        key.removeprefix(DIFFUSERS_PREFIX): value for key, value in (metadata or {}).items()
    }


def _plain(
    place: str, named: Mapping[str, Tensor], config: Mapping[str, Any], prefix: str
) -> LoraFile:
    weights = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    odd = [name for name in named if not (name.startswith(prefix) and PLAIN.fullmatch(name))]
    if odd or not weights:
        raise ValueError(
            f"it holds {f'{odd[0]!r}' if odd else 'nothing'}, where names are "
            f"{prefix}LAYER.lora_A.weight and {prefix}LAYER.lora_B.weight: adapters of the "
            "denoiser's layers alone"
        )
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
    if not isinstance(config, dict):
        raise ValueError(f"{PEFT_CONFIG} holds no object")
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
