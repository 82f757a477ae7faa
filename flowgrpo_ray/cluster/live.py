"""live.json: what a run is doing now, for a person or a page that watches its folder.

Written about once a second by a thread, so that it goes on while Ray starts and while the driver
computes. Nothing depends on it. If it cannot be written (a full disk), the console says so and the
run goes on; what a run must not lose is in other files, which do stop it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from flowgrpo_ray.common.errors import FlowGrpoError
from flowgrpo_ray.run.checkpoint import checkpoint_iteration, newest_checkpoint
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.state import LIVE, LOG
from flowgrpo_ray.spec.training import TrainingSpec

BEAT_S = 1.0


class Display(Protocol):
    """What the driver tells the person who watches."""

    def stage(self, stage: str) -> None: ...
    def iteration(self, row: dict[str, Any], seconds: float) -> None: ...
    def evaluation(self, iteration: int, rewards: dict[str, float | None]) -> None: ...
    def note(self, message: str) -> None: ...


class Followed(Protocol):
    """The trainer, as this module sees it; asked from a thread of its own."""

    def status(self) -> dict[str, Any]: ...


def last_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint in a folder of them: its iteration, and when it was saved (unix)."""
    found = newest_checkpoint(folder, sys.maxsize)
    return found and {"iteration": checkpoint_iteration(found), "at": found.stat().st_mtime}


class Live:
    """Keeps live.json while it is entered. Also a display: hears the stages, and passes all on."""

    def __init__(self, folder: RunFolder, spec: TrainingSpec, display: Display) -> None:
        self._path, self._display = folder.path / LIVE, display
        self._log = folder.path / LOG
        self._followed: Followed | None = None
        self._stage = ""
        checkpoint = last_checkpoint(folder.checkpoints)
        self._content: dict[str, Any] = {
            "state": "starting",
            "stage": "",
            "message": None,
            "iteration": checkpoint["iteration"] if checkpoint else 0,
            "iterations": spec.iterations,
            "started": time.time(),
            "updated": 0.0,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "ray": None,
            "checkpoint": checkpoint,
            "workers": [],
            "learners": spec.ranks.count,
            "restarts": 0,
            "rewards": {},
        }
        self._trouble = ""  # why it could not be written, as it was told last
        self._wake, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name=LIVE, daemon=True)

    def __enter__(self) -> Live:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended = True
        self._wake.set()
        self._thread.join()
        self._refresh()
        done = self._content["iteration"] >= self._content["iterations"]
        state = "finished" if done and error is None else "stopped"
        if error and not isinstance(error, KeyboardInterrupt):
            state = "failed"
            known = isinstance(error, FlowGrpoError)
            self._content["message"] = str(error) if known else f"{type(error).__name__}: {error}"
        self._content["state"] = state
        self._write()

    def follow(self, trainer: Followed) -> None:
        """From now on ask the trainer for its part of the content."""
        self._followed = trainer

    def stage(self, stage: str) -> None:
        self._stage = stage
        self._wake.set()
        self._display.stage(stage)

    def iteration(self, row: dict[str, Any], seconds: float) -> None:
        self._display.iteration(row, seconds)

    def evaluation(self, iteration: int, rewards: dict[str, float | None]) -> None:
        self._display.evaluation(iteration, rewards)

    def note(self, message: str) -> None:
        """For the person, and for the driver's log, which keeps every one."""
        self._display.note(message)
        with suppress(OSError), self._log.open("a", encoding="utf-8") as log:  # a full disk
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def _beat(self) -> None:
        while not self._ended:
            self._wake.wait(BEAT_S)
            self._wake.clear()
            self._refresh()
            self._write()

    def _refresh(self) -> None:
        self._content["stage"] = self._stage
        if self._followed:
            self._content |= self._followed.status()

    def _write(self) -> None:
        """Beside and renamed, so that a reader always meets a whole file; not synced to disk."""
        self._content["updated"] = time.time()
        beside = self._path.with_name(LIVE + ".part")
        try:
            beside.write_text(json.dumps(self._content, allow_nan=False), encoding="utf-8")
            beside.replace(self._path)
            self._trouble = ""
        except OSError as error:
            if str(error) != self._trouble:
                self.note(f"{LIVE} cannot be written, so nobody sees this run live: {error}")
            self._trouble = str(error)
