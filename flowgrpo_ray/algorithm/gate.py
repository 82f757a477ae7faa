"""The ratio contract: before an iteration's first update nothing tells sampler and learner apart.

What was sampled under the published weights, replayed under the same ones, has ``|log rho| = 0``,
or as little as this hardware cannot reproduce. More means that the two sides differ in something,
and every update would follow that; it ends the run, and the message says in what they differ.
"""

from __future__ import annotations

from torch import Tensor

from flowgrpo_ray.common.errors import ContractError
from flowgrpo_ray.common.types import Trajectory, WeightsTicket, WorkUnit

FLOOR_MARGIN = 4.0  # the floor is measured on one micro-batch; later ones may lie this much above
KEPT = 3  # published versions that samples may come from: of training, its past, before a resume


class RatioGate:
    """Of one learner rank. ``max_lag``: versions that samples may be older than the published."""

    def __init__(self, dtype: str, max_lag: int) -> None:
        self.floor = 0.0  # what ``|log rho|`` may be
        self.armed = False  # from publishing to the first update
        self.published = WeightsTicket(version=-1, digest="")
        self._dtype, self._max_lag = dtype, max_lag
        self._digests: dict[int, str] = {}  # of the last published versions

    def expect(self, ticket: WeightsTicket) -> None:
        """What is trained next was sampled under these weights, or lags behind them."""
        self.published, self.armed = ticket, True
        self.remember(ticket)

    def remember(self, ticket: WeightsTicket) -> None:
        """Samples may come from these weights."""
        self._digests[ticket.version] = ticket.digest
        for old in list(self._digests)[:-KEPT]:
            del self._digests[old]

    def check(self, log_ratio: Tensor, unit: WorkUnit, trajectory: Trajectory) -> None:
        """``ContractError`` where ``log_ratio [b]`` of a unit is above the floor, or it was sampled
        otherwise than it is trained.

        Samples that lag behind the published weights are held against their version alone.
        """
        worst = float(log_ratio.abs().max())
        causes = self._mismatches(unit, trajectory)
        lags = trajectory.provenance.weights_version < self.published.version
        if not causes and (lags or worst <= self.floor):
            return
        raise ContractError(
            f"importance ratio: max |log rho| = {worst:.3g} before the first update, in "
            f"micro-batch {unit.index} of iteration {unit.iteration}; it must be at most "
            f"{self.floor:.3g}. Cause: " + ("; ".join(causes) or _UNKNOWN_CAUSE)
        )

    def _mismatches(self, unit: WorkUnit, trajectory: Trajectory) -> list[str]:
        sampled, batch = trajectory.provenance, len(trajectory.latents)
        causes: list[str] = []
        lag = self.published.version - sampled.weights_version
        known = self._digests.get(sampled.weights_version) == sampled.weights_digest
        if not (known and 0 <= lag <= self._max_lag):
            causes.append(
                f"stale weights: sampled with version {sampled.weights_version} "
                f"({sampled.weights_digest[:8]}), published is {self.published.version} "
                f"({self.published.digest[:8]})"
            )
        if sampled.batch != batch or unit.batch != batch:
            causes.append(
                f"batch geometry: sampled in a micro-batch of {sampled.batch}, trained in one of "
                f"{batch}"
            )
        if sampled.dtype != self._dtype:
            causes.append(f"dtype: sampled in {sampled.dtype}, trained in {self._dtype}")
        if sampled.schedule != unit.schedule:
            causes.append(
                f"schedule: sampled with {sampled.schedule}, trained with {unit.schedule}"
            )
        return causes


_UNKNOWN_CAUSE = (
    "version, batch geometry, dtype and schedule all agree, so the two sides compute differently "
    "(other hardware, attention backend or library version)"
)
