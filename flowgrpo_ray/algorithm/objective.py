"""The GRPO objective on one micro-batch: advantages, importance ratios, clipping, KL.

Shapes: ``B`` samples. Everything works on the log-ratio: clip ranges go down to 2e-6, where
``rho - 1`` has only a few float32 units left.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from flowgrpo_ray.algorithm.flow import Gaussian, mean_over_latent

ADVANTAGE_EPS = 1e-4  # added to the standard deviation; the authors' value


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    std: Literal["group", "global"] = "group",
    clamp: float = 5.0,
) -> Tensor:
    """``A = (r - mean_group) / (std + 1e-4)``, clamped: ``[B] -> [B]`` (arXiv 2505.05470, eq. 5).

    ``group [B]`` holds any integer per group of images of one prompt. The standard deviation is
    the population's (ddof 0), of the sample's own group or of all rewards. A NaN reward leaves its
    sample out: it enters no mean and no deviation, and its advantage is 0. In a group whose
    rewards are all equal every advantage is exactly 0.
    """
    return _normalised(rewards, group, std).clamp(-clamp, clamp).to(rewards.dtype)


def reward_wise_advantages(
    rewards: Tensor,
    weights: Tensor,
    group: Tensor,
    std: Literal["group", "global"] = "group",
    clamp: float = 5.0,
) -> Tensor:
    """``A = sum_k w_k (r_k - mean_group) / (std_k + 1e-4)``, clamped: ``[R, B] -> [B]``.

    Each of the ``R`` rewards is normalised alone before they are weighted, so that none drowns
    another by its scale (GDPO, arXiv 2601.05242, without its second normalisation over the batch).
    A sample that one reward could not score is left out of all.
    """
    rewards = torch.where(rewards.isnan().any(0), torch.nan, rewards)
    each = torch.stack([_normalised(reward, group, std) for reward in rewards])
    return (weights.double() @ each).clamp(-clamp, clamp).to(rewards.dtype)


def _normalised(rewards: Tensor, group: Tensor, std: str) -> Tensor:
    """Centred in its group and divided by the spread; float64."""
    if std not in ("group", "global"):
        raise ValueError(f"std must be 'group' or 'global', not {std!r}")
    valid = ~rewards.isnan()
    r = rewards.double()
    centred, spread = torch.zeros_like(r), torch.ones_like(r)
    for g in _groups(group[valid]):
        of_group = valid & (group == g)
        members = r[of_group]
        if members.max() == members.min():
            continue
        centred[of_group] = members - members.mean()
        spread[of_group] = members.std(correction=0)
    if std == "global" and bool(valid.any()):
        spread[:] = r[valid].std(correction=0)
    return centred / (spread + ADVANTAGE_EPS)


def _groups(group: Tensor) -> list[int]:
    return sorted({int(g) for g in group})


def has_gradient(rewards: Tensor, group: Tensor) -> Tensor:
    """Which samples enter the update, ``bool [B]``: a valid reward in a group with spread.

    With several rewards, ``[R, B]``, all must be valid, and one must have spread.
    """
    rewards = rewards.reshape(-1, len(group))
    valid = ~rewards.isnan().any(0)
    keep = torch.zeros_like(valid)
    for g in _groups(group[valid]):
        of_group = valid & (group == g)
        members = rewards[:, of_group]
        keep |= of_group & (members.amax(1) > members.amin(1)).any()
    return keep


def clipped_loss(log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """``mean max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))``: scalar.

    Written on the log-ratio: a positive advantage is only ever clipped from above, a negative one
    from below. ``log_ratio`` and ``advantage`` are ``[B]``.
    """
    bounded = torch.where(
        advantage > 0,
        log_ratio.clamp(max=math.log1p(clip_high)),
        log_ratio.clamp(min=math.log1p(-clip_low)),
    )
    return -(advantage * bounded.exp()).mean()


def clipped(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Which samples have no gradient because of the lower and the upper bound: two ``bool [B]``."""
    low = (advantage < 0) & (log_ratio <= math.log1p(-clip_low))
    high = (advantage > 0) & (log_ratio >= math.log1p(clip_high))
    return low, high


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


def masked_loss(log_ratio: Tensor, advantage: Tensor, masked: Tensor) -> Tensor:
    """``mean -A rho`` over samples, 0 for those of ``masked [B]``: scalar; no clipping."""
    return -(advantage * log_ratio.exp()).masked_fill(masked, 0).mean()


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
