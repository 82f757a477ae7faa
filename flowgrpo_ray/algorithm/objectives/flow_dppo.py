"""Flow-DPPO (arXiv 2606.11025): a trust region by exact divergence instead of a clipped ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from flowgrpo_ray.algorithm.objectives.base import Bounds, Term
from flowgrpo_ray.algorithm.objectives.steps import Step, StepObjective
from flowgrpo_ray.algorithm.objectives.surrogate import diverged, masked_losses

if TYPE_CHECKING:
    from torch import Tensor


class FlowDppo(StepObjective):
    """Masks by exact divergence from the sampling policy instead of clipping (Flow-DPPO)."""

    called = "Flow-DPPO"
    keeps_old = True

    kind: Literal["flow_dppo"]
    max_divergence: float = Field(
        default=1e-5, gt=0, description="KL per latent dimension up to which every sample counts"
    )

    @property
    def bounds(self) -> Bounds:
        return Bounds({"max_divergence": self.max_divergence}, masks=True)

    def terms(self, point: Step, advantage: Tensor) -> Term:
        assert point.old is not None, "rollout workers keep means for Flow-DPPO"
        divergence = point.new.kl(point.old).detach()
        log_ratio = point.log_ratio
        masked = diverged(log_ratio.detach(), advantage, divergence, self.max_divergence)
        return Term(
            loss=masked_losses(log_ratio, advantage, masked),
            gate=log_ratio,
            statistics={
                "clip_fraction.low": masked & (advantage < 0),
                "clip_fraction.high": masked & (advantage > 0),
                **self.ties(point),
            },
        )
