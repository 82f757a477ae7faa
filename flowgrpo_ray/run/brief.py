"""One run in a line: how far it is, how well, what it costs, under which spec.

Hundreds of runs are read in a moment: of a run's rows only those of evaluations are parsed, and of
the others a few for its small curves. What was read is kept until the files change.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from flowgrpo_ray.common.errors import RunFolderError
from flowgrpo_ray.common.strict_json import parse, parse_at
from flowgrpo_ray.run.found import as_written, mark_of
from flowgrpo_ray.run.settings import SPEC, gpus_of, settings
from flowgrpo_ray.run.state import ACTIVE, LIVE, leads_out, read_json, state_of
from flowgrpo_ray.run.tracking import METRICS, PER_PROMPT, SUMMARY, TIMINGS, Row, of_sets

POINTS = 40  # of a small curve
RECENT = 20  # iterations whose pace is told
TAIL = 2**17  # bytes that hold their rows

_TIMED = re.compile(
    rb'\{"kind": "(start|train|eval)", (?:"iteration": (\d+), )?"seconds": ([\d.eE+-]+)'
    rb'(?:, "images_per_second": ([\d.eE+-]+))?'
)


def brief(folder: Path, name: str) -> Row:
    """One line: state, progress, pace, time, held-out rewards, and its spec, flat.

    Of each reward: ``before``, ``after`` and ``best`` held-out mean, the iteration of the best, its
    ``curve`` of [iteration, mean] over the evaluations, and ``train``, that of a few iterations.
    ``watch`` says of each reward that diverged "now" or "earlier".
    """
    marks = tuple(mark_of(folder / file) for file in (METRICS, SUMMARY, TIMINGS, SPEC))
    try:
        with as_written(folder):
            known = dict(_brief(folder, marks))
        live = read_json(folder / LIVE)
    except (RunFolderError, ValueError) as error:
        return {"name": name, "state": "unreadable", "message": str(error)}
    now = time.time()
    summary, fault = known.pop("summary"), known.pop("fault")
    state = state_of(live, summary, now)
    live = live or {}
    times = [mark[0] / 1e9 for mark in (*marks[:2], mark_of(folder / LIVE)) if mark]
    return {
        **known,
        "name": name,
        "state": state,
        "stage": live.get("stage") if state in ACTIVE else None,
        "message": live.get("message") or fault,
        "iterations": live.get("iterations") or (summary or {}).get("iterations"),
        "age": now - max(times, default=folder.stat().st_mtime),
    }


@lru_cache(maxsize=2048)
def _brief(folder: Path, _marks: tuple[object, ...]) -> Row:
    """What changes with the files only: small, so that many runs can be held."""
    summary = read_json(folder / SUMMARY)
    spec, fault = settings(folder)
    evals, train = _rows(folder / METRICS)
    last = _row(folder / METRICS, train[-1]) if train else {}
    whole = (summary or {}).get("seconds")
    seconds, pace = _times(folder / TIMINGS, whole if isinstance(whole, int | float) else None)
    gpus = gpus_of(spec)
    rewards = _rewards(evals, [_means(folder / METRICS, line) for line in train])
    watched = {name for name in rewards if not spec.get(f"rewards.{name}.weight")}
    known = {
        "summary": summary,
        "spec": spec,
        "fault": fault,
        "iteration": last.get("iteration", 0),
        "reward": (last.get("reward") or {}).get("mean"),
        "rewards": {name: rewards[name] for name in sorted(rewards, key=watched.__contains__)},
        "watch": _watch(evals),
        "images_per_second": pace,
        "seconds": seconds,
        "gpu_seconds": seconds * gpus if gpus and seconds is not None else None,
    }
    json.dumps(known, allow_nan=False)  # a ValueError here is told as damage of the folder
    return known


def _rewards(
    evals: Sequence[Row], train: Sequence[tuple[int, Mapping[str, Any]]]
) -> dict[str, Row]:
    found: dict[str, Row] = {}
    held_out = [(row["iteration"], row["rewards"] | of_sets(row)) for row in evals]
    for name in dict.fromkeys(name for _, rewards in held_out for name in rewards):
        curve = [(at, (rewards.get(name) or {}).get("mean")) for at, rewards in held_out]
        seen = [(iteration, mean) for iteration, mean in curve if mean is not None]
        best = max(seen, key=lambda point: point[1], default=(None, None))
        found[name] = {
            "before": curve[0][1],
            "after": curve[-1][1] if len(evals) > 1 else None,
            "best": best[1],
            "best_iteration": best[0],
            "curve": [(iteration, _brief_number(mean)) for iteration, mean in spread(seen, POINTS)],
            "train": [(iteration, _brief_number(means.get(name))) for iteration, means in train],
        }
    return found


def _brief_number(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _watch(evals: Sequence[Row]) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in evals:
        for name, reading in (row.get("watch") or {}).items():
            if reading.get("diverging"):
                found[name] = "now"
            elif name in found:
                found[name] = "earlier"
    return found


def spread(items: list, most: int) -> list:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


# --- rows, as few as possible


def _bytes(path: Path, tail: int | None = None) -> bytes:
    """Whole lines of a file of rows that need not be there; with `tail` those of the last bytes."""
    if leads_out(path) or not path.exists():
        return b""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (tail or size)))
        data = file.read()
    if tail and size > tail:
        data = data.partition(b"\n")[2]
    return data if data.endswith(b"}") else data[: data.rfind(b"\n") + 1]  # without a torn one


def _line(data: bytes, start: int) -> bytes:
    end = data.find(b"\n", start)
    return data[start:] if end < 0 else data[start:end]


def _rows(path: Path) -> tuple[list[Row], list[bytes]]:
    """The rows of all evaluations, and the lines of a few iterations, first and last among them.

    A row's keys are sorted, and those of an evaluation have none before its iteration.
    """
    data = _bytes(path)
    starts, start = [], 0
    while start < len(data):
        starts.append(start)
        start = data.find(b"\n", start) + 1 or len(data)
    first = b'{"iteration": '
    evals = [_row(path, _line(data, at)) for at in starts if data.startswith(first, at)]
    train = spread([at for at in starts if not data.startswith(first, at)], POINTS)
    return [row for row in evals if row["kind"] == "eval"], [_line(data, at) for at in train]


def _row(path: Path, line: bytes) -> Row:
    """A row without its scores by prompt, which are most of an evaluation's row."""
    start = line.find(b'"' + PER_PROMPT.encode() + b'": ')
    end = line.find(b"]}, ", line.find(b'"total": [', start))
    try:
        if 0 < start < end:
            try:
                return parse(line[:start] + line[end + 4 :])
            except ValueError:  # it looks otherwise: read it as it is
                pass
        row = parse(line)
        if not isinstance(row, dict):
            raise ValueError(f"a row is a JSON object, not {type(row).__name__}")
    except ValueError as cause:
        raise RunFolderError(
            f"{path} holds a line that is not a row ({cause}): {line[:80]!r}. "
            "Remove that line, or restore the file."
        ) from cause
    return row


def _means(path: Path, line: bytes) -> tuple[int, dict[str, float | None]]:
    """Of the row of an iteration its number and the mean of each reward, read where they stand."""
    try:
        text = line.decode("utf-8")
        keys = ('"iteration": ', '"rewards": ')
        iteration, rewards = (parse_at(text, text.index(key) + len(key)) for key in keys)
    except ValueError:  # it looks otherwise, or is damaged
        row = _row(path, line)
        iteration, rewards = row["iteration"], row["rewards"]
    return iteration, {name: value.get("mean") for name, value in rewards.items()}


def _times(path: Path, whole: float | None) -> tuple[float | None, float | None]:
    """Seconds of starts, iterations and evaluations, unless the `whole` is known, and images per
    second of the last iterations. The first evaluation is a phase of the start."""
    data, start = _bytes(path, TAIL if whole is not None else None), 0
    total, paces = 0.0, list[float]()
    while start < len(data):
        if found := _TIMED.match(data, start):
            kind, iteration, seconds, pace = found.groups()
        else:
            row = _row(path, _line(data, start))
            kind = str(row["kind"]).encode()
            keys = ("iteration", "seconds", "images_per_second")
            iteration, seconds, pace = (row.get(key) for key in keys)
        if kind != b"eval" or int(iteration or 0):
            total += float(seconds or 0)
        if kind == b"train" and pace is not None:
            paces.append(float(pace))
        start = data.find(b"\n", start) + 1 or len(data)
    if whole is None and data:
        whole = total
    return whole, fmean(paces[-RECENT:]) if paces else None
