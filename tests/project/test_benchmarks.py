"""The programs in ``benchmarks/`` run, and what they compare is comparable."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import whole_runs
from tiny_runs import CPU, alone, one_thread
from waiting import wait_until

from flowgrpo_ray.algorithm.advantages import group_advantages
from flowgrpo_ray.algorithm.gate import Floor
from flowgrpo_ray.algorithm.learner import Learner
from flowgrpo_ray.common.types import Provenance, Schedule, Trajectory, WorkUnit
from flowgrpo_ray.spec.file import load_spec

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def program(name: str) -> ModuleType:
    return importlib.import_module(name)


def run(name: str, out: Path, *arguments: str) -> dict[str, Any]:
    """What a benchmark measured, in a process of its own."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments, "--json", str(out)]
    subprocess.run(command, env=whole_runs.alone(), check=True, timeout=300)
    found: dict[str, Any] = json.loads(out.read_text())
    assert found.pop("machine")["cores"] > 0
    return found


# --- the straight script


def test_an_update_of_the_script_is_one_of_ours():
    """From the same samples: the same ratios, advantages and clipped mean gradient."""
    script = program("baseline").Script(micro_batch=24, threads=1)
    texts = [text for text in script.prompts[:2] for _ in range(12)]
    embeds, pooled = script.encode(texts)
    batch = script.sample(embeds, pooled, start=0)  # where sigma is 1
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    group = torch.arange(2).repeat_interleave(12)
    advantages = torch.from_numpy(group_advantages(rewards.numpy(), group.numpy()))
    ours = program("baseline").normalised(rewards)
    torch.testing.assert_close(ours, advantages, rtol=0, atol=1e-6)

    spec = load_spec("tiny-ocr", ["objective.kl=null", "ema=null"])
    eta = tuple(spec.sampling.eta if step < 2 else 0.0 for step in range(10))
    schedule = Schedule("flow_sde", tuple(script.sigmas), eta)
    unit = WorkUnit(0, "train", 1, 0, (0,) * 12 + (1,) * 12, tuple(range(12)) * 2, schedule)
    conditions = {
        i: {"embeds": embeds[12 * i].numpy(), "pooled": pooled[12 * i].numpy()} for i in (0, 1)
    }
    gradients: list[dict[str, torch.Tensor]] = []

    def keep(parameters: dict[str, torch.nn.Parameter]) -> None:
        gradients.append({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})

    with one_thread(), alone(), pytest.MonkeyPatch.context() as patch:
        learner = Learner(spec, CPU)
        ticket, _ = learner.publish(1)
        learner.gate.floor = Floor({0: np.array([1e-5])})  # other arithmetic, so not exactly 0
        made = Provenance(1, ticket.digest, 24, "float32", schedule)
        trajectory = Trajectory(batch.latents.numpy(), batch.log_probs.numpy(), made)
        kept = np.ones(24, bool)
        learner.accumulate(unit, trajectory, conditions, advantages.numpy(), kept)
        patch.setattr(learner.optimizer, "step", lambda: keep(learner.parameters))
        learner.step(24, 2)
        patch.setattr(
            script.optimizer, "step", lambda: keep(dict(script.network.named_parameters()))
        )
        script.update([batch], (advantages,), start=0)
    expected, found = gradients
    assert expected.keys() == found.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-4 * largest)


@pytest.mark.slow
def test_the_script_trains_from_where_a_run_does(tmp_path: Path):
    options = ["--micro-batch", "48", "--threads", "1", "--rounds", "1", "--evaluate-every", "2"]
    found = run("baseline", tmp_path / "out.json", *options)
    (setting,) = found["settings"]
    (iteration,) = setting["rounds"]
    parts = sum(iteration[part] for part in ("text", "sample", "score", "train"))
    assert iteration["iteration"] == pytest.approx(parts)
    assert [row["iteration"] for row in found["curve"]] == [0, 2]
    # The untrained model's, to which `flowgrpo-ray train tiny-ocr` gives 0.339 as well.
    assert found["curve"][0]["ocr"] == pytest.approx(0.339, abs=0.02)


# --- simulated actors


@pytest.mark.slow
def test_overlap_runs(tmp_path: Path):
    options = ["--stages", "score", "--units", "4", "--slow", "0.05", "--fast", "0.01"]
    found = run("overlap", tmp_path / "out.json", *options, "--rounds", "1")
    (stage,) = found["stages"]
    assert stage["stage"] == pytest.approx(0.2)
    assert stage["walls"][0] >= 0.2, "replicas really take their time"


@pytest.mark.slow
def test_scale_runs(tmp_path: Path):
    options = ["--workers", "2", "--replicas", "--megabytes", "--seconds", "0.1", "--rounds", "1"]
    found = run("scale", tmp_path / "out.json", *options)
    (row,) = found["workers"]
    assert row["units"] == 8
    assert 0 < row["images_per_s"][0] <= 2 * 4 / 0.1, "two workers, 4 images in 0.1 s"
    assert row["per_unit"]["driver_cpu"] >= row["per_unit"]["loop_cpu"] > 0
    assert row["publication"][0] > 0


# --- what they count with


def test_all_processes_below_stand_still_but_those_named():
    still, running = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    try:
        wait_for(running.pid, psutil.STATUS_SLEEPING)
        with program("harness").frozen(running.pid):
            wait_for(still.pid, psutil.STATUS_STOPPED)
            assert psutil.Process(running.pid).status() == psutil.STATUS_SLEEPING
        wait_for(still.pid, psutil.STATUS_SLEEPING)
    finally:
        for each in (still, running):
            each.kill()
            each.wait()


def wait_for(pid: int, status: str) -> None:
    """The kernel takes a moment."""
    wait_until(lambda: psutil.Process(pid).status() == status, status)


def test_growth_is_taken_within_each_process():
    """A process that replaces a larger one is not a leak that heals."""
    soak = program("soak")
    hours = np.arange(10) / 10
    old = [soak.Sample(3600 * t, "learner rank", "old", int(900 + 100 * t)) for t in hours]
    new = [soak.Sample(3600 * (1 + t), "learner rank", "new", int(200 + 100 * t)) for t in hours]
    slope, error = soak.growth([*old, *new])
    assert slope == pytest.approx(100)
    assert error == pytest.approx(0, abs=1e-3)
    assert np.isnan(soak.growth(old[:1])).all(), "one sample has no slope"


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("ray::RolloutWorker.sample", "rollout worker"),
        ("ray::rollout-0:RolloutWorker.__init__", "rollout worker"),
        ("ray::LearnerRank", "learner rank"),
        ("ray::ServeReplica:reward-ocr:ocr.handle_request", "reward replica"),
        ("ray::ServeController", "Serve controller"),
        ("ray::IDLE", "other actors"),
        ("/x/python -m flowgrpo_ray train tiny-ocr --runs r", "driver"),
        ("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=s", "raylet"),
        ("/x/python -u /x/ray/_private/log_monitor.py", "Ray's agents, janitor"),
    ],
)
def test_kinds_of_processes(title: str, kind: str):
    assert program("soak").kind_of(title) == kind


def test_two_runs_are_compared_as_far_as_both_came(tmp_path: Path):
    soak = program("soak")

    def made(name: str, metrics: str) -> Any:
        run = soak.Run(tmp_path, name, 2, [])
        run.folder.mkdir()
        (run.folder / "metrics.jsonl").write_text(metrics)
        return run

    short, longer, other = made("1", "a\nb\n"), made("2", "a\nb\nc\n"), made("3", "a\nx\nc\n")
    assert soak.same(short, longer) == soak.same(longer, short) == (2, True)
    assert soak.same(longer, other) == (3, False)


# --- whole runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("side_by_side", ["--rounds", "1", "--threads", "1"]),
        ("side_by_side", ["--to", "0.1", "--rounds", "1", "--threads", "1"]),
        ("efficiency", ["--rounds", "1"]),
    ],
)
def test_comparisons_run(tmp_path: Path, name: str, options: list[str]):
    found = run(name, tmp_path / "out.json", *options)
    assert found.get("rounds") or found["cluster"][0]["iterations"] == 0


@pytest.mark.slow
def test_a_soak_of_two_minutes(tmp_path: Path):
    options = ["--minutes", "2", "--period", "20", "--driver", "--runs", str(tmp_path / "runs")]
    found = run("soak", tmp_path / "out.json", *options)
    assert found["equal"]
    assert found["rows"] > 1, "that both runs have"
    assert len(found["struck"]) > 2
