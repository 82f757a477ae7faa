"""Trainable weights as named arrays, and the digest that says which ones a process holds.

The learner publishes arrays and their digest; a rollout worker copies them into its parameters,
takes the digest of the PARAMETERS and answers with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from flowgrpo_ray.common.errors import ContractError
from flowgrpo_ray.common.types import Float32
from flowgrpo_ray.policies.arrays import as_array, as_tensor

_MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed 64-bit integer
_CHUNK = 1 << 22
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(parameters: Mapping[str, Tensor]) -> str:
    """Digest of names, shapes, dtypes and exact bits, computed on the tensors' own device.

    Each tensor is summed as integers times an odd number per position, modulo 2^64, so one changed
    or moved value changes the sum; it guards against stale weights, not against an adversary.
    """
    return gather(parameters, keep=False)[0]


def gather(
    parameters: Mapping[str, Tensor],
    *,
    keep: bool,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> tuple[str, dict[str, NDArray[Any]]]:
    """The digest of whole parameters, in other ``dtypes`` where these are named, and, to ``keep``,
    their arrays on the CPU (of bfloat16 its bits, as uint16).

    Collective over the ranks that hold shards. Only one whole tensor is on the device at a time.
    """
    total = hashlib.blake2b(digest_size=16)
    arrays: dict[str, NDArray[Any]] = {}
    for name in sorted(parameters):
        tensor = full(parameters[name])
        tensor = tensor.to((dtypes or {}).get(name, tensor.dtype))
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_checksum(tensor)}".encode())
        if keep:
            arrays[name] = _array(tensor)
    return total.hexdigest(), arrays


def _checksum(tensor: Tensor) -> int:
    words = tensor.contiguous().view(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK].long()
        position = torch.arange(start, start + len(chunk), device=tensor.device)
        total += (chunk * ((position * _MULTIPLIER) | 1)).sum()
    return int(total.item())


def full(tensor: Tensor) -> Tensor:
    """The whole tensor of a sharded one; collective over the ranks that hold its shards."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(whole: Tensor, target: Tensor) -> Tensor:
    """``whole`` sharded, typed and placed as ``target`` is."""
    whole = whole.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        return distribute_tensor(whole, target.device_mesh, target.placements)
    return whole


def share(tensors: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Float32]:
    """What a rank adds to whole arrays, copied to the CPU: later updates do not reach it.

    Of a sharded tensor its slice, unless that is another one's copy; of those that every rank has
    whole, each ``ranks``-th. No rank waits for another.
    """
    mine: dict[str, Float32] = {}
    for number, name in enumerate(sorted(tensors)):  # after a load they may be in another order
        tensor = tensors[name]
        if isinstance(tensor, DTensor):
            mesh, local = tensor.device_mesh, tensor.to_local().detach()
            copied = mesh.ndim > 1 and mesh.get_local_rank(0) > 0
            if local.numel() and not copied:
                mine[name] = _array(local)
        elif number % ranks == rank:
            mine[name] = _array(tensor.detach())
    return mine


def _array(tensor: Tensor) -> NDArray[Any]:
    return as_array(tensor.to("cpu", copy=True, memory_format=torch.contiguous_format))


@torch.no_grad()
def load_arrays(parameters: Mapping[str, Tensor], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Copy ``arrays`` into ``parameters``; the names and shapes must be the same."""
    if parameters.keys() != arrays.keys():
        odd = sorted(parameters.keys() ^ arrays.keys())
        raise ContractError(
            f"weights do not fit the network: {len(odd)} names differ, as {odd[:3]}"
        )
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != arrays[name].shape:
            raise ContractError(
                f"weights do not fit the network: {name} is {tuple(parameter.shape)} here and "
                f"{arrays[name].shape} there"
            )
        parameter.copy_(like(as_tensor(arrays[name]), parameter))
