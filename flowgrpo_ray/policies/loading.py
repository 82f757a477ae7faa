"""Where base models come from: hub ids, local folders and the models of this package.

One function wraps diffusers' ``from_pretrained`` so that every failure names the spec key, the
place that was looked at and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

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
        return cls.from_pretrained(place, **options)
    except OSError as error:
        what = f"the part {subfolder!r} of " if subfolder else ""
        raise ModelError(
            f"model.path = {model.path!r}: {what}the model cannot be loaded as {cls.__name__}. "
            "Give a local folder, or the id of a hub model that this machine can reach and whose "
            f"licence your token has accepted (hf auth login). Cause: {error}"
        ) from error
