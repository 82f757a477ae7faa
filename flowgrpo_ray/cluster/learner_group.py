"""The learner: N ranks that hold one model under FSDP2 and update it together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray import ObjectRef
from ray.util.placement_group import PlacementGroup

from flowgrpo_ray.cluster.actors import launch, set_up_process, within
from flowgrpo_ray.spec import TrainingSpec
from flowgrpo_ray.types import (
    Condition,
    Float32,
    LearnerState,
    MicrobatchStats,
    StepStats,
    Trajectory,
    WeightsTicket,
    WorkUnit,
)

if TYPE_CHECKING:
    from flowgrpo_ray.learner import Learner


class LearnerRank:
    """One process of the group; ``Learner`` with an address book."""

    learner: Learner

    def __init__(self, spec: TrainingSpec, rank: int) -> None:
        self.name = f"learner-{rank}"
        self.device = set_up_process(spec.cluster.learner, self.name, spec.name)
        self.spec, self.rank = spec, rank

    def __repr__(self) -> str:
        return self.name  # what Ray calls this actor in its logs and its dashboard

    def address(self) -> str:
        """Where the ranks meet: this node and a free port of it."""
        import socket

        node = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((node, 0))
            return f"tcp://{node}:{probe.getsockname()[1]}"

    def join(self, address: str) -> None:
        from flowgrpo_ray.learner import Learner, join_group

        join_group(self.rank, self.spec.cluster.learner.count, address, self.device)
        self.learner = Learner(self.spec, self.device)

    def publish(self, version: int, averaged: bool) -> tuple[WeightsTicket, dict[str, Float32]]:
        return self.learner.publish(version, averaged=averaged)

    def accumulate(
        self,
        unit: WorkUnit,
        trajectory: Trajectory,
        advantages: Float32,
        keep: np.ndarray,
        *conditions: Condition,
    ) -> MicrobatchStats:
        by_prompt = dict(zip(unit.distinct_prompts, conditions, strict=True))
        return self.learner.accumulate(unit, trajectory, by_prompt, advantages, keep)

    def measure_floor(
        self, unit: WorkUnit, trajectory: Trajectory, *conditions: Condition
    ) -> float:
        by_prompt = dict(zip(unit.distinct_prompts, conditions, strict=True))
        return self.learner.measure_floor(unit, trajectory, by_prompt)

    def step(self, samples: int, steps: int) -> StepStats:
        return self.learner.step(samples, steps)

    def state(self) -> LearnerState | None:
        state = self.learner.state()
        return state if self.rank == 0 else None

    def load_state(self, state: LearnerState) -> None:
        self.learner.load_state(state)


@dataclass(frozen=True)
class Contribution:
    """One scored micro-batch on its way to the learner."""

    unit: WorkUnit
    trajectory: ObjectRef
    conditions: Sequence[ObjectRef]
    advantages: Float32  # [b]
    keep: np.ndarray  # bool [b]


class LearnerGroup:
    """The driver's side. Unit ``i`` of an update always goes to rank ``i % N``, in plan order."""

    def __init__(self, spec: TrainingSpec, group: PlacementGroup) -> None:
        self.spec = spec
        kind = spec.cluster.learner
        self.ranks: list[Any] = [
            launch(LearnerRank, kind, group, rank, f"learner-{rank}", spec, rank)
            for rank in range(kind.count)
        ]
        self._row: list[Contribution] = []
        self._running: list[ObjectRef] = []

    async def start(self) -> None:
        """Form the process group and load the model; waits until every rank is up."""
        address = await self.ranks[0].address.remote()
        await within(
            self.spec.cluster.ready_timeout_s,
            "learner ranks",
            [rank.join.remote(address) for rank in self.ranks],
        )

    async def publish(
        self, version: int, *, averaged: bool = False
    ) -> tuple[WeightsTicket, ObjectRef]:
        """Publish the weights to sample with; ``averaged`` gives the EMA ones, for evaluation."""
        calls = [r.publish.options(num_returns=2).remote(version, averaged) for r in self.ranks]
        tickets = await asyncio.gather(*(ticket for ticket, _ in calls))
        return tickets[0], calls[0][1]

    async def measure_floor(self, probe: Sequence[Contribution]) -> float:
        """The largest ``|log rho|`` over one freshly sampled micro-batch per rank."""
        calls = [
            rank.measure_floor.remote(p.unit, p.trajectory, *p.conditions)
            for rank, p in zip(self.ranks, probe, strict=True)
        ]
        return max(await asyncio.gather(*calls))

    def accumulate(self, contribution: Contribution) -> None:
        """Queue a micro-batch; a row of one per rank runs together.

        A row without a sample that has a gradient is skipped: on every rank, since ranks compute
        in step.
        """
        self._row.append(contribution)
        if len(self._row) < len(self.ranks):
            return
        row, self._row = self._row, []
        if not any(c.keep.any() for c in row):
            return
        self._running += [
            rank.accumulate.remote(c.unit, c.trajectory, c.advantages, c.keep, *c.conditions)
            for rank, c in zip(self.ranks, row, strict=True)
        ]

    async def step(self, samples: int, steps: int) -> tuple[list[MicrobatchStats], StepStats]:
        """Finish the queued micro-batches and update; their statistics in plan order.

        Ranks compute in step, so a row that is not full is filled with idle copies.
        """
        while self._row:
            last = self._row[-1]
            none = np.zeros_like(last.keep)
            self.accumulate(replace(last, advantages=none.astype(np.float32), keep=none))
        running, self._running = self._running, []
        updates = [rank.step.remote(samples, steps) for rank in self.ranks]
        stats = await asyncio.gather(*running)
        return stats, (await asyncio.gather(*updates))[0]

    async def state(self) -> LearnerState:
        """What a checkpoint holds."""
        return (await asyncio.gather(*(rank.state.remote() for rank in self.ranks)))[0]

    async def load_state(self, state: LearnerState) -> None:
        reference = ray.put(state)
        await asyncio.gather(*(rank.load_state.remote(reference) for rank in self.ranks))
