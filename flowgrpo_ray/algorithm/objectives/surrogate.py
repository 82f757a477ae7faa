"""What objectives are written with: importance ratios, clipping, masks, KL.

Shapes: ``B`` samples, ``*D`` latent dimensions. Everything works on the log-ratio: clip ranges go
down to 2e-6, where ``rho - 1`` has only a few float32 units left.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from flowgrpo_ray.algorithm.flow import Gaussian


def mean_over_latent(x: Tensor) -> Tensor:
    """``[B, *D] -> [B]``."""
    return x.flatten(1).mean(1)


def clipped_losses(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """``max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))``: ``[B]``.

    Written on the log-ratio: a positive advantage is only ever clipped from above, a negative one
    from below. ``log_ratio`` and ``advantage`` are ``[B]``.
    """
    low, high = log_bounds(clip_low, clip_high)
    bounded = log_ratio.clamp(max=high).where(advantage > 0, log_ratio.clamp(min=low))
    return -(advantage * bounded.exp())


def clipped_loss(log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """The mean of ``clipped_losses``: scalar."""
    return clipped_losses(log_ratio, advantage, clip_low, clip_high).mean()


def clipped(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Which samples have no gradient because of the lower and the upper bound: two ``bool [B]``."""
    low, high = log_bounds(clip_low, clip_high)
    return (advantage < 0) & (log_ratio <= low), (advantage > 0) & (log_ratio >= high)


def log_bounds(clip_low: float, clip_high: float) -> tuple[float, float]:
    """Of ``log rho``; a ``clip_low`` of 1 leaves it free below."""
    return math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)


def guard_log_ratio(new: Gaussian, old: Gaussian, x_next: Tensor) -> Tensor:
    """GRPO-Guard's RatioNorm (arXiv 2510.22319): ``(log rho + mse / (2 s^2)) s``, ``[B]``.

    Computed in the equal form ``mean_D(eps_old (mean_new - mean_old))`` with
    ``eps_old = (x_next - mean_old) / s``: no cancellation, and zero mean by construction.
    """
    noise = (x_next - old.mean) / old.std
    return mean_over_latent(noise * (new.mean - old.mean))


def diverged(
    log_ratio: Tensor, advantage: Tensor, divergence: Tensor, max_divergence: float
) -> Tensor:
    """Flow-DPPO's mask (arXiv 2606.11025, eq. 18), ``bool [B]``: the samples to leave out.

    Those whose step has diverged from the sampling policy, ``divergence [B] >= max_divergence``,
    and that would be pushed further away: up with a ratio above 1, or down with one below.
    """
    return (divergence >= max_divergence) & (advantage * log_ratio > 0)


def masked_losses(log_ratio: Tensor, advantage: Tensor, masked: Tensor) -> Tensor:
    """``-A rho``, 0 for the samples of ``masked [B]``: ``[B]``; no clipping."""
    return -(advantage * log_ratio.exp()).masked_fill(masked, 0)


def kl_to_reference(
    new: Gaussian,
    reference: Gaussian,
    dt: float,
    form: Literal["time_weighted", "gaussian"] = "time_weighted",
) -> Tensor:
    """KL of one step to the reference policy, ``[B]``.

    ``gaussian`` is the true KL. ``time_weighted`` is that times ``|dt|``: what the authors' code
    computes (it divides by ``g^2`` instead of ``g^2 |dt|``), and what published betas mean.
    """
    kl = new.kl(reference)
    return kl * abs(dt) if form == "time_weighted" else kl
