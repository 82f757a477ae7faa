"""Actors that take fixed times instead of computing: to time the driver, not the model.

They stand in for rollout workers, learner ranks and a reward in the real driver, on real Ray and
Serve. How long each call takes comes from the environment, which every process of a private cluster
inherits: `set_times` before Ray starts.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import harness
import numpy as np

from flowgrpo_ray.common.types import (
    LearnerState,
    MicrobatchStats,
    Overlong,
    Provenance,
    StepStats,
    Trajectory,
    WeightsTicket,
    WorkUnit,
)

HERE = Path(__file__).parent
VARIABLE = "FLOWGRPO_SIMULATED"
SIDE = 32  # pixels of an image's sides, unless times say otherwise
IDLE_S = 2.0  # in which an idle cluster is listened to
GROUP = 4  # images of a unit, which is one group


def set_times(**seconds: float) -> None:
    """Seconds of a call: sample, score, accumulate; bytes of the published weights; side, the
    pixels of an image's sides."""
    os.environ[VARIABLE] = json.dumps(seconds)
    os.environ["PYTHONPATH"] = str(HERE)  # the actors import this module


def seconds(what: str) -> float:
    return json.loads(os.environ[VARIABLE]).get(what, 0.0)


def work(what: str) -> float:
    time.sleep(seconds(what))
    return seconds(what)


def loopback_bytes() -> int:
    """What all processes of this machine have sent each other through sockets of the network."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


class SimulatedRollout:
    """In place of ``RolloutWorker``."""

    def __init__(self, spec: Any, rank: int) -> None:
        self.draw = np.random.default_rng(rank)
        self.side = int(seconds("side")) or SIDE

    def start(self) -> None: ...

    def load_model(self) -> None: ...

    def sigmas(self, steps: int) -> tuple[float, ...]:
        return tuple(np.linspace(1, 0, steps + 1).tolist())

    def overlong(self, prompts: Sequence[str]) -> Overlong:
        return Overlong(0, 0, {})

    def missing(self, prompts: Sequence[str]) -> list[str]:
        return []

    def conditions(self, prompts: Sequence[str]) -> Any:
        made = [{"text": np.zeros(16, np.float32)} for _ in prompts]
        return made if len(made) > 1 else made[0]

    def load(self, ticket: WeightsTicket, arrays: dict[str, np.ndarray]) -> tuple[str, float]:
        began = time.perf_counter()
        for array in arrays.values():
            array[:: 1 << 10].sum()  # every page is read
        return ticket.digest, time.perf_counter() - began

    def sample(
        self, unit: WorkUnit, ticket: WeightsTicket, *conditions: Any
    ) -> tuple[Trajectory, np.ndarray, float]:
        steps = len(unit.schedule.stochastic_steps)
        latents = np.zeros((unit.batch, steps + 1, 16, self.side // 8, self.side // 8), np.float32)
        images = self.draw.integers(0, 256, (unit.batch, self.side, self.side, 3), np.uint8)
        provenance = Provenance(ticket.version, ticket.digest, unit.batch, "float32", unit.schedule)
        log_probs = np.zeros((unit.batch, steps), np.float32)
        return Trajectory(latents, log_probs, provenance), images, work("sample")


class SimulatedLearner:
    """In place of ``LearnerRank``."""

    def __init__(self, spec: Any, rank: int) -> None: ...

    def address(self) -> str:
        return "nowhere"

    def join(self, address: str) -> None: ...

    def publish(self, version: int, averaged: bool) -> tuple[tuple[WeightsTicket, float], Any]:
        began = time.perf_counter()
        arrays = {"weights": np.ones(max(1, int(seconds("bytes") / 4)), np.float32)}
        return (WeightsTicket(version, str(version)), time.perf_counter() - began), arrays

    def measure_floor(self, *_: Any) -> dict[int, np.ndarray]:
        return {}

    def set_floor(self, floor: Any) -> None: ...

    def tie(self, weight: float) -> None: ...

    def accumulate(
        self, unit: WorkUnit, trajectory: Trajectory, advantages: Any, keep: Any, *conditions: Any
    ) -> MicrobatchStats:
        zero = np.zeros(len(unit.schedule.stochastic_steps))
        return MicrobatchStats(int(keep.sum()), zero, zero, 0, True, 0, {}, work("accumulate"))

    def step(self, samples: int, points: int, last: bool) -> StepStats:
        return StepStats(1.0, 1e-4, 0.0)

    def share(self) -> LearnerState:
        return LearnerState({}, {}, {}, {}, 0)

    def load_state(self, state: LearnerState) -> None: ...


class SimulatedWorker(SimulatedRollout, SimulatedLearner):
    """In place of ``ColocatedWorker``: trajectories and weights stay where they are."""

    def sample(
        self, unit: WorkUnit, ticket: WeightsTicket, *conditions: Any
    ) -> tuple[Any, np.ndarray, float]:
        _, images, worked = super().sample(unit, ticket, *conditions)
        return unit.key, images, worked

    def give(self, kept: Any) -> Any:
        return kept

    def publish(self, version: int, averaged: bool) -> tuple[tuple[WeightsTicket, float], Any]:
        return (WeightsTicket(version, str(version)), 0.0), {}


class SimulatedReward:
    """Mean brightness, after a while."""

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> np.ndarray:
        time.sleep(seconds("score") * len(images) / GROUP)  # calls may come as one batch
        return images.mean(axis=(1, 2, 3), dtype=np.float64).astype(np.float32)


def overrides(units: int, workers: int, replicas: int) -> list[str]:
    """Of tiny-ocr: so many units of one group in an iteration, so many simulated actors."""
    return [
        f"sampling.group_size={GROUP}",
        f"sampling.groups={units}",
        f"sampling.micro_batch={GROUP}",
        "objective={kind: flow_grpo, updates: 1}",
        f"rewards={{sleeps: {{reward: 'simulated:SimulatedReward', replicas: {replicas}, "
        "cpus: 0, golden: false}}",
        "watch={}",
        f"cluster.rollout={{count: {workers}, cpus: 0}}",
        "cluster.learner={count: 1, cpus: 0}",
    ]


def trainer(settings: Sequence[str]) -> AbstractAsyncContextManager[Any]:
    """The real driver with simulated actors, all up, on a private cluster of its own."""
    return harness.trainer(settings, SimulatedRollout, SimulatedLearner, SimulatedWorker)


async def iterate(made: Any, rounds: int) -> list[dict[str, float]]:
    """Of each iteration, after one to warm up: wall seconds, CPU seconds of the driver and of its
    event loop's thread alone, and bytes between processes beyond what an idle cluster sends."""
    await made.iterate(1)
    before = _meters()
    await asyncio.sleep(IDLE_S)
    idle = (loopback_bytes() - before["bytes"]) / IDLE_S
    found = []
    for iteration in range(2, 2 + rounds):
        before = _meters()
        await made.iterate(iteration)
        row = {name: now - before[name] for name, now in _meters().items()}
        row["bytes"] = max(0.0, row["bytes"] - idle * row["wall"])
        found.append(row)
        await asyncio.sleep(0.2)
    return found


def _meters() -> dict[str, float]:
    return {
        "wall": time.perf_counter(),
        "driver_cpu": time.process_time(),
        "loop_cpu": time.thread_time(),
        "bytes": loopback_bytes(),
    }
