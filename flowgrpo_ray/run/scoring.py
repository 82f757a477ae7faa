"""Scores of image files without a run: the files and their prompts, the rewards, the table.

This module needs NumPy and Pillow alone; a reward's own libraries are imported when it is built.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowgrpo_ray.common.errors import RewardError, SpecError
from flowgrpo_ray.common.files import check_free, write_atomic
from flowgrpo_ray.common.images import WHITE, ImageError, decode_rgb, read_bytes
from flowgrpo_ray.common.sources import pictures
from flowgrpo_ray.common.types import Edit
from flowgrpo_ray.rewards import Reward, ask, checked

if TYPE_CHECKING:
    from flowgrpo_ray.spec.prompts import Prompt

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TOTAL = "total"


def find_images(place: Path) -> list[Path]:
    """The image files of a folder, image2 before image10, or the one file `place`."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise SpecError(f"IMAGES = '{place}': there is no such folder or file")
    files = [
        file
        for file in place.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    ]
    if not files:
        raise SpecError(f"IMAGES = '{place}': the folder holds no {', '.join(SUFFIXES)} files")
    return sorted(files, key=_natural)


def _natural(file: Path) -> tuple[list[Any], str]:
    """Texts and numbers in turn, so that equal places hold equal types."""
    parts = re.split(r"(\d+)", file.name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name


def pair(files: Sequence[Path], prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompt of each file: prompt i of image i, or the only one of all."""
    if len(prompts) == 1:
        return [prompts[0]] * len(files)
    if len(files) != len(prompts):
        n = min(len(files), len(prompts))
        odd = (
            f"'{files[n].name}' has no prompt"
            if len(files) > n
            else f"the prompt {prompts[n].text!r} has no image"
        )
        raise SpecError(
            f"IMAGES holds {len(files)} files, but PROMPTS {len(prompts)} prompts: {odd}. Give one "
            "prompt per image, in the order of the files' names, or one for all"
        )
    return list(prompts)


def plan_batches(files: Sequence[Path], batch: int, background: str = WHITE) -> list[list[int]]:
    """Places in `files` of up to `batch` images of one size.

    Every file is decoded once for this: one that is torn is found now and not after hours.
    """
    sizes: dict[tuple[int, ...], list[int]] = {}
    for place, file in enumerate(files):
        sizes.setdefault(_read(file, background).shape, []).append(place)
    return [
        places[i : i + batch] for places in sizes.values() for i in range(0, len(places), batch)
    ]


def _read(file: Path, background: str) -> np.ndarray:
    """uint8 [H, W, 3]."""
    try:
        return decode_rgb(read_bytes(file), f"'{file}'", background=background)
    except ImageError as error:
        raise SpecError(f"IMAGES: {error}") from error


def score_files(
    name: str,
    reward: Reward,
    files: Sequence[Path],
    prompts: Sequence[Prompt],
    batches: Iterable[Sequence[int]],
    background: str = WHITE,
) -> np.ndarray:
    """Scores, float32 [n]; NaN: no score. RewardError if `reward` fails or returns no scores."""
    scores = np.full(len(files), np.nan, np.float32)
    for places in batches:
        images = np.stack([_read(files[i], background) for i in places])
        images.flags.writeable = False
        texts, metadata = [prompts[i].text for i in places], [prompts[i].metadata for i in places]
        sources = sources_of([prompts[i] for i in places], (images.shape[1], images.shape[2]))
        what = (
            f"reward {name!r} failed on {len(places)} images, "
            f"'{files[places[0]].name}' to '{files[places[-1]].name}'"
        )
        try:
            scores[places] = checked(ask(reward, images, texts, metadata, sources), len(places))
        except Exception as error:
            raise RewardError(f"{what}: {type(error).__name__}: {error}") from error
    return np.where(np.isfinite(scores), scores, np.float32(np.nan))


def sources_of(prompts: Sequence[Prompt], size: tuple[int, int]) -> np.ndarray | None:
    """The source images of prompts, uint8 [b, n, H, W, 3] at `size`, each read once; None where
    they name none."""
    edits = [of for prompt in prompts if isinstance(of := prompt.request(size), Edit)]
    found = {edit: pictures(edit) for edit in dict.fromkeys(edits)}
    return np.stack([found[edit] for edit in edits]) if edits else None


def as_rows(
    files: Sequence[Path], prompts: Sequence[Prompt], columns: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """A row per image; a score that is missing is None."""
    return [
        {
            "file": file.name,
            "prompt": prompt.text,
            **{name: _number(float(scores[i])) for name, scores in columns.items()},
        }
        for i, (file, prompt) in enumerate(zip(files, prompts, strict=True))
    ]


def _number(score: float) -> float | None:
    return score if math.isfinite(score) else None


def check_table_file(out: Path, overwrite: bool) -> None:
    """SpecError for a file that `write_table` could not, or must not, write."""
    if out.suffix not in (".csv", ".jsonl"):
        raise SpecError(f"--out {out}: the name must end in .csv or .jsonl")
    if not os.access(out.parent, os.W_OK):
        raise SpecError(f"--out {out}: no folder '{out.parent}' that can be written to; make it")
    check_free(out, overwrite, f"--out {out}")


def write_table(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row: JSON (.jsonl), or CSV below a line of names, None as an empty cell."""
    text = io.StringIO()
    if out.suffix == ".jsonl":
        text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_atomic(out, text.getvalue().encode())
