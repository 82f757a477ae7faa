"""A judge that compares: which of two images of a prompt is better?

    score = mean over an image's opponents of its probability to win

The probability is that of the digit with which the judge's answer begins, p(1) / (p(1) + p(2)). A
judge may prefer whatever it sees first, so each pair is asked in both orders and the two are
averaged. Opponents are drawn as on a ring: image i meets i+1, i+2, ... i+rounds, and so each image
meets twice as many others as there are rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from flowgrpo_ray.rewards.http import Timeout, check_lengths
from flowgrpo_ray.rewards.judge_client import (
    LIKELIEST,
    Answer,
    ApiKeyEnv,
    Concurrency,
    ImageSize,
    JudgeClient,
    JudgeRetries,
    JudgeUrl,
    Launch,
    ServedModel,
)
from flowgrpo_ray.rewards.vlm_judge import ask, names_in

QUESTION = (
    'Two images were made for the prompt "{prompt}". Which one is better: which shows what the '
    "prompt asks for, and is the better picture? Answer with one digit alone: 1 for the first "
    "image, 2 for the second."
)
OF_EDITS = (
    'A picture was to be changed so: "{prompt}". It is shown first, and then two results are. '
    "Which one is better: which does what was asked, and leaves the rest as it was? Answer with "
    "one digit alone: 1 for the first result, 2 for the second."
)


class PairwiseJudge:
    """Asks which of two images of a group is better; of edits the source images are shown first."""

    over_group = True
    takes_sources = True

    def __init__(
        self,
        question: Annotated[
            str | None,
            Field(
                description="with `{prompt}` and any metadata key in braces; the answer must begin "
                "with 1 or 2. By default which shows the prompt, or did what it asks, better"
            ),
        ] = None,
        rounds: Annotated[int, Field(ge=1, description="an image meets twice as many, or all")] = 3,
        url: JudgeUrl = None,
        launch: Launch = None,
        model: ServedModel = None,
        api_key_env: ApiKeyEnv = None,
        image_size: ImageSize = None,
        concurrency: Concurrency = 16,
        timeout_s: Timeout = 60.0,
        retries: JudgeRetries = 2,
    ) -> None:
        self._question, self._rounds = question, rounds
        self._judge = JudgeClient(
            url=url,
            launch=launch,
            model=model,
            api_key_env=api_key_env,
            image_size=image_size,
            concurrency=concurrency,
            timeout_s=timeout_s,
            max_tokens=1,
            retries=retries,
        )

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        sources: np.ndarray | None = None,
    ) -> np.ndarray:
        """Scores in [0, 1], float32 [b], of the images of one group, uint8 [b, H, W, 3], that all
        changed the same `sources`, [b, n, H, W, 3], if there are any.

        NaN for an image of which no comparison was answered as it should, or that has no opponent.
        RewardError: the judge did not answer.
        """
        check_lengths(images, prompts, metadata)
        meetings = pairs(len(images), self._rounds)
        asked = [*meetings, *(pair[::-1] for pair in meetings)]
        words = self._question or (QUESTION if sources is None else OF_EDITS)
        question = ask(words, prompts[0], metadata[0]) if asked else ""
        before = images[:0] if sources is None else sources[0]
        shown = [np.concatenate([before, images[list(pair)]]) for pair in asked]
        first = self._judge.scores(shown, [question] * len(asked), _first_wins, likeliest=LIKELIEST)
        won, met = np.zeros(len(images)), np.zeros(len(images))
        for (one, other), there, back in zip(
            meetings, first[: len(meetings)], 1 - first[len(meetings) :], strict=True
        ):
            if np.isfinite(chance := (float(there) + float(back)) / 2):
                won[one], won[other] = won[one] + chance, won[other] + 1 - chance
                met[[one, other]] += 1
        return np.where(met > 0, won / np.maximum(met, 1), np.nan).astype(np.float32)

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """ValueError unless it is clear whom to ask, by which name."""
        JudgeClient.check_named(options)

    @staticmethod
    def check_prompt(prompt: str, metadata: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """ValueError for a prompt without a key that the question names."""
        ask(options.get("question") or QUESTION, prompt, metadata)

    @staticmethod
    def reads(options: Mapping[str, Any]) -> set[str]:
        """The metadata that the question names."""
        return names_in(options.get("question") or QUESTION)

    def close(self) -> None:
        """Ends the server that the reward started."""
        self._judge.close()


def pairs(count: int, rounds: int) -> list[tuple[int, int]]:
    """Who meets whom of ``count`` images: each pair once, at most all pairs."""
    found = dict.fromkeys(
        (min(one, other), max(one, other))
        for step in range(1, min(rounds, count // 2) + 1)
        for one in range(count)
        for other in [(one + step) % count]
    )
    return list(found)


def _first_wins(answer: Answer) -> float:
    """The probability that the first image is better; NaN if the answer begins with no digit."""
    one, two = (answer.first.get(digit, 0.0) for digit in "12")
    return one / (one + two) if one + two else np.nan
