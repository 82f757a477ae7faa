"""What a run folder says, as one JSON document, and the report: a page with it inside.

`describe_run` reads all but the rows and pictures; the monitor sends those piece by piece, a report
holds them whole.
"""

from __future__ import annotations

import io
import time
from itertools import groupby
from pathlib import Path

from flowgrpo_ray.common.errors import CheckpointError, RunFolderError
from flowgrpo_ray.common.files import write_atomic
from flowgrpo_ray.run.checkpoint import best_checkpoint
from flowgrpo_ray.run.folder import resume_command
from flowgrpo_ray.run.found import as_written
from flowgrpo_ray.run.settings import weights_of
from flowgrpo_ray.run.state import LIVE, LOG, OBJECTIVE, leads_out, state_of
from flowgrpo_ray.run.tracking import (
    METRICS,
    PER_PROMPT,
    SAMPLES,
    SUMMARY,
    TIMINGS,
    Row,
    of_sets,
    read_rows,
)
from flowgrpo_ray.run.watch import Reading, describe, export_of_best, readings_of
from flowgrpo_ray.view.page import whole_page
from flowgrpo_ray.view.shots import (
    data_address,
    embedded,
    find_shots,
    find_sources,
    read_object,
    shown,
)

REPORT = "report.html"
SPEC = "spec.yaml"
LONGEST_LOG = 2**16  # bytes of driver.log that the page shows: the last ones

FILES = {
    METRICS: "rewards, importance ratios, losses, groups; the same bytes after a resume",
    TIMINGS: "seconds and images per second, by this run's own clock",
    SUMMARY: "the headline, written when the run ends",
    LIVE: "what the run does now, its workers, rewards and queues",
    SPEC: "the training spec with every default filled in",
    LOG: "what the run told, with the time",
    OBJECTIVE: "what the objective reports, and how it is shown",
    SAMPLES: "the evaluation images, with their prompts and scores, and what they were made from",
}


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run folder, finished or not, and return its path."""
    with as_written(Path(folder)):
        data = report_data(folder)
        page = whole_page(data, f"{data['name']} · run report")
    path = Path(folder) / REPORT
    write_atomic(path, page.encode())
    return path


def report_data(folder: str | Path) -> Row:
    """Everything the page shows, as one JSON document. What is missing is said in `notes`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RunFolderError(f"no run folder at {folder}: give the folder that a run writes to.")
    metrics, timings = rows_of(folder / METRICS), rows_of(folder / TIMINGS)
    if not metrics:
        raise RunFolderError(
            f"{folder} has no rows in {METRICS}: wait for the run's first iteration, "
            "or give the folder that a run writes to."
        )
    notes: list[str] = []
    shots = find_shots(folder, notes)
    samples = embedded(shots, notes)
    found = find_sources(folder, notes)
    sources = shown(found[1], data_address(*found)) if found else None
    data = describe_run(folder, metrics, timings, notes)
    lists = {"metrics": metrics, "timings": timings, "samples": samples}
    return {**data, **lists, "sources": sources}


def rows_of(path: Path) -> list[Row]:
    """The rows of a file that need not be there yet, without what only the watch reads; rewards of
    single prompt sets among the others."""
    rows = read_rows(path) if path.exists() and not leads_out(path) else []
    for row in rows:
        row.pop(PER_PROMPT, None)
        if sets := of_sets(row):
            row["rewards"] = row["rewards"] | sets
    return rows


def describe_run(folder: Path, metrics: list[Row], timings: list[Row], notes: list[str]) -> Row:
    """All of the document but its rows and samples. What is missing is added to `notes`."""
    summary, live = (read_object(folder / name, notes) for name in (SUMMARY, LIVE))
    now = time.time()
    state = state_of(live, summary, now)
    train = [row for row in metrics if row.get("kind") == "train"]
    evals = [row for row in metrics if row.get("kind") == "eval"]
    if live is None and not (folder / SUMMARY).exists():
        notes.append(f"{SUMMARY} is not there: the run is going on, or stopped before its end.")
    if metrics and not timings:
        notes.append(f"{TIMINGS} is missing or empty: the page shows no times.")
    objective = read_object(folder / OBJECTIVE, notes) or _earlier_objective()
    gate = objective["gate"]["name"]
    return {
        "name": (summary or {}).get("name") or folder.resolve().name,
        "objective": objective,
        "state": state,
        "now": now,
        "live": live,
        "headline": _headline(summary or {}, train, evals, timings, gate),
        "rewards": _reward_names(summary or {}, train, evals),
        "weights": weights_of(folder),
        "resume": resume_command(folder),
        "watch": _watch(folder, evals),
        "best": _best(folder, notes),
        "spec": _text(folder / SPEC, notes),
        "log": _log(folder / LOG),
        "summary": summary,
        "files": _files(folder),
        "notes": notes,
    }


def _earlier_objective() -> Row:
    """The card of a run from before there were any."""
    from flowgrpo_ray.algorithm.objectives import FlowGrpo

    return FlowGrpo(kind="flow_grpo").card()


def _headline(
    summary: Row, train: list[Row], evals: list[Row], timings: list[Row], gate: str
) -> Row:
    """The summary where the run has ended; otherwise the same numbers as far as it got."""
    first = evals[0] if evals else {}
    last = evals[-1] if len(evals) > 1 else {}
    said = [summary.get(key) or {} for key in ("eval_before", "eval_after")]
    # Those of single prompt sets, which the summary has not, come behind.
    before, after = (of | (_means(row) | of) for of, row in zip(said, (first, last), strict=True))
    gates = [at for row in train if (at := (row.get(gate) or {}).get("gate")) is not None]
    timed = [row["seconds"] for row in timings if row.get("kind") in ("train", "eval")]
    return {
        "rewards": [
            {"name": name, "before": before.get(name), "after": after.get(name)}
            for name in before | after
        ],
        "prompts": first.get("prompts"),
        "weights": (last or first).get("weights"),
        "iterations": summary.get("iterations", len(train)),
        "images": summary.get("images", sum(row.get("images") or 0 for row in train)),
        "seconds": summary.get("seconds", sum(timed) if timed else None),
        "updates": sum(row.get("updates") or 0 for row in train),
        "gate": max((abs(at) for at in gates), default=None),
        "gates": len(gates),
    }


def _best(folder: Path, notes: list[str]) -> Row | None:
    try:
        return best_checkpoint(folder / "checkpoints")
    except CheckpointError as error:
        notes.append(str(error))
        return None


def _watch(folder: Path, evals: list[Row]) -> list[Row]:
    """Each watched reward's last reading, and every stretch of evaluations in which it diverged."""
    readings: dict[str, list[tuple[int, Reading]]] = {}
    for row in evals:
        for name, reading in readings_of(row).items():
            readings.setdefault(name, []).append((row["iteration"], reading))
    return [_watched(folder, name, of_reward) for name, of_reward in readings.items()]


def _watched(folder: Path, name: str, readings: list[tuple[int, Reading]]) -> Row:
    _, last = readings[-1]
    spans: list[Row] = []
    for diverging, group in groupby(readings, key=lambda entry: entry[1].diverging):
        if not diverging:
            continue
        stretch = list(group)
        lowest = min((reading for _, reading in stretch), key=lambda reading: reading.now)
        spans.append(
            {
                "from": stretch[0][0],
                "to": stretch[-1][0],
                "best": [lowest.best_from, lowest.best_iteration],
                "says": describe(name, lowest),
            }
        )
    export = None
    if last.diverging:
        spans[-1]["says"], export = describe(name, last), export_of_best(folder, last)
    return {"name": name, **last.as_json(), "spans": spans, "export": export}


def _means(row: Row) -> dict[str, float | None]:
    return {name: value.get("mean") for name, value in (row.get("rewards") or {}).items()}


def _reward_names(summary: Row, train: list[Row], evals: list[Row]) -> list[str]:
    """In the summary's order, then as first met."""
    names = dict.fromkeys(summary.get("eval_before") or {})
    for row in [*evals[:1], *train]:
        names |= dict.fromkeys(row.get("rewards") or {})
    return list(names)


def _text(path: Path, notes: list[str]) -> str | None:
    if path.exists() and not leads_out(path):
        return path.read_text("utf-8", errors="replace")
    notes.append(f"{path.name} is not there.")
    return None


def _log(path: Path) -> str:
    """The last lines of what the run told."""
    if not path.exists() or leads_out(path):
        return ""
    with path.open("rb") as file:
        skipped = max(0, file.seek(0, io.SEEK_END) - LONGEST_LOG)
        file.seek(skipped)
        text = file.read(LONGEST_LOG).decode("utf-8", errors="replace")
    return text.partition("\n")[2] if skipped else text


def _files(folder: Path) -> list[Row]:
    """Where the numbers come from: each source, its size in bytes, and what it says."""
    files = []
    for name, says in FILES.items():
        path = folder / name
        size = None
        if path.is_dir():
            size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        elif path.exists():
            size = path.stat().st_size
        files.append({"name": name, "bytes": size, "says": says})
    return files
