"""A reserved port: its number can be told to a program that binds it later."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ports import own_port

from flowgrpo_ray.common.ports import NUMBERS, reserve_port

ADDRESSES = [
    *[(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0")],
    *[(socket.AF_INET6, "::ffff:127.0.0.1"), (socket.AF_INET6, "::")],
]


@pytest.mark.parametrize(("family", "host"), ADDRESSES)
def test_nobody_gets_it_but_who_was_told(family: int, host: str):
    """Ray, Serve, uvicorn and Prometheus set SO_REUSEADDR, some of them SO_REUSEPORT as well."""
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
        with socket.socket(family) as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind((host, port))
        for options in ([socket.SO_REUSEADDR], [socket.SO_REUSEADDR, socket.SO_REUSEPORT]):
            with socket.socket(family) as server:
                for option in options:
                    server.setsockopt(socket.SOL_SOCKET, option, 1)
                server.bind((host, port))
                server.listen()
                socket.create_connection(("127.0.0.1", port)).close()


def test_nobody_answers_there_meanwhile():
    with socket.socket() as knock:
        assert knock.connect_ex(("127.0.0.1", own_port())) != 0


OTHER = """
import sys
from flowgrpo_ray.common import ports
ports.NUMBERS = range(*map(int, sys.argv[1:]))
ports.reserve_port()
"""


def test_no_two_processes_get_the_same():
    """Where this one has what there is, another one gets none."""
    port = own_port()
    command = [sys.executable, "-c", OTHER, str(port), str(port + 1)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"OSError: no port from {port} to {port} is free" in run.stderr


def test_the_kernel_gives_out_others():
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if lowest == 32768:  # as Linux is shipped
        assert not set(NUMBERS) & set(range(lowest, highest + 1))
