"""Where base models come from: hub ids, local folders and the models of this package.

One function wraps diffusers' ``from_pretrained`` so that every failure names the spec key, the
place that was looked at and what to do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.policies.fit import (
    check_config,
    check_files,
    check_memory,
    check_tensors,
    values_in,
)
from flowgrpo_ray.policies.hub import download, model_file, read_config, unavailable

if TYPE_CHECKING:
    from flowgrpo_ray.spec.sections import ModelSpec

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")


def from_pretrained(
    cls: Any,
    model: ModelSpec,
    subfolder: str | None,
    *,
    dtype: torch.dtype | None = None,
    **more: Any,
) -> Any:
    """``cls.from_pretrained`` for one part of ``model``, or for a pipeline of all parts that are
    not among ``more``; ``ModelError`` if it is not to be had whole."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = dict(more)
    if subfolder is not None:
        options["subfolder"] = subfolder
    if dtype is not None:
        options["dtype"] = dtype
    if model.revision is not None:
        options["revision"] = model.revision
    if subfolder not in ("scheduler", "processor"):  # which have no weights
        options["use_safetensors"] = True  # never the pickled files that may lie beside them
    try:
        if subfolder is None:
            options |= _text_encoders(model, dtype, given=more.keys())
        elif issubclass(cls, torch.nn.Module):
            return _whole(cls, model, subfolder, options)
        return cls.from_pretrained(model.source, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        part = f"the part {subfolder!r} of " if subfolder else ""
        what = f"{part}the model cannot be loaded as {cls.__name__}"
        raise unavailable(model, what, error) from error


def load_tokenizer(model: ModelSpec, part: str) -> Any:
    """The tokenizer that model_index.json names, or that of the processor which it names."""
    import transformers

    match read_config(model, INDEX).get(part):
        case ["transformers", str(name)] if hasattr(transformers, name):
            cls: Any = getattr(transformers, name)
            if issubclass(cls, transformers.ProcessorMixin):  # whose other parts need torchvision
                cls = transformers.AutoTokenizer
        case _:
            cls = None
    if cls is None:
        raise ModelError(
            f"model.path = {model.path!r}: model_index.json names no tokenizer of transformers as "
            f"{part!r}. Copy the whole folder of one model anew"
        )
    try:
        return cls.from_pretrained(model.source, subfolder=part, revision=model.revision)
    except (OSError, ValueError) as error:
        raise unavailable(model, f"its {part} cannot be loaded", error) from error


def _whole(kind: Any, model: ModelSpec, part: str, options: Mapping[str, Any]) -> Any:
    """A part with weights: not one of its tensors is left as it was made."""
    check_config(model, part, read_config(model, f"{part}/config.json"))
    dtype: torch.dtype = options["dtype"]
    folder = model_file(model, INDEX).parent / part
    check_files(model, part, folder)
    check_memory(model, part, values_in(folder) * dtype.itemsize)
    loaded, info = kind.from_pretrained(model.source, output_loading_info=True, **options)
    # A text encoder's files may hold what only text as output needs; the others' nothing more.
    unexpected = info["unexpected_keys"] if part in ("transformer", "vae") else ()
    check_tensors(model, part, info["missing_keys"], unexpected)
    return loaded


def _text_encoders(
    model: ModelSpec, dtype: torch.dtype | None, given: Collection[str]
) -> dict[str, Any]:
    """The parts of a pipeline, but for those ``given``, that are models of transformers: it would
    load them without a look at what is missing. Those that the folder leaves out are ``None``.

    The class of each part is one of diffusers or transformers, and its folder is there. A missing
    tokenizer folder is no error to transformers: it would make an empty one.
    """
    import transformers

    found: dict[str, Any] = {}
    for name, part in read_config(model, INDEX).items():
        if not isinstance(part, list) or name in given or isinstance(part[0], float):
            continue  # given, or a setting of the pipeline
        if part[0] is None:  # left out by whoever saved the folder, as SD3's T5
            found[name] = None
            continue
        library, *class_name = part
        automatic = library == "transformers" and str(class_name).startswith("['Auto")
        if library not in LIBRARIES or automatic:
            raise ModelError(
                f"model.path = {model.path!r}: model_index.json wants {part} for {name!r}. Only "
                f"classes of {' and '.join(LIBRARIES)} are loaded, by their names: no code that a "
                "model brings is run"
            )
        if model.folder is not None and not (model.folder / name).is_dir():
            raise ModelError(
                f"model.path = {model.path!r}: model_index.json names the part {name!r}, and the "
                "folder does not hold it. Copy the whole model folder"
            )
        cls: Any = getattr(transformers, str(class_name[0]), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            found[name] = from_pretrained(cls, model, name, dtype=dtype)
    return found


def write_published(model: ModelSpec, part: str, folder: Path) -> None:
    """A part of a pipeline that was exported to ``folder`` without it, as it was published."""
    if model.folder is None:
        download(model, [f"{part}/*"])
    published = model_file(model, INDEX).parent / part
    shutil.copytree(published, folder / part, copy_function=shutil.copyfile, dirs_exist_ok=True)
    index = parse((folder / INDEX).read_bytes())
    index[part] = read_config(model, INDEX)[part]
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
