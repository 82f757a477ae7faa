"""Which evaluation was the best one, by the held-out reward that ``checkpoint.best`` names."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from flowgrpo_ray.run.checkpoint import Progress
from flowgrpo_ray.spec.training import TrainingSpec


def with_evaluation(spec: TrainingSpec, progress: Progress, row: Mapping[str, Any]) -> Progress:
    """The progress after an evaluation's ``row``: of equally good ones the earliest is the best.

    The one before any training is not compared: there is nothing to save.
    """
    value, by = _value(spec, row), spec.checkpoint.best
    if not row["iteration"] or by is None or value is None:
        return progress
    if progress.best_iteration and value <= progress.best_value:
        return progress
    return replace(progress, best_by=by, best_iteration=row["iteration"], best_value=value)


def continued(
    spec: TrainingSpec,
    progress: Progress,
    rows: Iterable[Mapping[str, Any]],
    saved: Collection[int],
) -> Progress:
    """The progress of a run that goes on; ``saved`` are the iterations of its checkpoints.

    Where the spec names another reward than before, or the best checkpoint is gone, the best is
    that of the ``rows`` whose iterations are saved.
    """
    if progress.best_by == spec.checkpoint.best and progress.best_iteration in saved:
        return progress
    progress = replace(progress, best_by="", best_iteration=0, best_value=0.0)
    for row in rows:
        if row["kind"] == "eval" and row["iteration"] in saved:
            progress = with_evaluation(spec, progress, row)
    return progress


def _value(spec: TrainingSpec, row: Mapping[str, Any]) -> float | None:
    """``None`` without a mean (NaN, in JSON null), or where half of the prompts have no score."""
    name, of_set = spec.checkpoint.best_of
    means = row.get("sets", {}).get(of_set, {}) if of_set else row["rewards"]
    mean = means.get(name, {}).get("mean")
    if mean is None or not math.isfinite(mean) or 2 * row["unscored"][name] >= row["prompts"]:
        return None
    return float(mean)
