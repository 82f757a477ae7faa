"""SIGINT and SIGTERM in any moment of a run's life, and what is left then."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import PATIENCE_S
from whole_runs import IN_TURNS, Chained

from flowgrpo_ray.cluster import interrupts
from flowgrpo_ray.cluster.interrupts import Interrupts
from flowgrpo_ray.run.folder import RunFolder

LIFE_S = 25.0  # about that of such a run, on two processors
BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    return now


def signalled() -> None:
    signal.raise_signal(signal.SIGTERM)


def test_before_ray_a_signal_raises_and_later_it_waits(clock: list[float]) -> None:
    before = [signal.getsignal(number) for number in BOTH]
    with Interrupts() as found:
        with pytest.raises(KeyboardInterrupt):
            signalled()
        found.hold()
        clock[0] += 0.9
        signalled()  # within a second it is the same one
        found.check()
        clock[0] += 1
        signalled()
        with pytest.raises(KeyboardInterrupt):
            found.check()
        with pytest.raises(KeyboardInterrupt), found.taken(lambda: None):
            pytest.fail("one waits already")
    assert [signal.getsignal(number) for number in BOTH] == before


def test_a_trainer_takes_each_but_those_of_the_same_second(clock: list[float]) -> None:
    taken: list[float] = []
    with Interrupts() as found:
        found.hold()
        with found.taken(lambda: taken.append(clock[0])):
            for clock[0] in (1, 1.5, 1.9, 2, 4):
                signalled()
        clock[0] = 9
        signalled()  # all is done: it changes nothing
    assert taken == [1, 2, 4]


def test_in_another_thread_it_waits_for_the_run_to_ask() -> None:
    """As in a notebook, whose kernel is interrupted while Ray starts."""
    made: list[Interrupts] = []
    ended: list[str] = []
    begun, interrupted = threading.Event(), threading.Event()

    def run() -> None:
        with Interrupts() as found:
            made.append(found)
            begun.set()
            interrupted.wait()
            try:
                found.hold()
            except KeyboardInterrupt:
                ended.append("before Ray")

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    made[0].interrupt()
    interrupted.set()
    thread.join()
    assert ended == ["before Ray"]


@pytest.mark.parametrize("number", BOTH)
def test_a_command_that_has_hardly_begun(number: int, tmp_path: Path) -> None:
    """As soon as it hears signals: among its imports."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flowgrpo_ray", "train", "tiny-ocr", "--runs", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until_heard(process)
    process.send_signal(number)
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 130, output
    assert output.startswith("interrupted"), output
    assert list(tmp_path.iterdir()) == []


def wait_until_heard(process: subprocess.Popen[str]) -> None:
    """Until the process has a handler for SIGTERM."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        caught = re.search(r"SigCgt:\s*(\w+)", status.read_text())
        if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)


def moments(count: int) -> Iterator[tuple[float, int, bool]]:
    """Seconds after the start, which signal, and whether the whole group gets it."""
    rng = random.Random(count)
    for _ in range(count):
        yield rng.uniform(0, LIFE_S), rng.choice(BOTH), rng.random() < 0.5


class TestMoments:
    pytestmark = IN_TURNS

    @pytest.mark.slow
    @pytest.mark.timeout(9000)
    @pytest.mark.parametrize("count", [2, 100])
    def test_any_moment(self, hardly_disturbed: None, tmp_path: Path, count: int) -> None:
        """The right status, a true sentence, no process, no file but whole ones, resumable."""
        ends: list[int] = []
        for place, (seconds, number, group) in enumerate(moments(count)):
            command = Chained(
                tmp_path / str(place),
                **{"tracking.tensorboard": "false", "cluster.learner.count": "1"},
            )
            wait_until_heard(command.process)
            with_timeout(command.process, seconds)
            if command.process.poll() is None:
                (os.killpg if group else os.kill)(command.process.pid, number)
                if group:  # as `timeout` does it: the process, and its group
                    command.process.send_signal(number)
            output = command.process.communicate(timeout=PATIENCE_S)[0]
            about = (seconds, number, group, output)
            ends.append(command.process.returncode)
            assert ends[-1] in (0, 130), about
            assert not command.left_behind(), about
            assert "Traceback" not in output, about
            assert_true(" ".join(output.split()), command.run, ends[-1])
        assert ends.count(130) > count / 10


def with_timeout(process: subprocess.Popen[str], seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def assert_true(output: str, run: Path, status: int) -> None:
    """What is said of the run is what its folder holds; a resumed one would begin there."""
    folder = RunFolder(run)
    saved = folder.latest()
    done = saved[1].iteration if saved else 0
    if status == 0:
        finished = re.search(r"(\d+) iterations, [\d,]+ images", output)
        stopped = re.search(r"stopped after iteration (\d+), saved", output)
        told = finished or stopped
        assert told is not None, output
        assert int(told[1]) == done
    elif done:
        assert f"saved is iteration {done}, continue with" in output
    else:
        assert "interrupted" in output
        assert "saved is" not in output
    if run.exists():
        assert not list(run.rglob("*.part*"))
        RunFolder.claim(run.parent, folder.read_spec(), resume=True).release()
