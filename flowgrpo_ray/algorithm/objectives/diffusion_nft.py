"""DiffusionNFT (arXiv 2509.16117): two regressions on finished images, towards good ones and away
from bad ones, with no stochastic step and no guidance.

The trained velocity ``v`` and that of the sampling weights ``v_old`` make two mirrored ones,
``v+ = beta v + (1 - beta) v_old`` and ``v- = (1 + beta) v_old - beta v``. The images that they lead
to are held against the one that was sampled; how much each branch counts is the sample's share of
optimality ``r``, from its advantage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from flowgrpo_ray.algorithm.objectives.base import Gate, Statistic, Term
from flowgrpo_ray.algorithm.objectives.noised import (
    REFERENCE,
    Follower,
    Noised,
    NoisedObjective,
    Times,
    squared,
)
from flowgrpo_ray.algorithm.objectives.surrogate import mean_over_latent

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_ERROR = 1e-5  # that a loss is divided by


class DiffusionNft(NoisedObjective):
    """Two mirrored regressions on finished images, weighted by the advantage (DiffusionNFT)."""

    called = "DiffusionNFT"
    gate = Gate(
        "velocity_change",
        "v - v_old",
        "Change of the velocity",
        "Before an iteration's first update the learner's velocity is that of the sampler, bit for "
        "bit, where both hold the same weights: their difference has to be 0, the gate.",
        signed=False,
    )
    statistics = (
        Statistic(
            "old_distance",
            "Distance to the sampling weights",
            "mean squared velocity",
            "mean squared distance of the velocity to that of the weights that sampled",
        ),
        Statistic(
            "regression",
            "Regression of both branches",
            "weighted squared error",
            "mean loss of the branch towards an image and of the one away from it",
            {"towards": "towards", "away": "away"},
        ),
        REFERENCE,
    )
    samples_with_follower = True

    kind: Literal["diffusion_nft"]
    beta: float = Field(
        default=1.0, gt=0, description="how far the two branches lie from the sampling weights"
    )
    decay: Follower = Field(
        default=Follower(),
        description="how the weights that sample follow the trained ones",
    )
    times: Times = Field(
        default=Times(count=9, draw="steps"), description="the noise levels it trains at"
    )
    adaptive: bool = Field(
        default=True, description="divide each error by its own size, without gradient"
    )
    advantage: Literal["graded", "strict"] = Field(
        default="graded",
        description="`strict`: by its sign alone, every image is wholly good or wholly bad",
    )
    advantage_max: float = Field(
        default=5.0, gt=0, description="that makes an image wholly good; scales the loss"
    )

    @property
    def follower(self) -> Follower:
        return self.decay

    def optimality(self, advantage: Tensor) -> Tensor:
        """``r [b]`` in [0, 1]: 1 for an image as good as can be, 1/2 for one like its group."""
        if self.advantage == "strict":
            return advantage.sign() / 2 + 0.5
        return (advantage / (2 * self.advantage_max) + 0.5).clamp(0, 1)

    def regression(self, point: Noised, velocity: Tensor) -> Tensor:
        """Squared error ``[b]`` of the image that ``velocity`` leads to."""
        error = point.x - point.sigma * velocity - point.clean
        if not self.adaptive:
            return squared(error)
        size = mean_over_latent(error.detach().abs()).clamp(min=SMALLEST_ERROR)
        return squared(error) / size

    def terms(self, point: Noised, advantage: Tensor) -> Term:
        r, change = self.optimality(advantage), point.velocity - point.old
        towards = self.regression(point, point.old + self.beta * change)
        away = self.regression(point, point.old - self.beta * change)
        return Term(
            loss=self.advantage_max * (r * towards + (1 - r) * away) / self.beta,
            gate=change.flatten(1).abs().amax(1),
            statistics={
                "old_distance": squared(change.detach()),
                "regression.towards": towards.detach(),
                "regression.away": away.detach(),
                **self.ties(point),
            },
        )
