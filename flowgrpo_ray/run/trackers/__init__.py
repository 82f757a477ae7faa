"""Who is told a run's numbers and pictures, beside its folder: one small class per service.

A tracker is a ``Tracker`` (``base``): told of the run once, then of each row and each evaluation's
pictures. Nothing of a run depends on one: ``metrics.jsonl`` and ``samples/`` hold everything. A
service's library is imported when a spec asks for it, in its own file here and nowhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.own_classes import import_class
from flowgrpo_ray.rewards.options import arguments_of
from flowgrpo_ray.run.trackers.base import Picture, TrackedRun, Tracker
from flowgrpo_ray.run.trackers.mlflow import MlflowTracker
from flowgrpo_ray.run.trackers.tensorboard import TensorBoardTracker
from flowgrpo_ray.run.trackers.trackio import TrackioTracker
from flowgrpo_ray.run.trackers.wandb import WandbTracker
from flowgrpo_ray.spec.sections import TrackingSpec
from flowgrpo_ray.spec.training import TrainingSpec

__all__ = ["Picture", "TrackedRun", "Tracker", "start"]


def start(spec: TrainingSpec, folder: Path, tell: Callable[[str], None]) -> list[Tracker]:
    """The trackers that ``spec`` asks for, started; ``tell`` is told where each can be looked at.

    ``SpecError`` where one cannot be had; those that were started before it are ended then.
    """
    run = TrackedRun(folder, spec.model_dump(mode="json"))
    trackers = _asked_for(spec.tracking)
    with contextlib.ExitStack() as started:
        for tracker in trackers:
            where = tracker.start(run)
            started.callback(tracker.finish, failed=True)
            if where:
                tell(where)
        started.pop_all()
    return trackers


def _asked_for(tracking: TrackingSpec) -> list[Tracker]:
    found: list[Tracker] = []
    if tracking.tensorboard:
        found.append(TensorBoardTracker())
    if tracking.wandb:
        found.append(WandbTracker(tracking.wandb))
    if tracking.mlflow:
        found.append(MlflowTracker(tracking.mlflow))
    if tracking.trackio:
        found.append(TrackioTracker(tracking.trackio))
    if tracking.kind:
        found.append(_own(tracking.kind, tracking.options))
    return found


def _own(kind: str, options: dict[str, object]) -> Tracker:
    """A user's tracker, constructed from its options."""
    cls = import_class("tracker", kind, {})
    if not issubclass(cls, Tracker) or cls.log is Tracker.log:
        raise SpecError(
            f"tracker {kind!r}: {cls.__name__} is no tracker: derive it from "
            "flowgrpo_ray.run.trackers.Tracker, and give it a method log"
        )
    try:
        return cls(**arguments_of(cls, options))
    except ValueError as error:
        raise SpecError(f"tracker {kind!r}: {error}") from error
