"""Whose linear layers a run takes on CPUs: decided once, before any actor loads the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flowgrpo_ray.cluster.actors import within
from flowgrpo_ray.spec.training import TrainingSpec

CLEARLY = 0.8  # of torch's time: less would be chosen at one start and not at the next
PROCESSOR = Path("/proc/cpuinfo")


async def settled(
    spec: TrainingSpec, group: PlacementGroup, note: Callable[[str], None]
) -> TrainingSpec:
    """``spec`` with what ``cluster.cpu_linear: auto`` is for this run, on the machine of the first
    bundle: all actors get it, as sampling and training must give the same bits."""
    if spec.cluster.cpu_linear != "auto":
        return spec
    if not spec.computes_on_cpu:
        return spec.with_linear("torch")
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    call = ray.remote(measure).options(num_cpus=0, scheduling_strategy=place).remote()
    (found,) = await within(spec.cluster.ready_timeout_s, "the first actor's place", [call])
    if found is None or found["onednn"] > CLEARLY * found["torch"]:
        return spec.with_linear("torch")
    share = found["onednn"] / found["torch"]
    note(f"linear layers by oneDNN, which takes {share:.2f} of torch's time here")
    return spec.with_linear("onednn")


def measure() -> dict[str, float] | None:
    """Seconds by each; ``None`` where torch's own are the best there is, without importing it."""
    processor = PROCESSOR.read_text() if PROCESSOR.exists() else ""
    if not ("AuthenticAMD" in processor and "avx512f" in processor):
        return None
    from flowgrpo_ray.policies.linear import time_linear

    return time_linear()
