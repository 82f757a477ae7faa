"""What a tracker is, and what it is told."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.files import write_atomic
from flowgrpo_ray.spec.file import flat_keys

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker follows: its folder, and its resolved spec as plain JSON."""

    folder: Path
    spec: dict[str, Any]

    @property
    def name(self) -> str:
        return self.spec["name"]

    @property
    def group(self) -> str | None:
        return self.spec["tracking"]["group"]

    @property
    def tags(self) -> list[str]:
        return self.spec["tracking"]["tags"]

    @property
    def notes(self) -> str | None:
        return self.spec["tracking"]["notes"]

    def flat(self) -> dict[str, Any]:
        """The spec by dotted keys; a list is one value."""
        return flat_keys(self.spec)

    def known_id(self, service: str) -> str | None:
        """What ``keep_id`` has kept, in this attempt at the run or in one before it."""
        path = self._id_file(service)
        return path.read_text("utf-8").strip() if path.exists() else None

    def keep_id(self, service: str, known: str) -> None:
        """Keep in the run folder what the service calls this run, to go on in it after a resume."""
        write_atomic(self._id_file(service), f"{known}\n".encode())

    def _id_file(self, service: str) -> Path:
        return self.folder / f"{service}-run-id.txt"


@dataclass(frozen=True)
class Picture:
    """One image of an evaluation, ``uint8 [H, W, 3]``, its prompt, and its score by each reward;
    ``None`` where there is none."""

    pixels: np.ndarray
    prompt: str
    scores: Mapping[str, float | None]

    @property
    def caption(self) -> str:
        """Prompt, and scores in a line below it."""
        scores = (f"{n} {'–' if s is None else f'{s:.4g}'}" for n, s in self.scores.items())
        return f"{self.prompt}\n{' · '.join(scores)}"

    def image(self) -> Image.Image:
        from PIL import Image

        return Image.fromarray(self.pixels)


class Tracker:
    """Follows one run. ``start`` comes first, ``finish`` last; all calls come from one thread.

    A constructor's parameters are the options of the spec. A method that raises ``TrackingError``
    is noted on the console and the run goes on; any other error ends the run.
    """

    def start(self, run: TrackedRun) -> str | None:
        """The run begins, or goes on after a resume; may say where to look at it."""

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Numbers of one row by their names, as ``train/reward/mean``: without spaces. Several
        rows belong to one ``iteration``. Every tracker has this one."""
        raise NotImplementedError

    def pictures(self, pictures: Sequence[Picture], iteration: int) -> None:
        """The first pictures of an evaluation: each time the same prompts, in order."""

    def rewind(self, iteration: int) -> None:
        """What came after ``iteration`` is undone and will be told again; -1: everything."""

    def finish(self, failed: bool) -> None:
        """The run has ended, with an error or without one; it may be resumed later."""


def library(name: str, package: str) -> Any:
    """The module of a service; ``SpecError`` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as cause:
        raise SpecError(
            f"tracking.{name} needs the package {package}: {cause}. Install it with pip, or set "
            "that key to null"
        ) from cause
