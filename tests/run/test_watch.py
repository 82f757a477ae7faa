"""The over-optimization watch: when it fires, what it remembers, and that rows alone decide it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrpo_ray.run.watch import Reading, Watch, describe, readings_of
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.training import TrainingSpec

NAN = float("nan")
WEIGHTS = "rewards={ocr: {weight: 1}, sign_colour: {weight: 0}}"


def spec_of(window: int = 2, fall: float = 0.5, rewards: str = WEIGHTS) -> TrainingSpec:
    return load_spec("tiny-ocr", [f"watch.window={window}", f"watch.fall={fall}", rewards])


def row(iteration: int, colour: float, trained: float, std: float = 0.1) -> dict[str, Any]:
    return {
        "kind": "train",
        "iteration": iteration,
        "reward": {"mean": trained, "std": 0.3},
        "rewards": {
            "ocr": {"mean": trained, "std": 0.3},
            "sign_colour": {"mean": colour, "std": std},
        },
    }


def rows_of(colours: Sequence[float], trained: Sequence[float], std: float = 0.1) -> list[dict]:
    pairs = enumerate(zip(colours, trained, strict=True), start=1)
    return [row(i, colour, total, std) for i, (colour, total) in pairs]


def diverging(spec: TrainingSpec, rows: Sequence[dict]) -> list[int]:
    """The iterations whose reading diverges."""
    watch = Watch(spec)
    seen = [(r["iteration"], watch.see(r)) for r in rows]
    return [i for i, readings in seen if any(r.diverging for r in readings.values())]


# --- when it fires


def test_a_fall_while_the_trained_reward_rises_is_seen_at_the_exact_iteration():
    """Windows of two: 1, 1, 1, 0.95, 0.85, 0.75; the limit is 1 - 0.5 x 0.2 = 0.9."""
    colours = [1.0, 1.0, 1.0, 1.0, 0.9, 0.8, 0.7]
    rising = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert diverging(spec_of(), rows_of(colours, rising, std=0.2)) == [6, 7]
    watch = Watch(spec_of())
    for one in rows_of(colours, rising, std=0.2)[:-1]:
        watch.see(one)
    reading = watch.readings["sign_colour"]
    assert reading == Reading(
        best=1.0,
        now=pytest.approx(0.85),
        best_from=3,
        best_iteration=4,  # the latest of equally good windows
        best_std=pytest.approx(0.2),
        trained_best=pytest.approx(0.35),
        trained_now=pytest.approx(0.55),
        diverging=True,
    )


@pytest.mark.parametrize("trained", [[0.5] * 7, [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]])
def test_a_fall_without_a_rise_is_none(trained: list[float]):
    """A run that gets worse all round is not over-optimized."""
    assert diverging(spec_of(), rows_of([1, 1, 1, 1, 0.5, 0.2, 0], trained)) == []


def test_a_rise_without_a_fall_is_none():
    assert diverging(spec_of(), rows_of([0.5] * 7, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])) == []


def test_exactly_the_limit_is_not_yet_a_fall():
    """1 - 0.5 x 0.5 = 0.75: numbers that floats hold exactly."""
    colours, rising = [1.0, 0.75, 0.5], [0.25, 0.5, 0.75]
    assert diverging(spec_of(window=1), rows_of(colours, rising, std=0.5)) == [3]


def test_a_slow_drift_is_seen_because_the_best_is_remembered():
    """No window lies far below the one before it."""
    count = 60
    colours = [1 - 0.003 * i for i in range(count)]
    rising = [0.01 * i for i in range(count)]
    fired = diverging(spec_of(window=5), rows_of(colours, rising))
    # n windows after the first, which ends at 5, the fall is 0.003 n: above 0.5 x 0.1 from n = 17.
    assert fired == list(range(22, count + 1))


def test_it_ends_where_the_reward_comes_back():
    colours = [1.0, 0.5, 0.5, 0.98, 1.0, 1.1]
    fired = diverging(spec_of(window=1), rows_of(colours, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    assert fired == [2, 3]


def test_each_watched_reward_by_itself_and_none_without_any():
    both = "rewards={ocr: {}, sign_colour: {weight: 0}, second: {weight: 0, reward: sign_colour}}"
    watch = Watch(spec_of(window=1, rewards=both))
    for colour, second, trained, i in ((1.0, 0.5, 0.1, 1), (0.5, 0.6, 0.2, 2)):
        one = row(i, colour, trained)
        one["rewards"]["second"] = {"mean": second, "std": 0.1}
        readings = watch.see(one)
    assert {name: r.diverging for name, r in readings.items()} == {
        "sign_colour": True,
        "second": False,
    }
    assert watch.protected == {1, 2}
    unwatched = Watch(spec_of(rewards="rewards={ocr: {}, sign_colour: {}}"))
    assert unwatched.see(row(1, 1, 1)) == {}
    assert unwatched.protected == frozenset()


def test_nothing_is_said_before_a_window_is_full():
    watch = Watch(spec_of(window=3))
    assert [bool(watch.see(one)) for one in rows_of([1] * 4, [1] * 4)] == [False, False, True, True]


# --- rows without a value


@pytest.mark.parametrize("nothing", [NAN, None])
@pytest.mark.parametrize("where", ["mean", "std", "trained"])
def test_a_row_without_a_value_does_not_count(nothing: float | None, where: str):
    """Neither towards a full window nor in it: the reading stays what it was."""
    rows = rows_of([1.0, 1.0, 1.0, 0.8, 0.7], [0.1, 0.2, 0.3, 0.4, 0.5])
    for number in (1, 3):
        hole: Any = rows[number]["rewards"]["sign_colour"]
        if where == "trained":
            rows[number]["reward"]["mean"] = nothing
        else:
            hole[where] = nothing
    watch = Watch(spec_of())
    first, second, third, fourth, fifth = (watch.see(one) for one in rows)
    assert first == second == {}
    assert third == fourth
    assert third["sign_colour"].best_from == 1
    assert third["sign_colour"].best_iteration == 3
    assert fifth["sign_colour"].now == pytest.approx(0.85)  # of iterations 3 and 5
    assert fifth["sign_colour"].trained_now == pytest.approx(0.4)
    assert fifth["sign_colour"].diverging


# --- state


def test_rows_of_evaluations_change_nothing():
    plain, mixed = Watch(spec_of()), Watch(spec_of())
    held_out = {"kind": "eval", "iteration": 2, "rewards": {"sign_colour": {"mean": 9, "std": 1}}}
    for one in rows_of([1.0, 0.9, 0.7], [0.1, 0.2, 0.3]):
        plain.see(one)
        mixed.see(one)
        assert mixed.see(held_out) == plain.readings
    assert mixed == plain


values = st.one_of(st.just(NAN), st.floats(-3, 3, allow_subnormal=False))
histories = st.lists(st.tuples(values, values, st.floats(0, 2)), max_size=25)


@settings(deadline=None, max_examples=60)
@given(histories, st.integers(1, 5), st.integers(0, 25))
def test_a_resumed_run_replays_to_the_same_state(
    history: list[tuple[float, float, float]], window: int, stop: int
):
    """Through JSON, where NaN is null; what follows is then the same as well."""
    spec = spec_of(window)
    rows = [row(i, *entry) for i, entry in enumerate(history, start=1)]
    written = [json.loads(json.dumps(one).replace("NaN", "null")) for one in rows]
    straight, resumed = Watch(spec), Watch(spec)
    for one in rows[:stop]:
        straight.see(one)
    resumed.replay(written[:stop])
    assert resumed == straight
    for one in rows[stop:]:
        assert resumed.see(one) == straight.see(one)
    assert resumed.protected == straight.protected


@settings(deadline=None, max_examples=60)
@given(histories, st.integers(1, 5))
def test_against_the_definition_from_scratch(
    history: list[tuple[float, float, float]], window: int
):
    """All windows so far, looked at anew after every row."""
    watch = Watch(spec_of(window))
    valid: list[tuple[int, float, float, float]] = []
    for i, (colour, trained, std) in enumerate(history, start=1):
        readings = watch.see(row(i, colour, trained, std))
        if not (math.isnan(colour) or math.isnan(trained)):
            valid.append((i, colour, trained, std))
        windows = [valid[k : k + window] for k in range(len(valid) - window + 1)]
        if not windows:
            assert readings == {}
            continue
        means = [tuple(math.fsum(v) / window for v in zip(*w, strict=True)) for w in windows]
        best = max(range(len(windows)), key=lambda k: (means[k][1], k))
        _, top, trained_best, spread = means[best]
        _, now, trained_now, _ = means[-1]
        reading = readings["sign_colour"]
        assert (reading.best, reading.now) == (top, now)
        assert reading.best_iteration == windows[best][-1][0]
        assert reading.best_from == windows[best][0][0]
        assert reading.diverging == (top - now > 0.5 * spread and trained_now > trained_best)
        assert watch.protected == {reading.best_iteration}


# --- what is written and said


def reading_of(**changes: Any) -> Reading:
    plain = {
        "best": 0.969,
        "now": 0.931,
        "best_from": 21,
        "best_iteration": 30,
        "best_std": 0.02,
        "trained_best": 0.71,
        "trained_now": 0.95,
        "diverging": True,
    }
    return Reading(**{**plain, **changes})


def test_a_reading_goes_through_a_row_and_back():
    reading = reading_of()
    one = json.loads(json.dumps({"watch": {"sign_colour": reading.as_json()}}))
    assert readings_of(one) == {"sign_colour": reading}
    assert readings_of({"kind": "train"}) == {}
    partial = asdict(reading)
    del partial["best_std"]
    assert readings_of({"watch": {"sign_colour": partial}}) == {}


def test_the_message():
    assert describe("sign_colour", reading_of(), 30) == (
        "sign_colour fell from 0.969 (iterations 21-30) to 0.931 while the trained reward rose "
        "from 0.71 to 0.95: over-optimization; the checkpoint of iteration 30 is kept"
    )
    alone = describe("sign_colour", reading_of(best_from=30), None)
    assert "(iteration 30)" in alone
    assert alone.endswith(": over-optimization")


def test_the_message_has_digits_enough_to_tell_two_numbers_apart():
    says = describe("x", reading_of(best=21.334, now=21.2898, trained_best=1, trained_now=1), None)
    assert "fell from 21.33 (" in says
    assert "to 21.29 while" in says
