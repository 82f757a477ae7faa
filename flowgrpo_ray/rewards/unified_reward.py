"""The UnifiedReward reward: what score does a vision-language judge give the image?

    1.5   reward = final score / 5                                    1..5 -> 0.2..1
    2.0   reward = (mean of alignment, coherence, style - 1) / 4      1..5 -> 0..1

UnifiedReward (Wang et al. 2025, arXiv 2503.05236) is tuned to write such scores. It is asked over
the OpenAI chat API, either of a server that runs already or of one that the reward starts.
"""

from __future__ import annotations

import base64
import inspect
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image, ImageDraw

from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.rewards.golden import Golden, Rankings, noise_picture
from flowgrpo_ray.rewards.http import (
    answer,
    base_url,
    bearer,
    check_bounds,
    check_lengths,
    png,
    post,
)
from flowgrpo_ray.rewards.judge_server import JudgeServer

BEST = 5
GOLDEN_PROMPT = "a large red circle in the middle of a white background"


@dataclass(frozen=True)
class Version:
    """How a generation of the model is asked, and what its answer is worth."""

    model: str  # hub id
    chat_template: str | None  # for sglang, where the checkpoint's own does not do
    question: str
    labels: tuple[str, ...]  # before the numbers of an answer, each from 1 to 5
    zero: int  # the number that is worth 0

    def score(self, text: str) -> float:
        """The mean number of an answer on [0, 1]; NaN if one is missing or not from 1 to 5."""
        numbers = [_number_after(label, text) for label in self.labels]
        return (sum(numbers) / len(numbers) - self.zero) / (BEST - self.zero)


def _number_after(label: str, text: str) -> float:
    found = re.search(rf"{label}(?: \(1-5\))?:\s*([1-5](?:\.\d+)?)(?!\d)", text)
    number = float(found[1]) if found else np.nan
    return number if number <= BEST else np.nan


VERSIONS = {
    "1.5": Version(
        model="CodeGoat24/UnifiedReward-7b-v1.5",
        chat_template="chatml-llava",
        question=(
            "This image was generated from a text caption. Judge two things.\n"
            "1. Alignment with the Caption: are all objects there, with the attributes and in the "
            "relations that the caption gives them?\n"
            "2. Overall Image Quality: is the image clear, rich in detail, right in its colors and "
            "pleasing to look at?\n"
            "Sum both up in one score from 1 to 5, and write it after 'Final Score:'.\n"
        ),
        labels=("Final Score",),
        zero=0,
    ),
    "2.0": Version(
        model="CodeGoat24/UnifiedReward-2.0-qwen3vl-8b",
        chat_template=None,
        question=(
            "This image was generated from a text caption. Rate it from 1 to 5 in three ways.\n"
            "- Alignment Score: does it show what the caption says?\n"
            "- Coherence Score: is it free of glitches, distortions and contradictions?\n"
            "- Style Score: is it pleasing to look at, whatever the caption says?\n"
            "Write your answer in this format:\n\n"
            "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
        ),
        labels=("Alignment Score", "Coherence Score", "Style Score"),
        zero=1,
    ),
}


class UnifiedReward:
    """Asks a vision-language judge about each image and its prompt.

    url: of a running server, without the `/v1`. Either this or `launch` must be given.
    launch: options of the server to start (`judge_server.JudgeServer`), `model` first of all.
    version: of the question and of the scale, `1.5` or `2.0`.
    model: by which the server at `url` knows the model; by default its hub id.
    api_key_env: name of the environment variable with the key of the server at `url`.
    image_size: to which both sides are resized, as for the published scores.
    concurrency: requests in flight.
    timeout_s: of one request.
    max_tokens: of one answer.
    retries: of an answer without a score, and of a request that failed.
    """

    def __init__(
        self,
        url: str | None = None,
        launch: Mapping[str, Any] | None = None,
        version: str = "1.5",
        model: str | None = None,
        api_key_env: str | None = None,
        image_size: int = 512,
        concurrency: int = 16,
        timeout_s: float = 60.0,
        max_tokens: int = 512,
        retries: int = 2,
    ) -> None:
        if version not in VERSIONS:
            raise ValueError(f"unknown version {version!r}; known: {', '.join(VERSIONS)}")
        sizes = {"image_size": image_size, "concurrency": concurrency, "max_tokens": max_tokens}
        check_bounds(timeout_s=timeout_s, retries=retries, **sizes)
        self._version = VERSIONS[version]
        self._size, self._max_tokens, self._retries = image_size, max_tokens, retries
        self._server: JudgeServer | None = None
        if url is not None and launch is None:
            self._url, self._model = base_url(url), model or self._version.model
            headers = bearer("api_key_env", api_key_env)
        elif launch is not None and url is None:
            if model is not None or api_key_env is not None:
                raise ValueError("model and api_key_env belong to url; launch has its own model")
            self._server = _launch({"chat_template": self._version.chat_template, **launch})
            self._model = self._server.model
            headers = {"Authorization": f"Bearer {self._server.api_key}"}
        else:
            raise ValueError("give either url (a running server) or launch (one to start)")
        self._client = httpx.Client(
            headers=headers,
            timeout=timeout_s,
            trust_env=self._server is None,  # proxies are not for loopback
            limits=httpx.Limits(max_connections=concurrency),
        )
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")

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
        return np.array(list(self._pool.map(self._score, images, prompts)), dtype=np.float32)

    def golden(self) -> Rankings:
        """A picture drawn as its prompt says, and noise."""
        drawn = Image.new("RGB", (512, 512), "white")
        ImageDraw.Draw(drawn).ellipse((96, 96, 416, 416), fill="red")
        low = (1 - self._version.zero) / (BEST - self._version.zero)
        pictures = (np.array(drawn), noise_picture((512, 512)))
        return [[Golden(picture, GOLDEN_PROMPT, low=low, high=1.0) for picture in pictures]]

    def close(self) -> None:
        """Ends the server that the reward started, and its connections."""
        if self._server is not None:
            self._server.close()
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def _score(self, image: np.ndarray, prompt: str) -> float:
        """Score of an image, uint8 [H, W, 3]."""
        resized = Image.fromarray(image).resize((self._size, self._size))
        # The type must be named: without it some servers refuse the image.
        data = f"data:image/png;base64,{base64.b64encode(png(resized)).decode()}"
        # No placeholder of the image in the text: the chat template puts in one per image.
        question = f"{self._version.question}Text Caption: [{prompt}]"
        content = [
            {"type": "image_url", "image_url": {"url": data}},
            {"type": "text", "text": question},
        ]
        for _ in range(1 + self._retries):
            score = self._version.score(self._ask(content))
            if not np.isnan(score):
                return score
        return np.nan

    def _ask(self, content: list[dict[str, Any]]) -> str:
        """The judge's answer to one message of a user."""
        payload = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self._max_tokens,  # unbounded, a model may write to its context's end
        }

        def send() -> httpx.Response:
            url = self._server.url if self._server else self._url  # a restart changes it
            return post(self._client, f"{url}/v1/chat/completions", json=payload)

        response = answer(
            send,
            retries=self._retries,
            retried=(httpx.TransportError,),
            recover=self._server.ensure_running if self._server else lambda: None,
        )
        try:
            text = parse(response.content)["choices"][0]["message"]["content"]
            if not isinstance(text, str | None):
                raise TypeError(f"content is {type(text).__name__}")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise RewardError(
                f"{response.url}: no chat completion: {response.text[:500]!r}"
            ) from error
        return text or ""


def _launch(options: Mapping[str, Any]) -> JudgeServer:
    """The server that the option `launch` describes, running."""
    known = list(inspect.signature(JudgeServer).parameters)
    for key in options:
        if key not in known:
            raise ValueError(f"launch has no option {key!r}; options: {', '.join(known)}")
    if "model" not in options:
        raise ValueError("launch needs model, a folder or a hub id")
    return JudgeServer(**options)
