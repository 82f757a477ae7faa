"""What a shell offers for an argument: names of recipes, rewards and runs, beside paths.

Where nothing here begins with what was typed, the shell completes file names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from flowgrpo_ray.common.errors import FlowGrpoError
from flowgrpo_ray.common.paths import runs_root


def recipes(incomplete: str) -> list[str]:
    """Names of recipes."""
    from flowgrpo_ray.spec.file import recipe_names

    return _that_begin(incomplete, recipe_names())


def specs(incomplete: str) -> list[str]:
    """Recipes, and YAML files of this machine."""
    return recipes(incomplete) + _paths(incomplete)


def rewards(incomplete: str) -> list[str]:
    """Names of built-in rewards."""
    from flowgrpo_ray.rewards import BUILTIN

    return _that_begin(incomplete, BUILTIN)


def specs_and_rewards(incomplete: str) -> list[str]:
    """What `rewards check` looks at."""
    return specs(incomplete) + rewards(incomplete)


def runs(incomplete: str) -> list[str]:
    """Run folders, below where runs go."""
    from flowgrpo_ray.run.found import find_runs

    try:
        root = runs_root(None)
    except FlowGrpoError:  # the command will say it
        return []
    found = find_runs(root).values() if root.is_dir() else ()
    return _that_begin(incomplete, map(str, found))


def runs_and_specs(incomplete: str) -> list[str]:
    """What `sample` and `evaluate` take."""
    return runs(incomplete) + specs(incomplete)


def _that_begin(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))


def _paths(incomplete: str) -> list[str]:
    """Folders and YAML files whose paths begin like this."""
    folder, beginning = os.path.split(incomplete)
    if not os.path.isdir(folder or "."):
        return []
    with os.scandir(folder or ".") as entries:
        return sorted(
            os.path.join(folder, entry.name) + "/" * entry.is_dir()
            for entry in entries
            if entry.name.startswith(beginning)
            and (beginning or not entry.name.startswith("."))
            and (entry.is_dir() or entry.name.endswith((".yaml", ".yml")))
        )
