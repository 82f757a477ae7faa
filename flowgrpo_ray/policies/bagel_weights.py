"""BAGEL's files: where they are, tensors into the network and the autoencoder, and a folder again.

The published model is no diffusers folder. ``ema.safetensors`` holds the network and more: what
this package has no use for (understanding images, text as output) is passed on at export.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.policies.hub import (
    NEVER_LOADED,
    download,
    model_file,
    unavailable,
    wanted_files,
)

if TYPE_CHECKING:
    from flowgrpo_ray.spec.sections import ModelSpec

NETWORK, AUTOENCODER, CONFIG = "ema.safetensors", "ae.safetensors", "llm_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
COPIED = (CONFIG, "vit_config.json", AUTOENCODER, *TOKENIZER)
SMALL = 2**26  # bytes
PROMPT_MARKS = ("<|im_start|>", "<|im_end|>")
IMAGE_MARKS = ("<|vision_start|>", "<|vision_end|>")

# Constants of the public code, in no file of the model.
GRID = 64  # places of latent patches per side
PATCH, CHANNELS = 2, 16  # side of a latent patch, in latents; their channels
PATCH_VALUES = PATCH * PATCH * CHANNELS
WIDTHS = (128, 256, 512, 512)  # of the autoencoder, which is FLUX's
LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159


@contextmanager
def opened(model: ModelSpec, name: str) -> Iterator[Any]:
    """A safetensors file, whose tensors are read one by one."""
    try:
        with safe_open(model_file(model, name), framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise unavailable(model, f"{name} of it cannot be read", error) from error


def _all_tensors(file: Any) -> dict[str, Tensor]:
    return {name: file.get_tensor(name) for name in file.offset_keys()}


def load_tokenizer(model: ModelSpec) -> Any:
    """The tokenizer; ``ModelError`` if it lacks one of the four marks around prompts and images."""
    from transformers import Qwen2Tokenizer

    paths = [model_file(model, name) for name in TOKENIZER]
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(paths[0].parent)
    except (OSError, ValueError) as error:
        raise unavailable(model, "its tokenizer cannot be loaded", error) from error
    missing = [m for m in (*PROMPT_MARKS, *IMAGE_MARKS) if m not in tokenizer.get_vocab()]
    if missing:
        raise ModelError(
            f"model.path = {model.path!r}: its tokenizer has no token {' and no '.join(missing)}. "
            f"Copy {', '.join(TOKENIZER)} of the published model"
        )
    return tokenizer


def check_network(model: ModelSpec, wanted: Mapping[str, tuple[int, ...]], file: Any) -> None:
    """``ModelError`` unless the file has the tensors that ``llm_config.json`` describes."""
    found = {n: tuple(file.get_slice(n).get_shape()) for n in file.offset_keys()}
    wrong = [
        f"{name} is {found.get(name, 'missing')} instead of {shape}"
        for name, shape in wanted.items()
        if found.get(name) != shape
    ]
    layers = "language_model.model.layers."
    wrong += [f"{n} has no place" for n in found if n.startswith(layers) and n not in wanted]
    if wrong:
        raise ModelError(
            f"model.path = {model.path!r}: {NETWORK} does not fit {CONFIG}: {wrong[0]}, and "
            f"{len(wrong) - 1} more tensors. Copy both from the published model, or from an export"
        )


def make_autoencoder(dtype: torch.dtype, widths: Sequence[int] = WIDTHS) -> Any:
    """diffusers' ``AutoencoderKL``, untrained; ``widths`` are the channels of its four levels."""
    from diffusers import AutoencoderKL

    config = {
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": CHANNELS,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": LATENT_SCALE,
        "shift_factor": LATENT_SHIFT,
    }
    vae: Any = AutoencoderKL.from_config(config)
    return nn.Module.to(vae, dtype)  # diffusers' own warns of nothing


def load_autoencoder(model: ModelSpec, dtype: torch.dtype) -> Any:
    """The autoencoder with the weights of ``ae.safetensors``, which has FLUX's original names."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    with opened(model, AUTOENCODER) as file:
        tensors = _all_tensors(file)
    try:
        first = [tensors[f"encoder.down.{level}.block.0.conv1.weight"] for level in range(4)]
        vae = make_autoencoder(dtype, [len(weight) for weight in first])
        vae.load_state_dict(convert_ldm_vae_checkpoint(tensors, vae.config))
    except (KeyError, RuntimeError) as error:
        raise unavailable(model, f"{AUTOENCODER} is not FLUX's autoencoder", error) from error
    return vae


def _small_files(model: ModelSpec) -> list[Path]:
    """Those beside the network, of a hub model fetched if need be; no weights or pictures."""
    if model.folder is None:
        files = wanted_files(model)
        if small := [n for n, size in files.items() if size <= SMALL and "/" not in n]:
            download(model, small)
    return [
        path
        for path in model_file(model, CONFIG).parent.iterdir()
        if path.is_file()
        and path.stat().st_size <= SMALL
        and not any(fnmatch(path.name, pattern) for pattern in (*NEVER_LOADED, "*.safetensors"))
    ]


def save_model(model: ModelSpec, trained: Mapping[str, Tensor], folder: Path) -> None:
    """Write the model's files again; tensors named in ``trained`` are replaced.

    Small files are taken along whatever they are: other programs may read them.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    needed = [model_file(model, name) for name in COPIED]
    for path in {*needed, *_small_files(model)}:
        shutil.copyfile(path, folder / path.name)
    with opened(model, NETWORK) as file:
        tensors = _all_tensors(file)
        metadata = file.metadata()
    save_file({**tensors, **trained}, folder / NETWORK, metadata=metadata)
