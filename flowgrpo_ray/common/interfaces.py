"""Which of a machine's network interfaces leads to another machine."""

from __future__ import annotations

import socket
import struct
import sys

SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def interface_to(host: str) -> str | None:
    """The name of the interface through which this machine reaches ``host``; ``None`` where the
    system does not tell (not Linux, no IPv4 way, an address that no interface has)."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # which sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None
