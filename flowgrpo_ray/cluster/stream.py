"""The units of one iteration on their way from sampling over scoring to advantages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from typing import Protocol

from ray import ObjectRef
from ray.exceptions import ObjectLostError

from flowgrpo_ray.cluster.actors import Losses, all_or_none
from flowgrpo_ray.cluster.samplers import Sampled
from flowgrpo_ray.cluster.scoring import scored_together
from flowgrpo_ray.common.types import WeightsTicket, WorkUnit
from flowgrpo_ray.run.ledger import Ledger
from flowgrpo_ray.run.metrics import Scores, Signal, UnitResult, flat_groups, signals
from flowgrpo_ray.spec.plan import Block, IterationPlan, plan_refill
from flowgrpo_ray.spec.training import TrainingSpec


class Source(Protocol):
    """What samples and scores a unit: the crew."""

    @property
    def ledger(self) -> Ledger: ...
    @property
    def losses(self) -> Losses: ...
    @property
    def spec(self) -> TrainingSpec: ...
    @property
    def set_sizes(self) -> Sequence[int]: ...
    async def sample(self, unit: WorkUnit, ticket: WeightsTicket) -> Sampled: ...
    async def score(
        self, units: Sequence[WorkUnit], images: Sequence[ObjectRef]
    ) -> list[Scores]: ...


async def sample_and_score(
    source: Source,
    units: Sequence[WorkUnit],
    ticket: WeightsTicket,
    drawn: Callable[[WorkUnit], None] = lambda unit: None,
) -> list[tuple[Sampled, Scores]]:
    """The way of units to the scores that they get together; again from the start if their images
    went away with a machine. ``drawn`` is told each one that is sampled."""

    async def sample(unit: WorkUnit) -> Sampled:
        sampled = await source.sample(unit, ticket)
        source.ledger.sampled(unit.key)
        drawn(unit)
        return sampled

    while True:
        sampled = await all_or_none(*map(sample, units))
        try:
            scores = await source.score(units, [of.images for of in sampled])
            return list(zip(sampled, scores, strict=True))
        except ObjectLostError as error:
            source.losses.add(f"images of micro-batch {units[0].index}", error)


class Stream:
    """Units sample and score all at once, and come out in the order of the plan.

    A scope is the set of units that advantages are taken over: whole groups, or with
    ``std: global`` the whole iteration, which is the one barrier that the maths needs. Groups
    without spread are replaced at the end of their update where the spec asks for it (``refill``).
    With workers that sample and train no update ends before all units are sampled: it would change
    the weights that they are sampled with. None begins, if other weights are trained than sampled.
    """

    def __init__(self, source: Source, plan: IterationPlan, ticket: WeightsTicket) -> None:
        self._source, self.plan, self.ticket = source, plan, ticket
        self._advantages = source.spec.advantages
        self._planned: list[WorkUnit] = []
        self._units: dict[int, asyncio.Future[tuple[Sampled, Scores]]] = {}
        self._drawn: dict[int, asyncio.Event] = {}
        self._colocated = source.spec.cluster.layout == "colocated"
        apart = source.spec.objective.samples_with_follower
        self._sampled_first = self._colocated and (apart or self._advantages.refill > 0)
        self._signals: dict[int, asyncio.Future[dict[int, Signal]]] = {}
        self._scope: dict[int, Sequence[Hashable]] = {}  # keys of the units that it is compared to
        self._complete: list[list[Block]] = []  # of each update that is, refills included
        self._start(plan.blocks)

    async def update(self, number: int) -> AsyncIterator[tuple[WorkUnit, Sampled, Signal]]:
        """The units of update ``number`` as they become ready, in order of accumulation."""
        async for ready in self._update(number):
            yield ready
        if self._colocated:
            await self._all_drawn()

    async def _all_drawn(self) -> None:
        """Wait until every unit is sampled; or for the error for which one never will be."""
        for unit in self._planned:
            await self._drawn[unit.index].wait()
            if self._units[unit.index].done():
                self._units[unit.index].result()

    async def _update(self, number: int) -> AsyncIterator[tuple[WorkUnit, Sampled, Signal]]:
        together = self._advantages.std == "global"
        early = together or self._sampled_first
        if early and not self._complete:
            updates = range(len(self.plan.updates))
            self._complete = [[block async for block in self._grow(n)] for n in updates]
            if together:
                self._compare(self._planned)
            if self._sampled_first:
                await self._all_drawn()  # the last refills, too
        if number < len(self._complete):
            for block in self._complete[number]:
                for unit in block:
                    yield await self._ready(unit)
            return
        blocks: list[Block] = []
        async for block in self._grow(number):
            blocks.append(block)
            for unit in block:
                yield await self._ready(unit)
        self._complete.append(blocks)

    async def _grow(self, number: int) -> AsyncIterator[Block]:
        """The blocks that the plan has for an update, then those that replace flat groups."""
        blocks: Sequence[Block] = self.plan.updates[number].blocks
        for tries_left in range(self._advantages.refill, -1, -1):
            for block in blocks:
                yield block
            if tries_left == 0:
                return
            flat = [prompt for block in blocks for prompt in await self._without_spread(block)]
            blocks = self._refill(flat)

    async def _without_spread(self, block: Block) -> list[int]:
        """The prompts of a block's groups that have none."""
        scores = await self._scores(block)
        return flat_groups(self._results(block, self._compared(block, scores)))

    def _refill(self, flat: Sequence[int]) -> list[Block]:
        spec, sizes = self._source.spec, self._source.set_sizes
        used = {prompt for unit in self._planned for prompt in unit.prompts}
        blocks = plan_refill(spec, self.plan, sizes, used, flat)
        self._start(blocks)
        return blocks

    def _start(self, blocks: Sequence[Block]) -> None:
        for units in scored_together(self._source.spec, blocks):
            self._drawn |= {unit.index: asyncio.Event() for unit in units}
            together = asyncio.ensure_future(self._together(units))
            for place, unit in enumerate(units):
                self._units[unit.index] = asyncio.ensure_future(self._one_of(together, place))
        for block in blocks:
            self._planned += block
            if self._advantages.std == "group":
                self._compare(block)

    async def _together(self, units: Sequence[WorkUnit]) -> list[tuple[Sampled, Scores]]:
        """Units that are scored together."""
        drawn = lambda unit: self._drawn[unit.index].set()  # noqa: E731
        try:
            return await sample_and_score(self._source, units, self.ticket, drawn)
        finally:
            for unit in units:
                drawn(unit)

    async def _one_of(
        self, together: asyncio.Future[list[tuple[Sampled, Scores]]], place: int
    ) -> tuple[Sampled, Scores]:
        return (await together)[place]

    async def _scores(self, scope: Sequence[WorkUnit]) -> list[Scores]:
        return [(await self._units[unit.index])[1] for unit in scope]

    def _compare(self, scope: Sequence[WorkUnit]) -> None:
        """Take advantages over ``scope`` when all of it is scored."""

        async def compare() -> dict[int, Signal]:
            return self._compared(scope, await self._scores(scope))

        task = asyncio.ensure_future(compare())
        self._signals |= {unit.index: task for unit in scope}
        keys = [unit.key for unit in scope]
        self._scope |= {unit.index: keys for unit in scope}

    def _compared(self, scope: Sequence[WorkUnit], scores: Sequence[Scores]) -> dict[int, Signal]:
        return signals(scope, scores, self._advantages, self._source.spec.weights)

    async def _ready(self, unit: WorkUnit) -> tuple[WorkUnit, Sampled, Signal]:
        """The unit, sampled, scored and compared with its group."""
        waiting = self._source.ledger.wait(self._scope[unit.index])
        of_scope = await self._signals[unit.index]
        self._source.ledger.ready(waiting)
        return unit, (await self._units[unit.index])[0], of_scope[unit.index]

    @property
    def results(self) -> list[UnitResult]:
        """Of all units, in the order they were planned; when all are ready."""
        of_units = {unit.index: self._signals[unit.index].result() for unit in self._planned}
        return self._results(self._planned, {i: s[i] for i, s in of_units.items()})

    def _results(
        self, units: Sequence[WorkUnit], of_units: Mapping[int, Signal]
    ) -> list[UnitResult]:
        return [
            UnitResult(unit, self._units[unit.index].result()[1], of_units[unit.index])
            for unit in units
        ]

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Drop what still runs; nothing does after an iteration that went well."""
        for task in [*self._units.values(), *self._signals.values()]:
            task.cancel()
            if task.done() and not task.cancelled():
                task.exception()  # seen: asyncio need not complain that nobody looked
