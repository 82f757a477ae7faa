"""The text that a prompt wants to be read: where it is quoted, what counts, who has its letters."""

from __future__ import annotations

import functools
import importlib.util
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowgrpo_ray.common.errors import ModelError

QUOTES = {'"': '"', "“": "”", "„": "“”", "«": "»", "「": "」", "『": "』", "＂": "＂"}
QUOTED = re.compile("|".join(f"{start}([^{end}]*)[{end}]" for start, end in QUOTES.items()))
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # to their narrow forms
WHEEL_MODEL = "PP-OCRv6_rec_small.onnx"  # that reads lines
INVISIBLE = ("Cc", "Cf")  # Unicode categories: controls, and marks such as a zero-width space


def quoted_target(prompt: str) -> str:
    """The text to render: the FIRST part of `prompt` in double quotes of any kind.

    Typographic single quotes and apostrophes belong to the text. A prompt with several quoted
    parts whose others matter needs the metadata key `target`; so does one with an odd number of
    straight quotes, of which one stands for inches.
    """
    if prompt.count('"') % 2:
        raise ValueError(
            f"an odd number of straight double quotes in the prompt {prompt!r}: which text is "
            "meant? Write inches as ″, or give the text as metadata 'target'"
        )
    match = QUOTED.search(prompt)
    if match is None:
        raise ValueError(f'no text in double quotes ("...") in the prompt {prompt!r}')
    target = match[match.lastindex or 0]
    if not plain(target):
        raise ValueError(f"the text in double quotes is empty in the prompt {prompt!r}")
    return target


def target_of(prompt: str, metadata: Mapping[str, Any]) -> str:
    """The text to render: the metadata's `target` if there is one, else the quoted part."""
    if "target" not in metadata:
        return quoted_target(prompt)
    target = metadata["target"]
    if not isinstance(target, str) or not plain(target):
        raise ValueError(f"metadata 'target' is {target!r}, not a text, for the prompt {prompt!r}")
    return target


def is_read(prompt: str, metadata: Mapping[str, Any], read: str) -> bool:
    """Whether the text to render stands in `read`, the beginning of `prompt`, if it does in all."""
    target = target_of(prompt, metadata)
    if "target" in metadata:
        return plain(target) in plain(read) or plain(target) not in plain(prompt)
    match = QUOTED.search(read)
    return match is not None and match[match.lastindex or 0] == target


def plain(text: str) -> str:
    """What is compared: lowercased, without white space and what nobody sees; accents composed,
    full-width letters narrow."""
    return _visible(text).lower()


def _visible(text: str) -> str:
    composed = unicodedata.normalize("NFC", text).translate(FULL_WIDTH)
    return "".join(
        c for c in composed if not c.isspace() and unicodedata.category(c) not in INVISIBLE
    )


def check_letters(target: str, rec_model: str | None) -> None:
    """ValueError for a text with a letter that the recognition model never puts out."""
    unusual = [letter for letter in _visible(target) if not letter.isascii()]
    known = letters_of(rec_model) if unusual else None
    if known is None:
        return
    for letter in unusual:
        if known.isdisjoint((letter, letter.lower(), letter.upper())):
            name = unicodedata.name(letter, "no name")
            raise ValueError(
                f"the reader has no {letter!r} ({name}), so that not even a perfect picture of "
                f"{target!r} would score 1. Leave the prompt out, read with a rec_model that has "
                "it, or set unreadable: keep"
            )


@functools.cache
def letters_of(rec_model: str | None) -> frozenset[str] | None:
    """What a recognition model can put out: that of RapidOCR's wheel, or of a folder; None if it is
    to be downloaded."""
    if rec_model is None:
        return frozenset(wheel_letters())
    import yaml

    from flowgrpo_ray.common.paths import expand

    file = expand(rec_model) / "inference.yml"
    if not file.is_file():
        return None
    try:
        return frozenset(yaml.safe_load(file.read_text("utf-8"))["PostProcess"]["character_dict"])
    except (ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        return None  # what is wrong with it is said by who loads it


def wheel_letters() -> list[str]:
    """What the recognition model of RapidOCR's wheel puts out, in its order."""
    from onnxruntime import InferenceSession

    session = InferenceSession(wheel_file(WHEEL_MODEL), providers=["CPUExecutionProvider"])
    return session.get_modelmeta().custom_metadata_map["character"].splitlines()


def wheel_file(name: str) -> Path:
    """A model of RapidOCR's wheel, found without importing it; ModelError if it is not there."""
    spec = importlib.util.find_spec("rapidocr")
    file = Path((spec and spec.origin) or "rapidocr").parent / "models" / name
    if not file.is_file():
        raise ModelError(f"{file}: the models of rapidocr 3.10 are not there; install it again")
    return file
