"""AWM, advantage weighted matching (arXiv 2509.25050): a clipped policy gradient whose likelihood
is the regression that the model was trained by, on finished images noised anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from flowgrpo_ray.algorithm.objectives.base import Bounds, Statistic, Term
from flowgrpo_ray.algorithm.objectives.noised import (
    REFERENCE,
    Follower,
    Noised,
    NoisedObjective,
    Times,
    squared,
)
from flowgrpo_ray.algorithm.objectives.steps import CLIPPED, RATIO, clipped_term

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_ERROR = 1e-10  # that is added before a power is taken


class Awm(NoisedObjective):
    """Clipped policy gradient on the matching loss, anchored to its own average (AWM)."""

    called = "AWM"
    gate = RATIO
    statistics = (
        CLIPPED,
        Statistic(
            "anchor_distance",
            "Distance to the anchor",
            "mean squared velocity",
            "mean squared distance of the velocity to that of the weights that follow",
            penalty=True,
        ),
        REFERENCE,
    )

    kind: Literal["awm"]
    times: Times = Field(
        default=Times(count=6, draw="stratified", within=(0.1, 1.0)),
        description="the noise levels it trains at",
    )
    power: float = Field(
        default=0.25, gt=0, le=1, description="of the squared error in the likelihood"
    )
    clip: float = Field(default=1.0, gt=0, le=1, description="of the ratio, below and above 1")
    advantage_max: float = Field(
        default=5.0, gt=0, description="advantages are divided by it, so that they lie in [-1, 1]"
    )
    reference: float = Field(
        default=1e-3,
        ge=0,
        description="weight of the squared distance to the untrained model's velocity",
    )
    anchor: float = Field(
        default=1.0,
        ge=0,
        description="weight of the squared distance to the velocity of the weights that follow",
    )
    anchor_decay: Follower = Field(
        default=Follower(cap=0.3), description="how those follow the trained ones"
    )

    @property
    def bounds(self) -> Bounds:
        return Bounds({"clip": self.clip})

    @property
    def follower(self) -> Follower | None:
        return self.anchor_decay if self.anchor else None

    @property
    def penalties(self) -> Mapping[str, float]:
        anchor = {"anchor_distance": self.anchor} if self.anchor else {}
        return {**anchor, **super().penalties}

    @property
    def compares_reference(self) -> bool:
        return self.reference > 0

    def ties(self, point: Noised) -> dict[str, Tensor]:
        found = super().ties(point)
        if self.anchor:
            assert point.anchor is not None, "the learner evaluates the weights that follow"
            found["anchor_distance"] = squared(point.velocity - point.anchor)
        return found

    def log_likelihood(self, point: Noised, velocity: Tensor) -> Tensor:
        """``-t ((mse + 1e-10)^p - 1e-10^p) / p``: ``[b]``; ``mse`` to ``noise - clean``."""
        error = squared(velocity - (point.noise - point.clean))
        powers = (error + SMALLEST_ERROR) ** self.power - SMALLEST_ERROR**self.power
        return -point.sigma.flatten() * powers / self.power

    def terms(self, point: Noised, advantage: Tensor) -> Term:
        log_ratio = self.log_likelihood(point, point.velocity)
        log_ratio = log_ratio - self.log_likelihood(point, point.old)
        scaled = advantage / self.advantage_max
        return clipped_term(log_ratio, scaled, (self.clip, self.clip), self.ties(point))
