"""Where the actors of a run sit: one bundle of resources per GPU, held all together or not at all.

What shares a GPU shares a bundle: Ray adds fractions up node by node, so 0.6 and 0.4 of a GPU for
each of sixteen pairs would find no place that keeps the pairs together. Actors of a kind are
numbered node by node, so that ranks which talk to their neighbours stay within a machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from flowgrpo_ray.common.errors import ClusterError
from flowgrpo_ray.serving.ray_private import free_by_node
from flowgrpo_ray.spec.bundles import Bundle, plan_bundles
from flowgrpo_ray.spec.training import TrainingSpec

PLACE_S = 20.0  # that Ray may take to hold all bundles; what another run held is free by then


@dataclass(frozen=True)
class Placement:
    """A placement group, and the bundle of each actor by section of ``cluster``."""

    group: PlacementGroup
    bundles: Mapping[str, Sequence[int]]
    nodes: Sequence[str] = ()  # ids of those that hold any


async def place(spec: TrainingSpec) -> Placement:
    """Hold the resources of all actors; ``ClusterError`` if the cluster has no room for them."""
    bundles = plan_bundles(spec)
    group = placement_group([bundle.resources for bundle in bundles], strategy="PACK")
    if not await asyncio.to_thread(group.wait, PLACE_S):
        remove_placement_group(group)
        raise ClusterError(_no_room(bundles))
    nodes: Mapping[int, str] = placement_group_table(group)["bundles_to_node_id"]
    address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    by_node = sorted(nodes, key=lambda index: (address[nodes[index]], nodes[index], index))
    seats: dict[str, list[int]] = {section: [] for section in spec.actors}
    for index in by_node:
        for section, _ in bundles[index].seats:
            seats[section].append(index)
    return Placement(group, seats, sorted(set(nodes.values())))


def _no_room(bundles: Sequence[Bundle]) -> str:
    asked: dict[str, int] = {}
    for bundle in bundles:
        what = _told(bundle.resources)
        asked[what] = asked.get(what, 0) + 1
    wanted = ", ".join(f"{count} x ({what})" for what, count in asked.items())
    names = {name for bundle in bundles for name in bundle.resources}
    free = [
        _told({name: resources.get(name, 0.0) for name in sorted(names)})
        for resources in free_by_node().values()
    ]
    return (
        f"the cluster has no room for the actors of this run: they need {wanted}, each on one node "
        f"and all at once; free are {'; '.join(free)} (node by node). Other runs or deployments "
        "hold the rest (ray status): end those, or lower the counts and resources of the "
        "cluster section"
    )


def _told(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())
