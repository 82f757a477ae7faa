"""The cluster against a straight script: the same recipe, the same machine.

The recipe is ``tiny-ocr`` without KL, averages and the watched reward; the script is
``baseline.py``, in a process of its own. They take turns of a few iterations, because machines
drift; while the script works every process of the cluster stands still. With --to, whole trainings
run one after the other instead, until a held-out reward is reached.

    .venv/bin/python benchmarks/side_by_side.py [--micro-batch 24] [--set KEY=VALUE ...]
    .venv/bin/python benchmarks/side_by_side.py --to 0.85 [--rounds 2]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import baseline
import harness

IMAGES = baseline.PROMPTS * baseline.IMAGES
SAME = [
    "objective.kl=null",
    "ema=null",
    "rewards={ocr: {options: {detect: false}}}",
    "watch={}",
]


async def turns(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Wall seconds of an iteration of both, in turns."""
    found = []
    with harness.process(baseline.serve, *of_script(arguments, 0)) as (script, script_id):
        async with harness.trainer(of_cluster(arguments, 0)) as trainer:
            await trainer.crew.measure_floor()
            for _ in range(harness.WARM_UP + arguments.rounds):
                ours = await harness.turn(trainer)
                theirs = 0.0
                with harness.frozen(script_id):
                    for _ in range(harness.TURN):
                        script.send("iterate")
                        theirs += script.recv()["iteration"] / harness.TURN
                found.append({"cluster": ours, "script": theirs})
                print(f"  cluster {ours:.2f} s, script {theirs:.2f} s", flush=True)
    return found[harness.WARM_UP :]


async def cluster_to(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """A training of the cluster, up to the reward asked for."""
    began = time.perf_counter()
    async with harness.trainer(of_cluster(arguments, seed)) as trainer:
        await trainer.crew.measure_floor()
        start_up, curve = time.perf_counter() - began, Curve(arguments.to)
        for iteration in range(arguments.most + 1):
            if iteration:
                await trainer.iterate(iteration)
            if iteration % arguments.every == 0:
                await trainer.evaluate()
                if curve.add(iteration, trainer.journal.progress.eval_last["ocr"]):
                    break
    return {"start_up": start_up, **curve.data}


def script_to(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """A training of the script, up to the reward asked for."""
    began = time.perf_counter()
    with harness.process(baseline.serve, *of_script(arguments, seed)) as (script, _):

        def ask(what: str) -> Any:
            script.send(what)
            return script.recv()

        start_up, curve = time.perf_counter() - began, Curve(arguments.to)
        for iteration in range(arguments.most + 1):
            if iteration:
                ask("iterate")
            if iteration % arguments.every == 0 and curve.add(iteration, ask("evaluate")):
                break
    return {"start_up": start_up, **curve.data}


class Curve:
    """Held-out rewards over the seconds since training began; evaluations count."""

    def __init__(self, target: float) -> None:
        self._target, self._began = target, time.perf_counter()
        self.data: dict[str, Any] = {"seconds": None, "iterations": None, "curve": []}

    def add(self, iteration: int, reward: float) -> bool:
        """Whether the target is reached."""
        seconds = time.perf_counter() - self._began
        self.data["curve"].append((iteration, round(seconds, 2), round(reward, 4)))
        print(f"  {seconds:6.1f} s  iteration {iteration:3}  held-out ocr {reward:.3f}", flush=True)
        if reward >= self._target:
            self.data |= {"seconds": seconds, "iterations": iteration}
        return reward >= self._target


def of_cluster(arguments: argparse.Namespace, seed: int) -> list[str]:
    batch = f"sampling.micro_batch={arguments.micro_batch}"
    return [*SAME, f"seed={seed}", batch, *arguments.set]


def of_script(arguments: argparse.Namespace, seed: int) -> tuple[int, int, int]:
    return arguments.micro_batch, arguments.threads, seed


def compare_speed(arguments: argparse.Namespace) -> dict[str, Any]:
    rounds = asyncio.run(turns(arguments))
    rows = []
    for who in ("script", "cluster"):
        speeds = harness.spread((IMAGES / row[who] for row in rounds), 1)
        rows.append((who, speeds, harness.spread(row[who] for row in rounds)))
    print(f"{arguments.rounds} turns of {harness.TURN} iterations, {IMAGES} images each")
    harness.table(("median (least-most)", "images/s", "iteration s"), rows)
    print("cluster / script", harness.spread(row["script"] / row["cluster"] for row in rounds))
    return {"rounds": rounds}


def compare_time(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {"script": [], "cluster": []}
    run: dict[str, Callable[[int], dict[str, Any]]] = {
        "script": lambda seed: script_to(arguments, seed),
        "cluster": lambda seed: asyncio.run(cluster_to(arguments, seed)),
    }
    for seed in range(arguments.rounds):
        for who, train in run.items():
            print(f"{who}, seed {seed}")
            found[who].append(train(seed))
    header = (f"to {arguments.to:g}", "seconds", "iterations", "start-up s")
    rows = []
    for who, trainings in found.items():
        ended = [one for one in trainings if one["seconds"] is not None]
        if ended:
            seconds = harness.spread((one["seconds"] for one in ended), 1)
            iterations = harness.spread((one["iterations"] for one in ended), 0)
            start_up = f"{median(one['start_up'] for one in ended):.1f}"
            rows.append((who, seconds, iterations, start_up))
        if len(ended) < len(trainings):
            print(f"{who}: {len(trainings) - len(ended)} not there in {arguments.most} iterations")
    harness.table(header, rows)
    pairs = zip(found["script"], found["cluster"], strict=True)
    ratios = [s["seconds"] / c["seconds"] for s, c in pairs if s["seconds"] and c["seconds"]]
    if ratios:
        print("script / cluster", harness.spread(ratios))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="turns, or trainings with --to")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--micro-batch", type=int, default=24, help="of both; 24 is tiny-ocr's")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the script")
    parser.add_argument("--to", type=float, metavar="REWARD")
    parser.add_argument("--every", type=int, default=5, help="iterations between evaluations")
    parser.add_argument("--most", type=int, default=200, help="iterations of a training")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measure = compare_speed if arguments.to is None else compare_time
    settings = {key: value for key, value in vars(arguments).items() if key != "json"}
    harness.save(arguments.json, {"settings": settings, **measure(arguments)})


if __name__ == "__main__":
    main()
