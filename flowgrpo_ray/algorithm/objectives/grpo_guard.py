"""GRPO-Guard (arXiv 2510.22319): Flow-GRPO against over-optimization.

Its ratio has a zero-mean logarithm, so that clipping bites on both sides alike, and every step has
the same weight, whatever its length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from flowgrpo_ray.algorithm.objectives.base import Bounds, Term
from flowgrpo_ray.algorithm.objectives.steps import Step, StepObjective, clipped_term
from flowgrpo_ray.algorithm.objectives.surrogate import guard_log_ratio

if TYPE_CHECKING:
    from torch import Tensor

    from flowgrpo_ray.spec.sampling import SamplingSpec


class GrpoGuard(StepObjective):
    """Flow-GRPO with a ratio of zero-mean logarithm and one weight for all steps (GRPO-Guard)."""

    called = "GRPO-Guard"
    keeps_old = True

    kind: Literal["grpo_guard"]
    clip_low: float = Field(default=2e-6, gt=0, lt=1)
    clip_high: float = Field(default=2e-6, gt=0)

    @property
    def bounds(self) -> Bounds:
        return Bounds({"clip_low": self.clip_low, "clip_high": self.clip_high})

    def terms(self, point: Step, advantage: Tensor) -> Term:
        assert point.old is not None, "rollout workers keep means for GRPO-Guard"
        log_ratio = guard_log_ratio(point.new, point.old, point.x_next)
        clip = (self.clip_low, self.clip_high)
        return clipped_term(log_ratio, advantage, clip, self.ties(point), weight=1 / abs(point.dt))

    def check(self, sampling: SamplingSpec) -> None:
        super().check(sampling)
        for key, needed in (("kernel", "flow_sde"), ("likelihood", "gaussian")):
            value = getattr(sampling, key)
            if value != needed:
                raise ValueError(
                    f"objective.kind = grpo_guard needs sampling.{key} = {needed}, not {value}"
                )
