"""The ledger against hands and against simulated actors whose every second is known."""

import heapq
import itertools
import random
from collections import defaultdict

import pytest

from flowgrpo_ray.run.ledger import Ledger

ONE_EACH = {"rollout": 1, "learner": 1, "reward-ocr": 1}


class Clock:
    """Shows the time that was set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def flat(account):
    """The entries that are not 0."""
    return {
        f"{state} {what}": pytest.approx(seconds)
        for state, of_state in account.seconds.items()
        for what, seconds in of_state.items()
        if seconds
    }


def wall_of(account):
    return account.of("busy", "loading", "waiting", "overhead")


# --- by hand


def play(ledger, clock, *script):
    """Does each (time, method, arguments), in which `start as NAME` names a token."""
    told = {}
    for now, does, *arguments in script:
        clock.now = now
        method, _, name = does.partition(" as ")
        if method in ("end", "drop", "ready"):
            arguments[0] = told[arguments[0]]
        told[name] = getattr(ledger, method)(*arguments)
    return told


def test_an_iteration_by_hand():
    clock = Clock()
    ledger = Ledger(ONE_EACH, clock)
    play(
        ledger,
        clock,
        (100, "begin"),
        (100, "start as published", "learner", "learner-0", "publish"),
        (102, "end", "published", 1.5),
        (102, "wait as both", ["a", "b"]),
        (102, "start as loaded", "rollout", "rollout-0", "load"),
        (102, "start as first", "rollout", "rollout-0", "sample"),
        (102, "start as second", "rollout", "rollout-0", "sample"),
        (103, "end", "loaded", 1.0),
        (107, "end", "first", 3.5),
        (107, "sampled", "a"),
        (107, "start as ocr", "reward-ocr", "", "score"),
        (109, "end", "ocr", 2.0),
        (109, "scored", "a", "ocr"),
        (111, "end", "second", 4.0),
        (111, "sampled", "b"),
        (111, "start as ocr", "reward-ocr", "", "score"),
        (114, "end", "ocr", 2.5),
        (114, "scored", "b", "ocr"),
        (114, "ready", "both"),
        (115, "start as trained", "learner", "learner-0", "accumulate"),
        (115, "start as stepped", "learner", "learner-0", "step"),
        (118, "end", "trained", 3.0),
        (119, "end", "stepped", 0.75),
    )
    clock.now = 120
    rows = ledger.cut()
    assert {kind: flat(account) for kind, account in rows.items()} == {
        "rollout": {
            "waiting weights": 2,
            "loading load": 1,
            "busy sample": 7.5,
            "overhead transport": 0.5,
            "waiting learner and rewards": 9,
        },
        "learner": {
            "loading publish": 1.5,
            "overhead transport": 0.75,
            "waiting samples": 9,
            "waiting scores of ocr": 3,
            "waiting driver": 2,
            "busy accumulate": 3,
            "busy step": 0.75,
        },
        "reward-ocr": {"waiting images": 15, "busy score": 4.5, "overhead transport": 0.5},
    }
    assert [wall_of(account) for account in rows.values()] == [pytest.approx(20)] * 3
    assert rows["rollout"].of("busy", "loading") == pytest.approx(8.5)


def test_the_learner_waits_for_the_reward_that_comes_last():
    clock = Clock()
    ledger = Ledger({"learner": 1, "reward-ocr": 1, "reward-jpeg": 1}, clock)
    play(
        ledger,
        clock,
        (0, "wait as both", ["a", "b"]),
        (2, "sampled", "b"),
        (3, "scored", "b", "jpeg"),
        (4, "scored", "b", "ocr"),
        (5, "sampled", "a"),
        (6, "scored", "a", "ocr"),
        (9, "scored", "a", "jpeg"),
        (9, "ready", "both"),
    )
    clock.now = 10
    assert flat(ledger.cut()["learner"]) == {
        "waiting samples": 5,
        "waiting scores of jpeg": 4,
        "waiting driver": 1,
    }


def test_a_wait_counts_from_its_beginning():
    clock = Clock()
    ledger = Ledger(ONE_EACH, clock)
    play(ledger, clock, (1, "sampled", "a"), (3, "wait as a", ["a"]), (5, "scored", "a", "ocr"))
    clock.now = 7
    assert flat(ledger.cut()["learner"]) == {"waiting scores of ocr": 2, "waiting driver": 5}


def test_what_was_ready_before_was_not_waited_for():
    """With max_lag: 1 units are sampled and scored in the interval before."""
    clock = Clock()
    ledger = Ledger(ONE_EACH, clock)
    play(ledger, clock, (0, "begin"), (1, "sampled", "a"), (2, "scored", "a", "ocr"), (3, "cut"))
    play(ledger, clock, (4, "begin"), (4, "wait as a", ["a"]), (5, "ready", "a"))
    clock.now = 6
    assert flat(ledger.cut()["learner"]) == {"waiting driver": 2}


def test_a_call_across_the_border_is_work_on_both_sides():
    clock = Clock()
    ledger = Ledger(ONE_EACH, clock)
    told = play(
        ledger,
        clock,
        (0, "begin"),
        (1, "start as first", "rollout", "rollout-0", "sample"),
        (1, "start as ocr", "reward-ocr", "", "score"),
        (3, "wait as a", ["a"]),
    )
    clock.now = 4
    rows = ledger.cut()
    assert flat(rows["rollout"]) == {"waiting weights": 1, "busy sample": 3}
    assert flat(rows["reward-ocr"]) == {"waiting images": 1, "busy score": 3}
    assert flat(rows["learner"]) == {"waiting driver": 3, "waiting samples": 1}
    play(ledger, clock, (5, "sampled", "a"))
    clock.now = 7
    ledger.end(told["first"], 5.0)  # 3 of them are told already
    ledger.end(told["ocr"], 6.0)
    clock.now = 9
    rows = ledger.cut()
    assert flat(rows["rollout"]) == {
        "busy sample": 2,
        "overhead transport": 1,
        "waiting learner and rewards": 2,
    }
    assert flat(rows["reward-ocr"]) == {"busy score": 3, "waiting images": 2}
    assert flat(rows["learner"]) == {"waiting samples": 1, "waiting scores of ocr": 4}


def test_what_came_before_begin_is_nobodys():
    clock = Clock()
    ledger = Ledger(ONE_EACH, clock)
    told = play(
        ledger,
        clock,
        (1, "start as first", "rollout", "rollout-0", "sample"),
        (2, "wait as lost", ["never"]),
        (5, "begin"),
    )
    clock.now = 6
    ledger.end(told["first"], 5.0)
    clock.now = 8
    rows = ledger.cut()
    assert flat(rows["rollout"]) == {"busy sample": 1, "waiting learner and rewards": 2}
    assert flat(rows["learner"]) == {"waiting driver": 3}


def test_a_lost_actor():
    clock = Clock()
    ledger = Ledger({"rollout": 2, "learner": 1, "reward-ocr": 1}, clock)
    told = play(
        ledger,
        clock,
        (0, "begin"),
        (0, "start as dies", "rollout", "rollout-0", "sample"),
        (0, "start as queued", "rollout", "rollout-0", "sample"),
        (0, "start as lives", "rollout", "rollout-1", "sample"),
        (4, "drop", "dies"),
        (4, "drop", "queued"),
        (4, "set_count", "rollout", 1),
        (10, "end", "lives", 10.0),
        (10, "set_count", "rollout", 2),
    )
    ledger.drop(told["lives"])  # it has returned: nothing happens
    clock.now = 12
    row = ledger.cut()["rollout"]
    # 4 + 12 seconds of the one that lived, 4 + 2 of the other and the one in its place
    assert row.processes == pytest.approx(18 / 12)
    each = 12 / 18
    assert flat(row) == {
        "busy sample": 10 * each,
        "overhead lost": 4 * each,
        "waiting learner and rewards": 4 * each,
    }
    assert wall_of(row) == pytest.approx(12)


def test_nobody_there():
    clock = Clock()
    ledger = Ledger({"rollout": 0}, clock)
    clock.now = 3
    row = ledger.cut()["rollout"]
    assert row.processes == 0
    assert flat(row) == {"overhead lost": 3}


def test_rows_always_have_the_same_entries():
    clock = Clock()
    ledger = Ledger(ONE_EACH, clock)
    clock.now = 1
    assert {kind: account.seconds for kind, account in ledger.cut().items()} == {
        "rollout": {
            "busy": {"sample": 0},
            "loading": {"load": 0},
            "waiting": {"weights": 1, "learner and rewards": 0},
            "overhead": {"transport": 0, "lost": 0},
        },
        "learner": {
            "busy": {"accumulate": 0, "step": 0},
            "loading": {"publish": 0},
            "waiting": {"samples": 0, "scores of ocr": 0, "driver": 1},
            "overhead": {"transport": 0, "lost": 0},
        },
        "reward-ocr": {
            "busy": {"score": 0},
            "waiting": {"images": 1},
            "overhead": {"transport": 0, "lost": 0},
        },
    }


def test_an_actor_whose_clock_is_fast_does_not_push_its_row_over_the_wall_time():
    clock = Clock()
    ledger = Ledger(ONE_EACH, clock)
    for second in range(10):
        play(
            ledger,
            clock,
            (10 * second, "start as call", "rollout", "rollout-0", "sample"),
            (10 * second + 10, "end", "call", 13.0),
        )
    assert flat(ledger.cut()["rollout"]) == {"busy sample": 100}


def test_an_answer_that_was_seen_late_takes_nothing_from_the_next():
    clock = Clock()
    ledger = Ledger(ONE_EACH, clock)
    play(
        ledger,
        clock,
        (0, "start as first", "rollout", "rollout-0", "sample"),
        (0, "start as second", "rollout", "rollout-0", "sample"),
        (5, "end", "first", 4.0),  # the driver had other things to do for a second
        (8, "end", "second", 4.0),
    )
    assert flat(ledger.cut()["rollout"]) == {"busy sample": 8}


def test_replicas_need_not_answer_in_order():
    clock = Clock()
    clock.now = 10
    ledger = Ledger({"reward-ocr": 2}, clock)
    play(
        ledger,
        clock,
        (10, "start as a", "reward-ocr", "", "score"),
        (10, "start as b", "reward-ocr", "", "score"),
        (10, "start as c", "reward-ocr", "", "score"),
        (13, "end", "c", 1.0),  # b took 2 seconds, but its answer comes later
        (14, "end", "a", 4.0),
        (15, "end", "b", 2.0),
    )
    clock.now = 16
    row = ledger.cut()["reward-ocr"]
    # Twice 6 seconds: until 14 both had a call, until 15 one.
    assert flat(row) == {
        "busy score": 3.5,
        "overhead transport": 1.0,
        "waiting images": 1.5,
    }


def test_replicas_that_come_take_what_waits():
    clock = Clock()
    ledger = Ledger({"reward-ocr": 1}, clock)
    play(
        ledger,
        clock,
        (0, "start as a", "reward-ocr", "", "score"),
        (0, "start as b", "reward-ocr", "", "score"),
        (2, "set_count", "reward-ocr", 2),
        (4, "end", "a", 4.0),
        (4, "end", "b", 2.0),
    )
    row = ledger.cut()["reward-ocr"]
    assert row.processes == pytest.approx(1.5)
    assert flat(row) == {"busy score": 4}


def test_kinds_that_were_not_told_before():
    """A client that scores a folder of images has a ledger that nobody reads."""
    clock = Clock()
    ledger = Ledger({}, clock)
    play(ledger, clock, (0, "start as a", "reward-ocr", "", "score"), (2, "end", "a", 2.0))
    assert flat(ledger.cut()["reward-ocr"]) == {"busy score": 2}


# --- simulated actors


class World:
    """Actors that work off what they are given, on one clock; each remembers what it did."""

    def __init__(self, seed):
        self.now, self._events, self._order = 0.0, [], itertools.count()
        self.random = random.Random(seed)
        self.worked = defaultdict(list)  # by kind: (what, from, to)

    def clock(self):
        return self.now

    def at(self, when, action):
        heapq.heappush(self._events, (when, next(self._order), action))

    def run(self):
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()

    def seconds(self, kind, start, end):
        """What its actors truly did in an interval."""
        found = defaultdict[str, float](float)
        for what, begin, until in self.worked[kind]:
            found[what] += max(0.0, min(until, end) - max(begin, start))
        return found


class Servers:
    """One actor, or the replicas of a reward, behind one line of calls."""

    def __init__(self, world, kind, count=1):
        self.world, self.kind = world, kind
        self.free = [0.0] * count

    def call(self, what, duration, answered):
        """`answered(busy)` when the driver sees it; the way there and back takes milliseconds."""
        arrives = self.world.now + self.world.random.uniform(0.0, 0.004)
        begin = max(arrives, heapq.heappop(self.free))
        end = begin + duration * self.world.random.uniform(0.8, 1.2)
        heapq.heappush(self.free, end)
        self.world.worked[self.kind].append((what, begin, end))
        back = self.world.random.uniform(0.0, 0.004)
        self.world.at(end + back, lambda: answered(end - begin))


class SimulatedRun:
    """The driver's loop in small: load and sample with two units in flight, score with two rewards,
    accumulate in order, step, publish."""

    UNITS, ITERATIONS = 24, 3

    def __init__(self, seed, workers, replicas, times, lag=False):
        self.world = World(seed)
        self.times, self.lag = times, lag
        self.counts = {"rollout": workers, "learner": 1}
        self.counts |= {f"reward-{name}": count for name, count in replicas.items()}
        self.ledger = Ledger(self.counts, self.world.clock)
        self.workers = [Servers(self.world, "rollout") for _ in range(workers)]
        self.loaded = [-1] * workers
        self.in_flight = [0] * workers
        self.learner = Servers(self.world, "learner")
        self.rewards = {n: Servers(self.world, f"reward-{n}", c) for n, c in replicas.items()}
        self.waiting, self.done = [], set()
        self.missing = defaultdict(lambda: set(replicas))
        self.intervals = []  # start, end, rows
        self.world.at(0.0, lambda: self.iterate(0))
        self.world.run()

    def give(self, servers, actor, what, then):
        token = self.ledger.start(servers.kind, actor, what)

        def answered(busy):
            self.ledger.end(token, busy)
            then()

        servers.call(what, self.times[what if what != "score" else servers.kind], answered)

    def iterate(self, iteration):
        if iteration == self.ITERATIONS:
            return
        self.iteration, self.began = iteration, self.world.now
        self.next, self.steps, self.wait = 0, 0, None
        self.ledger.begin()
        self.give(self.learner, "learner-0", "publish", self.published)

    def published(self):
        if not self.lag or not self.iteration:
            self.waiting += [(self.iteration, unit) for unit in range(self.UNITS)]
        if self.lag and self.iteration + 1 < self.ITERATIONS:
            self.waiting += [(self.iteration + 1, unit) for unit in range(self.UNITS)]
        self.dispatch()
        self.consume()

    def dispatch(self):
        while self.waiting and min(self.in_flight) < 2:
            worker = self.in_flight.index(min(self.in_flight))
            unit = self.waiting.pop(0)
            self.in_flight[worker] += 1
            servers, name = self.workers[worker], f"rollout-{worker}"
            if self.loaded[worker] != unit[0]:
                self.loaded[worker] = unit[0]
                self.give(servers, name, "load", lambda: None)
            self.give(servers, name, "sample", lambda u=unit, w=worker: self.sampled(u, w))

    def sampled(self, unit, worker):
        self.ledger.sampled(unit)
        self.in_flight[worker] -= 1
        for name, servers in self.rewards.items():
            self.give(servers, "", "score", lambda n=name: self.scored(unit, n))
        self.dispatch()

    def scored(self, unit, name):
        self.ledger.scored(unit, name)
        self.missing[unit].remove(name)
        self.consume()

    def consume(self):
        while self.next < self.UNITS:
            unit = (self.iteration, self.next)
            self.wait = self.wait or self.ledger.wait([unit])
            if unit not in self.missing or self.missing[unit]:
                return
            self.ledger.ready(self.wait)
            self.wait = None
            self.next += 1
            self.give(self.learner, "learner-0", "accumulate", lambda: None)
        if not self.steps:
            self.steps = 1
            self.give(self.learner, "learner-0", "step", self.stepped)

    def stepped(self):
        self.intervals.append((self.began, self.world.now, self.ledger.cut()))
        self.iterate(self.iteration + 1)


TIMES = {"sample": 0.4, "load": 0.2, "publish": 0.3, "accumulate": 0.1, "step": 0.5}
SCORES = {"reward-ocr": 0.15, "reward-jpeg": 0.01}


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize(
    ("workers", "replicas", "slow"),
    [
        (1, {"ocr": 1, "jpeg": 1}, {}),
        (4, {"ocr": 1, "jpeg": 2}, {"reward-ocr": 0.5}),
        (4, {"ocr": 3, "jpeg": 1}, {"reward-ocr": 0.6}),
        (5, {"ocr": 4, "jpeg": 1}, {"accumulate": 0.4}),
        (30, {"ocr": 2, "jpeg": 2}, {}),
    ],
)
def test_the_entries_are_right_within_two_per_cent_of_the_iteration(workers, replicas, slow, lag):
    run = SimulatedRun(len(slow) + workers, workers, replicas, TIMES | SCORES | slow, lag)
    assert len(run.intervals) == run.ITERATIONS
    for start, end, rows in run.intervals:
        wall = end - start
        for kind, account in rows.items():
            assert wall_of(account) == pytest.approx(wall, rel=1e-9), kind
            assert account.processes == pytest.approx(run.counts[kind])
            truth = run.world.seconds(kind, start, end)
            told = {**account.seconds.get("busy", {}), **account.seconds.get("loading", {})}
            assert told.keys() >= {what for what, seconds in truth.items() if seconds}, kind
            for what, seconds in truth.items():
                mean = seconds / run.counts[kind]
                assert told.get(what, 0.0) == pytest.approx(mean, abs=0.02 * wall), (kind, what)
            # What is left of a call is its way there and back, 8 milliseconds at most.
            calls = sum(start < until < end for _, _, until in run.world.worked[kind]) + 2
            assert account.of("overhead") < 0.008 * calls / run.counts[kind], kind
        slowest = max(rows, key=lambda kind: rows[kind].of("busy", "loading"))
        assert rows["learner"].of("waiting") == pytest.approx(
            wall - rows["learner"].of("busy", "loading", "overhead")
        )
        if slow.keys() == {"reward-ocr"} and not lag:
            assert slowest == "reward-ocr"
            waited = rows["learner"].seconds["waiting"]
            assert max(waited, key=lambda reason: waited[reason]) == "scores of ocr"


def test_nothing_is_kept_of_units_that_are_long_done():
    run = SimulatedRun(1, 2, {"ocr": 1, "jpeg": 1}, TIMES | SCORES)
    kept = (run.ledger._sampled, run.ledger._scored, run.ledger._reasons)
    assert not any(kept)
    kinds = run.ledger._kinds.values()
    assert not any(call for kind in kinds for line in kind.lines.values() for call in line.at_work)
