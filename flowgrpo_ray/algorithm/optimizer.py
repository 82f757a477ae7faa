"""AdamW, the weights that follow (EMA, an objective's own), and the scale of float16 losses, over
one rank's shards.

With a ``home`` (the host's memory) AdamW's moments and the averages visit the parameters' device
in pieces, around the same fused update: the numbers are those without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flowgrpo_ray.algorithm.objectives.noised import Follower
from flowgrpo_ray.algorithm.weights import like
from flowgrpo_ray.common.errors import ContractError
from flowgrpo_ray.common.types import Float32
from flowgrpo_ray.spec.sections import EmaSpec, OptimizerSpec

MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 1 << 25  # numbers of a parameter piece: 128 MiB for each of its moments on the device
FIRST_SCALE, SCALE_HOLDS = 2.0**16, 2000  # of float16 losses; what torch.amp.GradScaler takes


class Shelf(Mapping[str, Tensor]):
    """Tensors shaped and sharded as the parameters, kept at ``home`` between uses.

    Reading gives a tensor on the parameter's own device: with a ``home`` a copy, which is freed
    after use; what was changed in it must be written back. Copies are queued on the device's stream
    and the host reads nothing but through the device, so none of them waits.
    """

    def __init__(self, parameters: Mapping[str, Tensor], home: torch.device | None) -> None:
        self._parameters, self._home = parameters, home
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        kept, parameter = self._kept[name], self._parameters[name]
        if self._home is None:
            return kept
        copy = kept.to(parameter.device, non_blocking=True, copy=True)
        if not isinstance(parameter, DTensor):
            return copy
        mesh, placements = parameter.device_mesh, parameter.placements
        return DTensor.from_local(
            copy, mesh, placements, shape=parameter.shape, stride=parameter.stride()
        )

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if self._home is None:
            self._kept[name] = tensor
            return
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name not in self._kept:
            pinned = local.is_cuda
            self._kept[name] = torch.empty_like(local, device=self._home, pin_memory=pinned)
        self._kept[name].copy_(local, non_blocking=True)

    def __contains__(self, name: object) -> bool:
        return name in self._kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def load(self, arrays: Mapping[str, Float32]) -> None:
        """Keep whole arrays, each sharded as its parameter is."""
        for name, array in arrays.items():
            self[name] = like(torch.tensor(array), self._parameters[name].detach())


class Optimizer:
    """AdamW and EMA over named float32 parameters; ``updates`` counts those that took place."""

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        settings: OptimizerSpec,
        averaging: EmaSpec | None,
        home: torch.device | None = None,
        following: Follower | None = None,
    ) -> None:
        self.parameters, self.averaging, self.following = parameters, averaging, following
        self.updates = 0
        self.moments = {moment: Shelf(parameters, home) for moment in MOMENTS}
        self.ema, self.follower = Shelf(parameters, home), Shelf(parameters, home)
        for shelf, wanted in ((self.ema, averaging), (self.follower, following)):
            for name, parameter in parameters.items() if wanted else ():
                shelf[name] = parameter.detach().clone()
        pieces = [list(parameters)] if home is None else list(_pieces(parameters))
        self.pieces = [(names, self._adamw(names, settings)) for names in pieces]

    def _adamw(self, names: list[str], settings: OptimizerSpec) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            [self.parameters[name] for name in names],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
            fused=True,  # one call for all parameters: seven times as fast over the tiny model
        )

    def step(self) -> None:
        """One update from the gradients that the parameters hold, then the averages' turn."""
        for names, adamw in self.pieces:
            self._lend_moments(names, adamw)
            adamw.step()
            self._take_moments(names, adamw)
        self.updates += 1
        self._average()

    def _lend_moments(self, names: list[str], adamw: torch.optim.AdamW) -> None:
        """Those of parameters that have any; for the others AdamW makes zeros."""
        known = [name for name in names if name in self.moments["exp_avg"]]
        device = self.parameters[names[0]].device
        counts = torch.full((len(known),), float(self.updates), device=device).unbind()
        for name, count in zip(known, counts, strict=True):
            state: dict[str, Any] = {"step": count}
            state |= {moment: shelf[name] for moment, shelf in self.moments.items()}
            adamw.state[self.parameters[name]] = state

    def _take_moments(self, names: list[str], adamw: torch.optim.AdamW) -> None:
        for name in names:
            state = adamw.state.pop(self.parameters[name], {})
            for moment in MOMENTS:
                if moment in state:
                    self.moments[moment][name] = state[moment]

    @torch.no_grad()
    def _average(self) -> None:
        """EMA with decay ``min((1 + n) / (10 + n), d)`` after ``n`` updates."""
        if self.averaging is None or self.updates % self.averaging.every:
            return
        decay = min((1 + self.updates) / (10 + self.updates), self.averaging.decay)
        self._move(self.ema, 1 - decay)

    @torch.no_grad()
    def follow(self) -> None:
        """The follower's turn, after an iteration."""
        if self.following is not None:
            self._move(self.follower, 1 - self.following.decay(self.updates))

    def _move(self, shelf: Shelf, share: float) -> None:
        """By a ``share`` of the way to the parameters; by all of it exactly to them."""
        for name, parameter in self.parameters.items():
            shelf[name] = shelf[name].lerp_(parameter.detach(), share)

    def zero_grad(self) -> None:
        """Free the gradients."""
        for _, adamw in self.pieces:
            adamw.zero_grad()


def _pieces(parameters: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names in order, in lists of at most ``PIECE`` numbers on this rank (or of one name)."""
    names: list[str] = []
    size = 0
    for name, parameter in parameters.items():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if names and size + local.numel() > PIECE:
            yield names
            names, size = [], 0
        names.append(name)
        size += local.numel()
    yield names


class LossScale:
    """What losses are multiplied by so that float16 gradients keep their small values.

    Halved by an overflow, doubled after ``SCALE_HOLDS`` updates without; 1 in other dtypes.
    """

    def __init__(self, dtype: torch.dtype, samples: int) -> None:
        """``samples`` are those that a loss is summed over: its gradient is as many times that of
        the mean, for which the first scale is meant."""
        self.dynamic = dtype == torch.float16
        self.value = FIRST_SCALE / 2 ** math.ceil(math.log2(samples)) if self.dynamic else 1.0
        self.held = 0  # updates since it last changed

    def overflowed(self, norm: float, update: int) -> bool:
        """Whether a gradient of ``norm`` is too large for the scale only, and costs an update.

        One that is not finite for another reason ends the run (``ContractError``).
        """
        if math.isfinite(norm):
            self.held += self.dynamic
            if self.held == SCALE_HOLDS:
                self.value, self.held = self.value * 2, 0
            return False
        if self.dynamic and self.value > 1:
            self.value, self.held = self.value / 2, 0
            return True
        raise ContractError(
            f"the gradient of update {update} is not finite (norm {norm}); lower "
            "optimizer.learning_rate, or use model.dtype: float32"
        )
