"""A model hub of one repository on this machine: the requests that huggingface_hub makes, answered
from a local folder over a real socket.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPO = "owner/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED = "owner/gated"
LARGE = 100_000  # bytes


class Handler(BaseHTTPRequestHandler):
    folder: Path
    asked: list[str]
    seconds: float = 0.0  # that a large file takes, one after the other
    turn: threading.Lock

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing: the test's output stays clean."""

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if f"/{GATED}/" in f"{path}/":
            self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"})
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            self._send_json([{"type": "file", "oid": "0" * 40, **file} for file in self._files()])
        elif path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": f["path"], "size": f["size"]} for f in self._files()]
            self._send_json({"id": REPO, "sha": COMMIT, "siblings": siblings, "tags": []})
        elif path.startswith((f"/{REPO}/resolve/", f"/datasets/{REPO}/resolve/")):
            self._send_file(path.partition("/resolve/")[2].partition("/")[2], body)
        else:
            self._send(404, {"X-Error-Code": "RepoNotFound"})

    def _files(self) -> list[dict[str, Any]]:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [{"path": str(p.relative_to(self.folder)), "size": p.stat().st_size} for p in files]

    def _send_json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send_file(self, name: str, body: bool) -> None:
        file = self.folder / name
        if not file.is_file():
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        self._send(200, headers, content if body else b"", len(content))

    def _send(
        self, status: int, headers: dict[str, str], content: bytes = b"", length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.seconds and len(content) > LARGE:
            with self.turn:
                time.sleep(self.seconds)
        with suppress(ConnectionError):  # whoever asked is gone
            self.wfile.write(content)


@contextmanager
def tiny_hub(folder: Path, seconds: float = 0.0) -> Iterator[tuple[str, list[str]]]:
    """``folder`` as ``REPO`` at the address that is yielded, with the list of paths asked for; each
    large file takes so many ``seconds``."""
    asked: list[str] = []
    attributes: dict[str, object] = {"folder": folder, "asked": asked, "seconds": seconds}
    attributes["turn"] = threading.Lock()
    handler = type("FolderHandler", (Handler,), attributes)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True  # whoever does not wait for an answer need not wait at the end
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
