"""The toy task of the embedded base model: small coloured signs with three digits.

A prompt such as `red sign "407"` names a background colour and the text. Twelve in a hundred
texts are held out by a hash: no training, neither of the base model nor by reinforcement
learning, may see them. This module needs NumPy only; drawing also loads Pillow and Matplotlib,
whose data folder holds the DejaVu fonts, so that no system fonts are needed.
"""

from __future__ import annotations

import functools
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

if TYPE_CHECKING:
    from PIL import ImageFont

HEIGHT, WIDTH = 32, 48
DIGITS = "0123456789"
TEXTS = tuple(f"{number:03d}" for number in range(1000))
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 70, 60),
    "green": (70, 180, 90),
    "blue": (90, 140, 235),
    "yellow": (240, 215, 80),
    "white": (240, 240, 240),
    "pink": (245, 160, 200),
}

_FONTS = ("DejaVuSansCondensed-Bold.ttf", "DejaVuSans-Bold.ttf")
_FONT_SIZES = (22, 23, 24)
_COLOUR_JITTER = 12
_INK = 20  # of signs without variation
_MAX_SCALE = 6
_BORDER_ROWS = 4  # the digits never reach the four top and the four bottom rows
_PROMPT = re.compile(r'(\w+) sign "(\d{3})"')


def is_heldout(text: str) -> bool:
    """Whether `text` is one of the held-out texts, about 12 in 100."""
    return crc32(text.encode()) % 100 < 12


def prompt_of(text: str, colour: str) -> str:
    """The prompt of a sign: `red sign "407"`."""
    return f'{colour} sign "{text}"'


def parse_prompt(prompt: str) -> tuple[str, str]:
    """The text and the colour that `prompt` asks for: the inverse of `prompt_of`."""
    match = _PROMPT.fullmatch(prompt)
    if match is None or match[1] not in COLOURS:
        raise ValueError(f'not a sign prompt like red sign "407": {prompt!r}')
    return match[2], match[1]


def make_prompts(count: int, heldout: bool, seed: int) -> list[str]:
    """`count` prompts with `count` different texts, their colours in equal shares."""
    texts = [text for text in TEXTS if is_heldout(text) == heldout]
    if count > len(texts):
        raise ValueError(f"count={count}, but there are only {len(texts)} such texts")
    chosen = random.Random(f"prompts {seed} {heldout}").sample(texts, count)
    colours = list(COLOURS)
    return [prompt_of(text, colours[i % len(colours)]) for i, text in enumerate(chosen)]


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def render(text: str, colour: str, rng: random.Random) -> np.ndarray:
    """Draws a sign as uint8 [HEIGHT, WIDTH, 3]; font, shade and place vary with `rng`."""
    jitter = [rng.randint(-_COLOUR_JITTER, _COLOUR_JITTER) for _ in range(3)]
    red, green, blue = (
        min(255, channel + shift) for channel, shift in zip(COLOURS[colour], jitter, strict=True)
    )
    ink = rng.randint(0, 45)
    font = _font(rng.choice(_FONTS), rng.choice(_FONT_SIZES))
    dx, dy = rng.uniform(-1, 1), rng.uniform(-2, 2)
    pitch, baseline = WIDTH / len(text), HEIGHT / 2 + 8 + dy
    return _draw((HEIGHT, WIDTH), (red, green, blue), text, font, ink, dx, pitch, baseline)


def render_plain(text: str, colour: str, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """Draws a sign without variation as uint8 [*size, 3], its background exactly `colour`.

    The text is as large as a small sign's, scaled to `size`, but at most `_MAX_SCALE` times, as
    detectors of text overlook digits that fill a large picture. A long text is drawn smaller.
    """
    height, width = size
    cell = WIDTH / 3  # of a digit
    cells = len(text) + 1 if len(text) > 3 else 3  # a long text keeps a margin
    scale = min(height / HEIGHT, width / (cell * cells), _MAX_SCALE)
    pitch, baseline = cell * scale, height / 2 + 8 * scale
    left = (width - pitch * len(text)) / 2
    font = _font(_FONTS[0], round(_FONT_SIZES[1] * scale))
    return _draw(size, COLOURS[colour], text, font, _INK, left, pitch, baseline)


def _draw(
    size: tuple[int, int],
    background: tuple[int, int, int],
    text: str,
    font: ImageFont.FreeTypeFont,
    ink: int,
    left: float,
    pitch: float,
    baseline: float,
) -> np.ndarray:
    """Each character centred in its own cell of `pitch` columns, the first one at `left`."""
    from PIL import Image, ImageDraw

    height, width = size
    image = Image.new("RGB", (width, height), background)
    draw = ImageDraw.Draw(image)
    for i, character in enumerate(text):
        place = (pitch * (i + 0.5) + left, baseline)
        draw.text(place, character, font=font, fill=(ink, ink, ink), anchor="ms")
    return np.asarray(image)


def colour_error(image: np.ndarray, colour: str) -> float:
    """Mean absolute RGB error, 0 to 255, of the background of `image` against `colour`.

    The background is the border above and below the digits. Signs that `render` draws have about
    6, because their shade varies on purpose.
    """
    border = np.concatenate([image[:_BORDER_ROWS], image[-_BORDER_ROWS:]]).astype(np.float64)
    return float(np.abs(border - np.array(COLOURS[colour])).mean())
