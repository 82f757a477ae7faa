"""Actors without a network, for tests of what is around it: kills, signals, disks, resuming.

What each gives is a digest of all that it was given: a sample of its unit and of the weights, the
weights of every trajectory, advantage and update so far. So whatever is lost, repeated, late or out
of order shows in the last checkpoint, as it would with a network; and a run starts in seconds,
since nothing loads torch.

``python -c "import chained; chained.main()" train ...`` is the command with these actors.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Client, Listener
from typing import Any

import numpy as np

from flowgrpo_ray.common.types import (
    LearnerState,
    MicrobatchStats,
    Overlong,
    Parallel,
    Provenance,
    StepStats,
    Trajectory,
    WeightsTicket,
    WorkUnit,
)

BULK = "FLOWGRPO_TEST_BULK"  # bytes of a checkpoint beside the digests
SAMPLE_S, OTHERS_S = 0.05, 0.02  # of each method: long enough for a signal to meet it
SIDE = 16  # pixels
Arrays = dict[str, np.ndarray]


def main() -> None:
    """The command line of the package."""
    from flowgrpo_ray import cli
    from flowgrpo_ray.cluster import run

    session = run.ray_session

    @contextmanager
    def with_these(*given: Any) -> Iterator[None]:
        with session(*given):
            from flowgrpo_ray.cluster import crew  # not before: Ray reads its token on import

            for name, cls in zip(("rollout", "learner", "workers"), ACTORS, strict=True):
                object.__setattr__(crew.REAL, name, cls)
            yield

    run.ray_session = with_these
    cli.main()


def numbers(*given: object) -> np.ndarray:
    """``[32]`` in 0..255, float32: a digest of what was given, arrays by their bits."""
    total = hashlib.sha256()
    for part in given:
        total.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return np.frombuffer(total.digest(), np.uint8).astype(np.float32)


def ticket_of(version: int, arrays: Arrays) -> WeightsTicket:
    return WeightsTicket(version, numbers(*arrays.values()).astype(np.uint8).tobytes().hex())


def introduce(name: str, run: str) -> None:
    from flowgrpo_ray.cluster import actors  # not before: Ray reads its token on import

    actors.introduce(name, run)


class RolloutWorker:
    loaded: WeightsTicket | None = None

    def __init__(self, spec: Any, rank: int) -> None:
        introduce(f"rollout-{rank}", spec.name)

    def start(self) -> None: ...

    def load_model(self) -> None: ...

    def sigmas(self, steps: int) -> tuple[float, ...]:
        return tuple(np.linspace(1, 0, steps + 1).tolist())

    def overlong(self, prompts: Sequence[str]) -> Overlong:
        return Overlong(0, 0, {})

    def missing(self, prompts: Sequence[str]) -> list[str]:
        return []

    def conditions(self, prompts: Sequence[str]) -> Any:
        made = [{"text": numbers(prompt)} for prompt in prompts]
        return made if len(made) > 1 else made[0]

    def load(self, ticket: WeightsTicket, arrays: Arrays) -> tuple[str, float]:
        time.sleep(OTHERS_S)
        self.loaded = ticket_of(ticket.version, arrays)
        return self.loaded.digest, 0.0

    def sample(
        self, unit: WorkUnit, ticket: WeightsTicket, *conditions: Any
    ) -> tuple[Any, np.ndarray, float]:
        assert self.loaded == ticket
        began = time.perf_counter()
        time.sleep(SAMPLE_S)
        texts = [condition["text"] for condition in conditions]
        rows = [numbers(unit, i, ticket, *texts) for i in range(unit.batch)]
        steps = len(unit.schedule.stochastic_steps)
        latents = np.stack([np.stack([row] * (steps + 1)) for row in rows])
        provenance = Provenance(ticket.version, ticket.digest, unit.batch, "float32", unit.schedule)
        trajectory = Trajectory(latents, np.zeros((unit.batch, steps), np.float32), provenance)
        images = np.zeros((unit.batch, SIDE, SIDE, 3), np.uint8)
        images += np.array([row[0] for row in rows], np.uint8)[:, None, None, None]
        return trajectory, images, time.perf_counter() - began


class LearnerRank:
    """Ranks learn of each other's micro-batches when they step, and of a dead one too."""

    def __init__(self, spec: Any, rank: int) -> None:
        introduce(f"learner-{rank}", spec.name)
        self.rank, self.others = rank, spec.ranks.count - 1
        self.lags = spec.sampling.max_lag > 0
        self.gradient = np.zeros(0)
        self.weights, self.ema = {"chain": numbers(spec.seed)}, {"chain": numbers("ema")}
        self.behaviour: Arrays = {}
        self.version, self.updates = -1, 0

    def address(self) -> Any:
        self.listener = Listener(("127.0.0.1", 0))
        return self.listener.address

    def join(self, address: Any, prompts: int, sources: int) -> Parallel:
        assert prompts > 0
        assert sources == 0
        if self.rank:
            self.links = [Client(address)]
            self.links[0].send(self.rank)
            return Parallel()
        links = [self.listener.accept() for _ in range(self.others)]
        by_rank = {link.recv(): link for link in links}
        self.links = [by_rank[rank] for rank in sorted(by_rank)]
        return Parallel()

    def _of_all(self, mine: np.ndarray) -> list[np.ndarray]:
        """What each rank brings, on every rank."""
        if self.rank:
            self.links[0].send(mine)
            return self.links[0].recv()
        parts = [mine, *(link.recv() for link in self.links)]
        for link in self.links:
            link.send(parts)
        return parts

    def publish(self, version: int, averaged: bool) -> tuple[tuple[WeightsTicket, float], Arrays]:
        arrays = self.ema if averaged else self.weights
        if not averaged:
            self.version, self.behaviour = version, dict(arrays) if self.lags else {}
        return (ticket_of(version, arrays), 0.0), arrays

    def measure_floor(self, *_: Any) -> dict[int, np.ndarray]:
        return {}

    def set_floor(self, floor: Any) -> None: ...

    def tie(self, weight: float) -> None:
        self.gradient = numbers(self.gradient, weight)

    def accumulate(
        self, unit: WorkUnit, trajectory: Any, advantages: Any, keep: Any, *conditions: Any
    ) -> MicrobatchStats:
        began = time.perf_counter()
        time.sleep(OTHERS_S)
        texts = [condition["text"] for condition in conditions]
        made = trajectory.provenance
        given = unit, made, trajectory.latents, advantages, keep, *texts
        self.gradient = numbers(self.gradient, *given)
        sums = self.gradient[: len(unit.points)].astype(np.float64)
        lag = 1e-3 * (self.version - made.weights_version)
        seconds = time.perf_counter() - began
        return MicrobatchStats(int(keep.sum()), sums, sums**2, lag, True, sums[0], {}, seconds)

    def step(self, samples: int, points: int, last: bool) -> StepStats:
        time.sleep(OTHERS_S)
        parts, self.gradient = self._of_all(self.gradient), np.zeros(0)
        self.weights = {"chain": numbers(self.weights["chain"], *parts, samples, points, last)}
        self.updates += 1
        self.ema = {"chain": numbers(self.ema["chain"], self.weights["chain"])}
        return StepStats(float(self.weights["chain"][0]), 1e-4, 0.0)

    def share(self) -> LearnerState:
        time.sleep(OTHERS_S)
        if self.rank:
            return LearnerState({}, {}, {}, {}, self.updates)
        bulk = np.zeros(int(os.environ.get(BULK, "0")) // 4, np.float32)
        return LearnerState(
            weights=self.weights,
            ema=self.ema,
            exp_avg={"bulk": bulk},
            exp_avg_sq={},
            updates=self.updates,
            behaviour=self.behaviour,
            behaviour_version=self.version if self.lags else -1,
        )

    def load_state(self, state: LearnerState) -> WeightsTicket | None:
        self.weights, self.ema, self.updates = state.weights, state.ema, state.updates
        return ticket_of(state.behaviour_version, state.behaviour) if state.behaviour else None


class ColocatedWorker(RolloutWorker, LearnerRank):
    def __init__(self, spec: Any, rank: int) -> None:
        LearnerRank.__init__(self, spec, rank)
        self.kept: dict[Any, Trajectory] = {}

    def publish(self, version: int, averaged: bool) -> tuple[tuple[WeightsTicket, float], Arrays]:
        (self.loaded, _), _ = published = super().publish(version, averaged)
        self.kept.clear()
        return published[0], {}

    def sample(
        self, unit: WorkUnit, ticket: WeightsTicket, *conditions: Any
    ) -> tuple[Any, np.ndarray, float]:
        from flowgrpo_ray.cluster.colocated import Kept

        trajectory, images, seconds = super().sample(unit, ticket, *conditions)
        self.kept[unit.key] = trajectory
        return Kept(unit.key), images, seconds

    def give(self, kept: Any) -> Trajectory:
        return self.kept[kept.unit]

    def accumulate(
        self, unit: WorkUnit, trajectory: Any, advantages: Any, keep: Any, *conditions: Any
    ) -> MicrobatchStats:
        own = trajectory if isinstance(trajectory, Trajectory) else self.give(trajectory)
        return super().accumulate(unit, own, advantages, keep, *conditions)

    def step(self, samples: int, points: int, last: bool) -> StepStats:
        self.loaded = None  # they change now
        return super().step(samples, points, last)


ACTORS = (RolloutWorker, LearnerRank, ColocatedWorker)
