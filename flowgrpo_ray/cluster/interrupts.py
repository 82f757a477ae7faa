"""SIGINT and SIGTERM over the whole life of a run.

Python raises KeyboardInterrupt wherever the program is, and inside of Ray's start or end that ends
in a crash. So signals are kept here from the start on: before Ray they raise, while it starts they
wait, during training the trainer takes them, and while Ray ends they change nothing any more.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONCE_S = 1.0  # within which two are one: `timeout` signals the process, and its group


class Interrupts:
    """A context manager; outside of the main thread, where no signal comes, only ``interrupt``."""

    def __init__(self) -> None:
        self._thread = threading.current_thread()
        self._last = -ONCE_S
        self._pending = False
        self._holds = False  # from Ray's start on
        self._take: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        main = self._thread is threading.main_thread()
        self._before = {n: signal.signal(n, self._signalled) for n in SIGNALS} if main else {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _signalled(self, *_: object) -> None:
        now = time.monotonic()
        if now - self._last >= ONCE_S:
            self._last = now
            self.interrupt()

    def interrupt(self) -> None:
        """Do what a signal does; from any thread."""
        if self._take:
            self._take()
        elif self._holds or threading.current_thread() is not self._thread:
            self._pending = True
        else:
            raise KeyboardInterrupt

    def hold(self) -> None:
        """From now on a signal waits until it is taken."""
        self.check()
        self._holds = True

    def check(self) -> None:
        """``KeyboardInterrupt`` if one has come and waits."""
        if self._pending:
            raise KeyboardInterrupt

    @contextmanager
    def taken(self, take: Callable[[], None]) -> Iterator[None]:
        """Within it ``take`` is called at each; ``KeyboardInterrupt`` for one that waits."""
        self._take = take
        try:
            self.check()
            yield
        finally:
            self._take = None
