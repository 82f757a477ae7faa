"""Prompt sets, and the plan of an iteration as a pure function of the spec.

Nothing here depends on what ran before or on who runs it: the same spec and iteration give the same
prompts, the same window and the same work units.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from flowgrpo_ray.common.errors import PromptError, SpecError
from flowgrpo_ray.common.paths import builtin_path, expand
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.common.types import Noising, Schedule, WorkUnit
from flowgrpo_ray.rewards import prompt_check
from flowgrpo_ray.spec.sampling import AllSteps, ProgressiveWindow, RandomWindow, SamplingSpec
from flowgrpo_ray.spec.training import TrainingSpec

MOST_BYTES = 2**30  # of a prompt file, which is held in memory
LONGEST = 2**16  # characters of a prompt and its metadata
PROBES = 4  # micro-batches at least that show what hardware cannot reproduce


@dataclass(frozen=True)
class Prompt:
    """One prompt and what a reward may need beside it."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


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


def load_prompts(path: str, key: str) -> list[Prompt]:
    """The prompts of a file: a line each (.txt), or a JSON object with "prompt" a line (.jsonl).

    Empty lines are skipped. ``key`` is the spec key that named the file, for the errors.
    """
    file = builtin_path(path) or expand(path)
    if not os.path.isfile(file):  # a name that no file can have is no error to it
        raise PromptError(f"{key} = {path!r}: there is no such file")
    try:
        # Not splitlines: JSON text may hold U+2028 and its like. A byte order mark is dropped.
        lines = _read(file, f"{key} = {path!r}").decode("utf-8").removeprefix("\ufeff").split("\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PromptError(f"{key} = {path!r}: line {line} is not UTF-8 text") from error
    parse_line = _parse_json if file.suffix == ".jsonl" else Prompt
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                if len(line) > LONGEST:
                    raise ValueError(f"{len(line):,} characters; at most {LONGEST:,}")
                prompts.append(parse_line(line.strip()))
            except ValueError as error:
                raise PromptError(
                    f"{key} = {path!r}: line {number} holds no prompt: {error}"
                ) from error
    if not prompts:
        raise PromptError(f"{key} = {path!r}: the file holds no prompts")
    return prompts


def _read(file: Path, named: str) -> bytes:
    """The content of a prompt file."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise PromptError(f"{named}: larger than {MOST_BYTES >> 20} MiB; split the file")
        return file.read_bytes()
    except OSError as error:
        raise PromptError(f"{named}: cannot be read: {error.strerror}") from error


def _parse_json(line: str) -> Prompt:
    try:
        row: Any = parse(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):  # pyright: ignore[reportUnknownMemberType]
        raise ValueError('expected a JSON object with a string under "prompt"')
    metadata = cast(dict[str, Any], row)
    return Prompt(metadata.pop("prompt"), metadata)


def load_prompt_sets(spec: TrainingSpec) -> tuple[list[Prompt], list[Prompt]]:
    """The spec's training and evaluation prompts, each fit for every reward of the spec."""
    train = load_prompts(spec.prompts.train, "prompts.train")
    held_out = load_prompts(spec.prompts.evaluate, "prompts.evaluate")[: spec.evaluation.prompts]
    for name, reward in spec.rewards.items():
        for key, prompts in (("prompts.train", train), ("prompts.evaluate", held_out)):
            check_prompts(prompts, key, reward.reward or name, f"rewards.{name}")
    if len(train) < spec.sampling.groups:
        raise PromptError(
            f"prompts.train = {spec.prompts.train!r} holds {len(train)} prompts; an iteration "
            f"needs sampling.groups = {spec.sampling.groups} different ones"
        )
    return train, held_out


def check_prompts(prompts: Sequence[Prompt], key: str, reward: str, called: str) -> None:
    """``PromptError`` for a prompt that ``reward`` could never score; it names the prompts ``key``
    and the reward as it is ``called``."""
    check = prompt_check(reward)
    for number, prompt in enumerate(prompts, 1):
        try:
            check(prompt.text, prompt.metadata)
        except ValueError as error:
            raise PromptError(f"{key}: prompt {number}, for {called}: {error}") from error


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Identifies the set and its order: a resumed run must train on the same one."""
    rows = [[prompt.text, dict(prompt.metadata)] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def plan_iteration(
    spec: TrainingSpec, iteration: int, prompts: int, sigmas: tuple[float, ...]
) -> IterationPlan:
    """What iteration ``iteration`` (from 1) does, over a training set of ``prompts`` prompts.

    ``sigmas`` are the policy's noise levels for the spec's steps and size.
    """
    sampling = spec.sampling
    draw = random.Random(f"{spec.seed}/plan/{iteration}")
    chosen = draw.sample(range(prompts), sampling.groups)
    eta = draw_eta(sampling, iteration, draw)
    schedule = Schedule(sampling.kernel, sigmas, eta, sampling.likelihood, sampling.solver)
    _check_stops(schedule, spec.objective.noising)
    blocks = _blocks(spec, iteration, schedule, chosen, first_index=0)
    updates = _chunks(blocks, len(blocks) // spec.objective.updates)
    return IterationPlan(iteration, schedule, tuple(Update(tuple(u)) for u in updates))


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
    per_block = spec.sampling.groups_per_block
    unused = sorted(set(range(prompts)) - set(used))
    blocks = min(-(-groups // per_block), len(unused) // per_block)
    draw = random.Random(f"{spec.seed}/refill/{plan.iteration}/{len(used)}")
    chosen = draw.sample(unused, blocks * per_block)
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
