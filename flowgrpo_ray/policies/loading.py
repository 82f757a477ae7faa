"""Where base models come from: hub ids, local folders and the models of this package.

One function wraps diffusers' ``from_pretrained`` so that every failure names the spec key, the
place that was looked at and what to do.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from flowgrpo_ray.errors import ModelError
from flowgrpo_ray.hub import unavailable

if TYPE_CHECKING:
    from flowgrpo_ray.spec_sections import ModelSpec


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
    try:
        if model.folder is not None and subfolder is None:
            _check_parts(model, {name for name, part in more.items() if part is None})
        return cls.from_pretrained(model.source, **options)
    except (OSError, SafetensorError) as error:
        part = f"the part {subfolder!r} of " if subfolder else ""
        what = f"{part}the model cannot be loaded as {cls.__name__}"
        raise unavailable(model, what, error) from error


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
