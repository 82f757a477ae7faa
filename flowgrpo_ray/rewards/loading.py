"""How rewards find their weights: a folder or a hub id, a device, and a clear error otherwise."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.paths import expand

if TYPE_CHECKING:
    import torch

# Options that several rewards have.
Device = Annotated[
    str | None,
    Field(
        pattern=r"^(cpu|cuda(:[0-9]+)?)$",
        description="`cpu`, `cuda` or `cuda:1`; by default a GPU if `gpus` reserves a share of one",
    ),
]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], Field(description="of the weights")]
CosineDtype = Annotated[Dtype, Field(description="of the weights; the cosine stays float32")]
Revision = Annotated[
    str | None, Field(description="commit, branch or tag, where the place is a hub id")
]
Batch = Annotated[int, Field(ge=1, description="images that go through the model at once")]

# What torch's reader of tensors raises for a file that is cut off or altered.
DAMAGED = (
    *(OSError, EOFError, ValueError, RuntimeError, LookupError, TypeError, AttributeError),
    *(AssertionError, ArithmeticError, struct.error),
)


class ModelSize(NamedTuple):
    """What a reward's published model takes, for `flowgrpo-ray plan`: counted, not measured."""

    parameters: int
    image_bytes: int  # at once and for each image of a batch, in float32


Source = tuple[str, str, str | None]
"""An option of a reward, the folder or hub id that it names, and the revision of a hub id."""


def pick_device(device: str | None) -> torch.device:
    """The torch device called `device`; without a name, a GPU if there is one."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r}, but this process sees {torch.cuda.device_count()} GPUs; "
            "give the reward a share of one (gpus), or ask for device: cpu"
        )
    return found


def load(cls: Any, source: Source, **more: Any) -> Any:
    """`cls.from_pretrained` of what an option names; ModelError if that is not to be had."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    option, place, revision = source
    folder = expand(place)
    if not folder.is_dir() and place.startswith(("/", ".", "~")):
        raise ModelError(f"{option} = {place!r}: there is no such folder")
    if revision is not None:
        more["revision"] = revision
    try:
        return cls.from_pretrained(str(folder) if folder.is_dir() else place, **more)
    except UnpicklingError as error:
        # Its own message advises to run the code in the file.
        raise ModelError(
            f"{option} = {place!r}: its weights are no file of weights alone"
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"{option} = {place!r}: cannot be loaded as {cls.__name__}. Give a local folder, or "
            "the id of a hub model that this machine can reach or has in its cache "
            f"(hf download). Cause: {error}"
        ) from error


def load_model(cls: Any, source: Source) -> Any:
    """A model, float32 and for inference, all of whose weights came from its place."""
    import torch

    model, info = load(cls, source, dtype=torch.float32, output_loading_info=True)
    missing = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        # To transformers this is a warning, and the weights are random.
        option, place, _ = source
        raise ModelError(
            f"{option} = {place!r}: the checkpoint is not one of a {cls.__name__}: it lacks "
            f"{len(missing)} of its weights, such as {missing[0]!r}"
        )
    return model.eval().requires_grad_(False)


def check_tokenizer(tokenizer: Any, vocabulary: int, source: Source, model: Source) -> None:
    """To transformers absent tokenizer files are no error: it makes an empty tokenizer."""
    option, place, _ = source
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(
            f"{option} = {place!r}: no tokenizer files there, or no connection to the hub. Give a "
            "folder or hub id that holds tokenizer.json, or the vocabulary that it is made from"
        )
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"{option} = {place!r}: its tokenizer knows {len(tokenizer)} tokens, the text model of "
            f"{model[0]} = {model[1]!r} only {vocabulary}: they do not belong together"
        )


def read_weights(
    source: Source, filename: str, inside: str | None = None
) -> dict[str, torch.Tensor]:
    """Weights by their names: from a file, or from `filename` of a folder or of a hub repository.

    Files are .safetensors, or else torch's, of which only tensors are read: no code in it is run.
    inside: the key under which a file of torch's may hold them beside other things.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers.utils.hub import cached_file

    option, place, revision = source
    path = expand(place)
    if not path.exists() and (
        place.startswith(("/", ".", "~")) or path.suffix in (".pt", ".pth", ".safetensors")
    ):
        raise ModelError(f"{option} = {place!r}: there is no such file or folder")
    try:
        if not path.is_file():
            place_of_file = str(path) if path.is_dir() else place
            path = Path(str(cached_file(place_of_file, filename, revision=revision)))
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (*DAMAGED, SafetensorError) as error:
        raise ModelError(
            f"{option} = {place!r}: no weights can be read. Give a .pt, .pth or .safetensors file, "
            f"or a folder or reachable hub id that holds {filename!r}. Cause: {error}"
        ) from error
    except UnpicklingError as error:
        # Its own message advises to run the code in the file.
        raise ModelError(
            f"{option} = {place!r}: {path.name} is no file of weights alone"
        ) from error
    if inside is not None and isinstance(weights, dict) and inside in weights:
        weights = weights[inside]
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and torch.is_tensor(value) for name, value in weights.items()
    ):
        raise ModelError(f"{option} = {place!r}: {path.name} is no table of weights by name")
    return weights


def fill(
    model: torch.nn.Module,
    weights: Mapping[str, torch.Tensor],
    source: Source,
    published: Callable[[str], str] = str,
) -> None:
    """Loads `weights` into `model`; ModelError where a name or a shape is not the model's.

    published: the name in `weights` of a weight of the model.
    """
    places = {published(name): [tensor] for name, tensor in model.state_dict().items()}
    fill_places(places, weights, source)


def fill_places(
    places: Mapping[str, Sequence[torch.Tensor]],
    weights: Mapping[str, torch.Tensor],
    source: Source,
) -> None:
    """Writes each of `weights` to its places; ModelError where a name or a shape has none.

    places: the tensors of a model that a weight fills, one after another along its first dimension.
    """

    def shape(name: str) -> tuple[int, ...]:
        first, *others = places[name]
        return (first.shape[0] * (1 + len(others)), *first.shape[1:]) if others else first.shape

    wrong = {
        "lacks": sorted(places.keys() - weights.keys()),
        "also has": sorted(weights.keys() - places.keys()),
        "has in another shape": [
            f"{name} {tuple(weights[name].shape)}, not {tuple(shape(name))}"
            for name in places
            if name in weights and weights[name].shape != shape(name)
        ],
    }
    option, place, _ = source
    for what, names in wrong.items():
        if names:
            raise ModelError(
                f"{option} = {place!r}: these are not the weights that the reward needs: the file "
                f"{what} {len(names)}, such as {names[0]}"
            )
    for name, parts in places.items():
        values = weights[name].chunk(len(parts)) if len(parts) > 1 else [weights[name]]
        for part, value in zip(parts, values, strict=True):
            part.copy_(value)
