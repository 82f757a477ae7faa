"""Which of torch's kernels a process takes, for the whole of its life.

Not around single calls: what activation checkpointing computes again in the backward pass must meet
the same kernels as the forward did, and sampling the same as training.
"""

from __future__ import annotations

import os
import shutil
import socket

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from flowgrpo_ray.common.errors import ModelError
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


def cast_by_autocast(network: nn.Module) -> set[int]:
    """The ids of parameters that autocast casts wherever they are used: those of matrix products.

    Gathered in that dtype they give the same bits; any other would lose some.
    """
    layers = (m for m in network.modules() if isinstance(m, nn.Linear | _ConvNd))
    return {id(p) for layer in layers for p in layer.parameters(recurse=False)}


def prepare_compiler() -> None:
    """Have torch.compile keep the bits of eager sampling and training, or end with an error;
    ``ModelError`` if this machine lacks what it calls."""
    from torch._inductor import config as inductor

    _check_compiler()
    # A program for each kind of block, size of a batch, with and without gradients, and of the
    # reference; beyond torch's limit blocks would run uncompiled, with other bits.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # Fused kernels keep float32 where eager ones round to half precision, and programs with and
    # without gradients fuse otherwise: round as eager does, and both are the same.
    inductor.emulate_precision_casts = True


def _check_compiler() -> None:
    wanted = os.environ.get("CXX") or "g++"
    if shutil.which(wanted) is None:
        raise ModelError(
            f"model.compile = true needs a C++ compiler, and {wanted!r} is not on PATH of "
            f"{socket.gethostname()}: install one on every machine of the run, name it in CXX, or "
            "leave out that key"
        )
