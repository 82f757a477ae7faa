"""The training spec: everything a run depends on, checked before anything starts.

A spec is YAML (a file, or a recipe of this package by name) plus ``--set a.b=c`` overrides. Keys
are strict: an unknown one is an error with the nearest name. Arithmetic that cannot work is an
error that names the keys and values. This module imports neither torch nor ray.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import Field, model_validator

from flowgrpo_ray.algorithm.objectives import FlowGrpo
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.strict import Strict
from flowgrpo_ray.rewards import check_options
from flowgrpo_ray.spec.checkpoint import CheckpointSpec
from flowgrpo_ray.spec.cluster import ActorsSpec, ClusterSpec
from flowgrpo_ray.spec.objective import ObjectiveField
from flowgrpo_ray.spec.sampling import SamplingSpec
from flowgrpo_ray.spec.sections import (
    AdvantagesSpec,
    EmaSpec,
    EvaluationSpec,
    ModelSpec,
    OptimizerSpec,
    PromptsSpec,
    RewardName,
    RewardSpec,
    TrackingSpec,
    Tuning,
    WatchSpec,
    over_groups,
)

# Of a reward: what changes no score, and so may change when a run is resumed.
FREE_OF_REWARD = ("replicas", "cpus", "gpus", "resources", "golden", "deadline_s", "retries")


class TrainingSpec(Strict):
    """One training run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200, description="of the run folder"
    )
    seed: int = Field(default=0, ge=0, lt=2**63)
    iterations: int = Field(ge=1)
    model: ModelSpec
    tuning: Tuning
    prompts: PromptsSpec
    sampling: SamplingSpec
    rewards: dict[RewardName, RewardSpec] = Field(min_length=1)
    advantages: AdvantagesSpec = AdvantagesSpec()
    objective: ObjectiveField = FlowGrpo(kind="flow_grpo")
    optimizer: OptimizerSpec
    ema: EmaSpec | None = EmaSpec()
    watch: WatchSpec = WatchSpec()
    evaluation: EvaluationSpec
    checkpoint: CheckpointSpec = CheckpointSpec()
    cluster: ClusterSpec = ClusterSpec()
    tracking: TrackingSpec = TrackingSpec()

    @model_validator(mode="after")
    def _rewards_can_be_built(self) -> TrainingSpec:
        for name, reward in self.rewards.items():
            try:
                check_options(reward.reward or name, reward.options)
            except SpecError as error:
                raise ValueError(f"rewards.{name}: {error}") from error
        if not any(reward.weight for reward in self.rewards.values()):
            raise ValueError(f"rewards: every weight is 0 ({', '.join(self.rewards)}); train one")
        return self

    @model_validator(mode="after")
    def _sets_fit(self) -> TrainingSpec:
        names = [one.name for one in self.prompts.sets.values()]
        for name, reward in self.rewards.items():
            for chosen in reward.sets or ():
                if chosen not in names:
                    known = ", ".join(names) if any(names) else "none; prompts.train is one file"
                    raise ValueError(
                        f"rewards.{name}.sets names {chosen!r}, which is no set of prompts.train "
                        f"(sets: {known})"
                    )
        for name in names:
            if not any(reward.weight and reward.scores(name) for reward in self.rewards.values()):
                raise ValueError(
                    f"no reward of a weight other than 0 scores the set {name!r} of prompts.train: "
                    "nothing could be learned from it"
                )
        return self

    @model_validator(mode="after")
    def _best_is_evaluated(self) -> TrainingSpec:
        self.checkpoint.check_best(self.rewards, self.prompts)
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> TrainingSpec:
        self.objective.check(self.sampling)
        if self.objective.adapts is None:
            return self
        name, key = self.objective.adapts.reward, f"{self.objective.adapt_key}.reward"
        if name not in self.rewards:
            raise ValueError(
                f"{key} = {name!r} is no reward of this run ({', '.join(self.rewards)})"
            )
        if name in over_groups(self.rewards):
            raise ValueError(
                f"{key} = {name!r} compares the images of a group, so that its mean cannot fall: "
                "name a reward that scores each image alone"
            )
        return self

    @model_validator(mode="after")
    def _layout_fits(self) -> TrainingSpec:
        if self.cluster.layout == "colocated" and self.sampling.max_lag:
            raise ValueError(
                f"sampling.max_lag = {self.sampling.max_lag} does not go with cluster.layout = "
                "colocated: workers that train do not sample meanwhile. Set sampling.max_lag: 0, "
                "or cluster.layout: separate"
            )
        return self

    @model_validator(mode="after")
    def _linear_fits(self) -> TrainingSpec:
        if self.cluster.cpu_linear == "onednn" and not self.computes_on_cpu:
            raise ValueError(
                "cluster.cpu_linear = onednn is for actors without GPUs, model.dtype = float32 and "
                "no model.compile: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _updates_fit(self) -> TrainingSpec:
        sampling, updates = self.sampling, self.objective.updates
        blocks = sampling.units // sampling.units_per_block
        if blocks % updates:
            raise ValueError(
                f"objective.updates = {updates} does not divide the {blocks} blocks of whole "
                f"groups in an iteration (group_size {sampling.group_size} x groups "
                f"{sampling.groups} in micro-batches of {sampling.micro_batch})"
            )
        if self.per_update % self.ranks.count:
            raise ValueError(
                f"cluster.{self.trains}.count = {self.ranks.count} does not divide the "
                f"{self.per_update} micro-batches of an update ({sampling.units} micro-batches in "
                f"{updates} updates)"
            )
        return self

    @property
    def per_update(self) -> int:
        """Micro-batches of an update."""
        return self.sampling.units // self.objective.updates

    @property
    def points(self) -> int:
        """At which each image is trained: stochastic steps, or noise levels."""
        return self.objective.points(self.sampling.trained_steps)

    @property
    def actors(self) -> dict[str, ActorsSpec]:
        """By section of ``cluster``: those that sample and those that train, or that do both."""
        cluster = self.cluster
        if cluster.layout == "colocated":
            return {"workers": cluster.colocated(self.per_update)}
        return {"rollout": cluster.rollout, "learner": cluster.learner}

    @property
    def samplers(self) -> ActorsSpec:
        """The actors that sample."""
        return next(iter(self.actors.values()))

    @property
    def trains(self) -> str:
        """The section of the actors that train."""
        return list(self.actors)[-1]

    @property
    def ranks(self) -> ActorsSpec:
        """The actors that train."""
        return self.actors[self.trains]

    @property
    def gpus(self) -> int:
        """Those on which actors sample and train; rewards may have others."""
        cluster = self.cluster
        if cluster.layout == "separate":
            return cluster.gpus
        given = cluster.workers is not None and cluster.workers.count is not None
        count = self.ranks.count if given else max(self.ranks.count, cluster.gpus)
        return count if self.ranks.gpus else 0

    @property
    def shares_gpus(self) -> bool:
        """Whether any process of the run takes a part of a GPU, the rest of which others have."""
        kinds = [*self.actors.values(), *self.rewards.values()]
        return any(0 < kind.gpus < 1 for kind in kinds)

    @property
    def computes_on_gpus(self) -> bool:
        """Whether samplers or learner ranks do."""
        return any(kind.gpus for kind in self.actors.values())

    @property
    def takes_turns(self) -> bool:
        """Whether nothing is trained before all is sampled, nor sampled before all is trained."""
        return self.advantages.std == "global" and not self.sampling.max_lag

    @property
    def computes_on_cpu(self) -> bool:
        """Whether the network's linear layers are torch's float32 ones on CPUs, in every actor."""
        on_cpu = not any(actors.gpus for actors in self.actors.values())
        return on_cpu and self.model.dtype == "float32" and not self.model.compile

    def with_linear(self, name: str) -> TrainingSpec:
        """This spec with another ``cluster.cpu_linear``."""
        cluster = self.cluster.model_copy(update={"cpu_linear": name})
        return self.model_copy(update={"cluster": cluster})

    @property
    def weights(self) -> dict[str, float]:
        return {name: reward.weight for name, reward in self.rewards.items()}

    def digest(self) -> str:
        """Of the whole resolved spec."""
        return _digest(self.model_dump(mode="json"))

    def identity(self) -> str:
        """Digest of what determines the numbers: a run folder is resumed only under the same one.

        Left out: how long to train, where it runs, how often it is saved, what is watched and where
        it is tracked.
        """
        return _digest(self.essence())

    def essence(self) -> dict[str, Any]:
        """The part of the spec that ``identity`` is of."""
        free = {"name", "iterations", "cluster", "checkpoint", "tracking", "watch"}
        kept = self.model_dump(mode="json", exclude=free)
        for reward in kept["rewards"].values():
            for key in FREE_OF_REWARD:
                del reward[key]
        return kept


def required_resources(spec: TrainingSpec) -> dict[str, float]:
    """What the run's actors and reward replicas reserve together: ``CPU``, ``GPU``, custom ones."""
    kinds = [(kind.count, kind) for kind in spec.actors.values()]
    kinds += [(reward.replicas, reward) for reward in spec.rewards.values()]
    total = {"CPU": 0.0, "GPU": 0.0}
    for count, kind in kinds:
        for name, amount in {"CPU": kind.cpus, "GPU": kind.gpus, **kind.resources}.items():
            total[name] = total.get(name, 0.0) + count * amount
    return total


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
