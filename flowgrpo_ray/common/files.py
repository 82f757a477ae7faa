"""Files that are written whole or not at all, and over none that is there unasked."""

from __future__ import annotations

import os
from pathlib import Path

from flowgrpo_ray.common.errors import SpecError


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside, fsync, rename: no reader and no crash ever meets half a file."""
    beside = path.with_name(path.name + ".part")
    beside.unlink(missing_ok=True)  # it may be a link to a file that must not be written
    with beside.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def check_free(file: Path, overwrite: bool, named: str) -> None:
    """SpecError for what is there already, unless it is a file that may be replaced."""
    if file.exists() and not (overwrite and file.is_file()):
        raise SpecError(f"{named} exists; give another name, or --overwrite for a file")
