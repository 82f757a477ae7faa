"""FLUX.1-Kontext: FLUX.1 that changes an image."""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo_ray.policies.editing import SOURCES, EditingPolicy
from flowgrpo_ray.policies.flux import FluxPolicy


class FluxKontextPolicy(EditingPolicy, FluxPolicy):
    """``FluxKontextPipeline``'s parts: those of FLUX.1-dev, and one image to change. It has the
    size of the image drawn, where the pipeline would choose one of its own for each."""

    pipeline = "FluxKontextPipeline"
    read_by = ("ComfyUI",)
    sources = range(1, 2)
    call_arguments = (
        *FluxPolicy.call_arguments,
        "max_area={height} * {width}",
        "_auto_resize=False",
    )

    def positions(self, x: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Of the source the same rows and columns, behind a first coordinate of 1."""
        own = super().positions(x, condition)
        if SOURCES not in condition:
            return own
        source = own.clone()
        source[:, 0] = 1
        return torch.cat([own, source])
