"""Workers that sample and train: both roles in one process, on one network.

Sampling reads the very parameters that training changes, so nothing is sent when weights are
published: the workers' digests are compared, and the ticket says what they sample under. All units
of an iteration are therefore sampled before its first update. A unit is sampled where it will be
trained, and its trajectory stays there, unless an idle worker takes it over. A lost worker is a
lost learner rank.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ray import ObjectRef

from flowgrpo_ray.cluster.actors import Calls, LearnerLostError, RunOnRay
from flowgrpo_ray.cluster.learner_group import Contribution, LearnerGroup, LearnerRank
from flowgrpo_ray.cluster.pictures import encode_on
from flowgrpo_ray.cluster.rollout import RolloutWorker
from flowgrpo_ray.cluster.samplers import IN_FLIGHT, Pool, Waiting, Worker
from flowgrpo_ray.common.types import (
    Condition,
    Float32,
    Float64,
    Images,
    MicrobatchStats,
    Parallel,
    Request,
    StepStats,
    Trajectory,
    WeightsTicket,
    WorkUnit,
)
from flowgrpo_ray.spec.training import TrainingSpec


@dataclass(frozen=True)
class Kept:
    """In place of a trajectory: the worker that sampled it has it."""

    unit: Hashable


class ColocatedWorker(RolloutWorker, LearnerRank):
    """One process of the group."""

    masters = True

    def __init__(self, spec: TrainingSpec, rank: int) -> None:
        LearnerRank.__init__(self, spec, rank, "worker")
        if self.device.type == "cpu":
            os.nice(10)  # rewards, which nobody can do without, go first
        self.loaded: WeightsTicket | None = None
        self._kept: dict[Hashable, Trajectory] = {}  # of this iteration

    def join(self, address: tuple[str, int], *asked: int | None) -> Parallel:
        """Meet the other workers, ready to encode."""
        self.join_group(address, *asked)
        self.on_host = self.parallel.sharded
        self.start()
        if self.parallel.sharded and hasattr(self, "learner"):  # the network itself reads prompts
            from flowgrpo_ray.algorithm.parallel import gather_weights

            gather_weights(self.policy.network)
        return self.parallel

    def load_model(self) -> None:
        super().load_model()
        if not hasattr(self, "learner"):
            self.make_learner(self.policy)

    def publish(
        self, version: int, averaged: bool
    ) -> tuple[tuple[WeightsTicket, float], dict[str, Float32]]:
        """As a rank does, but the weights stay where they are."""
        started = time.perf_counter()
        self._kept.clear()
        self.loaded = self.learner.announce(version, averaged=averaged)
        return (self.loaded, time.perf_counter() - started), {}

    def sample(
        self, unit: WorkUnit, ticket: WeightsTicket, *conditions: Condition
    ) -> tuple[Any, Images, float]:
        trajectory, images, seconds = super().sample(unit, ticket, *conditions)
        self._kept[unit.key] = trajectory
        return Kept(unit.key), images, seconds

    def give(self, kept: Kept) -> Trajectory:
        """For another worker, which will train it."""
        return self._kept[kept.unit]

    def accumulate(
        self,
        unit: WorkUnit,
        trajectory: Any,
        advantages: Float32,
        keep: np.ndarray,
        *conditions: Condition,
    ) -> MicrobatchStats:
        if self.spec.objective.samples_with_follower:
            self.loaded = None  # the trained ones come in its place
        return super().accumulate(unit, self._own(trajectory), advantages, keep, *conditions)

    def measure_floor(
        self, unit: WorkUnit, trajectory: Any, *conditions: Condition
    ) -> dict[int, Float64]:
        return super().measure_floor(unit, self._own(trajectory), *conditions)

    def _own(self, trajectory: Trajectory | Kept) -> Trajectory:
        return self.give(trajectory) if isinstance(trajectory, Kept) else trajectory

    def step(self, samples: int, points: int, last: bool) -> StepStats:
        self.loaded = None  # those are changed now
        return super().step(samples, points, last)


class WorkerPool(Pool):
    """The workers as those that sample."""

    kind = "workers"

    def __init__(self, run: RunOnRay, worker_class: type) -> None:
        super().__init__(run, worker_class)
        self._adopted = asyncio.Event()
        self.loaded = asyncio.Event()

    async def start(self) -> None:
        """Wait until the group is up."""
        await self._adopted.wait()

    async def load_models(self) -> None:
        """The group does it."""
        await self.loaded.wait()

    def adopt(self, actors: Sequence[Any], calls: Sequence[Calls]) -> None:
        """Sample on these from now on."""
        both = enumerate(zip(actors, calls, strict=True))
        self.up = {rank: Worker(rank, actor, of) for rank, (actor, of) in both}
        self._held.clear()
        self._adopted.set()

    def publish(self, ticket: WeightsTicket, arrays: ObjectRef) -> None:
        for worker in self.up.values():
            worker.version = ticket.version

    def _load(self, worker: Worker, ticket: WeightsTicket) -> None:
        return None  # they are there

    def _match(self) -> tuple[Worker, Waiting] | None:
        """A unit that its worker has room for; else one that an idle worker takes over."""
        workers = sorted(self.up.values(), key=lambda worker: (worker.in_flight, worker.rank))
        for worker in workers:
            for waiting in self._waiting if worker.in_flight < IN_FLIGHT else ():
                if waiting.index % len(workers) == worker.rank:
                    return worker, waiting
        if self._waiting and workers and not workers[0].in_flight:
            return workers[0], self._waiting[0]
        return None

    def _blame(self, worker: Worker, error: Exception, prompts: Sequence[Request]) -> None:
        raise LearnerLostError(worker.name, error) from error


class WorkerGroup(LearnerGroup):
    """The workers as those that train."""

    kind = "workers"

    def __init__(self, run: RunOnRay, worker_class: type, pool: WorkerPool) -> None:
        super().__init__(run, worker_class)
        self._pool = pool

    async def _start(self) -> None:
        await super()._start()
        pool = self._pool
        if pool.encoded.is_set():  # these come after others
            ranks = enumerate(self.ranks)
            await self._of_all([encode_on(actor, pool.mine(rank)) for rank, actor in ranks])
        else:
            pool.adopt(self.ranks, self.calls)
            await pool.encoded.wait()
        await self._answers([rank.load_model.remote() for rank in self.ranks])
        pool.adopt(self.ranks, self.calls)
        pool.loaded.set()

    def _for_rank(self, rank: int, contribution: Contribution) -> Contribution:
        """With the trajectory itself, if another worker has it."""
        sampled_by = contribution.sampled_by
        if sampled_by == rank:
            return contribution
        moved = self.ranks[sampled_by].give.remote(contribution.trajectory)
        return replace(contribution, trajectory=moved)
