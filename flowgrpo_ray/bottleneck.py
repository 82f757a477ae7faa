"""Which stage of an iteration holds the others up, and how many replicas would change that.

Sampling, scoring and training overlap, so an iteration takes as long as its slowest stage. A
stage's load is the time that one of its actors works when the work is shared out evenly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

STEADY = 3  # iterations in a row before it is worth telling


@dataclass(frozen=True)
class Stage:
    """One kind of actor: seconds that all of them worked together, and how many they are.

    calls: that the work came in, for a reward. One call is one replica's, so more replicas than
        calls have nothing to do.
    """

    busy_s: float
    actors: int
    calls: int = 0

    @property
    def load(self) -> float:
        return self.busy_s / max(1, self.actors)


@dataclass(frozen=True)
class Bottleneck:
    """The slowest stage of an iteration; for a reward, the replicas that bring it to the next one,
    or as near to it as there are calls to share out."""

    stage: str
    load: float  # seconds
    next_stage: str
    next_load: float
    replicas: int | None = None  # None: not a reward, or no number of them helps
    then: float = 0.0  # the load with so many replicas

    def describe(self, actors: int) -> str:
        """One sentence for the console."""
        removed = self.then <= self.next_load
        effect = "remove it" if removed else f"bring it to {self.then:.1f} s, one call for each"
        return (
            f"reward-{self.stage} is the bottleneck: {self.load:.1f} s of work for each of its "
            f"{actors} replicas, {self.next_load:.1f} s for {self.next_stage}; {self.replicas} "
            f"replicas would {effect} (flowgrpo-ray rewards scale {self.stage} {self.replicas}, "
            f"or rewards.{self.stage}.replicas)"
        )


def find_bottleneck(rewards: Mapping[str, Stage], others: Mapping[str, Stage]) -> Bottleneck:
    """The stage with the most work per actor. `others` are the stages that are not rewards."""
    loads = {name: stage.load for name, stage in [*others.items(), *rewards.items()]}
    slowest = max(loads, key=lambda name: loads[name])
    next_stage = max(loads.keys() - {slowest}, key=lambda name: loads[name])
    found = Bottleneck(slowest, loads[slowest], next_stage, loads[next_stage])
    if slowest not in rewards or loads[next_stage] == 0:
        return found
    reward = rewards[slowest]
    replicas = min(math.ceil(reward.busy_s / loads[next_stage]), reward.calls)
    if replicas <= reward.actors:
        return found
    return replace(found, replicas=replicas, then=reward.busy_s / replicas)


class Adviser:
    """Speaks once about a reward that has been the bottleneck for some iterations in a row."""

    def __init__(self) -> None:
        self._stage, self._times = "", 0

    def see(self, found: Bottleneck, rewards: Mapping[str, Stage]) -> str | None:
        """What to tell after this iteration, if anything."""
        self._times = self._times + 1 if found.stage == self._stage else 1
        self._stage = found.stage
        if self._times != STEADY or found.replicas is None:
            return None
        return found.describe(rewards[found.stage].actors)
