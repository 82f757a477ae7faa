"""Steps without noise: solvers of the probability-flow ODE ``dx = v dsigma``.

One evaluation of the network per step, whatever the order. ``sigma`` goes down from 1 (noise) to 0
(data), ``v = noise - data``; everything is float32. A solver walks one micro-batch from start to
end, and may remember the steps before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from flowgrpo_ray.algorithm.flow import ode


class Solver(Protocol):
    def __call__(self, x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """The latents at ``sigma_next``, from those at ``sigma`` and the velocity there."""
        ...


class Euler:
    """First order: ``x + (sigma_next - sigma) v``."""

    def __call__(self, x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
        return ode(x, v, sigma, sigma_next).mean


class Dpm2:
    """Second order, multistep, in the data prediction ``x - sigma v``: DPM-Solver++ 2M (arXiv
    2211.01095, algorithm 2) for ``alpha = 1 - sigma``; first order in the first and the last step.

    It extrapolates the prediction, in half-log-SNR ``log((1 - sigma) / sigma)``, from the step
    before to the middle of this one.
    """

    def __init__(self) -> None:
        self._before: tuple[Tensor, float] | None = None  # data prediction, half-log-SNR

    def __call__(self, x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
        data, now = x - sigma * v, half_log_snr(sigma)
        before, self._before = self._before, (data, now)
        if sigma_next == 0:
            return data
        then = half_log_snr(sigma_next)
        middle = data
        if before is not None and before[1] > -math.inf:
            middle = data + (then - now) / (2 * (now - before[1])) * (data - before[0])
        left = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))  # e^(now - then)
        return sigma_next / sigma * x + (1 - sigma_next) * (1 - left) * middle


def half_log_snr(sigma: float) -> float:
    """``log((1 - sigma) / sigma)``, minus infinity for pure noise."""
    return -math.inf if sigma >= 1 else math.log((1 - sigma) / sigma)


SOLVERS: dict[str, Callable[[], Solver]] = {"euler": Euler, "dpm2": Dpm2}
