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
    """SpecError for what is there already, unless it is a file that may be replaced, and for a
    place where nothing can be written."""
    if file.exists() and not (overwrite and file.is_file()):
        raise SpecError(f"{named} exists; give another name, or --overwrite for a file")
    check_place(file, named)


def check_place(path: Path, named: str) -> None:
    """SpecError where neither the folder of `path` nor one above it, if that is still to be made,
    can be written to: before hours of work, rather than after them."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise SpecError(f"{named}: {there} is no folder that can be written to")
