"""The statistics of one micro-batch, added up point by point while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, reduce
from operator import add

import torch
from torch import Tensor

from flowgrpo_ray.algorithm.objectives import Term
from flowgrpo_ray.common.types import MicrobatchStats


class Tally:
    """Statistics of one micro-batch, over its points and the samples that are ``kept``.

    They stay on the device until all points are there: each transfer would wait for the GPU.
    """

    def __init__(self, kept: Tensor) -> None:
        self._kept = kept
        self._gates: list[Tensor] = []
        self._sums: dict[str, list[Tensor]] = {}
        self._policy_losses: list[Tensor] = []

    def add(self, term: Term, policy_loss: Tensor) -> None:
        self._gates.append(term.gate.detach())
        self._policy_losses.append(policy_loss.detach())
        for name, values in term.statistics.items():
            self._sums.setdefault(name, []).append((values.detach() * self._kept).sum())

    @cached_property
    def gates(self) -> Tensor:
        """``[K, b]``, float64, of all samples; once all points are there."""
        return torch.stack(self._gates).double()

    def stats(self, seconds: float, *, gated: bool, excess: int) -> MicrobatchStats:
        gates = self.gates[:, self._kept]
        return MicrobatchStats(
            samples=gates.shape[1],
            gate_sum=gates.sum(1).cpu().numpy(),
            gate_square_sum=gates.square().sum(1).cpu().numpy(),
            gate_max=gates.abs().max().item() if gates.numel() else 0.0,
            gated=gated,
            policy_loss_sum=_total(self._policy_losses),
            sums={name: _total(values) for name, values in self._sums.items()},
            seconds=seconds,
            gate_excess=excess,
        )


def _total(values: Sequence[Tensor]) -> float:
    """The sum of one number of each point, in float64, one after the other: ``sum`` rounds
    otherwise from Python 3.12 on."""
    return reduce(add, torch.stack([*values]).tolist(), 0.0)
