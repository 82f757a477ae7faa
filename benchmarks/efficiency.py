"""How much of an iteration's wall time is the work itself: ``tiny-ocr`` against its pure compute.

Pure compute is the network's forwards (sampling, and the reference of the KL) and backwards at the
spec's micro-batch, decoding and reading text; nothing else: no noise, no statistics, no optimizer.
It is timed in single-thread processes, one per core, all at work together, while every process of
the cluster stands still. The ideal wall time is that of all cores busy with nothing but it, and
efficiency the part of it in the measured one. Four iterations and pure compute take turns.

    .venv/bin/python benchmarks/efficiency.py [--rounds 8] [--set KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median
from typing import Any

import harness

Seconds = dict[str, float]
KINDS = ("forward", "decode", "ocr", "train")  # of pure compute


class Compute:
    """An iteration's pure compute on one thread."""

    def __init__(self, settings: list[str]) -> None:
        harness.quiet()
        import torch

        from flowgrpo_ray.algorithm.sampling import batch_condition
        from flowgrpo_ray.policies import load_policy
        from flowgrpo_ray.rewards import build
        from flowgrpo_ray.spec.file import load_spec
        from flowgrpo_ray.spec.plan import plan_iteration
        from flowgrpo_ray.spec.prompts import load_prompt_sets

        torch.set_num_threads(1)
        self.spec = spec = load_spec("tiny-ocr", settings)
        self.policy = load_policy(spec, torch.device("cpu"))
        self.policy.tune(spec.seed, with_reference=spec.objective.compares_reference)
        self.reader = build("ocr", spec.rewards["ocr"].options)
        size = spec.sampling.size
        self.shape = self.policy.latent_shape(size)
        self.prompts, _ = load_prompt_sets(spec)
        sigmas = self.policy.sigmas(spec.sampling.steps, size)
        self.plan = plan_iteration(spec, 1, len(self.prompts), sigmas)
        texts = [prompt.text for prompt in self.prompts]
        used = {p: self.policy.encode([texts[p]])[0] for u in self.plan.units for p in u.prompts}
        self.conditions = [batch_condition(self.policy, used, u.prompts) for u in self.plan.units]

    def iterate(self) -> Seconds:
        """Seconds of each kind of work, summed over the units of the iteration."""
        import torch

        schedule, total = self.plan.schedule, dict.fromkeys(KINDS, 0.0)
        with torch.no_grad():
            for unit, condition in zip(self.plan.units, self.conditions, strict=True):
                x = torch.randn(unit.batch, *self.shape)
                began = time.perf_counter()
                for step in range(schedule.steps):
                    v = self.policy.velocity(x, schedule.sigma[step], condition)
                    if step in schedule.stochastic_steps and self.policy.with_reference:
                        with self.policy.reference():
                            self.policy.velocity(x, schedule.sigma[step], condition)
                    x = x + (schedule.sigma[step + 1] - schedule.sigma[step]) * v
                sampled = time.perf_counter()
                images = self.policy.decode(x)
                decoded = time.perf_counter()
                texts = [self.prompts[p].text for p in unit.prompts]
                self.reader(images, texts, [{}] * unit.batch)
                total["forward"] += sampled - began
                total["decode"] += decoded - sampled
                total["ocr"] += time.perf_counter() - decoded
        began = time.perf_counter()
        for _ in range(self.spec.objective.epochs):
            for unit, condition in zip(self.plan.units, self.conditions, strict=True):
                x = torch.randn(unit.batch, *self.shape)
                for step in schedule.stochastic_steps:
                    v = self.policy.velocity(x, schedule.sigma[step], condition)
                    v.square().mean().backward()
        total["train"] = time.perf_counter() - began
        self.policy.network.zero_grad()
        return total


def serve(connection: Connection, settings: list[str]) -> None:
    compute = Compute(settings)
    compute.iterate()
    connection.send("ready")
    while True:
        connection.recv()
        connection.send(compute.iterate())


async def turns(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Wall seconds of iterations, and of the pure compute of one on each core."""
    cores, found = os.cpu_count() or 1, []
    with contextlib.ExitStack() as processes:
        pure = [
            processes.enter_context(harness.process(serve, arguments.set)) for _ in range(cores)
        ]
        async with harness.trainer(arguments.set) as trainer:
            await trainer.crew.measure_floor()
            for _ in range(harness.WARM_UP + arguments.rounds):
                wall = await harness.turn(trainer)
                with harness.frozen(*(pid for _, pid in pure)):
                    for connection, _ in pure:
                        connection.send("")
                    each = [connection.recv() for connection, _ in pure]
                work = {kind: fmean(one[kind] for one in each) for kind in each[0]}
                found.append({"wall": wall, "ideal": sum(work.values()) / cores, **work})
    return found[harness.WARM_UP :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rounds = asyncio.run(turns(arguments))
    print(f"{arguments.rounds} turns of {harness.TURN} iterations: median (least-most)")
    kinds = [(kind, f"{median(row[kind] for row in rounds):.2f}") for kind in KINDS]
    harness.table(("pure compute", "core seconds"), kinds)
    for name in ("ideal", "wall"):
        print(f"{name:5} seconds", harness.spread(row[name] for row in rounds))
    print("efficiency   ", harness.spread(row["ideal"] / row["wall"] for row in rounds))
    harness.save(arguments.json, {"settings": arguments.set, "rounds": rounds})


if __name__ == "__main__":
    main()
