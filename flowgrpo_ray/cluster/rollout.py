"""Rollout workers: they sample work units under the published weights."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import ObjectRef
from ray.util.placement_group import PlacementGroup

from flowgrpo_ray.cluster.actors import launch, set_up_process, within
from flowgrpo_ray.errors import ContractError
from flowgrpo_ray.spec import TrainingSpec
from flowgrpo_ray.types import Condition, Float32, Images, Trajectory, WeightsTicket, WorkUnit

if TYPE_CHECKING:
    from flowgrpo_ray.policies import Policy

IN_FLIGHT = 2  # units given to a worker at once, so that it never waits for the driver


class RolloutWorker:
    """One process with the whole model: encodes prompts, samples units, decodes images."""

    policy: Policy

    def __init__(self, spec: TrainingSpec, rank: int) -> None:
        self.name = f"rollout-{rank}"
        self.device = set_up_process(spec.cluster.rollout, self.name, spec.name)
        if self.device.type == "cpu":
            # On shared cores those downstream go first: the learner, which alone works at the end
            # of an iteration, starts sooner.
            os.nice(10)
        self.spec = spec
        self.loaded: WeightsTicket | None = None

    def __repr__(self) -> str:
        return self.name  # what Ray calls this actor in its logs and its dashboard

    def start(self) -> None:
        """Load the model; not in the constructor, whose errors Ray wraps beyond recognition."""
        from flowgrpo_ray.policies import load_policy
        from flowgrpo_ray.policies.encodings import EncodingCache

        self.policy = load_policy(self.spec, self.device, frozenset({"network", "decoder"}))
        self.policy.tune(self.spec.seed, with_reference=self.spec.objective.kl is not None)
        self.parameters = self.policy.trainable()
        self.encodings = EncodingCache(self.policy)
        self.policy.latent_shape(self.spec.sampling.size)  # an impossible size fails here, early

    def sigmas(self, steps: int) -> tuple[float, ...]:
        """The model's noise levels for that many steps."""
        return self.policy.sigmas(steps, self.spec.sampling.size)

    def encode(self, prompts: Sequence[str]) -> int:
        """Make sure that this machine's cache holds the prompts' conditions; how many were new."""
        return self.encodings.add(prompts)

    def conditions(self, prompts: Sequence[str]) -> list[Condition] | Condition:
        """The conditions of prompts that this worker was given to encode."""
        found = [self.encodings.get(prompt) for prompt in prompts]
        return found if len(found) > 1 else found[0]

    def load(self, ticket: WeightsTicket, arrays: dict[str, Float32]) -> str:
        """Take over published weights; answers with the digest of what the parameters now hold."""
        from flowgrpo_ray.weights import digest, load_arrays

        self.loaded = None
        load_arrays(self.parameters, arrays)
        found = digest(self.parameters)
        self.loaded = WeightsTicket(ticket.version, found)
        return found

    def sample(
        self, unit: WorkUnit, ticket: WeightsTicket, *conditions: Condition
    ) -> tuple[Trajectory, Images, float]:
        """Sample ``unit`` under the weights of ``ticket``; trajectory, images, busy seconds."""
        from flowgrpo_ray.sampling import rollout

        if self.loaded != ticket:
            raise ContractError(
                f"micro-batch {unit.index} of iteration {unit.iteration} was to be sampled with "
                f"weights {ticket}, and this worker holds {self.loaded}"
            )
        started = time.perf_counter()
        by_prompt = dict(zip(unit.distinct_prompts, conditions, strict=True))
        trajectory, x = rollout(
            self.policy,
            unit,
            by_prompt,
            self.spec.sampling.size,
            ticket,
            keep_means=self.spec.objective.compares_means,
        )
        images = self.policy.decode(x)
        return trajectory, images, time.perf_counter() - started


@dataclass(frozen=True)
class Sampled:
    """A sampled unit: references that stay in the object store, and the seconds it took."""

    trajectory: ObjectRef
    images: ObjectRef
    seconds: float


class RolloutPool:
    """The driver's side: gives units to whichever worker is free; results do not depend on it."""

    def __init__(self, spec: TrainingSpec, group: PlacementGroup) -> None:
        self.spec = spec
        first = spec.cluster.learner.count
        kind = spec.cluster.rollout
        self.workers: list[Any] = [
            launch(RolloutWorker, kind, group, first + rank, f"rollout-{rank}", spec, rank)
            for rank in range(kind.count)
        ]
        self.versions: dict[Any, int] = {}  # of the weights that a worker holds
        self.in_flight = dict.fromkeys(self.workers, 0)  # units that a worker was given
        self._encoder_of: dict[str, Any] = {}  # the worker that encoded a prompt
        self._free: asyncio.Queue[Any] = asyncio.Queue()
        for worker in self.workers * IN_FLIGHT:
            self._free.put_nowait(worker)

    async def start(self) -> None:
        """Wait until every worker has loaded the model."""
        await within(
            self.spec.cluster.ready_timeout_s,
            "rollout workers",
            [worker.start.remote() for worker in self.workers],
        )

    async def sigmas(self, *steps: int) -> list[tuple[float, ...]]:
        """The model's noise levels for each number of steps."""
        return await asyncio.gather(*(self.workers[0].sigmas.remote(n) for n in steps))

    async def encode(self, prompts: Sequence[str]) -> None:
        """Encode every prompt once, into the cache of the machine of the worker that does it."""
        share = -(-len(prompts) // len(self.workers))
        calls: list[ObjectRef] = []
        for rank, worker in enumerate(self.workers):
            mine = list(prompts[rank * share : (rank + 1) * share])
            self._encoder_of |= dict.fromkeys(mine, worker)
            calls.append(worker.encode.remote(mine))
        await asyncio.gather(*calls)

    def conditions(self, prompts: Sequence[str]) -> list[ObjectRef]:
        """References to the conditions of encoded prompts, each read by the worker that has it."""
        by_worker: dict[Any, list[str]] = {}
        for prompt in dict.fromkeys(prompts):
            by_worker.setdefault(self._encoder_of[prompt], []).append(prompt)
        found: dict[str, ObjectRef] = {}
        for worker, mine in by_worker.items():
            made = worker.conditions.options(num_returns=len(mine)).remote(mine)
            found |= zip(mine, made if len(mine) > 1 else [made], strict=True)
        return [found[prompt] for prompt in prompts]

    async def load(self, ticket: WeightsTicket, arrays: ObjectRef) -> None:
        """Every worker loads the published weights, or the run stops."""
        found = await within(
            self.spec.cluster.ready_timeout_s,
            "rollout workers",
            [self._load(worker, ticket, arrays) for worker in self.workers],
        )
        for rank, digest in enumerate(found):
            if digest != ticket.digest:
                raise ContractError(
                    f"rollout-{rank} loaded weights with digest {digest}; version "
                    f"{ticket.version} was published with {ticket.digest}"
                )

    async def _load(self, worker: Any, ticket: WeightsTicket, arrays: ObjectRef) -> str:
        digest = await worker.load.remote(ticket, arrays)
        if digest == ticket.digest:
            self.versions[worker] = ticket.version
        return digest

    async def sample(
        self, unit: WorkUnit, ticket: WeightsTicket, conditions: Sequence[ObjectRef]
    ) -> Sampled:
        """Sample one unit; ``conditions`` are those of its distinct prompts, in order."""
        worker = await self._free.get()
        self.in_flight[worker] += 1
        try:
            trajectory, images, seconds = worker.sample.options(num_returns=3).remote(
                unit, ticket, *conditions
            )
            return Sampled(trajectory, images, await seconds)
        finally:
            self.in_flight[worker] -= 1
            self._free.put_nowait(worker)
