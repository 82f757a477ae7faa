"""The on-policy contract: before the first update nothing tells sampler and learner apart.

What was sampled under the published weights, replayed under the same ones, has a gate quantity
(``|log rho|``, or ``|v - v_old|``) of 0, or as little as this hardware cannot reproduce. More means
that the two sides differ in something, and every update would follow that; it ends the run, and the
message says in what they differ.
"""

from __future__ import annotations

from torch import Tensor

from flowgrpo_ray.algorithm.objectives.base import Gate
from flowgrpo_ray.common.errors import ContractError
from flowgrpo_ray.common.types import Trajectory, WeightsTicket, WorkUnit

FLOOR_MARGIN = 4.0  # the floor is measured on one micro-batch; later ones may lie this much above
KEPT = 3  # published versions that samples may come from: of training, its past, before a resume


class OnPolicyGate:
    """Of one learner rank. ``max_lag``: versions that samples may be older than the published."""

    def __init__(self, of: Gate, dtype: str, max_lag: int) -> None:
        self._of = of
        self.floor = 0.0  # what the quantity may be
        self.armed = False  # from publishing to the first update
        self.exact = True  # the published weights are those that are trained
        self.published = WeightsTicket(version=-1, digest="")
        self._dtype, self._max_lag = dtype, max_lag
        self._digests: dict[int, str] = {}  # of the last published versions

    def expect(self, ticket: WeightsTicket, *, exact: bool = True) -> None:
        """What is trained next was sampled under these weights, or lags behind them. ``exact``:
        they are those that are trained."""
        self.published, self.armed, self.exact = ticket, True, exact
        self.remember(ticket)

    def remember(self, ticket: WeightsTicket) -> None:
        """Samples may come from these weights."""
        self._digests[ticket.version] = ticket.digest
        for old in list(self._digests)[:-KEPT]:
            del self._digests[old]

    def check(self, quantity: Tensor, unit: WorkUnit, trajectory: Trajectory) -> None:
        """``ContractError`` where the ``quantity [b]`` of a unit is above the floor, or it was
        sampled otherwise than it is trained.

        Samples of other weights than those that are trained are held against their version alone.
        """
        worst = float(quantity.abs().max())
        causes = self._mismatches(unit, trajectory)
        lags = trajectory.provenance.weights_version < self.published.version
        if not causes and (lags or not self.exact or worst <= self.floor):
            return
        raise ContractError(
            f"{self._of.title.lower()}: max |{self._of.symbol}| = {worst:.3g} before the first "
            f"update, in micro-batch {unit.index} of iteration {unit.iteration}; it must be at "
            f"most {self.floor:.3g}. Cause: " + ("; ".join(causes) or _UNKNOWN_CAUSE)
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
