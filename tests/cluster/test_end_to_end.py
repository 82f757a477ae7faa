"""The program as a user runs it: a real Ray cluster, real Serve, a real FSDP learner.

What is killed costs time and nothing else: a run that is stopped in every way a run can be stopped
ends with the same weights and the same metrics file as one that is left alone.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from whole_runs import IN_TURNS, ITERATIONS, ONE_WORKER, Chained, Command, final_digests

from flowgrpo_ray import Run
from flowgrpo_ray.cluster.interrupts import ONCE_S
from flowgrpo_ray.common.paths import builtin_path
from flowgrpo_ray.rewards.preservation import PreservationReward
from flowgrpo_ray.run.checkpoint import list_checkpoints
from flowgrpo_ray.run.tracking import read_rows
from flowgrpo_ray.tiny import edits

pytestmark = IN_TURNS


@pytest.fixture(scope="module")
def undisturbed(
    hardly_disturbed: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Command, str]:
    best = {"checkpoint.best": "ocr"}
    command = Command(tmp_path_factory.mktemp("undisturbed"), **ONE_WORKER, **best)
    return command, command.finish()


def test_a_run_leaves_what_it_promises(undisturbed: tuple[Command, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command, output = undisturbed
    run = command.run
    summary = json.loads((run / "summary.json").read_text())
    assert summary["iterations"] == ITERATIONS
    assert summary["images"] == ITERATIONS * 32
    assert summary["eval_before"].keys() == summary["eval_after"].keys() == {"ocr", "sign_colour"}
    rows = read_rows(run / "metrics.jsonl")
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["iteration"] for row in trained] == list(range(1, ITERATIONS + 1))
    assert [row["iteration"] for row in rows if row["kind"] == "eval"] == [0, 3, 6, ITERATIONS]
    assert {row["log_ratio"]["gate"] for row in trained} == {0.0}, "the first ratio is exactly 1"
    assert len({row["weights"]["digest"] for row in trained}) == ITERATIONS, "weights move"
    held_out = {row["iteration"]: row["rewards"]["ocr"]["mean"] for row in rows if "prompts" in row}
    value, at = max((held_out[at], -at) for at in (3, 6, ITERATIONS))
    assert summary["best"] == {"reward": "ocr", "iteration": -at, "value": value}
    assert Run(run).checkpoints == sorted({-at, 6, ITERATIONS}), "two, and the best one"
    assert f"best:   iteration {-at}, ocr {value:.3f}" in output
    for path in ("spec.yaml", "report.html", "samples/iteration-000000.png", "tensorboard"):
        assert (run / path).exists(), path
    shown = EventAccumulator(str(run / "tensorboard"), {"images": 0}).Reload()
    assert [event.step for event in shown.Images("eval/pictures/07")] == [0, 3, 6, ITERATIONS]
    assert not [tag for tag in shown.Tags()["scalars"] if " " in tag]
    assert list((run / "logs").rglob("gcs_server*")), "Ray's logs are kept"
    assert "report.html" in output
    assert len(output.splitlines()) < 40, f"noisy console:\n{output}"


def test_nothing_is_written_to_the_home_folder(undisturbed: tuple[Command, str]) -> None:
    assert [path for path in undisturbed[0].home.rglob("*") if path.is_file()] == []


MOMENTS = ["ray::RolloutWorker.sample", "reward-ocr", "ray::LearnerRank.accumulate"]


@pytest.mark.parametrize("actors", [Chained, pytest.param(Command, marks=pytest.mark.slow)])
def test_the_same_weights_whatever_dies(actors: type[Command], tmp_path: Path) -> None:
    """One of each kind; test_survival.py has every moment, and what hangs."""
    folders = [tmp_path / name for name in ("alone", "killed")]
    best = {"checkpoint.best": "ocr"}
    alone = actors(folders[0], **ONE_WORKER, **best)
    alone.finish()
    killed = actors(folders[1], **best)
    worker, reward, learner = MOMENTS
    killed.wait_for(1)
    killed.lose(worker, signal.SIGKILL)
    killed.lose(reward, signal.SIGKILL)
    killed.wait_for(2)
    killed.lose(learner, signal.SIGKILL)
    killed.wait_for(3)
    killed.process.send_signal(signal.SIGKILL)  # the driver alone, as the kernel's OOM killer does
    killed.process.wait()
    assert not killed.left_behind(), "what is beside the driver clears up after it"
    last = actors(folders[1], resume=True, **ONE_WORKER, **best)
    last.finish()
    assert_same(last.run, alone.run)
    assert Run(last.run).best == Run(alone.run).best


def assert_same(run: Path, expected: Path) -> None:
    assert final_digests(run, ITERATIONS) == final_digests(expected, ITERATIONS)
    assert (run / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()


NFT = {
    "objective": "{kind: diffusion_nft, updates: 2, decay: {rate: 0.1}, "
    "times: {count: 2, within: [0.3, 1]}}",
    "sampling.eta": "null",
    "sampling.window": "null",
    "sampling.solver": "dpm2",
}


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
def test_nft_is_the_same_run_whatever_dies_and_however_many_sample(
    lag: int, tmp_path: Path
) -> None:
    """Its second set of weights, and its own draws, are as exact as all else; so are samples of the
    weights before those."""
    folders = [tmp_path / name for name in ("one", "two")]
    settings = NFT | {"sampling.max_lag": str(lag)}
    one = Command(folders[0], **settings, **ONE_WORKER)
    one.finish()
    killed = Command(folders[1], **settings)
    for iteration, moment in enumerate(MOMENTS, start=1):
        killed.wait_for(iteration)
        killed.lose(moment, signal.SIGKILL)
    killed.wait_for(len(MOMENTS) + 2)
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait()
    last = Command(folders[1], resume=True, **settings)
    last.finish()
    assert_same(last.run, one.run)
    assert "follower.safetensors" in final_digests(last.run, ITERATIONS)
    rows = [row for row in read_rows(last.run / "metrics.jsonl") if row["kind"] == "train"]
    gates = [row["velocity_change"]["gate"] for row in rows]
    assert gates == [0.0] + [None] * (ITERATIONS - 1), "from then on other weights sample"
    assert [row["staleness"] for row in rows] == [0] + [lag] * (ITERATIONS - 1)


EDIT = {
    "model": "{family: flux_kontext, path: 'builtin:tiny-kontext', dtype: float32, "
    "max_sequence_length: 10}",
    "prompts": "{train: builtin:prompts/tiny-edit-train.jsonl, "
    "evaluate: builtin:prompts/tiny-edit-heldout.jsonl}",
    "rewards": "{ocr: {weight: 1, options: {detect: false}}, preservation: {weight: 1}}",
}


@pytest.mark.slow
def test_edits_are_the_same_whatever_dies_and_keep_their_sources(tmp_path: Path) -> None:
    """A new worker is sent what the lost one had encoded; rewards get each prompt's own source."""
    folders = [tmp_path / name for name in ("alone", "disturbed")]
    alone = Command(folders[0], **EDIT, **ONE_WORKER)
    alone.finish()
    disturbed = Command(folders[1], **EDIT)
    disturbed.wait_for(1)
    disturbed.lose("ray::RolloutWorker.sample", signal.SIGKILL)
    disturbed.wait_for(2)
    disturbed.lose("reward-preservation", signal.SIGKILL)
    disturbed.finish()
    assert_same(disturbed.run, alone.run)
    samples = Run(alone.run).samples()
    shown = edits.make_edits(*edits.SETS["heldout"], seed=0)[: len(samples.prompts)]
    assert samples.prompts == [edits.prompt_of(edit.wanted) for edit in shown]
    sources = np.stack([edits.picture_of(edit) for edit in shown])
    assert samples.sources is not None
    np.testing.assert_array_equal(samples.sources[:, 0], sources)
    kept = PreservationReward()(
        samples.images, samples.prompts, [{}] * len(shown), sources[:, None]
    )
    assert samples.scores["preservation"] == pytest.approx(kept.tolist(), abs=1e-6)


@pytest.mark.slow
def test_a_lost_worker_that_samples_and_trains_is_replaced(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("alone", "disturbed")]
    colocated = {"cluster.layout": "colocated", "cluster.learner.parallel": "replicate"}
    alone, disturbed = (Command(folder, **colocated) for folder in folders)
    disturbed.wait_for(3)
    disturbed.lose("ray::ColocatedWorker.accumulate", signal.SIGKILL)
    assert "was lost and is replaced: " in disturbed.finish()
    alone.finish()
    assert_same(disturbed.run, alone.run)


@pytest.mark.slow
def test_two_learner_ranks_with_lora_and_a_second_ctrl_c(tmp_path: Path) -> None:
    two = {
        "tuning": "{kind: lora, rank: 4, alpha: 8}",
        "cluster.learner": "{count: 2, cpus: 0.5}",
        "iterations": "500",
        "sampling.steps": "100",  # an iteration is longer than two signals count as one
    }
    command = Command(tmp_path, **two)
    command.wait_for(1)  # nothing is saved after it, so both signals meet the next iteration
    time.sleep(1)
    rows = [row for row in read_rows(command.run / "metrics.jsonl") if row["kind"] == "train"]
    assert {row["log_ratio"]["gate"] for row in rows} == {0.0}
    command.signal_group(signal.SIGINT)
    time.sleep(1.1 * ONCE_S)
    command.signal_group(signal.SIGINT)
    assert "interrupted" in command.finish(status=130)


@pytest.mark.slow
def test_the_watch_ends_a_run_that_over_optimizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watched reward is one minus the trained one: what raises one lowers the other."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # for the replicas
    opposed = {
        "watch": "{window: 2, fall: 0.01, significance: 0.01, action: stop}",
        "rewards": "{bright: {reward: 'reward_samples:Probe'}, "
        "dark: {reward: 'reward_samples:Darkness', weight: 0}}",
        "checkpoint": "{every: 1, keep: 1}",
        "evaluation": "{every: 1, steps: 4, prompts: 8, micro_batch: 4, grid: 8}",
    }
    stopped = Command(tmp_path, **opposed)
    output = " ".join(stopped.finish().split())
    assert "stopped by the watch: dark fell from" in output
    done = stopped.trained()
    assert 1 < done < ITERATIONS
    rows = [r for r in read_rows(stopped.run / "metrics.jsonl") if r["kind"] == "eval"]
    assert "watch" not in rows[0], "a window is of two evaluations"
    readings = [row["watch"]["dark"] for row in rows[1:]]
    assert [reading["diverging"] for reading in readings] == [False] * (done - 1) + [True]
    best = readings[-1]["best_iteration"]
    kept = [int(p.name[-6:]) for p in list_checkpoints(stopped.run / "checkpoints")]
    assert kept == [best, done], "the one from before the divergence, and the newest"
    export = f"flowgrpo-ray export {stopped.run} --iteration {best} --out small-before"
    assert output.count(export) == 2, "when it is seen, and at the end"
    report = (stopped.run / "report.html").read_text()
    assert "over-optimization" in report
    assert export in report


@pytest.mark.slow
def test_a_validation_run_gives_a_verdict(tmp_path: Path) -> None:
    command = Command(tmp_path, "--validate", "3")
    output = command.finish()
    folder = tmp_path / "runs" / "small-validate"
    verdict = json.loads((folder / "validation.json").read_text())
    assert verdict["ok"]
    assert verdict["iterations"] == 3
    assert "small-validate, 3 iterations" in " ".join(output.split())
    trained = [r for r in read_rows(folder / "metrics.jsonl") if r["kind"] == "train"]
    assert [row["kl"] for row in trained] == [None] * 3, "beta is 0"


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_one_message(tmp_path: Path) -> None:
    """The error is raised in an actor, maybe on another machine, and reads as if it were local."""
    model = tmp_path / "model"
    shutil.copytree(builtin_path("builtin:tiny-sd3") or "", model)
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    output = Command(tmp_path, **{"model.path": str(model)}).finish(status=2)
    assert "error: model.path = " in output.splitlines()[1], output
    assert "'transformer'" in output
