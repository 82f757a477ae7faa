"""A small HTTP server on a real socket that answers as a test tells it to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HangUpError(Exception):
    """Raised by a script: the connection is closed without an answer."""


@dataclass
class Scripted:
    """A running server: where it is, and what it was asked."""

    url: str
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)


@contextmanager
def scripted(script: Callable[[int, bytes], tuple[int, str]]) -> Iterator[Scripted]:
    """A server that answers its n-th request, from 0, with the status and text of `script`."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            with lock:
                number = len(served.paths)
                served.paths.append(self.path)
                served.headers.append({k.lower(): v for k, v in self.headers.items()})
                served.bodies.append(body)
            try:
                status, text = script(number, body)
            except HangUpError:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Scripted(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
