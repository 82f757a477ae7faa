"""The driver's side of the rollout workers: which there are, and who samples what.

Units go to whichever worker is free, those planned first go first; results do not depend on it. A
worker loads the weights of a unit's ticket right before the first unit that needs them, and answers
with the digest of what it loaded. One that dies, hangs or goes away with its machine is replaced,
and its units are sampled again: a unit is a pure function, so only time is lost.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray import ObjectRef
from ray.exceptions import ObjectLostError, RayActorError
from ray.util.placement_group import PlacementGroup

from flowgrpo_ray.cluster.actors import (
    LOST,
    ActorGroup,
    Calls,
    HangError,
    LearnerLostError,
    Losses,
    seen,
)
from flowgrpo_ray.cluster.rollout import RolloutWorker
from flowgrpo_ray.common.errors import ClusterError, ContractError
from flowgrpo_ray.common.types import WeightsTicket, WorkUnit
from flowgrpo_ray.run.ledger import Ledger
from flowgrpo_ray.serving.ray_private import actor_id
from flowgrpo_ray.spec.training import TrainingSpec

IN_FLIGHT = 2  # units given to a worker at once, so that it never waits for the driver
KEPT = 3  # published weights that can still be asked for: of training, its past, the averaged


@dataclass(frozen=True)
class Sampled:
    """A sampled unit: references that stay in the object store, and the seconds it took."""

    trajectory: ObjectRef
    images: ObjectRef
    conditions: Sequence[ObjectRef]  # of its distinct prompts, in order
    seconds: float


@dataclass(eq=False)
class Worker:
    """One rollout worker, as the driver sees it."""

    rank: int
    actor: Any
    calls: Calls
    in_flight: int = 0  # units that it was given
    ticket: WeightsTicket | None = None  # of the weights that it was last told to load
    loading: asyncio.Task[None] | None = None
    version: int | None = None  # of the weights that it holds

    @property
    def name(self) -> str:
        return self.calls.name


@dataclass(order=True)
class Waiting:
    """A unit that waits for a worker; those of earlier iterations go first."""

    iteration: int
    turn: int
    worker: asyncio.Future[Worker] = field(compare=False)


class RolloutPool(ActorGroup):
    """``cluster.rollout.count`` workers, or up to ``max_count`` while the cluster has room."""

    kind = "rollout"

    def __init__(
        self,
        spec: TrainingSpec,
        group: PlacementGroup,
        ledger: Ledger,
        losses: Losses,
        worker_class: type = RolloutWorker,
    ) -> None:
        super().__init__(spec, group, ledger, losses, worker_class)
        self.up: dict[int, Worker] = {}  # by rank
        self._weights: dict[WeightsTicket, ObjectRef] = {}
        self._encoder: dict[str, int] = {}  # the rank that encoded a prompt
        self._held: dict[str, ObjectRef] = {}  # conditions of this iteration's prompts
        self._waiting: list[Waiting] = []
        self._turns = itertools.count()
        self._starting: dict[int, asyncio.Task[None]] = {}
        self._none_up: asyncio.TimerHandle | None = None
        self._failure: Exception | None = None  # why there is no further worker

    # --- workers come and go

    async def start(self) -> None:
        """Have ``count`` workers load the model; further ones join when they are up."""
        count, most = self.actors.count, self.actors.most
        needed = [self._begin(rank) for rank in range(count)]
        for rank in range(count, most):
            self._begin(rank)
        await self._ready("rollout workers", needed)

    def _begin(self, rank: int) -> asyncio.Task[None]:
        """Bring a worker up in the background."""
        task = self._starting[rank] = asyncio.create_task(self._bring_up(rank))
        task.add_done_callback(self._began)
        return task

    def _began(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            assert isinstance(error, Exception)
            self._fail(error)

    async def _bring_up(self, rank: int) -> None:
        """Until it is up: a worker that is lost before is replaced as well."""
        cluster = self.spec.cluster
        bundle = cluster.learner.count + rank if rank < cluster.rollout.count else None
        while rank not in self.up:
            worker = Worker(rank, *await self._launch(rank, bundle))
            try:
                await worker.actor.start.remote()
                mine = [text for text, of in self._encoder.items() if of == rank]
                await worker.actor.encode.remote(mine)
            except LOST as error:
                self._lost(worker.name, worker.actor, error)
            else:
                self.up[rank] = worker
        del self._starting[rank]
        self._ledger.set_count("rollout", len(self.up))
        if self._none_up:
            self._none_up.cancel()
        self._dispatch()

    def _lose(self, worker: Worker, error: Exception) -> None:
        """Replace a worker that is dead or hangs."""
        if self.up.get(worker.rank) is not worker:
            return  # known already, from another of its calls
        del self.up[worker.rank]
        self._lost(worker.name, worker.actor, error)
        self._ledger.set_count("rollout", len(self.up))
        self._begin(worker.rank)
        if not self.up:
            seconds = self.spec.cluster.ready_timeout_s
            self._none_up = asyncio.get_running_loop().call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        seconds = self.spec.cluster.ready_timeout_s
        self._fail(
            ClusterError(
                f"no rollout worker is left, and none came back within cluster.ready_timeout_s = "
                f"{seconds:g} s: ray status says what waits for resources. Continue from the last "
                "checkpoint with --resume when there are machines again"
            )
        )

    def _fail(self, error: Exception) -> None:
        """Whoever waits for a worker gets the error; so does whoever asks for one later."""
        self._failure = error
        while self._waiting:
            waiting = heapq.heappop(self._waiting)
            if not waiting.worker.done():
                waiting.worker.set_exception(error)

    def _blame(self, worker: Worker, error: Exception, texts: Sequence[str]) -> None:
        """Find out who was lost when a call to ``worker`` failed: it may be another one, which was
        to give the conditions of ``texts``."""
        for text in texts:
            self._held.pop(text, None)
        cause = getattr(error, "cause", error)
        if isinstance(cause, RayActorError):
            lost = worker
            if cause.actor_id not in (None, actor_id(worker.actor)):
                lost = next(
                    (w for w in self.up.values() if actor_id(w.actor) == cause.actor_id), None
                )
            if lost:  # else it is being replaced already
                self._lose(lost, cause)
        elif isinstance(error, HangError):
            self._lose(worker, error)
        else:  # objects that went away with their machine
            self._losses.add(f"an object that {worker.name} needs", error)

    # --- prompts

    async def sigmas(self, *steps: int) -> list[tuple[float, ...]]:
        """The model's noise levels for each number of steps."""
        worker = self.up[min(self.up)]
        return list(await asyncio.gather(*(worker.actor.sigmas.remote(n) for n in steps)))

    async def encode(self, prompts: Sequence[str]) -> None:
        """Every new prompt once, into the cache of the machine of the worker that does it."""
        ranks = sorted(self.up)
        share = -(-len(prompts) // len(ranks))
        parts = {rank: prompts[i * share : (i + 1) * share] for i, rank in enumerate(ranks)}
        self._encoder = {text: rank for rank, texts in parts.items() for text in texts}
        calls = [self.up[rank].actor.encode.remote(list(texts)) for rank, texts in parts.items()]
        await asyncio.gather(*calls)

    def hold(self, prompts: Sequence[str]) -> None:
        """Have the conditions of these prompts read, and let go of others."""
        self._held = {text: ref for text, ref in self._held.items() if text in prompts}
        self.conditions(prompts)

    def conditions(self, prompts: Sequence[str]) -> list[ObjectRef]:
        """References to the conditions of encoded prompts, each read by the worker that has it; by
        another one while that one is away."""
        by_worker: dict[Worker, list[str]] = {}
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._held:
                reader = self.up.get(self._encoder[prompt]) or self.up[min(self.up)]
                by_worker.setdefault(reader, []).append(prompt)
        for worker, mine in by_worker.items():
            made = worker.actor.conditions.options(num_returns=len(mine)).remote(mine)
            self._held |= zip(mine, made if len(mine) > 1 else [made], strict=True)
        return [self._held[prompt] for prompt in prompts]

    # --- weights and units

    def publish(self, ticket: WeightsTicket, arrays: ObjectRef) -> None:
        """Keep weights for the workers that will need them."""
        self._weights.pop(ticket, None)
        self._weights[ticket] = arrays
        for old in list(self._weights)[:-KEPT]:
            del self._weights[old]

    async def sample(self, unit: WorkUnit, ticket: WeightsTicket, texts: Sequence[str]) -> Sampled:
        """Sample one unit under published weights; ``texts`` are its distinct prompts, in order."""
        while True:
            worker = await self._take(unit)
            try:
                return await self._sample_on(worker, unit, ticket, texts)
            except (*LOST, HangError) as error:
                self._blame(worker, error, texts)
            finally:
                self._give_back(worker)

    async def _sample_on(
        self, worker: Worker, unit: WorkUnit, ticket: WeightsTicket, texts: Sequence[str]
    ) -> Sampled:
        conditions = self.conditions(texts)
        if worker.ticket != ticket:
            worker.ticket = ticket
            call = worker.actor.load.remote(ticket, self._weights[ticket])
            worker.loading = asyncio.create_task(self._loaded(worker, ticket, call))
            worker.loading.add_done_callback(seen)
        assert worker.loading is not None
        trajectory, images, seconds = worker.actor.sample.options(num_returns=3).remote(
            unit, ticket, *conditions
        )
        sampled = asyncio.ensure_future(worker.calls.answer("sample", seconds, float))
        sampled.add_done_callback(seen)
        try:
            await asyncio.shield(worker.loading)  # where both fail, this is why
            return Sampled(trajectory, images, conditions, await sampled)
        finally:
            sampled.cancel()

    async def _loaded(self, worker: Worker, ticket: WeightsTicket, answer: ObjectRef) -> None:
        """Contract: the worker holds exactly the published weights, or the run stops."""
        try:
            found, _ = await worker.calls.answer("load", answer, lambda answered: answered[1])
        except ObjectLostError as error:  # the learner that published them went away
            raise LearnerLostError("learner-0", error) from error
        if found != ticket.digest:
            raise ContractError(
                f"{worker.name} loaded weights with digest {found}; version {ticket.version} was "
                f"published with {ticket.digest}"
            )
        worker.version = ticket.version

    async def _take(self, unit: WorkUnit) -> Worker:
        """A worker with room."""
        if self._failure:
            raise self._failure
        found: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, Waiting(unit.iteration, next(self._turns), found))
        self._dispatch()
        try:
            return await found
        except asyncio.CancelledError:
            if found.done() and not found.cancelled() and not found.exception():
                self._give_back(found.result())
            raise

    def _dispatch(self) -> None:
        """Give the workers with room to the units that wait."""
        while self._waiting and self.up:
            worker = min(self.up.values(), key=lambda w: (w.in_flight, w.rank))
            if worker.in_flight == IN_FLIGHT:
                return
            found = heapq.heappop(self._waiting).worker
            if not found.done():
                worker.in_flight += 1
                found.set_result(worker)

    def _give_back(self, worker: Worker) -> None:
        worker.in_flight -= 1
        self._dispatch()
