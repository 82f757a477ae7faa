"""The training loop: publish, sample, score, accumulate, step.

The driver touches scores and object references only. Groups stream: while one is scored another is
sampled and a third accumulates gradients, all under one version of the weights. Gradients
accumulate in plan order, whatever the order of arrival, so the result does not depend on how many
workers there are, nor on which of them die: a lost rollout worker's units are sampled again, and
after the loss of a learner rank the run goes back to its last checkpoint.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError

from flowgrpo_ray.checkpoint import (
    Progress,
    checkpoint_iteration,
    newest_checkpoint,
    save_checkpoint,
)
from flowgrpo_ray.cluster.actors import LearnerLostError
from flowgrpo_ray.cluster.crew import REAL, Crew, Kinds
from flowgrpo_ray.cluster.live import Display
from flowgrpo_ray.cluster.stages import StageReader
from flowgrpo_ray.cluster.stream import Stream, sample_and_score
from flowgrpo_ray.cluster.telemetry import Telemetry
from flowgrpo_ray.errors import RewardError
from flowgrpo_ray.metrics import Scores, mean_and_std, train_row, unscored
from flowgrpo_ray.prompts import Prompt, plan_evaluation, plan_iteration, prompts_digest
from flowgrpo_ray.run_folder import RunFolder
from flowgrpo_ray.spec import TrainingSpec
from flowgrpo_ray.tracking import RunRecorder, StartClock, save_samples
from flowgrpo_ray.types import LearnerState, WeightsTicket, WorkUnit
from flowgrpo_ray.watch import Divergence, Watch, describe

Saved = tuple[LearnerState, Progress]


class Trainer:
    """One run on a connected Ray cluster."""

    def __init__(
        self,
        spec: TrainingSpec,
        prompts: Sequence[Prompt],
        held_out: Sequence[Prompt],
        folder: RunFolder,
        recorder: RunRecorder,
        display: Display,
        clock: StartClock,
        kinds: Kinds = REAL,
        saved: Saved | None = None,
    ) -> None:
        self.clock = clock
        self._saved = saved  # until it is taken up: as large as the whole learner
        self.spec, self.folder, self.recorder, self.display = spec, folder, recorder, display
        self.prompts = {"train": prompts, "eval": held_out}
        self.stopping = False
        self.watch = Watch(spec)
        self.diverged: Divergence | None = None  # why the watch ended the run
        self.ratio_floor: float | None = None
        self._stages = StageReader(spec)
        self._earlier_seconds = 0.0  # of the attempts that this one continues
        self._begun = Progress(
            iteration=0,
            images=0,
            seconds=0.0,
            failed_groups=0,
            spec_identity=spec.identity(),
            prompts_digest=prompts_digest([*prompts, *held_out]),
        )
        self.progress = self._begun
        self._furthest = 0  # iteration
        # With max_lag 1: the iteration that is sampled meanwhile, and under which weights.
        self._ahead: Stream | None = None
        self._behaviour: WeightsTicket | None = None
        self.telemetry = Telemetry(spec, folder, display)
        self.crew = Crew(spec, self.prompts, self.telemetry.traffic, display, kinds)
        recorder.mirrors.append(self.telemetry.see)

    # --- the run

    async def train(self) -> Progress:
        """Train to ``spec.iterations``, or until ``stop``; where it ends is checkpointed."""
        if self._saved:
            self._earlier_seconds = self._saved[1].seconds
        async with self.telemetry:
            await self.start()
            try:
                while not await self._finished():
                    await self._go_back()
            finally:
                self.drop_ahead()
            return self.progress

    async def start(self) -> None:
        """Bring up every actor."""
        self.display.stage("starting learner, rollout workers and rewards")
        await self.crew.start()
        self.telemetry.follow(self.crew)
        self.clock.lap("actors")

    async def _finished(self) -> bool:
        """Train from a checkpoint or from the beginning; False if a learner rank was lost."""
        try:
            await self._train()
        except LearnerLostError as lost:
            self.crew.losses.add(lost.name, lost)
            return False
        return True

    async def _train(self) -> None:
        first_time, afresh = self.ratio_floor is None, self._saved is None
        await self._take_up()
        self.ratio_floor = await self.crew.measure_floor()
        self.clock.lap("ratio floor")
        if afresh and not self.stopping:
            await self.evaluate()
            self.clock.lap("first evaluation")
        if first_time:
            self.recorder.log_timing(self.clock.row())
        while self.progress.iteration < self.spec.iterations and not self.stopping:
            await self.iterate(self.progress.iteration + 1)
            done = self.progress.iteration
            last = done == self.spec.iterations or self.diverged is not None
            if not self.stopping and (last or done % self.spec.evaluation.every == 0):
                await self.evaluate()
            if last or self.stopping or done % self.spec.checkpoint.every == 0:
                await self.save()
            if self.diverged:
                break

    async def _take_up(self) -> None:
        """Go on after a checkpoint, if there is one."""
        if self._saved is None:
            return
        (state, self.progress), self._saved = self._saved, None
        self._behaviour = await self.crew.learners.load_state(state)
        if self._behaviour:
            self.crew.rollouts.publish(self._behaviour, ray.put(state.behaviour))

    async def _go_back(self) -> None:
        """A new learner, and all else as it was after the last checkpoint, or before training."""
        self.display.stage("replacing the learner")
        self.drop_ahead()
        self._behaviour = None
        await self.crew.learners.restart()
        self._saved = await asyncio.to_thread(self.folder.latest)
        self.progress = self._saved[1] if self._saved else self._begun
        at = self.progress.iteration if self._saved else None
        self.recorder.rewind(at, self.spec.evaluation.every)
        self.watch, self.diverged = Watch(self.spec), None
        self.watch.replay(self.recorder.metrics())
        self.display.note(f"going on after iteration {self.progress.iteration}, the last saved one")

    def stop(self) -> None:
        """Finish the iteration, checkpoint it and return."""
        self.stopping = True

    def status(self) -> dict[str, Any]:
        """For live.json; called from another thread."""
        state = "running" if self.telemetry.ready else "starting"
        return {
            "state": "stopping" if self.stopping else state,
            "iteration": self.progress.iteration,
            **self.telemetry.status(),
        }

    # --- one iteration

    async def iterate(self, iteration: int) -> None:
        """One iteration of Flow-GRPO, as the module's docstring tells it."""
        crew, began = self.crew, time.perf_counter()
        crew.rewards.take_stats()  # of an evaluation before it
        crew.ledger.begin()
        ticket = await crew.publish(iteration)
        self.display.stage("sampling, scoring, training")
        stream = self._stream(iteration, ticket)
        updates = []
        try:
            for _ in range(self.spec.objective.epochs):
                for number in range(len(stream.plan.updates)):
                    samples = 0
                    async for unit, sampled, signal in stream.update(number):
                        samples += int(signal.keep.sum())
                        crew.learners.accumulate(crew.contribution(unit, sampled, signal))
                    steps = len(stream.plan.schedule.stochastic_steps)
                    updates.append(await crew.learners.step(samples, steps))
        finally:
            stream.cancel()
        seconds, accounts = time.perf_counter() - began, crew.ledger.cut()
        results = stream.results
        row = train_row(self.spec, stream.plan, ticket, stream.ticket, results, updates)
        self._look_for_divergence(row)
        self.recorder.log(row)
        speed = row["images"] / seconds
        where, advice = self._stages.read(accounts, seconds, crew.rewards.take_stats())
        self._record_time("train", iteration, seconds, images_per_second=speed, **where)
        if advice:
            self.display.note(advice)
        scores = [result.scores for result in results]
        self._advance(iteration, row, scores)
        self._tell_missing(row, scores)
        self.display.iteration(row, seconds)

    def _stream(self, iteration: int, ticket: WeightsTicket) -> Stream:
        """The units of an iteration on their way.

        With ``sampling.max_lag: 1`` they began in the iteration before, under the weights of that
        one (``_ahead``, or what a checkpoint kept of it), and the next ones begin now.
        """
        stream, self._ahead = self._ahead, None
        if stream is None:
            stream = self._begin(iteration, self._behaviour or ticket)
            self._behaviour = None
        if self.spec.sampling.max_lag and iteration < self.spec.iterations and not self.stopping:
            self._ahead = self._begin(iteration + 1, ticket)
        return stream

    def _begin(self, iteration: int, ticket: WeightsTicket) -> Stream:
        plan = plan_iteration(self.spec, iteration, len(self.prompts["train"]), self.crew.sigmas)
        self.crew.hold(plan.units)
        return Stream(self.crew, plan, ticket)

    def drop_ahead(self) -> None:
        """End what is sampled of the next iteration."""
        if self._ahead:
            self._ahead.cancel()
            self._ahead = None

    def _tell_missing(self, row: Mapping[str, Any], scores: Sequence[Scores]) -> None:
        """Note every reward whose deployment gave up."""
        for name, why in {n: why for unit in scores for n, why in unit.failures.items()}.items():
            self.display.note(f"{name}: {row['unscored'][name]} images without a score: {why}")

    def _look_for_divergence(self, row: dict[str, Any]) -> None:
        """Add the watch's readings to ``row``; say when one diverges, and stop if the spec does."""
        known = {name for name, reading in self.watch.readings.items() if reading.diverging}
        readings = self.watch.see(row)
        if readings:
            row["watch"] = {name: reading.as_json() for name, reading in readings.items()}
        for name, reading in readings.items():
            if not reading.diverging:
                continue
            kept = newest_checkpoint(self.folder.checkpoints, reading.best_iteration)
            before = checkpoint_iteration(kept) if kept else None
            message = describe(name, reading, before)
            if name not in known:
                self.display.note(message)
            if self.spec.watch.action == "stop":
                self.diverged = Divergence(message, before)

    def _advance(self, iteration: int, row: dict[str, Any], scores: Sequence[Scores]) -> None:
        if iteration > self._furthest:
            self._furthest = iteration
            self.crew.losses.advanced()
        failed = self.progress.failed_groups + row["groups"]["dropped"]
        self.progress = replace(
            self.progress,
            iteration=iteration,
            images=self.progress.images + row["images"],
            failed_groups=failed,
        )
        allowed = self.spec.cluster.max_failed_groups
        if failed > allowed:
            why = [score.failure for score in scores if score.failure]
            silent = ", ".join(f"{name} {count}" for name, count in row["unscored"].items())
            raise RewardError(
                f"{failed} groups could not be scored and were left out, more than "
                f"cluster.max_failed_groups = {allowed}. "
                + (why[-1] if why else f"Images without a score in the last iteration: {silent}")
            )

    # --- around the iterations

    async def evaluate(self) -> None:
        """Score the held-out prompts under the averaged weights, with fixed noise and no steps'
        noise; keeps a sample grid."""
        self.display.stage("evaluating")
        began, iteration = time.perf_counter(), self.progress.iteration
        ticket = await self.crew.publish(iteration, averaged=True)
        held_out = self.prompts["eval"]
        units = plan_evaluation(self.spec, len(held_out), self.crew.eval_sigmas)
        scores, images = await self._held_out(units, ticket)
        rewards = {
            name: np.concatenate([score.rewards[name] for score in scores])
            for name in self.spec.rewards
        }
        summary = {name: mean_and_std(values) for name, values in rewards.items()}
        row = {
            "kind": "eval",
            "iteration": iteration,
            "rewards": summary,
            "unscored": unscored([score.rewards for score in scores]),
            "prompts": len(held_out),
            "weights": "ema" if self.spec.ema else "last",
        }
        self.recorder.log(row)
        self._tell_missing(row, scores)
        means = {
            name: None if np.isnan(values["mean"]) else round(values["mean"], 6)
            for name, values in summary.items()
        }
        if iteration == 0:
            self.progress = replace(self.progress, eval_before=means)
        self.progress = replace(self.progress, eval_last=means)
        self._keep_grid(iteration, images, rewards)
        seconds = time.perf_counter() - began
        self._record_time("eval", iteration, seconds)
        self.display.evaluation(iteration, means)

    async def _held_out(
        self, units: Sequence[WorkUnit], ticket: WeightsTicket
    ) -> tuple[list[Scores], np.ndarray]:
        """Scores of all units, and the images ``[n, H, W, 3]`` of the sample grid."""
        size = self.spec.evaluation.grid
        needed = -(-size // self.spec.evaluation.micro_batch)
        while True:
            self.crew.hold(units)
            calls = [sample_and_score(self.crew, unit, ticket) for unit in units]
            results = await asyncio.gather(*calls)
            try:
                first = await asyncio.gather(*(sampled.images for sampled, _ in results[:needed]))
                return [scores for _, scores in results], np.concatenate(first)[:size]
            except ObjectLostError as error:  # they went away with their machine
                self.crew.losses.add("images of an evaluation", error)

    def _keep_grid(
        self, iteration: int, images: np.ndarray, rewards: dict[str, np.ndarray]
    ) -> None:
        texts = [prompt.text for prompt in self.prompts["eval"][: len(images)]]
        scores = {name: values[: len(images)] for name, values in rewards.items()}
        save_samples(self.folder.path, iteration, images, texts, scores)

    async def save(self) -> None:
        """Checkpoint learner and progress."""
        self.display.stage("saving a checkpoint")
        seconds = self._earlier_seconds + self.clock.elapsed()
        self.progress = replace(self.progress, seconds=seconds)
        state = await self.crew.learners.state()
        await asyncio.to_thread(
            save_checkpoint,
            self.folder.checkpoints,
            state,
            self.progress,
            self.spec.checkpoint.keep,
            self.watch.protected,
        )
        self.telemetry.saved()

    def _record_time(self, kind: str, iteration: int, seconds: float, **more: Any) -> None:
        self.recorder.log_timing({"kind": kind, "iteration": iteration, "seconds": seconds, **more})
