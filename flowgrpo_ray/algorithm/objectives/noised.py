"""Objectives that train the velocity on finished images, noised anew at levels of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from flowgrpo_ray.algorithm.objectives.base import Objective, Statistic
from flowgrpo_ray.algorithm.objectives.surrogate import mean_over_latent
from flowgrpo_ray.common.strict import Strict
from flowgrpo_ray.common.types import Noising

if TYPE_CHECKING:
    from torch import Tensor

    from flowgrpo_ray.spec.sampling import SamplingSpec


@dataclass(frozen=True)
class Noised:
    """Finished latents ``[b, *D]`` of a micro-batch at a noise level of each sample's own.

    ``x = (1 - sigma) clean + sigma noise``; velocities are those of the network there.
    """

    sigma: Tensor  # [b, 1, ...], as many dimensions as the latents
    clean: Tensor
    noise: Tensor
    x: Tensor
    velocity: Tensor  # of the weights that are trained
    old: Tensor  # of those that sampled
    reference: Tensor | None  # of the untrained model, where the trajectory kept it
    anchor: Tensor | None  # of weights that follow, where those did not sample


class Times(Strict):
    """The noise levels at which an image is trained; each sample draws its own."""

    count: int = Field(ge=1, description="how many for each image")
    draw: Literal["uniform", "stratified", "steps"] = Field(
        default="uniform",
        description="`uniform` in `within`; one in each of `count` equal parts of it "
        "(`stratified`); or `count` different ones of those that sampling stops at (`steps`)",
    )
    within: tuple[float, float] = Field(
        default=(0.0, 1.0), description="least and greatest noise level"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Times:
        low, high = self.within
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"within = [{low:g}, {high:g}] must lie in [0, 1], the lower one first"
            )
        return self


class Follower(Strict):
    """How a second set of weights follows the trained ones after each iteration.

    ``follower = d follower + (1 - d) trained``, ``d = min(rate (n - flat), cap)`` after ``n``
    updates, and 0 before ``flat``.
    """

    flat: int = Field(default=0, ge=0, description="updates up to which both are equal")
    rate: float = Field(default=0.001, ge=0, description="growth of the decay with each update")
    cap: float = Field(default=0.5, ge=0, lt=1, description="the largest decay")

    def decay(self, updates: int) -> float:
        """``d`` after so many updates."""
        return min(max(0, updates - self.flat) * self.rate, self.cap)


REFERENCE = Statistic(
    "reference_distance",
    "Distance to the base model",
    "mean squared velocity",
    "mean squared distance of the velocity to the reference's, before its weight",
    penalty=True,
)


class NoisedObjective(Objective):
    """Trains the velocity on finished images: no stochastic step, no probability.

    Samples may be drawn by any solver, without guidance.
    """

    stochastic = False
    keeps_old = True
    without_tie = "objective.reference=0"

    updates: int = Field(default=1, ge=1, description="optimizer updates per pass over the samples")
    times: Times = Field(description="the noise levels it trains at")
    reference: float = Field(
        default=1e-4,
        ge=0,
        description="weight of the squared distance to the untrained model's velocity",
    )

    @property
    def noising(self) -> Noising:
        return Noising(self.times.count, self.times.draw, self.times.within)

    @property
    def penalties(self) -> Mapping[str, float]:
        return {"reference_distance": self.reference} if self.reference else {}

    def ties(self, point: Noised) -> dict[str, Tensor]:
        """The statistics of ``penalties``: distance of the velocity to the untrained model's."""
        if not self.reference:
            return {}
        assert point.reference is not None, "rollout workers keep the reference with its weight"
        return {"reference_distance": squared(point.velocity - point.reference)}

    def untied(self) -> NoisedObjective:
        return self.model_copy(update={"reference": 0.0})

    def check(self, sampling: SamplingSpec) -> None:
        super().check(sampling)
        if sampling.same_latent:
            raise ValueError(
                f"objective.kind = {self.kind} draws its samples without noise, so those of a "
                "prompt would be one image with sampling.same_latent = true: leave it out"
            )
        most = sampling.steps
        if self.times.draw == "steps" and self.times.count > most:
            raise ValueError(
                f"objective.times.count = {self.times.count} noise levels of draw = steps, and "
                f"sampling.steps = {most}"
            )


def squared(x: Tensor) -> Tensor:
    """``mean_D x^2``: ``[b]``."""
    return mean_over_latent(x**2)
