"""The over-optimization watch: a reward that is only watched falls while the trained one does not.

It reads the evaluations: the same prompts and noise each time, so that a fall is measured prompt by
prompt. Its state is a pure function of the rows it has seen, so a resumed run replays those of
``metrics.jsonl`` and goes on as if it had never stopped.
"""

from __future__ import annotations

import math
import shlex
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowgrpo_ray.run.checkpoint import checkpoint_iteration, newest_checkpoint
from flowgrpo_ray.run.tracking import PER_PROMPT

if TYPE_CHECKING:
    from flowgrpo_ray.spec.sections import WatchSpec
    from flowgrpo_ray.spec.training import TrainingSpec


@dataclass(frozen=True)
class Reading:
    """Where a watched reward stands: its best window so far, and the current one.

    Values are means over the prompts that were scored in both; ``error`` is the standard error of
    ``now - best``, from the differences by prompt. ``std`` is the reward's standard deviation over
    images, the larger of both windows. The best window is of the evaluations after
    ``best_from`` to ``best_iteration`` iterations.
    """

    best: float
    now: float
    error: float
    std: float
    best_from: int
    best_iteration: int
    trained_best: float
    trained_now: float
    diverging: bool

    def as_json(self) -> dict[str, Any]:
        """For ``row["watch"][name]``."""
        return asdict(self)


@dataclass(frozen=True)
class _Window:
    """Evaluations one after another. ``scores [2, n]`` float64: of each prompt the reward and the
    trained total, as means over them; NaN where one of them has none."""

    scores: np.ndarray
    std: float
    first: int
    last: int


@dataclass
class _Track:
    """The last evaluations of one watched reward, and what has been seen of it."""

    spec: WatchSpec
    evaluations: deque[_Window] = field(init=False)
    best: _Window | None = None
    reading: Reading | None = None

    def __post_init__(self) -> None:
        self.evaluations = deque(maxlen=self.spec.window)

    def add(self, evaluation: _Window) -> None:
        self.evaluations.append(evaluation)
        if len(self.evaluations) < self.spec.window:
            return
        now = _Window(
            np.mean([one.scores for one in self.evaluations], axis=0),
            float(np.mean([one.std for one in self.evaluations])),
            self.evaluations[0].first,
            evaluation.last,
        )
        self.best = self.best or now
        pairs = np.stack([self.best.scores, now.scores])  # [best and now, reward and total, n]
        pairs = pairs[..., ~np.isnan(pairs).any(axis=(0, 1))]
        if pairs.shape[-1] < 2:
            return
        rose, error = (value.tolist() for value in _paired(pairs[1] - pairs[0]))
        if rose[0] >= 0:  # of equally good windows the latest
            self.best, pairs[0], rose, error = now, pairs[1], [0.0, 0.0], [0.0, 0.0]
        std = max(self.best.std, now.std)
        limit = self.spec.significance
        fell = -rose[0] > max(limit * error[0], self.spec.fall * std)
        (best, trained_best), (value, trained) = pairs.mean(-1).tolist()
        self.reading = Reading(
            best=best,
            now=value,
            error=error[0],
            std=std,
            best_from=self.best.first,
            best_iteration=self.best.last,
            trained_best=trained_best,
            trained_now=trained,
            diverging=fell and rose[1] >= -limit * error[1],
        )


def _paired(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and its standard error ``[2]`` of ``differences [2, n]``."""
    error = differences.std(axis=-1, ddof=1) / math.sqrt(differences.shape[-1])
    return differences.mean(axis=-1), error


@dataclass(frozen=True)
class Divergence:
    """Why the watch ended a run, and the command that writes the model from before, if any."""

    says: str
    export: str | None

    def __str__(self) -> str:
        if self.export is None:
            return f"{self.says}. No checkpoint is from before"
        return f"{self.says}. The model from before is written by\n  {self.export}"


@dataclass
class Watch:
    """Over the rewards of weight 0; with none there is nothing to see.

    Of each it remembers the best window of ``watch.window`` evaluations. The reward is diverging
    while the latest window lies below the best by more than ``watch.significance`` standard errors
    and by more than ``watch.fall`` standard deviations over images, and the trained total did not
    fall by as many standard errors of its own.
    """

    spec: TrainingSpec
    _tracks: dict[str, _Track] = field(init=False)

    def __post_init__(self) -> None:
        watched = [name for name, weight in self.spec.weights.items() if weight == 0]
        self._tracks = {name: _Track(self.spec.watch) for name in watched}

    def see(self, row: Mapping[str, Any]) -> dict[str, Reading]:
        """Take in one row of ``metrics.jsonl``, in order; every reward that has a full window.

        Rows that are not of evaluations are passed over, and so, for one reward, are those where
        half of the prompts or more have no score: its reading stays what it was.
        """
        if row.get("kind") == "eval":
            for name, track in self._tracks.items():
                if evaluation := _evaluation(row, name):
                    track.add(evaluation)
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


def _evaluation(row: Mapping[str, Any], name: str) -> _Window | None:
    """``None`` where too few prompts have a score (NaN, in JSON null) to speak for all."""
    of_prompts: Mapping[str, Any] = row.get(PER_PROMPT) or {}  # not in rows of earlier versions
    if name not in of_prompts.get("rewards", {}):
        return None
    values = [of_prompts["rewards"][name], of_prompts["total"]]
    scores = np.array(values, dtype=np.float64)  # null becomes NaN
    scores[~np.isfinite(scores)] = np.nan  # in JSON both are null
    scored = scores[0, ~np.isnan(scores).any(axis=0)]
    asked = np.count_nonzero(~np.isnan(scores[0])) + row["unscored"][name]  # of its prompt sets
    if 2 * len(scored) <= asked:
        return None
    return _Window(scores, float(scored.std()), row["iteration"], row["iteration"])


def readings_of(row: Mapping[str, Any]) -> dict[str, Reading]:
    """What ``row["watch"]`` of a written row holds; empty for rows without."""
    names = [field.name for field in fields(Reading)]
    entries: Mapping[str, Any] = row.get("watch") or {}
    return {
        name: Reading(**{key: entry[key] for key in names})
        for name, entry in entries.items()
        if all(key in entry for key in names)
    }


def describe(name: str, reading: Reading) -> str:
    """A diverging reading in one sentence, for console, errors and report."""
    best, now = _apart(reading.best, reading.now)
    trained_best, trained_now = _apart(reading.trained_best, reading.trained_now)
    first, last = reading.best_from, reading.best_iteration
    window = f"iteration {last}" if first == last else f"iterations {first}-{last}"
    return (
        f"{name} fell from {best} ({window}) to {now} on held-out prompts while the trained reward "
        f"went from {trained_best} to {trained_now}: over-optimization"
    )


def export_of_best(run: Path, reading: Reading) -> str | None:
    """The command that writes the model from before: of the checkpoint that is kept for a reading
    of the run in folder ``run``; ``None`` if its best window ended before the first checkpoint."""
    kept = newest_checkpoint(run / "checkpoints", reading.best_iteration)
    if kept is None:
        return None
    folder, out = shlex.quote(str(run)), shlex.quote(f"{run.resolve().name}-before")
    return f"flowgrpo-ray export {folder} --iteration {checkpoint_iteration(kept)} --out {out}"


def _apart(a: float, b: float) -> tuple[str, str]:
    """Both numbers with as few digits (three or more) as tell them apart."""
    for digits in range(3, 17):
        texts = (f"{a:.{digits}g}", f"{b:.{digits}g}")
        if texts[0] != texts[1]:
            return texts
    return f"{a:.3g}", f"{b:.3g}"
