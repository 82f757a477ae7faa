"""Flow-GRPO (arXiv 2505.05470): a clipped policy gradient on the steps of sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from flowgrpo_ray.algorithm.objectives.base import Bounds, Term
from flowgrpo_ray.algorithm.objectives.steps import Step, StepObjective, clipped_term

if TYPE_CHECKING:
    from torch import Tensor


class FlowGrpo(StepObjective):
    """Clipped policy gradient on group advantages (Flow-GRPO)."""

    called = "Flow-GRPO"
    keeps_old = False

    kind: Literal["flow_grpo"]
    clip_low: float = Field(default=1e-4, gt=0, lt=1)
    clip_high: float = Field(default=1e-4, gt=0)

    @property
    def bounds(self) -> Bounds:
        return Bounds({"clip_low": self.clip_low, "clip_high": self.clip_high})

    def terms(self, point: Step, advantage: Tensor) -> Term:
        clip = (self.clip_low, self.clip_high)
        return clipped_term(point.log_ratio, advantage, clip, self.ties(point))
