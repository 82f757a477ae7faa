"""May a reward be trained on: the pictures, the verdicts on good and bad rewards, the command."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowgrpo_ray.common.errors import RewardError, SpecError
from flowgrpo_ray.rewards import build
from flowgrpo_ray.rewards.calibration import (
    CHEATS,
    CLEAN,
    KINDS,
    PROMPTS,
    REPEATED,
    WORSE,
    Picture,
    Report,
    calibration_set,
    check_reward,
)
from flowgrpo_ray.rewards.sign_colour import SignColourReward
from flowgrpo_ray.rewards.signs import COLOURS, colour_error, parse_prompt, render_plain

SMALL = (32, 48)
PICTURES = calibration_set(SMALL)
GOOD = dict(zip(KINDS, (1.0, 0.0, 0.0, 0.125, 0.25, 0.5, 1.0, 0.75, 0.5, 0.25), strict=True))
LESS = (*WORSE, *CHEATS)


class ByKind:
    """Knows each picture, and scores it by ``score(kind, prompt's number, call's number)``."""

    def __init__(self, score: Callable[[str, int, int], float]) -> None:
        prompts = list(dict.fromkeys(p.prompt for p in PICTURES))
        self.known = {(p.prompt, p.image.tobytes()): p.kind for p in PICTURES}
        self.place, self.score, self.calls = prompts.index, score, itertools.count()

    def __call__(self, images, prompts, metadata):
        assert not images.flags.writeable
        assert list(metadata) == [{}] * len(prompts)
        call = next(self.calls)
        scores = [
            self.score(self.known[prompt, image.tobytes()], self.place(prompt), call)
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return np.array(scores, np.float32)


def judged(score: Callable[[str, int, int], float], **options: bool) -> Report:
    return check_reward(ByKind(score), PICTURES, **options)


def codes(report: Report, fails: bool) -> list[str]:
    return [finding.code for finding in report.findings if finding.fails == fails]


def orders(report: Report) -> dict[str, str]:
    return {found.kind: found.order for found in report.comparisons}


def counts(report: Report, kind: str) -> tuple[int, int, int]:
    (found,) = [found for found in report.comparisons if found.kind == kind]
    return found.worse, found.equal, found.better


# --- the pictures


@pytest.mark.parametrize("size", [SMALL, (256, 256), (40, 200)])
def test_a_picture_of_every_kind_for_every_prompt(size: tuple[int, int]):
    pictures = calibration_set(size)
    assert [p.kind for p in pictures] == list(KINDS) * PROMPTS
    assert all(p.image.shape == (*size, 3) and p.image.dtype == np.uint8 for p in pictures)
    assert len({p.prompt for p in pictures}) == PROMPTS
    for start in range(0, len(pictures), len(KINDS)):
        row = pictures[start : start + len(KINDS)]
        assert len({p.prompt for p in row}) == 1
        assert len({p.image.tobytes() for p in row}) == len(KINDS)
    again = calibration_set(size)
    assert all((a.image == b.image).all() for a, b in zip(pictures, again, strict=True))


def test_what_the_kinds_show():
    by_kind = {kind: [p for p in PICTURES if p.kind == kind] for kind in KINDS}
    clean = {parse_prompt(p.prompt): p.image.tobytes() for p in by_kind[CLEAN]}
    for wrong, other, right in zip(
        by_kind["wrong text"], by_kind["other prompt"], by_kind[CLEAN], strict=True
    ):
        text, colour = parse_prompt(right.prompt)
        (shown,) = [key for key, image in clean.items() if image == other.image.tobytes()]
        assert shown[0] != text
        assert shown[1] != colour
        assert colour_error(right.image, colour) == 0
        assert colour_error(wrong.image, colour) == 0
        digits = [f"{number:03d}" for number in range(1000)]
        (read,) = [d for d in digits if (render_plain(d, colour) == wrong.image).all()]
        assert all(a != b for a, b in zip(read, text, strict=True))


def test_plain_signs_keep_their_digits_inside_at_any_size():
    for size in (SMALL, (33, 200), (256, 256), (512, 512), (300, 60)):
        for text in ("407", "407 407", "8"):
            image = render_plain(text, "pink", size)
            ink = (image != COLOURS["pink"]).any(axis=2)
            assert ink.any()
            assert not ink[: size[0] // 8].any()
            assert not ink[-(size[0] // 8) :].any()
            columns = np.flatnonzero(ink.any(axis=0))
            assert abs(columns[0] - (size[1] - 1 - columns[-1])) <= 0.06 * size[1], "centred"


@pytest.mark.parametrize("size", [(31, 48), (32, 47), (0, 0), (-64, 64)])
def test_too_small_a_picture_is_refused(size: tuple[int, int]):
    with pytest.raises(SpecError, match="at least 32 x 48"):
        calibration_set(size)


# --- rewards of the package


@pytest.mark.parametrize(
    ("detect", "size", "prompts"), [(False, SMALL, PROMPTS), (True, (256, 256), 3)]
)
def test_the_ocr_reward_passes(detect: bool, size: tuple[int, int], prompts: int):
    pictures = calibration_set(size)[: prompts * len(KINDS)]
    report = check_reward(build("ocr", {"detect": detect}), pictures)
    assert report.passed
    assert {finding.code for finding in report.findings} <= {"paid", "unclear", "some-inverted"}
    assert "paid" in codes(report, fails=False), "it ignores extra text"
    assert {kind: orders(report)[kind] for kind in WORSE} == dict.fromkeys(WORSE, "worse")
    assert all(counts(report, kind) == (prompts, 0, 0) for kind in WORSE)
    for kind in (REPEATED, "longer word"):
        assert counts(report, kind) == (0, prompts, 0)
    assert (report.clean, report.minimum, report.maximum) == (1, 0, 1)
    assert report.repeat_difference == report.alone_difference == 0
    assert report.first_call_s > 0
    assert report.alone_s > 0
    assert report.batch_s > 0


def test_the_ocr_reward_pays_for_no_extra_text_where_that_is_penalised():
    report = check_reward(build("ocr", {"detect": False, "extra": "penalise"}), PICTURES)
    assert report.passed
    assert orders(report) == dict.fromkeys(KINDS[1:], "worse")
    assert report.findings == ()


def test_the_colour_reward_passes_and_cannot_tell_texts():
    report = check_reward(SignColourReward(), PICTURES)
    assert report.passed
    same = dict.fromkeys(("wrong text", REPEATED, *CHEATS[:2]), "no difference")
    assert orders(report) == {**dict.fromkeys(LESS, "worse"), **same}
    assert [(note.code, note.text) for note in report.findings] == [
        ("no-difference", "no difference between clean and wrong text"),
        *(("paid", f"{kind} is paid as clean is: training may find it") for kind in CHEATS[:2]),
    ]


# --- orderings by hand


def test_a_good_reward_by_hand():
    report = judged(lambda kind, *_: GOOD[kind])
    assert report.passed
    assert report.findings == ()
    assert [(found.kind, found.mean) for found in report.comparisons] == list(GOOD.items())[1:]
    assert (report.pictures, report.unscored, report.clean) == (80, 0, 1)
    values = list(GOOD.values())
    assert (report.minimum, report.maximum) == (0, 1)
    assert report.mean == pytest.approx(np.mean(values))
    assert report.std == pytest.approx(np.std(values))


@pytest.mark.parametrize(
    ("leads", "order", "numbers"),
    [
        # 8 prompts; the mean must exceed 2.5 standard errors, s / sqrt(8)
        ([1] * 8, "worse", (8, 0, 0)),
        ([-1] * 8, "better", (0, 0, 8)),
        ([0] * 8, "no difference", (0, 8, 0)),
        ([1, -1] * 4, "unclear", (4, 0, 4)),
        ([1] * 4 + [0] * 4, "worse", (4, 4, 0)),  # 0.5 against 2.5 x 0.189
        ([1] * 3 + [0] * 5, "unclear", (3, 5, 0)),  # 0.375 against 2.5 x 0.183
        ([1] * 7 + [-1], "worse", (7, 0, 1)),  # 0.75 against 2.5 x 0.25
        ([-1] * 7 + [1], "better", (1, 0, 7)),
        ([1e-9] * 8, "no difference", (0, 8, 0)),  # below float32
    ],
)
def test_the_order_of_a_pair_by_hand(leads: list[float], order: str, numbers: tuple[int, int, int]):
    def score(kind: str, place: int, call: int) -> float:
        return 2 - leads[place] if kind == "wrong text" else 2 * GOOD[kind]

    report = judged(score)
    assert orders(report)["wrong text"] == order
    assert counts(report, "wrong text") == numbers
    assert {found.order for found in report.comparisons[:3]} == {"worse"}
    assert codes(report, fails=True) == (["inverted"] if order == "better" else [])
    (*notes,) = codes(report, fails=False)
    wanted = {"unclear": ["unclear"], "no difference": ["no-difference"]}.get(order, [])
    assert notes == (["some-inverted"] if numbers == (7, 0, 1) else wanted)


def test_a_penalty_is_judged_the_other_way_round():
    report = judged(lambda kind, *_: -GOOD[kind], lower_is_better=True)
    assert report.passed
    assert set(orders(report).values()) == {"worse", "no difference"}
    assert (report.clean, report.minimum) == (-1, -1), "shown as they are"


# --- bad rewards


def test_a_constant_reward_makes_no_distinction():
    report = judged(lambda *_: 0.5)
    assert codes(report, fails=True) == ["no-distinction"]
    assert set(orders(report).values()) == {"no difference"}


def test_an_inverted_reward_is_found_for_every_kind():
    report = judged(lambda kind, *_: 1 - GOOD[kind])
    assert codes(report, fails=True) == ["inverted"] * len(WORSE) + ["repeats"] * len(CHEATS)
    assert [finding.text for finding in report.findings] == [
        f"{kind} ranks above clean, for 8 of 8 prompts" for kind in LESS
    ]


def test_one_inverted_kind_is_enough():
    report = judged(lambda kind, *_: 1.5 if kind == "blank white" else GOOD[kind])
    assert [finding.text for finding in report.findings] == [
        "blank white ranks above clean, for 8 of 8 prompts"
    ]
    assert not report.passed


def test_a_random_reward_disagrees_with_itself():
    rng = np.random.default_rng(0)
    report = judged(lambda *_: rng.random())
    assert "unsteady" in codes(report, fails=True)
    assert 0.5 < report.repeat_difference < 1


def test_noise_beside_a_good_reward_is_no_distinction_lost():
    """1% of the range is a note, 10% a failure."""
    for jitter, fails in ((0.01, False), (0.1, True)):
        report = judged(lambda kind, place, call, j=jitter: GOOD[kind] + j * (call == 1))
        assert report.repeat_difference == pytest.approx(jitter)
        assert set(codes(report, fails=fails)) == {"unsteady", "batch"}
        assert codes(report, fails=not fails) == []
        assert orders(report)[REPEATED] == "no difference"


def test_a_reward_that_looks_at_its_neighbours():
    class Centred(ByKind):
        def __call__(self, images, prompts, metadata):
            scores = super().__call__(images, prompts, metadata)
            return scores - scores.mean()

    report = check_reward(Centred(lambda kind, *_: GOOD[kind]), PICTURES)
    assert codes(report, fails=True) == ["batch"]
    assert report.repeat_difference == 0


@pytest.mark.parametrize("nothing", [math.nan, math.inf])
def test_no_score_for_a_clean_picture(nothing: float):
    report = judged(lambda kind, place, _: nothing if (kind, place) == (CLEAN, 2) else GOOD[kind])
    (failure,) = report.findings
    assert failure.text == "no score (NaN or infinite) for 1 of 8 clean pictures"
    assert (failure.code, report.unscored, report.clean) == ("clean-unscored", 1, 1)
    assert counts(report, "noise") == (7, 0, 0)


def test_no_score_at_all():
    report = judged(lambda *_: math.nan)
    assert codes(report, fails=True) == ["clean-unscored"]
    assert set(orders(report).values()) == {"no score"}
    assert (report.mean, report.std, report.clean, report.unscored) == (None, None, None, 80)


def test_no_score_for_worse_pictures_is_a_note():
    report = judged(lambda kind, *_: math.nan if kind == "noise" else GOOD[kind])
    assert report.passed
    assert codes(report, fails=False) == ["unscored"]
    assert report.unscored == 8


def test_a_score_that_comes_and_goes():
    report = judged(lambda kind, place, call: math.nan if call == 1 and not place else GOOD[kind])
    assert "unsteady" in codes(report, fails=True)
    assert math.isinf(report.repeat_difference)


def test_a_reward_that_favours_repeated_text():
    report = judged(lambda kind, *_: 1.25 if kind == REPEATED else GOOD[kind])
    (failure,) = report.findings
    assert (failure.code, failure.fails) == ("repeats", True)
    assert failure.text == "text twice ranks above clean, for 8 of 8 prompts"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda n: [0.0] * n, "not list"),
        (np.zeros, r"float32 \[80\], not float64 \[80\]"),
        (lambda n: np.zeros((n, 1), np.float32), r"not float32 \[80, 1\]"),
    ],
)
def test_what_is_no_array_of_scores_is_an_error(answer: Callable[[int], object], said: str):
    def reward(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[object]) -> object:
        return answer(len(images))

    with pytest.raises(RewardError, match=said):
        check_reward(reward, PICTURES)  # type: ignore[arg-type]


def test_pictures_are_plain_tuples():
    kind, prompt, image = PICTURES[0]
    assert Picture(kind, prompt, image) == PICTURES[0]


# --- the command


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, command_line: Any, tmp_path: Path):
    """``check("tiny-ocr") -> (status, stdout, stderr)`` of ``flowgrpo-ray rewards check``."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("COLUMNS", "100"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_rewards", raising=False)
    (tmp_path / "bad_rewards.py").write_text(
        "import numpy as np\n"
        "class Constant:\n"
        "    def __init__(self, value=0.5): self.value = value\n"
        "    def __call__(self, images, prompts, metadata):\n"
        "        return np.full(len(images), self.value, np.float32)\n"
        "class Untyped(Constant):\n"
        "    def __call__(self, images, prompts, metadata): return None\n"
    )

    def call(*arguments: str) -> tuple[int, str, str]:
        status, out, err = command_line("rewards", "check", *arguments)
        return status, out, " ".join(err.split())

    return call


def test_the_rewards_of_a_recipe_pass(check):
    status, out, _ = check("tiny-ocr")
    assert status == 0
    assert "ocr passes: 80 pictures of 32 x 48" in out
    assert "sign_colour (only watched) passes" in out
    assert "note: no difference between clean and wrong text" in out
    assert "note: longer word is paid as clean is" in out
    assert "FAILS" not in out


def test_json_holds_all_of_it(check):
    status, out, _ = check("sign_colour", "--size", "40", "64", "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["passed"], found["size"]) == (True, [40, 64])
    row = found["rewards"]["sign_colour"]
    assert row["comparisons"][0]["kind"] == "blank grey"
    assert (row["comparisons"][0]["worse"], row["clean"]) == (8, 1)
    assert row["findings"][0]["code"] == "no-difference"


def test_a_broken_reward_fails_by_its_import_path(check):
    status, out, _ = check("bad_rewards:Constant", "--size", "32", "48", "--option", "value=1e-3")
    assert status == 1
    assert "bad_rewards:Constant fails" in out
    assert "FAILS: no distinction" in out
    assert "mean 0.001" in out, "the option was given"
    status, out, _ = check("bad_rewards:Constant", "--option", "value=.nan", "--json")
    assert status == 1
    row = json.loads(out)["rewards"]["bad_rewards:Constant"]
    assert (row["passed"], row["mean"]) == (False, None)


@pytest.mark.parametrize(("weight", "status"), [(0, 0), (1, 1), (-1, 1)])
def test_a_watched_reward_may_fail(check, weight: int, status: int):
    flat = f"flat: {{reward: 'bad_rewards:Constant', weight: {weight}}}"
    found, out, _ = check("tiny-ocr", "--set", f"rewards={{sign_colour: {{}}, {flat}}}")
    assert found == status
    assert "FAILS: no distinction" in out
    assert ("(lower is better)" in out) == (weight < 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["oct"], "'oct' is neither a file, nor a recipe, nor a reward; did you mean 'ocr'?"),
        (["no.yaml"], "'no.yaml' is neither a file"),
        (["bad_rewards:Nothing"], "has no class 'Nothing'"),
        (["nowhere:Class"], "cannot import 'nowhere'"),
        (["bad_rewards:Untyped", "--size", "32", "48"], "reward 'bad_rewards:Untyped': it must"),
        (["geneval"], "reward 'geneval' cannot be checked: it does not score prompts such as"),
        (["ocr", "--option", "detct=true"], "did you mean 'detect'"),
        (["ocr", "--option", "detect"], "--option 'detect': write it as key=value"),
        (["ocr", "--option", "detect={"], "--option 'detect={': not YAML"),
        (["ocr", "--set", "seed=1"], "--set is for a spec"),
        (["tiny-ocr", "--option", "detect=true"], "--set rewards.NAME.options.KEY=VALUE"),
        (["tiny-ocr", "--set", "sed=1"], "did you mean 'seed'"),
        (["ocr", "--size", "16", "16"], "at least 32 x 48"),
        (["ocr", "--size", "16"], "--size"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(check, arguments: list[str], message: str):
    status, out, err = check(*arguments)
    assert status == 2
    assert message in err
    assert "Traceback" not in out + err
