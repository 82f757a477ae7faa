"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 300.0  # only ends what hangs: a busy machine may take its time


def wait_until(
    true: Callable[[], object], what: str, seconds: float = PATIENCE_S, pause: float = 0.05
) -> None:
    """Ask every `pause` seconds; AssertionError if it is not true within `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(pause)
