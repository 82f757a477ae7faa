"""The interface that leads to another rank, as this machine's own tables say."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from flowgrpo_ray.common.interfaces import interface_to


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells")
def test_the_interface_on_the_way_to_a_host():
    assert interface_to("127.0.0.1") == interface_to("localhost") == "lo"
    assert interface_to("no-such-host.invalid") is None
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    default = [name for name, destination, *_ in routes if destination == "00000000"]
    if not default:
        pytest.skip("this machine has no way out")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("198.51.100.1", 9))
        own = probe.getsockname()[0]
    assert interface_to("198.51.100.1") == interface_to(own) == default[0]
