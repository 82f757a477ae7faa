"""A reward over HTTP: images as files and prompts as JSON in, scores as JSON out.

What comes from the network is bytes and JSON, never pickle, and every limit is checked before the
memory it protects is used: the body while it arrives, an image's size before it is decoded. Where
there is a token, it is asked for before the body is read.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import flowgrpo_ray
from flowgrpo_ray.common.images import WHITE, ImageError, decode_rgb, fitted
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.rewards import describe
from flowgrpo_ray.serving.api_page import api_page
from flowgrpo_ray.serving.batches import Call

logger = logging.getLogger("ray.serve")  # what a replica writes to its log file


@dataclass(frozen=True)
class Limits:
    """What one request may hold."""

    images: int
    pixels: int  # of one image
    body_bytes: int
    background: str = WHITE  # what shows through where an image is transparent


class Scores(BaseModel):
    """Answer of `POST /score`: one number per image, null where there is no score."""

    reward: str
    scores: list[float | None]


class Health(BaseModel):
    """Answer of `GET /health`."""

    reward: str
    status: str


class Failure(BaseModel):
    """Answer of every request that fails."""

    error: str


Check = Callable[[Call], None]
Score = Callable[[Call], Awaitable[np.ndarray]]


SHAPE_HEADER = "x-shape"
SHAPE = re.compile(r"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*3\s*")


def build_api(
    name: str, limits: Limits, check: Check, score: Score, token: str | None = None
) -> FastAPI:
    """The web application of the reward `name`; /docs describes it.

    check: raises ValueError for what the reward could never score.
    score: a call of b images -> float32 [b].
    token: that `POST /score` must bring as `Authorization: Bearer <token>`.
    """
    api = _described(name)
    api.add_middleware(BodyLimit, max_bytes=limits.body_bytes)
    if token is not None:
        api.add_middleware(RequireToken, token=token)
    _answer_errors_as_json(api, name)
    refusals: dict[int | str, Any] = {code: {"model": Failure} for code in (401, 413, 422, 500)}

    @api.post("/score", responses=refusals)
    async def score_images(
        images: Annotated[
            list[UploadFile],
            File(
                description="PNG, JPEG or WebP files of one size; or one part of raw uint8, row by "
                "row, with the header `X-Shape: images,height,width,3` of its own"
            ),
        ],
        prompts: Annotated[str, Form(description="JSON list of texts, one per image")],
        metadata: Annotated[str | None, Form(description="JSON list of objects")] = None,
        sources: Annotated[
            list[UploadFile] | None,
            File(
                description="as images: what these are edits of, as many for each, those of the "
                "first image first; files are scaled and cut to the size of the images"
            ),
        ] = None,
    ) -> Scores:
        batch = await _uploaded("images", images, limits)
        given = None
        if sources:
            given = _by_image(await _uploaded("sources", sources, limits, batch.shape[1:3]), batch)
        texts = _json_list("prompts", prompts, str, len(batch))
        data = (
            [{} for _ in batch]
            if metadata is None
            else _json_list("metadata", metadata, dict, len(batch))
        )
        call = Call(batch, texts, data, given)
        try:
            check(call)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        values = (await score(call)).tolist()
        return Scores(reward=name, scores=[v if math.isfinite(v) else None for v in values])

    return api


def _described(name: str) -> FastAPI:
    """An API that says what it is and that it is there."""
    api = FastAPI(
        title=f"Reward {name}",
        description="Scores images against their prompts.",
        version=flowgrpo_ray.__version__,
        docs_url=None,  # they load scripts from a public server
        redoc_url=None,
    )

    @api.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(api_page(api.openapi()))

    @api.get("/health")
    async def health() -> Health:
        return Health(reward=name, status="ok")

    return api


async def _uploaded(
    field: str, parts: Sequence[UploadFile], limits: Limits, size: tuple[int, ...] | None = None
) -> np.ndarray:
    """The images of a form field, uint8 [b, H, W, 3]; files become of ``size``, if it is given."""
    if len(parts) > limits.images:
        raise HTTPException(413, f"{len(parts)} {field}; at most {limits.images} per request")
    shape = parts[0].headers.get(SHAPE_HEADER)
    files = [await part.read() for part in parts]
    if shape is not None:
        return _raw(shape, files, limits)
    return await asyncio.to_thread(decode, files, limits.pixels, limits.background, size)


def _by_image(sources: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Source images [b * n, H, W, 3] as [b, n, H, W, 3]."""
    count = len(images)
    if len(sources) % count or sources.shape[1:] != images.shape[1:]:
        raise HTTPException(
            422,
            f"{describe(sources)} sources of {describe(images)} images: as many for each image, of "
            "its size",
        )
    return sources.reshape(count, -1, *images.shape[1:])


def _raw(header: str, files: Sequence[bytes], limits: Limits) -> np.ndarray:
    """The images, uint8 [b, H, W, 3], in one part that says its shape."""
    match = SHAPE.fullmatch(header)
    if match is None or len(files) != 1:
        raise HTTPException(
            422,
            f"X-Shape is {header!r} on the first of {len(files)} parts: raw images are one part "
            "with the header X-Shape: images,height,width,3",
        )
    count, height, width = map(int, match.groups())
    if count > limits.images or height * width > limits.pixels:
        raise HTTPException(
            413,
            f"X-Shape {header!r}: at most {limits.images} images of {limits.pixels} pixels",
        )
    if count * height * width == 0 or len(files[0]) != count * height * width * 3:
        raise HTTPException(422, f"X-Shape {header!r}, but {len(files[0])} bytes")
    return np.frombuffer(files[0], np.uint8).reshape(count, height, width, 3)


def decode(
    files: Sequence[bytes],
    max_pixels: int,
    background: str = WHITE,
    size: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Images of one size, or brought to ``size`` (height, width), as uint8 [b, H, W, 3];
    HTTPException for what cannot be scored."""
    try:
        images = [
            decode_rgb(data, f"image {i}", max_pixels, background) for i, data in enumerate(files)
        ]
    except ImageError as error:
        raise HTTPException(413 if error.too_large else 422, str(error)) from error
    if size is not None:
        images = [fitted(image, (size[0], size[1])) for image in images]
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise HTTPException(422, f"images of one request must have one size, got (H, W) {sizes}")
    return np.stack(images)


def _json_list(field: str, text: str, kind: type, count: int) -> list[Any]:
    """The JSON list in a form field, of `count` items of one kind."""
    try:
        items = parse(text)
    except ValueError as error:
        raise HTTPException(422, f"{field} is not JSON: {error}") from error
    wanted = {str: "texts", dict: "objects"}[kind]
    if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
        raise HTTPException(422, f"{field} must be a JSON list of {wanted}")
    if len(items) != count:
        raise HTTPException(422, f"{count} images, but {len(items)} {field}")
    return items


def _answer_errors_as_json(api: FastAPI, name: str) -> None:
    """Every error answers `{"error": message}`."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)
        # After that the rest of a body is not even read.
        more = {"Connection": "close"} if error.status_code == 413 else None
        return JSONResponse({"error": str(error.detail)}, error.status_code, more)

    async def malformed(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        faults = [f"{e['loc'][-1]}: {e['msg']}" for e in error.errors()]
        return JSONResponse({"error": "; ".join(faults)}, 422)

    async def failed(_: Request, error: Exception) -> JSONResponse:
        # Its text may tell paths, hosts and keys of this machine: that stays in the log.
        reference = secrets.token_hex(4)
        logger.error("reward %s failed, reference %s", name, reference, exc_info=error)
        message = f"reward {name} failed; its log tells why, at reference {reference}"
        return JSONResponse({"error": message}, 500)

    api.add_exception_handler(StarletteHTTPException, refused)
    api.add_exception_handler(RequestValidationError, malformed)
    api.add_exception_handler(Exception, failed)


class BodyLimit:
    """Refuses a request body of more than `max_bytes` while it arrives."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise HTTPException(413, f"request body over {self._max_bytes} bytes")
            return message

        await self._app(scope, counted, send)


class RequireToken:
    """Answers 401 to whoever asks for scores without the bearer token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self._expected):
                message = "the header Authorization: Bearer <token> is missing or wrong"
                more = {"WWW-Authenticate": "Bearer", "Connection": "close"}  # the body is not read
                refuse = JSONResponse({"error": message}, 401, more)
                await refuse(scope, receive, send)
                return
        await self._app(scope, receive, send)
