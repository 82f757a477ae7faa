"""Which actors of a run share a GPU: one bundle of resources per GPU, learner ranks first.

Pure, so that the estimate counts on a GPU what the cluster will put there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flowgrpo_ray.spec.cluster import ActorsSpec
from flowgrpo_ray.spec.training import TrainingSpec

EPSILON = 1e-6  # of a GPU: fractions are floats

Seat = tuple[str, int]  # section of ``cluster``, and which of its actors


@dataclass
class Bundle:
    """Resources of one node, and the actors that use them."""

    resources: dict[str, float] = field(default_factory=dict)
    seats: list[Seat] = field(default_factory=list)

    def takes(self, section: str, needs: Mapping[str, float]) -> bool:
        """Whether an actor fits beside those on this GPU; two of one learner must not."""
        gpus = self.resources.get("GPU", 0.0)
        if not (gpus and needs.get("GPU")) or gpus + needs["GPU"] > 1 + EPSILON:
            return False
        alike = self.resources.keys() - {"CPU"} == needs.keys() - {"CPU"}
        return alike and (section == "rollout" or all(sits != section for sits, _ in self.seats))

    def add(self, seat: Seat, needs: Mapping[str, float]) -> None:
        self.seats.append(seat)
        for name, amount in needs.items():
            self.resources[name] = round(self.resources.get(name, 0.0) + amount, 4)


def plan_bundles(spec: TrainingSpec) -> list[Bundle]:
    """Learner ranks first, each on a GPU of its own; rollout workers where there is room."""
    bundles: list[Bundle] = []
    for section, kind in reversed(spec.actors.items()):
        needs = _needs(kind)
        for number in range(kind.count):
            free = next((b for b in bundles if b.takes(section, needs)), None)
            if free is None:
                bundles.append(free := Bundle())
            free.add((section, number), needs)
    return bundles


def _needs(kind: ActorsSpec) -> dict[str, float]:
    needs = {"CPU": kind.cpus, "GPU": kind.gpus, **kind.resources}
    some = {resource: amount for resource, amount in needs.items() if amount}
    return some or {"CPU": 0.001}  # Ray takes no empty bundle
