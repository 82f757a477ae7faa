"""How much of hub models has come to a cluster's machines, for a clock that counts silence: whoever
starts and downloads on the way may take long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class HubCache:
    """Of one machine."""

    def bytes(self) -> int:
        """What its cache holds, what is on its way included."""
        from huggingface_hub.constants import HF_HUB_CACHE

        total = 0
        for file in Path(HF_HUB_CACHE).glob("*/blobs/*"):
            with suppress(FileNotFoundError):  # it was on its way, and has another name now
                total += file.stat().st_size
        return total


@contextmanager
def arrivals(environment: Mapping[str, str] | None = None) -> Iterator[Callable[[], int]]:
    """A function that counts these bytes on all machines; it starts what counts on its first call,
    as a start that is over soon need not pay for it."""
    caches: list[Any] = []

    def count() -> int:
        if not caches:
            caches.extend(_on_each_node(environment))
        found: list[int] = []
        for cache in caches:
            with suppress(RayError):  # its machine is gone, and with it what came there
                found.append(ray.get(cache.bytes.remote()))  # pyright: ignore[reportArgumentType]
        return sum(found)

    try:
        yield count
    finally:
        for cache in caches:
            ray.kill(cache)


def _on_each_node(environment: Mapping[str, str] | None) -> Iterator[Any]:
    for node in ray.nodes():
        if node["Alive"]:
            yield start_on(node["NodeID"], HubCache, environment=environment)


def start_on(
    node: str, cls: type, *arguments: object, environment: Mapping[str, str] | None = None
) -> Any:
    """An actor of `cls` on this machine and no other, beside whatever is reserved there."""
    return (
        ray.remote(cls)
        .options(
            num_cpus=0,
            runtime_env={"env_vars": dict(environment)} if environment else None,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(*arguments)
    )
