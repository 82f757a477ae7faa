"""Pictures of a run's evaluations for its page: whole ones, as large as they are looked at."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from flowgrpo_ray.run.brief import spread
from flowgrpo_ray.run.state import leads_out, read_json
from flowgrpo_ray.run.tracking import SAMPLES, SOURCES, Row

LARGEST_TILE = 256  # pixels; larger evaluation samples are shown at this size
MOST_EVALUATIONS = 16  # evaluations whose pictures a report holds, first and last among them
KEYS = ("iteration", "prompts", "scores", "tile", "columns")  # of a sidecar

Shot = tuple[Path, Row]  # a grid of pictures, and its sidecar


def find_shots(folder: Path, notes: list[str]) -> list[Shot]:
    """The evaluations whose picture and sidecar are whole, oldest first."""
    found: list[Shot] = []
    for path in sorted((folder / SAMPLES).glob("iteration-*.json")):
        sidecar = read_object(path, notes)
        if sidecar is None:
            continue
        picture = path.with_suffix(".png")
        missing = [key for key in KEYS if key not in sidecar]
        if missing or not _is_there(picture):
            lack = ", ".join(missing) or picture.name
            notes.append(f"{path.name} was left out: {lack} is missing.")
        elif not _is_sidecar(sidecar):
            notes.append(f"{path.name} was left out: it does not say what a run writes.")
        else:
            found.append((picture, sidecar))
    return found


def find_sources(folder: Path, notes: list[str]) -> Shot | None:
    """The images that the samples' prompts change, if they do: tile `i` has those of prompt `i`."""
    about = folder / SAMPLES / f"{SOURCES}.json"
    sidecar = read_object(about, notes)
    if sidecar is None:
        return None
    picture = about.with_suffix(".png")
    numbers = [sidecar.get("columns"), sidecar.get("per_image")]
    if _is_size(numbers) and _is_size(sidecar.get("tile")) and _is_there(picture):
        return picture, sidecar
    notes.append(f"{about.name} was left out: it or its picture is not what a run writes.")
    return None


def _is_there(picture: Path) -> bool:
    return picture.exists() and not leads_out(picture)


def _is_size(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)


def _is_sidecar(row: Row) -> bool:
    """Whether the values are of the kinds that `save_samples` writes."""
    prompts, scores = row["prompts"], row["scores"]
    return (
        all(type(n) is int for n in (row["iteration"], row["columns"]))
        and _is_size(row["tile"])
        and isinstance(prompts, list)
        and all(isinstance(prompt, str) for prompt in prompts)
        and isinstance(scores, dict)
        and all(isinstance(of, list) and len(of) == len(prompts) for of in scores.values())
    )


def shown_tile(sidecar: Row) -> list[int]:
    """Height and width of a sample as the page shows it, at most `LARGEST_TILE` pixels."""
    height, width = sidecar["tile"]
    scale = min(1.0, LARGEST_TILE / max(height, width))
    return [round(height * scale), round(width * scale)]


def shown_picture(picture: Path, sidecar: Row) -> tuple[bytes, str]:
    """The grid as the page shows it, and its media type: the exact pixels of a small model's
    samples, those of a large one scaled down."""
    tile = shown_tile(sidecar)
    if tile == sidecar["tile"]:
        return picture.read_bytes(), "image/png"
    from PIL import Image

    from flowgrpo_ray.common.images import opened

    height, width = sidecar["tile"]
    with opened(picture, picture.name, ("PNG",)) as grid:
        size = (tile[1] * (grid.width // width), tile[0] * (grid.height // height))
        small = grid.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue(), "image/jpeg"


def shown(sidecar: Row, address: str) -> Row:
    """One evaluation for the page, its picture at `address`."""
    tile = shown_tile(sidecar)
    return {**sidecar, "tile": tile, "original_tile": sidecar["tile"], "image": address}


def embedded(shots: list[Shot], notes: list[str]) -> list[Row]:
    """Those that a report holds, inside of it."""
    chosen = spread(shots, MOST_EVALUATIONS)
    if len(chosen) < len(shots):
        notes.append(f"{len(chosen)} of the {len(shots)} evaluations' images are embedded here.")
    if any(shown_tile(sidecar) != sidecar["tile"] for _, sidecar in chosen):
        notes.append(
            f"Images are scaled down to {LARGEST_TILE} pixels; {SAMPLES}/ holds them as generated."
        )
    return [shown(sidecar, data_address(picture, sidecar)) for picture, sidecar in chosen]


def data_address(picture: Path, sidecar: Row) -> str:
    """The picture itself, as an address."""
    content, kind = shown_picture(picture, sidecar)
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def read_object(path: Path, notes: list[str]) -> Row | None:
    """What a JSON file says, if it is there; a note if it cannot be read."""
    try:
        return read_json(path)
    except ValueError as cause:
        notes.append(f"{path.name} is not readable ({cause}) and was left out.")
        return None
