"""What all actors of a run share: where they are placed, their device, their quiet start."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import warnings
from collections.abc import Awaitable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flowgrpo_ray.errors import ClusterError
from flowgrpo_ray.spec_sections import ActorsSpec, ClusterSpec

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def place(cluster: ClusterSpec) -> PlacementGroup:
    """One placement group: a bundle per learner rank, then one per rollout worker."""
    kinds = [cluster.learner] * cluster.learner.count + [cluster.rollout] * cluster.rollout.count
    return placement_group([_bundle(kind) for kind in kinds], strategy="PACK")


def _bundle(kind: ActorsSpec) -> dict[str, float]:
    bundle = {"CPU": kind.cpus, "GPU": kind.gpus, **kind.resources}
    return {resource: amount for resource, amount in bundle.items() if amount}


def launch(
    cls: type, kind: ActorsSpec, group: PlacementGroup, bundle: int, name: str, *args: Any
) -> Any:
    """Start an actor of ``cls`` in a bundle; returns its handle while it still starts.

    ``name`` is what the dashboard shows; it is unique within the run's own namespace.
    """
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    return (
        ray.remote(cls)
        .options(
            name=name,
            num_cpus=kind.cpus,
            num_gpus=kind.gpus,
            resources=kind.resources,
            scheduling_strategy=strategy,
        )
        .remote(*args)
    )


def set_up_process(kind: ActorsSpec, name: str, run: str) -> torch.device:
    """In an actor: who it is, for its log; quiet libraries, its threads and its device."""
    print(f"{name} of run {run}: pid {os.getpid()} on {socket.gethostname()}", flush=True)
    os.environ["OMP_NUM_THREADS"] = str(kind.threads)  # before torch is imported
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    import torch

    torch.set_num_threads(kind.threads)
    return torch.device("cuda", 0) if kind.gpus else torch.device("cpu")


async def within(seconds: float, what: str, calls: Iterable[Awaitable[T]]) -> list[T]:
    """All results, or ``ClusterError`` naming ``what`` was not ready in time."""
    ready = asyncio.gather(*calls)
    ready.add_done_callback(lambda f: f.cancelled() or f.exception())  # seen, also if cancelled
    try:
        return await asyncio.wait_for(ready, seconds)
    except TimeoutError:
        raise ClusterError(
            f"{what} not ready after cluster.ready_timeout_s = {seconds:g} s; the actors' logs say "
            "why (a missing package, a slow download), and ray status what waits for resources"
        ) from None


async def all_or_none(*parts: Coroutine[Any, Any, None]) -> None:
    """Run the parts together; if one fails the others are cancelled and its error is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
