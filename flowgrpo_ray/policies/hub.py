"""Which weights ``model.path`` names, on the hub or in a folder, and what to say if there are none.

Needs no torch: a run asks before anything starts.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.spec.families import FAMILIES

if TYPE_CHECKING:
    from flowgrpo_ray.spec.sections import ModelSpec


def identity(model: ModelSpec) -> str:
    """Which weights ``model.path`` names: of a hub model its commit, of a local folder the names,
    sizes and times of change of its files, which cost nothing to read however large they are.

    ``ModelError`` if the model is not to be had.
    """
    index = model_file(model, FAMILIES[model.family].index)
    if model.folder is None:
        return index.parent.name
    files = [path for path in sorted(model.folder.rglob("*")) if path.is_file()]
    rows = [
        (str(p.relative_to(model.folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def model_file(model: ModelSpec, name: str) -> Path:
    """One file of the model, fetched from the hub if need be; ``ModelError`` if it is not there."""
    if model.folder is None:
        return hub_file(model, name)
    path = model.folder / name
    if not path.is_file():
        raise ModelError(
            f"model.path = {model.path!r}: the folder holds no {name}. Copy the whole model folder"
        )
    return path


def hub_file(model: ModelSpec, name: str) -> Path:
    """The local copy of one file of a hub model, fetched if need be."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model.path, name, revision=model.revision))
    except (OSError, ValueError) as error:
        raise unavailable(model, f"{name} of it cannot be fetched", error) from error


def unavailable(model: ModelSpec, what: str, error: Exception) -> ModelError:
    """The error that says what to do about a model, or a part of it, that is not to be had."""
    return ModelError(
        f"model.path = {model.path!r}: {what}. Give a local folder, or the id of a hub model that "
        "this machine can reach and whose licence your token has accepted (hf auth login). "
        f"Cause: {error}"
    )
