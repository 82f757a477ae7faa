"""What an iteration does, as a pure function of the spec.

Nothing here depends on what ran before or on who runs it: the same spec and iteration give the same
prompts, the same window and the same work units.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.types import Noising, Schedule, WorkUnit
from flowgrpo_ray.spec.sampling import AllSteps, ProgressiveWindow, RandomWindow, SamplingSpec
from flowgrpo_ray.spec.training import TrainingSpec

PROBES = 4  # micro-batches at least that show what hardware cannot reproduce

# The fewest consecutive work units that hold whole groups: advantages need all of it.
Block = tuple[WorkUnit, ...]


@dataclass(frozen=True)
class Update:
    """The work units whose gradients make one optimizer update, in order of accumulation."""

    blocks: tuple[Block, ...]

    @property
    def units(self) -> Iterator[WorkUnit]:
        return (unit for block in self.blocks for unit in block)


@dataclass(frozen=True)
class IterationPlan:
    """All work of one iteration."""

    iteration: int
    schedule: Schedule
    updates: tuple[Update, ...]

    @property
    def points(self) -> tuple[int, ...]:
        """Where each image is trained."""
        return self.units[0].points

    @property
    def blocks(self) -> list[Block]:
        return [block for update in self.updates for block in update.blocks]

    @property
    def units(self) -> list[WorkUnit]:
        return [unit for update in self.updates for unit in update.units]


def plan_iteration(
    spec: TrainingSpec, iteration: int, prompts: int, sigmas: tuple[float, ...]
) -> IterationPlan:
    """What iteration ``iteration`` (from 1) does, over a training set of ``prompts`` prompts.

    ``sigmas`` are the policy's noise levels for the spec's steps and size.
    """
    sampling = spec.sampling
    draw, chosen = _choose(spec, iteration, prompts)
    eta = draw_eta(sampling, iteration, draw)
    schedule = Schedule(sampling.kernel, sigmas, eta, sampling.likelihood, sampling.solver)
    _check_stops(schedule, spec.objective.noising)
    blocks = _blocks(spec, iteration, schedule, chosen, first_index=0)
    updates = _chunks(blocks, len(blocks) // spec.objective.updates)
    return IterationPlan(iteration, schedule, tuple(Update(tuple(u)) for u in updates))


def _choose(spec: TrainingSpec, iteration: int, prompts: int) -> tuple[random.Random, list[int]]:
    """The prompts of an iteration, and what all else of it is drawn from."""
    draw = random.Random(f"{spec.seed}/plan/{iteration}")
    return draw, draw.sample(range(prompts), spec.sampling.groups)


def _spare(spec: TrainingSpec, iteration: int, prompts: int) -> list[int]:
    """All others, in the order in which they replace groups without spread."""
    chosen = set(_choose(spec, iteration, prompts)[1])
    others = [prompt for prompt in range(prompts) if prompt not in chosen]
    random.Random(f"{spec.seed}/refill/{iteration}").shuffle(others)
    return others


def plan_encoding(spec: TrainingSpec, iteration: int, prompts: int) -> tuple[range, list[int]]:
    """Which iterations' prompts are encoded together before ``iteration`` (from 1) begins, and
    those prompts: ``prompts.encode_ahead`` of them if the set of ``prompts`` holds more, but all
    that one iteration needs, and those that show how exactly hardware repeats itself.
    """
    rest = range(iteration, spec.iterations + 1)
    if prompts <= spec.prompts.encode_ahead:
        return rest, list(range(prompts))
    at_once = iteration + spec.sampling.max_lag
    needed = dict.fromkeys(_choose(spec, 0, prompts)[1])
    for later in rest:
        spare = spec.sampling.groups * spec.advantages.refill
        found = _choose(spec, later, prompts)[1]
        found += _spare(spec, later, prompts)[:spare] if spare else []
        more = needed | dict.fromkeys(found)
        if later > at_once and len(more) > spec.prompts.encode_ahead:
            return range(iteration, later), list(needed)
        needed = more
    return rest, list(needed)


def _check_stops(schedule: Schedule, noising: Noising | None) -> None:
    """``SpecError`` if images cannot be trained at as many noise levels of their sampling."""
    if noising is None or noising.draw != "steps":
        return
    if (found := len(schedule.stops(noising))) < noising.count:
        low, high = noising.within
        raise SpecError(
            f"objective.times.count = {noising.count} with draw = steps, and sampling stops at "
            f"{found} noise levels in within = [{low:g}, {high:g}]: lower count, widen within or "
            "raise sampling.steps"
        )


def plan_refill(
    spec: TrainingSpec, plan: IterationPlan, prompts: int, used: Collection[int], groups: int
) -> list[Block]:
    """Blocks of other prompts in place of ``groups`` groups without spread.

    Whole blocks, so possibly some groups more, or fewer where the training set of ``prompts``
    prompts runs out. ``used`` are the prompts of the iteration so far, in any order.
    """
    per_block, before = spec.sampling.groups_per_block, set(used)
    unused = [prompt for prompt in _spare(spec, plan.iteration, prompts) if prompt not in before]
    blocks = min(-(-groups // per_block), len(unused) // per_block)
    chosen = unused[: blocks * per_block]
    first_index = len(used) // per_block * spec.sampling.units_per_block
    return _blocks(spec, plan.iteration, plan.schedule, chosen, first_index)


def _blocks(
    spec: TrainingSpec, iteration: int, schedule: Schedule, chosen: Sequence[int], first_index: int
) -> list[Block]:
    """The work units of one group per chosen prompt, a tuple per block."""
    sampling = spec.sampling
    pairs = [(prompt, sample) for prompt in chosen for sample in range(sampling.group_size)]
    units = [
        WorkUnit(
            seed=spec.seed,
            stream="train",
            iteration=iteration,
            index=first_index + index,
            prompts=tuple(prompt for prompt, _ in batch),
            samples=tuple(sample for _, sample in batch),
            schedule=schedule,
            same_latent=sampling.same_latent,
            noising=spec.objective.noising,
        )
        for index, batch in enumerate(_chunks(pairs, sampling.micro_batch))
    ]
    return [tuple(block) for block in _chunks(units, sampling.units_per_block)]


def draw_eta(sampling: SamplingSpec, iteration: int, draw: random.Random) -> tuple[float, ...]:
    """The iteration's noise levels: ``eta`` inside the window, 0 elsewhere."""
    match sampling.window:
        case None | AllSteps():
            start = 0
        case RandomWindow(length=length, within=(first, end)):
            start = draw.randint(first, end - length)
        case ProgressiveWindow() as moving:
            start = progressive_start(moving, sampling.steps, iteration)
    return _eta_from(sampling, start)


def _eta_from(sampling: SamplingSpec, start: int) -> tuple[float, ...]:
    window = range(start, start + sampling.trained_steps)
    return tuple((sampling.eta or 0.0) if step in window else 0.0 for step in range(sampling.steps))


def _covering_starts(sampling: SamplingSpec) -> list[int]:
    """Of windows that together hold every step that is ever trained."""
    match sampling.window:
        case None | AllSteps():
            return [0]
        case RandomWindow(length=length, within=(first, end)):
            last = end - length
        case ProgressiveWindow(length=length, start=first):
            last = sampling.steps - 1 - length
    return [*range(first, last, length), last]


def plan_probes(
    spec: TrainingSpec, prompts: int, sigmas: tuple[float, ...]
) -> list[list[WorkUnit]]:
    """Micro-batches that show how exactly this hardware repeats itself, in rows of one per rank.

    They are of an iteration 0 that is never trained; at least ``PROBES``, and windows that hold
    every step that is ever trained.
    """
    plan, ranks = plan_iteration(spec, 0, prompts, sigmas), spec.ranks.count
    starts = _covering_starts(spec.sampling)
    count = max(len(starts), -(-PROBES // ranks))
    units = itertools.cycle(plan.units)
    rows: list[list[WorkUnit]] = []
    for row, start in enumerate(itertools.islice(itertools.cycle(starts), count)):
        schedule = replace(plan.schedule, eta=_eta_from(spec.sampling, start))
        indices = range(row * ranks, (row + 1) * ranks)
        rows.append([replace(next(units), index=i, schedule=schedule) for i in indices])
    return rows


def progressive_start(window: ProgressiveWindow, steps: int, iteration: int) -> int:
    """Where MixGRPO's window begins in iteration ``iteration`` (from 1; 0 is as 1).

    Its last position ends right before the last step, whatever the stride: it never shrinks.
    """
    last_start = steps - 1 - window.length
    positions = 1 + -(-(last_start - window.start) // window.stride)
    position = max(0, iteration - 1) // window.iterations
    position = position % positions if window.roll_back else min(position, positions - 1)
    return min(window.start + position * window.stride, last_start)


def plan_evaluation(spec: TrainingSpec, prompts: int, sigmas: tuple[float, ...]) -> list[WorkUnit]:
    """One image per held-out prompt from fixed noise, by ODE steps; always the same."""
    schedule = still_schedule(spec, sigmas)
    return [
        WorkUnit(
            seed=0,  # not the run's: runs with other seeds are evaluated on the same noise
            stream="eval",
            iteration=0,
            index=index,
            prompts=tuple(batch),
            samples=(0,) * len(batch),
            schedule=schedule,
        )
        for index, batch in enumerate(_chunks(range(prompts), spec.evaluation.micro_batch))
    ]


def still_schedule(spec: TrainingSpec, sigmas: tuple[float, ...]) -> Schedule:
    """Steps without noise, by the evaluations' solver."""
    still = (0.0,) * (len(sigmas) - 1)
    return Schedule(spec.sampling.kernel, sigmas, still, solver=spec.evaluation.solver)


T = TypeVar("T")


def _chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
