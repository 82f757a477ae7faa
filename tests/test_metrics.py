"""From scores to advantages and metrics rows: what failed is left out, sums are by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from flowgrpo_ray.learner import MicrobatchStats, StepStats
from flowgrpo_ray.metrics import Scores, count_groups, mean_and_std, signals, train_row
from flowgrpo_ray.prompts import plan_iteration
from flowgrpo_ray.spec import FlowGrpo, KlSpec, TrainingSpec
from flowgrpo_ray.spec_file import load_spec
from flowgrpo_ray.types import Schedule, WeightsTicket, WorkUnit

NAN = float("nan")
SCHEDULE = Schedule("flow_sde", (1.0, 0.5, 0.0), (0.8, 0.0))


def unit(index: int, *prompts: int) -> WorkUnit:
    return WorkUnit(0, "train", 1, index, prompts, tuple(range(len(prompts))), SCHEDULE)


def scores(*total: float, failure: str | None = None) -> Scores:
    values = np.array(total, np.float32)
    return Scores({"ocr": values}, values, failure)


def test_advantages_go_back_to_the_units_that_the_samples_came_from():
    """One group in two units, listed out of index order, and one unit with two groups."""
    units = [unit(5, 7, 7), unit(2, 7, 7), unit(3, 1, 1, 9, 9)]
    found = signals(units, [scores(0, 0), scores(0, 4), scores(1, 3, 2, 2)], FlowGrpo())
    low, high = -1 / (math.sqrt(3) + 1e-4), 3 / (math.sqrt(3) + 1e-4)
    assert found[5].advantages.tolist() == pytest.approx([low, low])
    assert found[2].advantages.tolist() == pytest.approx([low, high])
    assert found[3].advantages.tolist() == pytest.approx([-1 / 1.0001, 1 / 1.0001, 0, 0])
    assert found[3].keep.tolist() == [True, True, False, False]  # a flat group has no gradient
    assert found[5].advantages.dtype == np.float32


def test_a_failed_unit_drops_its_whole_group_and_no_other():
    """Half a group would compare its images with a wrong mean."""
    units = [unit(0, 7, 7), unit(1, 7, 7), unit(2, 8, 8), unit(3, 8, 8)]
    parts = [scores(0, 1), scores(NAN, NAN, failure="gone"), scores(0, 1), scores(1, 0)]
    found = signals(units, parts, FlowGrpo())
    assert not found[0].keep.any()
    assert not found[1].keep.any()
    assert (found[0].advantages == 0).all()
    assert found[2].keep.all()
    assert found[3].keep.all()
    assert found[2].advantages.tolist() == pytest.approx([-0.5 / 0.5001, 0.5 / 0.5001])
    assert parts[0].total.tolist() == [0, 1]  # the scores themselves are kept for the report
    assert count_groups(units, parts) == {"total": 2, "no_spread": 0, "dropped": 1}


def test_a_missing_score_leaves_its_sample_out():
    found = signals([unit(0, 7, 7, 7)], [scores(0, NAN, 1)], FlowGrpo())[0]
    assert found.keep.tolist() == [True, False, True]
    assert found.advantages.tolist() == pytest.approx([-0.5 / 0.5001, 0, 0.5 / 0.5001])


def test_the_objectives_std_and_clamp_are_used():
    units, parts = [unit(0, 7, 7), unit(1, 8, 8)], [scores(0, 1), scores(0, 9)]
    spread = np.std([0, 1, 0, 9]) + 1e-4
    found = signals(units, parts, FlowGrpo(std="global"))
    assert found[0].advantages.tolist() == pytest.approx([-0.5 / spread, 0.5 / spread])
    found = signals(units, parts, FlowGrpo(advantage_clamp=0.5))
    assert found[1].advantages.tolist() == [-0.5, 0.5]


def test_count_groups():
    """A spread, a flat, a failed, a group with one valid score, one with none, a flat with NaN."""
    units = [
        unit(0, 1, 1, 2, 2),
        unit(1, 3, 3),
        unit(2, 3, 3),
        unit(3, 4, 4, 5, 5),
        unit(4, 6, 6, 6),
    ]
    parts = [scores(0, 1, 2, 2), scores(0, 1), scores(NAN, NAN, failure="gone")]
    parts += [scores(1, NAN, NAN, NAN), scores(3, NAN, 3)]
    assert count_groups(units, parts) == {"total": 6, "no_spread": 2, "dropped": 3}


def test_mean_and_std():
    """Over the valid values, population std, in float64 (1e8 + 1 does not fit float32)."""
    assert mean_and_std([1, NAN, 3]) == {"mean": 2, "std": 1}
    found = mean_and_std(np.array([1e8] * 999 + [1e8 + 64], np.float32))
    assert found["mean"] == pytest.approx(1e8 + 0.064, rel=1e-12)
    assert all(math.isnan(value) for value in mean_and_std([NAN]).values())
    assert all(math.isnan(value) for value in mean_and_std([]).values())


# --- the row of an iteration


def row_spec(*overrides: str) -> TrainingSpec:
    return load_spec(
        "tiny-ocr",
        [
            "sampling={size: [32, 48], steps: 4, eta: 0.8, group_size: 2, groups: 2, "
            "micro_batch: 2, window: {kind: random, length: 2, within: [1, 3]}}",
            "objective={updates: 2, kl: {beta: 0.5}}",
            "rewards={ocr: {weight: 1}, sign_colour: {weight: 0}}",
            *overrides,
        ],
    )


def stats(**changes: float) -> MicrobatchStats:
    plain = dict.fromkeys(MicrobatchStats.__dataclass_fields__, 0)
    return MicrobatchStats(**(plain | {"terms": 4} | changes))  # type: ignore[arg-type]


UPDATES = [
    (
        [stats(log_ratio_max=1e-7, policy_loss_sum=2, kl_sum=1)],
        StepStats(grad_norm=0.5, learning_rate=1e-4, seconds=1),
    ),
    (
        [
            stats(
                terms=12,
                log_ratio_sum=8,
                log_ratio_square_sum=16,
                log_ratio_max=3,
                clipped_low=4,
                clipped_high=6,
                policy_loss_sum=-10,
                kl_sum=7,
            )
        ],
        StepStats(grad_norm=None, learning_rate=2e-4, seconds=1),
    ),
]
SCORES = [
    Scores({"ocr": np.float32([0, 1]), "sign_colour": np.float32([1, NAN])}, np.float32([0, 1])),
    Scores({"ocr": np.float32([1, 1]), "sign_colour": np.float32([0, 0.5])}, np.float32([1, 1])),
]


def make_row(spec: TrainingSpec, updates=UPDATES) -> dict:
    plan = plan_iteration(spec, 3, 9, (1.0, 0.75, 0.5, 0.25, 0.0))
    return train_row(spec, plan, WeightsTicket(3, "9f"), SCORES, updates)


def test_train_row_by_hand():
    """Sums over 16 terms of both updates; the gate is that of the first update alone."""
    assert make_row(row_spec()) == {
        "kind": "train",
        "iteration": 3,
        "images": 4,
        "reward": {"mean": 0.75, "std": math.sqrt(3) / 4},
        "rewards": {
            "ocr": {"mean": 0.75, "std": math.sqrt(3) / 4},
            "sign_colour": {"mean": 0.5, "std": pytest.approx(math.sqrt(1 / 6))},
        },
        "groups": {"total": 2, "no_spread": 1, "dropped": 0},
        "log_ratio": {"gate": 1e-7, "max_abs": 3, "mean": 0.5, "std": math.sqrt(1 - 0.25)},
        "clip_fraction": {"low": 0.25, "high": 0.375},
        "policy_loss": -0.5,
        "kl": 0.5,
        "loss": -0.5 + 0.5 * 0.5,
        "grad_norm": [0.5, None],
        "updates": 1,
        "learning_rate": 2e-4,
        "window": [1, 3],
        "weights": {"version": 3, "digest": "9f"},
    }


def test_train_row_without_kl():
    row = make_row(row_spec("objective={updates: 2}"))
    assert row["kl"] is None
    assert row["loss"] == row["policy_loss"] == -0.5
    assert KlSpec(beta=0.5).form == "time_weighted"


def test_train_row_of_an_iteration_without_any_gradient():
    """All groups flat or dropped: no micro-batch was replayed; the row is written all the same."""
    nothing = [([], StepStats(grad_norm=None, learning_rate=1e-4, seconds=0))] * 2
    row = make_row(row_spec(), nothing)
    assert row["log_ratio"] == {"gate": None, "max_abs": None, "mean": 0, "std": 0}
    assert row["updates"] == 0
    assert row["policy_loss"] == row["loss"] == 0
    json.dumps(row, allow_nan=False)
