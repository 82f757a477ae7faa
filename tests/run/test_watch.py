"""The over-optimization watch: when it fires, what it remembers, and that rows alone decide it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrpo_ray.run.metrics import Scores, eval_row, means_by_set
from flowgrpo_ray.run.watch import (
    Divergence,
    Reading,
    Watch,
    describe,
    export_of_best,
    readings_of,
)
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.prompt_files import Prompt
from flowgrpo_ray.spec.training import TrainingSpec

NAN = float("nan")
WEIGHTS = "rewards={ocr: {weight: 1}, sign_colour: {weight: 0}}"
Prompts = Sequence[float | None]
ByPrompt = dict[int, list[float]]


def spec_of(
    window: int = 1, fall: float = 0.5, significance: float = 2, rewards: str = WEIGHTS
) -> TrainingSpec:
    watch = f"watch={{window: {window}, fall: {fall}, significance: {significance}}}"
    return load_spec("tiny-ocr", [watch, rewards])


def row(iteration: int, colours: Prompts, total: Prompts) -> dict[str, Any]:
    """Of an evaluation, as far as the watch reads it: a score per prompt."""
    per_prompt = {"rewards": {"sign_colour": colours}, "total": total}
    missing = sum(not (math.isfinite(c) if c is not None else False) for c in colours)
    unscored = {"sign_colour": missing, "second": 0}
    return {
        **{"kind": "eval", "iteration": iteration, "unscored": unscored},
        "per_prompt": per_prompt,
    }


def around(mean: float, spread: float, count: int = 4) -> list[float]:
    """Prompts with this mean and standard deviation, always in the same order."""
    return [mean - spread, mean + spread] * (count // 2)


def rows_of(colours: Sequence[float], trained: Sequence[float], std: float = 0.25) -> list[dict]:
    """An evaluation each; every prompt moves with the mean, so that no fall is noise."""
    pairs = enumerate(zip(colours, trained, strict=True))
    return [row(i, around(colour, std), around(total, 0)) for i, (colour, total) in pairs]


def diverging(spec: TrainingSpec, rows: Sequence[dict]) -> list[int]:
    """The iterations whose reading diverges."""
    watch = Watch(spec)
    seen = [(r["iteration"], watch.see(r)) for r in rows]
    return [i for i, readings in seen if any(r.diverging for r in readings.values())]


# --- when it fires


def test_a_fall_while_the_trained_reward_rises_is_seen_at_the_exact_evaluation():
    """Windows of two: 1, 1, 1, 0.95, 0.85, 0.75; the limit is 1 - 0.5 x 0.2 = 0.9."""
    colours = [1.0, 1.0, 1.0, 1.0, 0.9, 0.8, 0.7]
    rising = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    rows = rows_of(colours, rising, std=0.2)
    assert diverging(spec_of(window=2), rows) == [5, 6]
    watch = Watch(spec_of(window=2))
    watch.replay(rows[:-1])
    assert watch.readings["sign_colour"] == Reading(
        best=pytest.approx(1.0),
        now=pytest.approx(0.85),
        error=pytest.approx(0, abs=1e-12),
        std=pytest.approx(0.2),
        best_from=2,
        best_iteration=3,  # the latest of equally good windows
        trained_best=pytest.approx(0.35),
        trained_now=pytest.approx(0.55),
        diverging=True,
    )


def test_the_standard_error_is_that_of_the_differences_by_prompt():
    """Falls of 0, 1, 2, 3: mean 1.5, standard deviation sqrt(5/3), error sqrt(5/12) = 0.6455. The
    prompts themselves lie far apart, which a comparison of two means would take for noise."""
    before, after = [0.0, 10.0, 20.0, 30.0], [0.0, 9.0, 18.0, 27.0]
    rows = [row(0, before, [0, 0, 0, 0]), row(5, after, [1, 1, 1, 1])]
    z = 1.5 / math.sqrt(5 / 12)
    for significance, seen in ((z - 0.01, [5]), (z + 0.01, [])):
        assert diverging(spec_of(fall=0, significance=significance), rows) == seen
    # 1.5 is 0.134 of the spread over images, sqrt(125); that of the later ones is smaller.
    for fall, seen in ((0.134, [5]), (0.135, [])):
        assert diverging(spec_of(fall=fall, significance=1), rows) == seen
    watch = Watch(spec_of())
    watch.replay(rows)
    reading = watch.readings["sign_colour"]
    assert reading.error == pytest.approx(math.sqrt(5 / 12))
    assert reading.std == pytest.approx(math.sqrt(125))


def test_a_spread_that_grew_with_the_fall_is_the_unit():
    """Near a reward's maximum the images hardly differ: any fall would be large in that unit."""
    near, apart = [1.0, 1.0, 1.0, 0.999], [0.9, 0.8, 1.0, 0.7]
    rows = [row(0, near, [0] * 4), row(1, apart, [1] * 4)]
    watch = Watch(spec_of(fall=1.5, significance=0.1))
    watch.replay(rows)
    assert watch.readings["sign_colour"].std == pytest.approx(float(np.std(apart)))
    assert not watch.readings["sign_colour"].diverging  # 0.15 is 1.34 of 0.112


@pytest.mark.parametrize(
    ("trained", "seen"),
    [
        ([0.7, 0.6, 0.5, 0.4], []),  # a run that gets worse all round is not over-optimized
        ([1.0, 1.0, 1.0, 1.0], [1, 2, 3]),  # a trained reward at its maximum cannot rise
    ],
)
def test_a_fall_that_the_trained_reward_shares_is_none(trained: list[float], seen: list[int]):
    assert diverging(spec_of(), rows_of([1, 0.5, 0.2, 0], trained)) == seen


@pytest.mark.parametrize(("less", "seen"), [(1, [1]), (4, [])])
def test_the_trained_reward_fell_if_that_is_significant(less: int, seen: list[int]):
    """Of 16 prompts 1 or 4 are lost: 1 or 2.24 standard errors; the limit is 2."""
    total = [1.0] * (16 - less) + [0.0] * less
    rows = [row(0, around(1, 0.1, 16), [1.0] * 16), row(1, around(0, 0.1, 16), total)]
    assert diverging(spec_of(), rows) == seen


def test_a_rise_without_a_fall_is_none():
    assert diverging(spec_of(), rows_of([0.5] * 7, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])) == []


def test_exactly_the_limit_is_not_yet_a_fall():
    """1 - 0.5 x 0.5 = 0.75: numbers that floats hold exactly."""
    colours, rising = [1.0, 0.75, 0.5], [0.25, 0.5, 0.75]
    assert diverging(spec_of(), rows_of(colours, rising, std=0.5)) == [2]


def test_a_slow_drift_is_seen_because_the_best_is_remembered():
    """No window lies far below the one before it."""
    count = 60
    colours = [1 - 0.003 * i for i in range(count)]
    rising = [0.01 * i for i in range(count)]
    fired = diverging(spec_of(window=5), rows_of(colours, rising, std=0.1))
    # n windows after the first, which ends at 4, the fall is 0.003 n: above 0.5 x 0.1 from n = 17.
    assert fired == list(range(21, count))


def test_it_ends_where_the_reward_comes_back():
    colours = [1.0, 0.5, 0.5, 0.98, 1.0, 1.1]
    fired = diverging(spec_of(), rows_of(colours, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    assert fired == [1, 2]


def test_each_watched_reward_by_itself_and_none_without_any():
    both = "rewards={ocr: {}, sign_colour: {weight: 0}, second: {weight: 0, reward: sign_colour}}"
    watch = Watch(spec_of(rewards=both))
    for colour, second, trained, i in ((1.0, 0.5, 0.1, 1), (0.5, 0.6, 0.2, 2)):
        one = row(i, around(colour, 0.1), around(trained, 0.1))
        one["per_prompt"]["rewards"]["second"] = around(second, 0.1)
        readings = watch.see(one)
    assert {name: r.diverging for name, r in readings.items()} == {
        "sign_colour": True,
        "second": False,
    }
    assert watch.protected == {1, 2}
    unwatched = Watch(spec_of(rewards="rewards={ocr: {}, sign_colour: {}}"))
    assert unwatched.see(row(1, [1, 1], [1, 1])) == {}
    assert unwatched.protected == frozenset()


def test_nothing_is_said_before_a_window_is_full():
    watch = Watch(spec_of(window=3))
    assert [bool(watch.see(one)) for one in rows_of([1] * 4, [1] * 4)] == [False, False, True, True]


# --- the defaults, on runs of the sizes that are published


def evaluations(
    rng: np.random.Generator, count: int, prompts: int, spread: float, at: Callable[[int], float]
) -> list[dict]:
    """Every prompt has a level of its own, with 70% of the variance over images; the rest is new
    noise in each evaluation. ``at(i)`` is the mean of the ``i``-th; the trained total rises."""
    own = rng.normal(0, math.sqrt(0.7) * spread, prompts)
    found: list[dict] = []
    for i in range(count):
        scores = at(i) + own + rng.normal(0, math.sqrt(0.3) * spread, prompts)
        found.append(row(i, scores.tolist(), rng.normal(0.3 + 0.03 * i, 0.3, prompts).tolist()))
    return found


@pytest.mark.parametrize("prompts", [64, 512, 2048])
@pytest.mark.parametrize(
    ("before", "after", "spread"),
    [(22.34, 21.16, 1.3), (0.87, 0.44, 1.0), (5.39, 4.93, 0.55)],
    ids=["pickscore", "imagereward", "aesthetic"],
)
def test_the_published_falls_are_seen_while_they_last(
    before: float, after: float, spread: float, prompts: int
):
    """Five evaluations without a fall, then one that is linear over ten."""
    spec = load_spec("tiny-ocr")
    rng = np.random.default_rng(prompts)
    rows = evaluations(
        rng, 16, prompts, spread, lambda i: before - (before - after) * max(0, i - 5) / 10
    )
    fired = diverging(spec, rows)
    # A fall of a fifth of the spread is enough where there are many prompts.
    first = 5 + math.ceil(10 * 0.2 * spread / (before - after))
    assert fired == list(range(fired[0], 16))
    assert first <= fired[0] <= (14 if prompts == 64 else first + 2)


def test_a_hundred_healthy_evaluations_raise_no_alarm():
    """The same noise around a level that stays, and around one that rises."""
    spec = load_spec("tiny-ocr")
    for seed in range(6):
        for slope in (0.0, 0.005):
            rng = np.random.default_rng(seed)
            rows = evaluations(rng, 100, 64, 1.0, lambda i, slope=slope: slope * i)
            assert diverging(spec, rows) == []


# --- prompts and rows without a value


@pytest.mark.parametrize("nothing", [NAN, None])
@pytest.mark.parametrize("where", ["sign_colour", "total"])
def test_a_prompt_without_a_value_is_left_out_of_both(nothing: float | None, where: str):
    """Prompt 3 had no score at the best, prompt 2 has none now: 0 and 1 are compared."""
    rows = [row(0, [1.0, 0.9, 0.8, 0.7], [0.1] * 4), row(1, [0.9, 0.7, 0.1, 0.1], [0.2] * 4)]
    for one, prompt in zip(rows, (3, 2), strict=True):
        per = one["per_prompt"]
        (per["total"] if where == "total" else per["rewards"][where])[prompt] = nothing
    watch = Watch(spec_of(significance=1))
    watch.replay(rows)
    reading = watch.readings["sign_colour"]
    assert (reading.best, reading.now) == (pytest.approx(0.95), pytest.approx(0.8))
    assert reading.error == pytest.approx(0.05)


@pytest.mark.parametrize("lost", [2, 4])
def test_an_evaluation_of_which_half_is_lost_does_not_count(lost: int):
    rows = rows_of([1.0, 5.0, 0.9, 0.1], [0.1, 0.2, 0.3, 0.4])
    rows[1]["per_prompt"]["rewards"]["sign_colour"][:lost] = [None] * lost
    rows[1]["unscored"]["sign_colour"] = lost
    watch = Watch(spec_of(window=2))
    first, second, third, fourth = (watch.see(one) for one in rows)
    assert first == second == {}
    assert third["sign_colour"].best == pytest.approx(0.95)
    assert (third["sign_colour"].best_from, third["sign_colour"].best_iteration) == (0, 2)
    assert fourth["sign_colour"].now == pytest.approx(0.5)  # of the evaluations after 2 and 3


def test_rows_of_training_and_of_earlier_versions_change_nothing():
    plain, mixed = Watch(spec_of()), Watch(spec_of())
    others = [
        {**row(2, [9] * 4, [9] * 4), "kind": "train"},
        {"kind": "eval", "iteration": 2, "rewards": {"sign_colour": {"mean": 9, "std": 1}}},
    ]
    for one in rows_of([1.0, 0.9, 0.7], [0.1, 0.2, 0.3]):
        plain.see(one)
        mixed.see(one)
        for other in others:
            assert mixed.see(other) == plain.readings


# --- state

values = st.one_of(st.sampled_from([NAN, math.inf]), st.floats(-3, 3, allow_subnormal=False))
evaluation = st.lists(st.tuples(values, values), min_size=5, max_size=5)
histories = st.lists(evaluation, max_size=12)


def rows_from(history: Sequence[Sequence[tuple[float, float]]]) -> list[dict]:
    columns = (zip(*one, strict=True) for one in history)
    return [row(i, list(colours), list(total)) for i, (colours, total) in enumerate(columns)]


@settings(deadline=None, max_examples=60)
@given(histories, st.integers(1, 4), st.integers(0, 12))
def test_a_resumed_run_replays_to_the_same_state(
    history: list[list[tuple[float, float]]], window: int, stop: int
):
    """Through JSON, where NaN is null; what follows is then the same as well."""
    spec, rows = spec_of(window), rows_from(history)
    texts = [re.sub("NaN|-?Infinity", "null", json.dumps(one)) for one in rows]
    written = [json.loads(text) for text in texts]
    straight, resumed = Watch(spec), Watch(spec)
    straight.replay(rows[:stop])
    resumed.replay(written[:stop])
    assert resumed.readings == straight.readings
    for one in rows[stop:]:
        assert resumed.see(one) == straight.see(one)
    assert resumed.protected == straight.protected


@settings(deadline=None, max_examples=60)
@given(histories, st.integers(1, 4))
def test_against_the_definition_from_scratch(history: list[list[tuple[float, float]]], window: int):
    """All windows so far, looked at anew after every row; prompts are lost now and then."""
    watch = Watch(spec_of(window))
    valid: list[tuple[int, ByPrompt]] = []
    best: tuple[list[int], ByPrompt] | None = None
    for i, one in enumerate(rows_from(history)):
        before, readings = watch.readings, watch.see(one)
        scored = {p: [*s] for p, s in enumerate(history[i]) if all(map(math.isfinite, s))}
        if len(scored) < 3:
            assert readings == before
            continue
        valid.append((i, scored))
        if len(valid) < window:
            assert readings == {}
            continue
        newest = valid[-window:]
        shared = set.intersection(*(set(scores) for _, scores in newest))
        now: ByPrompt = {
            p: [math.fsum(s[p][k] for _, s in newest) / window for k in (0, 1)] for p in shared
        }
        best = best or ([k for k, _ in newest], now)
        common = sorted(shared & set(best[1]))
        if len(common) < 2:
            assert readings == before
            continue
        moved = math.fsum(now[p][0] - best[1][p][0] for p in common) / len(common)
        reading = readings["sign_colour"]
        if abs(moved) < 1e-9:  # rounding decides which window is the best
            best = ([], now) if reading.best_iteration == i else best
        elif moved > 0:
            best = ([k for k, _ in newest], now)
        if best[0]:
            assert (reading.best_from, reading.best_iteration) == (best[0][0], best[0][-1])
        assert reading.now == pytest.approx(math.fsum(now[p][0] for p in common) / len(common))
        assert reading.now - reading.best == pytest.approx(min(moved, 0), abs=1e-9)
        if moved < 0:
            falls = [best[1][p][0] - now[p][0] for p in common]
            error = float(np.std(falls, ddof=1)) / math.sqrt(len(common))
            assert reading.error == pytest.approx(error, abs=1e-9)
        assert watch.protected == {reading.best_iteration}


# --- what is written and said


def test_the_row_of_an_evaluation_holds_what_the_watch_needs():
    """Two work units, in order; six digits of each score, and only of watched rewards."""
    spec = spec_of()

    def unit(ocr: list[float], colour: list[float]) -> Scores:
        arrays = {"ocr": np.array(ocr, np.float32), "sign_colour": np.array(colour, np.float32)}
        return Scores(arrays, arrays["ocr"])

    units = [unit([0.25, NAN], [0.123456789, 1.0]), unit([1.0], [1234567.0])]
    prompts = [Prompt("red")] * 3
    made = eval_row(spec, 7, units, prompts)
    assert made["per_prompt"] == {
        "total": [0.25, pytest.approx(NAN, nan_ok=True), 1.0],
        "rewards": {"sign_colour": [0.123457, 1.0, 1234570.0]},
    }
    assert (made["kind"], made["iteration"], made["prompts"]) == ("eval", 7, 3)
    assert made["reward"] == made["rewards"]["ocr"] == {"mean": 0.625, "std": 0.375}
    assert made["unscored"] == {"ocr": 1, "sign_colour": 0}
    unwatched = load_spec("tiny-ocr", ["rewards={ocr: {}, sign_colour: {}}"])
    assert "per_prompt" not in eval_row(unwatched, 7, units, prompts)


def test_a_watched_reward_of_one_prompt_set_is_compared_over_its_own_prompts():
    """Of ten prompts it scores four, so four of four, and not four of ten, speak for all."""
    spec = spec_of()
    asked = np.arange(10) < 4
    prompts = [Prompt("red", {}, "first" if of else "second") for of in asked]
    watch = Watch(spec)
    for iteration, level in enumerate((0.9, 0.1)):
        colours = np.where(asked, level + np.arange(10) / 100, NAN).astype(np.float32)
        scores = {"ocr": np.ones(10, np.float32), "sign_colour": colours}
        found = Scores(scores, scores["ocr"], asked={"sign_colour": asked})
        made = eval_row(spec, iteration, [found], prompts)
        assert made["unscored"] == {"ocr": 0, "sign_colour": 0}
        assert made["sets"]["second"].keys() == {"ocr"}
        shown = {"ocr of first": 1.0, "ocr of second": 1.0}
        assert means_by_set(made) == shown, "the colour is that of one set, shown as it is"
        watch.see(made)
    assert watch.readings["sign_colour"].diverging


def reading_of(**changes: Any) -> Reading:
    plain = {
        "best": 0.969,
        "now": 0.931,
        "error": 0.004,
        "std": 0.02,
        "best_from": 20,
        "best_iteration": 30,
        "trained_best": 0.71,
        "trained_now": 0.95,
        "diverging": True,
    }
    return Reading(**{**plain, **changes})


def test_a_reading_goes_through_a_row_and_back():
    reading = reading_of()
    one = json.loads(json.dumps({"watch": {"sign_colour": reading.as_json()}}))
    assert readings_of(one) == {"sign_colour": reading}
    assert readings_of({"kind": "eval"}) == {}
    partial = asdict(reading)
    del partial["error"]
    assert readings_of({"watch": {"sign_colour": partial}}) == {}


def test_the_message():
    says = describe("sign_colour", reading_of())
    assert says == (
        "sign_colour fell from 0.969 (iterations 20-30) to 0.931 on held-out prompts while the "
        "trained reward went from 0.71 to 0.95: over-optimization"
    )
    assert "(iteration 30)" in describe("sign_colour", reading_of(best_from=30))
    assert str(Divergence(says, None)) == f"{says}. No checkpoint is from before"
    assert str(Divergence(says, "flowgrpo-ray export x")).endswith(
        ": over-optimization. The model from before is written by\n  flowgrpo-ray export x"
    )


def test_the_command_names_the_newest_checkpoint_up_to_the_best_window(tmp_path: Path):
    run = tmp_path / "my runs" / "tiny"
    assert export_of_best(run, reading_of()) is None
    for iteration in (25, 28, 31):
        (run / "checkpoints" / f"iteration-{iteration:06d}").mkdir(parents=True)
    command = f"flowgrpo-ray export '{run}' --iteration 28 --out tiny-before"
    assert export_of_best(run, reading_of()) == command
    assert export_of_best(run, reading_of(best_iteration=24)) is None


def test_the_message_has_digits_enough_to_tell_two_numbers_apart():
    says = describe("x", reading_of(best=21.334, now=21.2898, trained_best=1, trained_now=1))
    assert "fell from 21.33 (" in says
    assert "to 21.29 on held-out" in says
