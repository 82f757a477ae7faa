"""Image files to arrays, 8-bit RGB, as a viewer shows them: upright, on a background."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
# Those of floating point are refused: nothing says which of their values is white.
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
DEEP = ("I", "I;16")  # 16 bits of grey
WHITE = "white"
# Pillow's own bound, which any library in the process may lift for all.
MOST_PIXELS = 178_956_970
MOST_BYTES = 2**29  # of an image file
# What Pillow raises for files that are cut off or damaged on purpose.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError)
BROKEN_INSIDE = (struct.error, zlib.error)


class ImageError(ValueError):
    """A file that is no image to score; `too_large`: for its pixels, more than are allowed."""

    def __init__(self, message: str, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


def read_bytes(file: Path) -> bytes:
    """The content of an image file; ImageError if it cannot be read, or is larger than any is."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ImageError(f"'{file}' is larger than {MOST_BYTES >> 20} MiB", too_large=True)
        return file.read_bytes()
    except OSError as error:
        raise ImageError(str(error)) from error


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


def decode_rgb(
    data: bytes, name: str, max_pixels: int = MOST_PIXELS, background: str = WHITE
) -> np.ndarray:
    """The image file `data` as uint8 [H, W, 3]; ImageError, which calls it `name`, if it is none.

    Its header is read, and refused, before its pixels. It is turned as its EXIF orientation says;
    what is transparent shows the colour `background`; 16 bits of grey become 8.
    """
    with opened(io.BytesIO(data), name, max_pixels=max_pixels) as image:
        if image.mode not in (*MODES, *DEEP):
            raise ImageError(f"{name} has mode {image.mode}, which has no 8-bit RGB")
        return np.array(_seen(ImageOps.exif_transpose(image), background))


def _seen(image: Image.Image, background: str) -> Image.Image:
    """In RGB, nothing transparent."""
    if image.mode in DEEP:
        grey = np.asarray(image, np.uint32).clip(0, 65535)
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        above = image.convert("RGBA")
        below = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(below, above)
    return image.convert("RGB")


def fitted(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`image`, uint8 [h, w, 3], at `size` (height, width): scaled until it covers that, without
    distortion, and cut to its middle. An image of that size stays as it is."""
    if image.shape[:2] == size:
        return image
    found = ImageOps.fit(Image.fromarray(image), (size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(found)


def check_colour(name: str) -> str:
    """A colour by its name or as #rrggbb; ValueError for anything else."""
    ImageColor.getrgb(name)
    return name
