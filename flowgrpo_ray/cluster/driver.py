"""The training loop: publish, sample, score, accumulate, step.

The driver touches scores and object references only. Groups stream: while one is scored another is
sampled and a third accumulates gradients, all under one version of the weights. Gradients
accumulate in plan order, whatever the order of arrival, so the result does not depend on how many
workers there are, nor on which of them die: a lost rollout worker's units are sampled again, and
after the loss of a learner rank the run goes back to its last checkpoint. What is written and shown
of all this hangs on the loop as its ``journal``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError

from flowgrpo_ray.algorithm.gate import Floor
from flowgrpo_ray.cluster.actors import LearnerLostError, all_or_none
from flowgrpo_ray.cluster.crew import REAL, Crew, Kinds
from flowgrpo_ray.cluster.journal import Iterated, Journal
from flowgrpo_ray.cluster.live import Display
from flowgrpo_ray.cluster.stream import Stream, sample_and_score
from flowgrpo_ray.cluster.telemetry import Telemetry
from flowgrpo_ray.common.types import (
    LearnerState,
    MicrobatchStats,
    StepStats,
    WeightsTicket,
    WorkUnit,
)
from flowgrpo_ray.run.checkpoint import Progress, save_checkpoint
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.metrics import Scores
from flowgrpo_ray.run.tracking import RunRecorder, StartClock
from flowgrpo_ray.spec.plan import plan_evaluation, plan_iteration
from flowgrpo_ray.spec.prompts import Prompt, prompts_digest
from flowgrpo_ray.spec.training import TrainingSpec

Saved = tuple[LearnerState, Progress]
LAST_WORDS_S = 5.0  # of actors at the end of a run


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
        self.spec, self.folder, self.display = spec, folder, display
        self.prompts = {"train": prompts, "eval": held_out}
        self.stopping = False
        self.floors: dict[int, Floor] = {}  # by the iterations before they were measured
        self._saved = saved  # until it is taken up: as large as the whole learner
        # With max_lag 1: the iteration that is sampled meanwhile, and under which weights.
        self._ahead: Stream | None = None
        self._behaviour: WeightsTicket | None = None
        self._writing: asyncio.Task[None] | None = None  # the last checkpoint, to disk
        self.telemetry = Telemetry(spec, folder, display)
        self.crew = Crew(spec, self.prompts, self.telemetry.traffic, display, kinds)
        digest = prompts_digest([*prompts, *held_out])
        resumed = saved[1] if saved else None
        self.journal = Journal(spec, digest, folder, recorder, display, clock, self.crew, resumed)
        recorder.mirrors.append(self.telemetry.see)

    # --- one iteration

    async def iterate(self, iteration: int) -> None:
        """One iteration, as the module's docstring tells it."""
        self.journal.begin_iteration()
        await self.crew.encode(iteration)
        self.display.stage("sampling, scoring, training")
        ticket = await self.crew.publish(iteration)
        if self.journal.tie:
            await self.crew.learners.tie(self.journal.tie.weight)
        with self._stream(iteration, ticket) as stream:
            numbers = [*range(len(stream.plan.updates))] * self.spec.objective.epochs
            updates = [
                await self._update(stream, number, last=turn == len(numbers))
                for turn, number in enumerate(numbers, start=1)
            ]
        self.journal.iterated(Iterated(iteration, ticket, stream, updates))

    async def _update(
        self, stream: Stream, number: int, *, last: bool
    ) -> tuple[list[MicrobatchStats], StepStats]:
        """One optimizer step on the units of an update, as they become ready in plan order; the
        ``last`` one of the iteration or another."""
        samples = 0
        async for unit, sampled, signal in stream.update(number):
            samples += int(signal.keep.sum())
            self.crew.learners.accumulate(self.crew.contribution(unit, sampled, signal))
        return await self.crew.learners.step(samples, len(stream.plan.points), last=last)

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
        crew = self.crew
        plan = plan_iteration(self.spec, iteration, crew.set_sizes, crew.sigmas)
        self.crew.hold(plan.units)
        return Stream(self.crew, plan, ticket)

    # --- the run

    async def train(self) -> Progress:
        """Train to ``spec.iterations``, or until ``stop``; where it ends is checkpointed."""
        async with self.telemetry:
            await self.start()
            try:
                while not await self._finished():
                    await self._go_back()
                await self._written()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.telemetry.listen(), LAST_WORDS_S)
            finally:
                self.drop_ahead()
                if self._writing:  # what ended the run is not its fault
                    await asyncio.wait([self._writing])
            return self.journal.progress

    async def start(self) -> None:
        """Bring up every actor."""
        self.display.stage("starting learner, rollout workers and rewards")
        await self.crew.start(self.journal.progress.iteration + 1)
        self.folder.write_spec(self.crew.spec)  # with what it found out
        self.telemetry.follow(self.crew)
        self.journal.started("actors")

    async def _finished(self) -> bool:
        """Train from a checkpoint or from the beginning; False if a learner rank was lost."""
        try:
            await self._prepare()
            await self._train()
        except LearnerLostError as lost:
            self.crew.losses.add(lost.name, lost)
            return False
        return True

    async def _prepare(self) -> None:
        """All that comes before the first iteration."""
        await self._take_up()
        self.floors[self.journal.progress.iteration] = await self.crew.measure_floor()
        self.journal.started("ratio floor")
        if self.journal.owes_evaluation and not self.stopping:
            await self.evaluate()
            self.journal.started("first evaluation")
        self.journal.begin()

    async def _take_up(self) -> None:
        """Have the learner go on from a checkpoint, if there is one."""
        if self._saved is None:
            return
        (state, _), self._saved = self._saved, None
        self._behaviour = await self.crew.learners.load_state(state)
        if self._behaviour:
            self.crew.rollouts.publish(self._behaviour, ray.put(state.behaviour))

    async def _train(self) -> None:
        spec, journal = self.spec, self.journal
        while not (self.stopping or journal.complete):
            await self.iterate(journal.progress.iteration + 1)
            if self._writing and self._writing.done():
                await self._written()  # or why not, as soon as it is known
            done = journal.progress.iteration
            if done == 1 and not (self.stopping or journal.complete or spec.sampling.max_lag):
                # A LoRA's adapters are 0 before the first update, and so is what they add to noise.
                self.floors[done] = await self.crew.measure_floor(version=done + 1)
            if journal.complete or (journal.owes_evaluation and not self.stopping):
                await self.evaluate()
            last = self.stopping or journal.complete
            best = journal.progress.best_iteration == done
            if last or best or done % spec.checkpoint.every == 0:
                await self.save()

    async def _go_back(self) -> None:
        """A new learner, and all else as it was after the last checkpoint, or before training."""
        self.display.stage("replacing the learner")
        self.drop_ahead()
        self._behaviour = None
        await self._written()
        await self.crew.learners.restart()
        self._saved = await asyncio.to_thread(self.folder.latest)
        self.journal.go_back(self._saved[1] if self._saved else None)

    def drop_ahead(self) -> None:
        """End what is sampled of the next iteration."""
        if self._ahead:
            self._ahead.cancel()
            self._ahead = None

    def stop(self) -> None:
        """Finish the iteration, checkpoint it and return."""
        self.stopping = True

    def status(self) -> dict[str, Any]:
        """For live.json; called from another thread."""
        state = "running" if self.telemetry.ready else "starting"
        return {
            "state": "stopping" if self.stopping else state,
            "iteration": self.journal.progress.iteration,
            **self.telemetry.status(),
        }

    # --- around the iterations

    async def evaluate(self) -> None:
        """Score the held-out prompts under the averaged weights, with fixed noise and no steps'
        noise; keeps a sample grid."""
        self.journal.begin_evaluation()
        ticket = await self.crew.publish(self.journal.progress.iteration, averaged=True)
        units = plan_evaluation(self.spec, len(self.prompts["eval"]), self.crew.eval_sigmas)
        scores, images = await self._held_out(units, ticket)
        self.journal.evaluated(scores, images, self.prompts["eval"])

    async def _held_out(
        self, units: Sequence[WorkUnit], ticket: WeightsTicket
    ) -> tuple[list[Scores], np.ndarray]:
        """Scores of all units, and the images ``[n, H, W, 3]`` of the sample grid."""
        size = self.spec.evaluation.grid
        needed = -(-size // self.spec.evaluation.micro_batch)
        while True:
            self.crew.hold(units)
            calls = [sample_and_score(self.crew, [unit], ticket) for unit in units]
            results = [result for (result,) in await all_or_none(*calls)]
            try:
                first = await asyncio.gather(*(sampled.images for sampled, _ in results[:needed]))
                return [scores for _, scores in results], np.concatenate(first)[:size]
            except ObjectLostError as error:  # they went away with their machine
                self.crew.losses.add("images of an evaluation", error)

    async def save(self) -> None:
        """Checkpoint learner and progress: copied here, written beside what comes next."""
        self.display.stage("saving a checkpoint")
        await self._written()
        progress = self.journal.now()
        shares = await self.crew.learners.shares()
        self._writing = asyncio.create_task(self._write(shares, progress))

    async def _write(self, shares: Sequence[LearnerState], progress: Progress) -> None:
        keep, protected = self.spec.checkpoint.keep, self.journal.watch.protected
        folder = self.folder.checkpoints
        await asyncio.to_thread(save_checkpoint, folder, shares, progress, keep, protected)
        self.telemetry.saved()

    async def _written(self) -> None:
        """Wait for the last checkpoint to be on disk; ``CheckpointError`` if it is not."""
        writing, self._writing = self._writing, None
        if writing:
            await writing
