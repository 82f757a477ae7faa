"""Which GPUs a process may see."""

from __future__ import annotations

import os

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")  # what torch reads, of NVIDIA and of AMD


def hide_gpus() -> None:
    """In a process that has reserved none: Ray leaves all of a machine's visible to it, and a model
    that takes the first would take it from whoever reserved that. Before torch looks for any."""
    for variable in VISIBLE:
        os.environ[variable] = ""
