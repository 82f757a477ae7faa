"""Hours and price of a run, from the times of a short run of the same work."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.run.folder import RunFolder, difference
from flowgrpo_ray.run.tracking import TIMINGS, read_rows
from flowgrpo_ray.spec.training import TrainingSpec, required_resources

COMPARED = {
    *("model", "tuning", "sampling", "rewards", "advantages", "objective", "evaluation", "cluster")
}


def cost_of(spec: TrainingSpec, run: Path, price: float | None) -> dict[str, Any]:
    """Hours of ``spec`` at the speed of ``run``, which must have done the same work on the same
    division of machines; ``SpecError`` if it has not."""
    held = RunFolder.existing(run).read_spec()
    if odd := difference(_timed(held), _timed(spec)):
        raise SpecError(
            f"measured in {run}: {odd}. Measure this spec: train it under another name for a few "
            "iterations"
        )
    timings = run / TIMINGS
    rows = read_rows(timings) if timings.exists() else []
    starts, trains, evals = (
        [row["seconds"] for row in rows if row["kind"] == kind]
        for kind in ("start", "train", "eval")
    )
    if not starts or len(trains) < 2 or not evals:
        raise SpecError(f"measured in {run}: it needs 2 iterations and an evaluation at least")
    start, each, evaluation = starts[-1], median(trains[1:]), evals[-1]  # the first warms up
    evaluations = 1 + -(-spec.iterations // spec.evaluation.every)
    after_start = (evaluations - 1) * evaluation  # the first one is a phase of the start
    hours = (start + spec.iterations * each + after_start) / 3600
    reserved = required_resources(spec)
    found = {"run": str(run), "start_s": start, "iteration_s": each, "evaluation_s": evaluation}
    found |= {"iterations": spec.iterations, "evaluations": evaluations, "hours": hours}
    found |= {"gpu_hours": hours * reserved["GPU"], "cpu_hours": hours * reserved["CPU"]}
    return found | {"price": None if price is None else hours * reserved["GPU"] * price}


def _timed(spec: TrainingSpec) -> dict[str, Any]:
    """The part of a spec that the time of an iteration or an evaluation depends on."""
    values = spec.model_dump(mode="json", include=COMPARED)
    del values["evaluation"]["every"]
    kinds = ("layout", "rollout", "learner", "workers")
    values["cluster"] = {kind: values["cluster"][kind] for kind in kinds}
    return values
