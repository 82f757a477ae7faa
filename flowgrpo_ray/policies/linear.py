"""Linear layers in float32 on a CPU by oneDNN, where torch would call MKL.

MKL has no AVX-512 kernels for AMD's processors, oneDNN has. Sums are rounded differently, so
whoever samples and whoever trains must take the same.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowgrpo_ray.common.errors import ModelError

ROWS, WIDTH, ROUNDS = 1024, 128, 10  # of what is timed: a transformer's MLP on so many tokens


def use_onednn(module: nn.Module) -> None:
    """Have oneDNN compute all float32 linear layers in ``module``, adapters' among them."""
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        raise ModelError(
            f"cluster.cpu_linear = onednn: torch {torch.__version__} of {socket.gethostname()} was "
            "built without oneDNN's linear layers. Set cluster.cpu_linear: torch"
        )
    for layer in module.modules():
        if type(layer) is nn.Linear and layer.weight.dtype == torch.float32:
            layer.__class__ = OneDnnLinear


class OneDnnLinear(nn.Linear):
    """The same layer; it gives the same bits with and without gradients."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return _OneDnn.apply(input, self.weight, self.bias)  # pyright: ignore[reportReturnType]


class _OneDnn(torch.autograd.Function):
    """``x [*, k]`` times ``weight [n, k]`` transposed, plus ``bias [n]`` or nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows, of_rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return (
            _product(grad, weight.t()) if of_x else None,
            _product(rows.t(), of_rows.t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def time_linear() -> dict[str, float]:
    """Seconds of one MLP, forwards and backwards, by each: the least of some that take turns.

    Processor time of one thread, so that others' work on the machine hardly counts.
    """
    torch.set_num_threads(1)
    mlps = {}
    for name in ("torch", "onednn"):
        layers = [nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)]
        mlps[name] = nn.Sequential(*layers)
    use_onednn(mlps["onednn"])
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    least = dict.fromkeys(mlps, float("inf"))
    for _ in range(ROUNDS):
        for name, mlp in mlps.items():
            began = time.thread_time()
            mlp(x).sum().backward()
            least[name] = min(least[name], time.thread_time() - began)
    return least
