"""Base models by family: one file each, and one line in ``flowgrpo_ray.families``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from flowgrpo_ray.families import FAMILIES
from flowgrpo_ray.policies.base import Policy

if TYPE_CHECKING:
    from flowgrpo_ray.spec import TrainingSpec


def policy_class(family: str) -> type[Policy]:
    """The class that drives models of a family; loads no model."""
    module, name = FAMILIES[family].adapter.split(":")
    return getattr(importlib.import_module(module), name)


def load_policy(
    spec: TrainingSpec, device: torch.device, parts: frozenset[str] = Policy.PARTS
) -> Policy:
    """The spec's base model on ``device``, not yet tuned; only the ``parts`` named are loaded."""
    cls = policy_class(spec.model.family)
    return cls(spec.model, spec.tuning, spec.sampling.guidance, device, parts)
