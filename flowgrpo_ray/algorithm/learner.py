"""The GRPO update: gradients accumulate over micro-batches, then one optimizer step.

A learner is one rank. It knows no Ray: it takes trajectories and advantages, and gives weights.
Micro-batches are replayed whole, as they were sampled; before the first update of an iteration the
ratio gate holds the replayed log-probabilities against the sampled ones.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flowgrpo_ray.algorithm.gate import FLOOR_MARGIN, RatioGate
from flowgrpo_ray.algorithm.objective import (
    clipped,
    clipped_loss,
    diverged,
    guard_log_ratio,
    kl_to_reference,
    masked_loss,
)
from flowgrpo_ray.algorithm.optimizer import LossScale, Optimizer
from flowgrpo_ray.algorithm.parallel import (
    add_up,
    asked_for,
    finish,
    gather_weights,
    reshard,
    shard,
)
from flowgrpo_ray.algorithm.sampling import Replayed, batch_condition, replay
from flowgrpo_ray.algorithm.weights import digest, full, gather, load_arrays, to_arrays
from flowgrpo_ray.common.types import (
    Condition,
    Float32,
    LearnerState,
    MicrobatchStats,
    Parallel,
    StepStats,
    Trajectory,
    WeightsTicket,
    WorkUnit,
)
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.spec.sections import KlSpec, Objective
from flowgrpo_ray.spec.training import TrainingSpec


class Learner:
    """One rank of the learner; the default process group must exist (see ``join_group``)."""

    def __init__(
        self,
        spec: TrainingSpec,
        device: torch.device,
        policy: Policy | None = None,
        *,
        parallel: Parallel | None = None,
    ) -> None:
        """``policy``: a tuned one to train, on the CPU if it will be sharded; default: the spec's,
        loaded here. ``parallel`` is the same on all ranks; default: what the spec asks for."""
        self.spec, self.device = spec, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.parallel = parallel or asked_for(spec, self.world)
        sharded = self.parallel.sharded
        if policy is None:
            policy = load_policy(spec, device, frozenset({"network"}), on_host=sharded)
            policy.tune(spec.seed, with_reference=False)
        self.policy = policy
        if spec.cluster.learner.activation_checkpointing:
            self.policy.checkpoint_activations()
        if sharded:
            shard(self.policy, self.parallel)
        self.parameters = self.policy.trainable()
        home = torch.device("cpu") if spec.cluster.learner.offload_optimizer else None
        self.optimizer = Optimizer(self.parameters, spec.optimizer, spec.ema, home)
        self.scale = LossScale(self.policy.dtype)
        self.gate = RatioGate(self.policy.dtype_name, spec.sampling.max_lag)
        self._arrays: dict[str, Float32] = {}  # of the last one, where a checkpoint needs them
        self._averaged = False  # parameters and averages have changed places

    # --- weights

    def publish(
        self, version: int, *, averaged: bool = False
    ) -> tuple[WeightsTicket, dict[str, Float32]]:
        """The weights to sample with next, as a ticket and, of rank 0, arrays; collective.

        ``averaged`` publishes the EMA weights, for evaluation: nothing is trained on their samples.
        """
        averages = self.optimizer.ema
        source = averages if averaged and averages else self.parameters
        found, arrays = gather(source, keep=self.rank == 0)
        ticket = WeightsTicket(version, found)
        if averaged:
            return ticket, arrays
        self.gate.expect(ticket)
        if self.spec.sampling.max_lag:
            self._arrays = arrays
        return ticket, arrays

    def announce(self, version: int, *, averaged: bool) -> WeightsTicket:
        """A ticket for the weights that this process itself samples with next; collective.

        They are in the parameters: for ``averaged`` these change places with the averages, exactly,
        until the next call or checkpoint. Sharded ones are gathered, so that ranks sample alone.
        """
        if self.parallel.sharded:
            reshard(self.policy.network)
        self._hold_averages(averaged)
        ticket = WeightsTicket(version, digest(self.parameters))
        if self.parallel.sharded:
            gather_weights(self.policy.network)
        if not averaged:
            self.gate.expect(ticket)
        return ticket

    @torch.no_grad()
    def _hold_averages(self, averaged: bool) -> None:
        """Have the parameters hold the averages (EMA), if there are any, and these the parameters;
        or neither."""
        if averaged == self._averaged:
            return
        self._averaged = averaged
        for name in self.optimizer.ema:
            parameter, average = self.parameters[name].detach(), self.optimizer.ema[name]
            last = parameter.clone()
            parameter.copy_(average)
            self.optimizer.ema[name] = last

    # --- one iteration

    def accumulate(
        self,
        unit: WorkUnit,
        trajectory: Trajectory,
        conditions: Mapping[int, Condition],
        advantages: Float32,
        keep: np.ndarray,
    ) -> MicrobatchStats:
        """Add the gradient of one micro-batch.

        ``advantages [b]`` are 0 and ``keep [b]`` False for samples that stay out of the update. The
        loss is summed over samples and steps; ``step`` divides.
        """
        started = time.perf_counter()
        advantage = torch.tensor(advantages, device=self.device)
        kept = torch.tensor(keep, device=self.device)
        condition = batch_condition(self.policy, conditions, unit.prompts)
        ratios: list[Tensor] = []
        low = high = 0
        policy_loss = kl_sum = 0.0
        for replayed in replay(self.policy, trajectory, unit.schedule, condition):
            sigma, step = unit.schedule.sigma, replayed.step
            dt = sigma[step + 1] - sigma[step]
            term = surrogate(self.spec.objective, replayed, advantage, dt)
            loss = term.loss * unit.batch
            policy_loss += loss.item()
            if self.spec.objective.kl is not None:
                kl = self._kl(self.spec.objective.kl, replayed, dt, kept)
                kl_sum += kl.item()
                loss = loss + self.spec.objective.kl.beta * kl
            if self.gate.armed:
                self.gate.check(term.log_ratio.detach(), unit, trajectory)
            (loss * self.scale.value).backward()
            ratios.append(term.log_ratio.detach()[kept].double())
            low += int(term.low[kept].sum())
            high += int(term.high[kept].sum())
        log_ratios = torch.stack(ratios)  # [K, samples]
        return MicrobatchStats(
            samples=log_ratios.shape[1],
            log_ratio_sum=log_ratios.sum(1).cpu().numpy(),
            log_ratio_square_sum=log_ratios.square().sum(1).cpu().numpy(),
            log_ratio_max=log_ratios.abs().max().item() if log_ratios.numel() else 0.0,
            clipped_low=low,
            clipped_high=high,
            policy_loss_sum=policy_loss,
            kl_sum=kl_sum,
            seconds=time.perf_counter() - started,
        )

    def _kl(self, spec: KlSpec, replayed: Replayed, dt: float, kept: Tensor) -> Tensor:
        """KL of one step to the untrained model, summed over the samples that are kept."""
        assert replayed.reference is not None, "rollout workers keep the reference with KL"
        return (kl_to_reference(replayed.new, replayed.reference, dt, spec.form) * kept).sum()

    def step(self, samples: int, steps: int) -> StepStats:
        """Update the weights with the accumulated gradient, the mean over ``samples`` x ``steps``.

        ``samples`` counts those of all ranks. With none there is no update.
        """
        started = time.perf_counter()
        self.gate.armed = False
        norm = None
        overflow = False
        scale = self.scale.value
        if samples > 0:
            gradients, ranks = self._gradients()
            torch._foreach_mul_(gradients, ranks / (samples * steps * scale))
            limit = self.spec.optimizer.grad_norm
            whole = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
            norm = float(full(whole))
            overflow = self.scale.overflowed(norm, self.optimizer.updates + 1)
        if norm is not None and not overflow:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return StepStats(
            grad_norm=None if overflow else norm,
            learning_rate=self.spec.optimizer.learning_rate,
            seconds=time.perf_counter() - started,
            overflow=overflow,
            loss_scale=scale,
        )

    def _gradients(self) -> tuple[list[Tensor], int]:
        """The gradients over all ranks, and of how many ranks they are the mean; collective."""
        if self.parallel.sharded:
            finish(self.policy.network, self.parallel)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if self.parallel.sharded:
            return gradients, self.world
        if self.world > 1:
            add_up(gradients)
        return gradients, 1

    # --- the ratio contract

    def measure_floor(
        self, unit: WorkUnit, trajectory: Trajectory, conditions: Mapping[int, Condition]
    ) -> float:
        """``max |log rho|`` of a fresh trajectory: what this hardware cannot reproduce.

        ``rho`` is the ratio that the objective clips.
        """
        condition = batch_condition(self.policy, conditions, unit.prompts)
        advantage = torch.zeros(unit.batch, device=self.device)
        floor = 0.0
        with torch.enable_grad():  # as in the update: kernels may differ
            for replayed in replay(self.policy, trajectory, unit.schedule, condition):
                term = surrogate(self.spec.objective, replayed, advantage, dt=-1.0)
                floor = max(floor, float(term.log_ratio.detach().abs().max()))
        self.gate.floor = floor * FLOOR_MARGIN
        return floor

    # --- state

    def state(self) -> LearnerState:
        """All that a checkpoint holds; collective, with arrays on rank 0 alone."""
        self._hold_averages(False)
        keep = self.rank == 0
        moments = self.optimizer.moments.items()
        lags = self.spec.sampling.max_lag > 0
        return LearnerState(
            weights=to_arrays(self.parameters, keep=keep),
            ema=to_arrays(self.optimizer.ema, keep=keep),
            **{name: to_arrays(shelf, keep=keep) for name, shelf in moments},
            updates=self.optimizer.updates,
            loss_scale=self.scale.value,
            scale_held=self.scale.held,
            behaviour=self._arrays,
            behaviour_version=self.gate.published.version if lags else -1,
        )

    def load_state(self, state: LearnerState) -> WeightsTicket | None:
        """Continue from ``state``, which may come from another number of ranks.

        Answers with the ticket of the weights that the next iteration was being sampled with, if
        it is not those that it continues from.
        """
        if self.parallel.sharded:
            reshard(self.policy.network)
        load_arrays(self.parameters, state.weights)
        assert self.optimizer.ema.keys() == state.ema.keys()
        self.optimizer.ema.load(state.ema)
        for name, shelf in self.optimizer.moments.items():
            shelf.load(getattr(state, name))
        self.optimizer.updates = state.updates
        self.scale.value, self.scale.held = state.loss_scale, state.scale_held
        if not state.behaviour:
            return None
        held = {name: torch.tensor(array) for name, array in state.behaviour.items()}
        behaviour = WeightsTicket(state.behaviour_version, digest(held))
        self.gate.remember(behaviour)
        return behaviour


@dataclass(frozen=True)
class Surrogate:
    """What an objective makes of one stochastic step of a micro-batch."""

    loss: Tensor  # scalar, mean over the samples
    log_ratio: Tensor  # [b], of the ratio that the objective works on
    low: Tensor  # bool [b], without gradient because the ratio is too low
    high: Tensor  # bool [b], because it is too high


def surrogate(objective: Objective, step: Replayed, advantage: Tensor, dt: float) -> Surrogate:
    """The policy loss of one step; ``advantage [b]``, ``dt`` the step's (negative) length."""
    log_ratio, weight = step.log_ratio, 1.0
    if objective.kind == "flow_dppo":
        assert step.old is not None, "rollout workers keep means for Flow-DPPO"
        divergence = step.new.kl(step.old).detach()
        masked = diverged(log_ratio.detach(), advantage, divergence, objective.max_divergence)
        loss = masked_loss(log_ratio, advantage, masked)
        return Surrogate(loss, log_ratio, masked & (advantage < 0), masked & (advantage > 0))
    if objective.kind == "grpo_guard":
        assert step.old is not None, "rollout workers keep means for GRPO-Guard"
        log_ratio, weight = guard_log_ratio(step.new, step.old, step.x_next), 1 / abs(dt)
    bounds = (objective.clip_low, objective.clip_high)
    loss = clipped_loss(log_ratio, advantage, *bounds) * weight
    return Surrogate(loss, log_ratio, *clipped(log_ratio.detach(), advantage, *bounds))
