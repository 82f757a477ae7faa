"""The `flowgrpo-ray` command: `commands` trains and looks at runs, `rewards` is about rewards."""

from __future__ import annotations

import atexit
import signal
import sys
from typing import Any


def main() -> None:
    """Entry point: SIGTERM is as Ctrl-C, and either ends a command with one line and status 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    atexit.register(_ignore_signals)
    try:
        from flowgrpo_ray.cli import commands  # takes a second

        commands.main()
    except KeyboardInterrupt:
        print("interrupted before the command began", file=sys.stderr)
        sys.exit(130)


def _ignore_signals() -> None:
    """All is done: Python would print a traceback of its own end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def __getattr__(name: str) -> Any:
    if name == "app":
        from flowgrpo_ray.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
