"""Where base models come from: hub ids, local folders and the models of this package.

One function wraps diffusers' ``from_pretrained`` so that every failure names the spec key, the
place that was looked at and what to do.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from flowgrpo_ray.errors import ModelError

if TYPE_CHECKING:
    from flowgrpo_ray.spec import ModelSpec


def from_pretrained(
    cls: Any,
    model: ModelSpec,
    subfolder: str | None,
    *,
    dtype: torch.dtype | None = None,
    **more: Any,
) -> Any:
    """``cls.from_pretrained`` for one part of ``model``; ``ModelError`` if it is not to be had."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = dict(more)
    if subfolder is not None:
        options["subfolder"] = subfolder
    if dtype is not None:
        options["dtype"] = dtype
    if model.revision is not None:
        options["revision"] = model.revision
    place = str(model.folder) if model.folder is not None else model.path
    try:
        if model.folder is not None and subfolder is None:
            _check_parts(model, {name for name, part in more.items() if part is None})
        return cls.from_pretrained(place, **options)
    except (OSError, SafetensorError) as error:
        part = f"the part {subfolder!r} of " if subfolder else ""
        what = f"{part}the model cannot be loaded as {cls.__name__}"
        raise unavailable(model, what, error) from error


def identity(model: ModelSpec, index_file: str) -> str:
    """Which weights ``model.path`` names: of a hub model its commit, of a local folder the names,
    sizes and times of change of its files, which cost nothing to read however large they are.

    ``index_file`` is one that every model of its family has. ``ModelError`` if it is not there.
    """
    if model.folder is None:
        return Path(hub_file(model, index_file)).parent.name
    if not (model.folder / index_file).is_file():
        raise ModelError(f"model.path = {model.path!r}: the folder holds no {index_file}")
    files = [path for path in sorted(model.folder.rglob("*")) if path.is_file()]
    rows = [
        (str(p.relative_to(model.folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def hub_file(model: ModelSpec, name: str) -> str:
    """Local path of one file of a hub model, fetched if need be; ``ModelError`` if it is not to be
    had."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(model.path, name, revision=model.revision)
    except (OSError, ValueError) as error:
        raise unavailable(model, f"{name} of it cannot be fetched", error) from error


def unavailable(model: ModelSpec, what: str, error: Exception) -> ModelError:
    """The error that says what to do about a model, or a part of it, that is not to be had."""
    return ModelError(
        f"model.path = {model.path!r}: {what}. Give a local folder, or the id of a hub model that "
        "this machine can reach and whose licence your token has accepted (hf auth login). "
        f"Cause: {error}"
    )


def _check_parts(model: ModelSpec, unused: set[str]) -> None:
    """A missing tokenizer folder is no error to transformers: it would make an empty one."""
    assert model.folder is not None
    index = json.loads((model.folder / "model_index.json").read_text(encoding="utf-8"))
    for name, part in index.items():
        present = isinstance(part, list) and part[0] is not None and name not in unused
        if present and not (model.folder / name).is_dir():
            raise ModelError(
                f"model.path = {model.path!r}: model_index.json names the part {name!r}, and the "
                "folder does not hold it. Copy the whole model folder"
            )
