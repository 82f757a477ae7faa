"""From scores and learner statistics to advantages and to the rows of ``metrics.jsonl``.

Rows hold only what the spec determines, so that a resumed run writes the same bytes; clock times
go to their own rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowgrpo_ray.prompts import IterationPlan
from flowgrpo_ray.spec import FlowGrpo, TrainingSpec
from flowgrpo_ray.types import Float32, MicrobatchStats, StepStats, WeightsTicket, WorkUnit


@dataclass(frozen=True)
class Scores:
    """What one work unit was worth: per reward and in weighted total, ``[b]`` float32.

    NaN means "could not be scored". ``failure`` says why where a reward deployment gave up.
    """

    rewards: Mapping[str, Float32]
    total: Float32
    failure: str | None = None


@dataclass(frozen=True)
class Signal:
    """What the learner makes of one work unit: advantages, and which samples enter the update."""

    advantages: Float32  # [b]
    keep: np.ndarray  # bool [b]


def signals(
    units: Sequence[WorkUnit], scores: Sequence[Scores], objective: FlowGrpo
) -> dict[int, Signal]:
    """Advantages over ``units``, which hold whole groups, by unit index.

    A group with a part that failed is dropped whole; a NaN score leaves its sample out; a group
    without spread has no gradient.
    """
    import torch

    from flowgrpo_ray.objective import group_advantages, has_gradient

    rewards = np.concatenate([score.total for score in scores])
    group = np.concatenate([unit.prompts for unit in units])
    for unit, score in zip(units, scores, strict=True):
        if score.failure:
            rewards[np.isin(group, unit.prompts)] = np.nan
    r, g = torch.from_numpy(rewards), torch.from_numpy(group)
    keep = has_gradient(r, g).numpy()
    advantages = group_advantages(r, g, objective.std, objective.advantage_clamp).numpy()
    ends = np.cumsum([unit.batch for unit in units])[:-1]
    parts = zip(units, np.split(advantages * keep, ends), np.split(keep, ends), strict=True)
    return {unit.index: Signal(advantage, kept) for unit, advantage, kept in parts}


def mean_and_std(values: Sequence[float] | Float32) -> dict[str, float]:
    """Over the valid values, in float64; NaN if there are none."""
    valid = np.asarray(values, np.float64)
    valid = valid[~np.isnan(valid)]
    if not len(valid):
        return {"mean": float("nan"), "std": float("nan")}
    return {"mean": float(valid.mean()), "std": float(valid.std())}


def train_row(
    spec: TrainingSpec,
    plan: IterationPlan,
    ticket: WeightsTicket,
    scores: Sequence[Scores],
    updates: Sequence[tuple[Sequence[MicrobatchStats], StepStats]],
) -> dict[str, Any]:
    """The metrics row of one iteration; ``scores`` in plan order, ``updates`` in theirs."""
    window = plan.schedule.stochastic_steps
    stats = [s for of_update, _ in updates for s in of_update]
    first = [s.log_ratio_max for s in updates[0][0]]
    terms = max(1, sum(s.terms for s in stats))
    mean = sum(s.log_ratio_sum for s in stats) / terms
    square = sum(s.log_ratio_square_sum for s in stats) / terms
    policy_loss = sum(s.policy_loss_sum for s in stats) / terms
    kl = sum(s.kl_sum for s in stats) / terms
    objective = spec.objective
    return {
        "kind": "train",
        "iteration": plan.iteration,
        "images": spec.sampling.images,
        "reward": mean_and_std(np.concatenate([s.total for s in scores])),
        "rewards": {
            name: mean_and_std(np.concatenate([s.rewards[name] for s in scores]))
            for name in spec.rewards
        },
        "groups": count_groups(plan.units, scores),
        "log_ratio": {
            "gate": max(first) if first else None,
            "max_abs": max((s.log_ratio_max for s in stats), default=None),
            "mean": mean,
            "std": max(0.0, square - mean**2) ** 0.5,
        },
        "clip_fraction": {
            "low": sum(s.clipped_low for s in stats) / terms,
            "high": sum(s.clipped_high for s in stats) / terms,
        },
        "policy_loss": policy_loss,
        "kl": kl if objective.kl else None,
        "loss": policy_loss + (objective.kl.beta * kl if objective.kl else 0.0),
        "grad_norm": [step.grad_norm for _, step in updates],
        "updates": sum(step.grad_norm is not None for _, step in updates),
        "learning_rate": updates[-1][1].learning_rate,
        "window": [window.start, window.stop],
        "weights": {"version": ticket.version, "digest": ticket.digest},
    }


def count_groups(units: Sequence[WorkUnit], scores: Sequence[Scores]) -> dict[str, int]:
    """Groups in all, those whose rewards are all equal, and those dropped for failed scores."""
    by_group: dict[int, list[float]] = {}
    failed: set[int] = set()
    for unit, score in zip(units, scores, strict=True):
        for prompt, total in zip(unit.prompts, score.total.tolist(), strict=True):
            by_group.setdefault(prompt, []).append(total)
        if score.failure:
            failed.update(unit.prompts)
    valid = {g: [r for r in rs if r == r] for g, rs in by_group.items() if g not in failed}  # noqa: PLR0124
    dropped = failed | {g for g, rs in valid.items() if len(rs) < 2}
    flat = [g for g, rs in valid.items() if g not in dropped and min(rs) == max(rs)]
    return {"total": len(by_group), "no_spread": len(flat), "dropped": len(dropped)}
