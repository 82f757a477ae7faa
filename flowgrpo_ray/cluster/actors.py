"""What all actors of a run share: where they are placed, their device, their quiet start, and how
it is noticed that one is lost."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import ray
from ray.exceptions import (
    ActorAlreadyExistsError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flowgrpo_ray.cluster.placement import Placement
from flowgrpo_ray.common.errors import ClusterError
from flowgrpo_ray.common.gpus import hide_gpus
from flowgrpo_ray.common.heard import listen
from flowgrpo_ray.run.ledger import Ledger
from flowgrpo_ray.spec.cluster import ActorsSpec
from flowgrpo_ray.spec.training import TrainingSpec

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
NAME_S = 60.0  # that Ray may take to notice a death
LOST = (RayActorError, NodeDiedError, ObjectLostError)  # of an actor, its node, or what it gave


async def launch(
    cls: type, kind: ActorsSpec, placement: Placement, bundle: int | None, name: str, *args: Any
) -> Any:
    """Start an actor of ``cls`` in a bundle, or wherever there is room (``None``); returns its
    handle while it still starts.

    ``name`` is what the dashboard shows; it is unique within the run's own namespace. That of a
    dead actor is free again when Ray has noticed its death.
    """
    actor = ray.remote(cls).options(
        name=name,
        num_cpus=kind.cpus,
        num_gpus=kind.gpus,
        resources=kind.resources,
        scheduling_strategy="DEFAULT"
        if bundle is None
        else PlacementGroupSchedulingStrategy(placement.group, placement_group_bundle_index=bundle),
    )
    deadline = time.monotonic() + NAME_S
    while True:
        try:
            return actor.remote(*args)
        except ActorAlreadyExistsError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


def introduce(name: str, run: str) -> None:
    """In an actor: who it is, for its log."""
    print(f"{name} of run {run}: pid {os.getpid()} on {socket.gethostname()}", flush=True)


def set_up_process(kind: ActorsSpec, name: str, run: str) -> torch.device:
    """In an actor: who it is; its libraries' warnings, its threads and its device."""
    introduce(name, run)
    os.environ["OMP_NUM_THREADS"] = str(kind.threads)  # before torch is imported
    if not kind.gpus:
        hide_gpus()
    elif "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        # Memory that sampling took serves training, whatever the sizes.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    listen()
    import torch

    torch.set_num_threads(kind.threads)
    if not kind.gpus:
        return torch.device("cpu")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device


async def within(seconds: float, what: str, calls: Iterable[Awaitable[T]]) -> list[T]:
    """All results, or ``ClusterError`` naming ``what`` was not ready in time."""
    ready = asyncio.gather(*calls)
    ready.add_done_callback(seen)  # also if nobody waits any more
    try:
        return await asyncio.wait_for(ready, seconds)
    except TimeoutError:
        raise ClusterError(
            f"{what} not ready after cluster.ready_timeout_s = {seconds:g} s; the actors' logs say "
            "why (a missing package, a slow download), and ray status what waits for resources"
        ) from None


async def all_or_none(*parts: Coroutine[Any, Any, T]) -> list[T]:
    """Run the parts together; if one fails the others are cancelled and its error is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class HangError(Exception):
    """An actor has answered nothing for ``cluster.hang_timeout_s``."""


class LearnerLostError(Exception):
    """A learner rank is gone, and with it what it had not saved; the run goes back and on."""

    def __init__(self, name: str, cause: Exception) -> None:
        super().__init__(first_line(cause))
        self.name = name


class Calls:
    """The calls of one actor, which works them off one after the other."""

    def __init__(self, kind: str, name: str, limit: float, ledger: Ledger) -> None:
        self.name = name
        self._kind, self._limit, self._ledger = kind, limit, ledger
        self._open = 0
        self._advanced = 0.0  # when it last answered, or began to have something to do

    async def answer(
        self, what: str, call: Awaitable[T], busy_s: Callable[[T], float] | None = None
    ) -> T:
        """The answer to a call, for the ledger as well.

        ``busy_s`` reads from the answer how long the actor worked on it; without, all the time
        counts. ``HangError`` when the actor has answered nothing in time.
        """
        token = self._ledger.start(self._kind, self.name, what)
        began = time.perf_counter()
        try:
            answer = await self._in_time(call)
        except BaseException:
            self._ledger.drop(token)
            raise
        self._ledger.end(token, busy_s(answer) if busy_s else time.perf_counter() - began)
        return answer

    async def _in_time(self, call: Awaitable[T]) -> T:
        if not self._open:
            self._advanced = time.monotonic()
        self._open += 1
        future = asyncio.ensure_future(awaited(call))
        try:
            while not future.done():
                left = self._advanced + self._limit - time.monotonic()
                if left <= 0:
                    limit = f"cluster.hang_timeout_s = {self._limit:g} s"
                    raise HangError(f"{self.name} answered nothing for {limit}")
                await asyncio.wait({future}, timeout=left)
            return future.result()
        finally:
            future.cancel()
            self._open -= 1
            self._advanced = time.monotonic()


@dataclass(frozen=True)
class RunOnRay:
    """What the groups of actors of one run share."""

    spec: TrainingSpec
    placement: Placement
    ledger: Ledger
    losses: Losses
    prompts: int | None = None  # in the training set
    sources: int | None = None  # images to change that each of them names


class ActorGroup:
    """The actors of one kind, each with a name and a record of its calls.

    ``kind`` is the section of ``cluster`` that says how many there are and what each has.
    """

    kind: ClassVar[str]

    def __init__(self, run: RunOnRay, actor_class: type) -> None:
        self.spec, self.actors = run.spec, run.spec.actors[self.kind]
        self._placement, self._class = run.placement, actor_class
        self._ledger, self._losses = run.ledger, run.losses

    def name_of(self, rank: int) -> str:
        """What its actor is called."""
        return f"{self.kind.removesuffix('s')}-{rank}"

    async def _launch(self, rank: int) -> tuple[Any, Calls]:
        """Start an actor; it may take long to be up, and die on the way."""
        name, bundles = self.name_of(rank), self._placement.bundles[self.kind]
        bundle = bundles[rank] if rank < len(bundles) else None  # one of those that join
        actor = await launch(
            self._class, self.actors, self._placement, bundle, name, self.spec, rank
        )
        return actor, Calls(self.kind, name, self.spec.cluster.hang_timeout_s, self._ledger)

    async def _ready(self, what: str, calls: Iterable[Awaitable[T]]) -> list[T]:
        """Answers of actors that may still be starting."""
        return await within(self.spec.cluster.ready_timeout_s, what, calls)

    def _lost(self, name: str, actor: Any, error: Exception) -> None:
        """End an actor that is dead or hangs, and count it."""
        ray.kill(actor)
        self._losses.add(name, error)


async def awaited(call: Awaitable[T]) -> T:
    """As a coroutine, which asyncio can make a task of."""
    return await call


class Losses:
    """Counts the actors that a run loses; ends one that loses them faster than it advances."""

    def __init__(self, allowed: int, tell: Callable[[str], None]) -> None:
        self.total = 0
        self._allowed, self._tell = allowed, tell
        self._recent: Counter[str] = Counter()  # by actor, since the run last advanced

    def add(self, name: str, error: Exception) -> None:
        """Count a loss of ``name``, which the caller will replace; ``ClusterError`` if it is one
        too many."""
        self.total += 1
        self._recent[name] += 1
        why = first_line(error)
        if self._recent[name] > self._allowed:
            raise ClusterError(
                f"{name} was lost {self._recent[name]} times before the run got an iteration "
                f"further, more than cluster.max_restarts = {self._allowed}. The last time: {why} "
                "The actors' logs say more. Continue from the last checkpoint with --resume"
            ) from error
        self._tell(f"{name} was lost and is replaced: {why}")

    def advanced(self) -> None:
        """The run got further than ever before."""
        self._recent.clear()


def first_line(error: Exception) -> str:
    """What an error of Ray says, without the paragraphs of advice behind it; of an actor that could
    not be made, why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return f"it cannot start: {lines[-1]}" if "its creation task" in lines[0] else lines[0]


def seen(task: asyncio.Future[Any]) -> None:
    """A callback for tasks whose error somebody else tells: asyncio need not complain."""
    if not task.cancelled():
        task.exception()
