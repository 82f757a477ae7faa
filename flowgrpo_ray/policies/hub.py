"""Which weights ``model.path`` names, on the hub or in a folder, and what to say if there are none.

Needs no torch: a run asks before anything starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.paths import local_path
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.policies.fit import check_class, check_config, check_files
from flowgrpo_ray.spec.families import FAMILIES

if TYPE_CHECKING:
    from flowgrpo_ray.spec.sections import ModelSpec

NEVER_LOADED = (  # pickles, other frameworks, and second copies in half precision
    *("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx*", "*.gguf"),
    *("*.fp16*.safetensors", "*.md", "*.png", "*.jpg", ".git*"),
)

LORA_FILES = ["*.safetensors", "adapter_config.json"]  # of a LoRA's repository, not in folders


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


def read_config(model: ModelSpec, name: str) -> dict[str, Any]:
    """A JSON file of the model, as ``model_index.json`` or ``transformer/config.json``."""
    file = model_file(model, name)
    try:
        found = parse(file.read_bytes())
        if isinstance(found, dict):
            return found
        raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise unavailable(model, f"{name} of it cannot be read", error) from error


def check_model_files(model: ModelSpec) -> None:
    """``ModelError`` for a model whose index is of no pipeline of the family, or, of a folder, one
    with quantised weights."""
    name = FAMILIES[model.family].index
    index = read_config(model, name)
    check_class(model, index)
    check_config(model, name, index)  # of a model whose files lie flat
    if model.folder is not None:
        check_files(model, name, model.folder)
        for part in sorted(index):
            if (model.folder / part / "config.json").is_file():
                check_config(model, part, read_config(model, f"{part}/config.json"))
                check_files(model, part, model.folder / part)


def hub_file(model: ModelSpec, name: str) -> Path:
    """The local copy of one file of a hub model, fetched if need be."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model.path, name, revision=model.revision))
    except (OSError, ValueError) as error:
        raise unavailable(model, f"{name} of it cannot be fetched", error) from error


def wanted_files(model: ModelSpec) -> dict[str, int]:
    """Names and bytes of a hub model's files that a run loads; none where the hub does not answer:
    what is in this machine's cache is all that there is then."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    index = FAMILIES[model.family].index
    in_parts = index == "model_index.json"  # which names a folder for each; else files lie flat
    try:
        found = HfApi().model_info(model.path, revision=model.revision, files_metadata=True)
        described = read_config(model, index)
    except (httpx.TransportError, OfflineModeIsEnabled):
        return {}
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise unavailable(model, "its files cannot be listed", error) from error
    check_class(model, described)
    parts = [name for name, part in described.items() if isinstance(part, list) and part[0]]
    files = {file.rfilename: file.size or 0 for file in found.siblings or []}
    for part in parts:
        if (config := f"{part}/config.json") in files:
            check_config(model, part, read_config(model, config))
    return {
        name: size
        for name, size in files.items()
        if not any(fnmatch(name, pattern) for pattern in NEVER_LOADED)
        and (name == index or name.partition("/")[0] in parts or not in_parts)
    }


def to_fetch(model: ModelSpec) -> list[tuple[ModelSpec, dict[str, int]]]:
    """What a run loads from the hub, the names and bytes of files: of its model, and of the LoRA
    that it starts from."""
    found = [] if model.folder is not None else [(model, wanted_files(model))]
    if repository := lora_repository(model):
        lora = model.model_copy(update={"path": repository, "revision": None})
        found.append((lora, _lora_files(repository)))
    return found


def lora_repository(model: ModelSpec) -> str | None:
    """The hub's, of the LoRA that a run starts from, if that is there."""
    return model.lora if model.lora is not None and local_path(model.lora) is None else None


def _lora_files(repository: str) -> dict[str, int]:
    """None where they cannot be listed: whoever reads them will say so."""
    import httpx
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(repository, files_metadata=True)
    except (httpx.HTTPError, OSError, ValueError):
        return {}
    return {
        file.rfilename: file.size or 0
        for file in found.siblings or []
        if "/" not in file.rfilename and any(fnmatch(file.rfilename, p) for p in LORA_FILES)
    }


def download(model: ModelSpec, files: Collection[str]) -> None:
    """Fetch these files into this machine's cache."""
    from huggingface_hub import snapshot_download

    snapshot_download(model.path, revision=model.revision, allow_patterns=[*files])


def fetched_bytes(model: ModelSpec, files: Mapping[str, int]) -> int:
    """How much of these files is in this machine's cache, those on their way included."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=model.path, repo_type="model")
    there = sum(
        size
        for name, size in files.items()
        if isinstance(try_to_load_from_cache(model.path, name, revision=model.revision), str)
    )
    # After the others: one that is whole by now is missed for a moment, and not counted twice.
    for path in folder.glob("blobs/*.incomplete"):
        with suppress(FileNotFoundError):
            there += path.stat().st_size
    return there


def unavailable(model: ModelSpec, what: str, error: Exception) -> ModelError:
    """The error that says what to do about a model, or a part of it, that is not to be had."""
    return ModelError(
        f"model.path = {model.path!r}: {what}. Give a local folder, or the id of a hub model that "
        "this machine can reach and whose licence your token has accepted (hf auth login). "
        f"Cause: {error}"
    )
