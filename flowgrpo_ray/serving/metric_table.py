"""Every metric that runs and reward replicas export through Ray, and where its value comes from.

Rows of `metrics.jsonl` and `timings.jsonl` become metrics by this table alone: for a new field of a
row a line here is enough, and one in docs/dashboard.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

PREFIX = "flowgrpo_"
BOUNDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0]  # seconds

Tags = dict[str, str]


@dataclass(frozen=True)
class Metric:
    """One metric; ``path`` leads to its value in a row. ``{tag}`` there stands for every key, and
    the key becomes that tag of the value."""

    kind: Literal["gauge", "counter", "histogram"]
    name: str
    path: str
    meaning: str

    @property
    def tags(self) -> tuple[str, ...]:
        """Beside those that tell who exports it: `run`, or `reward` and `replica`."""
        return tuple(re.findall(r"{(\w+)}", self.path))

    @property
    def exported(self) -> str:
        """The name that Prometheus sees."""
        return f"ray_{PREFIX}{self.name}" + ("_total" if self.kind == "counter" else "")

    def read(self, row: Any) -> list[tuple[Tags, float]]:
        """Its values in a row, each with its tags; none where the row has no number."""
        return list(_read(row, self.path.split(".") if self.path else [], {}))


def _read(value: Any, path: list[str], tags: Tags) -> Iterator[tuple[Tags, float]]:
    if not path:
        number = _number(value)
        if number is not None:
            yield tags, number
    elif isinstance(value, Mapping):
        key, *rest = path
        if key.startswith("{"):
            tag = key.strip("{}")
            for name, item in _by(tag, value).items():
                yield from _read(item, rest, tags | {tag: str(name)})
        else:
            yield from _read(value.get(key), rest, tags)


def _by(tag: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Columns beside one called ``tag``, as in `per_step`, become a row for each of its items."""
    names = value.get(tag)
    if not isinstance(names, list):
        return value
    return {str(n): {c: column[i] for c, column in value.items()} for i, n in enumerate(names)}


def _number(value: Any) -> float | None:
    """A finite number; of a list the mean of its finite ones; None where there is none."""
    if isinstance(value, list):
        numbers = [n for n in map(_number, value) if n is not None]
        return sum(numbers) / len(numbers) if numbers else None
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return None


gauge, counter = partial(Metric, "gauge"), partial(Metric, "counter")
histogram = partial(Metric, "histogram")

# By the file and the kind of its rows.
FROM_ROWS = {
    "metrics.train": (
        gauge("iteration", "iteration", "iterations finished"),
        gauge("reward_mean", "rewards.{reward}.mean", "mean over an iteration's images"),
        gauge("reward_std", "rewards.{reward}.std", "spread over an iteration's images"),
        gauge("total_reward_mean", "reward.mean", "mean of the weighted total"),
        gauge("total_reward_std", "reward.std", "spread of the weighted total"),
        counter("unscored_images", "unscored.{reward}", "training images without a score"),
        gauge("log_ratio_gate", "log_ratio.gate", "max |log rho| before the first update"),
        counter("log_ratio_excess", "log_ratio.excess", "values far above the floor"),
        gauge("log_ratio_max", "log_ratio.max_abs", "max |log rho|"),
        gauge("log_ratio_mean", "log_ratio.mean", "mean of log rho"),
        gauge("log_ratio_std", "log_ratio.std", "spread of log rho"),
        gauge("log_ratio_step_mean", "log_ratio.per_step.{step}.mean", "mean in a sampling step"),
        gauge("log_ratio_step_std", "log_ratio.per_step.{step}.std", "spread in a sampling step"),
        gauge("clip_fraction", "clip_fraction.{bound}", "samples x steps without gradient"),
        gauge("kl", "kl", "mean KL to the reference, before beta"),
        gauge("policy_loss", "policy_loss", "mean clipped loss"),
        gauge("loss", "loss", "policy loss + beta x KL"),
        gauge("grad_norm", "grad_norm", "before clipping, mean over an iteration's updates"),
        gauge("updates", "updates", "optimizer updates in an iteration"),
        gauge("learning_rate", "learning_rate", "of the last update"),
        gauge("loss_scale", "loss_scale.last", "factor of float16 losses"),
        counter("overflows", "loss_scale.overflows", "updates lost to float16 overflow"),
        gauge("groups", "groups.{kind}", "groups of an iteration"),
        counter("groups_sampled", "groups.{kind}", "groups so far"),
        counter("images", "images", "training images so far"),
    ),
    "metrics.eval": (
        gauge("eval_iteration", "iteration", "iterations before the last evaluation"),
        gauge("eval_reward_mean", "rewards.{reward}.mean", "mean over held-out prompts"),
        gauge("eval_reward_std", "rewards.{reward}.std", "spread over held-out prompts"),
        gauge("eval_unscored_images", "unscored.{reward}", "held-out images without a score"),
        gauge("watch_diverging", "watch.{reward}.diverging", "1 while it over-optimizes"),
    ),
    "timings.train": (
        gauge("iteration_seconds", "seconds", "wall clock of an iteration"),
        gauge("images_per_second", "images_per_second", "over an iteration"),
        gauge("ledger_seconds", "ledger.{actors}.{state}.{what}", "of a process in an iteration"),
        gauge("busy_share", "busy.{actors}", "busy seconds / (wall clock x actors)"),
    ),
    "timings.eval": (gauge("eval_seconds", "seconds", "wall clock of the last evaluation"),),
}

# Of every objective, its own too, by the names in a row.
OBJECTIVE = gauge("objective", "{statistic}", "a statistic of the objective, mean of an iteration")

# What the driver knows at any time.
ITERATIONS = gauge("iterations", "", "iterations that the run is to have")
WEIGHTS_VERSION = gauge("weights_version", "{worker}", "weights that a worker samples with")
IN_FLIGHT = gauge("units_in_flight", "{worker}", "micro-batches given to a worker")
CHECKPOINT_TIME = gauge("checkpoint_time_seconds", "", "when the last one was saved, unix time")
CHECKPOINT_ITERATION = gauge("checkpoint_iteration", "", "of the last checkpoint")
QUEUE = gauge("reward_queue", "{reward}", "calls that wait for their answer")
CALLS = counter("reward_calls", "{reward}", "answered calls")
IMAGES = counter("reward_images", "{reward}", "images in answered calls")
FAILURES = counter("reward_failures", "{reward}", "attempts without an answer")
SECONDS = counter("reward_seconds", "{reward}", "from call to answer, summed over calls")
LATENCY = histogram("reward_latency_seconds", "{reward}", "from call to answer, retries included")
REPLICAS = gauge("reward_replicas", "{reward}", "replicas that run, as Serve says")
TARGET = gauge("reward_replicas_target", "{reward}", "replicas that Serve is to keep")
OF_DRIVER = (
    *(OBJECTIVE, ITERATIONS, WEIGHTS_VERSION, IN_FLIGHT, CHECKPOINT_TIME, CHECKPOINT_ITERATION),
    *(QUEUE, CALLS, IMAGES, FAILURES, SECONDS, LATENCY, REPLICAS, TARGET),
)

# What each replica of a reward exports, with or without a run; tagged with both.
REPLICA_QUEUE = gauge("replica_queue", "", "calls that wait or are being scored")
REPLICA_CALLS = counter("replica_calls", "", "answered calls")
REPLICA_IMAGES = counter("replica_images", "", "images in answered calls")
REPLICA_FAILURES = counter("replica_failures", "", "calls that raised")
REPLICA_SECONDS = counter("replica_seconds", "", "from arrival to answer, summed")
REPLICA_BUSY = counter("replica_busy_seconds", "", "that the reward worked")
REPLICA_LATENCY = histogram("replica_latency_seconds", "", "from arrival to answer")
OF_REPLICAS = (
    *(REPLICA_QUEUE, REPLICA_CALLS, REPLICA_IMAGES, REPLICA_FAILURES, REPLICA_SECONDS),
    *(REPLICA_BUSY, REPLICA_LATENCY),
)
