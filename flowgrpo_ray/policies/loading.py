"""Where base models come from: hub ids, local folders and the models of this package.

One function wraps diffusers' ``from_pretrained`` so that every failure names the spec key, the
place that was looked at and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.policies.hub import model_file, unavailable

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
    if subfolder != "scheduler":  # which has no weights
        options["use_safetensors"] = True  # never the pickled files that may lie beside them
    try:
        if subfolder is None:
            _check_parts(model, {name for name, part in more.items() if part is None})
        return cls.from_pretrained(model.source, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        part = f"the part {subfolder!r} of " if subfolder else ""
        what = f"{part}the model cannot be loaded as {cls.__name__}"
        raise unavailable(model, what, error) from error


def _check_parts(model: ModelSpec, unused: set[str]) -> None:
    """Of each part that is loaded: its class is one of diffusers or transformers, and its folder is
    there. A missing tokenizer folder is no error to transformers: it would make an empty one."""
    index = parse(model_file(model, INDEX).read_bytes())
    for name, part in index.items():
        if not isinstance(part, list) or part[0] is None or name in unused:
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
