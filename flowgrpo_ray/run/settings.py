"""The resolved spec of a run folder as text and numbers, for those who show it.

As it was written: no class of the run is imported, and runs of other versions are read as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.run.state import leads_out
from flowgrpo_ray.spec.file import flat_keys, parse_yaml

SPEC = "spec.yaml"


def settings(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The resolved spec in a run folder, flat: {"optimizer.learning_rate": 0.0002}; and why it is
    not readable. Empty if it is not there.
    """
    path = folder / SPEC
    if leads_out(path) or not path.is_file():
        return {}, None
    text = path.read_text("utf-8", errors="replace")
    # By top-level keys: runs beside each other have most of them in common.
    sections = re.split(r"^(?=[A-Za-z_])", text, flags=re.MULTILINE)
    try:
        flat = [_section(section) for section in sections]
    except SpecError as error:
        return {}, f"{path} is not readable: {error}"
    return {key: value for section in flat for key, value in section.items()}, None


@lru_cache(maxsize=4096)
def _section(text: str) -> dict[str, Any]:
    value = parse_yaml(text, text.partition(":")[0]) if text.strip() else None
    return flat_keys(value or {}, keep_empty=True)


def weights_of(folder: Path) -> dict[str, Any]:
    """The weight of each reward in the resolved spec of a run folder."""
    flat, _ = settings(folder)
    names = dict.fromkeys(key.split(".")[1] for key in flat if key.startswith("rewards."))
    return {name: flat.get(f"rewards.{name}.weight") for name in names}


def gpus_of(spec: Mapping[str, Any]) -> float:
    """That the actors and the reward replicas of a run reserve together."""

    def of(place: str, count: str = "count") -> float:
        return (spec.get(f"{place}.{count}") or 0) * (spec.get(f"{place}.gpus") or 0.0)

    rewards = {key.split(".")[1] for key in spec if key.startswith("rewards.")}
    actors = of("cluster.workers") or of("cluster.rollout") + of("cluster.learner")
    return actors + sum(of(f"rewards.{name}", "replicas") for name in rewards)
