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
from collections.abc import Callable
from itertools import cycle, islice, pairwise
from pathlib import Path

import pytest
from waiting import PATIENCE_S
from whole_runs import IN_TURNS, ITERATIONS, Chained, Command, alone

from flowgrpo_ray.cluster import interrupts
from flowgrpo_ray.cluster.interrupts import Interrupts
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.state import LIVE, read_json
from flowgrpo_ray.spec.file import load_spec

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


WHILE_RAY_ENDS = """
import signal, sys
from pathlib import Path
from flowgrpo_ray.cluster.session import ray_session
from flowgrpo_ray.spec.file import load_spec

heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append("heard"))
with ray_session(load_spec("tiny-ocr"), Path(sys.argv[1])):
    from ray._private.node import Node
    end = Node.kill_all_processes

    def signalled(*given, **named):
        signal.raise_signal(signal.SIGTERM)
        end(*given, **named)
        signal.raise_signal(signal.SIGTERM)

    Node.kill_all_processes = signalled
signal.raise_signal(signal.SIGTERM)
print(heard)
"""


@pytest.mark.slow
def test_while_ray_ends_and_after_it_sigterm_is_ours(
    hardly_disturbed: None, tmp_path: Path
) -> None:
    """Ray's own end gives it back to the system, which ends the process."""
    done = subprocess.run(
        [sys.executable, "-c", WHILE_RAY_ENDS, str(tmp_path)],
        env=alone(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "['heard', 'heard', 'heard']\n"), done.stderr


def wait_until_heard(process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not hears(process):
        time.sleep(0.001)


def hears(process: subprocess.Popen[str]) -> bool:
    """Whether the process has a handler for SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = re.search(r"SigCgt:\s*(\w+)", status)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def staged(*stages: str) -> Callable[[Command], bool]:
    """Whether live.json says that the run is in one of these stages, or past them."""

    def reached(command: Command) -> bool:
        live = read_json(command.run / LIVE)
        return live is not None and (live["state"] != "starting" or live["stage"] in stages)

    return reached


STAGES: dict[str, Callable[[Command], bool]] = {
    "imports": lambda command: hears(command.process),
    "ray starts": staged("starting Ray", "starting learner, rollout workers and rewards"),
    "actors start": staged("starting learner, rollout workers and rewards"),
    "first iterations": lambda command: command.trained() >= 0,
    "last iterations": lambda command: command.trained() >= 4,
    "the end": lambda command: command.trained() >= ITERATIONS,
}


def begin(folder: Path) -> Command:
    return Chained(folder, **{"tracking.tensorboard": "false", "cluster.learner.count": "1"})


def lengths(folder: Path) -> list[float]:
    """Seconds of each stage, in a run that nobody interrupts."""
    command, begun = begin(folder), []
    for reached in STAGES.values():
        wait_for_stage(command, reached)
        begun.append(time.monotonic())
    command.finish()
    return [after - before for before, after in pairwise([*begun, time.monotonic()])]


def wait_for_stage(command: Command, reached: Callable[[Command], bool]) -> None:
    while command.process.poll() is None and not reached(command):
        time.sleep(0.005)


def interrupt(command: Command, stage: str, seconds: float, number: int, *, group: bool) -> int:
    """Send a signal some seconds after a stage began, and check what the run says and leaves: the
    right status, which it gives, a true sentence, no process, no file but whole ones, resumable."""
    wait_for_stage(command, STAGES[stage])
    with_timeout(command.process, seconds)
    if command.process.poll() is None:
        (os.killpg if group else os.kill)(command.process.pid, number)
        if group:  # as `timeout` does it: the process, and its group
            command.process.send_signal(number)
    output = command.process.communicate(timeout=PATIENCE_S)[0]
    status, about = command.process.returncode, (stage, seconds, number, group, output)
    assert status in (0, 130), about
    assert not command.left_behind(), about
    assert "Traceback" not in output, about
    assert_true(" ".join(output.split()), command.run, status)
    return status


class TestMoments:
    pytestmark = IN_TURNS

    @pytest.mark.slow
    @pytest.mark.timeout(9000)
    def test_any_moment(self, hardly_disturbed: None, tmp_path: Path) -> None:
        """FLOWGRPO_TEST_SIGNALS of them, by default 18, as many in each stage of a run."""
        count = int(os.environ.get("FLOWGRPO_TEST_SIGNALS", "18"))
        rng, seconds = random.Random(count), lengths(tmp_path / "whole")
        ends: list[int] = []
        stages = islice(cycle(zip(STAGES, seconds, strict=True)), count)
        for place, (stage, length) in enumerate(stages):
            command = begin(tmp_path / str(place))
            number, group = rng.choice(BOTH), rng.random() < 0.5
            ends.append(interrupt(command, stage, rng.uniform(0, length), number, group=group))
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
        written = folder.spec_file.exists()  # else the signal came before
        spec = folder.read_spec() if written else load_spec("tiny-ocr", [f"name={run.name}"])
        RunFolder.claim(run.parent, spec, resume=True).release()
