"""A reward over HTTP: images as files and prompts as JSON in, scores as JSON out.

What comes from the network is bytes and JSON, never pickle, and every limit is checked before the
memory it protects is used: the body while it arrives, an image's size before it is decoded.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import struct
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import flowgrpo_ray

FORMATS = ("PNG", "JPEG", "WEBP")
# 16-bit and floating-point images are refused: converting them to 8 bits would saturate.
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
# What Pillow raises for files that are cut off or damaged on purpose.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError)
BROKEN_INSIDE = (struct.error, zlib.error)


@dataclass(frozen=True)
class Limits:
    """What one request may hold."""

    images: int
    pixels: int  # of one image
    body_bytes: int


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


Check = Callable[[Sequence[str], Sequence[Mapping[str, Any]]], None]
Score = Callable[[np.ndarray, Sequence[str], Sequence[Mapping[str, Any]]], Awaitable[np.ndarray]]


def build_api(name: str, limits: Limits, check: Check, score: Score) -> FastAPI:
    """The web application of the reward `name`; /docs describes it.

    check: raises ValueError for prompts that the reward could never score.
    score: images uint8 [b, H, W, 3], prompts, metadata -> float32 [b].
    """
    api = FastAPI(
        title=f"Reward {name}",
        description="Scores images against their prompts.",
        version=flowgrpo_ray.__version__,
    )
    api.add_middleware(BodyLimit, max_bytes=limits.body_bytes)
    _answer_errors_as_json(api, name)

    @api.get("/health")
    async def health() -> Health:
        return Health(reward=name, status="ok")

    @api.post("/score", responses={400: {"model": Failure}, 413: {"model": Failure}})
    async def score_images(
        images: Annotated[list[UploadFile], File(description="PNG, JPEG or WebP, of one size")],
        prompts: Annotated[str, Form(description="JSON list of texts, one per image")],
        metadata: Annotated[str | None, Form(description="JSON list of objects")] = None,
    ) -> Scores:
        if len(images) > limits.images:
            raise HTTPException(413, f"{len(images)} images; at most {limits.images} per request")
        texts = _json_list("prompts", prompts, str, len(images))
        data = (
            [{} for _ in images]
            if metadata is None
            else _json_list("metadata", metadata, dict, len(images))
        )
        try:
            check(texts, data)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        files = [await image.read() for image in images]
        batch = await asyncio.to_thread(decode, files, limits.pixels)
        values = (await score(batch, texts, data)).tolist()
        return Scores(reward=name, scores=[v if math.isfinite(v) else None for v in values])

    return api


def decode(files: Sequence[bytes], max_pixels: int) -> np.ndarray:
    """Images of one size as uint8 [b, H, W, 3]; HTTPException for what cannot be scored."""
    images = [_decode_one(i, data, max_pixels) for i, data in enumerate(files)]
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise HTTPException(422, f"images of one request must have one size, got (H, W) {sizes}")
    return np.stack(images)


def _decode_one(index: int, data: bytes, max_pixels: int) -> np.ndarray:
    """One image as uint8 [H, W, 3]. Its header is read, and refused, before its pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                message = f"image {index} is {width}x{height}; at most {max_pixels} pixels"
                raise HTTPException(413, message)
            if image.mode not in MODES:
                raise HTTPException(422, f"image {index} has mode {image.mode}, not 8-bit RGB")
            return np.array(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"image {index}: {error}") from error
    except (*BROKEN, *BROKEN_INSIDE) as error:
        raise HTTPException(
            422, f"image {index} is not a readable {', '.join(FORMATS)} file"
        ) from error


def _json_list(field: str, text: str, kind: type, count: int) -> list[Any]:
    """The JSON list in a form field, of `count` items of one kind."""
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
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
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    async def malformed(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        faults = [f"{e['loc'][-1]}: {e['msg']}" for e in error.errors()]
        return JSONResponse({"error": "; ".join(faults)}, 422)

    async def failed(_: Request, error: Exception) -> JSONResponse:
        message = f"reward {name} failed: {type(error).__name__}: {error}"
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
