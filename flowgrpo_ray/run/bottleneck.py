"""Which stage of an iteration holds the others up, and what would change that.

Where sampling, scoring and training overlap, an iteration takes as long as its slowest stage; with
``advantages.std: global`` and no lag training waits for all of the others, and sampling for it. A
stage's load is the time that one of its actors works when the work is shared out evenly. What an
iteration would take after a change is an estimate: as if it got shorter by what the slowest stage
does, and never shorter than any stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flowgrpo_ray.spec.cluster import NAMES, ActorsSpec, even_shares
from flowgrpo_ray.spec.sections import RewardSpec
from flowgrpo_ray.spec.training import TrainingSpec

STEADY = 3  # iterations in a row before it is worth telling
EVEN = 1.1  # below this many times the next load, the split is even
FULL = 0.9  # of the cores' seconds: more processes would only share them
SPLIT = {"sampling", "training"}  # stages whose actors could be divided otherwise
BOTH = "sampling and training"
KINDS = {"sampling": "rollout", "training": "learner", BOTH: "workers"}  # sections of cluster


@dataclass(frozen=True)
class Stage:
    """One kind of actor: seconds that all of them worked together, and how many they are.

    calls: that the work came in, for a reward. One call is one replica's, so more replicas than
        calls have nothing to do.
    fixed_s: seconds that each of them spends on loading weights, however many they are.
    """

    busy_s: float
    actors: int
    calls: int = 0
    fixed_s: float = 0.0

    @property
    def load(self) -> float:
        return self.load_of(self.actors)

    def load_of(self, actors: int) -> float:
        """If so many shared the work."""
        return self.busy_s / max(1, actors) + self.fixed_s


@dataclass(frozen=True)
class Bottleneck:
    """The slowest stage of an iteration, and the next slowest; seconds for each of their actors."""

    stage: str
    load: float
    next_stage: str
    next_load: float


def find_bottleneck(stages: Mapping[str, Stage]) -> Bottleneck:
    """The stage with the most work per actor."""
    slowest, second, *_ = sorted(stages, key=lambda name: -stages[name].load)
    return Bottleneck(slowest, stages[slowest].load, second, stages[second].load)


# --- what would remove it


@dataclass(frozen=True)
class Room:
    """What a cluster has beside the run: resources that nobody reserved; and all its cores."""

    free: Mapping[str, float]
    cores: float


@dataclass(frozen=True)
class Advice:
    """What to change, as a sentence and as keys of the spec; nothing where nothing helps."""

    says: str
    change: Mapping[str, int | str] = field(default_factory=dict)
    seconds: float | None = None  # that an iteration would then take, by estimate

    def describe(self, found: Bottleneck, actors: int) -> str:
        """Two sentences for the console."""
        reward = found.stage not in KINDS
        who = f"{actors} {'replicas' if reward else NAMES[KINDS[found.stage]] + 's'}"
        return (
            f"{'reward-' if reward else ''}{found.stage} is the bottleneck: {found.load:.1f} s of "
            f"work for each of {who}, {found.next_load:.1f} s for {found.next_stage}. {self.says}"
        )


class Planner:
    """Looks for the change that helps, with what the spec and the cluster allow."""

    def __init__(self, spec: TrainingSpec, room: Room) -> None:
        self._spec, self._room = spec, room

    def advise(self, found: Bottleneck, stages: Mapping[str, Stage], seconds: float) -> Advice:
        """``stages``: all of them, by name; ``seconds`` of the iteration."""
        full = self._full(found.stage, stages, seconds)
        if found.stage in SPLIT and self._spec.takes_turns and not full:
            says = "Sampling and training take turns (advantages.std: global), each waits for the "
            says += "other: with cluster.layout: colocated every process does both."
            return Advice(says, {"cluster.layout": "colocated"})
        if found.load < EVEN * found.next_load:
            return Advice(f"The split is even: {found.next_stage} would need more actors as well.")
        if full:
            return Advice(full)
        here = stages[found.stage].actors
        counts = self._more(found, stages[found.stage])
        room = [n for n in counts if not self._lacking(found.stage, n - here)]
        to = {found.stage: room[-1]} if room else self._move(found, stages)
        if to is None:
            return Advice(self._no_room(found.stage, here, counts))
        after = {name: stages[name].load_of(count) for name, count in to.items()}
        largest = max(({name: stage.load for name, stage in stages.items()} | after).values())
        then = max(largest, seconds - (found.load - largest))
        removed = after[found.stage] <= found.next_load
        effect = "remove it" if removed else f"bring it to {after[found.stage]:.1f} s"
        says = f"{self._told(found.stage, stages, to)} would {effect}: about {then:.1f} s an "
        says += f"iteration instead of {seconds:.1f}, by estimate."
        return Advice(says, {self._key(name): count for name, count in to.items()}, then)

    def _kind(self, stage: str) -> ActorsSpec | RewardSpec:
        return self._spec.actors[KINDS[stage]] if stage in KINDS else self._spec.rewards[stage]

    def _key(self, stage: str) -> str:
        if stage not in KINDS:
            return f"rewards.{stage}.replicas"
        joining = stage == "sampling" and self._spec.cluster.rollout.max_count
        return f"cluster.{KINDS[stage]}.{'max_count' if joining else 'count'}"

    def _full(self, slowest: str, stages: Mapping[str, Stage], seconds: float) -> str | None:
        """What to say if processes without a GPU keep all cores busy."""
        kinds = {name: self._kind(name) for name in stages}
        worked = sum(
            stage.load * stage.actors * getattr(kinds[name], "threads", 1)
            for name, stage in stages.items()
            if not kinds[name].gpus
        )
        there = self._room.cores * seconds
        if kinds[slowest].gpus or worked < FULL * there:
            return None
        return (
            f"No count of actors helps here: the processes work for {worked:.1f} s in all, and "
            f"{self._room.cores:g} cores have {there:.1f}. More cores would."
        )

    def _allowed(self, name: str, stage: Stage) -> Sequence[int]:
        """Numbers of actors that the work of a stage can be shared out to."""
        if name in ("training", BOTH):
            return even_shares(self._spec.per_update, self._spec.per_update)
        return range(1, (self._spec.sampling.units if name == "sampling" else stage.calls) + 1)

    def _more(self, found: Bottleneck, stage: Stage) -> Sequence[int]:
        """Larger counts, up to the first that brings the stage to the next one."""
        counts = [n for n in self._allowed(found.stage, stage) if n > stage.actors]
        enough = [n for n in counts if stage.load_of(n) <= found.next_load]
        return counts[: counts.index(enough[0]) + 1] if enough else counts

    def _lacking(self, stage: str, more: int) -> list[str]:
        """What there is too little of for so many more actors."""
        kind = self._kind(stage)
        needs = {"CPU": kind.cpus, "GPU": kind.gpus, **kind.resources}
        return [
            f"{more * amount:g} {resource} ({self._room.free.get(resource, 0):g} free)"
            for resource, amount in needs.items()
            if amount and more * amount > self._room.free.get(resource, 0) + 1e-9
        ]

    def _move(self, found: Bottleneck, stages: Mapping[str, Stage]) -> dict[str, int] | None:
        """Counts with GPUs of the learner given to the rollout workers, or the other way round."""
        gpus = self._spec.cluster.learner.gpus
        if found.stage not in SPLIT or not gpus or gpus != self._spec.cluster.rollout.gpus:
            return None
        (giver,) = SPLIT - {found.stage}
        best, most = None, found.load / EVEN
        for moved in range(1, stages[giver].actors):
            change = ((giver, -moved), (found.stage, moved))
            counts = {name: stages[name].actors + more for name, more in change}
            allowed = all(n in self._allowed(name, stages[name]) for name, n in counts.items())
            load = max(stages[name].load_of(n) for name, n in counts.items())
            if allowed and load < most:
                best, most = counts, load
        return best

    def _told(self, slowest: str, stages: Mapping[str, Stage], to: Mapping[str, int]) -> str:
        """The change in words."""
        keys = [f"{self._key(name)} {stages[name].actors} -> {n}" for name, n in to.items()]
        more = to[slowest] - stages[slowest].actors
        if len(to) > 1:
            (giver,) = to.keys() - {slowest}
            gpus = more * self._spec.cluster.learner.gpus
            route = f"from {KINDS[giver]} to {KINDS[slowest]}"
            return f"Moving {gpus:g} GPU{'s' * (gpus > 1)} {route} ({', '.join(keys)})"
        if slowest in KINDS:
            return keys[0]
        scale = f"flowgrpo-ray rewards scale {slowest} {to[slowest]}"
        return f"+{more} replica{'s' * (more > 1)} ({scale}, or {keys[0]})"

    def _no_room(self, stage: str, here: int, counts: Sequence[int]) -> str:
        """Why nothing can be changed."""
        if counts:
            lacking = " and ".join(self._lacking(stage, counts[0] - here))
            return (
                f"{self._key(stage)} {here} -> {counts[0]} would help, but the cluster has no room "
                f"for it: it needs {lacking}."
            )
        if stage == "sampling":
            why = f"an iteration has {self._spec.sampling.units} micro-batches"
        elif stage in ("training", BOTH):
            why = f"an update has {self._spec.per_update} micro-batches"
        else:
            why = "every call has a replica"
        return f"More of them would have nothing to do: {why} (sampling.micro_batch)."


class Adviser:
    """Speaks once of each stage that is the bottleneck for some iterations in a row."""

    def __init__(self) -> None:
        self._stage, self._times = "", 0
        self._told: set[str] = set()

    def see(self, stage: str, says: str) -> str | None:
        """What to tell after this iteration, if anything."""
        self._times = self._times + 1 if stage == self._stage else 1
        self._stage = stage
        if self._times < STEADY or stage in self._told:
            return None
        self._told.add(stage)
        return says
