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
from flowgrpo_ray.run.found import as_written, find_runs, mark_of
from flowgrpo_ray.run.overview import overview
from flowgrpo_ray.run.tracking import METRICS, SAMPLES, TIMINGS, Row
from flowgrpo_ray.view.compared import comparison
from flowgrpo_ray.view.guard import Guard
from flowgrpo_ray.view.page import SCRIPTS, STYLE, TYPES, asset, served_page
from flowgrpo_ray.view.report import FILES, describe_run, rows_of
from flowgrpo_ray.view.shots import Shot, find_shots, find_sources, shown, shown_picture

SINCE = r"^([0-9a-f]{8}(\.\d{1,9}){3})?$"


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
            self._refresh("metrics", mark_of(folder / METRICS))
            self._refresh("timings", mark_of(folder / TIMINGS))
            pictures = sorted((folder / SAMPLES).glob("*.*"))
            self._refresh("samples", tuple((path.name, mark_of(path)) for path in pictures))
            notes = [note for notes in self._notes.values() for note in notes]
            sources = find_sources(folder, notes)
            data = describe_run(folder, self._lists["metrics"], self._lists["timings"], notes)
            data["sources"] = sources and shown(sources[1], picture_address(self._name, sources[0]))
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
            return [
                shown(sidecar, picture_address(self._name, picture)) for picture, sidecar in shots
            ]
        try:
            return rows_of(self._folder / {"metrics": METRICS, "timings": TIMINGS}[key])
        except RunFolderError as error:
            notes.append(str(error))
            return self._lists[key]


def picture_address(name: str, picture: Path) -> str:
    """Of a run's picture; another one when the picture changes, so that a browser may keep it."""
    version = picture.stat().st_mtime_ns
    return "/picture?" + urlencode({"run": name, "shot": picture.stem, "v": version})


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

    app.get("/")(lambda: HTMLResponse(served_page()))
    app.get("/runs")(lambda: JSONResponse(overview(root)))

    @app.get("/assets/{name}")
    def part(name: str) -> Response:
        if name not in (STYLE, *SCRIPTS):
            raise HTTPException(404, f"no file {name!r}")
        return Response(asset(name), media_type=TYPES[Path(name).suffix])

    @app.get("/compare")
    def compare(run: Annotated[list[str], Query()], since: str = "") -> JSONResponse:
        return JSONResponse(_beside(root, run, since))

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
                    content, kind = _content(path, mark_of(path), tuple(sidecar["tile"]), tile)
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


def _beside(root: Path, names: list[str], since: str) -> Row:
    """The runs of these names compared, unless nothing has changed `since`."""
    there = find_runs(root)
    found = comparison({name: there[name] for name in names if name in there}, picture_address)
    found["missing"] = [name for name in names if name not in there]
    return {"since": since} if found["since"] == since else found


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
