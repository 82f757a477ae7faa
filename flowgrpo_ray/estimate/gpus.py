"""What comes to lie on one GPU, and in which phase of the run it needs the most memory.

Processes that share a GPU each keep what their largest stage took, so these add up; the text
encoders are there before anything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from flowgrpo_ray.estimate.memory import START, Parts, Stages
from flowgrpo_ray.spec.bundles import EPSILON, plan_bundles
from flowgrpo_ray.spec.cluster import NAMES
from flowgrpo_ray.spec.training import TrainingSpec

GIB = 2**30


def gpu_here() -> tuple[str, float] | None:
    """Name and GiB of this machine's first GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return found.name, found.total_memory / GIB


@dataclass
class Gpu:
    """One GPU: processes by name, how many there are of each, and their stages."""

    actors: dict[str, tuple[int, Stages]] = field(default_factory=dict)
    rewards: dict[str, tuple[int, Parts]] = field(default_factory=dict)
    room: float = 1.0  # that actors leave, of what Ray reserves
    free: float = field(init=False)  # of it

    def __post_init__(self) -> None:
        self.free = self.room

    @property
    def name(self) -> str:
        counts = {name: n for name, (n, _) in (self.actors | self.rewards).items()}
        return " + ".join(_plural(name, n, self.rewards) for name, n in counts.items())

    def phases(self) -> dict[str, int]:
        """Bytes by phase; of processes that work at the same time the sum of their largest."""
        rewards = sum(n * sum(parts.values()) for n, parts in self.rewards.values())
        if not self.actors:
            return {"scoring": rewards}
        first = sum(n * totals(stages).get(START, 0) for n, stages in self.actors.values())
        later = [(n, totals(stages)) for n, stages in self.actors.values()]
        for _, stages in later:
            stages.pop(START, None)
        if len(later) == 1 and later[0][0] == 1:
            alone = {stage: size + rewards for stage, size in later[0][1].items()}
            return {START: first, **alone}
        tops = [max(stages, key=lambda stage: stages[stage]) for _, stages in later]
        together = sum(n * stages[top] for (n, stages), top in zip(later, tops, strict=True))
        return {START: first, " and ".join(dict.fromkeys(tops)): together + rewards}

    def largest(self) -> tuple[str, int]:
        """The phase that needs the most, and its bytes."""
        found = self.phases()
        phase = max(found, key=lambda name: found[name])
        return phase, found[phase]


def totals(stages: Stages) -> dict[str, int]:
    """Bytes of each stage."""
    return {stage: sum(parts.values()) for stage, parts in stages.items()}


def gpus(
    spec: TrainingSpec, actors: Mapping[str, Stages], rewards: Mapping[str, Parts | None]
) -> list[Gpu]:
    """One GPU of each kind that the run uses, with as much on it as Ray may place there."""
    kinds = list(_of_actors(spec, actors))
    wanted = {name: reward for name, reward in spec.rewards.items() if reward.gpus}
    sizes = {name: sum((rewards[name] or {}).values()) / wanted[name].gpus for name in wanted}
    for name in sorted(wanted, key=lambda name: -sizes[name]):  # the worst that can meet
        reward = wanted[name]
        if not any(gpu.room + EPSILON >= reward.gpus for gpu in kinds):
            kinds.append(Gpu())
        for gpu in kinds:
            count = min(reward.replicas, _times(reward.gpus, gpu.free))
            if count:
                gpu.rewards[name] = (count, rewards[name] or {})
                gpu.free -= count * reward.gpus
    return kinds


def _of_actors(spec: TrainingSpec, actors: Mapping[str, Stages]) -> Iterator[Gpu]:
    """Of each kind the fullest; different ones whose shares leave room for both may meet."""
    found: list[Counter[str]] = []

    def share(kind: Counter[str]) -> float:
        return sum(count * spec.actors[section].gpus for section, count in kind.items())

    bundles = [Counter(section for section, _ in bundle.seats) for bundle in plan_bundles(spec)]
    for kind in sorted(filter(share, bundles), key=share, reverse=True):
        if not any(kind <= other for other in found):
            beside = next((o for o in found if share(o + kind) <= 1 + EPSILON), None)
            if beside is None:
                found.append(kind)
            else:
                beside += kind
    for kind in sorted(found, key=lambda kind: [section not in kind for section in spec.actors]):
        of = {NAMES[s]: (kind[s], actors[s]) for s in spec.actors if s in kind}
        yield Gpu(of, room=1 - share(kind))


def _times(share: float, part: float) -> int:
    return int(part / share + EPSILON)


def _plural(name: str, count: int, rewards: Mapping[str, object]) -> str:
    return name if count == 1 else f"{count} {name}" if name in rewards else f"{count} {name}s"
