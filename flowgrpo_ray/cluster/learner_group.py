"""The learner: N ranks that hold one model, replicated or in shards, and update it together."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import RayActorError, RayTaskError

from flowgrpo_ray.cluster.actors import (
    LOST,
    ActorGroup,
    Calls,
    HangError,
    LearnerLostError,
    RunOnRay,
    awaited,
    seen,
    set_up_process,
)
from flowgrpo_ray.common.errors import ContractError
from flowgrpo_ray.common.types import (
    Condition,
    Float32,
    Float64,
    LearnerState,
    MicrobatchStats,
    Parallel,
    StepStats,
    Trajectory,
    WeightsTicket,
    WorkUnit,
)
from flowgrpo_ray.serving.ray_private import actor_id
from flowgrpo_ray.spec.training import TrainingSpec

if TYPE_CHECKING:
    from flowgrpo_ray.algorithm.gate import Floor
    from flowgrpo_ray.algorithm.learner import Learner
    from flowgrpo_ray.policies.base import Policy

DEATH_S = 3.0  # that Ray may take to tell of a dead rank, after another one has failed


class LearnerRank:
    """One process of the group; ``Learner`` with an address book."""

    learner: Learner
    parallel: Parallel  # as all ranks have agreed

    def __init__(self, spec: TrainingSpec, rank: int, name: str = "learner") -> None:
        self.name = f"{name}-{rank}"
        self.device = set_up_process(spec.ranks, self.name, spec.name)
        self.spec, self.rank = spec, rank
        self._listener: socket.socket | None = None  # of rank 0

    def __repr__(self) -> str:
        return self.name  # what Ray calls this actor in its logs and its dashboard

    def address(self) -> tuple[str, int]:
        """Where the ranks meet: a port of this node, at which this rank listens from now on.

        One that is bound only when they join may be taken by then.
        """
        self._listener = socket.create_server((ray.util.get_node_ip_address(), 0))
        return self._listener.getsockname()

    def join(self, address: tuple[str, int], *asked: int | None) -> Parallel:
        """Meet the other ranks and load the model."""
        self.join_group(address, *asked)
        self.make_learner()
        return self.parallel

    def join_group(
        self, address: tuple[str, int], prompts: int | None = None, sources: int | None = None
    ) -> None:
        """Meet the other ranks, and agree how all will hold the network, given how many prompts
        there are and how many images each of them changes."""
        from flowgrpo_ray.algorithm.parallel import agree, join_group

        ranks = self.spec.ranks.count
        join_group(self.rank, ranks, self._listener or address, self.device)
        if ranks == 1:
            self.parallel = Parallel()
            return
        from flowgrpo_ray.estimate.footprint import decide
        from flowgrpo_ray.estimate.gpus import gpu_here

        gpu = gpu_here() if self.device.type == "cuda" else None
        place = ray.get_runtime_context().get_node_id(), gpu and gpu[1] * 2**30
        self.parallel = agree(place, lambda places: decide(self.spec, places, prompts, sources))

    def make_learner(self, policy: Policy | None = None) -> None:
        from flowgrpo_ray.algorithm.learner import Learner

        self.learner = Learner(self.spec, self.device, policy, parallel=self.parallel)

    def publish(
        self, version: int, averaged: bool
    ) -> tuple[tuple[WeightsTicket, float], dict[str, Float32]]:
        """The ticket and busy seconds; of rank 0 the arrays as well."""
        started = time.perf_counter()
        ticket, arrays = self.learner.publish(version, averaged=averaged)
        return (ticket, time.perf_counter() - started), arrays

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
    ) -> dict[int, Float64]:
        by_prompt = dict(zip(unit.distinct_prompts, conditions, strict=True))
        return self.learner.measure_floor(unit, trajectory, by_prompt)

    def set_floor(self, floor: Floor) -> None:
        self.learner.gate.floor = floor

    def tie(self, weight: float) -> None:
        self.learner.tie(weight)

    def step(self, samples: int, points: int, last: bool) -> StepStats:
        return self.learner.step(samples, points, last=last)

    def share(self) -> LearnerState:
        return self.learner.share()

    def load_state(self, state: LearnerState) -> WeightsTicket | None:
        return self.learner.load_state(state)


@dataclass(frozen=True)
class Contribution:
    """One scored micro-batch on its way to the learner."""

    unit: WorkUnit
    trajectory: ObjectRef
    conditions: Sequence[ObjectRef]
    advantages: Float32  # [b]
    keep: np.ndarray  # bool [b]
    sampled_by: int  # rank of the worker


class LearnerGroup(ActorGroup):
    """The driver's side. Unit ``i`` of an update always goes to rank ``i % N``, in plan order.

    Ranks hold what cannot be made again: when one is lost every method raises ``LearnerLostError``,
    and after ``restart`` the group is as it was before any training.
    """

    kind = "learner"

    def __init__(self, run: RunOnRay, rank_class: type) -> None:
        super().__init__(run, rank_class)
        self._asked = (run.prompts, run.sources)
        self.ranks: list[Any] = []
        self.calls: list[Calls] = []
        self._row: list[Contribution] = []
        self._running: list[asyncio.Future[MicrobatchStats]] = []

    async def start(self) -> None:
        """Form the process group and load the model; waits until every rank is up."""
        while True:
            try:
                await self._start()
                return
            except LearnerLostError as lost:
                self._losses.add(lost.name, lost)
                self.kill()

    async def restart(self) -> None:
        """All ranks anew, on whatever machines there are."""
        self.kill()
        await self.start()

    def kill(self) -> None:
        """End every rank: one that lives waits for the dead in a collective call."""
        for rank in self.ranks:
            ray.kill(rank)

    async def _start(self) -> None:
        launched = [await self._launch(rank) for rank in range(self.actors.count)]
        self.ranks = [rank for rank, _ in launched]
        self.calls = [calls for _, calls in launched]
        self._row, self._running = [], []
        address = (await self._answers([self.ranks[0].address.remote()]))[0]
        joined = await self._answers(
            [rank.join.remote(address, *self._asked) for rank in self.ranks]
        )
        self.parallel: Parallel = joined[0]

    async def _answers(self, calls: Sequence[Awaitable[Any]]) -> list[Any]:
        """Of ranks that may still be starting."""
        return (await self._of_all([self._ready("learner ranks", calls)]))[0]

    async def publish(
        self, version: int, *, averaged: bool = False
    ) -> tuple[WeightsTicket, ObjectRef]:
        """Publish the weights to sample with; ``averaged`` gives the EMA ones, for evaluation."""
        calls = [r.publish.options(num_returns=2).remote(version, averaged) for r in self.ranks]
        answers = [
            of.answer("publish", answer, lambda answered: answered[1])
            for of, (answer, _) in zip(self.calls, calls, strict=True)
        ]
        tickets = [ticket for ticket, _ in await self._of_all(answers)]
        if len(set(tickets)) > 1:
            found = ", ".join(f"{self.name_of(n)} {t.digest}" for n, t in enumerate(tickets))
            raise ContractError(
                f"learner ranks hold different weights at version {version}: {found}. They would "
                "train different models: ranks on one kind of device do not come apart"
            )
        return tickets[0], calls[0][1]

    async def measure_floor(self, probe: Sequence[Contribution]) -> list[dict[int, Float64]]:
        """The gate quantities of one freshly sampled micro-batch per rank, by point."""
        here = [self._for_rank(*one) for one in enumerate(probe)]
        answers = [
            of.answer("accumulate", rank.measure_floor.remote(p.unit, p.trajectory, *p.conditions))
            for of, rank, p in zip(self.calls, self.ranks, here, strict=True)
        ]
        return await self._of_all(answers)

    async def set_floor(self, floor: Floor) -> None:
        """Have every rank's gate hold what it sees against ``floor``."""
        calls = zip(self.calls, self.ranks, strict=True)
        await self._of_all([of.answer("load", r.set_floor.remote(floor)) for of, r in calls])

    async def tie(self, weight: float) -> None:
        """Have every rank hold on to the untrained model with this weight from now on."""
        calls = zip(self.calls, self.ranks, strict=True)
        await self._of_all([of.answer("load", r.tie.remote(weight)) for of, r in calls])

    def _for_rank(self, rank: int, contribution: Contribution) -> Contribution:
        """As that rank can take it."""
        return contribution

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
        row = [self._for_rank(*one) for one in enumerate(row)]
        for of, rank, c in zip(self.calls, self.ranks, row, strict=True):
            call = rank.accumulate.remote(c.unit, c.trajectory, c.advantages, c.keep, *c.conditions)
            answer = asyncio.ensure_future(of.answer("accumulate", call, _seconds))
            answer.add_done_callback(seen)
            self._running.append(answer)

    async def step(
        self, samples: int, points: int, *, last: bool
    ) -> tuple[list[MicrobatchStats], StepStats]:
        """Finish the queued micro-batches and update; their statistics in plan order.

        Ranks compute in step, so a row that is not full is filled with idle copies.
        """
        while self._row:
            copied = self._row[-1]
            none = np.zeros_like(copied.keep)
            self.accumulate(replace(copied, advantages=none.astype(np.float32), keep=none))
        running, self._running = self._running, []
        updates = [
            of.answer("step", rank.step.remote(samples, points, last), _seconds)
            for of, rank in zip(self.calls, self.ranks, strict=True)
        ]
        answers = await self._of_all([*running, *updates])
        return answers[: len(running)], answers[len(running)]

    async def shares(self) -> list[LearnerState]:
        """What a checkpoint holds: of each rank its share, as read-only memory of Ray's store."""
        calls = zip(self.calls, self.ranks, strict=True)
        return await self._of_all([of.answer("save", r.share.remote()) for of, r in calls])

    async def load_state(self, state: LearnerState) -> WeightsTicket | None:
        """Go on from a checkpoint; the ticket of the weights that it holds of the iteration before,
        if it holds any."""
        reference = ray.put(state)
        calls = zip(self.calls, self.ranks, strict=True)
        loads = [of.answer("load", r.load_state.remote(reference)) for of, r in calls]
        return (await self._of_all(loads))[0]

    async def _of_all(self, answers: Sequence[Awaitable[Any]]) -> list[Any]:
        """What every rank answers; ``LearnerLostError`` as soon as one is known to be lost."""
        try:
            return await asyncio.gather(*answers)
        except (*LOST, HangError) as error:
            raise LearnerLostError(self._name(error), error) from error
        except RayTaskError as error:  # maybe because another rank died in a collective call
            if dead := await self._dead():
                raise LearnerLostError(self._name(dead), dead) from error
            raise

    async def _dead(self) -> RayActorError | None:
        """What Ray says of a rank that is dead, if one is."""
        if len(self.ranks) == 1:
            return None
        pings = [asyncio.ensure_future(awaited(r.__ray_ready__.remote())) for r in self.ranks]
        await asyncio.wait(pings, timeout=DEATH_S, return_when=asyncio.FIRST_EXCEPTION)
        for ping in pings:
            ping.add_done_callback(seen)
            if ping.done() and isinstance(ping.exception(), RayActorError):
                return cast(RayActorError, ping.exception())
            ping.cancel()
        return None

    def _name(self, error: Exception) -> str:
        """Which rank it was."""
        lost = getattr(getattr(error, "cause", error), "actor_id", None)
        ids = [actor_id(rank) for rank in self.ranks]
        return self.name_of(ids.index(lost)) if lost in ids else "learner"


def _seconds(stats: MicrobatchStats | StepStats) -> float:
    return stats.seconds
