"""How several learner ranks hold one network: where they meet, and what they send each other.

Replicated ranks hold all of it and meet once per update, to add up their gradients. Sharded ones
hold a share each and gather whole blocks (FSDP2): in half precision where that is the model's, in
every forward and backward or, where memory allows, once per update; and then their gradients, too,
meet once per update.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from flowgrpo_ray.common.interfaces import interface_to
from flowgrpo_ray.common.types import Parallel
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.policies.kernels import cast_by_autocast
from flowgrpo_ray.spec.training import TrainingSpec

Place = TypeVar("Place")
Decision = TypeVar("Decision")

PIECE = 1 << 26  # numbers that are added up at once: 256 MiB of each rank's


def join_group(
    rank: int, world: int, at: socket.socket | tuple[str, int], device: torch.device
) -> None:
    """Join the learner ranks' process group; ``at`` is where rank 0 listens, of rank 0 the socket.

    It asks nobody for a token, so it listens at that host alone; torch's own store would at all.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if isinstance(at, socket.socket):
        (host, port), listener = at.getsockname()[:2], at.detach()  # the store's from now on
    else:
        (host, port), listener = at, None
    assert (listener is not None) == (rank == 0), "the first rank listens, the others do not"
    if name := interface_to(host):  # neither guesses well on machines with several
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, name)
    store = dist.TCPStore(host, port, world, is_master=rank == 0, master_listen_fd=listener)
    own = device if backend == "nccl" else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=own)


def agree(mine: Place, decide: Callable[[list[Place]], Decision]) -> Decision:
    """What rank 0 makes of what all ranks say of themselves, in rank order; collective."""
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, mine)
    decided: list[Any] = [decide(places) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(decided)
    return decided[0]


def asked_for(spec: TrainingSpec, ranks: int) -> Parallel:
    """What the spec says, where no memory is known: ``auto`` replicates, shards are kept whole."""
    sharded = ranks > 1 and spec.cluster.learner.parallel == "shard"
    together = tuple(range(ranks))
    groups = (together,) if sharded else tuple((rank,) for rank in together)
    return Parallel(sharded, groups, keep_weights=sharded, keep_gradients=sharded)


def shard(policy: Policy, parallel: Parallel) -> None:
    """Share the network out over the ranks of each group: FSDP2, block by block.

    A network on the CPU goes to the policy's device by blocks, of which each is whole there for the
    moment in which it is cut.
    """
    groups = torch.tensor(parallel.groups)
    names = ("copies", "shards") if len(groups) > 1 else ("shards",)
    mesh = DeviceMesh(policy.device.type, groups.squeeze(0), mesh_dim_names=names)
    network, cast = policy.network, cast_by_autocast(policy.network)
    precision = MixedPrecisionPolicy(
        param_dtype=policy.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
        param_dtype_override_fn=lambda p: policy.dtype if id(p) in cast else p.dtype,
    )
    for module in (*policy.blocks_of(network), network):
        fully_shard(module, mesh=mesh, mp_policy=precision)
    assert isinstance(network, FSDPModule)
    for method in policy.ways_in:
        register_fsdp_forward_method(network, method)
    if parallel.keep_weights:
        network.set_reshard_after_forward(False)
        network.set_reshard_after_backward(False)
    network.set_manual_backward_finalization(parallel.keep_gradients)
    network.set_requires_gradient_sync(not parallel.keep_gradients)
    if policy.reference_network is not None:  # which is whole everywhere
        policy.reference_network.to(policy.device)


def finish(network: nn.Module, parallel: Parallel) -> None:
    """Before an update: every gradient its mean over the ranks, every rank with its shards alone.

    Collective.
    """
    assert isinstance(network, FSDPModule)
    if parallel.keep_gradients:
        network.set_requires_gradient_sync(True)
        network.finalize_backward()
        network.set_requires_gradient_sync(False)
    reshard(network)


def gather_weights(network: nn.Module) -> None:
    """Have every rank hold whole weights until ``reshard``; collective, and nothing else is then
    until ``finish``, if ``keep_weights`` and ``keep_gradients``."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def reshard(network: nn.Module) -> None:
    """Drop the gathered weights: needed before shards get other values."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each float32 tensor by its sum over the ranks; collective.

    Summed in rank order, so that every rank has the same bits whatever the backend's own order is.
    One call for all of them, or for each ``PIECE`` of what is larger.
    """
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    for piece in flat.split(PIECE):
        parts = [torch.empty_like(piece) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, piece)
        piece.copy_(parts[0])
        for part in parts[1:]:
            piece.add_(part)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
