"""Trainable weights as named arrays, and the digest that says which ones a process holds.

The learner publishes arrays and their digest; a rollout worker copies them into its parameters,
takes the digest of the PARAMETERS and answers with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from flowgrpo_ray.common.errors import ContractError
from flowgrpo_ray.common.types import Float32

_MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed 64-bit integer
_CHUNK = 1 << 22
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(parameters: Mapping[str, Tensor]) -> str:
    """Digest of names, shapes, dtypes and exact bits, computed on the tensors' own device.

    Each tensor is summed as integers times an odd number per position, modulo 2^64, so one changed
    or moved value changes the sum; it guards against stale weights, not against an adversary.
    """
    return gather(parameters, keep=False)[0]


def gather(parameters: Mapping[str, Tensor], *, keep: bool) -> tuple[str, dict[str, Float32]]:
    """The digest of whole parameters and, to ``keep``, their arrays on the CPU; collective over the
    ranks that hold shards. Only one whole tensor is on the device at a time."""
    total = hashlib.blake2b(digest_size=16)
    arrays: dict[str, Float32] = {}
    for name in sorted(parameters):
        tensor = full(parameters[name])
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


def to_arrays(parameters: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Float32]:
    """Whole arrays on the CPU, copied: later updates of the parameters do not reach them.

    Collective, one tensor at a time; without ``keep`` this rank takes part and has no arrays.
    """
    whole = ((name, full(parameter)) for name, parameter in parameters.items())
    return {name: _array(tensor) for name, tensor in whole if keep}


def _array(tensor: Tensor) -> Float32:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format).numpy()


@torch.no_grad()
def load_arrays(parameters: Mapping[str, Tensor], arrays: Mapping[str, Float32]) -> None:
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
        parameter.copy_(like(torch.tensor(arrays[name]), parameter))
