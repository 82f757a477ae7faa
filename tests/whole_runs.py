"""What the tests of whole runs share: their environment, and what a run folder says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from waiting import PATIENCE_S

from flowgrpo_ray.run.checkpoint import list_checkpoints
from flowgrpo_ray.run.tracking import read_rows


def alone() -> dict[str, str]:
    """The environment of a command that starts a Ray of its own, with a token of its own."""
    hidden = ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_ADDRESS")
    return {key: value for key, value in os.environ.items() if key not in hidden}


def trained(run: Path) -> int:
    """The last iteration in the metrics file; -1 before there is any row."""
    path = run / "metrics.jsonl"
    return max((row["iteration"] for row in read_rows(path)), default=-1) if path.exists() else -1


def final_digests(run: Path, iterations: int) -> dict[str, str]:
    """SHA-256 of weights, averages and optimizer state, from the last checkpoint's manifest."""
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert newest.name == f"iteration-{iterations:06d}"
    manifest: dict[str, str] = json.loads((newest / "manifest.json").read_text())
    del manifest["state.json"]  # holds clock times
    return manifest


# Modules of whole runs take turns; the time that a first test waits for its turn counts.
IN_TURNS = [pytest.mark.usefixtures("hardly_disturbed"), pytest.mark.timeout(3000)]
SLOW_IN_TURNS = [*IN_TURNS, pytest.mark.slow]
ITERATIONS = 8
ONE_WORKER = {"cluster.rollout": "{count: 1, cpus: 0.5}"}
SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "iterations": ITERATIONS,
    "sampling.steps": 6,
    "sampling.group_size": 4,
    "sampling.groups": 8,
    "sampling.micro_batch": 8,
    "sampling.window": "{kind: random, length: 2, within: [0, 4]}",
    "evaluation": "{every: 3, steps: 4, prompts: 8, micro_batch: 4, grid: 8}",
    "checkpoint": "{every: 2, keep: 2}",
    "ema": "{decay: 0.9, every: 2}",
    "cluster.cpu_linear": "torch",  # runs are compared bit by bit
}


class Command:
    """``flowgrpo-ray train`` in a process group of its own, as a terminal starts it."""

    program = ("-m", "flowgrpo_ray")
    environment: ClassVar[dict[str, str]] = {}

    def __init__(self, folder: Path, *more: str, resume: bool = False, **changes: str) -> None:
        self.home = folder / "home"
        self.home.mkdir(parents=True, exist_ok=True)
        self.run = folder / "runs" / SMALL["name"]
        self.mark = f"FLOWGRPO_TEST_MARK={os.getpid()}-{time.monotonic_ns()}"
        settings = {**SMALL, **changes}
        command = [sys.executable, *self.program, "train", "tiny-ocr", *more]
        command += ["--runs", str(folder / "runs")]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        key, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [*command, *(["--resume"] if resume else [])],
            env=alone() | self.environment | {"HOME": str(self.home), key: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def trained(self) -> int:
        return trained(self.run)

    def wait_for(self, iteration: int) -> None:
        self.wait_until(lambda: self.trained() >= iteration)

    def wait_until(self, true: Callable[[], bool], pause: float = 0.02) -> None:
        end = time.monotonic() + PATIENCE_S
        while not true():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                pytest.fail(f"ended too early or stuck:\n{self.process.communicate()[0]}")
            time.sleep(pause)

    def signal_group(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def lose(self, moment: str, number: int) -> None:
        """Send a signal to a process of the run in the moment that its name says."""
        found: list[int] = []

        def caught() -> bool:
            if not found:
                actor = moment.rpartition(".")[0] or moment
                found.extend(p.pid for p in self.processes() if actor in p.title)
            for pid in found:
                try:
                    if moment in Path(f"/proc/{pid}/cmdline").read_bytes().decode():
                        os.kill(pid, number)
                        return True
                except (ProcessLookupError, FileNotFoundError):
                    found.clear()
            return False

        self.wait_until(caught, pause=0)

    def finish(self, status: int = 0) -> str:
        output = self.process.communicate(timeout=PATIENCE_S)[0]
        assert self.process.returncode == status, output
        assert not self.left_behind(), "processes of the run are still there"
        assert "Traceback" not in output, output
        return output

    def left_behind(self, grace: float = 30) -> list[str]:
        """Processes that inherited this run's environment, and folders that its Ray made, after
        some seconds of grace."""
        end = time.monotonic() + grace
        while found := [p.title for p in self.processes()] + self._folders():
            if time.monotonic() > end:
                break
            time.sleep(0.2)
        return found

    def processes(self) -> Iterator[RunProcess]:
        """Those of this run that there are."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    title = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    yield RunProcess(int(process.name), title[:120])
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue

    def _folders(self) -> list[str]:
        """Temporary folders of this run's Ray sessions, by what their kept logs say."""
        logs = [log.read_text(errors="replace") for log in self.run.glob("logs/*/raylet.out")]
        named = {name for log in logs for name in re.findall(r"/tmp/flowgrpo-\w+", log)}
        return sorted(name for name in named if Path(name).exists())


class Chained(Command):
    """With actors that give digests of what they are given, and with a reward that is as quick."""

    program = ("-c", "import chained; chained.main()")
    environment: ClassVar[dict[str, str]] = {"PYTHONPATH": str(Path(__file__).parent)}

    def __init__(self, folder: Path, *more: str, resume: bool = False, **changes: str) -> None:
        rewards = {"rewards": "{ocr: {reward: 'reward_samples:Probe'}}"}
        super().__init__(folder, *more, resume=resume, **rewards | changes)


@dataclass(frozen=True)
class RunProcess:
    """A process, and what it says it does: Ray writes the method that an actor is in."""

    pid: int
    title: str
