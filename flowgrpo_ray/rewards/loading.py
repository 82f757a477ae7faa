"""How rewards find their weights: a folder or a hub id, a device, and a clear error otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo_ray.errors import ModelError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")

Source = tuple[str, str, str | None]
"""An option of a reward, the folder or hub id that it names, and the revision of a hub id."""


def pick_device(device: str | None) -> torch.device:
    """The torch device called `device`; without a name, a GPU if there is one."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown to torch: {error}") from error
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
    folder = Path(place).expanduser()
    if not folder.is_dir() and place.startswith(("/", ".", "~")):
        raise ModelError(f"{option} = {place!r}: there is no such folder")
    if revision is not None:
        more["revision"] = revision
    try:
        return cls.from_pretrained(str(folder) if folder.is_dir() else place, **more)
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
