"""Ports that other programs are told to listen at: Ray, Serve, Prometheus."""

from __future__ import annotations

import socket

from flowgrpo_ray.common.ports import reserve_port

_reserved: list[socket.socket] = []


def own_port() -> int:
    """One that stays with this process, and with whom it tells the number, until it ends."""
    _reserved.append(reserve_port())
    return _reserved[-1].getsockname()[1]
