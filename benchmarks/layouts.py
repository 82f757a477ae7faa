"""How busy the workers of each layout are: simulated ones, in a recipe's proportions.

A unit takes as long to sample and to train, relative to each other, as `plan` counts FLOPs for the
recipe; driver, Ray, Serve and object store are real. So many workers are divided once as the
separate layout does best, by `plan`'s arithmetic, and once all do both. Busy is the share of an
iteration's wall time in which a worker computes, the mean over all.

    .venv/bin/python benchmarks/layouts.py [--recipes sd35-ocr ...] [--workers 1 2 8 16 64]
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import harness
import simulated

from flowgrpo_ray.run.tracking import read_rows

SCORE = 0.05  # of a unit's seconds: OCR on CPUs is quick, and has many replicas


def proportions(recipe: str) -> Any:
    """The recipe's iteration, and FLOPs of one of its units."""
    from flowgrpo_ray.estimate.footprint import estimate
    from flowgrpo_ray.estimate.layouts import work_of
    from flowgrpo_ray.spec.file import load_spec

    spec = load_spec(recipe)
    found = estimate(spec)
    assert found is not None, "the published configs of every recipe are in the package"
    return work_of(spec, (found.rollout_flops, found.training_flops))


def settings(recipe: Any, units: int, section: str, *counts: int) -> list[str]:
    """Of tiny-ocr, with the iteration of ``recipe``."""
    made = simulated.overrides(units, 1, max(1, units // 32))
    made += [
        f"advantages={{std: {recipe.std}}}",
        f"objective={{kind: flow_grpo, updates: {recipe.updates}}}",
        f"cluster.layout={section}",
    ]
    if section == "colocated":
        return [*made, f"cluster.workers={{count: {counts[0]}, cpus: 0}}"]
    samplers, ranks = counts
    return [*made, f"cluster.rollout.count={samplers}", f"cluster.learner.count={ranks}"]


async def busy(spec: Sequence[str], rounds: int) -> list[float]:
    """Share of its time that a worker computes, of each iteration after one to warm up."""
    async with simulated.trainer(spec) as trainer:
        await simulated.iterate(trainer, rounds)
        rows = read_rows(trainer.folder.path / "timings.jsonl")
    return [share(row) for row in rows if row["kind"] == "train"][1:]


def share(row: dict[str, Any]) -> float:
    """Of the seconds of all that sample or train, those in which they do."""
    kinds = [kind for kind in ("rollout", "learner", "workers") if kind in row["ledger"]]
    processes = [row["processes"][kind] for kind in kinds]
    worked = sum(row["busy"][kind] * n for kind, n in zip(kinds, processes, strict=True))
    return worked / sum(processes)


def measure(name: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each number of workers."""
    from flowgrpo_ray.estimate.layouts import best_split

    recipe = proportions(name)
    both = recipe.sampling + recipe.training
    of_unit = {"sample": recipe.sampling / both, "accumulate": recipe.training / both}
    seconds = {what: arguments.seconds * part for what, part in of_unit.items()}
    simulated.set_times(**seconds, score=SCORE * arguments.seconds)
    for workers in arguments.workers:
        units = workers * arguments.units * recipe.updates
        row: dict[str, Any] = {"recipe": name, "workers": workers}
        spec = settings(recipe, units, "colocated", workers)
        row["colocated"] = asyncio.run(busy(spec, arguments.rounds))
        if workers > 1:
            samplers, ranks, expected = best_split(replace(recipe, units=units, block=1), workers)
            spec = settings(recipe, units, "separate", samplers, ranks)
            row |= {"split": (samplers, ranks), "expected": expected}
            row["separate"] = asyncio.run(busy(spec, arguments.rounds))
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["sd35-ocr", "sd35-guard-ocr"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 8, 16, 64])
    parser.add_argument("--units", type=int, default=4, help="of each worker and update")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a unit, both parts")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = [row for name in arguments.recipes for row in measure(name, arguments)]
    harness.table(
        ("recipe", "workers", "colocated busy", "separate busy", "its split", "expected"),
        [
            (
                row["recipe"],
                row["workers"],
                f"{median(row['colocated']):.3f}",
                f"{median(row['separate']):.3f}" if "separate" in row else "",
                "{} + {}".format(*row["split"]) if "split" in row else "",
                f"{row['expected']:.3f}" if "expected" in row else "",
            )
            for row in found
        ],
    )
    harness.save(arguments.json, {"layouts": found})


if __name__ == "__main__":
    main()
