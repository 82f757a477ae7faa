"""Where the time of an iteration went: the ledger's rows, which stage holds the others up, and what
would remove that."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import ray

from flowgrpo_ray.cluster.session import joined
from flowgrpo_ray.run.bottleneck import KINDS, Adviser, Planner, Room, Stage, find_bottleneck
from flowgrpo_ray.run.ledger import Account
from flowgrpo_ray.serving.client import RewardStats
from flowgrpo_ray.spec.training import TrainingSpec


class StageReader:
    """Reads one iteration after another; advises when a stage keeps holding them up."""

    def __init__(self, spec: TrainingSpec, room: Callable[[], Room] | None = None) -> None:
        self._spec, self._adviser = spec, Adviser()
        self._room = room or room_here

    def read(
        self, rows: Mapping[str, Account], seconds: float, rewards: Mapping[str, RewardStats]
    ) -> tuple[dict[str, Any], str | None]:
        """For timings.jsonl, and maybe an advice. ``rows``: of every kind of actor."""
        stages = {name: _stage(rows[kind]) for name, kind in KINDS.items() if kind in rows}
        stages |= {n: Stage(s.busy_s, len(s.replicas), s.calls) for n, s in rewards.items()}
        slowest = find_bottleneck(stages)
        advice = Planner(self._spec, self._room()).advise(slowest, stages, seconds)
        row = {
            "ledger": {kind: account.seconds for kind, account in rows.items()},
            "processes": {kind: account.processes for kind, account in rows.items()},
            "busy": {kind: account.of("busy") / seconds for kind, account in rows.items()},
            "rewards": {name: stats.as_json() for name, stats in rewards.items()},
            "bottleneck": {
                "stage": slowest.stage,
                "seconds": slowest.load,
                "advice": advice.says,
                "change": dict(advice.change),
                "then": advice.seconds,
            },
        }
        if self._some_lost(rows):
            return row, None
        says = advice.describe(slowest, stages[slowest.stage].actors)
        return row, self._adviser.see(slowest.stage, says)

    def _some_lost(self, rows: Mapping[str, Account]) -> bool:
        """Whether actors were missing for a while; what held such an iteration up is no advice."""
        actors = self._spec.actors.items()
        return any(rows[section].processes < 0.99 * kind.count for section, kind in actors)


def _stage(account: Account) -> Stage:
    busy = account.of("busy") * account.processes
    return Stage(busy, max(1, round(account.processes)), fixed_s=account.of("loading"))


def room_here() -> Room:
    """What the connected cluster has beside this run."""
    free = {name: float(amount) for name, amount in ray.available_resources().items()}
    cores = ray.cluster_resources().get("CPU", 0.0)
    if not joined():  # a private cluster claims as many cores as the spec asks for
        real = os.cpu_count() or 1
        free["CPU"] = max(0.0, free.get("CPU", 0.0) - max(0.0, cores - real))
        cores = min(cores, real)
    return Room(free, cores)
