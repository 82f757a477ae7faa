"""Training from Python."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from waiting import wait_until

import flowgrpo_ray
from flowgrpo_ray.cluster import run as running
from flowgrpo_ray.cluster.api import POLL_S, _beside_any_loop, train
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.spec.file import dump_spec, load_spec

T = TypeVar("T")
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


class Kernel:
    """A main thread under a running loop, as a notebook's, and the run of its cell."""

    def __init__(self) -> None:
        self.main = threading.get_ident()
        self.interrupts: list[Callable[[], None]] = []  # the run's, once it has begun
        self.interrupted = 0

    def press(self) -> None:
        """Interrupt the kernel; from the run's thread."""
        assert threading.get_ident() != self.main
        signal.pthread_kill(self.main, signal.SIGINT)

    def begin(self) -> None:
        self.interrupts.append(self._interrupt)

    def _interrupt(self) -> None:
        self.interrupted += 1

    def run(self, work: Callable[[], T]) -> T:
        async def cell() -> T:
            return _beside_any_loop(work, self.interrupts)

        before = signal.getsignal(signal.SIGINT)
        try:
            return asyncio.run(cell())
        finally:
            assert signal.getsignal(signal.SIGINT) is before


def test_without_a_loop_a_run_is_in_this_thread() -> None:
    assert _beside_any_loop(threading.get_ident, []) == threading.get_ident()


def test_interrupts_of_a_kernel_reach_the_run_in_its_thread() -> None:
    kernel = Kernel()

    def work() -> str:
        kernel.begin()
        for count in (1, 2):
            kernel.press()
            wait_until(lambda count=count: kernel.interrupted == count, "interrupted", 30)
        return "stopped"

    assert kernel.run(work) == "stopped"


def test_interrupts_before_a_run_has_begun_wait_for_it() -> None:
    """As soon as its thread has: the other has not even seen that it has."""
    kernel = Kernel()

    def work() -> int:
        kernel.press()
        time.sleep(2 * POLL_S)
        kernel.press()
        kernel.begin()
        wait_until(lambda: kernel.interrupted, "interrupted", 30)
        time.sleep(2 * POLL_S)
        return kernel.interrupted

    assert kernel.run(work) == 1


@pytest.mark.parametrize("error", [SpecError("unknown key"), KeyboardInterrupt()])
def test_what_ends_a_run_that_was_interrupted_is_raised(error: BaseException) -> None:
    """Before it has begun, as a mistake in the spec; or a second interrupt, which stops at once."""
    kernel = Kernel()

    def work() -> None:
        kernel.press()
        raise error

    with pytest.raises(type(error)) as raised:
        kernel.run(work)
    assert raised.value is error


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
