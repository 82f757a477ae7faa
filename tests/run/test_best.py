"""The best checkpoint: which one it is, and that it is kept, found again and told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flowgrpo_ray import Run
from flowgrpo_ray.common.errors import CheckpointError, RunFolderError, SpecError
from flowgrpo_ray.common.types import LearnerState
from flowgrpo_ray.run.best import continued, with_evaluation
from flowgrpo_ray.run.checkpoint import (
    Progress,
    best_checkpoint,
    checkpoint_iteration,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.inference import load_trained
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.view.report import describe_run

OCR = load_spec("tiny-ocr", ["checkpoint.best=ocr"])
NOTHING = Progress(0, 0, 0.0, 0, "", "")
VALUES = [0.9, 0.2, None, 0.6, 0.5, 0.6, 0.7]  # after 0, 5, 10, … iterations


def row(iteration: int, value: float | None, unscored: int = 0) -> dict[str, Any]:
    """Of an evaluation; another reward falls all the time."""
    return {
        "kind": "eval",
        "iteration": iteration,
        "rewards": {"ocr": {"mean": value}, "sign_colour": {"mean": 1 / (1 + iteration)}},
        "sets": {"signs": {"ocr": {"mean": -1.0 * iteration}}},
        "unscored": {"ocr": unscored, "sign_colour": 0},
        "prompts": 8,
    }


ROWS = [row(5 * place, value) for place, value in enumerate(VALUES)]


def best(progress: Progress) -> tuple[str, int, float]:
    return progress.best_by, progress.best_iteration, progress.best_value


def test_the_best_is_the_highest_the_earliest_and_never_the_untrained() -> None:
    seen, progress = [], NOTHING
    for one in ROWS:
        progress = with_evaluation(OCR, progress, one)
        seen.append(progress.best_iteration)
    assert seen == [0, 5, 5, 15, 15, 15, 30]
    assert progress.best == {"reward": "ocr", "iteration": 30, "value": 0.7}
    assert with_evaluation(OCR, progress, row(40, 0.9, unscored=4)) is progress
    assert with_evaluation(OCR, progress, row(40, float("nan"))) is progress
    assert with_evaluation(OCR, progress, row(40, 0.9, unscored=3)).best_iteration == 40
    assert with_evaluation(load_spec("tiny-ocr"), progress, row(40, 0.9)) is progress


def test_of_a_prompt_set() -> None:
    sets = "[{name: signs, file: a.txt, evaluate: b.txt}, {name: other, file: c, evaluate: d}]"
    changes = [f"prompts={{train: {sets}}}", "checkpoint.best=ocr@signs"]
    progress = with_evaluation(load_spec("tiny-ocr", changes), NOTHING, ROWS[1])
    assert best(progress) == ("ocr@signs", 5, -5.0)
    with pytest.raises(SpecError, match=r"ocr scores no set 'sings'.*sets: signs, other"):
        load_spec("tiny-ocr", [*changes, "checkpoint.best=ocr@sings"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["checkpoint.best=orc"], "no reward 'orc' .rewards: ocr, sign_colour"),
        (["checkpoint.best=ocr@signs"], "sets: none; prompts.train is one file"),
        (["checkpoint.best=ocr@"], "ocr scores no set ''"),
        (
            ["rewards.order={reward: rank, options: {reward: ocr}}", "checkpoint.best=order"],
            "order compares the images of a group",
        ),
    ],
)
def test_what_no_evaluation_says_is_refused(changes: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec("tiny-ocr", changes)


def test_a_run_that_goes_on_knows_the_best() -> None:
    """By its checkpoint, even where the row is gone; else by the rows of what is saved."""
    known = replace(NOTHING, best_by="ocr", best_iteration=12, best_value=0.8)
    assert continued(OCR, known, ROWS, [12, 20]) == known
    assert best(continued(OCR, known, ROWS, [15, 20])) == ("ocr", 15, 0.6)
    colour = load_spec("tiny-ocr", ["checkpoint.best=sign_colour"])
    assert best(continued(colour, known, ROWS, [12, 20, 25])) == ("sign_colour", 20, 1 / 21)
    assert continued(load_spec("tiny-ocr"), known, ROWS, [12]) == NOTHING
    assert continued(OCR, NOTHING, ROWS, []) == NOTHING


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Saved every 10 iterations and where an evaluation is the best yet; the two newest stay."""
    folder = RunFolder.claim(tmp_path, load_spec("tiny-ocr", ["checkpoint.best=ocr"]), resume=False)
    folder.release()
    progress = NOTHING
    for one in ROWS[:6]:
        progress = replace(progress, iteration=one["iteration"])
        progress = with_evaluation(OCR, progress, one)
        if progress.best_iteration == one["iteration"] or one["iteration"] % 10 == 0:
            save_checkpoint(folder.checkpoints, [LearnerState({}, {}, {}, {}, 0)], progress, 2)
    for iteration in (30, 40):
        progress = replace(progress, iteration=iteration)
        save_checkpoint(folder.checkpoints, [LearnerState({}, {}, {}, {}, 0)], progress, 2)
    return folder


def test_it_is_kept_told_and_found(run: RunFolder) -> None:
    kept = [checkpoint_iteration(path) for path in list_checkpoints(run.checkpoints)]
    assert kept == Run(run.path).checkpoints == [15, 30, 40]
    found = {"reward": "ocr", "iteration": 15, "value": 0.6}
    assert Run(run.path).best == found == describe_run(run.path, [], [], [])["best"]
    assert load_checkpoint(run.checkpoints / "iteration-000040")[1].best == found


def test_a_command_takes_it(
    run: RunFolder, command_line: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken = []

    def loaded(path: Path) -> None:
        taken.append(path.name)
        raise CheckpointError("enough")

    monkeypatch.setattr("flowgrpo_ray.run.inference.load_checkpoint", loaded)
    for iteration in ("best", "30"):
        command_line("export", run.path, "--out", tmp_path / "out", "--iteration", iteration)
    assert taken == ["iteration-000015", "iteration-000030"]
    status, _, message = command_line("evaluate", run.path, "--iteration", "beste")
    assert (status, "neither a number" in message) == (2, True)


def test_where_there_is_none(run: RunFolder) -> None:
    for path in list_checkpoints(run.checkpoints)[:1]:
        (path / "state.json").rename(run.path / "state.json")
        path.rename(run.path / "moved")
    assert best_checkpoint(run.checkpoints) is None
    with pytest.raises(RunFolderError, match="keeps no best checkpoint: its spec names no reward"):
        load_trained(OCR, run, "ema", "best")
    (run.checkpoints / "iteration-000040" / "state.json").write_text("[]")
    with pytest.raises(CheckpointError, match="000040: cannot be read"):
        Run(run.path).best  # noqa: B018
    notes: list[str] = []
    describe_run(run.path, [], [], notes)
    assert any("000040: cannot be read" in note for note in notes)
