"""The on-policy contract: before the first update nothing tells sampler and learner apart.

What was sampled under the published weights, replayed under the same ones, has a gate quantity
(``|log rho|``, or ``|v - v_old|``) of 0, or as little as this hardware cannot reproduce: its floor,
which is measured when a run begins and again when its weights have moved. A unit that was sampled
with other weights, in another micro-batch, dtype or schedule ends the run, and so does any
quantity above a floor of 0. Where the floor is noise, single values far above it are counted; what
ends the run is a distribution that lies above the floor as a whole. The message says in what the
two sides differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowgrpo_ray.algorithm.objectives.base import Gate
from flowgrpo_ray.common.errors import ContractError
from flowgrpo_ray.common.types import Float64, Trajectory, WeightsTicket, WorkUnit

MARGIN = 4.0  # a value this many times above the largest of its point's floor counts as an excess
# The distribution has moved when its median lies this many times above the floor's, each value
# relative to its point's, over at least so many micro-batches and values. With noise as published
# (log-normal, 99th percentile 9.3 medians), a floor of 4 micro-batches and half of the variance
# shared within a micro-batch: an alarm in fewer than one of 100 runs of 1,000 iterations; 8 times
# the noise is found in half of the verdicts, 25 times in 99 of 100 (tests/algorithm/test_gate.py).
SHIFT = 8.0
ENOUGH = 8, 64
MOST_IN_NOISE = 0.1  # the share of fresh samples that noise alone may carry beyond a clip range
KEPT = 3  # published versions that samples may come from: of training, its past, before a resume


class Floor:
    """The gate quantities of fresh samples on this hardware: absolute values ``[n]`` by point."""

    def __init__(self, values: Mapping[int, Float64]) -> None:
        self._values = {point: np.sort(of) for point, of in sorted(values.items())}

    @classmethod
    def of(cls, measured: Sequence[Mapping[int, Float64]]) -> Floor:
        """What several micro-batches show together."""
        points = {point for one in measured for point in one}
        return cls({p: np.concatenate([one[p] for one in measured if p in one]) for p in points})

    @property
    def largest(self) -> float:
        return max((float(of[-1]) for of in self._values.values() if len(of)), default=0.0)

    @property
    def exact(self) -> bool:
        """Whether this hardware reproduces every bit."""
        return self.largest == 0

    def beyond(self, bound: float) -> float:
        """The share of values above ``bound``."""
        values = np.concatenate([*self._values.values(), np.zeros(0)])
        return float((values > bound).mean()) if len(values) else 0.0

    def median(self, point: int) -> float:
        """Of a point's values; where most are 0, or there are none, the least that is not, of all
        points."""
        found = float(np.median(self._values.get(point, np.zeros(1))))
        least = (float(of[of > 0].min()) for of in self._values.values() if of[-1] > 0)
        return found or min(least)

    def limit(self, point: int) -> float:
        """Above it a value counts as an excess."""
        return MARGIN * (float(self._values[point][-1]) if point in self._values else self.largest)

    def as_json(self) -> dict[str, Any]:
        """Per point: median, 99th percentile, largest, and of how many values."""
        of = self._values.values()
        return {
            "point": list(self._values),
            "median": [float(np.median(values)) for values in of],
            "p99": [float(np.quantile(values, 0.99)) for values in of],
            "largest": [float(values[-1]) for values in of],
            "values": [len(values) for values in of],
        }

    def __str__(self) -> str:
        found = self.as_json()
        median, p99 = max(found["median"]), max(found["p99"])
        return f"median {median:.2g}, 99 of 100 below {p99:.2g}"


class OnPolicyGate:
    """Of one learner rank. ``max_lag``: versions that samples may be older than the published."""

    def __init__(self, of: Gate, dtype: str, max_lag: int) -> None:
        self._of = of
        self.floor = Floor({})  # what the quantity may be
        self.armed = False  # from publishing to the first update
        self.exact = True  # the published weights are those that are trained
        self.published = WeightsTicket(version=-1, digest="")
        self._dtype, self._max_lag = dtype, max_lag
        self._digests: dict[int, str] = {}  # of the last published versions
        self._seen: list[Float64] = []  # of each micro-batch, relative to the floor's medians

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

    def admit(self, unit: WorkUnit, trajectory: Trajectory) -> None:
        """``ContractError`` for a unit that was sampled otherwise than it is trained."""
        if self.armed and (causes := self._mismatches(unit, trajectory)):
            raise ContractError(
                f"{self._of.title.lower()}: micro-batch {unit.index} of iteration "
                f"{unit.iteration} is not what is trained. Cause: {'; '.join(causes)}"
            )

    def check(self, quantity: Float64, unit: WorkUnit, trajectory: Trajectory) -> int:
        """Of a unit's ``quantity [K, b]``: how many values lie far above the floor.

        ``ContractError`` where the floor is 0 and a value is not. Samples of other weights than
        those that are trained are held against their version alone.
        """
        lags = trajectory.provenance.weights_version < self.published.version
        if not self.armed or lags or not self.exact:
            return 0
        values = np.abs(quantity)
        if self.floor.exact:
            if values.any():
                where = f"in micro-batch {unit.index} of iteration {unit.iteration}"
                self._refuse(f"max {self._symbol} = {values.max():.3g}, where it must be 0", where)
            return 0
        medians = np.array([[self.floor.median(point)] for point in unit.points])
        limits = np.array([[self.floor.limit(point)] for point in unit.points])
        self._seen.append((values / medians).ravel())
        return int((values > limits).sum())

    def conclude(self) -> None:
        """The first update comes next: ``ContractError`` if what was seen since the last verdict
        lies above the floor as a whole."""
        self.armed = False
        batches, values = ENOUGH
        if len(self._seen) < batches or sum(map(len, self._seen)) < values:
            return
        seen, self._seen = np.concatenate(self._seen), []
        moved = float(np.median(seen))
        if moved > SHIFT:
            says = f"the median of {self._symbol} is {moved:.3g} times that of its floor"
            self._refuse(says, f"over {len(seen)} samples x points (the floor: {self.floor})")

    @property
    def _symbol(self) -> str:
        return f"|{self._of.symbol}|"

    def _refuse(self, what: str, where: str) -> None:
        raise ContractError(
            f"{self._of.title.lower()}: {what}, before the first update, {where}. Version, batch "
            "geometry, dtype and schedule all agree, so the two sides compute differently (other "
            "hardware, attention backend or library version)"
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
