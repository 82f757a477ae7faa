"""The training loop: publish, load, sample, score, accumulate, step.

The driver touches scores and object references only; images and trajectories travel between actors
and Serve. Groups stream: while one is scored another is sampled and a third accumulates gradients,
all under one version of the weights. Gradients accumulate in plan order, whatever the order of
arrival, so the result does not depend on how many workers there are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from ray import ObjectRef

from flowgrpo_ray.checkpoint import (
    Progress,
    checkpoint_iteration,
    newest_checkpoint,
    save_checkpoint,
)
from flowgrpo_ray.cluster import reward_deploy
from flowgrpo_ray.cluster.actors import all_or_none, place
from flowgrpo_ray.cluster.learner_group import Contribution, LearnerGroup
from flowgrpo_ray.cluster.live import Display
from flowgrpo_ray.cluster.reward_args import args_of
from flowgrpo_ray.cluster.reward_client import Patience, RewardClient
from flowgrpo_ray.cluster.rollout import RolloutPool, Sampled
from flowgrpo_ray.cluster.stages import StageReader
from flowgrpo_ray.cluster.stream import Stream
from flowgrpo_ray.cluster.telemetry import Telemetry
from flowgrpo_ray.errors import ContractError, RewardError
from flowgrpo_ray.metrics import Scores, Signal, mean_and_std, train_row, unscored
from flowgrpo_ray.prompts import Prompt, plan_evaluation, plan_iteration, prompts_digest
from flowgrpo_ray.rewards import weighted_total
from flowgrpo_ray.run_folder import RunFolder
from flowgrpo_ray.spec import TrainingSpec
from flowgrpo_ray.tracking import RunRecorder, StartClock, save_samples
from flowgrpo_ray.types import LearnerState, WeightsTicket, WorkUnit
from flowgrpo_ray.watch import Divergence, Watch, describe


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
    ) -> None:
        self.clock = clock
        self.spec, self.folder, self.recorder, self.display = spec, folder, recorder, display
        self.prompts = {"train": prompts, "eval": held_out}
        self._held: dict[tuple[str, int], ObjectRef] = {}  # conditions of this iteration's prompts
        self.stopping = False
        self.watch = Watch(spec)
        self.diverged: Divergence | None = None  # why the watch ended the run
        self.ratio_floor: float | None = None
        self.own_rewards: list[str] = []
        self._stages = StageReader(spec.cluster)
        self._earlier_seconds = 0.0  # of the attempts that this one continues
        self.progress = Progress(
            iteration=0,
            images=0,
            seconds=0.0,
            failed_groups=0,
            spec_identity=spec.identity(),
            prompts_digest=prompts_digest([*prompts, *held_out]),
        )
        self.telemetry = Telemetry(spec, folder, display)
        recorder.mirrors.append(self.telemetry.see)

    # --- the run

    async def train(self, resume: tuple[LearnerState, Progress] | None) -> Progress:
        """Train to ``spec.iterations``, or until ``stop``; where it ends is checkpointed."""
        if resume:
            self.progress = resume[1]
            self._earlier_seconds = self.progress.seconds
        async with self.telemetry:
            return await self._train(resume and resume[0])

    async def _train(self, state: LearnerState | None) -> Progress:
        await self.start()
        if state:
            await self.learners.load_state(state)
        await self.measure_floor()
        self.clock.lap("ratio floor")
        if not state and not self.stopping:
            await self.evaluate()
            self.clock.lap("first evaluation")
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
        return self.progress

    def stop(self) -> None:
        """Finish the iteration, checkpoint it and return."""
        self.stopping = True

    def status(self) -> dict[str, Any]:
        """For live.json; called from another thread."""
        state = "running" if self.telemetry.pool else "starting"
        return {
            "state": "stopping" if self.stopping else state,
            "iteration": self.progress.iteration,
            **self.telemetry.status(),
        }

    async def start(self) -> None:
        """Bring up learner, rollout workers and rewards, all at once; encode every new prompt."""
        self.display.stage("starting learner, rollout workers and rewards")
        self.group = place(self.spec.cluster)
        self.learners = LearnerGroup(self.spec, self.group)
        self.rollouts = RolloutPool(self.spec, self.group)
        await all_or_none(self._start_rewards(), self.learners.start(), self._start_rollouts())
        self.telemetry.pool = self.rollouts
        self.clock.lap("actors")

    async def _start_rewards(self) -> None:
        args = [args_of(name, reward) for name, reward in self.spec.rewards.items()]
        cluster, names = self.spec.cluster, list(self.spec.rewards)
        reused = await asyncio.to_thread(
            reward_deploy.deploy, args, http_port=cluster.reward_http_port
        )
        self.own_rewards = [name for name in names if name not in reused]
        deadline = cluster.ready_timeout_s
        await asyncio.to_thread(reward_deploy.wait, names, deadline_s=deadline, present=reused)
        for arg in args:
            if arg.name in reused:
                await reward_deploy.check_same(arg)
                self.display.note(f"using the deployment reward-{arg.name} that is there")
        self.rewards = RewardClient(
            {
                name: Patience(deadline_s=reward.deadline_s, retries=reward.retries)
                for name, reward in self.spec.rewards.items()
            },
            self.telemetry.traffic,
        )

    async def _start_rollouts(self) -> None:
        await self.rollouts.start()
        self.sigmas, self.eval_sigmas = await self.rollouts.sigmas(
            self.spec.sampling.steps, self.spec.evaluation.steps
        )
        await self.rollouts.encode([p.text for stream in self.prompts.values() for p in stream])

    async def publish(self, version: int, *, averaged: bool = False) -> WeightsTicket:
        """Contract: every worker holds exactly the published weights, or the run stops."""
        ticket, arrays = await self.learners.publish(version, averaged=averaged)
        await self.rollouts.load(ticket, arrays)
        return ticket

    async def measure_floor(self) -> None:
        """What this hardware cannot reproduce of a ratio of 1; the clip range must lie above."""
        ticket = await self.publish(0)
        units = plan_iteration(self.spec, 0, len(self.prompts["train"]), self.sigmas).units
        probe = [
            self._contribution(unit, await self.sample(unit, ticket))
            for unit in units[: self.spec.cluster.learner.count]
        ]
        self.ratio_floor = floor = await self.learners.measure_floor(probe)
        objective = self.spec.objective
        clips = objective.kind != "flow_dppo"
        clip = min(objective.clip_low, objective.clip_high) if clips else float("inf")
        if floor >= clip:
            raise ContractError(
                f"max |log rho| of a fresh trajectory is {floor:.3g} on this hardware, not below "
                f"the clip range {clip:.3g} of objective.clip_low / clip_high: updates would "
                "follow rounding errors. Widen the clip range, use model.dtype: float32, or put "
                "rollout and learner on one kind of device"
            )
        if floor:
            self.display.note(f"on this hardware |log rho| of fresh samples is up to {floor:.3g}")

    # --- one iteration

    async def iterate(self, iteration: int) -> None:
        """One iteration of Flow-GRPO, as the module's docstring tells it."""
        began = time.perf_counter()
        self.rewards.take_stats()  # of an evaluation before it
        plan = plan_iteration(self.spec, iteration, len(self.prompts["train"]), self.sigmas)
        self._held = {}
        self._hold(plan.units)
        ticket = await self.publish(iteration)
        published = time.perf_counter() - began
        self.display.stage("sampling, scoring, training")
        stream = Stream(self, plan, ticket)
        updates = []
        try:
            for _ in range(self.spec.objective.epochs):
                for number in range(len(plan.updates)):
                    samples = 0
                    async for unit, sampled, signal in stream.update(number):
                        samples += int(signal.keep.sum())
                        self.learners.accumulate(self._contribution(unit, sampled, signal))
                    steps = len(plan.schedule.stochastic_steps)
                    updates.append(await self.learners.step(samples, steps))
        finally:
            stream.cancel()
        seconds = time.perf_counter() - began
        results = stream.results
        row = train_row(self.spec, plan, ticket, results, updates)
        self._look_for_divergence(row)
        self.recorder.log(row)
        stages = {"publish": published, **stream.seconds}
        stages["train"] = sum(s.seconds for stats, _ in updates for s in stats)
        ranks = self.spec.cluster.learner.count  # they step together
        stages["step"] = ranks * sum(step.seconds for _, step in updates)
        where, advice = self._stages.read(stages, seconds, self.rewards.take_stats())
        speed = row["images"] / seconds
        self._record_time(
            "train", iteration, seconds, images_per_second=speed, stages=stages, **where
        )
        if advice:
            self.display.note(advice)
        scores = [result.scores for result in results]
        self._advance(iteration, row, scores)
        self._tell_missing(row, scores)
        self.display.iteration(row, seconds)

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

    def _contribution(
        self, unit: WorkUnit, sampled: Sampled, signal: Signal | None = None
    ) -> Contribution:
        if signal is None:
            signal = Signal(np.zeros(unit.batch, np.float32), np.zeros(unit.batch, bool))
        return Contribution(
            unit, sampled.trajectory, self._conditions(unit), signal.advantages, signal.keep
        )

    def _conditions(self, unit: WorkUnit) -> list[ObjectRef]:
        self._hold([unit])  # of a refill
        return [self._held[unit.stream, prompt] for prompt in unit.distinct_prompts]

    def _hold(self, units: Sequence[WorkUnit]) -> None:
        """Have the conditions of the units' prompts read into the object store."""
        wanted = dict.fromkeys((unit.stream, p) for unit in units for p in unit.distinct_prompts)
        missing = [key for key in wanted if key not in self._held]
        texts = [self.prompts[stream][prompt].text for stream, prompt in missing]
        self._held |= zip(missing, self.rollouts.conditions(texts), strict=True)

    async def sample(self, unit: WorkUnit, ticket: WeightsTicket) -> Sampled:
        """Have a free worker sample ``unit``."""
        return await self.rollouts.sample(unit, ticket, self._conditions(unit))

    async def score(self, unit: WorkUnit, images: ObjectRef) -> Scores:
        """Every reward's scores of a unit's images; NaN, and why, where one gave up."""
        prompts = [self.prompts[unit.stream][prompt] for prompt in unit.prompts]
        scored = await self.rewards.score(
            images, [p.text for p in prompts], [p.metadata for p in prompts]
        )
        weights = self.spec.weights
        failed = [why for name, why in scored.failures.items() if weights[name]]
        total = weighted_total(scored.rewards, weights)
        return Scores(scored.rewards, total, "; ".join(failed) or None, scored.failures)

    async def _sample_and_score(
        self, unit: WorkUnit, ticket: WeightsTicket
    ) -> tuple[Sampled, Scores]:
        sampled = await self.sample(unit, ticket)
        return sampled, await self.score(unit, sampled.images)

    # --- around the iterations

    async def evaluate(self) -> None:
        """Score the held-out prompts under the averaged weights, with fixed noise and no steps'
        noise; keeps a sample grid."""
        self.display.stage("evaluating")
        began, iteration = time.perf_counter(), self.progress.iteration
        ticket = await self.publish(iteration, averaged=True)
        held_out = self.prompts["eval"]
        units = plan_evaluation(self.spec, len(held_out), self.eval_sigmas)
        self._held = {}
        self._hold(units)
        results = await asyncio.gather(*(self._sample_and_score(unit, ticket) for unit in units))
        sampled, scores = zip(*results, strict=True)
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
        await self._keep_grid(iteration, sampled, rewards)
        seconds = time.perf_counter() - began
        self._record_time("eval", iteration, seconds)
        self.display.evaluation(iteration, means)

    async def _keep_grid(
        self, iteration: int, sampled: Sequence[Sampled], rewards: dict[str, np.ndarray]
    ) -> None:
        size = self.spec.evaluation.grid
        needed = -(-size // self.spec.evaluation.micro_batch)
        images = np.concatenate(await asyncio.gather(*(s.images for s in sampled[:needed])))[:size]
        texts = [prompt.text for prompt in self.prompts["eval"][: len(images)]]
        scores = {name: values[: len(images)] for name, values in rewards.items()}
        save_samples(self.folder.path, iteration, images, texts, scores)

    async def save(self) -> None:
        """Checkpoint learner and progress."""
        self.display.stage("saving a checkpoint")
        seconds = self._earlier_seconds + self.clock.elapsed()
        self.progress = replace(self.progress, seconds=seconds)
        state = await self.learners.state()
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
