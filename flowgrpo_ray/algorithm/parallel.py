"""How several learner ranks hold one network: where they meet, and what they send each other.

Sharded ranks hold a share each and gather whole blocks in every forward (FSDP2). Replicated ones
hold all of it and meet once per update, to add up their gradients.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flowgrpo_ray.common.loopback import is_loopback
from flowgrpo_ray.policies.base import Policy

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
    if is_loopback(host) and sys.platform == "linux":
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
    store = dist.TCPStore(host, port, world, is_master=rank == 0, master_listen_fd=listener)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def shard(policy: Policy, ranks: int) -> None:
    """Share the network out over the ranks of the default process group: FSDP2, block by block."""
    mesh = init_device_mesh(policy.device.type, (ranks,))
    kinds = policy.block_classes()
    for block in policy.network.modules():
        if isinstance(block, kinds):
            fully_shard(block, mesh=mesh)
    fully_shard(policy.network, mesh=mesh)


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
