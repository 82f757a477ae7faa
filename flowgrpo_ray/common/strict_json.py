"""JSON from files and from the network, which anyone may have written: one way to read it.

Python's own reader also takes NaN and numbers that become infinite, keeps the last of several
values of one key, gives texts that cannot be written anywhere, and fails at deep nesting with an
error that is not a ``ValueError``.
"""

from __future__ import annotations

import json
import math
from typing import Any

DEEPEST = 64  # levels; what this program writes has five


def parse(text: str | bytes) -> Any:
    """The value that ``text`` holds; ``ValueError`` if that is not JSON, or not fit to be used."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = _decoder.decode(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(value)
    if "\\u" in text:  # the only way in which half of a character comes into decoded text
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it holds a surrogate, which is half of a character") from None
    return value


def parse_at(text: str, start: int) -> Any:
    """The value that begins at a place of ``text``, which is JSON; ``ValueError`` as `parse`."""
    return _decoder.raw_decode(text, start)[0]


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice[:40]!r} more than once")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Made once: making it takes longer than reading a row.
_decoder = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_once)
