"""The driver's side of the rollout workers: which there are, and which weights they hold.

A worker loads the weights of a unit's ticket right before the first unit that needs them, and
answers with the digest of what it loaded. One that dies, hangs or goes away with its machine is
replaced, and its units are sampled again: a unit is a pure function, so only time is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ray import ObjectRef
from ray.exceptions import ObjectLostError, RayActorError

from flowgrpo_ray.cluster.actors import LOST, HangError, LearnerLostError, RunOnRay, seen
from flowgrpo_ray.cluster.pictures import encode_on
from flowgrpo_ray.cluster.samplers import Pool, Worker
from flowgrpo_ray.common.errors import ClusterError, ContractError
from flowgrpo_ray.common.types import Request, WeightsTicket
from flowgrpo_ray.serving.ray_private import actor_id

KEPT = 1, 3  # published weights that can still be asked for, by ``sampling.max_lag``: the last
# ones, which units of nothing else are on their way with; or of training, its past, the averaged.


class RolloutPool(Pool):
    """``cluster.rollout.count`` workers, or up to ``max_count`` while the cluster has room."""

    kind = "rollout"

    def __init__(self, run: RunOnRay, worker_class: type) -> None:
        super().__init__(run, worker_class)
        self._weights: dict[WeightsTicket, ObjectRef] = {}
        self._starting: dict[int, asyncio.Task[None]] = {}
        self._none_up: asyncio.TimerHandle | None = None

    # --- workers come and go

    async def start(self) -> None:
        """Bring ``count`` workers up, ready to encode; further ones join when they are up."""
        count, most = self.actors.count, self.spec.cluster.rollout.most
        needed = [self._begin(rank) for rank in range(count)]
        for rank in range(count, most):
            self._begin(rank)
        await self._ready("rollout workers", needed)

    async def load_models(self) -> None:
        await self._ready("rollout workers", [self._load_model(w) for w in self.up.values()])

    async def _load_model(self, worker: Worker) -> None:
        try:
            await worker.actor.load_model.remote()
        except LOST as error:
            self._lose(worker, error)

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
        while rank not in self.up:
            worker = Worker(rank, *await self._launch(rank))
            try:
                await worker.actor.start.remote()
                await encode_on(worker.actor, self.mine(rank))
                if self.encoded.is_set():
                    await worker.actor.load_model.remote()
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
        for waiting in self._waiting:
            if not waiting.worker.done():
                waiting.worker.set_exception(error)
        self._waiting.clear()

    def _blame(self, worker: Worker, error: Exception, prompts: Sequence[Request]) -> None:
        """Replace whoever was lost."""
        for prompt in prompts:
            self._held.pop(prompt, None)
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

    # --- weights

    def publish(self, ticket: WeightsTicket, arrays: ObjectRef) -> None:
        """Keep the arrays for the workers that will need them."""
        self._weights.pop(ticket, None)
        self._weights[ticket] = arrays
        for old in list(self._weights)[: -KEPT[self.spec.sampling.max_lag]]:
            del self._weights[old]

    def _load(self, worker: Worker, ticket: WeightsTicket) -> asyncio.Task[None]:
        if worker.ticket != ticket:
            worker.ticket = ticket
            call = worker.actor.load.remote(ticket, self._weights[ticket])
            worker.loading = asyncio.create_task(self._loaded(worker, ticket, call))
            worker.loading.add_done_callback(seen)
        assert worker.loading is not None
        return worker.loading

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
