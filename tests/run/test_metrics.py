"""From scores to advantages and metrics rows: what failed is left out, sums are by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from flowgrpo_ray.algorithm.objectives import KlSpec
from flowgrpo_ray.common.types import MicrobatchStats, Schedule, StepStats, WeightsTicket, WorkUnit
from flowgrpo_ray.rewards import weighted_total
from flowgrpo_ray.run.metrics import (
    Scores,
    UnitResult,
    count_groups,
    mean_and_std,
    signals,
    train_row,
)
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.plan import plan_iteration
from flowgrpo_ray.spec.sections import AdvantagesSpec
from flowgrpo_ray.spec.training import TrainingSpec

INF, NAN = float("inf"), float("nan")
SCHEDULE = Schedule("flow_sde", (1.0, 0.5, 0.0), (0.8, 0.0))
PLAIN, PER_REWARD = AdvantagesSpec(), AdvantagesSpec(per_reward=True)
OCR = {"ocr": 1.0}


def unit(index: int, *prompts: int) -> WorkUnit:
    return WorkUnit(0, "train", 1, index, prompts, tuple(range(len(prompts))), SCHEDULE)


def scores(*total: float, lost: bool = False) -> Scores:
    values = np.array(total, np.float32)
    return Scores({"ocr": values}, values, np.full(len(total), lost))


def results(
    units: Sequence[WorkUnit],
    parts: Sequence[Scores],
    spec: AdvantagesSpec = PLAIN,
    weights: Mapping[str, float] = OCR,
) -> list[UnitResult]:
    """All units in one scope."""
    found = signals(units, parts, spec, weights)
    return [UnitResult(u, part, found[u.index]) for u, part in zip(units, parts, strict=True)]


def test_advantages_go_back_to_the_units_that_the_samples_came_from():
    """One group in two units, listed out of index order, and one unit with two groups."""
    units = [unit(5, 7, 7), unit(2, 7, 7), unit(3, 1, 1, 9, 9)]
    found = signals(units, [scores(0, 0), scores(0, 4), scores(1, 3, 2, 2)], PLAIN, OCR)
    low, high = -1 / (math.sqrt(3) + 1e-4), 3 / (math.sqrt(3) + 1e-4)
    assert found[5].advantages.tolist() == pytest.approx([low, low])
    assert found[2].advantages.tolist() == pytest.approx([low, high])
    assert found[3].advantages.tolist() == pytest.approx([-1 / 1.0001, 1 / 1.0001, 0, 0])
    assert found[3].keep.tolist() == [True, True, False, False]  # a flat group has no gradient
    assert found[5].advantages.dtype == np.float32


def test_units_may_straddle_groups():
    """Groups of 3 in units of 2: the unit in the middle holds the end of one and of the next the
    beginning."""
    units = [unit(0, 7, 7), unit(1, 7, 8), unit(2, 8, 8)]
    parts = [scores(0, 0), scores(3, 5), scores(5, 8)]
    found = signals(units, parts, PLAIN, OCR)
    low, high = -1 / (math.sqrt(2) + 1e-4), 2 / (math.sqrt(2) + 1e-4)
    given = [found[i].advantages.tolist() for i in range(3)]
    assert given == [pytest.approx(pair) for pair in ([low, low], [high, low], [low, high])]


def test_a_failed_unit_drops_its_whole_group_and_no_other():
    """Half a group would compare its images with a wrong mean."""
    units = [unit(0, 7, 7), unit(1, 7, 7), unit(2, 8, 8), unit(3, 8, 8)]
    parts = [scores(0, 1), scores(NAN, NAN, lost=True), scores(0, 1), scores(1, 0)]
    found = signals(units, parts, PLAIN, OCR)
    assert not found[0].keep.any()
    assert not found[1].keep.any()
    assert (found[0].advantages == 0).all()
    assert found[2].keep.all()
    assert found[3].keep.all()
    assert found[2].advantages.tolist() == pytest.approx([-0.5 / 0.5001, 0.5 / 0.5001])
    assert parts[0].total.tolist() == [0, 1]  # the scores themselves are kept for the report
    assert count_groups(results(units, parts)) == {"total": 2, "no_spread": 0, "dropped": 1}


@pytest.mark.parametrize(
    ("failing", "kept"), [(0, {8}), (1, set()), (2, {7})], ids=["first", "both", "second"]
)
@pytest.mark.parametrize("spec", [PLAIN, PER_REWARD], ids=["total", "per reward"])
def test_a_failed_unit_drops_every_group_that_it_has_a_part_of(
    failing: int, kept: set[int], spec: AdvantagesSpec
):
    units = [unit(0, 7, 7), unit(1, 7, 8), unit(2, 8, 8)]
    parts = [scores(0, 1), scores(2, 0), scores(1, 2)]
    parts[failing] = scores(NAN, NAN, lost=True)
    found = results(units, parts, spec)
    pairs = [p for r in found for p in zip(r.unit.prompts, r.signal.keep.tolist(), strict=True)]
    assert {prompt for prompt, keep in pairs if keep} == kept
    assert [keep for _, keep in pairs].count(True) == 3 * len(kept)
    assert count_groups(found) == {"total": 2, "no_spread": 0, "dropped": 2 - len(kept)}


def test_a_missing_score_leaves_its_sample_out():
    found = signals([unit(0, 7, 7, 7)], [scores(0, NAN, 1)], PLAIN, OCR)[0]
    assert found.keep.tolist() == [True, False, True]
    assert found.advantages.tolist() == pytest.approx([-0.5 / 0.5001, 0, 0.5 / 0.5001])


def test_std_and_clamp_are_used():
    units, parts = [unit(0, 7, 7), unit(1, 8, 8)], [scores(0, 1), scores(0, 9)]
    spread = np.std([0, 1, 0, 9]) + 1e-4
    found = signals(units, parts, AdvantagesSpec(std="global"), OCR)
    assert found[0].advantages.tolist() == pytest.approx([-0.5 / spread, 0.5 / spread])
    found = signals(units, parts, AdvantagesSpec(clamp=0.5), OCR)
    assert found[1].advantages.tolist() == [-0.5, 0.5]


# --- several rewards

WEIGHTS = {"ocr": 2.0, "colour": 0.5, "watched": 0.0}


def several(ocr: list[float], colour: list[float], watched: list[float]) -> Scores:
    """As the driver makes them."""
    given = {"ocr": ocr, "colour": colour, "watched": watched}
    rewards = {name: np.array(values, np.float32) for name, values in given.items()}
    return Scores(rewards, weighted_total(rewards, WEIGHTS))


def test_each_reward_is_normalised_alone_and_then_weighted():
    """Else the colour, of a hundred times the scale, would be all that counts."""
    units = [unit(0, 7, 7, 8), unit(1, 8)]
    parts = [several([0, 1, 3], [300, 100, 0], [0, 0, 0]), several([1], [0], [9])]
    found = signals(units, parts, PER_REWARD, WEIGHTS)
    one, hundred = 0.5 / 0.5001, 100 / 100.0001  # of each reward, in group 7
    first = -2 * one + 0.5 * hundred
    third = 2 / 1.0001  # group 8 has no spread in colour
    assert found[0].advantages.tolist() == pytest.approx([first, -first, third])
    assert found[1].advantages.tolist() == pytest.approx([-third])
    together = signals(units, parts, PLAIN, WEIGHTS)
    assert together[0].advantages[0] > 0 > found[0].advantages[0]


def test_with_std_global_each_reward_is_divided_by_its_own():
    units = [unit(0, 7, 7), unit(1, 8, 8)]
    parts = [several([0, 1], [0, 10], [0, 0]), several([0, 3], [20, 30], [0, 0])]
    spec = AdvantagesSpec(per_reward=True, std="global")
    ocr, colour = np.std([0, 1, 0, 3]) + 1e-4, np.std([0, 10, 20, 30]) + 1e-4
    found = signals(units, parts, spec, WEIGHTS)
    expected = [2 * 0.5 / ocr + 0.5 * 5 / colour, 2 * 1.5 / ocr + 0.5 * 5 / colour]
    assert found[0].advantages.tolist() == pytest.approx([-expected[0], expected[0]])
    assert found[1].advantages.tolist() == pytest.approx([-expected[1], expected[1]])


@pytest.mark.parametrize("spec", [PLAIN, PER_REWARD], ids=["total", "per reward"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_a_score_that_is_none_matters_only_in_a_trained_reward(spec: AdvantagesSpec, bad: float):
    units = [unit(0, 7, 7, 7), unit(1, 8, 8, 8)]
    watched = [several([0, 1, 2], [0, 0, 0], [0, bad, 0]), several([0, 0, 0], [4, 5, 6], [bad] * 3)]
    clean = [several([0, 1, 2], [0, 0, 0], [0, 0, 0]), several([0, 0, 0], [4, 5, 6], [0] * 3)]
    trained = [several([0, bad, 2], [0, 0, 0], [0] * 3), several([0] * 3, [4, bad, bad], [0] * 3)]
    found, expected = (signals(units, parts, spec, WEIGHTS) for parts in (watched, clean))
    for index in (0, 1):
        assert found[index].advantages.tolist() == expected[index].advantages.tolist()
        assert found[index].keep.all()
    left = results(units, trained, spec, WEIGHTS)
    assert [r.signal.keep.tolist() for r in left] == [[True, False, True], [False] * 3]
    assert left[0].signal.advantages.tolist() == pytest.approx(
        [-2 / 1.0001, 0, 2 / 1.0001] if spec.per_reward else [-2 / 2.0001, 0, 2 / 2.0001]
    )
    assert count_groups(left) == {"total": 2, "no_spread": 0, "dropped": 1}


def test_per_reward_a_group_is_flat_where_every_trained_reward_is():
    """Rewards that cancel in the total have a spread; one that is only watched is none."""
    units = [unit(0, 7, 7), unit(1, 8, 8)]
    parts = [several([0, 1], [4, 0], [0, 0]), several([1, 1], [2, 2], [0, 1])]
    kept = results(units, parts, PER_REWARD, WEIGHTS)
    assert [r.signal.keep.tolist() for r in kept] == [[True, True], [False, False]]
    assert count_groups(kept) == {"total": 2, "no_spread": 1, "dropped": 0}
    assert count_groups(results(units, parts, PLAIN, WEIGHTS))["no_spread"] == 2


def test_count_groups():
    """A spread, a flat, a failed, a group with one valid score, one with none, a flat with NaN."""
    units = [
        unit(0, 1, 1, 2, 2),
        unit(1, 3, 3),
        unit(2, 3, 3),
        unit(3, 4, 4, 5, 5),
        unit(4, 6, 6, 6),
    ]
    parts = [scores(0, 1, 2, 2), scores(0, 1), scores(NAN, NAN, lost=True)]
    parts += [scores(1, NAN, NAN, NAN), scores(3, NAN, 3)]
    assert count_groups(results(units, parts)) == {"total": 6, "no_spread": 2, "dropped": 3}


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
            "objective={kind: flow_grpo, updates: 2, kl: {beta: 0.5}}",
            "rewards={ocr: {weight: 1}, sign_colour: {weight: 0}}",
            *overrides,
        ],
    )


def stats(samples: int, gate_sum=(0, 0), gate_square_sum=(0, 0), **changes: object):
    """Of one micro-batch; sums of the two steps."""
    plain: dict[str, object] = dict.fromkeys(MicrobatchStats.__dataclass_fields__, 0)
    plain |= {"gated": True, "sums": {}} | changes
    plain |= {
        "samples": samples,
        "gate_sum": np.array(gate_sum, float),
        "gate_square_sum": np.array(gate_square_sum, float),
    }
    return MicrobatchStats(**plain)  # type: ignore[arg-type]


UPDATES = [
    (
        [stats(2, gate_max=1e-7, gate_excess=3, policy_loss_sum=2, sums={"kl": 1})],
        StepStats(grad_norm=0.5, learning_rate=1e-4, seconds=1),
    ),
    (
        [
            stats(2, (1, 2), (1, 2), gate_max=2),
            stats(
                4,
                (5, 0),
                (13, 0),
                gate_max=3,
                policy_loss_sum=-10,
                sums={"kl": 7, "clip_fraction.low": 4, "clip_fraction.high": 6},
            ),
        ],
        StepStats(grad_norm=None, learning_rate=2e-4, seconds=1),
    ),
]


def scored(ocr: list[float], colour: list[float]) -> Scores:
    """The colour is only watched."""
    total = np.array(ocr, np.float32)
    return Scores({"ocr": total, "sign_colour": np.array(colour, np.float32)}, total)


SCORES = [scored([0, 1], [1, NAN]), scored([1, 1], [0, 0.5])]


def make_row(
    spec: TrainingSpec,
    updates=UPDATES,
    more: Sequence[UnitResult] = (),
    tie: float | None = None,
) -> dict:
    plan = plan_iteration(spec, 3, 9, (1.0, 0.75, 0.5, 0.25, 0.0))
    given = [*results(plan.units, SCORES, spec.advantages, spec.weights), *more]
    published, behaviour = WeightsTicket(3, "9f"), WeightsTicket(2, "8e")
    return train_row(spec, plan, published, behaviour, given, updates, tie)


def test_train_row_by_hand():
    """Sums over 16 terms, 8 samples of 2 steps, of both updates; the gate is that of the first
    update alone."""
    assert make_row(row_spec()) == {
        "kind": "train",
        "iteration": 3,
        "images": 4,
        "reward": {"mean": 0.75, "std": math.sqrt(3) / 4},
        "unscored": {"ocr": 0, "sign_colour": 1},
        "rewards": {
            "ocr": {"mean": 0.75, "std": math.sqrt(3) / 4},
            "sign_colour": {"mean": 0.5, "std": pytest.approx(math.sqrt(1 / 6))},
        },
        "groups": {"total": 2, "no_spread": 1, "dropped": 0, "refilled": 0},
        "log_ratio": {
            "gate": 1e-7,
            "excess": 3,
            "max_abs": 3,
            "mean": 0.5,
            "std": math.sqrt(1 - 0.25),
            "per_step": {
                "step": [1, 2],
                "mean": [0.75, 0.25],
                "std": [math.sqrt(14 / 8 - 0.75**2), math.sqrt(2 / 8 - 0.25**2)],
            },
        },
        "clip_fraction": {"low": 0.25, "high": 0.375},
        "policy_loss": -0.5,
        "kl": 0.5,
        "loss": -0.5 + 0.5 * 0.5,
        "grad_norm": [0.5, None],
        "updates": 1,
        "learning_rate": 2e-4,
        "window": [1, 3],
        "weights": {"version": 2, "digest": "8e"},
        "staleness": 1,
    }


def test_the_loss_of_a_row_has_the_weight_that_the_tie_had():
    spec = row_spec("objective.kl.adapt={reward: sign_colour}")
    assert make_row(spec)["loss"] == -0.5 + 0.5 * 0.5
    assert make_row(spec, tie=4.0)["loss"] == -0.5 + 4 * 0.5


def test_train_row_without_kl():
    row = make_row(row_spec("objective={kind: flow_grpo, updates: 2}"))
    assert row["kl"] is None
    assert row["loss"] == row["policy_loss"] == -0.5
    assert KlSpec(beta=0.5).form == "time_weighted"


def test_train_row_of_an_iteration_without_any_gradient():
    """All groups flat or dropped: no micro-batch was replayed; the row is written all the same."""
    nothing = [([], StepStats(grad_norm=None, learning_rate=1e-4, seconds=0))] * 2
    row = make_row(row_spec(), nothing)
    nothing_moved = {"step": [1, 2], "mean": [0, 0], "std": [0, 0]}
    assert row["log_ratio"] == {
        "gate": None,
        "excess": 0,
        "max_abs": None,
        "mean": 0,
        "std": 0,
        "per_step": nothing_moved,
    }
    assert row["updates"] == 0
    assert row["policy_loss"] == row["loss"] == 0
    json.dumps(row, allow_nan=False)


def test_refilled_groups_count_in_the_row():
    """Their images too were sampled and scored."""
    row = make_row(row_spec(), more=results([unit(2, 9, 9)], [scored([4, 6], [0, 0])]))
    assert row["groups"] == {"total": 3, "no_spread": 1, "dropped": 0, "refilled": 1}
    assert row["images"] == 6
    assert row["reward"]["mean"] == pytest.approx(13 / 6)


def test_the_loss_scale_is_told_where_there_is_one():
    """An update whose gradients overflowed is none."""
    steps = [
        StepStats(grad_norm=None, learning_rate=1e-4, seconds=0, overflow=True, loss_scale=1024),
        StepStats(grad_norm=0.5, learning_rate=1e-4, seconds=0, loss_scale=512),
    ]
    updates = [([stats(1)], step) for step in steps]
    row = make_row(row_spec("model.dtype=float16"), updates)
    assert row["loss_scale"] == {"last": 512, "overflows": 1}
    assert row["updates"] == 1
    for dtype in ("float32", "bfloat16"):
        assert "loss_scale" not in make_row(row_spec(f"model.dtype={dtype}"), updates)
