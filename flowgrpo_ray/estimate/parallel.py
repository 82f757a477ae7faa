"""How learner ranks or workers hold the network: what sends the least of all that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from flowgrpo_ray.common.types import Parallel
from flowgrpo_ray.estimate.gpus import gpus
from flowgrpo_ray.estimate.memory import Parts, Stages
from flowgrpo_ray.spec.cluster import NAMES
from flowgrpo_ray.spec.training import TrainingSpec

PER_NODE = 8  # GPUs of one machine, where none is known


def presumed_nodes(spec: TrainingSpec) -> list[int]:
    """A machine for each rank: as few as there may be."""
    return [rank // PER_NODE for rank in range(spec.ranks.count)]


def ways(spec: TrainingSpec, nodes: Sequence[object]) -> list[Parallel]:
    """What the spec allows for ranks on these machines, from what sends the least to what needs the
    least memory.

    Shards lie within a machine and copies of the network on each, if all have as many ranks; or one
    copy is cut over all ranks. What is kept whole is not sent again. Workers that sample as well
    keep all of it, so that each can sample alone.
    """
    asked, ranks = spec.cluster.learner.parallel, range(len(nodes))
    replicated = Parallel(groups=tuple((rank,) for rank in ranks))
    if len(nodes) == 1 or asked == "replicate":
        return [replicated]
    machines = [tuple(r for r in ranks if nodes[r] == node) for node in dict.fromkeys(nodes)]
    even = len({len(machine) for machine in machines}) == 1 and len(machines) < len(nodes)
    cuts = [tuple(machines)] if even and len(machines) > 1 else []
    cuts.append((tuple(ranks),))
    keeps = [(True, True), (True, False), (False, True), (False, False)]  # weights, gradients
    if spec.cluster.layout == "colocated":
        keeps = keeps[:1]
    shards = [Parallel(True, groups, *keep) for groups in cuts for keep in keeps]
    return [replicated, *shards] if asked == "auto" else shards


def choose(
    spec: TrainingSpec,
    nodes: Sequence[object],
    memory: float | None,
    stages: Callable[[Parallel], Mapping[str, Stages]],
    rewards: Mapping[str, Parts | None],
) -> Parallel:
    """The first of ``ways`` that fits ``memory`` bytes of a GPU, or the last; without a memory the
    first. ``stages`` are those of each process."""
    found = ways(spec, nodes)
    section = NAMES[spec.trains]
    for way in found if memory is not None else found[:1]:
        kinds = [gpu for gpu in gpus(spec, stages(way), rewards) if section in gpu.actors]
        if memory is None or all(gpu.largest()[1] <= memory for gpu in kinds):
            return way
    return found[-1]


def unmeasured(spec: TrainingSpec, nodes: Sequence[object]) -> Parallel:
    """For a model of unknown size on GPUs: ``auto`` replicates LoRA and shards full tuning."""
    found = ways(spec, nodes)
    return found[0] if spec.tuning.kind == "lora" else found[-1]
