"""Weights & Biases: https://docs.wandb.ai. Offline too, with WANDB_MODE=offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.run.trackers.base import Picture, TrackedRun, Tracker, library

MOST_PICTURES = 108  # that one panel shows


class WandbTracker(Tracker):
    """A run of a project. Its step is the iteration: all rows of one make one of theirs.

    Steps never go back there. Rows that a resumed run tells again are passed over, and are the
    same: what the seed decides does not change.
    """

    def __init__(self, project: str) -> None:
        self._project = project
        self._wandb: Any = library("wandb", "wandb")
        self._run: Any = None

    def start(self, run: TrackedRun) -> str | None:
        wandb = self._wandb
        try:
            if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
                raise SpecError(
                    f"tracking.wandb = {self._project!r}: there is no key for Weights & Biases. "
                    "Log in with `wandb login`, or set WANDB_MODE=offline"
                )
            self._run = wandb.init(
                project=self._project,
                name=run.name,
                dir=str(run.folder),
                id=run.known_id("wandb"),
                resume="allow",
                group=run.group,
                tags=run.tags,
                notes=run.notes,
                config=run.spec,
                settings=wandb.Settings(console="off", silent=True),  # the console is ours
            )
        except wandb.Error as cause:
            raise SpecError(
                f"tracking.wandb = {self._project!r}: Weights & Biases cannot be reached: {cause}. "
                "Mend that, or set WANDB_MODE=offline and send the run later with `wandb sync`"
            ) from cause
        run.keep_id("wandb", self._run.id)
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        if self._run.settings.mode == "offline":
            return f"Weights & Biases, offline: wandb sync {self._run.settings.sync_dir}"
        return self._run.url and f"Weights & Biases: {self._run.url}"

    def log(self, values: Mapping[str, Any], iteration: int) -> None:
        self._run.log({**values, "iteration": iteration}, step=iteration)

    def pictures(self, pictures: Sequence[Picture], iteration: int) -> None:
        shown = [
            self._wandb.Image(picture.image(), caption=picture.caption)
            for picture in pictures[:MOST_PICTURES]
        ]
        self.log({"eval/pictures": shown}, iteration)

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
