"""Source images: the files that prompt lines name, for models that change images.

A file is looked at before a run starts and read when it is needed, on the machine that has it: what
travels from there is its content.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from flowgrpo_ray.common.errors import PromptError
from flowgrpo_ray.common.images import ImageError, decode_rgb, fitted, read_bytes
from flowgrpo_ray.common.types import Bools, Edit, Images, Request, Source

PNG_URL = "data:image/png;base64,"
MASK_SIDE = 512  # pixels at most; a mask has two colours, and travels with the metadata


def find_source(file: Path) -> tuple[Source, tuple[int, int]]:
    """An image file as a source, and its (height, width); ``ImageError`` if it is none."""
    data = read_bytes(file)
    height, width, _ = decode_rgb(data, f"'{file}'").shape
    return Source(str(file), hashlib.sha256(data).hexdigest()), (height, width)


def read_sources(requests: Iterable[Request]) -> dict[str, bytes]:
    """The files of the images that requests name, by their digests; ``PromptError`` for one that
    is not what it was."""
    sources = {of for request in requests if isinstance(request, Edit) for of in request.sources}
    return {source.digest: _content(source) for source in sources}


def _content(source: Source) -> bytes:
    try:
        data = read_bytes(Path(source.path))
    except ImageError as error:
        raise PromptError(f"the source image {source.path!r} is gone: {error}") from error
    if hashlib.sha256(data).hexdigest() != source.digest:
        raise PromptError(
            f"the source image {source.path!r} has changed since the prompts were read: restore "
            "it, or begin another run"
        )
    return data


def pictures(edit: Edit, files: Mapping[str, bytes] | None = None) -> Images:
    """The images ``[n, H, W, 3]`` that a prompt changes, from ``files`` by digest, or from those of
    this machine."""
    files = read_sources([edit]) if files is None else files
    found = [decode_rgb(files[of.digest], repr(of.path)) for of in edit.sources]
    return np.stack([fitted(image, edit.size) for image in found])


def mask_url(mask: Bools) -> str:
    """A mask ``[h, w]`` as text: the data URL of a PNG, True as white."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    image.thumbnail((MASK_SIDE, MASK_SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    Image.fromarray(np.array(image) > 127).save(file, "PNG")
    return PNG_URL + base64.b64encode(file.getvalue()).decode()


def mask_of(url: str, size: tuple[int, int]) -> Bools:
    """The mask that ``mask_url`` wrote, fitted to ``size`` as sources are, ``[H, W]``;
    ``ValueError`` for any other text."""
    try:
        data = base64.b64decode(url.removeprefix(PNG_URL), validate=True)
    except binascii.Error as error:
        raise ValueError(
            f"a mask is text that begins with {PNG_URL}, not with {url[:40]!r}"
        ) from error
    return fitted(decode_rgb(data, "mask"), size)[..., 0] > 127
