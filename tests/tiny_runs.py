"""What the tests of policies, sampling, learner and export share: small specs, units, conditions.

Everything works on the embedded model on one thread. Heavy libraries are loaded by the functions
that need them, so that collecting the tests stays quick.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowgrpo_ray.algorithm.sampling import rollout
from flowgrpo_ray.common.types import (
    Condition,
    Float32,
    LearnerState,
    Noising,
    Parallel,
    Schedule,
    Trajectory,
    WeightsTicket,
    WorkUnit,
)
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.training import TrainingSpec

if TYPE_CHECKING:
    from flowgrpo_ray.algorithm.learner import Learner, StepStats
    from flowgrpo_ray.policies.base import Policy

CPU = torch.device("cpu")
SIZE = (32, 48)
PROMPTS = ('red sign "407"', 'blue sign "129"', 'pink sign "550"')
UNTRAINED = WeightsTicket(0, "")

FULL = "tuning={kind: full}"
LORA = "tuning={kind: lora, rank: 4, alpha: 8}"
TUNINGS = {"full": FULL, "lora": LORA}

# All that the tests' numbers depend on stands here: the recipe may be tuned without breaking them.
SMALL = (
    "seed=7",
    "model={family: sd3, path: 'builtin:tiny-sd3', dtype: float32, max_sequence_length: 10}",
    FULL,
    "sampling={size: [32, 48], steps: 5, eta: 0.8, window: {kind: all}, group_size: 4, groups: 4, "
    "micro_batch: 4}",
    "rewards={sign_colour: {weight: 1}}",
    "objective={kind: flow_grpo, clip_low: 1e-3, clip_high: 1e-3, updates: 1}",
    "optimizer={learning_rate: 1e-3, grad_norm: 1.0}",
    "ema={decay: 0.9, every: 1}",
    "evaluation={every: 1, steps: 4, prompts: 4, micro_batch: 4}",
)


def small_spec(*overrides: str) -> TrainingSpec:
    """A spec on the embedded model, with ``a.b=c`` overrides."""
    return load_spec("tiny-ocr", [*SMALL, *overrides])


@contextmanager
def one_thread() -> Iterator[None]:
    """The tiny model gains nothing from more, and other work on the machine is not disturbed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def conditions(guidance: float = 1.0) -> Mapping[int, Condition]:
    """Of ``PROMPTS``, by index."""
    spec = small_spec(f"sampling.guidance={guidance}")
    encoder = load_policy(spec, CPU, frozenset({"encoder"}))
    return dict(enumerate(encoder.encode(PROMPTS)))


@cache
def sigmas(steps: int) -> tuple[float, ...]:
    return load_policy(small_spec(), CPU, frozenset()).sigmas(steps, SIZE)


def schedule(
    window: range,
    steps: int = 5,
    kernel: str = "flow_sde",
    eta: float = 0.8,
    likelihood: str = "gaussian",
) -> Schedule:
    """A schedule whose steps in ``window`` are stochastic."""
    levels = tuple(eta if step in window else 0.0 for step in range(steps))
    return Schedule(kernel, sigmas(steps), levels, likelihood)


def unit(
    of: Schedule,
    prompts: tuple[int, ...] = (0, 0, 1, 1),
    samples: tuple[int, ...] = (0, 1, 0, 1),
    *,
    index: int = 0,
    noising: Noising | None = None,
) -> WorkUnit:
    """A micro-batch of the training stream."""
    return WorkUnit(7, "train", 1, index, prompts, samples, of, noising=noising)


def sampler(spec: TrainingSpec) -> Policy:
    """What a rollout worker holds: a tuned policy without text encoders."""
    policy = load_policy(spec, CPU, frozenset({"network", "decoder"}), masters=False)
    policy.tune(spec.seed, with_reference=spec.objective.compares_reference)
    return policy


def perturb(policy: Policy, seed: int = 0, size: float = 0.02) -> None:
    """Move every trainable weight a little, as training would (LoRA's B leaves 0)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@contextmanager
def alone() -> Iterator[None]:
    """This process as the only learner rank, over gloo."""
    import torch.distributed as dist

    from flowgrpo_ray.algorithm.parallel import join_group

    join_group(0, 1, meeting(), CPU)
    yield
    dist.destroy_process_group()


def meeting() -> socket.socket:
    """Where ranks meet, for rank 0; the others are told its address."""
    return socket.create_server(("127.0.0.1", 0))


# --- an update's input


@dataclass(frozen=True)
class Batch:
    """One scored micro-batch: the arguments of ``Learner.accumulate``."""

    unit: WorkUnit
    trajectory: Trajectory
    advantages: Float32
    keep: np.ndarray

    def into(self, learner: Learner) -> Any:
        return learner.accumulate(
            self.unit,
            self.trajectory,
            conditions(learner.policy.guidance),
            self.advantages,
            self.keep,
        )


def draw_batch(
    policy: Policy,
    of: WorkUnit,
    ticket: WeightsTicket = UNTRAINED,
    masked: Sequence[int] = (),
    *,
    keep_old: bool = False,
) -> Batch:
    """Sample ``of`` and invent advantages for it; samples ``masked`` stay out of the update."""
    given = conditions(policy.guidance)
    trajectory, _ = rollout(policy, of, given, SIZE, ticket, keep_old=keep_old)
    keep = np.array([i not in masked for i in range(of.batch)])
    advantages = np.random.default_rng(of.index).normal(size=of.batch).astype(np.float32)
    return Batch(of, trajectory, np.where(keep, advantages, 0).astype(np.float32), keep)


def draw_batches(spec: TrainingSpec, count: int = 4) -> list[Batch]:
    """Micro-batches under the untrained weights: other samples in each, one of them masked."""
    policy = sampler(spec)
    pairs = [((0, 0, 1, 1), (2 * i, 2 * i + 1) * 2) for i in range(count)]
    window = range(1, 3) if spec.objective.stochastic else range(0)
    of = schedule(window, likelihood=spec.sampling.likelihood)
    unequal = np.array(of.sigma, np.float32) ** 1.5  # the tiny model's own steps are all equal
    of = replace(of, sigma=tuple(unequal.tolist()))
    old, noising = spec.objective.keeps_old, spec.objective.noising
    units = [unit(of, *pair, index=i, noising=noising) for i, pair in enumerate(pairs)]
    return [
        draw_batch(policy, each, masked=[i] if i == 1 else (), keep_old=old)
        for i, each in enumerate(units)
    ]


def kept(batches: Sequence[Batch]) -> int:
    return sum(int(batch.keep.sum()) for batch in batches)


def update(learner: Learner, batches: Sequence[Batch], of: Sequence[Batch] = ()) -> StepStats:
    """One optimizer update from this rank's ``batches``, which are a part of ``of`` all ranks."""
    for batch in batches:
        batch.into(learner)
    steps = len(batches[0].unit.points)
    return learner.step(kept(of or batches), steps)


def in_shards(*, weights: bool = True, gradients: bool = True, copies: int = 1) -> Parallel:
    """This process's group under FSDP, also if it is alone; ``copies`` of the network in it, and
    what it keeps whole."""
    import torch.distributed as dist

    groups = np.arange(dist.get_world_size()).reshape(copies, -1).tolist()
    return Parallel(True, tuple(map(tuple, groups)), weights, gradients)


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """The accumulated gradient, whole, summed over samples and steps of all ranks."""
    from flowgrpo_ray.algorithm.parallel import add_up, finish
    from flowgrpo_ray.algorithm.weights import full

    if learner.parallel.sharded:
        finish(learner.policy.network, learner.parallel)
    mine = {n: p.grad for n, p in learner.parameters.items() if p.grad is not None}
    if learner.parallel.sharded:  # FSDP takes the mean over the ranks
        return {name: full(gradient) * learner.world for name, gradient in mine.items()}
    whole = {name: gradient.clone() for name, gradient in mine.items()}
    if learner.world > 1:
        add_up(list(whole.values()))
    return whole


def largest_of(floor: Mapping[int, np.ndarray]) -> float:
    """Of the gate quantities at all points."""
    return max(float(values.max()) for values in floor.values())


def largest_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """The largest absolute difference between arrays of the same names."""
    assert a.keys() == b.keys()
    assert a, "nothing to compare"
    return max(float(np.abs(np.asarray(a[name]) - np.asarray(b[name])).max()) for name in a)


# --- several ranks, each a process


@dataclass(frozen=True)
class Case:
    """What a group of ranks trains on: each its share of the micro-batches."""

    spec: TrainingSpec
    batches: Sequence[Batch]
    load: LearnerState  # for a fresh group, when the updates are done
    parallel: Mapping[str, Any] | None = None  # arguments of ``in_shards``, or the spec's way


@dataclass(frozen=True)
class RankResult:
    """What rank 0 of a group saw."""

    gradient: dict[str, Any]  # before the first update
    grad_norms: list[float | None]
    state: LearnerState  # after the last update
    reloaded: LearnerState  # a fresh group's, after loading the one-process state
    sent: list[tuple[str, int]]  # collectives of the second update, and the bytes given to them


class Collectives(TorchDispatchMode):
    """Notes what this process sends to others, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.partition("::")[2]
            given = args[1] if "allgather" in name or "reduce_scatter" in name else args[0]
            tensors = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
            self.calls.append((name, sum(t.nbytes for t in tensors)))
        return func(*args, **(kwargs or {}))


def merged(shares: Sequence[LearnerState]) -> LearnerState:
    """The whole state, of which each rank has given its share."""
    from flowgrpo_ray.run.checkpoint import SETS, joined

    whole = {name: joined(getattr(share, name) for share in shares) for name in SETS}
    return replace(shares[0], **whole)


def state_of(learner: Any) -> LearnerState:
    """The whole state of a learner, on every rank; collective."""
    import torch.distributed as dist

    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, learner.share())
    return merged(shares)


def train_and_reload(case: Case, mine: Sequence[Batch]) -> RankResult:
    """Two updates on this rank's share, then a fresh learner that loads ``case.load``."""
    from flowgrpo_ray.algorithm.learner import Learner

    parallel = None if case.parallel is None else in_shards(**case.parallel)
    learner, of = Learner(case.spec, CPU, parallel=parallel), case.batches
    for batch in mine:
        batch.into(learner)
    gradient = {name: g.numpy().copy() for name, g in gradients(learner).items()}
    steps = len(of[0].unit.points)
    norms = [learner.step(kept(of), steps).grad_norm]
    with Collectives() as seen:
        norms.append(update(learner, mine, of).grad_norm)
    fresh = Learner(case.spec, CPU, parallel=parallel)
    fresh.load_state(case.load)
    return RankResult(gradient, norms, state_of(learner), state_of(fresh), seen.calls)


def rank_results(
    rank: int, ranks: int, at: socket.socket | tuple[str, int], folder: Path
) -> dict[str, RankResult]:
    """What one learner rank of so many makes of the cases in ``RANKS.pickle``; rank 0 is the
    process of the test."""
    import torch.distributed as dist

    from flowgrpo_ray.algorithm.parallel import join_group

    join_group(rank, ranks, at, CPU)
    cases = pickle.loads((folder / f"{ranks}.pickle").read_bytes())
    results = {name: train_and_reload(c, c.batches[rank::ranks]) for name, c in cases.items()}
    dist.destroy_process_group()
    return results


def other_rank(index: int, ranks: int, address: tuple[str, int], folder: Path) -> None:
    """The process of another rank than the first."""
    torch.set_num_threads(1)
    import flowgrpo_ray.algorithm.learner  # noqa: F401

    # What it imports, before it meets others.
    load_policy(small_spec(), CPU, frozenset({"network"}))
    rank_results(index + 1, ranks, address, folder)
