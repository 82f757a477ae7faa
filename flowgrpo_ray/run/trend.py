"""A least-squares line through a few noisy numbers: does it rise, and when would that be clear?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

CLEAR = 2.0  # standard errors by which a slope is clearly not 0


@dataclass(frozen=True)
class Trend:
    """A least-squares line through the iteration means; ``noise`` is their spread around it."""

    count: int
    slope: float
    error: float
    noise: float

    @property
    def iterations_needed(self) -> int | None:
        """How many in all, more than now, would make this slope with this noise clearly not 0.

        The slope's variance over ``n`` iterations is ``noise^2 12 / (n (n^2 - 1))``.
        """
        if self.slope == 0:
            return None
        needed = 12 * (CLEAR * self.noise / self.slope) ** 2
        n = max(self.count + 1, math.floor(needed ** (1 / 3)))
        while n * (n * n - 1) <= needed:
            n += 1
        return n


def trend(points: Sequence[tuple[int, float]]) -> Trend | None:
    """Of ``(iteration, mean)`` pairs; ``None`` for fewer than three."""
    if len(points) < 3:
        return None
    middle_x, middle_y = (fmean(values) for values in zip(*points, strict=True))
    x, y = [x - middle_x for x, _ in points], [y - middle_y for _, y in points]
    width = math.fsum(a * a for a in x)
    slope = math.fsum(a * b for a, b in zip(x, y, strict=True)) / width
    rest = math.fsum((b - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    noise = math.sqrt(rest / (len(points) - 2))
    return Trend(len(points), slope, noise / math.sqrt(width), noise)
