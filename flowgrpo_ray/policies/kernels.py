"""Which of torch's kernels a process takes, for the whole of its life.

Not around single calls: what activation checkpointing computes again in the backward pass must meet
the same kernels as the forward did, and sampling the same as training.
"""

from __future__ import annotations

import os

import torch

from flowgrpo_ray.spec.sections import ModelSpec

ATTENTION = {  # by model.attention: of torch's kernels, those that may be taken
    "native": {"flash", "efficient", "math"},
    "flash": {"flash", "math"},
    "efficient": {"efficient", "math"},
    "cudnn": {"cudnn", "math"},
    "math": {"math"},
}
SWITCHES = {
    "flash": torch.backends.cuda.enable_flash_sdp,  # of CPUs' flash attention as well
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
}


def use_kernels(model: ModelSpec) -> None:
    """Those that ``model.attention`` and ``model.deterministic`` name."""
    for name, switch in SWITCHES.items():
        switch(name in ATTENTION[model.attention])
    if model.deterministic:  # cuBLAS reads it when a process first calls it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(model.deterministic)
