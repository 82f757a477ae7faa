"""Estimates that share the dry runs of their networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flowgrpo_ray.estimate import footprint
from flowgrpo_ray.spec.training import TrainingSpec


@contextmanager
def costs_once() -> Iterator[None]:
    """The network runs on shapes once for specs that differ in rewards or counts alone."""
    known: dict[Any, Any] = {}
    original = footprint.costs

    def costs(spec: TrainingSpec, policy: Any, configs: Any, sources: int) -> Any:
        sampling, learner = spec.sampling, spec.cluster.learner
        key = (
            *(spec.model.model_dump_json(), spec.tuning.model_dump_json(), spec.ranks.gpus > 0),
            *(sampling.micro_batch, sampling.size, sampling.guidance, spec.evaluation.micro_batch),
            *(learner.activation_checkpointing, max(spec.ranks.count, spec.gpus) > 1, sources),
        )
        if key not in known:
            known[key] = original(spec, policy, configs, sources)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprint, "costs", costs)
        yield
