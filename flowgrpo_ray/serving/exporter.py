"""Metrics of the table, exported by this process through Ray."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ray.util import metrics

from flowgrpo_ray.serving.metric_table import BOUNDS, PREFIX, Metric, Tags
from flowgrpo_ray.serving.ray_private import add_to_counter

CLASSES: dict[str, Any] = {
    "gauge": metrics.Gauge,
    "counter": metrics.Counter,
    "histogram": metrics.Histogram,
}


class Exporter:
    """Ray's side of some metrics. ``who`` are the tags that all of their values carry.

    Ray exports every ten seconds what was set since the last time: a gauge that is not set again
    vanishes. So a value that no longer holds is a gap in the curve, never a number that stays.
    """

    def __init__(self, table: Iterable[Metric], **who: str) -> None:
        self._exported: dict[str, Any] = {}
        for metric in table:
            more = {"boundaries": BOUNDS} if metric.kind == "histogram" else {}
            self._exported[metric.name] = CLASSES[metric.kind](
                PREFIX + metric.name, metric.meaning, tag_keys=(*who, *metric.tags), **more
            ).set_default_tags(who)
            if metric.kind == "counter" and not metric.tags:
                self.add(metric, 0)

    def set(self, metric: Metric, value: float, tags: Tags | None = None) -> None:
        """A gauge's value, until the next export."""
        self._exported[metric.name].set(value, tags)

    def add(self, metric: Metric, value: float, tags: Tags | None = None) -> None:
        """What a counter grows by, maybe 0: a series that begins with 1 would hide its first event
        from Prometheus' `increase`, and Ray's own `inc` refuses 0."""
        add_to_counter(self._exported[metric.name], value, tags)

    def observe(self, metric: Metric, value: float, tags: Tags | None = None) -> None:
        """One value for a histogram."""
        self._exported[metric.name].observe(value, tags)
