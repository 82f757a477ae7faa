"""The actors of a run, and the driver's calls to them: publish, sample, score, contribute.

Only scores and object references come back to the driver; images and trajectories travel between
actors and Serve.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ray import ObjectRef

from flowgrpo_ray.algorithm.gate import MOST_IN_NOISE, Floor
from flowgrpo_ray.cluster.actors import Losses, RunOnRay, all_or_none
from flowgrpo_ray.cluster.colocated import ColocatedWorker, WorkerGroup, WorkerPool
from flowgrpo_ray.cluster.download import fetch_model
from flowgrpo_ray.cluster.learner_group import Contribution, LearnerGroup, LearnerRank
from flowgrpo_ray.cluster.linear import settled
from flowgrpo_ray.cluster.live import Display
from flowgrpo_ray.cluster.placement import place
from flowgrpo_ray.cluster.rollout import RolloutWorker
from flowgrpo_ray.cluster.rollout_pool import RolloutPool
from flowgrpo_ray.cluster.samplers import Pool, Sampled
from flowgrpo_ray.cluster.scoring import Scorer
from flowgrpo_ray.common.errors import ContractError
from flowgrpo_ray.common.types import Float64, Request, WeightsTicket, WorkUnit
from flowgrpo_ray.run.ledger import Ledger
from flowgrpo_ray.run.metrics import Scores, Signal
from flowgrpo_ray.serving import deploy
from flowgrpo_ray.serving.args import args_of
from flowgrpo_ray.serving.client import Patience, RewardClient, Traffic
from flowgrpo_ray.spec.cluster import NAMES
from flowgrpo_ray.spec.plan import plan_encoding, plan_probes
from flowgrpo_ray.spec.prompts import Prompt, check_lengths, set_sizes, unused_images
from flowgrpo_ray.spec.training import TrainingSpec


@dataclass(frozen=True)
class Kinds:
    """The classes of the actors; benchmarks put simulated ones in their place."""

    rollout: type = RolloutWorker
    learner: type = LearnerRank
    workers: type = ColocatedWorker


REAL = Kinds()


class Crew:
    """Learner ranks, rollout workers and the clients of the reward deployments."""

    learners: LearnerGroup
    rollouts: Pool
    rewards: RewardClient
    sigmas: tuple[float, ...]  # the model's noise levels in training
    eval_sigmas: tuple[float, ...]

    def __init__(
        self,
        spec: TrainingSpec,
        prompts: Mapping[str, Sequence[Prompt]],
        traffic: Mapping[str, Traffic],
        display: Display,
        kinds: Kinds,
    ) -> None:
        self.spec, self.prompts, self.display = spec, prompts, display
        self.set_sizes: Sequence[int] = set_sizes(prompts["train"])
        self._traffic, self._kinds = traffic, kinds
        self.own_rewards: list[str] = []  # those that this run deployed
        self.warnings: list[str] = []  # of the start, for the run folder
        counts = {section: kind.count for section, kind in spec.actors.items()}
        counts |= {"rollout": 0} if "rollout" in counts else {}  # they come and go
        counts |= {f"reward-{name}": r.replicas for name, r in spec.rewards.items()}
        self.ledger = Ledger(counts)
        self._encoded = range(0)  # iterations whose prompts are
        self.losses = Losses(spec.cluster.max_restarts, display.note)

    async def start(self, iteration: int) -> None:
        """Bring up learner, rollout workers and rewards, all at once; encode the prompts that
        ``iteration`` needs, and some more.

        What shares a GPU with text encoders comes when these are gone.
        """
        self.placement = await place(self.spec)
        await fetch_model(self.spec, self.placement.nodes, self.display)
        self.spec = await settled(self.spec, self.placement.group, self.display.note)
        train = self.prompts["train"]
        asked = (len(train), len(train[0].images))
        run = RunOnRay(self.spec, self.placement, self.ledger, self.losses, *asked)
        if self.spec.cluster.layout == "colocated":
            self.rollouts = pool = WorkerPool(run, self._kinds.workers)
            self.learners = WorkerGroup(run, self._kinds.workers, pool)
            learners = self.learners.start()
        else:
            self.rollouts = RolloutPool(run, self._kinds.rollout)
            self.learners = LearnerGroup(run, self._kinds.learner)
            learners = self._after_encoding(self.learners.start)
        rewards = self._after_encoding(self._start_rewards)
        await all_or_none(rewards, learners, self._start_rollouts(iteration))
        if (count := self.spec.ranks.count) > 1:
            name = NAMES[self.spec.trains]
            self.display.note(f"{count} {name}s: {self.learners.parallel}")

    async def _after_encoding(self, start: Callable[[], Awaitable[None]]) -> None:
        if self.spec.shares_gpus:
            await self.rollouts.encoded.wait()
        await start()

    async def _start_rewards(self) -> None:
        args = [args_of(name, reward) for name, reward in self.spec.rewards.items()]
        cluster, names = self.spec.cluster, list(self.spec.rewards)
        reused = await asyncio.to_thread(deploy.deploy, args, http_port=cluster.reward_http_port)
        self.own_rewards = [name for name in names if name not in reused]
        deadline = cluster.ready_timeout_s
        await asyncio.to_thread(deploy.wait, names, deadline_s=deadline, present=reused)
        for arg in args:
            if arg.name in reused:
                await deploy.check_same(arg)
                self.display.note(f"using the deployment reward-{arg.name} that is there")
        patience = {
            name: Patience(deadline_s=reward.deadline_s, retries=reward.retries)
            for name, reward in self.spec.rewards.items()
        }
        self.rewards = RewardClient(patience, self._traffic, self.ledger)
        self.scorer = Scorer(self.spec, self.prompts, self.rewards, self.ledger)

    async def _start_rollouts(self, iteration: int) -> None:
        await self.rollouts.start()
        await self.check_prompts()
        await self.encode(iteration)
        self.display.stage("loading the model")
        await self.rollouts.load_models()
        self.sigmas, self.eval_sigmas = await self.rollouts.sigmas(
            self.spec.sampling.steps, self.spec.evaluation.steps
        )

    async def check_prompts(self) -> None:
        """Tell of prompts that the model reads in part, or whose images nobody looks at;
        ``PromptError`` where a reward asks for what is not read."""
        prompts = [*self.prompts["train"], *self.prompts["eval"]]
        found = await self.rollouts.overlong(sorted({prompt.text for prompt in prompts}))
        told = "workers were lost: prompts may be longer than the model reads"
        if found is not None:
            told = check_lengths(self.spec, prompts, found)
        self.warnings = [text for text in (told, unused_images(self.spec, prompts)) if text]
        for text in self.warnings:
            self.display.note(text)

    async def encode(self, iteration: int) -> None:
        """Have all prompts encoded that this iteration needs, or that are sampled during it; if
        there are new ones, those of later iterations with them."""
        last = min(iteration + self.spec.sampling.max_lag, self.spec.iterations)
        if iteration in self._encoded and last in self._encoded:
            return
        train = self.prompts["train"]
        self._encoded, needed = plan_encoding(self.spec, iteration, self.set_sizes)
        prompts = [*self.prompts["eval"], *(train[index] for index in needed)]
        size = self.spec.sampling.size
        requests, began = [prompt.request(size) for prompt in prompts], time.perf_counter()
        if new := await self.rollouts.encode(requests, self._tell_encoding):
            self.display.note(f"encoded {new} prompts in {time.perf_counter() - began:.1f} s")

    def _tell_encoding(self, done: int, whole: int) -> None:
        self.display.stage(f"encoding prompts: {done} of {whole}")

    async def publish(self, version: int, *, averaged: bool = False) -> WeightsTicket:
        """Contract: no unit is sampled under other weights than the published, or the run stops."""
        ticket, arrays = await self.learners.publish(version, averaged=averaged)
        self.rollouts.publish(ticket, arrays)
        return ticket

    async def measure_floor(self, version: int = 0) -> Floor:
        """What this hardware cannot reproduce of the gate's 0; a clip range must lie above."""
        ticket = await self.publish(version)
        measured: list[Mapping[int, Float64]] = []
        floor = Floor({})
        for row in plan_probes(self.spec, self.set_sizes, self.sigmas):
            sampled = await all_or_none(*(self.sample(unit, ticket) for unit in row))
            probe = [self.contribution(*of) for of in zip(row, sampled, strict=True)]
            measured += await self.learners.measure_floor(probe)
            floor = Floor.of(measured)
            if floor.exact and not self.spec.computes_on_gpus:
                break  # a CPU repeats every bit or none
        self._check_clip_range(floor)
        await self.learners.set_floor(floor)
        return floor

    def _check_clip_range(self, floor: Floor) -> None:
        """``ContractError`` if the noise of this hardware would be clipped, and the spec does not
        say that it may be."""
        if floor.exact:
            return
        objective = self.spec.objective
        bounds, symbol = objective.bounds, objective.gate.symbol
        told = f"on this hardware |{symbol}| of fresh samples is not 0: {floor}"
        if bounds and not bounds.masks:
            lost = floor.beyond(min(bounds.values))
            beyond = f"above the clip range {min(bounds.values):.3g} of {bounds.keys}"
            if lost > MOST_IN_NOISE and not objective.clip_in_noise:
                raise ContractError(
                    f"{told}, and {lost:.0%} of it {beyond}: updates would follow rounding errors. "
                    "Widen the clip range, use model.dtype: float32, put rollout and learner on "
                    "one kind of device, or set objective.clip_in_noise: true"
                )
            told += f"; {lost:.1%} {beyond}"
        self.display.note(told)

    def prompts_of(self, unit: WorkUnit) -> list[Request]:
        """What a unit's distinct prompts ask for, in order."""
        prompts, size = self.prompts[unit.stream], self.spec.sampling.size
        return [prompts[prompt].request(size) for prompt in unit.distinct_prompts]

    def hold(self, units: Sequence[WorkUnit]) -> None:
        """Have the conditions of these units' prompts read before workers are busy sampling; those
        of others may go."""
        self.rollouts.hold([prompt for unit in units for prompt in self.prompts_of(unit)])

    async def sample(self, unit: WorkUnit, ticket: WeightsTicket) -> Sampled:
        """Have a free worker sample ``unit``."""
        return await self.rollouts.sample(unit, ticket, self.prompts_of(unit))

    async def score(self, units: Sequence[WorkUnit], images: Sequence[ObjectRef]) -> list[Scores]:
        """Every reward's scores of the units' images; NaN, and why, where one gave up."""
        return await self.scorer.score(units, images)

    def contribution(
        self, unit: WorkUnit, sampled: Sampled, signal: Signal | None = None
    ) -> Contribution:
        """A unit on its way to the learner; without a signal, one that has no gradient."""
        if signal is None:
            signal = Signal(np.zeros(unit.batch, np.float32), np.zeros(unit.batch, bool))
        return Contribution(
            unit,
            sampled.trajectory,
            sampled.conditions,
            signal.advantages,
            signal.keep,
            sampled.worker,
        )
