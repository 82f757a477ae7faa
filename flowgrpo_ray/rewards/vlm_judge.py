"""A judge with your own question: what does a vision-language model say of the image?

    number    reward = (number in the answer - low) / (high - low)
    yes_no    reward = p(yes) / (p(yes) + p(no))
    digits    reward = (sum of d p(d) / sum of p(d) - low) / (high - low), over d = low..high

The probabilities p are those of the first token of the answer. Any server with the OpenAI chat API
will do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

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
    MaxTokens,
    ServedModel,
)

LAST_NUMBER = r"(-?\d+(?:\.\d+)?)(?!.*\d)"
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w+)\}")


class VlmJudge:
    """Asks your question about each image; of an edit the source images are shown before it."""

    takes_sources = True

    def __init__(
        self,
        question: Annotated[
            str,
            Field(
                description="with `{prompt}` and any metadata key in braces, as `{style}`; braces "
                "are doubled"
            ),
        ],
        answer: Annotated[
            Literal["number", "yes_no", "digits"],
            Field(description="`number` is read by `pattern`; the others weigh the first token"),
        ] = "number",
        low: Annotated[
            float, Field(description="the number that is worth 0; for `digits` from 0 to 9")
        ] = 0,
        high: Annotated[
            float, Field(description="the number that is worth 1; what lies beyond is no answer")
        ] = 10,
        pattern: Annotated[
            str,
            Field(
                description="regular expression that finds the number: its first group, or all of "
                "it; by default the last number"
            ),
        ] = LAST_NUMBER,
        url: JudgeUrl = None,
        launch: Launch = None,
        model: ServedModel = None,
        api_key_env: ApiKeyEnv = None,
        image_size: Annotated[
            ImageSize, Field(description="both sides are resized to it; else images go as they are")
        ] = None,
        concurrency: Concurrency = 16,
        timeout_s: Timeout = 60.0,
        max_tokens: MaxTokens = 512,
        retries: JudgeRetries = 2,
    ) -> None:
        self._pattern = re.compile(pattern, re.DOTALL)
        self._question, self._answer, self._low, self._high = question, answer, low, high
        single = answer != "number"
        self._judge = JudgeClient(
            url=url,
            launch=launch,
            model=model,
            api_key_env=api_key_env,
            image_size=image_size,
            concurrency=concurrency,
            timeout_s=timeout_s,
            max_tokens=1 if single else max_tokens,
            retries=retries,
        )

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        sources: np.ndarray | None = None,
    ) -> np.ndarray:
        """Scores in [0, 1], float32 [b], of `images`, uint8 [b, H, W, 3], that changed `sources`,
        [b, n, H, W, 3], if there are any.

        NaN: the judge answered, but never as it should. RewardError: the judge did not answer.
        """
        check_lengths(images, prompts, metadata)
        asked = [ask(self._question, *of) for of in zip(prompts, metadata, strict=True)]
        likeliest = 0 if self._answer == "number" else LIKELIEST
        shown = images if sources is None else np.concatenate([sources, images[:, None]], axis=1)
        return self._judge.scores(shown, asked, self._worth, likeliest=likeliest)

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """ValueError for a scale or a pattern that finds no number, and as of every judge."""
        low, high, pattern = options["low"], options["high"], options["pattern"]
        if not low < high:
            raise ValueError(f"low = {low:g} must be below high = {high:g}")
        if options["answer"] == "digits" and not {low, high} <= set(range(10)):
            raise ValueError(
                f"low = {low:g} and high = {high:g}: for digits single ones, from 0 to 9"
            )
        try:
            re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern = {pattern!r} is no regular expression: {error}") from error
        JudgeClient.check_named(options)

    @staticmethod
    def check_prompt(
        prompt: str, metadata: Mapping[str, Any], options: Mapping[str, Any] | None = None
    ) -> None:
        """ValueError for a prompt without the metadata that the question names."""
        ask(str((options or {}).get("question", "")), prompt, metadata)

    @staticmethod
    def reads(options: Mapping[str, Any]) -> set[str]:
        """The metadata that the question names."""
        return names_in(options.get("question", ""))

    def close(self) -> None:
        """Ends the server that the reward started, and its connections."""
        self._judge.close()

    def _worth(self, answer: Answer) -> float:
        if self._answer == "number":
            return self._on_scale(self._number(answer.text))
        if self._answer == "yes_no":
            yes, no = (answer.first.get(word, 0.0) for word in ("yes", "no"))
            return yes / (yes + no) if yes + no else np.nan
        digits = range(int(self._low), int(self._high) + 1)
        weights = [answer.first.get(str(digit), 0.0) for digit in digits]
        if not any(weights):
            return np.nan
        return self._on_scale(float(np.average(digits, weights=weights)))

    def _number(self, text: str) -> float:
        found = self._pattern.search(text)
        try:
            return float(found[(found.lastindex and 1) or 0]) if found else np.nan
        except (TypeError, ValueError):  # a group that took no part, or no number
            return np.nan

    def _on_scale(self, number: float) -> float:
        """NaN for what lies beyond it."""
        if not self._low <= number <= self._high:
            return np.nan
        return (number - self._low) / (self._high - self._low)


def names_in(question: str) -> set[str]:
    """The metadata keys that a question names."""
    return {found[1] for found in PLACEHOLDER.finditer(question) if found[1]} - {"prompt"}


def ask(question: str, prompt: str, metadata: Mapping[str, Any]) -> str:
    """The question about one image; ValueError for a name in braces that the prompt has not."""
    values = {**metadata, "prompt": prompt}

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name is None:
            return found[0][0]
        if name not in values:
            raise ValueError(
                f"the question names {{{name}}}, which is no metadata of the prompt {prompt!r}"
            )
        return str(values[name])

    return PLACEHOLDER.sub(fill, question)
