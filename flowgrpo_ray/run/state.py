"""What a run is doing now, as live.json in its folder says; the driver rewrites it every second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowgrpo_ray.common.strict_json import parse

LIVE = "live.json"
LOG = "driver.log"  # what the run told, line by line
OBJECTIVE = "objective.json"  # its card, for whoever shows the run
ACTIVE = ("starting", "running", "stopping")
ENDED = ("stopped", "finished", "failed")
SILENCE_S = 15.0  # an active run that has not been heard of for longer is lost


def read_json(path: Path) -> dict[str, Any] | None:
    """A file's JSON object; ``None`` if there is no file, ``ValueError`` if it is no object."""
    if leads_out(path):
        return None
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    value = parse(content)
    if not isinstance(value, dict):
        raise ValueError("does not hold a JSON object")
    return value


def leads_out(path: Path) -> bool:
    """Whether a file of a run folder is a link to something outside of it.

    A run makes no links. In a folder that came from somebody else one would have this program show
    a file of the reader's, or write to it; so to readers it is not there.
    """
    if not path.is_symlink():
        return False
    try:
        return not path.resolve().is_relative_to(path.parent.resolve())
    except (OSError, RuntimeError):  # a link in a circle
        return True


def state_of(live: Mapping[str, Any] | None, summary: Mapping[str, Any] | None, now: float) -> str:
    """One of ``ACTIVE``, ``ENDED``, "lost" or "unknown"; ``now`` in unix seconds.

    ``summary`` is what summary.json holds: it is written when the training ends, a moment before
    live.json says so, and removed when the run goes on.
    """
    if live is None:
        return "finished" if summary else "unknown"
    state, updated = live.get("state"), live.get("updated")
    if state in ENDED:
        return str(state)
    if state not in ACTIVE or not isinstance(updated, int | float):
        return "unknown"
    if summary and state != "starting":
        done, wanted = summary.get("iterations"), live.get("iterations")
        return "finished" if done == wanted else "stopped"
    return "lost" if now - updated > SILENCE_S else str(state)
