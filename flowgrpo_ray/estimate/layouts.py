"""How well as many GPUs would be used if they were divided otherwise: arithmetic over FLOPs.

All GPUs count as equally fast and all work as equally well suited to them; publishing weights and
scoring take no time. What is left is who waits for whom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flowgrpo_ray.estimate.gpus import GIB, gpus
from flowgrpo_ray.estimate.memory import Parts, Stages
from flowgrpo_ray.spec.cluster import WorkersSpec, even_shares
from flowgrpo_ray.spec.training import TrainingSpec


@dataclass(frozen=True)
class Work:
    """An iteration as its units: FLOPs of one (or any other measure), and how they hang together.

    ``block`` units hold whole groups; an advantage exists when all of a block (``std: global``: of
    the iteration) are scored.
    """

    sampling: float  # of one unit
    training: float  # of one unit, each time that it is trained on
    units: int
    block: int
    updates: int  # per pass over the units
    epochs: int = 1
    std: str = "group"
    lag: int = 0

    @property
    def all(self) -> float:
        return self.units * (self.sampling + self.training * self.epochs)


def busy_colocated(work: Work, workers: int) -> float:
    """Share of the workers' time that is not waiting, where each samples and trains its part."""
    rows = work.updates * work.epochs * _rounds(work.units // work.updates, workers)
    time = work.sampling * _rounds(work.units, workers) + work.training * rows
    return work.all / (workers * time)


def busy_separate(work: Work, samplers: int, ranks: int) -> float:
    """The same with GPUs for either side.

    Units are sampled in plan order; rank ``i % ranks`` trains unit ``i`` of an update when its
    block is scored, and an update waits for all ranks. The next iteration is sampled after the last
    update; with a lag meanwhile.
    """
    scored = [work.sampling * _rounds(i + 1, samplers) for i in range(work.units)]
    per_update = work.units // work.updates
    time = 0.0
    for epoch in range(work.epochs):
        for first in range(0, work.units, per_update):
            free = [time] * ranks
            for i in range(first, first + per_update):
                last = min(work.units, (i // work.block + 1) * work.block)
                ready = scored[-1 if work.std == "global" else last - 1]
                begin = free[i % ranks] if epoch or work.lag else max(free[i % ranks], ready)
                free[i % ranks] = begin + work.training
            time = max(free)
    if work.lag:
        time = max(time, scored[-1])
    return work.all / ((samplers + ranks) * time)


def _rounds(units: int, workers: int) -> int:
    return -(-units // workers)


def best_split(work: Work, count: int) -> tuple[int, int, float]:
    """Rollout workers and learner ranks of ``count`` GPUs, and the share that does not wait."""
    per_update = work.units // work.updates
    splits = [(count - ranks, ranks) for ranks in even_shares(per_update, count - 1)]
    samplers, ranks = max(splits, key=lambda split: busy_separate(work, *split))
    return samplers, ranks, busy_separate(work, samplers, ranks)


# --- of a spec


@dataclass(frozen=True)
class Layout:
    """One way to use the GPUs of a spec."""

    layout: str
    parallel: str  # how learner ranks or workers hold the network
    counts: tuple[int, ...]  # of GPUs: rollout and learner, or workers
    busy: float  # share of the GPUs' time that does not wait
    needs: tuple[float, ...]  # bytes of a GPU of each kind in ``counts``

    @property
    def most(self) -> float:
        return max(self.needs)


def compare(
    spec: TrainingSpec,
    flops: tuple[int, int],
    stages: Callable[[TrainingSpec], Mapping[str, Stages]],
    rewards: Mapping[str, Parts | None],
) -> list[Layout]:
    """The layouts of as many GPUs as the actors of ``spec`` use, replicated and sharded.

    ``flops`` are those of an iteration's sampling and training, ``stages`` what processes of a spec
    hold.
    """
    count = spec.gpus
    if not count:
        return []
    found: list[Layout] = []

    def add(of: TrainingSpec, busy: float) -> None:
        kinds = [gpu for gpu in gpus(of, stages(of), rewards) if gpu.actors]
        needs = tuple(gpu.largest()[1] for gpu in kinds)
        counts = tuple(actors.count for actors in of.actors.values())
        counts = counts if len(kinds) == len(counts) else (count,)
        parallel = of.cluster.learner.parallel
        found.append(Layout(of.cluster.layout, parallel, counts, busy, needs))

    work, whole = work_of(spec, flops), count > 1
    samplers, ranks, busy = best_split(work, count) if whole else (1, 1, 1.0)
    for parallel in ("replicate", "shard") if whole else ("replicate",):  # or nothing to shard
        add(_separate(spec, samplers, ranks, parallel, whole=whole), busy)
        workers = _colocated(spec, parallel)
        used = workers.ranks.count
        add(workers, busy_colocated(work, used) * used / count)
    return found


def work_of(spec: TrainingSpec, flops: tuple[int, int]) -> Work:
    """The units of an iteration."""
    units, epochs = spec.sampling.units, spec.objective.epochs
    return Work(
        flops[0] / units,
        flops[1] / units / epochs,
        units,
        spec.sampling.units_per_block,
        spec.objective.updates,
        epochs,
        spec.advantages.std,
        spec.sampling.max_lag,
    )


def _share(spec: TrainingSpec) -> float:
    """Of a GPU, that a process reserves which has one to itself: what rewards leave."""
    colocated = spec.cluster.layout == "colocated"
    return (spec.ranks if colocated else spec.cluster.colocated(spec.per_update)).gpus


def _separate(
    spec: TrainingSpec, samplers: int, ranks: int, parallel: str, *, whole: bool
) -> TrainingSpec:
    """``whole``: one process a GPU, else the two share one."""
    cluster, gpu = spec.cluster, _share(spec) / (1 if whole else 2)
    rollout = {"count": samplers, "gpus": gpu, "max_count": None}
    learner = {"count": ranks, "gpus": gpu, "parallel": parallel}
    changed = {
        "layout": "separate",
        "workers": None,
        "rollout": cluster.rollout.model_copy(update=rollout),
        "learner": cluster.learner.model_copy(update=learner),
    }
    return spec.model_copy(update={"cluster": cluster.model_copy(update=changed)})


def _colocated(spec: TrainingSpec, parallel: str) -> TrainingSpec:
    count = even_shares(spec.per_update, spec.gpus)[-1]
    cluster = spec.cluster
    changed = {
        "layout": "colocated",
        "workers": WorkersSpec(count=count, gpus=_share(spec)),
        "learner": cluster.learner.model_copy(update={"parallel": parallel}),
    }
    sampling = spec.sampling.model_copy(update={"max_lag": 0})
    changed = {"cluster": cluster.model_copy(update=changed), "sampling": sampling}
    return spec.model_copy(update=changed)


def by_counts(
    layouts: Sequence[Layout],
) -> Iterator[tuple[str, tuple[int, ...], list[Layout]]]:
    """Each layout with its counts, and its ways of parallelism in order."""
    for layout, counts in dict.fromkeys((row.layout, row.counts) for row in layouts):
        rows = [row for row in layouts if (row.layout, row.counts) == (layout, counts)]
        yield layout, counts, rows


def recommended(layouts: Sequence[Layout], memory: float) -> Layout | None:
    """The fastest of those that fit ``memory`` bytes a GPU; of equals one that gathers no weights,
    then the one that needs the least. ``None`` if none fits."""
    fitting = [layout for layout in layouts if layout.most <= memory]

    def rank(layout: Layout) -> tuple[float, bool, float]:
        return round(layout.busy, 2), layout.parallel == "replicate", -layout.most

    return max(fitting, key=rank, default=None)


def reason(chosen: Layout, layouts: Sequence[Layout], spec: TrainingSpec) -> str:
    """Why that one is ``recommended``."""
    other = next(row for row in layouts if row.layout != chosen.layout)
    lost = f"{1 - other.busy:.0%} of the GPUs' time is lost"
    if chosen.busy < other.busy - 0.01:
        why = "of those that fit it is the fastest"
    elif chosen.busy < other.busy + 0.01:
        why = "both layouts use the GPUs equally well, and this one needs less memory"
    elif chosen.layout == "separate":
        why = f"with cluster.layout: colocated {lost}, as its workers cannot share the work evenly"
    elif spec.takes_turns:
        why = f"with advantages.std: global separate sides take turns, and {lost}"
    else:
        why = f"separate sides wait for each other, and {lost}"
    if chosen.layout == "colocated" and spec.sampling.max_lag:
        why += "; it needs sampling.max_lag: 0"
    if chosen.parallel == "shard":
        (whole,) = (
            row.most
            for row in layouts
            if row.layout == chosen.layout and row.parallel == "replicate"
        )
        why += f"; the whole network on each GPU would need {whole / GIB:.1f} GiB"
    return why
