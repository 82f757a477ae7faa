"""How the driver scales: simulated rollout workers and reward replicas on this one machine.

Rollout workers and replicas sleep instead of computing, so many of them fit; driver, Ray, Serve and
object store are real and share this machine's cores with them. Rates are compared with those of one
worker; publication is timed from the learner's call until every worker has loaded.

    .venv/bin/python benchmarks/scale.py [--workers 1 4 16 64] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import simulated

UNITS = 4  # of each worker, in an iteration
MEGABYTE = 10**6


async def sampling(workers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Iterations whose sampling is all the work."""
    replicas = max(1, workers // 4)
    simulated.set_times(sample=arguments.sample)
    units = UNITS * workers
    async with simulated.trainer(simulated.overrides(units, workers, replicas)) as trainer:
        rounds = await simulated.iterate(trainer, arguments.rounds)
        publication = await publish(trainer, arguments.rounds)
    wall = median(one["wall"] for one in rounds)
    cpu = median(one["driver_cpu"] for one in rounds)
    return {
        "workers": workers,
        "replicas": replicas,
        "images_per_s": units * simulated.GROUP / wall,
        "walls": [one["wall"] for one in rounds],
        "driver_cpu_per_unit": cpu / units,
        "publication": publication,
    }


async def publish(trainer: Any, rounds: int) -> float:
    """Median seconds from the call to publish until every worker holds the weights."""
    found = []
    crew = trainer.crew
    for version in range(100, 101 + rounds):
        began = time.perf_counter()
        ticket, arrays = await crew.learners.publish(version)
        workers = crew.rollouts.up.values()
        await asyncio.gather(*(worker.actor.load.remote(ticket, arrays) for worker in workers))
        found.append(time.perf_counter() - began)
    return median(found[1:])


async def scoring(replicas: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Iterations whose scoring is all the work, by so many replicas."""
    simulated.set_times(score=arguments.sample)
    units = UNITS * replicas
    async with simulated.trainer(simulated.overrides(units, 2, replicas)) as trainer:
        rounds = await simulated.iterate(trainer, arguments.rounds)
    wall = median(one["wall"] for one in rounds)
    return {"replicas": replicas, "images_per_s": units * simulated.GROUP / wall}


async def publication(size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    simulated.set_times(bytes=size)
    async with simulated.trainer(simulated.overrides(4, 4, 1)) as trainer:
        return {"bytes": size, "seconds": await publish(trainer, arguments.rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--megabytes", type=int, nargs="*", default=[1, 100, 1000])
    parser.add_argument("--sample", type=float, default=2.0, help="seconds of a unit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    of = {"workers": sampling, "replicas": scoring}
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, measure in of.items():
        found[kind] = [asyncio.run(measure(n, arguments)) for n in getattr(arguments, kind)]
    found["publication"] = [
        asyncio.run(publication(size * MEGABYTE, arguments)) for size in arguments.megabytes
    ]
    for kind in of:
        print(f"{kind:>9}   images/s   of linear   driver ms per unit   publication s")
        for row in found[kind]:
            first = found[kind][0]
            linear = first["images_per_s"] / first[kind] * row[kind]
            cpu = f"{1000 * row['driver_cpu_per_unit']:18.2f}" if kind == "workers" else " " * 18
            published = f"{row['publication']:13.3f}" if kind == "workers" else ""
            print(
                f"{row[kind]:9}   {row['images_per_s']:8.1f}   "
                f"{row['images_per_s'] / linear:9.3f}   {cpu}   {published}"
            )
    print("weights, to 4 workers")
    for row in found["publication"]:
        print(f"{row['bytes'] / MEGABYTE:8.0f} MB   {row['seconds']:.3f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
