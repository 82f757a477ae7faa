"""The toy task of the embedded editing model: give a sign another colour, and leave its text alone.

A prompt such as `make the sign blue` names the colour; the picture that it changes shows the text.
Texts that `flowgrpo_ray.rewards.signs` holds out are in no training.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from flowgrpo_ray.rewards import signs

WORDS = ("make", "the", "sign", *signs.COLOURS)
SETS = {"train": (64, False), "heldout": (32, True)}  # how many prompts, whether of held-out texts
FOLDER = "tiny-edit"  # of the pictures, beside the prompt files


def prompt_of(colour: str) -> str:
    """What to ask for."""
    return f"make the sign {colour}"


class Edit(NamedTuple):
    """A sign with `text` on the colour `source` that shall become `wanted`."""

    text: str
    source: str
    wanted: str

    @property
    def picture(self) -> str:
        """The file of the sign to change, from the prompt file's folder."""
        return f"{FOLDER}/{self.source}-{self.text}.png"

    @property
    def line(self) -> str:
        """Of a prompt file; `target` is the text to be read, for the OCR reward."""
        row = {"prompt": prompt_of(self.wanted), "image": self.picture, "target": self.text}
        return json.dumps(row)


def make_edits(count: int, heldout: bool, seed: int) -> list[Edit]:
    """`count` edits of signs with different texts; sources and wanted colours in equal shares."""
    colours = list(signs.COLOURS)
    found: list[Edit] = []
    for i, prompt in enumerate(signs.make_prompts(count, heldout=heldout, seed=seed)):
        text, source = signs.parse_prompt(prompt)
        turn = 1 + i // len(colours) % (len(colours) - 1)  # so that each becomes each other
        found.append(Edit(text, source, colours[(i + turn) % len(colours)]))
    return found


def draw_pair(
    text: str, source: str, wanted: str, shown: str, key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Two signs uint8 [HEIGHT, WIDTH, 3] that differ in colour, and in text where `shown`, that of
    the first, is not `text`; font, shade, ink and place are those of `key`."""
    before = signs.render(shown, source, random.Random(key))
    return before, signs.render(text, wanted, random.Random(key))


def picture_of(edit: Edit) -> np.ndarray:
    """The sign to change, uint8 [HEIGHT, WIDTH, 3]."""
    return signs.render(edit.text, edit.source, random.Random(edit.picture))


def write_prompts(folder: Path, seed: int) -> None:
    """The prompt files, and the pictures that they name."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, (count, heldout) in SETS.items():
        edits = make_edits(count, heldout, seed)
        lines = "".join(edit.line + "\n" for edit in edits)
        (folder / f"{FOLDER}-{name}.jsonl").write_text(lines)
        for edit in edits:
            Image.fromarray(picture_of(edit)).save(folder / edit.picture, optimize=True)
