"""MLflow: https://mlflow.org/docs. Where it writes is MLFLOW_TRACKING_URI, or its own default."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flowgrpo_ray.common.errors import SpecError, TrackingError
from flowgrpo_ray.run.trackers.base import Picture, TrackedRun, Tracker, library

MOST_METRICS, MOST_PARAMETERS = 1000, 100  # of one request
LONGEST_PARAMETER = 6000  # characters
SERVICE = "mlflow"


class MlflowTracker(Tracker):
    """A run of an experiment. Parameters are the spec as it began: MLflow lets none change."""

    def __init__(self, experiment: str) -> None:
        # A training run waits for each answer: two tries again, where MLflow would make seven.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        self._experiment = experiment
        self._mlflow: Any = library(SERVICE, "mlflow-skinny")
        self._client: Any = None
        self._id = ""
        self._unsent: list[Any] = []

    def start(self, run: TrackedRun) -> str:
        address = self._mlflow.get_tracking_uri()
        try:
            self._client = self._mlflow.MlflowClient()
            self._begin(run)
        except self._mlflow.MlflowException as cause:
            raise SpecError(
                f"tracking.mlflow = {self._experiment!r}: MLflow cannot use {address}: {cause}. "
                "Set MLFLOW_TRACKING_URI to a server that runs"
            ) from cause
        return f"MLflow: run {self._id} of {self._experiment!r} at {address}"

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        now = int(time.time() * 1000)
        metric = self._mlflow.entities.Metric
        self._unsent += [metric(name, value, now, iteration) for name, value in values.items()]
        with self._told():
            while self._unsent:
                self._client.log_batch(self._id, metrics=self._unsent[:MOST_METRICS])
                del self._unsent[:MOST_METRICS]

    def pictures(self, pictures: Sequence[Picture], iteration: int) -> None:
        said = [{"prompt": p.prompt, "scores": dict(p.scores)} for p in pictures]
        with self._told():
            for place, picture in enumerate(pictures):
                key = f"eval/pictures/{place:02}"
                self._client.log_image(self._id, picture.pixels, key=key, step=iteration)
            self._client.log_dict(self._id, said, f"pictures/iteration-{iteration:06d}.json")

    def finish(self, failed: bool) -> None:
        with self._told():
            self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _begin(self, run: TrackedRun) -> None:
        """Go on in the run that the folder knows, or make one."""
        client = self._client
        if known := run.known_id(SERVICE):
            self._id = known
            client.update_run(known, status="RUNNING")
        else:
            found = client.get_experiment_by_name(self._experiment)
            at = found.experiment_id if found else client.create_experiment(self._experiment)
            tags = {"group": run.group, "tags": ", ".join(run.tags)}
            tags["mlflow.note.content"] = run.notes
            given = {name: text for name, text in tags.items() if text}
            self._id = client.create_run(at, run_name=run.name, tags=given).info.run_id
            run.keep_id(SERVICE, self._id)
            self._log_parameters(run)
        client.log_dict(self._id, run.spec, "spec.yaml")

    def _log_parameters(self, run: TrackedRun) -> None:
        parameter = self._mlflow.entities.Param
        flat = run.flat().items()
        parameters = [parameter(key, str(value)[:LONGEST_PARAMETER]) for key, value in flat]
        for first in range(0, len(parameters), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[first : first + MOST_PARAMETERS])

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._mlflow.MlflowException as error:
            raise TrackingError(f"MLflow cannot be told: {error}") from error
