"""The option `device`, against the GPUs that a replica reserves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
