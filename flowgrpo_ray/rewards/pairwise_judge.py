"""A judge that compares: which of two images of a prompt is better?

    score = mean over an image's opponents of its probability to win

The probability is that of the digit with which the judge's answer begins, p(1) / (p(1) + p(2)). A
judge may prefer whatever it sees first, so each pair is asked in both orders and the two are
averaged. Opponents are drawn as on a ring: image i meets i+1, i+2, ... i+rounds, and so each image
meets twice as many others as there are rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowgrpo_ray.rewards.bounds import check_counts
from flowgrpo_ray.rewards.http import check_lengths
from flowgrpo_ray.rewards.judge_client import LIKELIEST, Answer, JudgeClient
from flowgrpo_ray.rewards.vlm_judge import ask

QUESTION = (
    'Two images were made for the prompt "{prompt}". Which one is better: which shows what the '
    "prompt asks for, and is the better picture? Answer with one digit alone: 1 for the first "
    "image, 2 for the second."
)


class PairwiseJudge:
    """Asks which of two images of a group is better.

    question: with `{prompt}` and any metadata key in braces; the answer must begin with 1 or 2.
    rounds: an image meets twice as many others, or all.
    url: of a running server, without the `/v1`. Either this or `launch` must be given.
    launch: options of the server to start (`judge_server.JudgeServer`), `model` first of all.
    model: by which the server at `url` knows the model.
    api_key_env: name of the environment variable with the key of the server at `url`.
    image_size: to which both sides are resized; by default images are sent as they are.
    concurrency: requests in flight.
    timeout_s: of one request.
    retries: of an answer without a digit, and of a request that failed.
    """

    over_group = True

    def __init__(
        self,
        question: str = QUESTION,
        rounds: int = 3,
        url: str | None = None,
        launch: Mapping[str, Any] | None = None,
        model: str | None = None,
        api_key_env: str | None = None,
        image_size: int | None = None,
        concurrency: int = 16,
        timeout_s: float = 60.0,
        retries: int = 2,
    ) -> None:
        check_counts(rounds=rounds)
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
    ) -> np.ndarray:
        """Scores in [0, 1], float32 [b], of the images of one group, uint8 [b, H, W, 3].

        NaN for an image of which no comparison was answered as it should, or that has no opponent.
        RewardError: the judge did not answer.
        """
        check_lengths(images, prompts, metadata)
        meetings = pairs(len(images), self._rounds)
        asked = [*meetings, *(pair[::-1] for pair in meetings)]
        question = ask(self._question, prompts[0], metadata[0]) if asked else ""
        shown = [images[list(pair)] for pair in asked]
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
    def check_prompt(prompt: str, metadata: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """ValueError for a prompt without a key that the question names."""
        ask(options.get("question", QUESTION), prompt, metadata)

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
