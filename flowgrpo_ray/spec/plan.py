"""What an iteration does, as a pure function of the spec.

Nothing here depends on what ran before or on who runs it: the same spec and iteration give the same
prompts, the same window and the same work units.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeVar

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.types import Noising, Schedule, WorkUnit
from flowgrpo_ray.spec.sampling import AllSteps, ProgressiveWindow, RandomWindow, SamplingSpec
from flowgrpo_ray.spec.training import TrainingSpec

PROBES = 4  # micro-batches at least that show what hardware cannot reproduce

# How many prompts a training set holds, or each of several.
Sizes = int | Sequence[int]

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
    spec: TrainingSpec, iteration: int, prompts: Sizes, sigmas: tuple[float, ...]
) -> IterationPlan:
    """What iteration ``iteration`` (from 1) does, over training sets of ``prompts`` prompts.

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


def _ranges(prompts: Sizes) -> list[range]:
    """The prompts of each set: numbered through, set after set."""
    sizes = [prompts] if isinstance(prompts, int) else prompts
    ends = itertools.accumulate(sizes)
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _shares(spec: TrainingSpec) -> list[Fraction]:
    """Of each set in an iteration's groups; together they are all."""
    weights = [Fraction(one.weight) for one in spec.prompts.sets.values()]
    return [spec.sampling.groups * weight / sum(weights) for weight in weights]


def most_groups(spec: TrainingSpec) -> dict[str, int]:
    """The largest number of groups that an iteration has of each set, by its name."""
    names = [one.name for one in spec.prompts.sets.values()]
    return dict(zip(names, map(math.ceil, _shares(spec)), strict=True))


def _choose(spec: TrainingSpec, iteration: int, prompts: Sizes) -> tuple[random.Random, list[int]]:
    """The prompts of an iteration, and what all else of it is drawn from.

    Sets are drawn from systematically: each gives its share of the groups, rounded up or down, and
    over iterations exactly its share.
    """
    draw = random.Random(f"{spec.seed}/plan/{iteration}")
    sets = _ranges(prompts)
    if len(sets) == 1:
        return draw, draw.sample(sets[0], spec.sampling.groups)
    start = Fraction(draw.random())
    ends = [0, *(math.ceil(end - start) for end in itertools.accumulate(_shares(spec)))]
    counts = [end - begin for begin, end in itertools.pairwise(ends)]
    chosen = [p for of, count in zip(sets, counts, strict=True) for p in draw.sample(of, count)]
    draw.shuffle(chosen)
    return draw, chosen


def _spare(spec: TrainingSpec, iteration: int, prompts: Sizes) -> list[list[int]]:
    """All others of each set, in the order in which they replace groups without spread."""
    chosen = set(_choose(spec, iteration, prompts)[1])
    draw = random.Random(f"{spec.seed}/refill/{iteration}")
    others = [[prompt for prompt in of if prompt not in chosen] for of in _ranges(prompts)]
    for of_set in others:
        draw.shuffle(of_set)
    return others


def plan_encoding(spec: TrainingSpec, iteration: int, prompts: Sizes) -> tuple[range, list[int]]:
    """Which iterations' prompts are encoded together before ``iteration`` (from 1) begins, and
    those prompts: ``prompts.encode_ahead`` of them if the set of ``prompts`` holds more, but all
    that one iteration needs, and those that show how exactly hardware repeats itself.
    """
    rest = range(iteration, spec.iterations + 1)
    total = sum(map(len, _ranges(prompts)))
    if total <= spec.prompts.encode_ahead:
        return rest, list(range(total))
    at_once = iteration + spec.sampling.max_lag
    needed = dict.fromkeys(_choose(spec, 0, prompts)[1])
    for later in rest:
        spare = spec.sampling.groups * spec.advantages.refill
        found = _choose(spec, later, prompts)[1]
        found += [p for of in _spare(spec, later, prompts) for p in of[:spare]] if spare else []
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
    spec: TrainingSpec,
    plan: IterationPlan,
    prompts: Sizes,
    used: Collection[int],
    flat: Sequence[int],
) -> list[Block]:
    """Blocks of other prompts in place of the prompts ``flat``, whose groups have no spread.

    Each by one of its own set. Whole blocks, so possibly some groups more, or fewer where the
    training sets of ``prompts`` prompts run out. ``used`` are the prompts of the iteration so far,
    in any order.
    """
    if not flat:
        return []
    per_block, before = spec.sampling.groups_per_block, set(used)
    unused = [
        iter([prompt for prompt in of_set if prompt not in before])
        for of_set in _spare(spec, plan.iteration, prompts)
    ]
    ranges = _ranges(prompts)
    padded = [*flat, *itertools.repeat(flat[-1], -len(flat) % per_block)]
    sets = [next(i for i, of in enumerate(ranges) if prompt in of) for prompt in padded]
    found = [prompt for i in sets if (prompt := next(unused[i], None)) is not None]
    chosen = found[: len(found) // per_block * per_block]
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
    spec: TrainingSpec, prompts: Sizes, sigmas: tuple[float, ...]
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
