"""Where every second of an iteration went, for each kind of actor.

A process works on a call that it was given, or waits for one. An actor works its calls off in the
order given, so a call's own time begins when the one before it returned; the replicas of a reward
share one line of calls. What the actor itself measured of that time is busy or loading; the rest is
transport: serialising, fetching, queueing in Ray. So the entries of a kind are a partition of its
processes' time, and their means add up to the wall clock.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

LOADING = ("load", "publish")  # calls that move weights; the others are work

Seconds = dict[str, dict[str, float]]  # by state (busy, loading, waiting, overhead) and what


@dataclass(frozen=True)
class Account:
    """One kind of actor in one interval: how many processes, and mean seconds of each."""

    processes: float
    seconds: Seconds

    def of(self, *states: str) -> float:
        """Seconds in these states together."""
        return sum(sum(self.seconds.get(state, {}).values()) for state in states)


@dataclass(eq=False)
class Call:
    """One that was given and is not answered."""

    line: Line
    what: str
    began: float = 0.0  # of its own time, or the last cut
    booked: float = 0.0  # seconds before that cut, as if all of it had been work


@dataclass
class Tally:
    """The processes of one kind since the last cut, in seconds summed over them."""

    present: float = 0.0
    seconds: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    idle: list[tuple[float, float, int]] = field(default_factory=list)  # from, to, processes
    first_call: float = float("inf")  # when it was given

    def book(self, state: str, what: str, seconds: float) -> None:
        self.seconds[state, what] += seconds

    def means(self, wall: float) -> Account:
        """For a process that was there all the time."""
        if not self.present:
            self.book("overhead", "lost", wall)
        share = wall / self.present if self.present else 1.0
        found: Seconds = {}
        for (state, what), seconds in self.seconds.items():
            found.setdefault(state, {})[what] = max(0.0, seconds) * share
        return Account(self.present / wall if wall else 0.0, found)


class Kind:
    """All processes of one kind."""

    def __init__(self, count: int, now: float) -> None:
        self.count, self.at_work = count, 0
        self.lines: dict[str, Line] = {}
        self.tally = Tally()
        self._until = now  # their time is accounted for

    def account(self, now: float) -> None:
        """Add the time in which nothing changed."""
        span, processes = now - self._until, max(self.count, self.at_work)
        self.tally.present += span * processes
        if span > 0 and processes > self.at_work:
            self.tally.idle.append((self._until, now, processes - self.at_work))
        self._until = now

    def close(self, now: float) -> Tally:
        """The tally until now. What is open counts as work; when it ends it is known how much."""
        self.account(now)
        tally, self.tally = self.tally, Tally()
        for line in self.lines.values():
            line.transport = 0.0
            for call in line.at_work:
                tally.book(_state(call.what), call.what, now - call.began)
                call.booked, call.began = call.booked + now - call.began, now
                self.tally.first_call = now
        return tally


class Line:
    """The calls of one actor, or those of all replicas of a reward, in the order given."""

    def __init__(self, kind: Kind, shared: bool) -> None:
        self.kind, self._shared = kind, shared
        self.at_work: dict[Call, None] = {}
        self._queue: dict[Call, None] = {}
        self.transport = 0.0  # booked since the last cut

    def __contains__(self, call: Call) -> bool:
        return call in self.at_work or call in self._queue

    def join(self, call: Call, now: float) -> None:
        self._queue[call] = None
        self.advance(now)

    def advance(self, now: float) -> None:
        """Have every free process begin a call."""
        room = max(1, self.kind.count) if self._shared else 1
        while self._queue and len(self.at_work) < room:
            call = next(iter(self._queue))
            del self._queue[call]
            self.at_work[call] = None
            call.began = now
            self.kind.at_work += 1

    def leave(self, call: Call, now: float) -> float:
        """Take a call out; the seconds since the last cut that were its own."""
        if call in self._queue and self._shared:
            # Another replica got to it earlier: it changes places with the last one that began.
            other, _ = self.at_work.popitem()
            del self._queue[call]
            self.at_work[call], self._queue = None, {other: None, **self._queue}
            call.began, call.booked, other.booked = other.began, other.booked, 0.0
        if call in self._queue:
            del self._queue[call]
            return 0.0
        del self.at_work[call]
        self.kind.at_work -= 1
        self.advance(now)
        return now - call.began


@dataclass(eq=False)
class Wait:
    """The learner's side waits for these units to be sampled and scored."""

    units: Sequence[Hashable]
    began: float


class Ledger:
    """Told by the driver what it gives to whom. Kinds are rollout and learner, or the workers that
    are both, and reward-NAME."""

    def __init__(
        self, counts: Mapping[str, int], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock, self._began = clock, clock()
        self._kinds = {kind: Kind(count, self._began) for kind, count in counts.items()}
        self._sampled: dict[Hashable, float] = {}  # when, since the last cut
        self._scored: dict[Hashable, dict[str, float]] = {}
        self._waits: dict[Wait, None] = {}
        self._reasons: list[tuple[float, float, str]] = []  # from, to: what the learner waited for

    # --- what happens

    def set_count(self, kind: str, count: int) -> None:
        """So many processes there are from now on."""
        now = self._clock()
        found = self._kind(kind, now)
        found.count = count
        for line in found.lines.values():
            line.advance(now)

    def start(self, kind: str, actor: str, what: str) -> Call:
        """A call was given to an actor; to some replica of a reward if ``actor`` is empty."""
        now = self._clock()
        found = self._kind(kind, now)
        found.tally.first_call = min(found.tally.first_call, now)
        if actor not in found.lines:
            found.lines[actor] = Line(found, shared=not actor)
        call = Call(found.lines[actor], what)
        call.line.join(call, now)
        return call

    def end(self, call: Call, busy_s: float) -> None:
        """It returned; ``busy_s`` as the actor measured it."""
        line, span = call.line, self._leave(call)
        # An answer that the driver saw late shortens the span of the next call, by time that was
        # booked as transport. More than that nobody can have worked, by this clock.
        busy = min(max(0.0, busy_s - call.booked), span + line.transport)
        line.kind.tally.book(_state(call.what), call.what, busy)
        line.kind.tally.book("overhead", "transport", span - busy)
        line.transport += span - busy

    def drop(self, call: Call) -> None:
        """It will never return, because its actor was lost. One that has is left alone."""
        if call in call.line:
            span = self._leave(call)
            call.line.kind.tally.book("overhead", "lost", span)

    def sampled(self, unit: Hashable) -> None:
        self._sampled[unit] = self._clock()

    def scored(self, unit: Hashable, reward: str) -> None:
        self._scored.setdefault(unit, {})[reward] = self._clock()

    def wait(self, units: Sequence[Hashable]) -> Wait:
        """What the learner needs next is all of these units."""
        wait = Wait(units, self._clock())
        self._waits[wait] = None
        return wait

    def ready(self, wait: Wait) -> None:
        """They are sampled and scored."""
        self._waits.pop(wait, None)
        self._reasons += self._why(wait, self._clock(), never=wait.began)

    # --- intervals

    def begin(self) -> None:
        """Account from now on. Calls that are open stay open."""
        self._waits.clear()
        self._began = self._clock()
        for kind in self._kinds.values():
            kind.close(self._began)

    def cut(self) -> dict[str, Account]:
        """What was seen of each kind since the last cut or ``begin``."""
        now, began = self._clock(), self._began
        for wait in self._waits:
            self._reasons += self._why(wait, now, never=now)
        found = {name: kind.close(now) for name, kind in self._kinds.items()}
        for name, tally in found.items():
            for entry in self._usual(name):
                tally.book(*entry, 0.0)
            for span in tally.idle:
                for reason, seconds in self._idle(name, tally.first_call, *span):
                    tally.book("waiting", reason, seconds)
        self._began = now
        for past in (self._reasons, self._sampled, self._scored):
            past.clear()
        return {name: tally.means(now - began) for name, tally in found.items()}

    def _usual(self, kind: str) -> Iterator[tuple[str, str]]:
        """Entries that a kind always has, if only as 0: so rows are alike, and so are curves."""
        trains = ("publish", "accumulate", "step")
        works = {"rollout": ("load", "sample"), "learner": trains, "workers": ("sample", *trains)}
        yield from ((_state(what), what) for what in works.get(kind, ("score",)))
        for_others = ("samples", *(f"scores of {name}" for name in self._rewards), "driver")
        waits = {
            "rollout": ("weights", "learner and rewards"),
            "learner": for_others,
            "workers": for_others,
        }
        yield from (("waiting", what) for what in waits.get(kind, ("images",)))
        yield from (("overhead", what) for what in ("transport", "lost"))

    @property
    def _rewards(self) -> list[str]:
        names = [kind for kind in self._kinds if kind.startswith("reward-")]
        return [name.removeprefix("reward-") for name in names]

    def _kind(self, name: str, now: float) -> Kind:
        """A kind, accounted until now."""
        kind = self._kinds.setdefault(name, Kind(0, now))
        kind.account(now)
        return kind

    def _leave(self, call: Call) -> float:
        now = self._clock()
        call.line.kind.account(now)
        return call.line.leave(call, now)

    # --- why somebody waited

    def _idle(
        self, kind: str, first_call: float, start: float, end: float, processes: int
    ) -> Iterator[tuple[str, float]]:
        """Reasons of a span without a call, each with its seconds."""
        if kind == "rollout":
            given = min(max(first_call, start), end)
            yield "weights", (given - start) * processes
            yield "learner and rewards", (end - given) * processes
        elif kind in ("learner", "workers"):
            first = bisect_right(self._reasons, start, key=lambda piece: piece[1])
            for piece in self._reasons[first:]:
                begin, until = max(piece[0], start), min(piece[1], end)
                if begin >= end:
                    break
                yield "driver", (begin - start) * processes
                yield piece[2], (until - begin) * processes
                start = until
            yield "driver", (end - start) * processes
        else:
            yield "images", (end - start) * processes

    def _why(self, wait: Wait, end: float, never: float) -> list[tuple[float, float, str]]:
        """The pieces of a wait; ``never`` is when that came which nobody told."""
        if end <= wait.began:
            return []
        sampled = max(self._sampled.get(unit, never) for unit in wait.units)
        sampled = min(max(wait.began, sampled), end)
        pieces = [(wait.began, sampled, "samples")]
        last, which = wait.began, ""
        for unit in wait.units:
            scores = self._scored.get(unit, {})
            for reward in self._rewards:
                if scores.get(reward, never) > last:
                    last, which = scores.get(reward, never), reward
        if which and last > sampled:
            pieces.append((sampled, last, f"scores of {which}"))
        return pieces


def _state(what: str) -> str:
    return "loading" if what in LOADING else "busy"
