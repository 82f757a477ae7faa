"""The driver's side of the actors that sample: who has which prompts' conditions, who samples what.

Results do not depend on who samples a unit: it is a pure function of the weights. What happens when
a worker is lost, and how workers come by their weights, is up to the kind of pool.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray import ObjectRef

from flowgrpo_ray.cluster.actors import LOST, ActorGroup, Calls, HangError, RunOnRay, seen
from flowgrpo_ray.cluster.pictures import Encoding, encode_on, with_files
from flowgrpo_ray.common.types import Overlong, Request, WeightsTicket, WorkUnit

IN_FLIGHT = 2  # units given to a worker at once, so that it never waits for the driver


@dataclass(frozen=True)
class Sampled:
    """A sampled unit: references that stay in the object store, and the seconds it took."""

    trajectory: ObjectRef
    images: ObjectRef
    conditions: Sequence[ObjectRef]  # of its distinct prompts, in order
    seconds: float
    worker: int  # rank of the one that sampled it


@dataclass(eq=False)
class Worker:
    """One that samples, as the driver sees it."""

    rank: int
    actor: Any
    calls: Calls
    in_flight: int = 0  # units that it was given
    ticket: WeightsTicket | None = None  # of the weights that it was last told to load
    loading: asyncio.Task[None] | None = None  # them
    version: int | None = None  # of the weights that it holds

    @property
    def name(self) -> str:
        return self.calls.name


@dataclass(order=True)
class Waiting:
    """A unit that waits for a worker; those of earlier iterations go first."""

    iteration: int
    turn: int
    index: int = field(compare=False)  # of the unit in its plan
    worker: asyncio.Future[Worker] = field(compare=False)


class Pool(ActorGroup):
    """Workers that encode prompts and sample units; those planned first go first."""

    def __init__(self, run: RunOnRay, worker_class: type) -> None:
        super().__init__(run, worker_class)
        self.up: dict[int, Worker] = {}  # by rank
        self.encoded = asyncio.Event()  # are all prompts, so that the model may be loaded
        self._encoder: dict[Request, int] = {}  # of needed prompts: the rank that encodes them
        self._held: dict[Request, ObjectRef] = {}  # conditions of this iteration's prompts
        self._waiting: list[Waiting] = []  # in order
        self._turns = itertools.count()
        self._failure: Exception | None = None  # why there is no further worker

    @abstractmethod
    async def start(self) -> None:
        """Wait until workers are up, ready to encode."""

    @abstractmethod
    async def load_models(self) -> None:
        """Have all load the model, now that prompts are encoded; those that come later do so by
        themselves."""

    @abstractmethod
    def publish(self, ticket: WeightsTicket, arrays: ObjectRef) -> None:
        """Units will be sampled under these weights."""

    @abstractmethod
    def _load(self, worker: Worker, ticket: WeightsTicket) -> asyncio.Task[None] | None:
        """Have a worker take weights over, if it must, before it samples under them."""

    @abstractmethod
    def _blame(self, worker: Worker, error: Exception, prompts: Sequence[Request]) -> None:
        """A call to ``worker`` failed because an actor or object was lost, maybe another one: that
        which gives the conditions of ``prompts``. Raises where its unit cannot be sampled again."""

    # --- prompts

    async def sigmas(self, *steps: int) -> list[tuple[float, ...]]:
        """The model's noise levels for each number of steps."""
        worker = self.up[min(self.up)]
        return list(await asyncio.gather(*(worker.actor.sigmas.remote(n) for n in steps)))

    async def overlong(self, prompts: Sequence[str]) -> Overlong | None:
        """Those that the model reads in part; ``None`` if all workers were lost meanwhile."""
        for worker in list(self.up.values()):
            try:
                return await worker.actor.overlong.remote(prompts)
            except LOST as error:
                self._blame(worker, error, ())
        return None

    async def encode(self, prompts: Sequence[Request], tell: Callable[[int, int], None]) -> int:
        """Every new prompt once, into the cache of the machine of the worker that does it; those
        that are not named are no longer needed. How many were in no cache; meanwhile ``tell`` is
        told how many of them are."""
        self._encoder = {prompt: self._encoder.get(prompt, -1) for prompt in prompts}
        new = [prompt for prompt, rank in self._encoder.items() if rank not in self.up]
        workers = [self.up[rank] for rank in sorted(self.up)]
        shares = [new[i :: len(workers)] for i in range(len(workers))]
        for worker, share in zip(workers, shares, strict=True):
            self._encoder |= dict.fromkeys(share, worker.rank)
        progress = Encoding(tell)
        calls = zip(workers, shares, strict=True)
        await asyncio.gather(*(self._encode_on(*of, progress) for of in calls))
        self.encoded.set()
        return progress.done

    async def _encode_on(self, worker: Worker, prompts: list[Request], progress: Encoding) -> None:
        try:
            await encode_on(worker.actor, prompts, progress)
        except LOST as error:
            self._blame(worker, error, prompts)

    def mine(self, rank: int) -> list[Request]:
        """The prompts that a worker encoded."""
        return [prompt for prompt, of in self._encoder.items() if of == rank]

    def hold(self, prompts: Sequence[Request]) -> None:
        """Have the conditions of these prompts read, and let go of others."""
        needed = set(prompts)
        self._held = {prompt: ref for prompt, ref in self._held.items() if prompt in needed}
        if self.up:
            self.conditions(prompts)

    def conditions(self, prompts: Sequence[Request]) -> list[ObjectRef]:
        """References to the conditions of prompts, each read by the worker that has it; by another
        one, which may have to encode it first, while that one is away."""
        by_worker: dict[Worker, list[Request]] = {}
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._held:
                reader = self.up.get(self._encoder.get(prompt, -1)) or self.up[min(self.up)]
                by_worker.setdefault(reader, []).append(prompt)
        for worker, mine in by_worker.items():
            given = with_files(mine)
            made = worker.actor.conditions.options(num_returns=len(mine)).remote(*given)
            self._held |= zip(mine, made if len(mine) > 1 else [made], strict=True)
        return [self._held[prompt] for prompt in prompts]

    # --- units

    async def sample(
        self, unit: WorkUnit, ticket: WeightsTicket, prompts: Sequence[Request]
    ) -> Sampled:
        """Sample one unit under published weights; ``prompts`` are its distinct ones, in order."""
        while True:
            worker = await self._take(unit)
            try:
                return await self._sample_on(worker, unit, ticket, prompts)
            except (*LOST, HangError) as error:
                self._blame(worker, error, prompts)
            finally:
                self._give_back(worker)

    async def _sample_on(
        self, worker: Worker, unit: WorkUnit, ticket: WeightsTicket, prompts: Sequence[Request]
    ) -> Sampled:
        conditions = self.conditions(prompts)
        loading = self._load(worker, ticket)
        trajectory, images, seconds = worker.actor.sample.options(num_returns=3).remote(
            unit, ticket, *conditions
        )
        sampled = asyncio.ensure_future(worker.calls.answer("sample", seconds, float))
        sampled.add_done_callback(seen)
        try:
            if loading:
                await asyncio.shield(loading)  # where both fail, this is why
            return Sampled(trajectory, images, conditions, await sampled, worker.rank)
        finally:
            sampled.cancel()

    async def _take(self, unit: WorkUnit) -> Worker:
        """A worker with room."""
        if self._failure:
            raise self._failure
        found: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        waiting = Waiting(unit.iteration, next(self._turns), unit.index, found)
        bisect.insort(self._waiting, waiting)
        self._dispatch()
        try:
            return await found
        except asyncio.CancelledError:
            if found.done() and not found.cancelled() and not found.exception():
                self._give_back(found.result())
            raise

    def _dispatch(self) -> None:
        """Give the workers with room to the units that wait."""
        while given := self._match():
            worker, waiting = given
            self._waiting.remove(waiting)
            if not waiting.worker.done():
                worker.in_flight += 1
                waiting.worker.set_result(worker)

    def _match(self) -> tuple[Worker, Waiting] | None:
        """The least busy worker, if it has room, and the unit that it shall sample next."""
        if not (self._waiting and self.up):
            return None
        worker = min(self.up.values(), key=lambda w: (w.in_flight, w.rank))
        return (worker, self._waiting[0]) if worker.in_flight < IN_FLIGHT else None

    def _give_back(self, worker: Worker) -> None:
        worker.in_flight -= 1
        self._dispatch()
