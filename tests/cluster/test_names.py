"""Who holds a run's name: what is resumed, begun anew, overwritten, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from whole_runs import alone

from flowgrpo_ray.cluster import run as running
from flowgrpo_ray.common.errors import ClusterError, RunFolderError
from flowgrpo_ray.common.types import LearnerState
from flowgrpo_ray.run.checkpoint import Progress, save_checkpoint
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.inference import load_trained
from flowgrpo_ray.run.tracking import RunRecorder
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.prompts import load_prompt_sets, prompts_digest


@pytest.fixture
def run(command_line, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`train tiny-ocr` with more arguments, as far as Ray: its status and its words."""

    def no_ray(*_: object) -> None:
        raise ClusterError("here Ray would start")

    monkeypatch.setattr("os.environ", {**alone(), "COLUMNS": "300"})
    monkeypatch.setattr(running, "ray_session", no_ray)

    def call(*more: str) -> tuple[int, str]:
        status, out, err = command_line("train", "tiny-ocr", "--runs", tmp_path, *more)
        return status, " ".join((out + err).split())

    return call


def trained(root: Path, iterations: int, *, of: int, kept: tuple[int, ...] = ()) -> RunFolder:
    """A run's folder after so many iterations."""
    spec = load_spec("tiny-ocr", [f"iterations={of}"])
    folder = RunFolder.claim(root, spec, resume=False)
    folder.release()
    recorder = RunRecorder(folder.path)
    recorder.log({"kind": "eval", "iteration": 0})
    recorder.log_timing({"kind": "start", "seconds": 1.0, "phases": {}})
    for iteration in range(1, iterations + 1):
        recorder.log({"kind": "train", "iteration": iteration})
    if iterations == of:
        recorder.write_summary(
            {
                "name": "tiny-ocr",
                "iterations": of,
                "images": 3,
                "seconds": 1,
                "eval_before": {},
                "eval_after": {},
            }
        )
    train, held_out = load_prompt_sets(spec)
    of_prompts = prompts_digest([*train, *held_out])
    state = LearnerState({"a": np.zeros(2, np.float32)}, {}, {}, {}, 1)
    for iteration in kept:
        progress = Progress(iteration, 1, 1.0, 0, spec.identity(), of_prompts)
        save_checkpoint(folder.checkpoints, [state], progress, keep=9)
    return folder


def came_to_ray(status: int, told: str) -> bool:
    return status == 2 and told.endswith("error: here Ray would start")


def test_a_run_that_finished_no_iteration_does_not_hold_its_name(run, tmp_path: Path) -> None:
    folder = trained(tmp_path, 0, of=9)
    assert came_to_ray(*run("--set", "seed=5"))
    assert folder.read_spec().seed == 5
    assert folder.path.joinpath("metrics.jsonl").read_text() == ""
    folder.spec_file.write_text("name: [")
    assert came_to_ray(*run())


def test_one_that_did_holds_it_until_it_is_overwritten(run, tmp_path: Path) -> None:
    folder = trained(tmp_path, 2, of=9, kept=(1, 2))
    before = sorted(folder.path.rglob("*"))
    for more, says in (((), "continue it with --resume"), (("--set", "seed=5"), "seed is 0 there")):
        status, told = run(*more)
        assert status == 2
        assert says in told
        assert "or --overwrite" in told
    assert run("--resume", "--overwrite")[0] == 2
    assert sorted(folder.path.rglob("*")) == before
    assert came_to_ray(*run("--set", "seed=5", "--overwrite"))
    assert folder.read_spec().seed == 5
    assert not folder.checkpoints.exists()
    strangers = tmp_path / "other" / "mine.txt"
    strangers.parent.mkdir()
    strangers.write_text("mine")
    assert came_to_ray(*run("--set", "name=other", "--overwrite"))
    assert strangers.read_text() == "mine", "no run was there"


def test_nobody_overwrites_a_run_that_trains(tmp_path: Path) -> None:
    spec = load_spec("tiny-ocr")
    folder = RunFolder.claim(tmp_path, spec, resume=False)
    with pytest.raises(RunFolderError, match="another process is training in it"):
        RunFolder.claim(tmp_path, spec, resume=False, overwrite=True)
    assert folder.read_spec() == spec
    folder.release()


def test_a_finished_run_says_so_at_once_and_how_to_go_on(run, tmp_path: Path) -> None:
    folder = trained(tmp_path, 3, of=3, kept=(3,))
    status, told = run("--resume", "--set", "iterations=3")
    assert status == 0
    assert f"{folder.path} is finished, with all of its 3 iterations" in told
    assert "--resume --set iterations=6" in told
    status, told = run("--resume", "--set", "iterations=6")
    assert (status, "after iteration 3" in told) == (2, True)


def test_resuming_what_is_not_there_begins_and_names_what_is_near(run, tmp_path: Path) -> None:
    trained(tmp_path, 1, of=9)
    status, told = run("--resume", "--set", "name=tiny-ocl")
    assert (status, told.endswith("here Ray would start")) == (2, True)
    note = f"{tmp_path / 'tiny-ocl'} holds no checkpoint: the run begins; did you mean "
    assert note + "--set name=tiny-ocr?" in told
    log = (tmp_path / "tiny-ocl" / "driver.log").read_text()
    assert note in log, "every note is kept"
    assert "did you mean" not in run("--resume", "--set", "name=else")[1]


def test_a_wrong_iteration_lists_those_that_there_are(tmp_path: Path) -> None:
    folder = trained(tmp_path, 7, of=9, kept=(2, 5, 12))
    with pytest.raises(RunFolderError, match=r"no checkpoint of iteration 7; there are: 2, 5, 12"):
        load_trained(folder.read_spec(), folder, "ema", 7)
