"""One iteration of ``tiny-ocr``: the cluster against one plain process, side by side.

Both do the same arithmetic on the same micro-batches with the same OCR. The plain process has no
Ray, no Serve and no FSDP: it samples all, scores all, trains all, with as many torch threads as the
machine has cores. The two take turns, because machines drift; medians and their ratio are printed.

    .venv/bin/python benchmarks/iteration.py [--rounds 8] [--set KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from flowgrpo_ray.cluster.session import ray_session
from flowgrpo_ray.prompts import load_prompt_sets, plan_iteration
from flowgrpo_ray.run_folder import RunFolder
from flowgrpo_ray.spec import TrainingSpec
from flowgrpo_ray.spec_file import load_spec
from flowgrpo_ray.tracking import RunRecorder, StartClock, read_rows

Seconds = dict[str, float]


class PlainLoop:
    """The iteration as a single-process training script has it."""

    def __init__(self, spec: TrainingSpec) -> None:
        import torch

        from flowgrpo_ray.policies import load_policy
        from flowgrpo_ray.rewards import build

        torch.set_num_threads(os.cpu_count() or 1)
        self.spec = spec
        self.prompts, _ = load_prompt_sets(spec)
        self.policy = load_policy(spec, torch.device("cpu"))
        self.policy.tune(spec.seed, with_reference=spec.objective.kl is not None)
        self.parameters = list(self.policy.trainable().values())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=spec.optimizer.learning_rate,
            betas=spec.optimizer.betas,
            fused=True,
        )
        self.conditions = dict(enumerate(self.policy.encode([p.text for p in self.prompts])))
        self.sigmas = self.policy.sigmas(spec.sampling.steps, spec.sampling.size)
        threads = {"ocr": {"threads": os.cpu_count() or 1}}
        self.rewards = {
            name: build(name, {**reward.options, **threads.get(name, {})})
            for name, reward in spec.rewards.items()
        }

    def iterate(self, iteration: int) -> Seconds:
        from flowgrpo_ray.metrics import Scores, signals
        from flowgrpo_ray.rewards import weighted_total
        from flowgrpo_ray.sampling import rollout
        from flowgrpo_ray.types import WeightsTicket

        plan = plan_iteration(self.spec, iteration, len(self.prompts), self.sigmas)
        began = time.perf_counter()
        ticket = WeightsTicket(iteration, "")
        sampled = []
        for unit in plan.units:
            trajectory, x = rollout(
                self.policy, unit, self.conditions, self.spec.sampling.size, ticket
            )
            sampled.append((unit, trajectory, self.policy.decode(x)))
        after_sampling = time.perf_counter()
        scores = []
        for unit, _, images in sampled:
            texts = [self.prompts[p].text for p in unit.prompts]
            found = {n: r(images, texts, [{}] * unit.batch) for n, r in self.rewards.items()}
            scores.append(Scores(found, weighted_total(found, self.spec.weights)))
        after_scoring = time.perf_counter()
        of_unit = {}
        for block in plan.blocks:
            indices = [unit.index for unit in block]
            of_block = [scores[i] for i in indices]
            of_unit |= signals(block, of_block, self.spec.advantages, self.spec.weights)
        for update in plan.updates:
            self._update([(sampled[u.index], of_unit[u.index]) for u in update.units])
        ended = time.perf_counter()
        return {
            "iteration": ended - began,
            "sample": after_sampling - began,
            "score": after_scoring - after_sampling,
            "train": ended - after_scoring,
        }

    def _update(self, batches: list[Any]) -> None:
        import torch

        from flowgrpo_ray.objective import clipped_loss, kl_to_reference
        from flowgrpo_ray.sampling import batch_condition, replay

        spec = self.spec.objective
        terms = 0
        for (unit, trajectory, _), signal in batches:
            advantage, keep = torch.tensor(signal.advantages), torch.tensor(signal.keep)
            condition = batch_condition(self.policy, self.conditions, unit.prompts)
            sigma = unit.schedule.sigma
            for step in replay(self.policy, trajectory, unit.schedule, condition):
                loss = clipped_loss(step.log_ratio, advantage, spec.clip_low, spec.clip_high)
                loss = loss * unit.batch
                if step.reference is not None:
                    dt = sigma[step.step + 1] - sigma[step.step]
                    kl = kl_to_reference(step.new, step.reference, dt, spec.kl.form)
                    loss = loss + spec.kl.beta * (kl * keep).sum()
                loss.backward()
                terms += int(keep.sum())
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= max(1, terms)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.spec.optimizer.grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def serve_plain(spec: TrainingSpec, connection: Connection) -> None:
    """In a process of its own: one iteration per request."""
    loop = PlainLoop(spec)
    connection.send("ready")
    while True:
        connection.send(loop.iterate(connection.recv()))


class Silent:
    def stage(self, stage: str) -> None: ...
    def iteration(self, row: dict[str, Any], seconds: float) -> None: ...
    def evaluation(self, iteration: int, rewards: dict[str, float]) -> None: ...
    def note(self, message: str) -> None: ...


@contextmanager
def plain_process(spec: TrainingSpec) -> Iterator[Connection]:
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve_plain, args=(spec, there))
    process.start()
    there.close()  # so that its death ends our waiting
    try:
        assert here.recv() == "ready"
        yield here
    finally:
        process.terminate()
        process.join()


async def take_turns(trainer: Any, plain: Connection, rounds: int) -> tuple[list[Seconds], ...]:
    await trainer.start()
    await trainer.measure_floor()
    cluster, single = [], []
    for iteration in range(1, rounds + 3):
        began = time.perf_counter()
        await trainer.iterate(iteration)
        seconds = time.perf_counter() - began
        stages = read_rows(trainer.folder.path / "timings.jsonl")[-1]["stages"]
        plain.send(iteration)
        alone = await asyncio.to_thread(plain.recv)
        if iteration > 2:  # the first two warm up
            cluster.append({"iteration": seconds, **stages})
            single.append(alone)
    return cluster, single


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)
    spec = load_spec("tiny-ocr", arguments.set)
    prompts, held_out = load_prompt_sets(spec)
    with tempfile.TemporaryDirectory() as root, plain_process(spec) as plain:
        folder = RunFolder.claim(Path(root), spec, resume=False)
        recorder = RunRecorder(folder.path, tensorboard=False)
        with ray_session(spec, folder.logs):
            from flowgrpo_ray.cluster.driver import Trainer

            clock = StartClock(time.perf_counter())
            trainer = Trainer(spec, prompts, held_out, folder, recorder, Silent(), clock)
            cluster, single = asyncio.run(take_turns(trainer, plain, arguments.rounds))
    report(spec, cluster, single)


def report(spec: TrainingSpec, cluster: list[Seconds], single: list[Seconds]) -> None:
    ours = median(row["iteration"] for row in cluster)
    theirs = median(row["iteration"] for row in single)
    images = spec.sampling.images
    print(f"{len(cluster)} rounds of {images} images, medians, {os.cpu_count()} cores")
    print(f"plain process  {theirs:.2f} s  {images / theirs:5.1f} images/s")
    print(f"cluster        {ours:.2f} s  {images / ours:5.1f} images/s")
    ratios = sorted(c["iteration"] / s["iteration"] for c, s in zip(cluster, single, strict=True))
    print(
        f"overhead factor {ours / theirs:.2f}  (round by round {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    print("seconds by stage; the plain process runs them one after another on all cores, in the")
    print("cluster they overlap, each on its own core:")
    for stage in cluster[0]:
        if stage != "iteration":
            one = median(row[stage] for row in single) if stage in single[0] else float("nan")
            print(
                f"  {stage:8} plain {one:5.2f}   cluster {median(r[stage] for r in cluster):5.2f}"
            )


if __name__ == "__main__":
    main()
