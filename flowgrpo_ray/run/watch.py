"""The over-optimization watch: a reward that is only watched falls while the trained one rises.

Its state is a pure function of the train rows it has seen, so a resumed run replays the rows of
``metrics.jsonl`` and goes on as if it had never stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowgrpo_ray.spec.training import TrainingSpec


@dataclass(frozen=True)
class Reading:
    """Where a watched reward stands: its best window so far, and the current one.

    Values are means over the iterations of a window, ``best_from`` to ``best_iteration`` for the
    best. ``best_std`` is the reward's standard deviation over images in that window.
    """

    best: float
    now: float
    best_from: int
    best_iteration: int
    best_std: float
    trained_best: float
    trained_now: float
    diverging: bool

    def as_json(self) -> dict[str, Any]:
        """For ``row["watch"][name]``."""
        return asdict(self)


@dataclass(frozen=True)
class _Point:
    """What one train row says of a watched reward."""

    iteration: int
    mean: float
    std: float
    trained: float


@dataclass
class _Track:
    """The last iterations of one watched reward, and what has been seen of it."""

    points: deque[_Point]
    reading: Reading | None = None

    def add(self, point: _Point, fall: float) -> None:
        self.points.append(point)
        if len(self.points) < (self.points.maxlen or 0):
            return
        now, trained = (fmean(getattr(p, key) for p in self.points) for key in ("mean", "trained"))
        last = self.reading
        if last is None or now >= last.best:  # of equally good windows the latest
            std = fmean(p.std for p in self.points)
            first = self.points[0].iteration
            self.reading = Reading(
                now, now, first, point.iteration, std, trained, trained, diverging=False
            )
            return
        fell = last.best - now > fall * last.best_std
        self.reading = Reading(
            last.best,
            now,
            last.best_from,
            last.best_iteration,
            last.best_std,
            last.trained_best,
            trained,
            diverging=fell and trained > last.trained_best,
        )


@dataclass(frozen=True)
class Divergence:
    """Why the watch ended a run, and the iteration of the checkpoint that is kept from before."""

    says: str
    before: int | None


@dataclass
class Watch:
    """Over the rewards of weight 0; with none there is nothing to see.

    Of each it remembers the best window of ``watch.window`` iterations. The reward is diverging
    while the latest window lies more than ``watch.fall`` standard deviations below the best and
    the trained total is above what it was in the best.
    """

    spec: TrainingSpec
    _tracks: dict[str, _Track] = field(init=False)

    def __post_init__(self) -> None:
        watched = [name for name, weight in self.spec.weights.items() if weight == 0]
        window = self.spec.watch.window
        self._tracks = {name: _Track(deque(maxlen=window)) for name in watched}

    def see(self, row: Mapping[str, Any]) -> dict[str, Reading]:
        """Take in one row of ``metrics.jsonl``, in order; every reward that has a full window.

        Rows that are not of training are passed over, and so, for one reward, are those where
        nothing could be scored: its reading stays what it was.
        """
        if row.get("kind") == "train":
            for name, track in self._tracks.items():
                if point := _point(row, name):
                    track.add(point, self.spec.watch.fall)
        return self.readings

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in the rows of a run that is being resumed."""
        for row in rows:
            self.see(row)

    @property
    def readings(self) -> dict[str, Reading]:
        """As of the last row."""
        return {name: track.reading for name, track in self._tracks.items() if track.reading}

    @property
    def protected(self) -> frozenset[int]:
        """The iterations whose checkpoints must be kept: where each best window ended."""
        return frozenset(reading.best_iteration for reading in self.readings.values())


def _point(row: Mapping[str, Any], name: str) -> _Point | None:
    """``None`` where the reward or the trained total has no value (NaN, in JSON null)."""
    own: Mapping[str, Any] = row["rewards"].get(name) or {}
    values: list[Any] = [own.get("mean"), own.get("std"), row["reward"]["mean"]]
    if any(value is None or not math.isfinite(value) for value in values):
        return None
    return _Point(row["iteration"], *values)


def readings_of(row: Mapping[str, Any]) -> dict[str, Reading]:
    """What ``row["watch"]`` of a written row holds; empty for rows without."""
    names = [field.name for field in fields(Reading)]
    entries: Mapping[str, Any] = row.get("watch") or {}
    return {
        name: Reading(**{key: entry[key] for key in names})
        for name, entry in entries.items()
        if all(key in entry for key in names)
    }


def describe(name: str, reading: Reading, kept: int | None) -> str:
    """A diverging reading in one sentence, for console, errors and report.

    ``kept`` is the iteration of the checkpoint that is kept for it, if there is one.
    """
    best, now = _apart(reading.best, reading.now)
    trained_best, trained_now = _apart(reading.trained_best, reading.trained_now)
    first, last = reading.best_from, reading.best_iteration
    window = f"iteration {last}" if first == last else f"iterations {first}-{last}"
    checkpoint = "" if kept is None else f"; the checkpoint of iteration {kept} is kept"
    return (
        f"{name} fell from {best} ({window}) to {now} while the trained reward rose from "
        f"{trained_best} to {trained_now}: over-optimization{checkpoint}"
    )


def _apart(a: float, b: float) -> tuple[str, str]:
    """Both numbers with as few digits (three or more) as tell them apart."""
    for digits in range(3, 17):
        texts = (f"{a:.{digits}g}", f"{b:.{digits}g}")
        if texts[0] != texts[1]:
            return texts
    return f"{a:.3g}", f"{b:.3g}"
