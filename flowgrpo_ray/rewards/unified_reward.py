"""The UnifiedReward reward: what score does a vision-language judge give the image?

    1.5   reward = final score / 5                                    1..5 -> 0.2..1
    2.0   reward = (mean of alignment, coherence, style - 1) / 4      1..5 -> 0..1

UnifiedReward (Wang et al. 2025, arXiv 2503.05236) is tuned to write such scores, and is asked in
its authors' words (`questions.yaml`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from PIL import Image, ImageDraw
from pydantic import Field

from flowgrpo_ray.rewards.golden import Golden, Rankings, noise_picture
from flowgrpo_ray.rewards.http import Timeout, check_lengths
from flowgrpo_ray.rewards.judge_client import (
    Answer,
    ApiKeyEnv,
    Concurrency,
    JudgeClient,
    JudgeRetries,
    JudgeUrl,
    Launch,
    MaxTokens,
    ServedModel,
)

BEST = 5
GOLDEN_PROMPT = "a large red circle in the middle of a white background"
QUESTIONS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("questions.yaml").read_bytes())


@dataclass(frozen=True)
class Version:
    """How a generation of the model is served, and what its answer is worth."""

    model: str  # hub id
    chat_template: str | None  # for sglang, where the checkpoint's own does not do
    labels: tuple[str, ...]  # before the numbers of an answer, each from 1 to 5
    zero: int  # the number that is worth 0

    def score(self, answer: Answer) -> float:
        """The mean number of an answer on [0, 1]; NaN if one is missing or not from 1 to 5."""
        numbers = [_number_after(label, answer.text) for label in self.labels]
        return (sum(numbers) / len(numbers) - self.zero) / (BEST - self.zero)


def _number_after(label: str, text: str) -> float:
    """As models write it: in any case, with marks of Markdown around label or number."""
    marks = r"[*_`\s]*"
    found = re.search(
        rf"{label}(?: \(1-5\))?{marks}[:=]{marks}([1-5](?:\.\d+)?)(?!\.?\d)", text, re.IGNORECASE
    )
    number = float(found[1]) if found else np.nan
    return number if number <= BEST else np.nan


VERSIONS = {
    "1.5": Version("CodeGoat24/UnifiedReward-7b-v1.5", "chatml-llava", ("Final Score",), zero=0),
    "2.0": Version(
        "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b",
        None,
        ("Alignment Score", "Coherence Score", "Style Score"),
        zero=1,
    ),
}


class UnifiedReward:
    """Asks a vision-language judge about each image and its prompt."""

    def __init__(
        self,
        url: JudgeUrl = None,
        launch: Launch = None,
        version: Annotated[
            Literal["1.5", "2.0"],
            Field(description='of the question and of the scale: a text, `"1.5"`'),
        ] = "1.5",
        model: Annotated[
            ServedModel,
            Field(
                description="by which the server at `url` knows it; by default "
                "`CodeGoat24/UnifiedReward-7b-v1.5`, `CodeGoat24/UnifiedReward-2.0-qwen3vl-8b`"
            ),
        ] = None,
        api_key_env: ApiKeyEnv = None,
        image_size: Annotated[
            int, Field(ge=1, description="both sides are resized to it, as for published scores")
        ] = 512,
        concurrency: Concurrency = 16,
        timeout_s: Timeout = 60.0,
        max_tokens: MaxTokens = 512,
        retries: JudgeRetries = 2,
    ) -> None:
        self._version, self._question = VERSIONS[version], QUESTIONS[version]
        if launch is None:
            model = model or self._version.model
        else:
            launch = {"chat_template": self._version.chat_template, **launch}
        self._judge = JudgeClient(
            url=url,
            launch=launch,
            model=model,
            api_key_env=api_key_env,
            image_size=image_size,
            concurrency=concurrency,
            timeout_s=timeout_s,
            max_tokens=max_tokens,
            retries=retries,
        )

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Scores in [0, 1], float32 [b], of `images`, uint8 [b, H, W, 3].

        NaN: the judge answered, but never with a score. RewardError: the judge did not answer.
        """
        check_lengths(images, prompts, metadata)
        questions = [self._question.replace("{prompt}", prompt) for prompt in prompts]
        return self._judge.scores(images, questions, self._version.score)

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """ValueError unless it is clear whom to ask."""
        JudgeClient.check_options(options)

    def golden(self) -> Rankings:
        """A picture drawn as its prompt says, and noise."""
        drawn = Image.new("RGB", (512, 512), "white")
        ImageDraw.Draw(drawn).ellipse((96, 96, 416, 416), fill="red")
        low = (1 - self._version.zero) / (BEST - self._version.zero)
        pictures = (np.array(drawn), noise_picture((512, 512)))
        return [[Golden(picture, GOLDEN_PROMPT, low=low, high=1.0) for picture in pictures]]

    def close(self) -> None:
        """Ends the server that the reward started, and its connections."""
        self._judge.close()
