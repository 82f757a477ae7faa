"""Waiting until applications run, for whoever deployed them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from flowgrpo_ray.common.errors import RewardError

LOOKS = 4  # at what has arrived, within a deadline


def until_running(
    waiting: Callable[[], Mapping[str, str]],
    *,
    deadline_s: float,
    setting: str,
    every_s: float,
    arrived: Callable[[], int] | None = None,
) -> None:
    """Returns when `waiting` names nothing more that does not run, {name: what is said of it}.

    RewardError after the deadline, which `setting` names for the user. The deadline begins anew
    whenever more has `arrived`, the bytes that were downloaded up to now.
    """
    since = looked = time.monotonic()
    before: int | None = None
    while still := waiting():
        now = time.monotonic()
        if arrived is not None and now - looked > deadline_s / LOOKS:
            looked, come = now, arrived()
            if before is not None and come > before:
                since = now
            before = come
        if now - since > deadline_s:
            raise RewardError(
                f"not running after {deadline_s:g} s{' without a download' if arrived else ''}: "
                f"{still}. ray status shows what waits for resources; what takes longer to load "
                f"wants a larger {setting}"
            )
        time.sleep(every_s)
