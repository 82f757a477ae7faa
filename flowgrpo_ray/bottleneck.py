"""Which stage of an iteration holds the others up, and how many replicas would change that.

Sampling, scoring and training overlap, so an iteration takes as long as its slowest stage. A
stage's load is the time that one of its actors works when the work is shared out evenly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

STEADY = 3  # iterations in a row before it is worth telling


@dataclass(frozen=True)
class Stage:
    """One kind of actor: seconds that all of them worked together, and how many they are."""

    busy_s: float
    actors: int

    @property
    def load(self) -> float:
        return self.busy_s / max(1, self.actors)


@dataclass(frozen=True)
class Bottleneck:
    """The slowest stage of an iteration; for a reward, the replicas that bring it to the next."""

    stage: str
    load: float  # seconds
    next_stage: str
    next_load: float
    replicas: int | None  # None: not a reward, or no number of them helps

    def describe(self, actors: int) -> str:
        """One sentence for the console."""
        return (
            f"reward-{self.stage} is the bottleneck: {self.load:.1f} s of work for each of its "
            f"{actors} replicas, {self.next_load:.1f} s for {self.next_stage}; {self.replicas} "
            f"replicas would remove it (flowgrpo-ray rewards scale {self.stage} {self.replicas}, "
            f"or rewards.{self.stage}.replicas)"
        )


def find_bottleneck(rewards: Mapping[str, Stage], others: Mapping[str, Stage]) -> Bottleneck:
    """The stage with the most work per actor. `others` are the stages that are not rewards."""
    loads = {name: stage.load for name, stage in [*others.items(), *rewards.items()]}
    slowest = max(loads, key=lambda name: loads[name])
    next_stage = max(loads.keys() - {slowest}, key=lambda name: loads[name])
    replicas = None
    if slowest in rewards and loads[next_stage] > 0:
        replicas = math.ceil(rewards[slowest].busy_s / loads[next_stage])
    return Bottleneck(slowest, loads[slowest], next_stage, loads[next_stage], replicas)


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
