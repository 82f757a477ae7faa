"""The live page: an HTTP server that reads run folders, and changes nothing in them.

Who asks needs a token: once in the address, then as a cookie that scripts cannot read. A run is
found by its folder's name below the root, and no name leads out of it. The page asks every other
second for what is new since it last asked.
"""

from __future__ import annotations

import io
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

import uvicorn
from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.requests import Request

from flowgrpo_ray.common.errors import RunFolderError, SpecError
from flowgrpo_ray.run.state import ACTIVE, LIVE, read_json, state_of
from flowgrpo_ray.run.tracking import METRICS, SAMPLES, SUMMARY, TIMINGS, Row
from flowgrpo_ray.view.guard import Guard
from flowgrpo_ray.view.page import SCRIPTS, STYLE, TYPES, asset, served_page
from flowgrpo_ray.view.report import (
    FILES,
    Shot,
    as_written,
    describe_run,
    find_shots,
    find_sources,
    rows_of,
    shown,
    shown_picture,
    spread,
)

DEEPEST = 3  # folders below the root in which runs are looked for
SPARK = 60  # points of the small curve in the list of runs
SINCE = r"^([0-9a-f]{8}(\.\d{1,9}){3})?$"


# --- run folders


def is_run(folder: Path) -> bool:
    """Whether a run has written here, if only that it starts."""
    return any((folder / name).is_file() for name in (METRICS, LIVE, ".lock"))


def find_runs(root: Path) -> dict[str, Path]:
    """Every run folder below `root`, or `root` itself, by the name that the page gives it."""
    if is_run(root):
        return {root.resolve().name: root}
    return {path.relative_to(root).as_posix(): path for path in _runs_below(root, DEEPEST)}


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    """Follows no link, so that every name stays below the root."""
    if not os.access(folder, os.R_OK | os.X_OK):  # other people's
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink() or not path.is_dir():
            continue
        if is_run(path):
            yield path
        elif depth > 1:
            yield from _runs_below(path, depth - 1)


class Feed:
    """One run folder, read again where its files changed; tells only what is new to the asker."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._lock = threading.Lock()
        self._lists: dict[str, list[Row]] = {"metrics": [], "timings": [], "samples": []}
        self._notes: dict[str, list[str]] = {}
        self._seen: dict[str, object] = {}
        self._age = secrets.token_hex(4)  # changes when what was told is no longer true

    def news(self, since: str) -> Row:
        """The document of `report_data`, but of its lists only what the asker has not got: `since`
        is what the last answer said, or empty. ``reset``: the lists are whole, the old are void."""
        folder = self._folder
        with self._lock:
            self._refresh("metrics", _mark(folder / METRICS))
            self._refresh("timings", _mark(folder / TIMINGS))
            pictures = sorted((folder / SAMPLES).glob("*.*"))
            self._refresh("samples", tuple((path.name, _mark(path)) for path in pictures))
            notes = [note for notes in self._notes.values() for note in notes]
            sources = find_sources(folder, notes)
            data = describe_run(folder, self._lists["metrics"], self._lists["timings"], notes)
            data["sources"] = sources and shown(sources[1], self._address(sources[0]))
            age, *counts = since.split(".")
            whole = age != self._age or len(counts) != len(self._lists)
            for key, count in zip(self._lists, counts, strict=not whole):
                data[key] = self._lists[key][int(count) :]
            if whole:
                data |= self._lists
            lengths = [str(len(rows)) for rows in self._lists.values()]
            return {**data, "since": ".".join([self._age, *lengths]), "reset": whole}

    def _refresh(self, key: str, mark: object) -> None:
        """Read a list again if its files changed, and see whether it only grew."""
        if self._seen.get(key) == mark:
            return
        notes: list[str] = []
        rows, held = self._read(key, notes), self._lists[key]
        if rows[: len(held)] != held:  # the run went back to a checkpoint
            self._age = secrets.token_hex(4)
        self._lists[key], self._notes[key], self._seen[key] = rows, notes, mark

    def _read(self, key: str, notes: list[str]) -> list[Row]:
        if key == "samples":
            shots = find_shots(self._folder, notes)
            return [shown(sidecar, self._address(picture)) for picture, sidecar in shots]
        try:
            return rows_of(self._folder / {"metrics": METRICS, "timings": TIMINGS}[key])
        except RunFolderError as error:
            notes.append(str(error))
            return self._lists[key]

    def _address(self, picture: Path) -> str:
        version = picture.stat().st_mtime_ns  # so that a browser may keep it
        return "/picture?" + urlencode({"run": self._name, "shot": picture.stem, "v": version})


def _mark(path: Path) -> tuple[int, int] | None:
    """Changes when the file does; ``None`` if it is not there."""
    try:
        stat = path.stat()
    except OSError:  # not there, or a link in a circle
        return None
    return stat.st_mtime_ns, stat.st_size


def brief(folder: Path, name: str) -> Row:
    """One line of the list of runs."""
    marks = [_mark(folder / file) for file in (METRICS, SUMMARY)]
    try:
        with as_written(folder):
            known = dict(_brief(folder, tuple(marks)))
        live = read_json(folder / LIVE)
    except (RunFolderError, ValueError) as error:
        return {"name": name, "state": "unreadable", "message": str(error)}
    now = time.time()
    state = state_of(live, known.pop("summary"), now)
    live = live or {}
    times = [mark[0] / 1e9 for mark in (*marks, _mark(folder / LIVE)) if mark]
    return {
        **known,
        "name": name,
        "state": state,
        "stage": live.get("stage") if state in ACTIVE else None,
        "message": live.get("message"),
        "iterations": live.get("iterations"),
        "age": now - max(times, default=folder.stat().st_mtime),
    }


@lru_cache(maxsize=512)
def _brief(folder: Path, _marks: tuple[object, ...]) -> Row:
    """What changes with the rows only: small, so that many runs can be held."""
    rows = rows_of(folder / METRICS)
    train = [row for row in rows if row.get("kind") == "train"]
    evals = [row.get("rewards") or {} for row in rows if row.get("kind") == "eval"]
    curve = [(row.get("reward") or {}).get("mean") for row in train]
    held_out = [
        {
            "name": name,
            "values": [(row.get(name) or {}).get("mean") for row in (evals[0], evals[-1])],
        }
        for name in (evals[0] if evals else {})
    ]
    return {
        "summary": read_json(folder / SUMMARY),
        "iteration": train[-1]["iteration"] if train else 0,
        "reward": curve[-1] if curve else None,
        "spark": spread(curve, SPARK),
        "held_out": held_out,
    }


# --- the server


def build_app(root: Path, token: str, names: frozenset[str]) -> FastAPI:
    """The web application over the runs below `root`.

    names: that this machine is called by in addresses, besides its IP addresses.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, token=token, names=names)
    feed = lru_cache(maxsize=8)(Feed)

    @app.exception_handler(RunFolderError)
    async def damaged(_: Request, error: RunFolderError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    def folder_of(run: str) -> Path:
        """What the page names is looked up, never made into a path."""
        folder = find_runs(root).get(run)
        if folder is None:
            raise HTTPException(404, f"no run {run!r} below {root}")
        return folder

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(served_page())

    @app.get("/assets/{name}")
    def part(name: str) -> Response:
        if name not in (STYLE, *SCRIPTS):
            raise HTTPException(404, f"no file {name!r}")
        return Response(asset(name), media_type=TYPES[Path(name).suffix])

    @app.get("/runs")
    def runs() -> JSONResponse:
        lines = [brief(folder, name) for name, folder in find_runs(root).items()]
        return JSONResponse({"root": str(root.resolve()), "only": is_run(root), "runs": lines})

    @app.get("/run")
    def news(run: str, since: Annotated[str, Query(pattern=SINCE)] = "") -> JSONResponse:
        folder = folder_of(run)
        with as_written(folder):
            return JSONResponse(feed(folder, run).news(since))

    @app.get("/picture")
    def picture(run: str, shot: str, tile: Annotated[int | None, Query(ge=0)] = None) -> Response:
        folder = folder_of(run)
        for path, sidecar in _grids(folder):
            if path.stem == shot and _stays(path, folder):
                with as_written(folder):
                    content, kind = _content(path, _mark(path), tuple(sidecar["tile"]), tile)
                kept = {"Cache-Control": "private, max-age=86400, immutable"}
                return Response(content, media_type=kind, headers=kept)
        raise HTTPException(404, f"no picture {shot!r} of {run!r}")

    @app.get("/file")
    def file(run: str, name: str) -> FileResponse:
        path = folder_of(run) / name if name in FILES else None
        if path is None or not path.is_file() or not _stays(path, path.parent):
            raise HTTPException(404, f"no file {name!r} of {run!r}")
        return FileResponse(path, filename=name, media_type="text/plain; charset=utf-8")

    return app


def _grids(folder: Path) -> Iterator[Shot]:
    """Of the evaluations, and of their sources."""
    yield from find_shots(folder, [])
    if (sources := find_sources(folder, [])) is not None:
        yield sources


def _stays(path: Path, folder: Path) -> bool:
    """Whether no link leads from the run folder to another place."""
    return path.resolve().is_relative_to(folder.resolve())


@lru_cache(maxsize=64)
def _content(
    path: Path, _version: object, size: tuple[int, int], tile: int | None
) -> tuple[bytes, str]:
    """The picture as the page shows it; with `tile`, that sample alone and as it was generated."""
    if tile is None:
        return shown_picture(path, {"tile": list(size)})
    from flowgrpo_ray.common.images import opened

    height, width = size
    with opened(path, path.name, ("PNG",)) as grid:
        row, column = divmod(tile, grid.width // width)
        if row >= grid.height // height:
            raise ValueError(f"there is no sample {tile}")
        box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
        buffer = io.BytesIO()
        grid.crop(box).save(buffer, format="PNG")
    return buffer.getvalue(), "image/png"


def _why(error: OSError) -> str:
    return str(error) if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)


class Monitor:
    """A server that has its port already, so that the address is known before it runs."""

    def __init__(self, root: Path, host: str, port: int, token: str) -> None:
        if not root.is_dir():
            raise RunFolderError(f"no folder at {root}: give a run folder or a folder of them")
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise SpecError(
                f"--host {host} --port {port}: cannot listen there ({_why(error)}). "
                "Choose another port; 0 takes a free one"
            ) from error
        self.port: int = self._socket.getsockname()[1]
        machine = socket.gethostname()
        name = machine if host in ("0.0.0.0", "::") else host
        self.address = f"http://{f'[{name}]' if ':' in name else name}:{self.port}/"
        names = frozenset(n.lower() for n in ("localhost", host, machine, socket.getfqdn()))
        app = build_app(root, token, names)
        # No log of requests: the first one holds the token.
        self._config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, ws="none"
        )

    def run(self) -> None:
        """Serve until the process is told to stop."""
        with self._socket:
            uvicorn.Server(self._config).run(sockets=[self._socket])
