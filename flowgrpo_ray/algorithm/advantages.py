"""Advantages of scored images: in NumPy, so that the driver, which computes them, needs no torch.

Shapes: ``B`` samples, ``R`` rewards. All sums are float64.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ADVANTAGE_EPS = 1e-4  # added to the standard deviation; the authors' value


def group_advantages(
    rewards: Array,
    group: Array,
    std: Literal["group", "global"] = "group",
    clamp: float = 5.0,
) -> Array:
    """``A = (r - mean_group) / (std + 1e-4)``, clamped: ``[B] -> [B]`` (arXiv 2505.05470, eq. 5).

    ``group [B]`` holds any integer per group of images of one prompt. The standard deviation is
    the population's (ddof 0), of the sample's own group or of all rewards. A NaN reward leaves its
    sample out: it enters no mean and no deviation, and its advantage is 0. In a group whose
    rewards are all equal every advantage is exactly 0.
    """
    return reward_wise_advantages(rewards[None], np.ones(1), group, std, clamp)


def reward_wise_advantages(
    rewards: Array,
    weights: Array,
    group: Array,
    std: Literal["group", "global"] = "group",
    clamp: float = 5.0,
) -> Array:
    """``A = sum_k w_k (r_k - mean_group) / (std_k + 1e-4)``, clamped: ``[R, B] -> [B]``.

    Each of the ``R`` rewards is normalised alone before they are weighted, so that none drowns
    another by its scale (GDPO, arXiv 2601.05242, without its second normalisation over the batch).
    A sample that one reward could not score is left out of all.
    """
    valid = np.asarray(~np.isnan(rewards).any(0))
    each = np.stack([_normalised(reward, valid, group, std) for reward in rewards])
    return (weights @ each).clip(-clamp, clamp).astype(rewards.dtype)


def _normalised(rewards: Array, valid: Array, group: Array, std: str) -> Array:
    """Centred in its group and divided by the spread; float64; 0 where not ``valid``."""
    if std not in ("group", "global"):
        raise ValueError(f"std must be 'group' or 'global', not {std!r}")
    r = rewards.astype(np.float64)
    centred, spread = np.zeros_like(r), np.ones_like(r)
    for g in np.unique(group[valid]):
        of_group = valid & (group == g)
        members = r[of_group]
        if members.max() == members.min():
            continue
        centred[of_group] = members - members.mean()
        spread[of_group] = members.std()
    if std == "global" and valid.any():
        spread[:] = r[valid].std()
    return centred / (spread + ADVANTAGE_EPS)


def has_gradient(rewards: Array, group: Array) -> Array:
    """Which samples enter the update, ``bool [B]``: a valid reward in a group with spread.

    With several rewards, ``[R, B]``, all must be valid, and one must have spread.
    """
    rewards = rewards.reshape(-1, len(group))
    valid = np.asarray(~np.isnan(rewards).any(0))
    keep = np.zeros_like(valid)
    for g in np.unique(group[valid]):
        of_group = valid & (group == g)
        members = rewards[:, of_group]
        keep |= of_group & (members.max(1) > members.min(1)).any()
    return keep
