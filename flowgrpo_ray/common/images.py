"""Image files to arrays, 8-bit RGB: what cannot become that without loss is refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
# 16-bit and floating-point images are refused: converting them to 8 bits would saturate.
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
# Pillow's own bound, which any library in the process may lift for all.
MOST_PIXELS = 178_956_970
# What Pillow raises for files that are cut off or damaged on purpose.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError)
BROKEN_INSIDE = (struct.error, zlib.error)


class ImageError(ValueError):
    """A file that is no image to score; `too_large`: for its pixels, more than are allowed."""

    def __init__(self, message: str, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


@contextmanager
def opened(
    file: Path | io.BytesIO,
    name: str,
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int = MOST_PIXELS,
) -> Iterator[Image.Image]:
    """An image file whose header was read and found to be of one of `formats` and not too large.

    ImageError, which calls it `name`, if it is not, or if its pixels cannot be read in here.
    """
    try:
        with Image.open(file, formats=formats) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{name} is {width}x{height}; at most {max_pixels} pixels", True)
            yield image
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}", True) from error
    except (*BROKEN, *BROKEN_INSIDE) as error:
        raise ImageError(f"{name} is not a readable {', '.join(formats)} file") from error


def decode_rgb(data: bytes, name: str, max_pixels: int = MOST_PIXELS) -> np.ndarray:
    """The image file `data` as uint8 [H, W, 3]; ImageError, which calls it `name`, if it is none.

    Its header is read, and refused, before its pixels.
    """
    with opened(io.BytesIO(data), name, max_pixels=max_pixels) as image:
        if image.mode not in MODES:
            raise ImageError(f"{name} has mode {image.mode}, not 8-bit RGB")
        return np.array(image.convert("RGB"))
