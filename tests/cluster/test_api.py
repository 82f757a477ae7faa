"""Training from Python."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

import flowgrpo_ray
from flowgrpo_ray.cluster import run as running
from flowgrpo_ray.cluster.api import train
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.spec.file import dump_spec, load_spec

OVERRIDES = ["iterations=7", "seed=3"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What was to be trained, in which thread; two rows are written, and the run goes on until it
    is interrupted, if it ever is."""
    calls: list[dict[str, Any]] = []

    def trained(spec: Any, root: Path, **given: Any) -> running.Outcome:
        interrupted = threading.Event()
        given["begun"](interrupted.set)
        given["seen"]("timings.jsonl", {"kind": "train", "iteration": 0})
        for iteration in (1, 2):
            given["seen"]("metrics.jsonl", {"kind": "train", "iteration": iteration})
        given["seen"]("metrics.jsonl", {"kind": "eval", "iteration": 2})
        thread = threading.current_thread() is threading.main_thread()
        calls.append({"spec": spec, "root": root, "main": thread, "stopped": interrupted.is_set()})
        folder = root / spec.name
        folder.mkdir(parents=True)
        (folder / "spec.yaml").write_text(dump_spec(spec))
        return running.Outcome(folder, {}, stopped=interrupted.is_set())

    monkeypatch.setattr(running, "train", trained)
    return calls


@pytest.mark.parametrize("kind", ["name", "mapping", "spec", "file"])
def test_a_spec_is_given_in_any_form(kind: str, asked: Any, tmp_path: Path) -> None:
    spec = load_spec("tiny-ocr")
    file = tmp_path / "a.yaml"
    file.write_text(dump_spec(spec))
    forms = {"name": "tiny-ocr", "mapping": spec.model_dump(mode="json"), "spec": spec}
    run = train(forms.get(kind, file), OVERRIDES, runs=tmp_path / "runs", quiet=True)
    assert isinstance(run, flowgrpo_ray.Run)
    assert asked[0]["spec"] == run.spec == load_spec("tiny-ocr", OVERRIDES)
    assert asked[0]["root"] == tmp_path / "runs"
    with pytest.raises(SpecError, match="unknown key; did you mean 'iterations'"):
        train(forms.get(kind, file), ["iteration=7"], quiet=True)


def test_functions_see_each_row_and_one_may_end_the_run(asked: Any, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    def iterated(row: Any) -> bool:
        seen.append((row["kind"], row["iteration"]))
        return row["iteration"] < 1

    train(
        "tiny-ocr",
        runs=tmp_path,
        quiet=True,
        on_iteration=iterated,
        on_evaluation=lambda row: seen.append((row["kind"], row["iteration"])),
    )
    assert seen == [("train", 1), ("train", 2), ("eval", 2)]
    assert (asked[0]["stopped"], asked[0]["main"]) == (True, True)


def test_a_loop_that_runs_already_is_no_hindrance(asked: Any, tmp_path: Path) -> None:
    async def cell() -> None:
        train("tiny-ocr", runs=tmp_path, quiet=True)

    asyncio.run(cell())
    assert (asked[0]["stopped"], asked[0]["main"]) == (False, False)


@pytest.mark.slow
def test_a_run_in_a_notebook_ends_when_a_function_says_so_and_goes_on(tmp_path: Path) -> None:
    """In a process of its own, under a running loop: stopped after 2 of 4 iterations, resumed."""
    program = f"""
        import asyncio, json, flowgrpo_ray
        SMALL = {["iterations=4", "evaluation.prompts=4", "sampling.groups=4"]!r}
        async def cell():
            seen = []
            def iterated(row):
                seen.append(row["iteration"])
                return row["iteration"] < 2
            run = flowgrpo_ray.train("tiny-ocr", SMALL, runs="{tmp_path}", on_iteration=iterated)
            first = [row["iteration"] for row in run.rows("train")], run.checkpoints
            flowgrpo_ray.train("tiny-ocr", SMALL, runs="{tmp_path}", resume=True, quiet=True)
            last = [row["iteration"] for row in run.rows("train")], run.checkpoints
            drawn = run.sample(['red sign "123"'], steps=2).shape, run.samples().images.shape
            print(json.dumps([seen, first, last, drawn, run.summary["iterations"]]))
        asyncio.run(cell())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [
        [1, 2],
        [[1, 2], [2]],
        [[1, 2, 3, 4], [2, 4]],
        [[1, 32, 48, 3], [4, 32, 48, 3]],
        4,
    ]
