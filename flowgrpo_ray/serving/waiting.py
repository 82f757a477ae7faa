"""Waiting until applications run, for whoever deployed them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from flowgrpo_ray.common.errors import RewardError


def until_running(
    waiting: Callable[[], Mapping[str, str]], *, deadline_s: float, setting: str, every_s: float
) -> None:
    """Returns when `waiting` names nothing more that does not run, {name: what is said of it}.

    RewardError after the deadline, which `setting` names for the user.
    """
    end = time.monotonic() + deadline_s
    while still := waiting():
        if time.monotonic() > end:
            raise RewardError(
                f"not running after {deadline_s:g} s: {still}. ray status shows what waits for "
                f"resources; a slow download wants a larger {setting}"
            )
        time.sleep(every_s)
