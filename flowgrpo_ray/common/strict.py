"""The base of everything that a spec is read into: strict keys, strict types, no changes later.

And what is told of a value that does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

MOST_MISTAKES = 20  # told at once
LONGEST_VALUE = 200  # characters of a value in a message


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def mistakes(error: ValidationError, tell: Callable[[Any], str]) -> list[str]:
    """A line for each of pydantic's errors, as ``tell`` words it, but not for hundreds of them."""
    lines = [tell(problem) for problem in error.errors()[:MOST_MISTAKES]]
    more = error.error_count() - len(lines)
    return [*lines, f"and {more} more mistakes"] if more else lines


def mistake(key: str, problem: Any) -> str:
    """One line for one of pydantic's errors: key, what is wrong, the value found."""
    if problem["type"] == "missing":
        return f"{key}: this key is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, not {short(problem['input'])}"


def word(part: str | int) -> str:
    """A key as it may stand on a screen: one that holds control characters is quoted."""
    text = str(part)
    return text if text.isprintable() and len(text) <= LONGEST_VALUE else short(text)


def short(value: Any) -> str:
    """A value as it may stand in a message."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
