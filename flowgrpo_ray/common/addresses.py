"""Addresses of Ray clusters, tried before Ray does: it waits long for one that is silent."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

from flowgrpo_ray.common.errors import ClusterError

PROBE_S = 3.0


def ray_address() -> str | None:
    """The cluster that RAY_ADDRESS names; set but empty it names none."""
    return os.environ.get("RAY_ADDRESS") or None


def probe_cluster(address: str, source: str) -> None:
    """``ClusterError`` unless a Ray head answers at ``address``, which ``source`` gave."""
    if address == "auto":
        return
    if "://" in address or address == "local":
        raise ClusterError(
            f"{source} = {address!r} is not the address of a cluster's head: write HOST:6379, what "
            "ray start --address takes, on a machine of the cluster; a run from elsewhere is "
            f"submitted (flowgrpo-ray submit). Without {source} a run starts a Ray of its own"
        )
    if fault := _silence(f"//{address}", _is_no_head):
        raise ClusterError(
            f"{source} = {address!r}: no cluster answers there within {PROBE_S:g} s ({fault}). "
            f"Start one (ray start --head), name another (HOST:6379), or leave {source} out"
        )


def jobs_address() -> str | None:
    """Where Ray submits jobs by default, if that is named."""
    return os.environ.get("RAY_API_SERVER_ADDRESS") or ray_address()


def probe_jobs(address: str | None) -> None:
    """``ClusterError`` unless something answers where jobs are to be submitted; by default where
    Ray's variables say."""
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if not os.environ.get(variable):
            os.environ.pop(variable, None)  # empty, to Ray, it would be an address
    where = address or jobs_address()
    if where is None or where == "auto":
        return
    url = where if "://" in where else f"//{where}"
    wrong = "it begins with ray://" if where.startswith("ray://") else _silence(url)
    if wrong:
        raise ClusterError(
            f"no Ray cluster takes jobs at {where} ({wrong}): give the address of its dashboard, "
            "--address http://HEAD:8265"
        )


def _silence(url: str, wrong: Callable[[socket.socket], str | None] = lambda _: None) -> str | None:
    """Why nothing answers at the host and port of ``url``, or what is ``wrong`` with what does."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError as error:
        return str(error)
    if not parts.hostname or not port:
        return "it has no host and port"
    found: list[str | None] = []

    def ask() -> None:
        try:
            with socket.create_connection((parts.hostname, port), PROBE_S) as connection:
                found.append(wrong(connection))
        except OSError as error:
            found.append(error.strerror or str(error))

    asking = threading.Thread(target=ask, daemon=True)  # a resolver of names has no time limit
    asking.start()
    asking.join(PROBE_S)
    return found[0] if found else "timed out"


# The greeting of HTTP/2, on which gRPC is built: preface, empty settings (RFC 9113, 3.4 and 6.5).
SETTINGS = 4  # of a frame, its fourth byte
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, SETTINGS, 0, 0, 0, 0, 0))


def _is_no_head(connection: socket.socket) -> str | None:
    """Why what answers is no head of a cluster: that greets back with its settings."""
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return None
    connection.sendall(GREETING)
    frame = connection.recv(9)
    return None if frame[3:4] == bytes([SETTINGS]) else "what listens there is no Ray head"
