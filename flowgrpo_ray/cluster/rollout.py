"""A rollout worker: it samples work units under the published weights."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from flowgrpo_ray.cluster.actors import set_up_process
from flowgrpo_ray.common.errors import ContractError
from flowgrpo_ray.common.types import (
    Condition,
    Images,
    Overlong,
    Request,
    Trajectory,
    WeightsTicket,
    WorkUnit,
)
from flowgrpo_ray.spec.training import TrainingSpec

if TYPE_CHECKING:
    from flowgrpo_ray.policies.base import Policy


class RolloutWorker:
    """One process with the whole model: encodes prompts, samples units, decodes images."""

    policy: Policy
    on_host = False  # the network is loaded there, to be sharded
    masters = False  # it trains, too

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
        """Be ready to encode, with nothing loaded yet: text encoders need the memory alone.

        Not in the constructor, whose errors Ray wraps beyond recognition.
        """
        from flowgrpo_ray.policies import load_policy, policy_class
        from flowgrpo_ray.policies.encodings import EncodingCache

        if policy_class(self.spec.model.family).pipeline:
            self.encodings = EncodingCache(load_policy(self.spec, self.device, frozenset()))
        else:  # the network itself reads prompts
            self.load_model()
            self.encodings = EncodingCache(self.policy)

    def load_model(self) -> None:
        """Network and decoder, after the encoders are gone; once."""
        from flowgrpo_ray.policies import load_policy

        if hasattr(self, "policy"):
            return
        parts = frozenset({"network", "decoder"})
        self.policy = load_policy(
            self.spec, self.device, parts, on_host=self.on_host, masters=self.masters
        )
        self.policy.tune(self.spec.seed, with_reference=self.spec.objective.compares_reference)
        self.parameters = self.policy.trainable()
        self.policy.latent_shape(self.spec.sampling.size)  # an impossible size fails here, early

    def sigmas(self, steps: int) -> tuple[float, ...]:
        """The model's noise levels for that many steps."""
        return self.policy.sigmas(steps, self.spec.sampling.size)

    def overlong(self, prompts: Sequence[str]) -> Overlong:
        """Those that the model reads in part."""
        return self.encodings.overlong(prompts)

    def missing(self, prompts: Sequence[Request]) -> list[Request]:
        """Those whose conditions this machine's cache lacks."""
        return self.encodings.missing(prompts)

    def encode(
        self,
        prompts: Sequence[Request],
        files: Mapping[str, bytes] | None = None,
        more: bool = False,
    ) -> int:
        """Make sure that this machine's cache holds the prompts' conditions; how many were new.
        ``files`` of the images that they change, by digest; ``more`` prompts come at once."""
        return self.encodings.add(prompts, files, more=more)

    def conditions(
        self, prompts: Sequence[Request], files: Mapping[str, bytes] | None = None
    ) -> list[Condition] | Condition:
        """The conditions of prompts; those that this machine's cache lacks are encoded."""
        self.encodings.add(prompts, files)
        found = [self.encodings.get(prompt) for prompt in prompts]
        return found if len(found) > 1 else found[0]

    def load(self, ticket: WeightsTicket, arrays: dict[str, NDArray[Any]]) -> tuple[str, float]:
        """Take over published weights; the digest of what the parameters now hold, busy seconds."""
        from flowgrpo_ray.algorithm.weights import digest, load_arrays

        started = time.perf_counter()
        self.loaded = None
        load_arrays(self.parameters, arrays)
        found = digest(self.parameters)
        self.loaded = WeightsTicket(ticket.version, found)
        return found, time.perf_counter() - started

    def sample(
        self, unit: WorkUnit, ticket: WeightsTicket, *conditions: Condition
    ) -> tuple[Trajectory, Images, float]:
        """Sample ``unit`` under the weights of ``ticket``; trajectory, images, busy seconds."""
        from flowgrpo_ray.algorithm.sampling import rollout

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
            keep_old=self.spec.objective.keeps_old,
        )
        images = self.policy.images(x, self.spec.sampling.size)
        return trajectory, images, time.perf_counter() - started
