"""How strongly the untrained model is held on to, where a watched reward decides.

The weight of the tie in the loss starts where the spec says and is set anew after each iteration: a
controller on its logarithm keeps the fall of a watched reward at what is allowed. A multiplier that
follows how far a constraint is violated is that of PID Lagrangian methods (Stooke, Achiam and
Abbeel, arXiv 2007.03964); it is taken in log space here, because the right weight may lie orders of
magnitude away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import Field

from flowgrpo_ray.common.strict import Strict

MOST_FALL = 6.0  # that counts, in what is allowed: leaps of the weight unsettle the optimizer
LEAST = 1e-3  # of the weight that a run starts with: one that sinks for ever would not be back
SINKS, SETTLED = 4.0, 0.5  # times the rate, by which it sinks at first, and once it was too small


@dataclass(frozen=True)
class Tie:
    """The state of the controller; a pure function of the iterations before.

    ``ground`` is the weight where nothing has fallen, never below ``least``. ``level`` and
    ``spread`` are the watched reward's mean and standard deviation over images in the first
    iterations, ``smoothed`` its mean now, ``seen`` the iterations that were scored; ``fall`` is in
    what is allowed. ``sinks`` is the share of the rate by which the ground sinks.
    """

    weight: float
    ground: float
    least: float
    sinks: float = SINKS
    seen: int = 0
    level: float = 0.0
    spread: float = 0.0
    smoothed: float = 0.0
    fall: float = 0.0

    @classmethod
    def of(cls, weight: float) -> Tie:
        """Of a run that begins with this weight."""
        return cls(weight, weight, LEAST * weight)

    def row(self, weight: float) -> dict[str, float]:
        """For ``row["tie"]`` of an iteration that had this weight, and led to this state."""
        seen = {"fall": self.fall, "level": self.level, "smoothed": self.smoothed}
        return {"weight": weight, **seen}


class Adapt(Strict):
    """The weight follows a watched reward of each iteration's images: more where it has fallen,
    less where it has not (after PID Lagrangian methods, arXiv 2007.03964)."""

    reward: str = Field(description="of `rewards`; one of weight 0 is only watched")
    fall: float = Field(
        default=0.5,
        gt=0,
        description="of that reward from its first `window` iterations, in its standard deviations "
        "over images there: what is allowed",
    )
    window: int = Field(
        default=5,
        ge=1,
        description="iterations that its first level is a mean of, and the span of the average "
        "that is compared with it",
    )
    rate: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="by which the logarithm of the weight rises in an iteration with twice the "
        "fall that is allowed; it sinks by four times as much in one without a fall, and by half "
        "of it after the first time that more has fallen than is allowed",
    )
    pull: float = Field(
        default=0.5,
        ge=0,
        description="that the fall itself adds to the logarithm, at once, where it is what is "
        "allowed",
    )

    def follow(self, tie: Tie, mean: float, std: float) -> Tie:
        """The state after an iteration whose images have that mean and standard deviation.

        With ``f`` the fall, in what is allowed and within 0 and ``MOST_FALL``:
        ``log ground += rate (f - 1)`` and ``log weight = log ground + pull f``. A negative step is
        ``SINKS`` times as long, and once ``f`` has been above 1 ``SETTLED`` times: the right order
        of magnitude is found then. An iteration that was not scored (NaN) changes nothing.
        """
        if math.isnan(mean):
            return tie
        seen, first = tie.seen + 1, tie.seen < self.window
        level, spread, smoothed = tie.level, tie.spread, tie.smoothed
        if first:
            level += (mean - level) / seen
            spread += (std - spread) / seen
        smoothed += (mean - smoothed) * max(1 / seen, 2 / (self.window + 1))
        fallen, allowed = max(0.0, level - smoothed), self.fall * spread
        fall = min(fallen / allowed, MOST_FALL) if allowed else MOST_FALL * (fallen > 0)
        sinks = SETTLED if fall > 1 else tie.sinks
        step = self.rate * (fall - 1) * (1 if fall > 1 else sinks)
        ground = max(tie.ground * math.exp(step), tie.least)
        weight = ground * math.exp(self.pull * fall)
        return Tie(weight, ground, tie.least, sinks, seen, level, spread, smoothed, fall)
