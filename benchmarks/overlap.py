"""How well the stages of an iteration overlap: its wall time against its slowest stage.

One simulated rollout worker, one reward replica and one learner rank take fixed times for a unit;
each stage in turn is the slowest. With U units, an iteration cannot take less than U times the
slowest stage and once each of the other two (the first unit must come, the last one must go).

    .venv/bin/python benchmarks/overlap.py [--units 32] [--slow 0.06] [--fast 0.03] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from statistics import median
from typing import Any

import simulated

STAGES = ("sample", "score", "accumulate")


async def measure(slowest: str, arguments: argparse.Namespace) -> dict[str, Any]:
    times = dict.fromkeys(STAGES, arguments.fast) | {slowest: arguments.slow}
    simulated.set_times(**times)
    async with simulated.trainer(simulated.overrides(arguments.units, 1, 1)) as trainer:
        rounds = await simulated.iterate(trainer, arguments.rounds)
    walls = [one["wall"] for one in rounds]
    bound = arguments.units * arguments.slow
    return {
        "slowest": slowest,
        "walls": walls,
        "stage": bound,
        "bound": bound + 2 * arguments.fast,
        "ratio": median(walls) / bound,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=32)
    parser.add_argument("--slow", type=float, default=0.06, help="seconds of the slowest stage")
    parser.add_argument("--fast", type=float, default=0.03, help="seconds of the other two")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = [asyncio.run(measure(stage, arguments)) for stage in STAGES]
    print(f"{arguments.units} units, {arguments.rounds} rounds, medians")
    print("slowest stage   its seconds   least possible   wall              wall / slowest")
    for row in found:
        walls = row["walls"]
        print(
            f"{row['slowest']:14}  {row['stage']:11.2f}   {row['bound']:14.2f}   "
            f"{median(walls):4.2f} ({min(walls):.2f}-{max(walls):.2f})   {row['ratio']:14.3f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
