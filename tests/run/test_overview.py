"""Many runs in lines: each number by hand, and specs as they were written."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from sample_runs import WORK, make_run, timing_row, train_row, write_live

from flowgrpo_ray.run.brief import RECENT, brief
from flowgrpo_ray.run.overview import compared, differing, overview
from flowgrpo_ray.run.settings import gpus_of, settings
from flowgrpo_ray.run.tracking import RunRecorder, read_rows
from flowgrpo_ray.run.watch import Reading
from flowgrpo_ray.spec.file import dump_spec, load_spec, recipe_names
from flowgrpo_ray.spec.training import required_resources

GPUS = [f"cluster.{kind}.gpus=1" for kind in ("rollout", "learner")]


def eval_row(iteration: int, ocr: float, colour: float | None, **more: Any) -> dict[str, Any]:
    rewards = {"ocr": {"mean": ocr, "std": 0.1}, "sign_colour": {"mean": colour, "std": 0.1}}
    per_prompt = {"rewards": {"sign_colour": [0.5, 1], "total": [1], 'a"]}, ': [1]}, "total": [1]}
    row = {"kind": "eval", "iteration": iteration, "rewards": rewards, "per_prompt": per_prompt}
    return {**row, "prompts": 2, "unscored": {"ocr": 0}, "weights": "ema", **more}


def watch(diverging: bool) -> dict[str, Any]:
    reading = Reading(0.9, 0.5, 0.01, 0.2, 0, 2, 0.1, 0.2, diverging=diverging)
    return {"watch": {"sign_colour": reading.as_json()}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    recorder = RunRecorder(tmp_path / "run")
    rng = np.random.default_rng(0)
    recorder.log_timing({"kind": "start", "seconds": 30.0, "phases": {}})
    recorder.log(eval_row(0, 0.2, 0.9))
    recorder.log_timing({"kind": "eval", "iteration": 0, "seconds": 5.0})  # within the start
    for iteration in range(1, 101):
        recorder.log(train_row(iteration, 0.5, rng))
        recorder.log_timing(timing_row(iteration, 2.0 + iteration / 100, WORK))
    recorder.log(eval_row(50, 0.7, 0.5, **watch(True)))
    recorder.log(eval_row(100, 0.6, None, **watch(False)))
    recorder.log_timing({"kind": "eval", "iteration": 100, "seconds": 7.0})
    spec = load_spec("tiny-ocr", GPUS)
    (tmp_path / "run" / "spec.yaml").write_text(dump_spec(spec))
    return tmp_path / "run"


def test_a_line_is_the_numbers_of_the_rows(folder: Path):
    write_live(folder, "running", iteration=100, stage="sampling")
    line = brief(folder, "a")
    assert (line["name"], line["state"], line["stage"]) == ("a", "running", "sampling")
    assert (line["iteration"], line["iterations"]) == (100, 60)
    assert list(line["rewards"]) == ["ocr", "sign_colour"], "what is trained comes first"
    ocr, colour = line["rewards"].values()
    assert [ocr[key] for key in ("before", "after", "best", "best_iteration")] == [
        0.2,
        0.6,
        0.7,
        50,
    ]
    assert ocr["curve"] == [(0, 0.2), (50, 0.7), (100, 0.6)]
    assert (colour["after"], colour["best"], colour["curve"]) == (None, 0.9, [(0, 0.9), (50, 0.5)])
    train = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    means = {row["iteration"]: row["rewards"]["ocr"]["mean"] for row in train}
    assert len(ocr["train"]) == 40
    assert [it for it, _ in ocr["train"]][::39] == [1, 100]
    assert all(value == float(f"{means[it]:.4g}") for it, value in ocr["train"])
    assert line["reward"] == train[-1]["reward"]["mean"]
    assert line["watch"] == {"sign_colour": "earlier"}
    seconds = [2.0 + iteration / 100 for iteration in range(1, 101)]
    assert line["seconds"] == pytest.approx(30.0 + sum(seconds) + 7.0)
    assert line["gpu_seconds"] == pytest.approx(line["seconds"] * 3)  # 2 workers, 1 rank
    assert line["images_per_second"] == pytest.approx(fmean(96 / s for s in seconds[-RECENT:]))


def test_a_line_follows_its_files(folder: Path):
    assert brief(folder, "a")["rewards"]["ocr"]["after"] == 0.6
    recorder = RunRecorder(folder)
    recorder.log(eval_row(150, 0.8, 0.4, **watch(True)))
    line = brief(folder, "a")
    assert (line["rewards"]["ocr"]["after"], line["watch"]) == (0.8, {"sign_colour": "now"})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 151, "ki')  # just being written
    assert brief(folder, "a")["rewards"] == line["rewards"]
    recorder.write_summary({"iterations": 100, "seconds": 1000.5})
    assert brief(folder, "a")["seconds"] == 1000.5
    assert brief(folder, "a")["gpu_seconds"] == 3001.5
    (folder / "spec.yaml").write_text("a: &b 1\n")
    line = brief(folder, "a")
    assert "anchors" in line["message"]
    assert line["rewards"]["ocr"]["after"] == 0.8
    (folder / "metrics.jsonl").write_text('{"iteration": 1, "kind": \n')
    assert brief(folder, "a")["state"] == "unreadable"


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_spec_is_read_as_it_was_written(tmp_path: Path, recipe: str):
    """Section by section, which is quick, as whole; and its GPUs without building it."""
    spec = load_spec(recipe, ["tracking.wandb='a: b # c'"])
    (tmp_path / "spec.yaml").write_text(dump_spec(spec), encoding="utf-8")
    flat, fault = settings(tmp_path)
    assert fault is None
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    assert nested == spec.model_dump(mode="json")
    assert gpus_of(flat) == pytest.approx(required_resources(spec)["GPU"])


def line_of(name: str, after: float | None, **spec: Any) -> dict[str, Any]:
    rewards = {"ocr": {"before": 0.5, "after": after, "best": after}}
    numbers = {"images_per_second": 10.0, "seconds": 60.0, "gpu_seconds": None}
    return {"name": name, "rewards": rewards, **numbers, "spec": {"name": name, **spec}}


def test_what_differs_and_what_is_the_same_but_for_the_seed():
    lines = [
        line_of("a", 0.6, seed=0, lr=1e-4, kind="x", clip=0.1),
        line_of("b", 0.8, seed=1, lr=1e-4, kind="x", clip=0.1),
        line_of("c", 0.9, seed=0, lr=2e-4, kind="y", betas=[0.9, 0.99]),
        line_of("d", None, seed=2, lr=1e-4, kind="x", clip=0.1),
        {"name": "e", "state": "unreadable", "message": "torn"},
    ]
    found = compared(lines)
    assert found["keys"] == ["seed", "lr", "kind", "clip", "betas"]
    runs = {run["name"]: run for run in found["runs"]}
    assert runs["c"]["values"] == {"seed": 0, "lr": 2e-4, "kind": "y", "betas": [0.9, 0.99]}
    assert [run["group"] for run in found["runs"]] == ["a", "a", "c", "a", None]
    assert list(found["groups"]) == ["a"]
    group = found["groups"]["a"]
    assert group["size"] == 3
    after = group["rewards"]["ocr"]["after"]
    assert after == {"mean": pytest.approx(0.7), "std": pytest.approx(stdev([0.6, 0.8])), "n": 2}
    assert group["gpu_seconds"] == {"mean": None, "std": None, "n": 0}
    assert differing([{"name": "a", "x": 1}, {"name": "b", "x": 1}]) == []
    assert differing([{"x": 1}, {"x": 1.0}, {"x": True}]) == ["x"]


def test_the_overview_of_a_folder(tmp_path: Path):
    for seed in (0, 1):
        run = make_run(tmp_path / f"s{seed}", iterations=2, prompts=2)
        (run / "spec.yaml").write_text(dump_spec(load_spec("tiny-ocr", [f"seed={seed}"])))
    found = overview(tmp_path)
    assert (found["root"], found["only"], found["keys"]) == (str(tmp_path), False, ["seed"])
    assert [run["values"] for run in found["runs"]] == [{"seed": 0}, {"seed": 1}]
    assert found["groups"]["s0"]["rewards"]["ocr"]["after"]["std"] == 0
    assert json.loads(json.dumps(found, allow_nan=False))["runs"][1]["name"] == "s1"
    assert overview(tmp_path / "s1")["only"]
