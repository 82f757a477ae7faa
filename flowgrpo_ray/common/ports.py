"""A port for a program that binds it by number."""

from __future__ import annotations

import random
import socket

NUMBERS = range(20000, 32768)  # above those of Ray's workers, below those that Linux gives out


def reserve_port() -> socket.socket:
    """A port of this machine that nobody else can take while the socket is open.

    A port that is only found to be free may be another program's before it is bound. This one is
    bound already, at every address, and does not listen. SO_REUSEADDR lets whoever sets it too, as
    servers do, listen there; without it on both sides a port is bound once.
    """
    for number in random.SystemRandom().sample(NUMBERS, len(NUMBERS)):
        reserved = socket.socket()
        try:
            reserved.bind(("", number))
        except OSError:
            reserved.close()
        else:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return reserved
    raise OSError(f"no port from {NUMBERS.start} to {NUMBERS.stop - 1} is free")
