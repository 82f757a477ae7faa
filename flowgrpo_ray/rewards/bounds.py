"""Bounds that options of several rewards have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_counts(**counts: int | None) -> None:
    """ValueError for an option below 1; one that is not given is None."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def check_device(options: Mapping[str, Any], gpus: float) -> None:
    """ValueError for an option `device` that is not what `gpus` reserves."""
    device = str(options.get("device") or "")
    if device.startswith("cuda") and not gpus:
        raise ValueError(
            f"options.device = {device!r} and gpus = 0: a replica sees no GPU that it has not "
            "reserved. Give it a share (gpus: 0.25), or leave device out"
        )
    if device == "cpu" and gpus:
        raise ValueError(
            f"options.device = 'cpu' and gpus = {gpus:g}: the share of a GPU would be reserved and "
            "never used. Set gpus: 0, or leave device out"
        )


def check_seconds(**seconds: float) -> None:
    """ValueError for an option that is not above 0."""
    for name, value in seconds.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
