"""What `runs prune` takes away, and what it must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.prune import leftovers, prune
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


def test_the_command_lists_before_it_deletes(root: Path, command_line) -> None:
    for more, there in (([], True), (["--delete"], False)):
        status, out, _ = command_line("runs", "prune", "--runs", root, *more)
        assert (status, "finished no iteration" in out) == (0, True)
        assert (root / "never").exists() is there
    status, _, error = command_line("runs", "prune", "--runs", root / "run", "--delete")
    assert (status, "no folder at" in error) == (2, True), "a mistyped folder holds nothing either"
