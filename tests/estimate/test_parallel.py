"""Who holds how much of the network: what fits is taken, and no rank ever loads more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import spec_of
from tiny_runs import TUNINGS, small_spec
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_init
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from flowgrpo_ray.algorithm import parallel as sharing
from flowgrpo_ray.common.types import Parallel
from flowgrpo_ray.estimate import footprint, memory
from flowgrpo_ray.estimate.dry_run import Meter, give_shapes
from flowgrpo_ray.estimate.parallel import choose, presumed_nodes, unmeasured, ways

GIB = 2**30
GPUS = "cluster={rollout: {gpus: 1}, learner: {count: 4, gpus: 1}}"
COLOCATED = "cluster={layout: colocated, workers: {count: 4, gpus: 1}}"
TWO_NODES = ("a", "b", "a", "b")


def described(way: Parallel) -> tuple[int, int, str]:
    """Shards, copies, and what is kept whole."""
    copies = len(way.groups) if way.sharded else way.ranks
    return way.shards, copies, "w" * way.keep_weights + "g" * way.keep_gradients


def test_ways_from_what_sends_the_least_to_what_needs_the_least():
    def found(*overrides: str, nodes: Any = "aaaa") -> list[tuple[int, int, str]]:
        return [described(way) for way in ways(small_spec("sampling.groups=8", *overrides), nodes)]

    shards = [(4, 1, kept) for kept in ("wg", "w", "g", "")]
    assert found(GPUS) == [(1, 4, ""), *shards]
    assert found(GPUS, "cluster.learner.parallel=shard") == shards
    assert found(GPUS, "cluster.learner.parallel=replicate") == [(1, 4, "")]
    assert found(GPUS, nodes="a") == [(1, 1, "")]
    assert found(COLOCATED) == [(1, 4, ""), (4, 1, "wg")], "each samples alone"
    within = [(2, 2, kept) for kept in ("wg", "w", "g", "")]
    assert found(GPUS, nodes=TWO_NODES) == [(1, 4, ""), *within, *shards]
    assert found(GPUS, nodes="aaab") == [(1, 4, ""), *shards], "uneven machines are one"
    assert found(GPUS, nodes="abcd") == [(1, 4, ""), *shards], "and so are those of one rank"


def test_shards_lie_within_a_machine_in_whatever_order_ranks_came():
    way = ways(small_spec("sampling.groups=8", "cluster.learner.parallel=shard"), TWO_NODES)[0]
    assert way.groups == ((0, 2), (1, 3))
    assert str(way) == (
        "each holds 1/2 of the network (2 copies), and weights and gradients whole while it trains"
    )


@pytest.mark.parametrize(
    ("gib", "expected"), [(None, 0), (40, 0), (39, 1), (30, 1), (29, 2), (21, 3), (20, 4), (9, 4)]
)
def test_the_first_way_that_fits_is_taken_or_the_leanest(gib: float | None, expected: int):
    spec = small_spec("sampling.groups=8", GPUS)
    options = ways(spec, "aaaa")
    needs = dict(zip(options, (40, 30, 28, 21, 20), strict=True))

    def stages(way: Parallel) -> dict[str, Any]:
        return {
            "rollout": {"sampling": {"weights": 90 * GIB}},  # another GPU's
            "learner": {"training": {"weights": needs[way] * GIB}},
        }

    limit = None if gib is None else gib * GIB
    rewards = {name: {} for name in spec.rewards}
    assert choose(spec, "aaaa", limit, stages, rewards) == options[expected]


def test_ranks_decide_by_the_smallest_of_their_gpus():
    spec = small_spec(TUNINGS["full"], "sampling.groups=8", GPUS)
    whole = footprint.estimate(spec)
    assert whole is not None
    assert not whole.parallel.sharded, "on GPUs of any size"
    need = max(sum(parts.values()) for parts in whole.actors["learner"].values())
    assert footprint.decide(spec, [("a", need)] * 4) == whole.parallel
    less = footprint.decide(spec, [("a", need), ("a", need - 1), ("b", need), ("b", need)])
    assert (less.sharded, less.groups) == (True, ((0, 1), (2, 3)))
    assert footprint.decide(spec, [("a", None)] * 4) == whole.parallel, "and on the CPU"


def test_ranks_count_the_images_to_change_as_the_plan_does():
    spec = spec_of("flux2", "sampling.groups=8", GPUS, "sampling.size=[128, 128]")

    def need(sources: int) -> int:
        found = footprint.estimate(spec, sources=sources)
        assert found is not None
        assert not found.parallel.sharded
        return max(sum(parts.values()) for parts in found.actors["learner"].values())

    most = need(4)
    for sources, sharded in {0: False, 4: True}.items():
        places = [("a", most - 1)] * 4
        assert footprint.decide(spec, places, sources=sources).sharded == sharded
    assert not footprint.decide(spec, [("a", most)] * 4, sources=4).sharded


def test_models_of_unknown_size_are_sharded_where_all_is_tuned():
    """What would be a surprise is a rank that runs out of memory."""
    for tuning, sharded in {"lora": False, "full": True}.items():
        spec = small_spec(TUNINGS[tuning], "sampling.groups=8", GPUS, "model.path=owner/name")
        assert footprint.decide(spec, [("a", 79 * GIB)] * 4) == unmeasured(spec, "aaaa")
        assert unmeasured(spec, "aaaa").sharded == sharded


def test_a_plan_presumes_as_few_machines_as_there_may_be():
    spec = small_spec("sampling.groups=16", GPUS.replace("4", "16"))
    assert presumed_nodes(spec) == [0] * 8 + [1] * 8


# --- loading


class OnGpu(Meter):
    """Counts what lies on a GPU that is not there."""

    def _see(self, tensor: Tensor, *, counts: bool = True) -> None:
        if tensor.device.type == "cuda" and not isinstance(tensor, DTensor):
            super()._see(tensor, counts=counts)


@contextmanager
def a_rank_of_eight(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceMesh]:
    """On a GPU that is not there, in a group in which nobody else is."""

    def move(parameters: list[Tensor], buffers: list[Tensor], device: torch.device) -> None:
        for tensor in (*parameters, *buffers):  # as torch does it, told to the fake tensor as well
            moved: Any = tensor.detach().to(device)
            tensor.data, tensor.fake_device = moved, moved.fake_device  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_fsdp_init, "_move_states_to_device", move)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    mesh = DeviceMesh("cuda", torch.arange(8), mesh_dim_names=("shards",))
    monkeypatch.setattr(sharing, "DeviceMesh", lambda *_, **__: mesh)
    yield mesh
    dist.destroy_process_group()


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_rank_never_holds_more_than_its_shards_and_one_block(tuning, monkeypatch):
    """Counted as the estimate counts it, with a network that is built on the CPU."""
    spec = small_spec(TUNINGS[tuning], "model.dtype=bfloat16")
    configs = footprint.find_configs(spec.model)
    assert configs is not None
    policy = footprint.skeleton(spec, configs)
    buffers = sum(b.nbytes for b in policy.network.buffers())
    eighths = Parallel(True, (tuple(range(8)),))
    expected = memory._loaded_by_blocks(policy, eighths)["weights"]
    whole = sum(p.nbytes for p in policy.network.parameters()) + buffers
    policy.device = torch.device("cuda")
    with a_rank_of_eight(monkeypatch), FakeTensorMode(), OnGpu([]) as gpu:
        give_shapes(policy.network)
        assert gpu.bytes == 0
        sharing.shard(policy, eighths)
    assert expected - buffers <= gpu.peak <= expected < 0.6 * whole, "of three blocks"
    state = memory.learner_state(spec, policy, eighths)
    assert gpu.bytes == state["weights"]
