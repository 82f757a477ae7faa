"""Asks a vision-language model about images, over the OpenAI chat API.

Of a server that runs already, or of one that the reward starts. What is asked, and what an answer
is worth, is up to the reward.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import httpx
import numpy as np
from PIL import Image
from pydantic import AfterValidator, Field

from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.rewards.http import Retries, Url, answer, bearer, png, post
from flowgrpo_ray.rewards.judge_server import JudgeServer
from flowgrpo_ray.rewards.options import arguments_of

LIKELIEST = 20  # tokens whose probabilities can be asked for: as many as the API gives
WARMER = 0.7  # temperature of what is asked again, as the first answer would come again without

# Options of the rewards that ask.
JudgeUrl = Annotated[
    Url | None,
    Field(
        description="of a running server with the OpenAI chat API, without `/v1`. Either this or "
        "`launch`"
    ),
]
Launch = Annotated[
    Annotated[Mapping[str, Any], AfterValidator(partial(arguments_of, JudgeServer))] | None,
    Field(description="the server that each replica starts for itself: table of `launch`"),
]
ServedModel = Annotated[str | None, Field(description="by which the server at `url` knows it")]
ApiKeyEnv = Annotated[
    str | None,
    Field(description="environment variable that holds the key of the server at `url`"),
]
ImageSize = Annotated[int | None, Field(ge=1, description="both sides are resized to it")]
Concurrency = Annotated[int, Field(ge=1, description="requests in flight")]
MaxTokens = Annotated[int, Field(ge=1, description="of one answer")]
JudgeRetries = Annotated[
    Retries, Field(description="of an answer without a score, and of a request that failed")
]


@dataclass(frozen=True)
class Answer:
    """What the model wrote, and of its first token the likeliest ones with their probabilities."""

    text: str
    first: Mapping[str, float]


class JudgeClient:
    """The options are those of the rewards that ask, which describe them."""

    def __init__(
        self,
        *,
        url: str | None,
        launch: Mapping[str, Any] | None,
        model: str | None,
        api_key_env: str | None,
        image_size: int | None,
        concurrency: int,
        timeout_s: float,
        max_tokens: int,
        retries: int,
    ) -> None:
        self._size, self._max_tokens, self._retries = image_size, max_tokens, retries
        self._server: JudgeServer | None = None
        if launch is None:
            assert url is not None, "as check_options says"
            self._url, self._model = url.rstrip("/"), model
            headers = bearer("api_key_env", api_key_env)
        else:
            self._server = JudgeServer(**launch)
            self._model = self._server.model
            headers = {"Authorization": f"Bearer {self._server.api_key}"}
        self._client = httpx.Client(
            headers=headers,
            timeout=timeout_s,
            trust_env=self._server is None,  # proxies are not for loopback
            limits=httpx.Limits(max_connections=concurrency),
        )
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """ValueError unless it is clear whom to ask, by which name."""
        url, launch, model = (options[name] for name in ("url", "launch", "model"))
        if (url is None) == (launch is None):
            raise ValueError("give either url (a running server) or launch (one to start)")
        if launch is not None and (model is not None or options["api_key_env"] is not None):
            raise ValueError("model and api_key_env belong to url; launch has its own model")

    @staticmethod
    def check_named(options: Mapping[str, Any]) -> None:
        """As ``check_options``, of a reward that has no model by default."""
        JudgeClient.check_options(options)
        if options["launch"] is None and options["model"] is None:
            raise ValueError("url needs model, by which the server knows it")

    def scores(
        self,
        shown: Iterable[np.ndarray],
        questions: Sequence[str],
        worth: Callable[[Answer], float],
        *,
        likeliest: int = 0,
    ) -> np.ndarray:
        """``worth`` of the answers, float32 [b]; NaN where no answer has any.

        With each question one image, uint8 [H, W, 3], or several, [n, H, W, 3], are ``shown``.

        An answer without is asked for again, `retries` times, at another temperature and seed.
        ``likeliest`` tokens are to come with the first one. RewardError: the judge did not answer.
        """

        def score(images: np.ndarray, question: str) -> float:
            content = self._content(images, question)
            for attempt in range(1 + self._retries):
                value = worth(self._ask(content, attempt, likeliest))
                if not np.isnan(value):
                    return value
            return np.nan

        return np.array(list(self._pool.map(score, shown, questions)), dtype=np.float32)

    def close(self) -> None:
        """Ends the server that the reward started, and its connections."""
        if self._server is not None:
            self._server.close()
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def _content(self, images: np.ndarray, question: str) -> list[dict[str, Any]]:
        """One message about images, uint8 [n, H, W, 3] or [H, W, 3]."""
        shown = [self._url_of(image) for image in images.reshape(-1, *images.shape[-3:])]
        # No placeholder of the image in the text: the chat template puts in one per image.
        return [
            *({"type": "image_url", "image_url": {"url": url}} for url in shown),
            {"type": "text", "text": question},
        ]

    def _url_of(self, image: np.ndarray) -> str:
        shown = Image.fromarray(image)
        if self._size is not None:
            shown = shown.resize((self._size, self._size))
        # The type must be named: without it some servers refuse the image.
        return f"data:image/png;base64,{base64.b64encode(png(shown)).decode()}"

    def _ask(self, content: list[dict[str, Any]], attempt: int, likeliest: int) -> Answer:
        payload: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": WARMER if attempt else 0,
            "max_tokens": self._max_tokens,  # unbounded, a model may write to its context's end
        }
        payload |= {"seed": attempt} if attempt else {}
        payload |= {"logprobs": True, "top_logprobs": likeliest} if likeliest else {}

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
            choice = parse(response.content)["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str | None):
                raise TypeError(f"content is {type(text).__name__}")
            return Answer(text or "", _first(choice) if likeliest else {})
        except (ValueError, KeyError, IndexError, TypeError) as error:
            wanted = "no chat completion with probabilities" if likeliest else "no chat completion"
            raise RewardError(f"{response.url}: {wanted}: {response.text[:500]!r}") from error


def _first(choice: Mapping[str, Any]) -> dict[str, float]:
    """The likeliest first tokens; those that are alike but for case and space are one."""
    found: dict[str, float] = {}
    for token in choice["logprobs"]["content"][0]["top_logprobs"]:
        name = str(token["token"]).strip().lower()
        found[name] = found.get(name, 0.0) + float(np.exp(float(token["logprob"])))
    return found
