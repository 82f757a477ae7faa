"""Trackio: https://huggingface.co/docs/trackio. On this machine, unless TRACKIO_SPACE_ID is set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowgrpo_ray.run.trackers.base import Picture, TrackedRun, Tracker, library

SERVICE = "trackio"


class TrackioTracker(Tracker):
    """A run of a project; its step is the iteration."""

    def __init__(self, project: str) -> None:
        self._project = project
        self._trackio: Any = library(SERVICE, "trackio")
        self._run: Any = None

    def start(self, run: TrackedRun) -> str:
        known = run.known_id(SERVICE)
        self._run = self._trackio.init(
            self._project,
            name=known or run.name,
            group=run.group,
            config=run.flat(),
            resume="allow" if known else "never",
            embed=False,
        )
        run.keep_id(SERVICE, self._run.name)
        return f"Trackio: trackio show --project {self._project}"

    def log(self, values: Mapping[str, Any], iteration: int) -> None:
        self._run.log(dict(values), step=iteration)

    def pictures(self, pictures: Sequence[Picture], iteration: int) -> None:
        image = self._trackio.Image
        shown = {
            f"eval/pictures/{place:02}": image(picture.pixels, caption=picture.caption)
            for place, picture in enumerate(pictures)
        }
        self.log(shown, iteration)

    def finish(self, failed: bool) -> None:
        self._run.finish()
