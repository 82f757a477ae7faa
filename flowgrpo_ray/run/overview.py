"""Many runs side by side: what differs in their specs, which are the same but for the seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from flowgrpo_ray.run.brief import brief
from flowgrpo_ray.run.found import find_runs, is_run
from flowgrpo_ray.run.tracking import Row

OTHERWISE = {"name", "seed"}  # keys that runs of one group may differ in
LARGEST = 1e150  # the square of a larger number is none


def overview(root: Path) -> Row:
    """Every run below `root`, or `root` itself, and the keys of their specs that differ.

    ``runs`` are as of `brief`, each with the ``values`` of ``keys``, and ``group``: the name of the
    first run whose spec is the same but for name and seed. ``groups`` has the `mean_of` each.
    """
    runs = [brief(folder, name) for name, folder in find_runs(root).items()]
    return {"root": str(root.resolve()), "only": is_run(root), **compared(runs)}


def compared(runs: Sequence[Row]) -> Row:
    """The runs with what differs between them, of lines of `brief`; takes their ``spec`` out."""
    specs = [run.get("spec") for run in runs]
    keys = differing([spec for spec in specs if spec])
    firsts: dict[str, str] = {}
    lines: list[Row] = []
    for run, spec in zip(runs, specs, strict=True):
        line = {key: value for key, value in run.items() if key != "spec"}
        line["values"] = {key: spec[key] for key in keys if key in spec} if spec else {}
        same = None
        if spec:
            rest = {key: value for key, value in spec.items() if key not in OTHERWISE}
            same = firsts.setdefault(repr(sorted(rest.items())), run["name"])
        lines.append({**line, "group": same})
    grouped = {name: [line for line in lines if line["group"] == name] for name in firsts.values()}
    groups = {name: mean_of(of) for name, of in grouped.items() if len(of) > 1}
    return {"keys": keys, "runs": lines, "groups": groups}


def mean_of(runs: Sequence[Row]) -> Row:
    """Mean and standard deviation over runs (of a sample, n - 1) of what `brief` says of each."""
    names = dict.fromkeys(name for run in runs for name in run.get("rewards", {}))
    rewards = {
        name: {
            what: _spread([run.get("rewards", {}).get(name, {}).get(what) for run in runs])
            for what in ("before", "after", "best")
        }
        for name in names
    }
    whole = ("images_per_second", "seconds", "gpu_seconds")
    return {
        "size": len(runs),
        "rewards": rewards,
        **{key: _spread([run.get(key) for run in runs]) for key in whole},
    }


def _spread(values: Sequence[float | None]) -> Row:
    seen = [value for value in values if value is not None and abs(value) < LARGEST]
    return {
        "mean": fmean(seen) if seen else None,
        "std": stdev(seen) if len(seen) > 1 else None,
        "n": len(seen),
    }


def differing(specs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys, but for the name, in which flat specs differ: first those of several values, then
    those that some have not got."""
    keys = dict.fromkeys(key for spec in specs for key in spec if key != "name")
    values = {key: {repr(spec[key]) for spec in specs if key in spec} for key in keys}
    lacking = {key for key in keys if any(key not in spec for spec in specs)}
    odd = [key for key in keys if len(values[key]) > 1 or key in lacking]
    return sorted(odd, key=lambda key: (len(values[key]) == 1, key in lacking))
