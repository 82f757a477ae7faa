"""Warnings of the libraries in an actor: kept, so that the driver can tell each of them once.

By the place that warns: what differs from call to call is not told again and again. Deprecations
are for those who maintain this program, and what is told otherwise is left out.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
LOGGERS = ("", "diffusers", "transformers")  # these two pass nothing on to the first
NOT_OURS = ("ray", "uvicorn", "asyncio")  # Ray and Serve, whose own logs have it
KNOWN = (
    "deprecated",
    "truncated because",  # the run tells of long prompts before it starts
    "sequence length is longer than",  # and these
    "requires torchvision (not installed)",  # which nothing here needs
    "FSDP2-wrapped module",  # nothing here works in place on what those return
    "Mismatch dtype between input and weight",  # float32 masters under autocast are meant
)
MOST, LONGEST = 20, 500  # places, and letters of a text

_found: dict[str, str] = {}


def heard() -> Mapping[str, str]:
    """What has been heard in this process since `listen`, by the place that warned."""
    return dict(_found)


def listen() -> None:
    """Keep warnings from now on; they are printed as well, for the actor's log."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "warning"  # what this process was given is the driver's
    warnings.simplefilter("default")
    for category in DEPRECATIONS:
        warnings.simplefilter("ignore", category)
    show = warnings.showwarning

    def shown(message: Any, category: type[Warning], file: str, line: int, *more: Any) -> None:
        show(message, category, file, line, *more)
        _note(file, line, str(message))

    warnings.showwarning = shown
    for name in LOGGERS:
        logging.getLogger(name).addHandler(_Ear(logging.WARNING))


class _Ear(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] not in NOT_OURS:
            _note(record.pathname, record.lineno, record.getMessage())


def _note(file: str, line: int, text: str) -> None:
    text = " ".join(text.split())
    if len(_found) < MOST and text and not any(known in text for known in KNOWN):
        cut = text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
        _found.setdefault(f"{file}:{line}", cut)
