"""One self-contained HTML page per run: every number of the run folder, and its pictures.

`report_data` gathers the folder into one JSON document; `assets/report.html` draws it. The page
asks the network for nothing, so it can be mailed, archived or opened from a disk.
"""

import base64
import html
import io
import json
from importlib import resources
from itertools import groupby
from pathlib import Path

from flowgrpo_ray.checkpoint import checkpoint_iteration, newest_checkpoint
from flowgrpo_ray.errors import RunFolderError
from flowgrpo_ray.tracking import METRICS, SAMPLES, SUMMARY, TIMINGS, Row, read_rows, write_atomic
from flowgrpo_ray.watch import Reading, describe, readings_of

REPORT = "report.html"
LARGEST_TILE = 256  # pixels; larger evaluation samples are embedded at this size
MOST_EVALUATIONS = 16  # evaluations whose pictures are embedded, first and last among them

_SAMPLE_KEYS = ("iteration", "prompts", "scores", "tile", "columns")
_FILES = {
    METRICS: "rewards, importance ratios, losses, groups; the same bytes after a resume",
    TIMINGS: "seconds and images per second, by this run's own clock",
    SUMMARY: "the headline, written when the run ends",
    "spec.yaml": "the training spec with every default filled in",
    SAMPLES: "the evaluation images, with their prompts and scores",
}


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run folder, finished or not, and return its path."""
    page = render_page(report_data(folder))
    path = Path(folder) / REPORT
    write_atomic(path, page.encode())
    return path


def render_page(data: Row) -> str:
    """The template with `data` inside. `<` is escaped, so no text of the run can end the script."""
    template = resources.files("flowgrpo_ray").joinpath("assets/report.html").read_text("utf-8")
    document = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    title = html.escape(f"{data['name']} · run report")
    return template.replace("{{title}}", title, 1).replace("{{run_data}}", document, 1)


def report_data(folder: str | Path) -> Row:
    """Everything the page shows, as one JSON document. What is missing is said in `notes`."""
    folder = Path(folder)
    rows = _metrics(folder)
    notes: list[str] = []
    timings = _timings(folder, notes)
    summary = _summary(folder, notes)
    train = [row for row in rows if row.get("kind") == "train"]
    evals = [row for row in rows if row.get("kind") == "eval"]
    if not train:
        notes.append(f"{METRICS} holds no training iteration yet.")
    if not evals:
        notes.append(f"{METRICS} holds no evaluation yet.")
    wall = _wall(timings)
    return {
        "name": (summary or {}).get("name") or folder.resolve().name,
        "finished": summary is not None,
        "headline": _headline(summary or {}, train, evals, wall),
        "rewards": _reward_names(summary or {}, train, evals),
        "watch": _watch(folder, train),
        "train": train,
        "evals": evals,
        "timings": timings,
        "wall": wall,
        "samples": _samples(folder, notes),
        "spec": _text(folder / "spec.yaml", notes),
        "summary": summary,
        "files": _files(folder),
        "notes": notes,
    }


def _metrics(folder: Path) -> list[Row]:
    if not folder.is_dir():
        raise RunFolderError(f"no run folder at {folder}: give the folder that a run writes to.")
    path = folder / METRICS
    rows = read_rows(path) if path.exists() else []
    if not rows:
        raise RunFolderError(
            f"{folder} has no rows in {METRICS}: wait for the run's first iteration, "
            "or give the folder that a run writes to."
        )
    return rows


def _timings(folder: Path, notes: list[str]) -> list[Row]:
    path = folder / TIMINGS
    rows = read_rows(path) if path.exists() else []
    if not rows:
        notes.append(f"{TIMINGS} is missing or empty: the page shows no times.")
    return rows


def _wall(timings: list[Row]) -> list[tuple[int, float]]:
    """(iteration, seconds since the first one began), evaluations included, starts not."""
    elapsed, points = 0.0, {0: 0.0}
    for row in timings:
        if row.get("kind") in ("train", "eval"):
            elapsed += row.get("seconds") or 0.0
        if row.get("kind") == "train":
            points[row["iteration"]] = round(elapsed, 6)
    return sorted(points.items()) if len(points) > 1 else []


def _headline(summary: Row, train: list[Row], evals: list[Row], wall: list) -> Row:
    """The summary where the run has ended; otherwise the same numbers as far as it got."""
    first = evals[0] if evals else {}
    last = evals[-1] if len(evals) > 1 else {}
    before = summary.get("eval_before") or _means(first)
    after = summary.get("eval_after") or _means(last)
    gates = [row["log_ratio"]["gate"] for row in train if _has_gate(row)]
    return {
        "rewards": [
            {"name": name, "before": before.get(name), "after": after.get(name)}
            for name in (before or after)
        ],
        "prompts": first.get("prompts"),
        "weights": (last or first).get("weights"),
        "iterations": summary.get("iterations", len(train)),
        "images": summary.get("images", sum(row.get("images") or 0 for row in train)),
        "seconds": summary.get("seconds", wall[-1][1] if wall else None),
        "updates": sum(row.get("updates") or 0 for row in train),
        "gate": max((abs(gate) for gate in gates), default=None),
        "gates": len(gates),
    }


def _watch(folder: Path, train: list[Row]) -> list[Row]:
    """Each watched reward's last reading, and every stretch of iterations in which it diverged."""
    readings: dict[str, list[tuple[int, Reading]]] = {}
    for row in train:
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
                "says": describe(name, lowest, None),
            }
        )
    if last.diverging:
        kept = newest_checkpoint(folder / "checkpoints", last.best_iteration)
        spans[-1]["says"] = describe(name, last, checkpoint_iteration(kept) if kept else None)
    return {"name": name, **last.as_json(), "spans": spans}


def _has_gate(row: Row) -> bool:
    return (row.get("log_ratio") or {}).get("gate") is not None


def _means(row: Row) -> dict[str, float | None]:
    return {name: value.get("mean") for name, value in (row.get("rewards") or {}).items()}


def _reward_names(summary: Row, train: list[Row], evals: list[Row]) -> list[str]:
    """In the summary's order, then as first met."""
    names = dict.fromkeys(summary.get("eval_before") or {})
    for row in [*train, *evals]:
        names |= dict.fromkeys(row.get("rewards") or {})
    return list(names)


def _summary(folder: Path, notes: list[str]) -> Row | None:
    path = folder / SUMMARY
    if not path.exists():
        notes.append(f"{SUMMARY} is not there: the run is going on, or stopped before its end.")
        return None
    return _json_object(path, notes)


def _json_object(path: Path, notes: list[str]) -> Row | None:
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as cause:
        notes.append(f"{path.name} is not readable as JSON ({cause}) and was left out.")
        return None
    if not isinstance(value, dict):
        notes.append(f"{path.name} does not hold a JSON object and was left out.")
        return None
    return value


def _text(path: Path, notes: list[str]) -> str | None:
    if path.exists():
        return path.read_text("utf-8", errors="replace")
    notes.append(f"{path.name} is not there.")
    return None


def _samples(folder: Path, notes: list[str]) -> list[Row]:
    """The evaluations' pictures, each as a data address beside its prompts and scores."""
    found = []
    for path in sorted((folder / SAMPLES).glob("iteration-*.json")):
        sidecar = _json_object(path, notes)
        if sidecar is None:
            continue
        missing = [key for key in _SAMPLE_KEYS if key not in sidecar]
        if missing or not path.with_suffix(".png").exists():
            lack = ", ".join(missing) or path.with_suffix(".png").name
            notes.append(f"{path.name} was left out: {lack} is missing.")
            continue
        found.append((path.with_suffix(".png"), sidecar))
    if not found:
        notes.append(f"{SAMPLES}/ holds no evaluation images yet.")
    chosen = spread(found, MOST_EVALUATIONS)
    if len(chosen) < len(found):
        notes.append(f"{len(chosen)} of the {len(found)} evaluations' images are embedded here.")
    if any(max(sidecar["tile"]) > LARGEST_TILE for _, sidecar in chosen):
        notes.append(
            f"Images are scaled down to {LARGEST_TILE} pixels; {SAMPLES}/ holds them as generated."
        )
    return [_embed(picture, sidecar) for picture, sidecar in chosen]


def spread(items: list, most: int) -> list:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _embed(picture: Path, sidecar: Row) -> Row:
    """The exact pixels of a small model; those of a large one scaled down to `LARGEST_TILE`."""
    height, width = sidecar["tile"]
    content, kind, tile = picture.read_bytes(), "png", [height, width]
    if max(height, width) > LARGEST_TILE:
        from PIL import Image

        scale = LARGEST_TILE / max(height, width)
        tile = [round(height * scale), round(width * scale)]
        with Image.open(picture) as grid:
            size = (tile[1] * (grid.width // width), tile[0] * (grid.height // height))
            small = grid.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=90)
        content, kind = buffer.getvalue(), "jpeg"
    address = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {**sidecar, "tile": tile, "original_tile": [height, width], "image": address}


def _files(folder: Path) -> list[Row]:
    """Where the numbers come from: each source, its size in bytes, and what it says."""
    files = []
    for name, says in _FILES.items():
        path = folder / name
        size = None
        if path.is_dir():
            size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        elif path.exists():
            size = path.stat().st_size
        files.append({"name": name, "bytes": size, "says": says})
    return files
