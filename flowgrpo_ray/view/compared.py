"""Runs side by side, as one JSON document: what differs, their curves, and the same held-out
prompts drawn from the same noise."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from flowgrpo_ray.common.errors import RunFolderError
from flowgrpo_ray.common.files import write_atomic
from flowgrpo_ray.run.brief import brief, spread
from flowgrpo_ray.run.found import as_written, mark_of
from flowgrpo_ray.run.overview import compared
from flowgrpo_ray.run.tracking import METRICS, SAMPLES, TIMINGS, Row
from flowgrpo_ray.view.page import whole_page
from flowgrpo_ray.view.report import rows_of
from flowgrpo_ray.view.shots import data_address, find_shots, shown

MOST_COLUMNS = 6  # evaluations of each run whose pictures a file holds, first and last among them


def comparison(folders: Mapping[str, Path], address: Callable[[str, Path], str]) -> Row:
    """What `compared` says of the runs, and of each its ``curves`` and ``samples``.

    address: of a run's name and a picture. ``since`` changes when anything but an age does.
    """
    found = compared([brief(folder, name) for name, folder in folders.items()])
    told = [{key: value for key, value in line.items() if key != "age"} for line in found["runs"]]
    marks = []
    for line in found["runs"]:
        folder, name = folders[line["name"]], line["name"]
        names = sorted((folder / SAMPLES).glob("*.*"))
        mark = tuple(mark_of(path) for path in (folder / METRICS, folder / TIMINGS, *names))
        marks.append(mark)
        try:
            with as_written(folder):
                line["curves"] = curves(folder, mark[:2])
                shots = find_shots(folder, [])
                line["samples"] = [shown(about, address(name, path)) for path, about in shots]
        except RunFolderError as error:
            line |= {"state": "unreadable", "message": str(error), "curves": None, "samples": []}
    since = hashlib.sha256(json.dumps([told, marks]).encode()).hexdigest()[:16]
    return {"compared": True, "now": time.time(), "since": since, "missing": [], **found}


@lru_cache(maxsize=64)
def curves(folder: Path, _marks: tuple[object, ...]) -> Row:
    """Lists over the iterations: ``seconds`` since the first began (evaluations included, starts
    not), training means of each reward and of the ``total``, and so on; and the ``evals``."""
    metrics, timings = rows_of(folder / METRICS), rows_of(folder / TIMINGS)
    train = [row for row in metrics if row["kind"] == "train"]
    evals = [row for row in metrics if row["kind"] == "eval"]
    names = dict.fromkeys(name for row in [*evals[:1], *train] for name in row["rewards"])
    elapsed, paces = 0.0, {}
    clock = {0: 0.0}
    for row in timings:
        if row["kind"] == "start":
            continue
        elapsed += row.get("seconds") or 0.0
        if row["kind"] == "train":
            clock[row["iteration"]] = elapsed
            paces[row["iteration"]] = row.get("images_per_second")
    found = {
        "iterations": [row["iteration"] for row in train],
        "seconds": [clock.get(row["iteration"]) for row in train],
        "rewards": {
            name: [(row["rewards"].get(name) or {}).get("mean") for row in train] for name in names
        },
        "total": [(row.get("reward") or {}).get("mean") for row in train],
        "kl": [row.get("kl") for row in train],
        "pace": [paces.get(row["iteration"]) for row in train],
        "evals": [
            {
                "iteration": row["iteration"],
                "seconds": clock.get(row["iteration"]),  # when its weights were made
                "rewards": row["rewards"],
            }
            for row in evals
        ],
    }
    json.dumps(found, allow_nan=False)  # a ValueError here is told as damage of the folder
    return found


def write_comparison(folders: Mapping[str, Path], path: Path) -> None:
    """One file that holds the page of a comparison, its pictures too, and asks for nothing."""
    data = comparison(folders, lambda name, picture: str(picture))
    for line in data["runs"]:
        shots = spread(line["samples"], MOST_COLUMNS)
        line["samples"] = [{**shot, "image": _inside(shot)} for shot in shots]
    write_atomic(path, whole_page(data, f"{len(data['runs'])} runs compared").encode())


def _inside(shot: Row) -> str:
    return data_address(Path(shot["image"]), {**shot, "tile": shot["original_tile"]})
