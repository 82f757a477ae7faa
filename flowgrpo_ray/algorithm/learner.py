"""The update: gradients accumulate over micro-batches, then one optimizer step.

A learner is one rank. It knows no Ray: it takes trajectories and advantages, and gives weights.
What the loss is, the objective says. Micro-batches are replayed whole, as they were sampled; before
the first update of an iteration the gate holds what is replayed against what was sampled.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from flowgrpo_ray.algorithm.gate import OnPolicyGate
from flowgrpo_ray.algorithm.optimizer import LossScale, Optimizer, Shelf
from flowgrpo_ray.algorithm.parallel import (
    add_up,
    asked_for,
    finish,
    gather_weights,
    reshard,
    shard,
)
from flowgrpo_ray.algorithm.sampling import batch_condition, points, velocities
from flowgrpo_ray.algorithm.tally import Tally
from flowgrpo_ray.algorithm.weights import full, gather, load_arrays, share
from flowgrpo_ray.common.types import (
    Condition,
    Float32,
    Float64,
    LearnerState,
    MicrobatchStats,
    Parallel,
    StepStats,
    Trajectory,
    WeightsTicket,
    WorkUnit,
)
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.arrays import as_tensor
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.spec.training import TrainingSpec

Arrays = dict[str, NDArray[Any]]
Held = Literal["last", "averaged", "follower"]  # sets of weights; the last one is trained


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
        self.spec, self.device, self.objective = spec, device, spec.objective
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.parallel = parallel or asked_for(spec, self.world)
        sharded = self.parallel.sharded
        if policy is None:
            policy = load_policy(spec, device, frozenset({"network"}), on_host=sharded)
            policy.tune(spec.seed, with_reference=False)
        self.policy = policy
        if spec.cluster.learner.activation_checkpointing:
            self.policy.checkpoint_activations()
        self._dtypes = policy.halved(policy.network)  # by name, where weights travel in another
        if sharded:
            shard(self.policy, self.parallel)
        self.parameters = self.policy.trainable()
        home = torch.device("cpu") if spec.cluster.learner.offload_optimizer else None
        follower = self.objective.follower
        self.optimizer = Optimizer(self.parameters, spec.optimizer, spec.ema, home, follower)
        self.scale = LossScale(self.policy.dtype, spec.sampling.micro_batch)
        self.gate = OnPolicyGate(self.objective.gate, self.policy.dtype_name, spec.sampling.max_lag)
        self._arrays: Arrays = {}  # what was last published, where a checkpoint needs it
        self._held: Held = "last"  # the set that is in the parameters, and they in its place

    # --- weights

    def publish(self, version: int, *, averaged: bool = False) -> tuple[WeightsTicket, Arrays]:
        """The weights to sample with next, as a ticket and, of rank 0, arrays in the dtypes that
        rollout workers hold them in; collective.

        ``averaged`` publishes the EMA weights, for evaluation: nothing is trained on their samples.
        """
        self._hold("last")
        sets = {"last": self.parameters, **self._shelves}
        published = sets[self._sampling(averaged=averaged)]
        found, arrays = gather(published, keep=self.rank == 0, dtypes=self._dtypes)
        ticket = WeightsTicket(version, found)
        if averaged:
            return ticket, arrays
        trained = self._digest() if self.objective.samples_with_follower else found
        self.gate.expect(ticket, exact=trained == found)
        if self.spec.sampling.max_lag:
            self._arrays = arrays
        return ticket, arrays

    def announce(self, version: int, *, averaged: bool) -> WeightsTicket:
        """A ticket for the weights that this process itself samples with next; collective.

        They are in the parameters: where they are not the trained ones, these change places with
        them, exactly, until they are trained again. Sharded ones are gathered, so that ranks sample
        alone.
        """
        if self.parallel.sharded:
            reshard(self.policy.network)
        wanted = self._sampling(averaged=averaged)
        trained = None
        if wanted == "follower":
            self._hold("last")
            trained = self._digest()
        self._hold(wanted)
        ticket = WeightsTicket(version, self._digest())
        if self.parallel.sharded:
            gather_weights(self.policy.network)
        if not averaged:
            self.gate.expect(ticket, exact=trained in (None, ticket.digest))
        return ticket

    def _digest(self) -> str:
        """Of what the parameters hold, as rollout workers would hold it."""
        return gather(self.parameters, keep=False, dtypes=self._dtypes)[0]

    def _sampling(self, *, averaged: bool) -> Held:
        """The set that samples are drawn with."""
        if averaged:
            return "averaged" if self.optimizer.ema else "last"
        return "follower" if self.objective.samples_with_follower else "last"

    @property
    def _shelves(self) -> dict[Held, Shelf]:
        return {"averaged": self.optimizer.ema, "follower": self.optimizer.follower}

    def _hold(self, wanted: Held) -> None:
        """Have the parameters hold one set of weights, exactly."""
        if wanted == self._held:
            return
        if self.parallel.sharded:
            reshard(self.policy.network)
        for name in (self._held, wanted):
            if name != "last":
                self._exchange(self._shelves[name])
        self._held = wanted

    @torch.no_grad()
    def _exchange(self, shelf: Shelf) -> None:
        """The parameters and a shelf change places."""
        for name, parameter in self.parameters.items():
            kept, last = shelf[name], parameter.detach().clone()
            parameter.detach().copy_(kept)
            shelf[name] = last

    # --- one iteration

    def tie(self, weight: float) -> None:
        """Hold on to the untrained model with this weight from now on."""
        self.objective = self.spec.objective.tied(weight)

    def accumulate(
        self,
        unit: WorkUnit,
        trajectory: Trajectory,
        conditions: Mapping[int, Condition],
        advantages: Float32,
        keep: np.ndarray,
    ) -> MicrobatchStats:
        """Add the gradient of one micro-batch.

        ``keep [b]`` is False for samples that stay out of the update; their ``advantages [b]`` do
        not count. The loss is summed over samples and points; ``step`` divides.
        """
        started = time.perf_counter()
        self.gate.admit(unit, trajectory)
        advantage = torch.tensor(advantages, device=self.device)
        kept = torch.tensor(keep, device=self.device)
        condition = batch_condition(self.policy, conditions, unit.prompts)
        tally = Tally(kept)
        anchors = self._anchors(unit, trajectory, condition)
        self._hold("last")
        for point in points(self.policy, trajectory, unit, condition, anchors):
            term = self.objective.terms(point, advantage)
            loss = policy_loss = (term.loss * kept).mean() * term.weight * unit.batch
            for name, weight in self.objective.penalties.items():
                loss = loss + weight * (term.statistics[name] * kept).sum()
            (loss * self.scale.value).backward()
            tally.add(term, policy_loss)
        excess = 0
        if self.gate.armed:  # later the GPU need not be waited for
            excess = self.gate.check(tally.gates.cpu().numpy(), unit, trajectory)
        seconds = time.perf_counter() - started
        return tally.stats(seconds, gated=self.gate.exact, excess=excess)

    def _anchors(
        self, unit: WorkUnit, trajectory: Trajectory, condition: dict[str, Tensor]
    ) -> list[Tensor] | None:
        """What the weights that follow predict at each point, where they did not sample."""
        if self.objective.follower is None or self.objective.samples_with_follower:
            return None
        self._hold("follower")
        return velocities(self.policy, trajectory, unit, condition)

    def step(self, samples: int, points: int, *, last: bool = True) -> StepStats:
        """Update the weights with the accumulated gradient, the mean over ``samples`` x ``points``.

        ``samples`` counts those of all ranks. With none there is no update. After the ``last`` one
        of an iteration weights that follow do so.
        """
        started = time.perf_counter()
        self._hold("last")
        self.gate.conclude()
        norm = None
        overflow = False
        scale = self.scale.value
        if samples > 0:
            gradients, ranks = self._gradients()
            torch._foreach_mul_(gradients, ranks / (samples * points * scale))
            limit = self.spec.optimizer.grad_norm
            whole = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
            norm = float(full(whole))
            overflow = self.scale.overflowed(norm, self.optimizer.updates + 1)
        if norm is not None and not overflow:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if last:
            self.optimizer.follow()
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

    # --- the on-policy contract

    def measure_floor(
        self, unit: WorkUnit, trajectory: Trajectory, conditions: Mapping[int, Condition]
    ) -> dict[int, Float64]:
        """The gate quantity of a fresh trajectory, absolute values ``[b]`` by point: what this
        hardware cannot reproduce."""
        condition = batch_condition(self.policy, conditions, unit.prompts)
        advantage = torch.zeros(unit.batch, device=self.device)
        anchors = self._anchors(unit, trajectory, condition)
        self._hold(self._sampling(averaged=False))
        with torch.enable_grad():  # as in the update: kernels may differ
            gates = [
                self.objective.terms(point, advantage).gate.detach().abs().double().cpu().numpy()
                for point in points(self.policy, trajectory, unit, condition, anchors)
            ]
        return dict(zip(unit.points, gates, strict=True))

    # --- state

    def share(self) -> LearnerState:
        """This rank's share of all that a checkpoint holds; together the ranks' are whole."""
        self._hold("last")
        optimizer = self.optimizer
        sets = {"weights": self.parameters, "ema": optimizer.ema, "follower": optimizer.follower}
        sets |= optimizer.moments
        lags = self.spec.sampling.max_lag > 0
        return LearnerState(
            **{name: share(tensors, self.rank, self.world) for name, tensors in sets.items()},
            updates=self.optimizer.updates,
            loss_scale=self.scale.value,
            scale_held=self.scale.held,
            behaviour={name: as_tensor(a).float().numpy() for name, a in self._arrays.items()},
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
        for shelf, arrays in (
            (self.optimizer.ema, state.ema),
            (self.optimizer.follower, state.follower),
        ):
            assert shelf.keys() == arrays.keys()
            shelf.load(arrays)
        for name, shelf in self.optimizer.moments.items():
            shelf.load(getattr(state, name))
        self.optimizer.updates = state.updates
        self.scale.value, self.scale.held = state.loss_scale, state.scale_held
        if not state.behaviour:
            return None
        held = {name: torch.tensor(array) for name, array in state.behaviour.items()}
        found, _ = gather(held, keep=False, dtypes=self._dtypes)
        behaviour = WeightsTicket(state.behaviour_version, found)
        self.gate.remember(behaviour)
        return behaviour
