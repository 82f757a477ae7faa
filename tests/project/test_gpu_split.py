"""docs/gpu-split.md: its worked examples are planned, and its numbers are the plan's; and hours."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from estimates import costs_once
from test_docs import ROOT, blocks_of, folder  # noqa: F401
from tiny_runs import one_thread

from flowgrpo_ray.cli.plan import gpus_of
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.estimate import footprint
from flowgrpo_ray.estimate.layouts import Work, best_split, busy_colocated
from flowgrpo_ray.estimate.preflight import check_run
from flowgrpo_ray.run.cost import cost_of
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.tracking import TIMINGS
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.training import TrainingSpec, required_resources

PAGE = ROOT / "docs" / "gpu-split.md"
GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def shared_costs() -> Iterator[None]:
    with costs_once():
        yield


def examples() -> list[TrainingSpec]:
    """The specs of the worked examples, from the commands of their block."""
    text = next(b.text for b in blocks_of(PAGE) if b.text.startswith("# 1 GPU of 24 GB"))
    commands = [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]
    assert all(set(c[3::2]) == {"--set"} for c in commands)
    return [load_spec(c[2], c[4::2]) for c in commands]


def table(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without its head."""
    rows = PAGE.read_text("utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [[c.strip() for c in row[1:-1].split("|")] for row in re.findall(r"^\|.*$", rows, re.M)]
    return cells[2:]


@pytest.mark.slow
@pytest.mark.usefixtures("folder", "shared_costs")
def test_worked_examples_need_what_the_page_says():
    shown = table("Worked examples")
    specs = examples()
    assert len(shown) == len(specs)
    for row, spec in zip(shown, specs, strict=True):
        check_run(spec)
        assert spec.ranks.gpus, "the rules of a GPU's autocast hold"
        found = footprint.estimate(spec)
        assert found is not None
        share = found.rollout_flops / (found.rollout_flops + found.training_flops)
        kinds = [f"{gpu.name} {gpu.largest()[1] / GIB:.1f}" for gpu in gpus_of(spec, found)]
        reserved = required_resources(spec)["GPU"]
        assert row[1:] == [f"{reserved:g}", ", ".join(kinds), f"{share:.2f}"]


@pytest.mark.slow
@pytest.mark.usefixtures("folder", "shared_costs")
def test_shares_of_flops_are_those_of_the_plan():
    fast = ["sampling.guidance=1.0", "sampling.window={kind: random, length: 3, within: [0, 5]}"]
    changes: list[list[str]] = [
        [],
        ["cluster.learner.activation_checkpointing=true"],
        ["objective.kl=null"],
        ["objective.kl=null", *fast],
    ]
    rows = table("2. How much work is each side?")[: len(changes)]  # the next table is another one
    for row, overrides in zip(rows, changes, strict=True):
        spec = load_spec("sd35-ocr.yaml", overrides)
        assert spec.ranks.gpus, "the rules of a GPU's autocast hold"
        found = footprint.estimate(spec)
        assert found is not None
        flops = found.rollout_flops / 1e12, found.training_flops / 1e12
        assert row[1:] == [*(f"{n:,.0f}" for n in flops), f"{flops[0] / sum(flops):.2f}"]


def test_the_time_that_waits_is_that_of_the_arithmetic():
    """128 micro-batches in blocks of 8, two updates; the FLOPs are those of the page."""
    as_it_is, _, without_kl, fast, *_ = table("2. How much work is each side?")
    rows = {"`sd35-ocr.yaml`": as_it_is, "without KL": without_kl, "Flow-GRPO-Fast": fast}
    for name, std, *told in table("# Which layout?"):
        sampling, training = (float(n.replace(",", "")) / 128 for n in rows[name][1:3])
        of = Work(sampling, training, units=128, block=8, updates=2, std=std)
        shares = [best_split(of, n)[2] for n in (2, 32, 64)]
        shares += [best_split(replace(of, lag=1), 32)[2], busy_colocated(of, 32)]
        assert told == [f"{100 * share:.0f}" for share in shares], (name, std)


def test_two_ranks_on_one_gpu_are_refused():
    def of(count: int, gpus: float) -> TrainingSpec:
        return load_spec("tiny-ocr", [f"cluster.learner={{count: {count}, gpus: {gpus}}}"])

    with pytest.raises(SpecError, match=r"count = 2 with gpus = 0\.5: Ray would put two ranks"):
        of(2, 0.5)
    assert of(2, 0.6).cluster.learner.count == 2
    assert of(1, 0.5).cluster.learner.gpus == 0.5
    assert of(2, 0).cluster.learner.gpus == 0


# --- hours of a run from the times of a short one


def measured(root: Path, overrides: list[str], train: list[float]) -> Path:
    """A run folder whose clock said so."""
    spec = load_spec("tiny-ocr", ["name=short", "iterations=3", *overrides])
    run = RunFolder.claim(root, spec, resume=False)
    run.release()
    rows: list[dict[str, Any]] = [
        {"kind": "eval", "iteration": 0, "seconds": 90.0},
        {"kind": "start", "seconds": 20.0},
        *({"kind": "train", "iteration": i, "seconds": s} for i, s in enumerate(train, 1)),
        {"kind": "eval", "iteration": len(train), "seconds": 10.0},
    ]
    (run.path / TIMINGS).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return run.path


GPUS = "cluster={rollout: {count: 2, gpus: 1}, learner: {gpus: 1}}"


def test_hours_of_a_run_by_hand(tmp_path: Path):
    """A start, 65 iterations of the median without the first, and evaluations at 10 … 60, 65; that
    at 0 is a part of the start."""
    run = measured(tmp_path, [GPUS], [100.0, 2.0, 9.0, 3.0])
    spec = load_spec("tiny-ocr", [GPUS, "iterations=65", "seed=7", "checkpoint.every=1"])
    cost = cost_of(spec, run, price=2.0)
    assert cost["iteration_s"] == 3.0
    assert cost["evaluations"] == 8
    hours = (20 + 65 * 3 + 7 * 10) / 3600
    assert cost["hours"] == pytest.approx(hours)
    assert cost["gpu_hours"] == pytest.approx(3 * hours)
    assert cost["price"] == pytest.approx(6 * hours)


@pytest.mark.parametrize(
    "other", ["cluster.rollout.count=3", "objective.kl=null", "sampling.groups=4", "seed=1"]
)
def test_times_of_other_work_are_refused(tmp_path: Path, other: str):
    run = measured(tmp_path, [GPUS], [1.0, 1.0])
    spec = load_spec("tiny-ocr", [GPUS, other])
    if other == "seed=1":
        assert cost_of(spec, run, None)["price"] is None
        return
    key = other.partition("=")[0]
    with pytest.raises(SpecError, match=rf"measured in .*: {re.escape(key)}.* there and"):
        cost_of(spec, run, None)


def test_a_run_that_is_too_short_is_refused(tmp_path: Path):
    run = measured(tmp_path, [], [1.0])
    with pytest.raises(SpecError, match="needs 2 iterations"):
        cost_of(load_spec("tiny-ocr"), run, None)
