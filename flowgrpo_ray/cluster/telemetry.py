"""What a running driver tells the outside: metrics through Ray, and its part of live.json.

It only looks. Nothing here changes what is trained, and nothing that goes wrong here ends a run:
the console says it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from flowgrpo_ray.cluster.crew import Crew
from flowgrpo_ray.cluster.live import Display, last_checkpoint
from flowgrpo_ray.cluster.warned import Warned
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.serving import metric_table as table
from flowgrpo_ray.serving.client import Traffic
from flowgrpo_ray.serving.exporter import Exporter
from flowgrpo_ray.serving.metric_table import FROM_ROWS, OF_DRIVER, Metric, Tags
from flowgrpo_ray.serving.ray_private import dashboard_address, serve_applications
from flowgrpo_ray.serving.types import app_name
from flowgrpo_ray.spec.training import TrainingSpec

BEAT_S = 1.0  # Ray exports what was set since the last time, so gauges are set again and again
SERVE_S = 5.0  # between two questions to Serve
WARNINGS_S = 10.0  # and to the actors for warnings

Values = list[tuple[Metric, Tags, float]]


class ExportedTraffic(Traffic):
    """Counts the calls of one reward, for Ray as well."""

    def __init__(self, reward: str, export: Exporter) -> None:
        super().__init__()
        self._tags, self._export = {"reward": reward}, export
        for metric in (table.CALLS, table.IMAGES, table.FAILURES, table.SECONDS):
            export.add(metric, 0, self._tags)

    def answered(self, images: int, seconds: float) -> None:
        super().answered(images, seconds)
        self._export.add(table.CALLS, 1, self._tags)
        self._export.add(table.IMAGES, images, self._tags)
        self._export.add(table.SECONDS, seconds, self._tags)
        self._export.observe(table.LATENCY, seconds, self._tags)

    def failed(self) -> None:
        super().failed()
        self._export.add(table.FAILURES, 1, self._tags)


class Telemetry:
    """Of one run on a connected cluster; works in the background while it is entered."""

    def __init__(self, spec: TrainingSpec, folder: RunFolder, display: Display) -> None:
        self._spec, self._folder, self._display = spec, folder, display
        rows = [metric for metrics in FROM_ROWS.values() for metric in metrics]
        self._export = Exporter([*rows, *OF_DRIVER], run=spec.name)
        self._last: dict[str, Values] = {}  # gauges, by the kind of row that they come from
        self._deployments: dict[str, dict[str, Any]] = {}
        self.traffic = {name: ExportedTraffic(name, self._export) for name in spec.rewards}
        self._crew: Crew | None = None  # once all actors are up
        self._warned = Warned(display.note)
        self._ray: dict[str, Any] | None = None
        self.saved()

    async def __aenter__(self) -> Telemetry:
        self._ray = _where()
        self._tasks = [
            asyncio.create_task(w) for w in (self._beating(), self._asking(), self._listening())
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        self._beat()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._display.note(f"metrics and live.json are no longer fed: {task.exception()!r}")

    # --- what happens

    def see(self, file: str, row: Mapping[str, Any]) -> None:
        """A row was written to ``file`` (metrics.jsonl): its numbers replace those of the last row
        of its kind. One that is null is not exported, so its curve has a gap."""
        kind = f"{file.removesuffix('.jsonl')}.{row['kind']}"
        gauges: Values = []
        for metric in FROM_ROWS.get(kind, ()):
            for tags, value in metric.read(row):
                if metric.kind == "counter":
                    self._export.add(metric, value, tags)
                else:
                    gauges.append((metric, tags, value))
        if kind == "metrics.train":
            numbers = self._spec.objective.numbers(row)
            gauges += [(table.OBJECTIVE, *of) for of in table.OBJECTIVE.read(numbers)]
        self._last[kind] = gauges
        self._beat()

    def follow(self, crew: Crew) -> None:
        """All actors are up: from now on tell of them."""
        self._crew = crew

    @property
    def ready(self) -> bool:
        return self._crew is not None

    def saved(self) -> None:
        """Look for the last checkpoint."""
        self._checkpoint = last_checkpoint(self._folder.checkpoints)

    async def _beating(self) -> None:
        while True:
            self._beat()
            await asyncio.sleep(BEAT_S)

    def _beat(self) -> None:
        """Set every gauge."""
        for values in self._last.values():
            for metric, tags, value in values:
                self._export.set(metric, value, tags)
        checkpoint, workers = self._checkpoint or {}, self._workers()
        now: dict[Metric, Any] = {
            table.ITERATIONS: self._spec.iterations,
            table.CHECKPOINT_TIME: checkpoint.get("at"),
            table.CHECKPOINT_ITERATION: checkpoint.get("iteration"),
            table.WEIGHTS_VERSION: {w["name"]: w["weights_version"] for w in workers},
            table.IN_FLIGHT: {w["name"]: w["in_flight"] for w in workers},
            table.QUEUE: {name: traffic.queue for name, traffic in self.traffic.items()},
            table.REPLICAS: {name: d["replicas"] for name, d in self._deployments.items()},
            table.TARGET: {name: d["target"] for name, d in self._deployments.items()},
        }
        for metric, row in now.items():
            for tags, value in metric.read(row):
                self._export.set(metric, value, tags)

    async def _asking(self) -> None:
        """Keep asking Serve for the deployments; in a thread, since Serve has no other way."""
        trouble = ""
        while True:
            if self._crew:
                try:
                    self._deployments = await asyncio.to_thread(_deployments, [*self.traffic])
                    for name, found in self._deployments.items():
                        self._crew.ledger.set_count(app_name(name), found["replicas"])
                    trouble = ""
                except (RayError, RayServeException) as error:
                    self._deployments = {}
                    if str(error) != trouble:
                        self._display.note(f"Serve does not tell its replicas: {error}")
                    trouble = str(error)
            await asyncio.sleep(SERVE_S if self._crew else BEAT_S)

    async def _listening(self) -> None:
        """Keep asking the actors for warnings."""
        while True:
            await self.listen()
            await asyncio.sleep(WARNINGS_S if self._crew else BEAT_S)

    async def listen(self) -> None:
        """Tell what actors have warned of."""
        if self._crew:
            await self._warned.ask(self._crew)

    # --- what live.json says

    def status(self) -> dict[str, Any]:
        """The part of live.json that is known here; called from another thread."""
        return {
            "ray": self._ray,
            "checkpoint": self._checkpoint,
            "workers": self._workers(),
            "restarts": self._crew.losses.total if self._crew else 0,
            "rewards": {name: self._reward(name) for name in self.traffic},
        }

    def _workers(self) -> list[dict[str, Any]]:
        if self._crew is None:
            return []
        up = dict(self._crew.rollouts.up)  # a copy: the loop that changes it may be another thread
        return [
            {"name": w.name, "weights_version": w.version, "in_flight": w.in_flight}
            for _, w in sorted(up.items())
        ]

    def _reward(self, name: str) -> dict[str, Any]:
        traffic = self.traffic[name]
        unknown = {"state": "UNKNOWN", "replicas": 0, "target": 0}
        return {
            "deployment": app_name(name),
            **self._deployments.get(name, unknown),
            "queue": traffic.queue,
            "calls": traffic.calls,
            "failures": traffic.failures,
            "mean_latency_s": traffic.seconds / traffic.calls if traffic.calls else None,
        }


def _deployments(names: list[str]) -> dict[str, dict[str, Any]]:
    """State, running replicas and their target of each reward's deployment that Serve knows."""
    applications = serve_applications()
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        application = applications.get(app_name(name), {"status": "UNKNOWN", "deployments": {}})
        deployment = application["deployments"].get(name, {})
        states = [replica["state"] for replica in deployment.get("replicas", [])]
        found[name] = {
            "state": application["status"],
            "replicas": states.count("RUNNING"),
            "target": deployment.get("target_num_replicas", 0),
        }
    return found


def _where() -> dict[str, Any]:
    """The cluster, and the job that this driver is, if it is one."""
    dashboard = dashboard_address()
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return {
        "address": ray.get_runtime_context().gcs_address,
        "dashboard": f"http://{dashboard}" if dashboard else None,
        "job": job.get("metadata", {}).get("job_submission_id"),
    }
