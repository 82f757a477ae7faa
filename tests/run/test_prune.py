"""What `runs prune` takes away, and what it must not."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.prune import leftovers, prune
from flowgrpo_ray.run.watch import Reading
from flowgrpo_ray.spec.file import load_spec


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run that never trained, one that did, a finished one, one that is starting, a stranger."""
    for name in ("never", "going", "finished", "starting"):
        folder = RunFolder.claim(tmp_path, load_spec("tiny-ocr", [f"name={name}"]), resume=False)
        if name != "starting":
            folder.release()
        if name in ("going", "finished"):
            (folder.path / "metrics.jsonl").write_text('{"kind": "train", "iteration": 1}\n')
            for iteration in (1, 2, 3):
                (folder.checkpoints / f"iteration-{iteration:06d}").mkdir(parents=True)
    (tmp_path / "finished" / "summary.json").write_text("{}")
    (tmp_path / "stranger").mkdir()
    return tmp_path


def test_runs_that_never_trained_go_and_no_other(root: Path) -> None:
    found = leftovers(root)
    assert [one.path.name for one in found] == ["never"]
    assert prune(found) == found[0].size > 0
    left = {path.name for path in root.iterdir()}
    assert left == {"going", "finished", "starting", "stranger"}
    assert leftovers(root) == []


def test_of_finished_runs_the_last_checkpoint_stays(root: Path) -> None:
    prune(leftovers(root, checkpoints=True))
    kept = {
        name: sorted(p.name[-1] for p in (root / name / "checkpoints").iterdir())
        for name in ("going", "finished")
    }
    assert kept == {"going": ["1", "2", "3"], "finished": ["3"]}


def test_the_best_checkpoint_and_those_from_before_an_alarm_stay(root: Path) -> None:
    """Of each watched reward the newest one up to its best window, as the last evaluation says."""
    run = root / "finished"
    for iteration in (4, 5, 6, 7):
        (run / "checkpoints" / f"iteration-{iteration:06d}").mkdir()
    best = {"best_by": "ocr", "best_iteration": 3, "best_value": 0.5}
    (run / "checkpoints" / "iteration-000007" / "state.json").write_text(json.dumps(best))
    reading = {field.name: 0 for field in fields(Reading)}
    rows = [{"colour": 1, "taste": 4}, {"colour": 2, "taste": 5}, {}]
    for place, readings in enumerate(rows):
        watch = {name: {**reading, "best_iteration": at} for name, at in readings.items()}
        row = {"kind": "eval", "iteration": 2 * place, "watch": watch}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    (run / "checkpoints" / "iteration-000005").rmdir()  # the newest up to 5 is that of 4
    prune(leftovers(root, checkpoints=True))
    kept = sorted(int(path.name[-1]) for path in (run / "checkpoints").iterdir())
    assert kept == [2, 3, 4, 7]


def test_the_command_lists_before_it_deletes(root: Path, command_line) -> None:
    for more, there in (([], True), (["--delete"], False)):
        status, out, _ = command_line("runs", "prune", "--runs", root, *more)
        assert (status, "finished no iteration" in out) == (0, True)
        assert (root / "never").exists() is there
    status, _, error = command_line("runs", "prune", "--runs", root / "run", "--delete")
    assert (status, "no folder at" in error) == (2, True), "a mistyped folder holds nothing either"
