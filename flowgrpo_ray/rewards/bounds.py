"""Bounds that options of several rewards have."""

from __future__ import annotations


def check_counts(**counts: int | None) -> None:
    """ValueError for an option below 1; one that is not given is None."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def check_seconds(**seconds: float) -> None:
    """ValueError for an option that is not above 0."""
    for name, value in seconds.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
