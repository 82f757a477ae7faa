"""From scores and learner statistics to advantages and to the rows of ``metrics.jsonl``.

Rows hold only what the spec determines, so that a resumed run writes the same bytes; clock times
go to their own rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowgrpo_ray.algorithm.advantages import has_gradient, reward_wise_advantages
from flowgrpo_ray.algorithm.objectives import Objective
from flowgrpo_ray.common.types import (
    Bools,
    Float32,
    MicrobatchStats,
    StepStats,
    WeightsTicket,
    WorkUnit,
)
from flowgrpo_ray.run.tracking import PER_PROMPT, of_sets
from flowgrpo_ray.spec.plan import IterationPlan
from flowgrpo_ray.spec.prompts import Prompt
from flowgrpo_ray.spec.sections import AdvantagesSpec
from flowgrpo_ray.spec.training import TrainingSpec


@dataclass(frozen=True)
class Scores:
    """What one work unit was worth: per reward and in weighted total, ``[b]`` float32.

    NaN means "could not be scored", or, where ``asked`` (``[b]`` by reward; all, if it is not
    there) is False, that the reward does not score such images. ``lost`` are those of which a
    deployment whose reward enters the total gave up; ``failures`` tells why, by reward, those
    included that are only watched.
    """

    rewards: Mapping[str, Float32]
    total: Float32
    lost: Bools | None = None  # [b]
    failures: Mapping[str, str] = field(default_factory=dict)
    asked: Mapping[str, Bools] = field(default_factory=dict)

    def was_asked(self, reward: str) -> Bools:
        """Which images ``reward`` was to score, ``[b]``."""
        return self.asked.get(reward, np.ones(len(self.total), bool))


@dataclass(frozen=True)
class Signal:
    """What the learner makes of one work unit: advantages, and which samples enter the update."""

    advantages: Float32  # [b]
    keep: np.ndarray  # bool [b]


def signals(
    units: Sequence[WorkUnit],
    scores: Sequence[Scores],
    spec: AdvantagesSpec,
    weights: Mapping[str, float],
) -> dict[int, Signal]:
    """Advantages over ``units``, which hold whole groups, by unit index.

    ``weights`` are those of the rewards. A group with a part that failed is dropped whole; a NaN
    score leaves its sample out; a group without spread has no gradient. Images are compared with
    those that the same rewards score.
    """
    group = np.concatenate([unit.prompts for unit in units])
    total = np.concatenate([score.total for score in scores])
    for unit, score in zip(units, scores, strict=True):
        if score.lost is not None:
            total[np.isin(group, np.array(unit.prompts)[score.lost])] = np.nan
    trained = [name for name, weight in weights.items() if weight]
    asked = np.stack([np.concatenate([s.was_asked(name) for s in scores]) for name in trained])
    keep, advantages = np.zeros(len(group), bool), np.zeros(len(group), np.float32)
    for pattern in np.unique(asked, axis=1).T:
        alike = (asked == pattern[:, None]).all(0)
        rewards, weighting = total[None, alike], np.ones(1, np.float32)
        if spec.per_reward:
            names = [name for name, scores_it in zip(trained, pattern, strict=True) if scores_it]
            weighting = np.array([weights[name] for name in names], np.float32)
            each = [np.concatenate([s.rewards[name] for s in scores])[alike] for name in names]
            rewards = np.where(np.isnan(rewards), np.nan, np.stack(each))
        of = group[alike]
        keep[alike] = has_gradient(rewards, of)
        advantages[alike] = reward_wise_advantages(rewards, weighting, of, spec.std, spec.clamp)
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


def unscored(scores: Sequence[Scores]) -> dict[str, int]:
    """Images without the score that they should have, by reward."""
    return {
        name: sum(int((np.isnan(s.rewards[name]) & s.was_asked(name)).sum()) for s in scores)
        for name in scores[0].rewards
    }


def by_set(
    rewards: Mapping[str, Float32], sets: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and spread of the rewards, ``[n]`` each, of every prompt set that they score; ``sets``
    names that of each image."""
    of_image = np.array(sets)
    return {
        name: {
            reward: summary
            for reward, values in rewards.items()
            if not math.isnan((summary := mean_and_std(values[of_image == name]))["mean"])
        }
        for name in dict.fromkeys(sets)
    }


def means_by_set(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Means of an evaluation for each prompt set, of rewards that score several."""
    return {name: round(values["mean"], 6) for name, values in of_sets(row).items()}


@dataclass(frozen=True)
class UnitResult:
    """One work unit of an iteration, sampled, scored and compared with its group."""

    unit: WorkUnit
    scores: Scores
    signal: Signal


def train_row(
    spec: TrainingSpec,
    plan: IterationPlan,
    published: WeightsTicket,
    behaviour: WeightsTicket,
    results: Sequence[UnitResult],
    updates: Sequence[tuple[Sequence[MicrobatchStats], StepStats]],
    tie: float | None = None,
) -> dict[str, Any]:
    """The metrics row of one iteration; ``results`` in plan order, ``updates`` in theirs.

    ``published`` are the weights that it began to update, ``behaviour`` those it was sampled with;
    ``tie`` is the weight of the tie to the untrained model, where it is not that of the spec.
    """
    window, points = plan.schedule.stochastic_steps, plan.points
    stats = [s for of_update, _ in updates for s in of_update]
    steps = [step for _, step in updates]
    first = [s.gate_max for s in updates[0][0] if s.gated]
    groups = count_groups(results)
    objective = spec.objective if tie is None else spec.objective.tied(tie)
    row = {
        "kind": "train",
        "iteration": plan.iteration,
        "images": sum(result.unit.batch for result in results),
        "reward": mean_and_std(np.concatenate([r.scores.total for r in results])),
        "rewards": {
            name: mean_and_std(np.concatenate([r.scores.rewards[name] for r in results]))
            for name in spec.rewards
        },
        "unscored": unscored([r.scores for r in results]),
        "groups": groups | {"refilled": groups["total"] - spec.sampling.groups},
        spec.objective.gate.name: {
            "gate": max(first) if first else None,
            "excess": sum(s.gate_excess for s in stats),
            "max_abs": max((s.gate_max for s in stats), default=None),
            **gate_moments(points, stats),
        },
        **losses(objective, len(points), stats),
        "grad_norm": [step.grad_norm for step in steps],
        "updates": sum(step.grad_norm is not None for step in steps),
        "learning_rate": steps[-1].learning_rate,
        "window": [window.start, window.stop] if window else None,
        "weights": {"version": behaviour.version, "digest": behaviour.digest},
        "staleness": published.version - behaviour.version,
    }
    if spec.model.dtype == "float16":
        overflows = sum(step.overflow for step in steps)
        row["loss_scale"] = {"last": steps[-1].loss_scale, "overflows": overflows}
    return row


def eval_row(
    spec: TrainingSpec, iteration: int, scores: Sequence[Scores], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """The metrics row of an evaluation after ``iteration`` iterations; ``scores`` in the order of
    the held-out ``prompts``."""
    rewards = {
        name: np.concatenate([s.rewards[name] for s in scores])
        for name in spec.rewards
        if any(s.was_asked(name).any() for s in scores)
    }
    total = np.concatenate([s.total for s in scores])
    row = {
        "kind": "eval",
        "iteration": iteration,
        "reward": mean_and_std(total),
        "rewards": {name: mean_and_std(values) for name, values in rewards.items()},
        "unscored": unscored(scores),
        "prompts": len(total),
        "weights": "ema" if spec.ema else "last",
    }
    if prompts[0].set:
        row["sets"] = by_set(rewards, [prompt.set for prompt in prompts])
    if watched := [name for name in rewards if spec.weights[name] == 0]:
        of_watched = {name: _short(rewards[name]) for name in watched}
        row[PER_PROMPT] = {"total": _short(total), "rewards": of_watched}
    return row


def _short(values: Float32) -> list[float]:
    """Six digits of each, which is about what a float32 holds."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def losses(objective: Objective, points: int, stats: Sequence[MicrobatchStats]) -> dict[str, Any]:
    """The loss, its parts and the objective's other statistics: means over samples and points.

    A penalty that is not part of the loss is ``None``.
    """
    terms = max(1, sum(s.samples for s in stats) * points)
    mean = {
        path: sum(s.sums.get(path, 0.0) for s in stats) / terms
        for statistic in objective.statistics
        for path in statistic.paths
    }
    policy_loss = sum(s.policy_loss_sum for s in stats) / terms
    weighted = sum(weight * mean[name] for name, weight in objective.penalties.items())
    row: dict[str, Any] = {"policy_loss": policy_loss, "loss": policy_loss + weighted}
    for statistic in objective.statistics:
        name = statistic.name
        if statistic.parts:
            row[name] = {part: mean[f"{name}.{part}"] for part in statistic.parts}
        else:
            absent = statistic.penalty and name not in objective.penalties
            row[name] = None if absent else mean[name]
    return row


def gate_moments(points: Sequence[int], stats: Sequence[MicrobatchStats]) -> dict[str, Any]:
    """Mean and spread of the gate's quantity over samples: of all points, and of each."""
    samples = max(1, sum(s.samples for s in stats))
    zero = np.zeros(len(points))
    mean = sum((s.gate_sum for s in stats), zero) / samples
    square = sum((s.gate_square_sum for s in stats), zero) / samples
    std = np.sqrt(np.maximum(0, square - mean**2))
    return {
        "mean": float(mean.mean()),
        "std": float(np.sqrt(max(0.0, square.mean() - mean.mean() ** 2))),
        "per_step": {"step": list(points), "mean": mean.tolist(), "std": std.tolist()},
    }


def count_groups(results: Sequence[UnitResult]) -> dict[str, int]:
    """Groups in all, those without spread, and those dropped for want of two valid scores."""
    found = list(_sorted_groups(results).values())
    return {"total": len(found)} | {kind: found.count(kind) for kind in ("no_spread", "dropped")}


def flat_groups(results: Sequence[UnitResult]) -> list[int]:
    """The prompts of the groups without spread, in plan order."""
    return [group for group, found in _sorted_groups(results).items() if found == "no_spread"]


def _sorted_groups(results: Sequence[UnitResult]) -> dict[int, str]:
    """Of each group, by its prompt, whether it is kept, has no spread or is dropped."""
    valid: dict[int, int] = {}
    kept: set[int] = set()
    failed: set[int] = set()
    for result in results:
        unit = result.unit
        for prompt, total, keep in zip(
            unit.prompts, result.scores.total.tolist(), result.signal.keep.tolist(), strict=True
        ):
            valid[prompt] = valid.get(prompt, 0) + (not math.isnan(total))
            if keep:
                kept.add(prompt)
        if result.scores.lost is not None:
            failed.update(np.array(unit.prompts)[result.scores.lost].tolist())
    dropped = {group for group, count in valid.items() if group in failed or count < 2}
    flat = valid.keys() - kept - dropped
    kinds = dict.fromkeys(dropped, "dropped") | dict.fromkeys(flat, "no_spread")
    return {group: kinds.get(group, "kept") for group in valid}
