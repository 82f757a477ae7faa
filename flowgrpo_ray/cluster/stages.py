"""Where the time of an iteration went: how busy each kind of actor was, and which holds it up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowgrpo_ray.bottleneck import Adviser, Stage, find_bottleneck
from flowgrpo_ray.cluster.reward_client import RewardStats
from flowgrpo_ray.cluster.reward_types import app_name
from flowgrpo_ray.spec_sections import ClusterSpec


class StageReader:
    """Reads one iteration after another; advises when a reward keeps holding them up."""

    def __init__(self, cluster: ClusterSpec) -> None:
        self._cluster, self._adviser = cluster, Adviser()

    def read(
        self, stages: Mapping[str, float], seconds: float, rewards: Mapping[str, RewardStats]
    ) -> tuple[dict[str, Any], str | None]:
        """For timings.jsonl, and maybe an advice. ``stages``: seconds summed over processes."""
        served = {n: Stage(s.busy_s, len(s.replicas), s.calls) for n, s in rewards.items()}
        sampling = Stage(stages["sample"], self._cluster.rollout.count)
        training = Stage(stages["train"] + stages["step"], self._cluster.learner.count)
        slowest = find_bottleneck(served, {"sampling": sampling, "training": training})
        actors = {"rollout": sampling, "learner": training}
        actors |= {app_name(name): stage for name, stage in served.items() if stage.actors}
        row = {
            "busy": {kind: stage.load / seconds for kind, stage in actors.items()},
            "rewards": {name: stats.as_json() for name, stats in rewards.items()},
            "bottleneck": {
                "stage": slowest.stage,
                "seconds": slowest.load,
                "replicas": slowest.replicas,
            },
        }
        return row, self._adviser.see(slowest, served)
