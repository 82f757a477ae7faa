"""How well the stages of an iteration overlap: its wall time against its slowest stage.

One simulated rollout worker, one reward replica and one learner rank take fixed times for a unit;
each stage in turn is the slowest. With U units, an iteration cannot take less than U times the
slowest stage and once each of the other two (the first unit must come, the last one must go).

    .venv/bin/python benchmarks/overlap.py [--units 32] [--slow 0.06] [--fast 0.03] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import harness
import simulated

STAGES = ("sample", "score", "accumulate")


async def measure(slowest: str, arguments: argparse.Namespace) -> dict[str, Any]:
    times = dict.fromkeys(STAGES, arguments.fast) | {slowest: arguments.slow}
    simulated.set_times(**times)
    async with simulated.trainer(simulated.overrides(arguments.units, 1, 1)) as trainer:
        rounds = await simulated.iterate(trainer, arguments.rounds)
    stage = arguments.units * arguments.slow
    return {
        "slowest": slowest,
        "stage": stage,
        "least": stage + 2 * arguments.fast,
        "walls": [one["wall"] for one in rounds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--units", type=int, default=32)
    parser.add_argument("--slow", type=float, default=0.06, help="seconds of the slowest stage")
    parser.add_argument("--fast", type=float, default=0.03, help="seconds of the other two")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = [asyncio.run(measure(stage, arguments)) for stage in arguments.stages]
    print(f"{arguments.units} units, {arguments.rounds} rounds: median (least-most)")
    harness.table(
        ("slowest stage", "its seconds", "least possible", "wall", "wall / slowest"),
        [
            (
                row["slowest"],
                f"{row['stage']:.2f}",
                f"{row['least']:.2f}",
                harness.spread(row["walls"]),
                harness.spread((wall / row["stage"] for wall in row["walls"]), 3),
            )
            for row in found
        ],
    )
    harness.save(arguments.json, {"units": arguments.units, "stages": found})


if __name__ == "__main__":
    main()
