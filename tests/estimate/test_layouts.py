"""Who waits for whom: by hand for few units, and the shares that published recipes come to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_runs import LORA, small_spec

from flowgrpo_ray.algorithm.parallel import asked_for
from flowgrpo_ray.estimate.gpus import gpus
from flowgrpo_ray.estimate.layouts import (
    Layout,
    Work,
    best_split,
    busy_colocated,
    busy_separate,
    compare,
    reason,
    recommended,
)
from flowgrpo_ray.spec.training import TrainingSpec

GIB = 2**30
FOUR = Work(sampling=3, training=2, units=4, block=1, updates=2)


@pytest.mark.parametrize(
    ("change", "split", "seconds"),
    [
        ({}, (1, 1), 3 * 4 + 2),  # a unit is trained while the next is sampled
        ({"std": "global"}, (1, 1), 12 + 8),
        ({"lag": 1}, (1, 1), 12),  # the slower side
        ({"lag": 1, "std": "global"}, (4, 1), 8),
        ({}, (2, 1), 3 + 4 * 2),  # two at 3, two at 6; the learner is busy from 3 on
        ({}, (4, 2), 3 + 2 * 2),  # a round of each update
        ({"block": 2}, (1, 1), 6 + 6 + 4),  # the second block is whole at 12
        ({"epochs": 2}, (4, 1), 3 + 8 + 8),
        ({"updates": 1}, (4, 4), 3 + 2),
        ({"units": 8}, (1, 4), 8 * 3 + 2),
        ({"units": 8}, (8, 3), 3 + 4 * 2),  # 4 units an update: 2 rounds on 3 ranks
    ],
)
def test_separate_sides_by_hand(change: dict[str, Any], split: tuple[int, int], seconds: float):
    work = replace(FOUR, **change)
    assert busy_separate(work, *split) == pytest.approx(work.all / (sum(split) * seconds))


def test_workers_that_do_both_wait_only_where_units_cannot_be_shared_out():
    assert [busy_colocated(FOUR, n) for n in (1, 2)] == [1, 1]
    assert busy_colocated(FOUR, 3) == pytest.approx(20 / (3 * (2 * 3 + 2 * 2)))
    assert busy_colocated(FOUR, 4) == pytest.approx(20 / (4 * (3 + 2 * 2)))


# TFLOPs of sampling and of training in an iteration, of docs/gpu-split.md; 128 units in blocks of 8
RECIPES = {"sd35-ocr": (110_945, 112_677), "fast": (31_331, 18_779), "guard": (59_764, 112_677)}
SHARES = [  # in %: of the best split of so many GPUs
    ("sd35-ocr", {"std": "global"}, {2: 50, 8: 50, 32: 50, 64: 50}),
    ("sd35-ocr", {}, {2: 93, 16: 93, 32: 88, 64: 80}),
    ("sd35-ocr", {"std": "global", "lag": 1}, {2: 99, 32: 99, 64: 99}),
    ("fast", {"std": "global"}, {2: 50, 32: 50, 64: 50}),
    ("fast", {}, {2: 77, 16: 77, 64: 70}),
    ("fast", {"std": "global", "lag": 1}, {2: 80, 32: 80, 64: 80}),
    ("guard", {}, {8: 74, 28: 77, 64: 68}),
    ("guard", {"lag": 1}, {8: 77, 28: 87, 64: 77}),
]


@pytest.mark.parametrize(("recipe", "change", "expected"), SHARES)
def test_shares_of_time_that_is_not_lost(
    recipe: str, change: dict[str, Any], expected: dict[int, int]
):
    sampling, training = (flops / 128 for flops in RECIPES[recipe])
    work = replace(Work(sampling, training, units=128, block=8, updates=2), **change)
    assert {n: round(100 * best_split(work, n)[2]) for n in expected} == expected
    assert {busy_colocated(work, n) for n in (1, 2, 8, 32, 64)} == {1}


# --- of a spec


def stages(spec: TrainingSpec) -> dict[str, Any]:
    """10 GiB for either part, 15 for both; what is sharded is an Nth, and 1 GiB gathered."""
    part = 1 / asked_for(spec, spec.ranks.count).shards
    size = {"workers": 15 * part, "learner": 10 * part, "rollout": 10}
    return {s: {"training": {"weights": int(size[s] * GIB)}} for s in spec.actors}


def layouts(*overrides: str, rewards: dict[str, Any] | None = None) -> list[Layout]:
    spec = small_spec(LORA, "sampling.groups=8", "objective.updates=1", *overrides)
    sizes = rewards or {name: {} for name in spec.rewards}
    return compare(spec, (8, 8), stages, sizes)


SEPARATE = "cluster={rollout: {count: 2, gpus: 1}, learner: {count: 2, gpus: 1}}"


def test_a_gpu_is_counted_with_what_the_cluster_puts_there():
    """Two ranks leave room for a rollout worker each; the other two meet on a third GPU."""
    small = "cluster={rollout: {count: 4, gpus: 0.25}, learner: {count: 2, gpus: 0.51}}"
    spec = small_spec(LORA, "sampling.groups=8", "objective.updates=1", small)
    fullest = gpus(spec, stages(spec), {name: {} for name in spec.rewards})
    assert [(gpu.name, round(gpu.room, 2)) for gpu in fullest] == [
        ("rollout worker + learner rank", 0.24),
        ("2 rollout workers", 0.5),
    ]


def test_layouts_of_as_many_gpus():
    assert layouts() == []
    found = {(row.layout, row.parallel): row for row in layouts(SEPARATE)}
    assert len(found) == 4
    separate, colocated = found["separate", "replicate"], found["colocated", "replicate"]
    assert (separate.counts, separate.needs) == ((2, 2), (10 * GIB, 10 * GIB))
    assert separate.busy == pytest.approx(8 * 2 / (4 * 5)), "four rounds, the learner one behind"
    assert (colocated.counts, colocated.busy, colocated.needs) == ((4,), 1, (15 * GIB,))
    assert found["separate", "shard"].needs == (10 * GIB, 5 * GIB)
    assert found["colocated", "shard"].needs == (int(15 / 4 * GIB),)


def test_the_spec_s_own_layout_makes_no_difference():
    colocated = "cluster={layout: colocated, workers: {count: 4, gpus: 1}}"
    assert layouts(colocated) == layouts(SEPARATE)


def test_gpus_that_cannot_share_the_work_evenly_are_left_out():
    """Eight micro-batches: of five GPUs four work."""
    found = layouts("cluster={rollout: {count: 3, gpus: 1}, learner: {count: 2, gpus: 1}}")
    assert [row.busy for row in found if row.layout == "colocated"] == [0.8, 0.8]
    assert {row.counts for row in found} == {(4,), (3, 2)}


def test_one_gpu_is_shared_by_two_processes_or_has_one():
    keys = "cluster={rollout: {gpus: 0.4}, learner: {gpus: 0.4}}"
    reward = "rewards={sign_colour: {gpus: 0.2}}"
    found = layouts(keys, reward, rewards={"sign_colour": {"weights": GIB}})
    assert [(row.counts, row.busy, row.needs) for row in found] == [
        ((1,), 1, (21 * GIB,)),
        ((1,), 1, (16 * GIB,)),
    ]


def test_the_fastest_that_fits_is_recommended():
    spec = small_spec(LORA, "sampling.groups=8", "objective.updates=1", SEPARATE)
    found = layouts(SEPARATE)

    def choice(gib: float) -> tuple[str, str] | None:
        chosen = recommended(found, gib * GIB)
        return chosen and (chosen.layout, chosen.parallel)

    assert choice(15) == ("colocated", "replicate")
    assert choice(14) == ("colocated", "shard")
    assert choice(3) is None
    whole, sharded = (row for row in found if row.layout == "colocated")
    assert reason(whole, found, spec) == (
        "separate sides wait for each other, and 20% of the GPUs' time is lost"
    )
    assert reason(sharded, found, spec).endswith(
        "the whole network on each GPU would need 15.0 GiB"
    )


def test_of_layouts_that_are_as_fast_the_smaller_is_recommended():
    keys = "cluster={rollout: {gpus: 0.5}, learner: {gpus: 0.5}}"
    spec, found = small_spec(LORA, keys), layouts(keys)
    chosen = recommended(found, 30 * GIB)
    assert chosen is not None
    assert chosen.layout == "colocated"
    assert reason(chosen, found, spec) == (
        "both layouts use the GPUs equally well, and this one needs less memory"
    )


def test_a_lag_must_go_for_workers_that_do_both():
    found = layouts(SEPARATE, "sampling.max_lag=1")
    separate, colocated = found[:2]
    assert (separate.layout, separate.busy) == ("separate", 1)
    spec = small_spec(SEPARATE, "sampling.max_lag=1", "sampling.groups=8", "objective.updates=1")
    assert reason(colocated, found, spec).endswith("it needs sampling.max_lag: 0")
