"""Prompt files, read as what their names say they are: text, JSON, CSV or Parquet."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowgrpo_ray.common.errors import NotFetchedError, PromptError
from flowgrpo_ray.common.paths import builtin_path, expand
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.common.types import Edit, Request, Source
from flowgrpo_ray.spec import hub_sets
from flowgrpo_ray.spec.public_prompts import where_from

MOST_BYTES = 2**30  # of a prompt file, which is held in memory
LONGEST = 2**16  # characters of a prompt and its metadata
IMAGES = ("image", "images")  # keys of a line that an editing model draws from


@dataclass(frozen=True)
class Prompt:
    """One prompt and what a reward may need beside it."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    set: str = ""  # the name of the one that it belongs to, where there are several
    images: tuple[Source, ...] = ()  # that an editing model changes
    place: str = field(default="", compare=False)  # in its file, for messages

    @property
    def names_images(self) -> bool:
        """Whether its line has a key that an editing model draws from."""
        return not self.metadata.keys().isdisjoint(IMAGES)

    def request(self, size: tuple[int, int]) -> Request:
        """What a model is asked for, to be drawn at ``size`` (height, width)."""
        return Edit(self.text, self.images, size) if self.images else self.text


def check_alike(counts: Iterable[int], key: str) -> None:
    """``PromptError`` unless all prompts name as many images."""
    if len(found := sorted(set(counts))) > 1:
        raise PromptError(
            f"{key}: some prompts name {found[0]} source images and others {found[-1]}: all "
            "prompts of a run name as many"
        )


def load_prompts(path: str, key: str) -> list[Prompt]:
    """The prompts of a file of this machine, of the package (`builtin:`) or of a data set on the
    hub (`hf://datasets/owner/name@revision/file`), in their order; `READERS` has the kinds.

    ``PromptError``, which names the spec key ``key``, for a file or a line that holds none.
    """
    named = f"{key} = {path!r}"
    file = (
        hub_sets.fetch(path, named)
        if path.startswith(hub_sets.HUB)
        else builtin_path(path) or expand(path)
    )
    if not os.path.isfile(file):  # a name that no file can have is no error to it
        public = where_from(path)
        kind = NotFetchedError if public else PromptError
        raise kind(f"{named}: there is no such file{public}")
    read = READERS.get(file.suffix.lower())
    if read is None:
        raise PromptError(
            f"{named}: prompts are not read from {file.suffix or 'a file without suffix'}; "
            f"kinds of files: {', '.join(READERS)}"
        )
    prompts: list[Prompt] = []
    for place, make in read(_read(file, named), named):
        try:
            prompts.append(replace(_bounded(make()), place=place))
        except ValueError as error:
            raise PromptError(f"{named}: {place} holds no prompt: {error}") from error
    if not prompts:
        raise PromptError(f"{named}: the file holds no prompts")
    return prompts


def _read(file: Path, named: str) -> bytes:
    """The content of a prompt file."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise PromptError(f"{named}: larger than {MOST_BYTES >> 20} MiB; split the file")
        return file.read_bytes()
    except OSError as error:
        raise PromptError(f"{named}: cannot be read: {error.strerror}") from error


def _bounded(prompt: Prompt) -> Prompt:
    """``ValueError`` for one that is longer than any prompt is."""
    try:
        length = len(prompt.text) + (len(json.dumps(prompt.metadata)) if prompt.metadata else 0)
    except TypeError as error:  # of Parquet: a time, bytes
        cells = {name: value for name, value in prompt.metadata.items() if isinstance(value, dict)}
        if pictures := [name for name, value in cells.items() if "bytes" in value]:
            raise ValueError(
                f"{pictures[0]!r} holds a picture itself: write the pictures to files, and their "
                "paths into the rows (docs/editing.md has a program for it)"
            ) from error
        raise ValueError(f"{error}; keep texts, numbers and lists") from error
    if length > LONGEST:
        raise ValueError(f"{length:,} characters; at most {LONGEST:,}")
    return prompt


# --- kinds of files: each place in one that is not empty, and what makes its prompt

Places = Iterator[tuple[str, Callable[[], Prompt]]]


def _text(content: bytes, named: str) -> str:
    try:
        return content.decode("utf-8").removeprefix("\ufeff")  # a byte order mark
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\r|\n", error.object[: error.start])) + 1
        raise PromptError(f"{named}: line {line} is not UTF-8 text") from error


def _lines(content: bytes, named: str) -> Iterator[tuple[str, str]]:
    """Lines of text that end as on any system; by none of the other signs that end one to Python:
    JSON text may hold U+2028 and its like."""
    for number, line in enumerate(re.split(r"\r\n|\r|\n", _text(content, named)), 1):
        if text := line.strip():
            yield f"line {number}", text


def _of_lines(content: bytes, named: str) -> Places:
    for place, line in _lines(content, named):
        yield place, lambda line=line: Prompt(line)


def _of_json_lines(content: bytes, named: str) -> Places:
    for place, line in _lines(content, named):
        yield place, lambda line=line: _of_row(_json(line))


def _of_json(content: bytes, named: str) -> Places:
    try:
        rows = _json(_text(content, named))
    except ValueError as error:
        raise PromptError(f"{named}: {error}") from error
    if not isinstance(rows, list):
        raise PromptError(f"{named}: a .json file of prompts is one list; is this a .jsonl file?")
    for number, row in enumerate(rows, 1):
        yield f"item {number}", lambda row=row: _of_row({"prompt": row} if _is_text(row) else row)


def _of_csv(content: bytes, named: str) -> Places:
    rows = csv.DictReader(io.StringIO(_text(content, named), newline=""), strict=True)
    try:
        numbered = [(f"line {rows.line_num}", row) for row in rows]
    except csv.Error as error:
        raise PromptError(f"{named}: not CSV after line {rows.line_num}: {error}") from error
    yield from _of_table(rows.fieldnames or [], numbered, named)


def _of_parquet(content: bytes, named: str) -> Places:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise PromptError(f"{named}: a .parquet file needs pyarrow: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (OSError, pyarrow.ArrowException) as error:
        raise PromptError(f"{named}: not Parquet: {error}") from error
    rows = ((f"row {number}", row) for number, row in enumerate(table.to_pylist(), 1))
    yield from _of_table(table.column_names, rows, named)


def _of_table(columns: Sequence[str], rows: Iterable[tuple[str, Any]], named: str) -> Places:
    """Of a table with the column ``prompt``; the others are metadata, but for empty cells."""
    if "prompt" not in columns:
        raise PromptError(f"{named}: no column is called prompt; columns: {', '.join(columns)}")
    for place, row in rows:
        kept = {name: value for name, value in row.items() if value not in (None, "")}
        yield place, lambda kept=kept: _of_row(kept)


def _json(text: str) -> Any:
    try:
        return parse(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from error


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _of_row(row: Any) -> Prompt:
    """One prompt of a mapping that holds it under "prompt"."""
    if not isinstance(row, dict) or not _is_text(row.get("prompt")):
        keys = f"; its keys: {', '.join(map(str, row))}" if isinstance(row, dict) else ""
        raise ValueError(f'expected a JSON object with a string under "prompt"{keys}')
    metadata = dict(row)
    text: str = metadata.pop("prompt")
    if None in metadata:
        raise ValueError(f"more cells than columns: {metadata[None]}")
    return Prompt(text, metadata)


READERS: Mapping[str, Callable[[bytes, str], Places]] = {
    ".txt": _of_lines,
    ".jsonl": _of_json_lines,
    ".ndjson": _of_json_lines,
    ".json": _of_json,
    ".csv": _of_csv,
    ".parquet": _of_parquet,
}
