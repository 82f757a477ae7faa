"""Objectives that compare the probabilities of the stochastic steps that images were sampled by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from flowgrpo_ray.algorithm.objectives.base import Gate, Objective, Statistic, Term
from flowgrpo_ray.algorithm.objectives.surrogate import clipped, clipped_losses, kl_to_reference
from flowgrpo_ray.algorithm.objectives.tie import Adapt
from flowgrpo_ray.common.strict import Strict

if TYPE_CHECKING:
    from torch import Tensor

    from flowgrpo_ray.algorithm.flow import Gaussian


@dataclass(frozen=True)
class Step:
    """One stochastic step of a stored micro-batch, as the current weights see it."""

    step: int
    dt: float  # its length, negative
    new: Gaussian
    x_next: Tensor  # [b, *D]
    log_ratio: Tensor  # [b], log rho: of the step's log-probability, new against sampled
    old: Gaussian | None  # where the trajectory kept the sampling policy's means
    reference: Gaussian | None  # where it kept the untrained model's


class KlSpec(Strict):
    """KL to the untrained model."""

    beta: float = Field(gt=0)
    form: Literal["time_weighted", "gaussian"] = Field(
        default="time_weighted",
        description="time_weighted (what published betas mean) is KL x |dt|",
    )
    adapt: Adapt | None = Field(
        default=None, description="`beta` is where it starts, and then follows a watched reward"
    )


CLIPPED = Statistic(
    "clip_fraction",
    "Clipped",
    "share of samples × steps",
    "samples x steps without gradient",
    {"low": "below", "high": "above"},
)
KL = Statistic(
    "kl", "KL to the base model", "KL", "mean KL to the reference, before beta", penalty=True
)
RATIO = Gate(
    "log_ratio",
    "log rho",
    "Importance ratio",
    "ρ compares each sample's probability under the weights being trained with the one under which "
    "it was drawn. Before an iteration's first update both are the same weights, so its logarithm "
    "has to be 0: the gate.",
)


def clipped_term(
    log_ratio: Tensor,
    advantage: Tensor,
    clip: tuple[float, float],
    ties: Mapping[str, Tensor],
    weight: float = 1.0,
) -> Term:
    """The clipped surrogate on a ratio ``[b]``, with what ``CLIPPED`` reports of it."""
    low, high = clipped(log_ratio.detach(), advantage, *clip)
    return Term(
        loss=clipped_losses(log_ratio, advantage, *clip),
        gate=log_ratio,
        statistics={"clip_fraction.low": low, "clip_fraction.high": high, **ties},
        weight=weight,
    )


class StepObjective(Objective):
    """Compares the probabilities of the steps that images were sampled by."""

    gate = RATIO
    statistics = (CLIPPED, KL)
    stochastic = True
    without_tie = "objective.kl=null"
    tie = "kl"
    adapt_key = "objective.kl.adapt"

    kl: KlSpec | None = None

    @property
    def penalties(self) -> Mapping[str, float]:
        return {} if self.kl is None else {"kl": self.kl.beta}

    def ties(self, point: Step) -> dict[str, Tensor]:
        """The statistics of ``penalties``: KL of the step to the untrained model."""
        if self.kl is None:
            return {}
        assert point.reference is not None, "rollout workers keep the reference with KL"
        return {"kl": kl_to_reference(point.new, point.reference, point.dt, self.kl.form)}

    @property
    def adapts(self) -> Adapt | None:
        return self.kl and self.kl.adapt

    def tied(self, weight: float) -> StepObjective:
        assert self.kl is not None
        return self.model_copy(update={"kl": self.kl.model_copy(update={"beta": weight})})

    def untied(self) -> StepObjective:
        return self.model_copy(update={"kl": None})
