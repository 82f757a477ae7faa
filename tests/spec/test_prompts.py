"""Prompt files, and the plan of an iteration: pure, complete, in whole groups."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrpo_ray.common.errors import PromptError
from flowgrpo_ray.common.types import Noising, WorkUnit
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.plan import (
    Block,
    most_groups,
    plan_encoding,
    plan_evaluation,
    plan_iteration,
    plan_refill,
    progressive_start,
)
from flowgrpo_ray.spec.prompts import (
    Prompt,
    load_prompt_sets,
    load_prompts,
    prompts_digest,
    set_sizes,
)
from flowgrpo_ray.spec.sampling import ProgressiveWindow
from flowgrpo_ray.spec.sections import PromptSet
from flowgrpo_ray.spec.training import TrainingSpec

PROMPTS = 40  # in the training set


def make_spec(seed=0, updates=1, **sampling: object) -> TrainingSpec:
    merged = {
        "size": [32, 48],
        "steps": 6,
        "eta": 0.8,
        "window": {"kind": "random", "length": 2, "within": [0, 4]},
        "group_size": 4,
        "groups": 4,
        "micro_batch": 4,
    } | sampling
    return load_spec(
        "tiny-ocr",
        [f"seed={seed}", f"objective.updates={updates}", f"sampling={json.dumps(merged)}"],
    )


def sigmas(steps: int) -> tuple[float, ...]:
    return tuple(1 - i / steps for i in range(steps + 1))


def plan(spec: TrainingSpec, iteration: int = 1):
    return plan_iteration(spec, iteration, PROMPTS, sigmas(spec.sampling.steps))


@st.composite
def specs(draw: st.DrawFn) -> TrainingSpec:
    """Any spec that is valid: micro-batches that part a group, hold one or several, or straddle."""
    part, group_size = draw(
        st.sampled_from([(1, 3), (2, 4), (4, 4), (8, 4), (6, 2), (5, 5), (3, 4), (6, 4), (5, 2)])
    )
    groups_per_block = math.lcm(part, group_size) // group_size
    updates = draw(st.integers(1, 3))
    groups = groups_per_block * updates * draw(st.integers(1, 2))
    steps = draw(st.integers(2, 9))
    first = draw(st.integers(0, steps - 2))
    end = draw(st.integers(first + 1, steps - 1))
    length = draw(st.integers(1, end - first))
    moving = {"kind": "progressive", "length": length, "start": first}
    moving |= {"stride": draw(st.integers(1, 4)), "iterations": draw(st.integers(1, 4))}
    window = draw(
        st.sampled_from(
            [
                {"kind": "all"},
                {"kind": "random", "length": length, "within": [first, end]},
                moving | {"roll_back": draw(st.booleans())},
            ]
        )
    )
    return make_spec(
        seed=draw(st.integers(0, 5)),
        updates=updates,
        group_size=group_size,
        groups=groups,
        micro_batch=part,
        steps=steps,
        window=window,
    )


def assert_whole_groups(block: Block, group_size: int) -> None:
    prompts = [prompt for unit in block for prompt in unit.prompts]
    assert {prompts.count(p) for p in prompts} == {group_size}


@settings(max_examples=60, deadline=None)
@given(spec=specs(), iteration=st.integers(0, 1000))
def test_plan_tiles_the_iteration(spec: TrainingSpec, iteration: int):
    """Every (prompt, sample) pair once, in units of one micro-batch, in blocks of whole groups."""
    sampling, found = spec.sampling, plan(spec, iteration)
    pairs = [pair for u in found.units for pair in zip(u.prompts, u.samples, strict=True)]
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    assert len(prompts) == sampling.groups
    assert all(0 <= prompt < PROMPTS for prompt in prompts)
    assert pairs == [(p, sample) for p in prompts for sample in range(sampling.group_size)]
    assert [u.index for u in found.units] == list(range(sampling.units))
    assert {u.batch for u in found.units} == {sampling.micro_batch}
    assert {(u.seed, u.stream, u.iteration) for u in found.units} == {
        (spec.seed, "train", iteration)
    }
    assert {len(block) for block in found.blocks} == {sampling.units_per_block}
    for block in found.blocks:
        assert_whole_groups(block, sampling.group_size)
        for fewer in range(1, len(block)):  # the fewest units that do
            with pytest.raises(AssertionError):
                assert_whole_groups(block[:fewer], sampling.group_size)
    assert [u for update in found.updates for u in update.units] == found.units
    assert len(found.updates) == spec.objective.updates
    assert len({len(list(update.units)) for update in found.updates}) == 1


@settings(max_examples=60, deadline=None)
@given(spec=specs(), iteration=st.integers(0, 1000))
def test_window_is_whole_and_inside(spec: TrainingSpec, iteration: int):
    """One schedule for the iteration: ``eta`` on the window's steps, exactly 0 on all others."""
    found = plan(spec, iteration)
    assert {unit.schedule for unit in found.units} == {found.schedule}
    schedule, window = found.schedule, spec.sampling.window
    assert schedule.kernel == spec.sampling.kernel
    assert schedule.likelihood == spec.sampling.likelihood
    assert schedule.sigma == sigmas(spec.sampling.steps)
    steps = schedule.stochastic_steps
    assert len(steps) == spec.sampling.trained_steps
    if window.kind == "all":
        assert steps == range(spec.sampling.steps - 1)
    elif window.kind == "random":
        assert len(steps) == window.length
        assert window.within[0] <= steps.start < steps.stop <= window.within[1]
    else:
        assert len(steps) == window.length
        assert window.start <= steps.start < steps.stop <= spec.sampling.steps - 1
    assert schedule.eta == tuple(0.8 if i in steps else 0.0 for i in range(schedule.steps))


def test_every_window_start_is_reached():
    spec = make_spec(steps=8, window={"kind": "random", "length": 2, "within": [1, 6]})
    starts = [plan(spec, i).schedule.stochastic_steps.start for i in range(400)]
    assert set(starts) == {1, 2, 3, 4}
    assert min(starts.count(start) for start in set(starts)) > 60  # about 100 each


def progressive_starts(window: ProgressiveWindow, steps: int, iterations: int) -> list[int]:
    return [progressive_start(window, steps, i) for i in range(1, iterations + 1)]


def moving(**settings: int | bool) -> ProgressiveWindow:
    return ProgressiveWindow(kind="progressive", **settings)  # type: ignore[arg-type]


def test_progressive_window_by_hand():
    """10 steps: the last window of 3 is [6, 9), whatever the stride."""
    plain = moving(length=3, stride=2, iterations=2)
    assert progressive_starts(plain, 10, 12) == [0, 0, 2, 2, 4, 4, 6, 6, 6, 6, 6, 6]
    overshooting = moving(length=3, start=1, stride=4, iterations=1)
    assert progressive_starts(overshooting, 10, 5) == [1, 5, 6, 6, 6]
    back = moving(length=3, start=1, stride=4, iterations=1, roll_back=True)
    assert progressive_starts(back, 10, 7) == [1, 5, 6, 1, 5, 6, 1]
    fixed = moving(length=9, iterations=1, roll_back=True)
    assert progressive_starts(fixed, 10, 3) == [0, 0, 0]
    assert progressive_start(plain, 10, 0) == 0  # the ratio floor is measured as in iteration 1


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_progressive_window_moves_by_its_stride_to_the_last_step(data: st.DataObject):
    """It never shrinks: a last position that would not fit begins earlier instead."""
    steps = data.draw(st.integers(2, 20), "steps")
    length = data.draw(st.integers(1, steps - 1), "length")
    start = data.draw(st.integers(0, steps - 1 - length), "start")
    stride = data.draw(st.integers(1, steps), "stride")
    iterations = data.draw(st.integers(1, 5), "iterations")
    roll_back = data.draw(st.booleans(), "roll_back")
    window = moving(
        length=length, start=start, stride=stride, iterations=iterations, roll_back=roll_back
    )
    last = steps - 1 - length
    regular = [at for at in range(start, last + 1, stride) if at != last]
    positions = [*regular, last]
    period = len(positions) * iterations
    once = progressive_starts(window, steps, period)
    assert once == [at for at in positions for _ in range(iterations)]
    again = [progressive_start(window, steps, period + i) for i in range(1, period + 1)]
    assert again == (once if roll_back else [last] * period)


def test_plan_is_pure():
    """Asked twice, or in another order, an iteration's plan is the same: a resumed run needs it."""
    forward = [plan(make_spec(), i) for i in range(1, 6)]
    backward = [plan(make_spec(), i) for i in range(5, 0, -1)][::-1]
    assert forward == backward
    assert len({p.units[0].prompts + p.units[-1].prompts for p in forward}) > 1
    assert plan(make_spec(seed=1), 1).units != forward[0].units


def test_batching_and_updates_do_not_change_what_is_sampled():
    """Prompts, pairs and window depend on seed and iteration, not on how the work is cut."""

    def drawn(**settings: int):
        found = plan(make_spec(**settings), 3)
        pairs = [p for u in found.units for p in zip(u.prompts, u.samples, strict=True)]
        return pairs, found.schedule

    whole = drawn(micro_batch=4)
    assert drawn(micro_batch=2) == drawn(micro_batch=8, updates=2) == drawn(micro_batch=16) == whole
    assert drawn(micro_batch=3, groups=6) == drawn(micro_batch=6, groups=6)  # these straddle


# --- several prompt sets


def with_sets(spec: TrainingSpec, *weights: float) -> TrainingSpec:
    sets = tuple(
        PromptSet(name=f"s{i}", file=f"{i}.txt", evaluate=f"{i}.txt", weight=weight)
        for i, weight in enumerate(weights)
    )
    prompts = spec.prompts.model_copy(update={"train": sets, "evaluate": None})
    return spec.model_copy(update={"prompts": prompts})


@settings(max_examples=60, deadline=None)
@given(
    spec=specs(),
    iteration=st.integers(0, 1000),
    weights=st.lists(st.sampled_from([1e-3, 0.1, 1 / 3, 1.0, 2.0, 7.0]), min_size=2, max_size=4),
    data=st.data(),
)
def test_each_set_gives_its_share_and_gets_its_own_in_place_of_flat_groups(
    spec: TrainingSpec, iteration: int, weights: list[float], data: st.DataObject
):
    groups, spec = spec.sampling.groups, with_sets(spec, *weights)
    most = most_groups(spec)
    sizes = [data.draw(st.integers(count, count + 20)) for count in most.values()]
    begins = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    def counts(units: Iterable[WorkUnit]) -> list[int]:
        prompts = {prompt for unit in units for prompt in unit.prompts}
        return [sum(b <= p < e for p in prompts) for b, e in itertools.pairwise(begins)]

    found = plan_iteration(spec, iteration, sizes, sigmas(spec.sampling.steps))
    shares = [groups * weight / sum(weights) for weight in weights]
    for count, share in zip(counts(found.units), shares, strict=True):
        assert math.floor(share + 1e-9) <= count <= math.ceil(share - 1e-9)
    assert sum(counts(found.units)) == groups
    used = list(dict.fromkeys(prompt for unit in found.units for prompt in unit.prompts))
    flat = data.draw(st.lists(st.sampled_from(used), unique=True, min_size=1))
    blocks = plan_refill(spec, found, sizes, used, flat)
    refilled = counts(unit for block in blocks for unit in block)
    left = [size - count for size, count in zip(sizes, counts(found.units), strict=True)]
    of_flat = [sum(b <= p < e for p in flat) for b, e in itertools.pairwise(begins)]
    spare = [have - want for have, want in zip(left, of_flat, strict=True)]
    if min(spare) >= spec.sampling.groups_per_block:
        assert all(got >= want for got, want in zip(refilled, of_flat, strict=True))
        assert sum(refilled) < len(flat) + spec.sampling.groups_per_block
    assert all(got <= have for got, have in zip(refilled, left, strict=True))


def test_over_iterations_a_set_gives_exactly_its_share():
    """4 groups at weights 1 and 0.17: 0.58 of the second set in the mean."""
    spec = with_sets(make_spec(), 1, 0.17)
    found = [plan_iteration(spec, i, (40, 40), sigmas(6)) for i in range(1, 1001)]
    seconds = [len({p for u in plan.units for p in u.prompts if p >= 40}) for plan in found]
    assert set(seconds) == {0, 1}
    assert sum(seconds) / 1000 == pytest.approx(4 * 0.17 / 1.17, abs=0.03)
    assert len({tuple(u.prompts for u in plan.units) for plan in found}) == 1000
    places = {plan.units[i].prompts[0] >= 40 for plan in found for i in range(4)}
    assert places == {False, True}, "anywhere in the order of accumulation"


def test_sets_are_loaded_checked_and_held_out_in_turn(tmp_path: Path):
    for name, lines in {
        "a": ['"1" a', '"2" a'] * 2,
        "b": ["red b", "blue b"],
        "c": ["pink c"],
    }.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    sets = [
        {"name": "words", "file": f"{tmp_path}/a.txt", "evaluate": f"{tmp_path}/a.txt"},
        {"name": "colours", "file": f"{tmp_path}/b.txt", "evaluate": f"{tmp_path}/c.txt"},
    ]
    rewards = "rewards={ocr: {sets: [words]}, sign_colour: {sets: [colours]}}"
    overrides = [f"prompts={json.dumps({'train': sets})}", rewards]
    spec = load_spec("tiny-ocr", [*overrides, "sampling.groups=4", "evaluation.prompts=3"])
    train, held_out = load_prompt_sets(spec)
    assert [(p.text, p.set) for p in train[3:]] == [
        ('"2" a', "words"),
        ("red b", "colours"),
        ("blue b", "colours"),
    ]
    assert [p.text for p in held_out] == ['"1" a', "pink c", '"2" a', '"1" a']
    assert set_sizes(train) == (4, 2)
    other = [replace(p, set="x") if p.set == "words" else p for p in train]
    assert prompts_digest(other) != prompts_digest(train)

    for change, fragment in {
        "rewards.ocr.sets=null": "prompts.train.1.file: prompt 1, for rewards.ocr",
        "rewards.sign_colour.sets=[words, colours]": "prompts.train.0.file: prompt 1, for",
        "sampling.groups=8": "b.txt' holds 2 prompts; an iteration needs 4",
    }.items():
        with pytest.raises(PromptError, match=re.escape(fragment)):
            load_prompt_sets(load_spec("tiny-ocr", [*overrides, change]))


# --- prompts in place of groups without spread


@settings(max_examples=60, deadline=None)
@given(spec=specs(), iteration=st.integers(0, 1000), data=st.data())
def test_refill_takes_whole_blocks_of_other_prompts(
    spec: TrainingSpec, iteration: int, data: st.DataObject
):
    """As many groups as are to be replaced, rounded up to blocks: or what is left of the set."""
    sampling = spec.sampling
    size = data.draw(st.integers(sampling.groups, PROMPTS), "training set")
    found = plan_iteration(spec, iteration, size, sigmas(sampling.steps))
    used = {prompt for unit in found.units for prompt in unit.prompts}
    groups = data.draw(st.integers(0, sampling.groups), "groups without spread")
    blocks = plan_refill(spec, found, size, used, range(groups))
    per_block = sampling.groups_per_block
    assert len(blocks) == min(math.ceil(groups / per_block), (size - len(used)) // per_block)
    for block in blocks:
        assert len(block) == sampling.units_per_block
        assert_whole_groups(block, sampling.group_size)
    units = [unit for block in blocks for unit in block]
    pairs = [pair for u in units for pair in zip(u.prompts, u.samples, strict=True)]
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    assert set(prompts) <= set(range(size)) - used
    assert pairs == [(p, sample) for p in prompts for sample in range(sampling.group_size)]
    assert [u.index for u in units] == [sampling.units + i for i in range(len(units))]
    assert {(u.seed, u.stream, u.iteration, u.schedule) for u in units} <= {
        (spec.seed, "train", iteration, found.schedule)
    }
    assert plan_refill(spec, found, size, sorted(used, reverse=True), range(groups)) == blocks


def test_refills_go_on_where_the_last_ended():
    """Indices continue and prompts are new, refill after refill, until the set is used up."""
    spec = make_spec(micro_batch=6, groups=6)  # blocks of 3 groups in 2 units
    found = plan_iteration(spec, 1, 13, sigmas(6))
    used = {prompt for unit in found.units for prompt in unit.prompts}
    indices = []
    for groups in (1, 5, 1, 0):
        refill = [u for block in plan_refill(spec, found, 13, used, range(groups)) for u in block]
        indices.append([unit.index for unit in refill])
        used |= {prompt for unit in refill for prompt in unit.prompts}
    assert indices == [[4, 5], [6, 7], [], []]
    assert len(used) == 12


@settings(max_examples=60, deadline=None)
@given(spec=specs(), first=st.integers(1, 50), data=st.data())
def test_prompts_are_encoded_before_they_are_needed(
    spec: TrainingSpec, first: int, data: st.DataObject
):
    """All that an iteration samples, whatever is replaced in it, and never many more."""
    sampling, ahead = spec.sampling, data.draw(st.integers(1, PROMPTS), "ahead")
    size = data.draw(st.integers(sampling.groups, PROMPTS), "training set")
    tries = data.draw(st.integers(0, 2), "refill")
    spec = spec.model_copy(
        update={
            "iterations": first + 9,
            "prompts": spec.prompts.model_copy(update={"encode_ahead": ahead}),
            "advantages": spec.advantages.model_copy(update={"refill": tries}),
        }
    )
    iterations, needed = plan_encoding(spec, first, size)
    assert len(needed) == len(set(needed))
    assert {first, first + sampling.max_lag} <= set(iterations)
    least = sampling.groups * (1 + (1 + tries) * (1 + sampling.max_lag))
    assert len(needed) <= max(ahead, least)
    if size > ahead and iterations[-1] < spec.iterations:
        more = [plan_encoding(spec, later, size)[1] for later in (first, iterations[-1] + 1)]
        assert len({*more[0], *more[1]}) > ahead, "as many as may be"
    for iteration in (0, *iterations):
        found = plan_iteration(spec, iteration, size, sigmas(sampling.steps))
        used = {prompt for unit in found.units for prompt in unit.prompts}
        groups = data.draw(st.integers(0, sampling.groups), "groups without spread")
        for _ in range(tries if iteration else 0):
            blocks = plan_refill(spec, found, size, used, range(groups))
            used |= {p for block in blocks for unit in block for p in unit.prompts}
        assert used <= set(needed)


def test_evaluation_is_constant():
    """Each held-out prompt once, no noise in the steps, and the same for every run."""
    spec = make_spec()
    batch = spec.evaluation.micro_batch
    units = plan_evaluation(spec, batch + 3, sigmas(10))
    assert [prompt for unit in units for prompt in unit.prompts] == list(range(batch + 3))
    assert [unit.batch for unit in units] == [batch, 3]
    assert {sample for unit in units for sample in unit.samples} == {0}
    assert {unit.stream for unit in units} == {"eval"}
    assert {unit.schedule.eta for unit in units} == {(0.0,) * 10}
    assert plan_evaluation(make_spec(seed=5, groups=8), batch + 3, sigmas(10)) == units
    assert {unit.schedule.solver for unit in units} == {"euler"}
    other = spec.evaluation.model_copy(update={"solver": "dpm2"})
    by_other = plan_evaluation(spec.model_copy(update={"evaluation": other}), 3, sigmas(10))
    assert {unit.schedule.solver for unit in by_other} == {"dpm2"}


def test_finished_images_are_planned_without_noise():
    """A point for each noise level; the sampling's own solver, and no stochastic step."""
    spec = load_spec("tiny-ocr-nft")
    found = plan_iteration(spec, 3, 256, sigmas(spec.sampling.steps))
    assert found.schedule.solver == "dpm2"
    assert found.schedule.eta == (0.0,) * 6
    assert found.points == (0, 1)
    assert found.points == tuple(range(spec.points))
    (noising,) = {unit.noising for unit in found.units}
    assert noising == Noising(2, "uniform", (0.4, 1))
    refill = plan_refill(spec, found, 256, {0}, [0])
    assert {unit.noising for block in refill for unit in block} == {noising}


# --- files


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_text_file(tmp_path: Path):
    path = write(tmp_path / "p.txt", 'a sign "1"\n\n  ein Schild “zwei”  \n')
    assert load_prompts(path, "k") == [Prompt('a sign "1"'), Prompt("ein Schild “zwei”")]


def test_jsonl_file_keeps_metadata(tmp_path: Path):
    rows = [{"prompt": "two cats", "include": [{"class": "cat", "count": 2}]}, {"prompt": "b"}]
    path = write(tmp_path / "p.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert load_prompts(path, "k") == [
        Prompt("two cats", {"include": [{"class": "cat", "count": 2}]}),
        Prompt("b", {}),
    ]


def test_jsonl_lines_end_at_line_feeds_only(tmp_path: Path):
    """A JSON string may hold U+2028 or U+0085 as they are; to Python these end a line too."""
    text = "one\u2028two\u0085three"
    path = write(tmp_path / "p.jsonl", json.dumps({"prompt": text}, ensure_ascii=False) + "\n")
    assert load_prompts(path, "k") == [Prompt(text)]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path, name: str):
    """Editors on Windows put one at the start of a UTF-8 file."""
    line = '{"prompt": "red"}' if name.endswith("l") else "red"
    assert load_prompts(write(tmp_path / name, "\ufeff" + line), "k") == [Prompt("red")]


@pytest.mark.parametrize("line", ["not json", '["a"]', '{"text": "a"}', '{"prompt": 3}'])
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str):
    path = write(tmp_path / "p.jsonl", '{"prompt": "a"}\n\n' + line)
    with pytest.raises(PromptError) as caught:
        load_prompts(path, "prompts.train")
    assert "prompts.train" in str(caught.value)
    assert path in str(caught.value)
    assert "line 3 holds no prompt: " in str(caught.value)


def test_a_key_that_stands_twice_is_named(tmp_path: Path):
    """Python's reader would keep the last value, at every depth, without a word."""
    path = write(tmp_path / "p.jsonl", '{"prompt": "a", "include": [{"count": 1, "count": 2}]}')
    with pytest.raises(PromptError, match=r"line 1 holds no prompt: .*the key 'count' more than"):
        load_prompts(path, "prompts.train")


def test_digest_tells_sets_and_orders_apart():
    a, b = Prompt("a", {"n": 1}), Prompt("b")
    assert prompts_digest([a, b]) == prompts_digest([Prompt("a", {"n": 1}), Prompt("b")])
    others = [[b, a], [a], [Prompt("a", {"n": 2}), b], [Prompt("a"), b]]
    assert len({prompts_digest(prompts) for prompts in [[a, b], *others]}) == 5
