"""A scorer that runs elsewhere, asked over HTTP as this program's own rewards answer it.

    POST {url}/score, files `images`, JSON `prompts` and `metadata` -> {"scores": [number or null]}

and where it wants them files `sources`, those of the first image first.

The schema is that of `serving.http`. `answer` holds the retries; the judge of
`unified_reward` asks through it as well.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import httpx
import numpy as np
from PIL import Image
from pydantic import Field

from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.common.strict_json import parse

BACKOFF_S = 0.5
"""Wait before the first retry; each further one waits twice as long."""

CONNECTION_ERRORS = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)
HINTS = {  # what answers so is mostly a proxy, which knows nothing of the program behind it
    404: " (nothing is served at this path)",
    502: " (a proxy reaches no server)",
    503: " (no replica or server takes requests now)",
    504: " (a proxy has waited too long)",
}
MAX_SCORE = float(np.finfo(np.float32).max)
MOST_BYTES = 2**24  # of an answer

# Options that rewards behind a server have.
Url = Annotated[str, Field(pattern=r"^https?://")]
Timeout = Annotated[float, Field(gt=0, description="of one request")]
Retries = Annotated[int, Field(ge=0)]


class HttpReward:
    """Scores that the server at `url` gives."""

    takes_sources = True
    reads = None  # the server may read any key

    def __init__(
        self,
        url: Annotated[Url, Field(description="without `/score`, as `http://10.0.0.7:8000/ocr`")],
        token_env: Annotated[
            str | None,
            Field(description="environment variable that holds the token, sent as bearer"),
        ] = None,
        timeout_s: Timeout = 60.0,
        retries: Annotated[
            Retries,
            Field(
                description="of a request that no server took, or that it answered with 429 or "
                "5xx, with a wait of 0.5 s, then 1 s, and so on"
            ),
        ] = 2,
        batch: Annotated[int, Field(ge=1, description="images per request")] = 64,
        sources: Annotated[
            bool, Field(description="send the source images of edits as well, as `sources`")
        ] = False,
    ) -> None:
        self._url, self._sends_sources = f"{url.rstrip('/')}/score", sources
        self._retries, self._batch = retries, batch
        self._client = httpx.Client(headers=bearer("token_env", token_env), timeout=timeout_s)

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        sources: np.ndarray | None = None,
    ) -> np.ndarray:
        """Scores, float32 [b], of `images`, uint8 [b, H, W, 3]; NaN where the server has none.

        RewardError if it does not answer, or not with one number or null per image.
        """
        check_lengths(images, prompts, metadata)
        if not self._sends_sources or sources is None:
            sources = np.zeros((len(images), 0, *images.shape[1:]), np.uint8)
        size = max(1, self._batch // max(1, sources.shape[1]))
        parts = [slice(i, i + size) for i in range(0, len(images), size)]
        scores = [self._ask(images[p], prompts[p], metadata[p], sources[p]) for p in parts]
        return np.concatenate([np.zeros(0, np.float32), *scores])

    @staticmethod
    def needs_sources(options: Mapping[str, Any]) -> bool:
        """Whether they are to be sent."""
        return bool(options.get("sources"))

    def _ask(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        sources: np.ndarray,
    ) -> np.ndarray:
        """Scores, float32 [b], of what fits into one request."""
        given = {"images": images, "sources": sources.reshape(-1, *images.shape[1:])}
        files = [
            (field, (f"{i}.png", png(Image.fromarray(image)), "image/png"))
            for field, of in given.items()
            for i, image in enumerate(of)
        ]
        data = {
            "prompts": json.dumps(list(prompts)),
            "metadata": json.dumps([dict(entry) for entry in metadata]),
        }
        response = answer(
            lambda: post(self._client, self._url, files=files, data=data), retries=self._retries
        )
        return _scores(response, len(images))


def answer(
    send: Callable[[], httpx.Response],
    *,
    retries: int,
    retried: tuple[type[httpx.RequestError], ...] = CONNECTION_ERRORS,
    recover: Callable[[], None] = lambda: None,
) -> httpx.Response:
    """The 2xx answer that `send` gets; RewardError with the URL and the cause if there is none.

    After an error of `retried`, a 429 or a 5xx it is sent again, `retries` times at most, after a
    wait and a call of `recover`. Any other answer would be the same the next time.
    """
    failure = ""
    for attempt in range(1 + retries):
        if attempt:
            time.sleep(BACKOFF_S * 2 ** (attempt - 1))
            recover()
        try:
            response = _whole(send())
        except httpx.RequestError as error:
            failure = f"{error.request.url}: {type(error).__name__}: {error}"
            if not isinstance(error, retried):
                raise RewardError(failure) from error
        else:
            if response.is_success:
                return response
            hint = HINTS.get(response.status_code, "")
            failure = f"{response.url}: {response.status_code}{hint}: {response.text[:500]}"
            if response.status_code != 429 and response.status_code < 500:
                raise RewardError(failure)
    raise RewardError(f"{failure} (asked {1 + retries} times)")


def post(client: httpx.Client, url: str, **content: Any) -> httpx.Response:
    """A POST whose answer is not read yet."""
    return client.send(client.build_request("POST", url, **content), stream=True)


def _whole(response: httpx.Response) -> httpx.Response:
    """An answer with its body; RewardError for one that is larger than any scores are."""
    with contextlib.closing(response):
        parts, size = [], 0
        for part in response.iter_bytes():
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                raise RewardError(f"{response.url}: an answer of more than {MOST_BYTES >> 20} MiB")
    # What was counted is what compressed bytes stand for.
    kept = {k: v for k, v in response.headers.items() if k.lower() != "content-encoding"}
    return httpx.Response(
        response.status_code, headers=kept, content=b"".join(parts), request=response.request
    )


def _scores(response: httpx.Response, count: int) -> np.ndarray:
    """The scores of an answer, float32 [count]; null is NaN."""
    try:
        body = parse(response.content)
    except ValueError as error:
        raise RewardError(f"{response.url}: not JSON: {response.text[:500]!r}") from error
    scores = body.get("scores") if isinstance(body, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        raise RewardError(f"{response.url}: no list of {count} scores: {response.text[:500]}")
    for i, score in enumerate(scores):
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if score is not None and not (number and abs(score) <= MAX_SCORE):
            raise RewardError(f"{response.url}: score {i} is {score!r}, neither number nor null")
    return np.array([np.nan if score is None else score for score in scores], dtype=np.float32)


def bearer(option: str, variable: str | None) -> dict[str, str]:
    """The header with the token in the environment variable that `option` names, if it does."""
    if variable is None:
        return {}
    token = os.environ.get(variable)
    if not token:
        raise ValueError(f"{option} = {variable!r}: this process has no such environment variable")
    return {"Authorization": f"Bearer {token}"}


def png(image: Image.Image) -> bytes:
    """An image as a PNG file, which loses nothing."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def check_lengths(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any]) -> None:
    """ValueError unless there are as many of each."""
    if not len(images) == len(prompts) == len(metadata):
        raise ValueError(f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata")
