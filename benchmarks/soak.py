"""Hours of training under a kill a minute, beside a run that nobody disturbs.

Two runs of `flowgrpo-ray train tiny-ocr` at once. Every --period seconds a rollout worker, a
learner rank or a reward replica of the first, drawn by the seed, gets SIGKILL or SIGSTOP (with
--driver also its driver, which is then started again with --resume). After --minutes both are
stopped. As far as both came, they must have written the same metrics, digests of the weights among
them. The memory of every process is sampled all the while: how much it grows per hour.

    .venv/bin/python benchmarks/soak.py [--minutes 120] [--period 60] [--driver] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import harness
import numpy as np
import psutil

from flowgrpo_ray.run.tracking import read_rows

MARK = "FLOWGRPO_SOAK"  # in the environment of all processes of a run
KINDS = {  # by what a command line holds
    "RolloutWorker": "rollout worker",
    "LearnerRank": "learner rank",
    "ray::ServeReplica:reward-": "reward replica",
    "ray::ServeController": "Serve controller",
    "ray::": "other actors",
    "gcs_server": "gcs_server",
    "raylet/raylet": "raylet",
    "flowgrpo_ray train": "driver",
    "": "Ray's agents, janitor",
}
VICTIMS = ("rollout worker", "learner rank", "reward replica")
YOUNG = 120.0  # seconds in which a process still loads and warms up
SETTINGS = [
    # Two replicas of each reward: with one, its calls could not be repeated elsewhere in time.
    "rewards.ocr={options: {detect: false}, replicas: 2, deadline_s: 10, retries: 5}",
    "rewards.sign_colour={weight: 0, replicas: 2, deadline_s: 10, retries: 5}",
    "cluster.hang_timeout_s=20",
    "checkpoint.every=5",
    "tracking.tensorboard=false",
]
SHARED = Path("/dev/shm")


@dataclass
class Sample:
    """What one process, or the shared memory, held at a time."""

    seconds: float  # since the run began
    kind: str
    process: str  # tells processes apart
    bytes: int


@dataclass
class Run:
    """``flowgrpo-ray train``, its processes and their memory."""

    root: Path
    name: str
    iterations: int
    settings: list[str]
    began: float = field(default_factory=time.monotonic)
    memory: list[Sample] = field(default_factory=list)

    def start(self, *, resume: bool = False) -> None:
        settings = [f"name={self.name}", f"iterations={self.iterations}", *self.settings]
        command = [sys.executable, "-m", "flowgrpo_ray", "train", "tiny-ocr"]
        command += ["--runs", str(self.root), *(["--resume"] if resume else [])]
        command += [word for setting in settings for word in ("--set", setting)]
        self.mark = f"{self.root.resolve()}/{self.name}"
        with (self.root / f"{self.name}.log").open("a") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, MARK: self.mark},
                start_new_session=True,
            )

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def trained(self) -> int:
        file = self.folder / "metrics.jsonl"
        return max((row["iteration"] for row in rows_of(file)), default=0)

    def processes(self) -> dict[str, list[psutil.Process]]:
        """All that there are of this run, by kind."""
        found = defaultdict(list)
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    title = " ".join(process.cmdline())
                    found[kind_of(title)].append(process)
        return found

    def weigh(self) -> None:
        """Sample the memory that each process has for itself alone, and what all share."""
        now = self.seconds
        for kind, processes in self.processes().items():
            for process in processes:
                with suppress(psutil.Error):
                    age = time.time() - process.create_time()
                    if age > YOUNG:
                        key = f"{process.pid}/{process.create_time()}"
                        self.memory.append(Sample(now, kind, key, process.memory_full_info().uss))
        disk = os.statvfs(SHARED)
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        self.memory.append(Sample(now, str(SHARED), "", used))

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def end(self, within: float) -> int | None:
        """Have it finish its iteration and save; its status, 0 if all went well."""
        if self.ended:
            return self.process.returncode or -1  # it was to train for ever
        self.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(within)
        return self.process.returncode

    def clear(self, grace: float = 20) -> list[str]:
        """Kill what is left of it after some seconds of grace; what that was."""
        deadline = time.monotonic() + grace
        while (found := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        for process in [p for processes in found.values() for p in processes]:
            with suppress(psutil.Error):
                process.kill()
        return sorted(found)


def kind_of(title: str) -> str:
    """Of a process, by its command line or what Ray has put in its place."""
    return next(kind for part, kind in KINDS.items() if part in title)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return read_rows(file) if file.exists() else []


def strike(run: Run, draw: random.Random, kinds: Iterable[str]) -> dict[str, Any] | None:
    """Kill or stop a process of the run; ``None`` where there is none of the kind drawn."""
    kind = draw.choice(list(kinds))
    number = draw.choice((signal.SIGKILL, signal.SIGSTOP))
    candidates = sorted(run.processes().get(kind, []), key=lambda process: process.pid)
    if not candidates:
        return None
    victim = draw.choice(candidates)
    event = {"seconds": round(run.seconds, 1), "iteration": run.trained(), "kind": kind}
    if kind == "driver":
        number = signal.SIGKILL
        run.process.kill()
        run.process.wait()
        left = run.clear(60)
        if left:
            raise SystemExit(f"left behind by a killed driver: {', '.join(left)}")
        run.start(resume=True)
    else:
        victim.send_signal(number)
    return {**event, "signal": number.name}


def train(run: Run, peaceful: Run, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Both for ``--minutes`` or until one ends, the first one under kills; what was struck."""
    draw, struck, last, weighed = random.Random(arguments.seed), [], 0.0, 0.0
    kinds = (*VICTIMS, "driver") if arguments.driver else VICTIMS
    run.start()
    peaceful.start()
    while run.seconds < 60 * arguments.minutes and not (run.ended or peaceful.ended):
        if run.seconds - last > arguments.period and run.trained():
            last = run.seconds
            if event := strike(run, draw, kinds):
                struck.append(event)
                print(json.dumps(event), flush=True)
        if run.seconds - weighed > arguments.every:
            weighed = run.seconds
            run.weigh()
            peaceful.weigh()
        time.sleep(0.5)
    return struck


def growth(memory: Iterable[Sample]) -> tuple[float, float]:
    """Bytes per hour, as a line through each process's own samples, and its standard error."""
    by_process = defaultdict(list)
    for sample in memory:
        by_process[sample.process].append((sample.seconds / 3600, sample.bytes))
    centred = [np.array(pairs) - np.mean(pairs, axis=0) for pairs in by_process.values()]
    hours, sizes = np.concatenate(centred).T
    freedom = len(hours) - len(by_process) - 1
    if freedom < 1 or not hours.any():
        return float("nan"), float("nan")
    slope = float(hours @ sizes / (hours @ hours))
    rest = sizes - slope * hours
    return slope, float(np.sqrt(rest @ rest / freedom / (hours @ hours)))


def memory_rows(run: Run) -> list[dict[str, Any]]:
    by_kind = defaultdict(list)
    for sample in run.memory:
        by_kind[sample.kind].append(sample)
    found = []
    for kind, samples in by_kind.items():
        slope, error = growth(samples)
        size = median(sample.bytes for sample in samples)
        found.append(
            {
                "kind": kind,
                "processes": len({sample.process for sample in samples}),
                "samples": len(samples),
                "bytes": size,
                "bytes_per_hour": slope,
                "standard_error": error,
                # More than noise, and more than a twentieth of its size in an hour.
                "grows": slope > max(2 * error, size / 20),
            }
        )
    return sorted(found, key=lambda row: -row["bytes"])


def report(run: Run, rows: list[dict[str, Any]]) -> None:
    print(f"{run.name}: {run.trained()} iterations in {run.seconds / 60:.1f} minutes")
    curve = [row for row in rows_of(run.folder / "metrics.jsonl") if row["kind"] == "eval"]
    marks = curve[:: max(1, len(curve) // 8)]
    print(
        "held-out ocr",
        ", ".join(f"{r['iteration']}: {r['rewards']['ocr']['mean']:.3f}" for r in marks),
    )
    mega = 1e-6
    harness.table(
        ("memory of", "processes", "samples", "MB", "MB per hour", "+-", ""),
        [
            (
                row["kind"],
                row["processes"],
                row["samples"],
                f"{row['bytes'] * mega:.0f}",
                f"{row['bytes_per_hour'] * mega:+.1f}",
                f"{row['standard_error'] * mega:.1f}",
                "grows" if row["grows"] else "flat",
            )
            for row in rows
        ],
    )


def same(run: Run, peaceful: Run) -> tuple[int, bool]:
    """How many rows of metrics both runs have, and whether these are equal, byte for byte."""
    files = [(each.folder / "metrics.jsonl").read_bytes() for each in (run, peaceful)]
    rows = min(file.count(b"\n") for file in files)
    first, second = (file.splitlines()[:rows] for file in files)
    return rows, first == second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--period", type=float, default=60, help="seconds between two kills")
    parser.add_argument("--every", type=float, default=15, help="seconds between memory samples")
    parser.add_argument("--driver", action="store_true", help="kill the driver as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runs", type=Path, help="default: runs/soak-TIME")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    root = arguments.runs or Path("runs") / time.strftime("soak-%Y%m%d-%H%M%S")
    root.mkdir(parents=True)
    settings = [*SETTINGS, *arguments.set]
    disturbed, peaceful = (Run(root, name, 10**6, settings) for name in ("disturbed", "peaceful"))
    both = (disturbed, peaceful)
    try:
        struck = train(disturbed, peaceful, arguments)
        failed = [run.name for run in both if run.end(within=300) != 0]
        left = disturbed.clear()
    finally:
        for run in both:
            run.clear(grace=0)
    memory = {run.name: memory_rows(run) for run in both}
    for run in both:
        report(run, memory[run.name])
    rows, equal = same(disturbed, peaceful)
    print(f"{len(struck)} processes struck; left behind: {left or 'nothing'}")
    print(f"{rows} rows of metrics that both have are {'equal' if equal else 'NOT EQUAL'}")
    for name in failed:
        print(f"did not end well: see {root / name}.log")
    harness.save(
        arguments.json,
        {
            "minutes": arguments.minutes,
            "struck": struck,
            "rows": rows,
            "equal": equal,
            "left": left,
            "failed": failed,
            "iterations": {run.name: run.trained() for run in both},
            "memory": memory,
        },
    )
    if left or failed or not equal:
        sys.exit(1)


if __name__ == "__main__":
    main()
