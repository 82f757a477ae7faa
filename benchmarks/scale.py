"""How the driver scales: simulated rollout workers and reward replicas on this one machine.

Rollout workers and replicas sleep instead of computing, so many of them fit; driver, Ray, Serve and
object store are real and share this machine's cores with them. Rates are compared with those of one
worker. Publication is timed from the learner's call until every worker has loaded: over the number
of workers, with the weights of the tiny model, and over the size of the weights.

    .venv/bin/python benchmarks/scale.py [--workers 1 4 16 64] [--rounds 3] [--json FILE]
    .venv/bin/python benchmarks/scale.py --workers 64 --replicas --megabytes --profile
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import time
from pathlib import Path
from statistics import median
from typing import Any

import harness
import simulated

MEGABYTE = 10**6
TINY = 7 * MEGABYTE  # weights of the tiny model


async def sampling(workers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Iterations whose sampling is all the work."""
    replicas = max(1, workers // 4)
    simulated.set_times(sample=arguments.seconds, bytes=TINY, side=arguments.side)
    units = arguments.units * workers
    async with simulated.trainer(simulated.overrides(units, workers, replicas)) as trainer:
        rounds = await simulated.iterate(trainer, arguments.rounds)
        publication = await publish(trainer, arguments.rounds)
        if arguments.profile:
            await profile(trainer, units, arguments.rounds + 2)
    return {"workers": workers, **speed(units, rounds), "publication": publication}


async def scoring(replicas: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Iterations whose scoring is all the work, by so many replicas."""
    simulated.set_times(score=arguments.seconds, side=arguments.side)
    units = arguments.units * replicas
    async with simulated.trainer(simulated.overrides(units, 2, replicas)) as trainer:
        rounds = await simulated.iterate(trainer, arguments.rounds)
    return {"replicas": replicas, **speed(units, rounds)}


def speed(units: int, rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Images per second, and per unit what the driver computed and processes sent each other."""
    of_unit = {
        meter: median(row[meter] for row in rounds) / units
        for meter in ("driver_cpu", "loop_cpu", "bytes")
    }
    rates = [units * simulated.GROUP / row["wall"] for row in rounds]
    return {"units": units, "images_per_s": rates, "per_unit": of_unit}


async def publish(trainer: Any, rounds: int) -> list[float]:
    """Seconds from the call to publish until every worker holds the weights."""
    found = []
    crew = trainer.crew
    for version in range(100, 101 + rounds):
        began = time.perf_counter()
        ticket, arrays = await crew.learners.publish(version)
        workers = crew.rollouts.up.values()
        await asyncio.gather(*(worker.actor.load.remote(ticket, arrays) for worker in workers))
        found.append(time.perf_counter() - began)
    return found[1:]


async def publication(megabytes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of weights of so many megabytes, to four workers."""
    simulated.set_times(bytes=megabytes * MEGABYTE)
    async with simulated.trainer(simulated.overrides(4, 4, 1)) as trainer:
        return {"megabytes": megabytes, "publication": await publish(trainer, arguments.rounds)}


async def profile(trainer: Any, units: int, iteration: int) -> None:
    """Where the driver's event loop spends an iteration."""
    profiler = cProfile.Profile()
    profiler.enable()
    await trainer.iterate(iteration)
    profiler.disable()
    print(f"an iteration of {units} units on the driver's event loop:")
    found = pstats.Stats(profiler).sort_stats("cumtime")
    found.print_stats("flowgrpo_ray", 25)
    found.strip_dirs().sort_stats("tottime").print_stats(25)


def show(rows: list[dict[str, Any]], count: str) -> None:
    """Rates against the first row's, per actor."""
    found = []
    for row in rows:
        of_unit, rate = row["per_unit"], median(row["images_per_s"])
        linear = median(rows[0]["images_per_s"]) / rows[0][count] * row[count]
        found.append(
            (
                row[count],
                harness.spread(row["images_per_s"], 1),
                f"{rate / linear:.3f}",
                f"{1000 * of_unit['driver_cpu']:.1f}",
                f"{1000 * of_unit['loop_cpu']:.1f}",
                f"{of_unit['bytes'] / 1000:.1f}",
                harness.spread(row["publication"], 3) if "publication" in row else "",
            )
        )
    if found:
        driver = ("driver ms per unit", "of it its loop", "kB per unit", "publication s")
        harness.table((count, "images/s", "of linear", *driver), found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--megabytes", type=int, nargs="*", default=[1, 10, 100, 1000])
    parser.add_argument("--seconds", type=float, default=2.0, help="of a unit")
    parser.add_argument("--side", type=int, default=32, help="pixels of an image's sides")
    parser.add_argument("--units", type=int, default=4, help="of each actor, in an iteration")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="the driver, with the workers")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, measure in (("workers", sampling), ("replicas", scoring), ("megabytes", publication)):
        found[kind] = [asyncio.run(measure(n, arguments)) for n in getattr(arguments, kind)]
    show(found["workers"], "workers")
    show(found["replicas"], "replicas")
    sizes = [(r["megabytes"], harness.spread(r["publication"], 3)) for r in found["megabytes"]]
    harness.table(("MB of weights, to 4 workers", "publication s"), sizes)
    harness.save(arguments.json, found)


if __name__ == "__main__":
    main()
