"""The section of a training spec that says what runs where: actors, their resources, patience."""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from flowgrpo_ray.common.strict import Strict

# What an actor of each section is called.
NAMES = {"rollout": "rollout worker", "learner": "learner rank", "workers": "worker"}


def _custom(name: str) -> str:
    if name in ("CPU", "GPU", "memory", "object_store_memory"):
        raise ValueError(f"{name!r} is no custom resource; cpus and gpus are keys of their own")
    return name


ResourceName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.:-]*$"), AfterValidator(_custom)]
Resources = Annotated[
    dict[ResourceName, Annotated[float, Field(gt=0)]],
    Field(
        description="custom Ray resources that each reserves, to place it on machines that have "
        "them, as {rollout_node: 0.001}"
    ),
]


class ActorsSpec(Strict):
    """How many actors of one kind, and what each takes."""

    count: int = Field(default=1, ge=1, description="processes")
    cpus: float = Field(default=1, ge=0, description="that Ray reserves for each")
    gpus: float = Field(default=0, ge=0, description="that Ray reserves; 0 runs on the CPU")
    resources: Resources = Field(default_factory=dict)
    threads: int = Field(default=1, ge=1, description="torch threads of each, on the CPU")


Actors = TypeVar("Actors", bound="ActorsSpec | WorkersSpec | None")


class RolloutSpec(ActorsSpec):
    """Rollout workers; more or fewer of them change no result."""

    max_count: int | None = Field(
        default=None,
        ge=1,
        description="further workers join up to this many while the cluster has room for them; "
        "default: count",
    )

    @model_validator(mode="after")
    def _at_least_count(self) -> RolloutSpec:
        if self.max_count is not None and self.max_count < self.count:
            raise ValueError(f"max_count = {self.max_count} is below count = {self.count}")
        return self

    @property
    def most(self) -> int:
        """Workers that there may be."""
        return self.max_count or self.count


class LearnerSpec(ActorsSpec):
    """Learner ranks, and what they do to fit into their memory; neither changes a result."""

    parallel: Literal["auto", "replicate", "shard"] = Field(
        default="auto",
        description="how several ranks hold the network: each all of it, gradients added up once "
        "per update (`replicate`); or each a share, gathered for its work (`shard`, FSDP2). "
        "`auto` replicates what fits the ranks' GPUs by the estimate, and on the CPU",
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute each block's activations in the backward pass"
    )
    offload_optimizer: bool = Field(
        default=False, description="keep AdamW's moments and the averages in the host's memory"
    )

    @model_validator(mode="after")
    def _one_rank_per_gpu(self) -> LearnerSpec:
        if self.count > 1 and 0 < self.gpus <= 0.5:
            raise ValueError(
                f"count = {self.count} with gpus = {self.gpus}: Ray would put two ranks on one "
                "GPU, which NCCL refuses; give each more than 0.5"
            )
        return self


class WorkersSpec(Strict):
    """Workers that sample and train; how many changes the last bits of a result. What is left out
    follows from what `rollout` and `learner` would take, shared out."""

    count: int | None = Field(
        default=None,
        ge=1,
        description="processes; default: as many as those two would use GPUs (on a CPU: processes) "
        "and as the micro-batches of an update can be shared out to",
    )
    cpus: float | None = Field(default=None, ge=0, description="that Ray reserves for each")
    gpus: float | None = Field(
        default=None, ge=0, description="that Ray reserves; 0 runs on the CPU"
    )
    resources: Resources | None = Field(
        default=None, description="custom Ray resources that each reserves"
    )
    threads: int | None = Field(default=None, ge=1, description="torch threads of each, on the CPU")


def even_shares(micro_batches: int, most: int) -> list[int]:
    """Counts, ``most`` the largest, of ranks that share an update's micro-batches out evenly."""
    return [n for n in range(1, most + 1) if micro_batches % n == 0]


class ClusterSpec(Strict):
    """What runs where. The number of rollout workers never changes a result; that of learner ranks,
    and the kind of device, only its last bits."""

    layout: Literal["separate", "colocated"] = Field(
        default="separate",
        description="who samples and who trains: processes of their own (`rollout`, `learner`), or "
        "every worker both, with one network for the two parts",
    )
    rollout: RolloutSpec = RolloutSpec()
    learner: LearnerSpec = LearnerSpec()
    workers: WorkersSpec | None = Field(
        default=None,
        description="those of the colocated layout",
    )
    cpu_linear: Literal["auto", "torch", "onednn"] = Field(
        default="auto",
        description="who computes the linear layers of a float32 network on CPUs. `auto`: oneDNN "
        "on AMD processors with AVX-512 where a short timing at the start finds it faster, else "
        "torch; `spec.yaml` of the run folder says which, and a resumed run keeps to it. It "
        "changes the last bits of a result",
    )
    dashboard: bool = Field(default=False, description="of a local cluster; costs seconds at start")
    reward_http_port: int | None = Field(
        default=None, ge=1, le=65535, description="serve rewards over HTTP"
    )
    ready_timeout_s: float = Field(
        default=300,
        gt=0,
        description="for actors and deployments to be up; for rewards, without a download",
    )
    hang_timeout_s: float = Field(
        default=600,
        gt=0,
        description="an actor that answers nothing for so long, one micro-batch being the most it "
        "does at once, is taken for dead",
    )
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="times that one actor may be lost and replaced before the run gets an "
        "iteration further; one more ends it",
    )
    max_failed_groups: int = Field(default=0, ge=0, description="dropped groups that a run bears")

    @field_validator("rollout", "learner", "workers")
    @classmethod
    def _whole_gpus(cls, actors: Actors) -> Actors:
        if actors is not None and (actors.gpus or 0) > 1:
            raise ValueError(f"gpus = {actors.gpus}: an actor drives one GPU at most; raise count")
        return actors

    @model_validator(mode="after")
    def _fits_the_layout(self) -> ClusterSpec:
        if self.layout == "separate":
            if self.workers:
                raise ValueError(
                    "workers are those of layout = colocated, and layout = separate: set "
                    "cluster.layout, or leave out cluster.workers"
                )
            return self
        if self.rollout.max_count:
            raise ValueError(
                f"rollout.max_count = {self.rollout.max_count} does not go with layout = "
                "colocated, whose workers train together and so are as many from start to end: "
                "leave out cluster.rollout.max_count, or set cluster.layout: separate"
            )
        mine = [kind.resources for kind in (self.rollout, self.learner)]
        given = self.workers is not None and self.workers.resources is not None
        if not given and mine[0] != mine[1]:
            raise ValueError(
                f"rollout.resources = {mine[0]} and learner.resources = {mine[1]} differ, and with "
                "layout = colocated one worker plays both parts: give cluster.workers.resources"
            )
        return self

    @property
    def gpus(self) -> int:
        """That `rollout` and `learner` use, some of them in part."""
        kinds = (self.rollout, self.learner)
        alone = sum(kind.count for kind in kinds if kind.gpus > 0.5)
        return max(math.ceil(sum(kind.count * kind.gpus for kind in kinds) - 1e-6), alone)

    def colocated(self, micro_batches: int) -> ActorsSpec:
        """The workers of the colocated layout, where an update has so many micro-batches;
        ``ValueError`` if they cannot be."""
        kinds = (self.rollout, self.learner)
        gpus, cpus = (sum(k.count * getattr(k, what) for k in kinds) for what in ("gpus", "cpus"))
        most = self.gpus or sum(kind.count for kind in kinds)
        count = even_shares(micro_batches, most)[-1]
        workers = ActorsSpec(
            count=count,
            cpus=round(cpus / count, 4),
            gpus=min(1, round(gpus / most, 4)),
            resources=self.learner.resources,
            threads=max(kind.threads for kind in kinds),
        )
        given = self.workers.model_dump(exclude_none=True) if self.workers else {}
        workers = workers.model_copy(update=given)
        if workers.count > 1 and 0 < workers.gpus <= 0.5:
            raise ValueError(
                f"cluster.workers.count = {workers.count} with cluster.workers.gpus = "
                f"{workers.gpus}: Ray would put two workers on one GPU, which NCCL refuses; give "
                "each more than 0.5"
            )
        return workers
