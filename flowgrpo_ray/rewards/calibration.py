"""Is a reward fit to train on: scores pictures whose ranking is known, and judges the scores.

The pictures are signs of our own drawing. For each of a few prompts there is the right picture,
`clean`, and one of every other kind, all of which deserve less, or in the case of the repeated
text no more. Some of them are what a model finds out that is trained by a reward which pays for
it: these are no faults of a reward, but it is said which are paid for.

This module needs NumPy and the libraries that draw; it imports neither torch nor ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from flowgrpo_ray.common.errors import FlowGrpoError, RewardError, SpecError, raised
from flowgrpo_ray.rewards import Reward, ask, checked, signs

PROMPTS = 8
MOST_PIXELS = 4096  # of a side: 80 pictures of 48 MB
CLEAN, REPEATED = "clean", "text twice"
WORSE = ("blank grey", "blank white", "noise", "wrong text", "other prompt")
CHEATS = ("longer word", "page of text", "sideways")
KINDS = (CLEAN, *WORSE, REPEATED, *CHEATS)

# A mean difference must exceed so many of its standard errors over the prompts: a reward that does
# not read must not be said to prefer the text that it happens to give more.
STANDARD_ERRORS = 2.5
# Two calls, or a call alone and in a batch, may differ by this part of the range of all scores.
UNSTEADY = 0.05
_ROUNDING = 1e-6  # of float32 scores, relative to the largest

Order = Literal["worse", "no difference", "unclear", "better", "no score"]


class Picture(NamedTuple):
    """One picture of the set, for the prompt that it is scored with."""

    kind: str
    prompt: str
    image: np.ndarray  # uint8 [H, W, 3]


@dataclass(frozen=True)
class Comparison:
    """The pictures of one kind against the clean pictures of the same prompts."""

    kind: str
    mean: float | None  # score; None where no picture of the kind has one
    worse: int  # prompts for which the picture ranks below the clean one
    equal: int
    better: int
    order: Order  # on average over the prompts


@dataclass(frozen=True)
class Finding:
    """What stands out, in words; `code` names it for programs."""

    code: str
    fails: bool  # else it is a note
    text: str


@dataclass(frozen=True)
class Report:
    """All that was measured; None stands for a number that needs scores where there are none."""

    pictures: int
    clean: float | None  # mean score
    comparisons: tuple[Comparison, ...]
    unscored: int
    minimum: float | None
    mean: float | None
    maximum: float | None
    std: float | None
    repeat_difference: float  # largest, between two calls; infinite: a score in one of them only
    alone_difference: float  # largest, between a picture alone and in the batch
    first_call_s: float  # of all pictures; it may load and compile what later calls find ready
    alone_s: float  # mean of calls with one picture
    batch_s: float  # per picture, of the second call with all
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return not any(finding.fails for finding in self.findings)


def calibration_set(size: tuple[int, int]) -> list[Picture]:
    """Pictures of `size` (height, width), one of every kind for each of `PROMPTS` prompts."""
    if size[0] < signs.HEIGHT or size[1] < signs.WIDTH:
        raise SpecError(
            f"pictures of {size[0]} x {size[1]} are too small for legible text: a reward is "
            f"checked with at least {signs.HEIGHT} x {signs.WIDTH} (height, width)"
        )
    if max(size) > MOST_PIXELS:
        raise SpecError(
            f"pictures of {size[0]} x {size[1]}: a reward is checked with up to {MOST_PIXELS} x "
            f"{MOST_PIXELS}"
        )
    prompts = signs.make_prompts(PROMPTS, heldout=True, seed=0)
    pictures: list[Picture] = []
    for index, prompt in enumerate(prompts):
        text, colour = signs.parse_prompt(prompt)
        other, other_colour = signs.parse_prompt(prompts[(index + 3) % PROMPTS])
        images = (
            signs.render_plain(text, colour, size),
            np.full((*size, 3), 128, np.uint8),
            np.full((*size, 3), 255, np.uint8),
            np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8),
            signs.render_plain(_wrong(text), colour, size),
            signs.render_plain(other, other_colour, size),
            signs.render_plain(f"{text} {text}", colour, size),
            signs.render_plain(f"{text}{_wrong(text)[0]}", colour, size),
            _page(text, other, colour, size),
            np.rot90(signs.render_plain(text, colour, (size[1], size[0]))),
        )
        pictures += [
            Picture(kind, prompt, image) for kind, image in zip(KINDS, images, strict=True)
        ]
    return pictures


def _page(text: str, other: str, colour: str, size: tuple[int, int]) -> np.ndarray:
    """Up to four lines, as many as are legible, and the text in the first of them."""
    bands = np.array_split(np.arange(size[0]), min(4, size[0] // signs.HEIGHT))
    lines = [f"{text} {other}", *(f"{other} {_wrong(other)}" for _ in bands[1:])]
    return np.concatenate(
        [
            signs.render_plain(line, colour, (len(rows), size[1]))
            for line, rows in zip(lines, bands, strict=True)
        ]
    )


def _wrong(text: str) -> str:
    """Another number: each digit three further."""
    return "".join(str((int(digit) + 3) % 10) for digit in text)


def check_reward(
    reward: Reward,
    pictures: Sequence[Picture],
    lower_is_better: bool = False,
    with_sources: bool = False,
) -> Report:
    """Scores `pictures` twice together and some alone, and judges what `reward` says of them.

    `lower_is_better`: as in a spec that gives the reward a negative weight. `with_sources`: each is
    shown as an edit of the clean picture of its prompt, which had nothing to change.
    """
    sources = {p.prompt: p.image for p in pictures if with_sources and p.kind == CLEAN}
    first, first_s = _timed(reward, pictures, sources)
    again, batch_s = _timed(reward, pictures, sources)
    indices = _one_of_each_kind(pictures)
    single = [_timed(reward, [pictures[i]], sources) for i in indices]
    alone = np.concatenate([scores for scores, _ in single])
    repeat_difference = _largest_difference(first, again)
    alone_difference = _largest_difference(alone, again[indices])

    finite = first[np.isfinite(first)]
    noise = max(
        repeat_difference, alone_difference, _ROUNDING * float(np.abs(finite).max(initial=0))
    )
    goodness = -first if lower_is_better else first
    kinds = np.array([picture.kind for picture in pictures])
    clean = goodness[kinds == CLEAN]
    comparisons = tuple(
        _compare(kind, first[kinds == kind], clean - goodness[kinds == kind], noise)
        for kind in KINDS[1:]
    )
    spread = float(np.ptp(finite)) if len(finite) else 0.0
    findings = (
        *_judge_clean(clean),
        *_judge_order(comparisons),
        *_judge_steadiness("two calls", "unsteady", repeat_difference, spread),
        *_judge_steadiness("alone and in a batch", "batch", alone_difference, spread),
    )
    return Report(
        pictures=len(pictures),
        clean=_mean(first[kinds == CLEAN]),
        comparisons=comparisons,
        unscored=len(first) - len(finite),
        minimum=float(finite.min()) if len(finite) else None,
        mean=_mean(finite),
        maximum=float(finite.max()) if len(finite) else None,
        std=float(finite.std()) if len(finite) else None,
        repeat_difference=repeat_difference,
        alone_difference=alone_difference,
        first_call_s=first_s,
        alone_s=float(np.mean([seconds for _, seconds in single])),
        batch_s=batch_s / len(pictures),
        findings=findings,
    )


def _timed(
    reward: Reward, pictures: Sequence[Picture], sources_of: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, float]:
    """Scores, float64 [b], and the seconds that they took; `sources_of` prompts, if any."""
    images = np.stack([picture.image for picture in pictures])
    images.flags.writeable = False
    prompts = [picture.prompt for picture in pictures]
    sources = None
    if sources_of:
        sources = np.stack([sources_of[prompt][None] for prompt in prompts])
    started = time.perf_counter()
    try:
        scores = ask(reward, images, prompts, [{} for _ in prompts], sources)
    except FlowGrpoError:
        raise
    except Exception as error:  # it may be the user's code: anything
        raise RewardError(f"it does not score: {raised(error)}") from error
    seconds = time.perf_counter() - started
    try:
        values = checked(scores, len(pictures)).astype(np.float64)
    except TypeError as error:
        raise RewardError(str(error)) from error
    return np.where(np.isfinite(values), values, np.nan), seconds


def _one_of_each_kind(pictures: Sequence[Picture]) -> list[int]:
    """Places in `pictures`: of the first kind its first, of the second its second, and so on."""
    found: list[int] = []
    for rank, kind in enumerate(dict.fromkeys(picture.kind for picture in pictures)):
        places = [i for i, picture in enumerate(pictures) if picture.kind == kind]
        found.append(places[rank % len(places)])
    return found


def _largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    if (np.isnan(a) != np.isnan(b)).any():
        return math.inf
    return float(np.abs(a - b)[~np.isnan(a)].max(initial=0))


def _mean(scores: np.ndarray) -> float | None:
    scores = scores[np.isfinite(scores)]
    return float(scores.mean()) if len(scores) else None


def _compare(kind: str, scores: np.ndarray, leads: np.ndarray, noise: float) -> Comparison:
    """`leads`, one per prompt: how much better the clean picture is; NaN: no score."""
    leads = leads[np.isfinite(leads)]
    worse, better = int((leads > noise).sum()), int((leads < -noise).sum())
    return Comparison(
        kind, _mean(scores), worse, len(leads) - worse - better, better, _order(leads, noise)
    )


def _order(leads: np.ndarray, noise: float) -> Order:
    if len(leads) == 0:
        return "no score"
    mean = float(leads.mean())
    if abs(mean) <= noise:
        return "no difference" if (np.abs(leads) <= noise).all() else "unclear"
    error = float(leads.std(ddof=1)) / math.sqrt(len(leads)) if len(leads) > 1 else 0.0
    if abs(mean) <= STANDARD_ERRORS * error:
        return "unclear"
    return "worse" if mean > 0 else "better"


def _judge_clean(clean: np.ndarray) -> list[Finding]:
    missing = int(np.isnan(clean).sum())
    if not missing:
        return []
    text = f"no score (NaN or infinite) for {missing} of {len(clean)} clean pictures"
    return [Finding("clean-unscored", True, text)]


def _judge_order(comparisons: Sequence[Comparison]) -> list[Finding]:
    findings: list[Finding] = []
    for found in comparisons:
        prompts = found.worse + found.equal + found.better
        if found.order == "better":
            code = "inverted" if found.kind in WORSE else "repeats"
            text = f"{found.kind} ranks above clean, for {found.better} of {prompts} prompts"
            findings.append(Finding(code, True, text))
        elif found.order == "no score":
            text = f"{found.kind} cannot be compared with clean: there are no scores"
            findings.append(Finding("unscored", False, text))
        elif found.order == "unclear":
            text = (
                f"{found.kind} against clean is unclear: worse for {found.worse}, equal for "
                f"{found.equal}, better for {found.better} of {prompts} prompts"
            )
            findings.append(Finding("unclear", False, text))
        elif found.better:
            text = f"{found.kind} ranks above clean for {found.better} of {prompts} prompts"
            findings.append(Finding("some-inverted", False, text))
        elif found.order == "no difference" and found.kind in WORSE:
            text = f"no difference between clean and {found.kind}"
            findings.append(Finding("no-difference", False, text))
        elif found.order == "no difference" and found.kind in CHEATS:
            text = f"{found.kind} is paid as clean is: training may find it"
            findings.append(Finding("paid", False, text))
    orders = {found.order for found in comparisons if found.kind in WORSE}
    if not orders & {"worse", "better"} and orders != {"no score"}:
        text = "no distinction: no kind of worse picture ranks clearly below clean"
        findings.append(Finding("no-distinction", True, text))
    return findings


def _judge_steadiness(what: str, code: str, difference: float, spread: float) -> list[Finding]:
    if difference == 0:
        return []
    if math.isinf(difference):
        text = f"{what} disagree on which pictures have a score"
        return [Finding(code, True, text)]
    fails = difference > UNSTEADY * spread
    text = f"{what} differ by up to {difference:.2g}; the scores' range is {spread:.2g}"
    return [Finding(code, fails, text)]
