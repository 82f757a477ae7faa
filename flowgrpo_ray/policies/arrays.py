"""Arrays of a condition: how tensors travel as numpy, and become a batch again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def as_array(tensor: Tensor) -> NDArray[Any]:
    """A tensor of a condition as numpy, which has no bfloat16: its bits travel as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def as_tensor(array: NDArray[Any]) -> Tensor:
    """The tensor that ``as_array`` was given."""
    tensor = torch.tensor(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def pad(arrays: Sequence[NDArray[Any]]) -> tuple[Tensor, Tensor | None]:
    """Stack arrays ``[L_i, ...]`` of a condition to ``[b, L, ...]``, zeros behind the shorter ones.

    Also the mask ``[b, L]`` that is True on what was there; ``None`` if all lengths are equal, so
    that attention may use its unmasked kernels.
    """
    tensors = [as_tensor(array) for array in arrays]
    lengths = torch.tensor([len(tensor) for tensor in tensors])
    padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    if (lengths == lengths[0]).all():
        return padded, None
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
