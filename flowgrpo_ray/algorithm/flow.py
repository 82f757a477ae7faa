"""One stochastic sampling step of a flow-matching model, as a Gaussian.

A flow model predicts the velocity ``v = noise - data`` at noise level ``sigma`` (1 is pure noise,
0 is data). Sampling walks ``sigma`` down; each kernel below returns the distribution of the next
latents, whose ``std`` is that of the WHOLE step (it contains ``sqrt(-dt)``, ``dt = sigma_next -
sigma < 0``). Log-probability and KL are therefore written once, for all kernels.

``eta`` is the amount of noise. With ``eta = 0`` every kernel is the deterministic Euler step, so
stochastic windows and ODE evaluation are values of ``eta``, not code paths.

Shapes: ``B`` batch, ``*D`` latent dimensions. Noise levels are floats or 0-dim tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrpo_ray.algorithm.objectives.surrogate import mean_over_latent

Scalar = float | Tensor


@dataclass(frozen=True)
class Gaussian:
    """``N(mean, std^2)`` over latents ``[B, *D]``; ``std`` is one scalar for the whole step."""

    mean: Tensor  # [B, *D]
    std: Scalar

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + std * noise``; ``noise [B, *D]`` is standard normal."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of ``x [B, *D]``, MEAN over the latent dimensions: ``[B]``.

        The Flow-GRPO paper (arXiv 2505.05470) sums; its code takes the mean, and every published
        clip range is tuned for the mean.
        """
        std = torch.as_tensor(self.std, dtype=x.dtype, device=x.device)
        log_density = -((x - self.mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
        return mean_over_latent(log_density)

    def squared_error(self, x: Tensor) -> Tensor:
        """``-mean (x - mean)^2``: ``[B]``; the log-density without its scale and normaliser.

        What the authors' code takes as log-probability of a ``cps`` step (arXiv 2509.05952), and
        what clip ranges published for it mean.
        """
        return -mean_over_latent((x - self.mean) ** 2)

    def kl(self, other: Gaussian) -> Tensor:
        """``KL(self || other)``, mean over the latent dimensions: ``[B]``."""
        mean = self.mean
        other_std = torch.as_tensor(other.std, dtype=mean.dtype, device=mean.device)
        ratio = torch.as_tensor(self.std, dtype=mean.dtype, device=mean.device) / other_std
        # In this form the terms of the std are exactly 0 where both share it.
        of_std = (ratio**2 - 1) / 2 - ratio.log()
        return mean_over_latent((mean - other.mean) ** 2 / (2 * other_std**2)) + of_std


def ode(x: Tensor, v: Tensor, sigma: Scalar, sigma_next: Scalar) -> Gaussian:
    """Euler step of the probability-flow ODE: ``mean = x + dt v``, no noise."""
    return Gaussian(x + (sigma_next - sigma) * v, 0.0)


def flow_sde(
    x: Tensor, v: Tensor, sigma: Scalar, sigma_next: Scalar, eta: float, sigma_max: Scalar
) -> Gaussian:
    """Flow-GRPO's SDE (arXiv 2505.05470, eq. 9), ``g = eta sqrt(sigma / (1 - sigma))``.

    ``sigma_max`` (the second noise level of the schedule) stands in for ``sigma`` in that
    denominator at ``sigma = 1``, where ``g`` would be infinite.
    """
    if eta == 0:
        return ode(x, v, sigma, sigma_next)
    dt = sigma_next - sigma
    g = eta * (sigma / (1 - (sigma_max if sigma == 1 else sigma))) ** 0.5
    mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return Gaussian(mean, g * (-dt) ** 0.5)


def cps(
    x: Tensor, v: Tensor, sigma: Scalar, sigma_next: Scalar, eta: float, sigma_max: Scalar
) -> Gaussian:
    """Coefficients-preserving sampling (arXiv 2509.05952): the noise level stays on schedule."""
    if eta == 0:
        return ode(x, v, sigma, sigma_next)
    std = sigma_next * math.sin(eta * math.pi / 2)
    data = x - sigma * v
    noise = x + (1 - sigma) * v
    return Gaussian((1 - sigma_next) * data + (sigma_next**2 - std**2) ** 0.5 * noise, std)


def dance_sde(
    x: Tensor, v: Tensor, sigma: Scalar, sigma_next: Scalar, eta: float, sigma_max: Scalar
) -> Gaussian:
    """DanceGRPO's SDE (arXiv 2505.07818): constant ``g = eta``, drift from the score."""
    if eta == 0:
        return ode(x, v, sigma, sigma_next)
    dt = sigma_next - sigma
    score = -(x + (1 - sigma) * v) / sigma
    return Gaussian(x + (v - eta**2 * score / 2) * dt, eta * (-dt) ** 0.5)


Likelihood = Callable[[Gaussian, Tensor], Tensor]
LIKELIHOODS: dict[str, Likelihood] = {
    "gaussian": Gaussian.log_prob,
    "squared_error": Gaussian.squared_error,
}
Kernel = Callable[[Tensor, Tensor, Scalar, Scalar, float, Scalar], Gaussian]
KERNELS: dict[str, Kernel] = {"flow_sde": flow_sde, "cps": cps, "dance_sde": dance_sde}
