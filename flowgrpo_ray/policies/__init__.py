"""Base models by family: one file each, one line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from flowgrpo_ray.policies.base import Policy

if TYPE_CHECKING:
    from flowgrpo_ray.spec import TrainingSpec

FAMILIES = {
    "sd3": "flowgrpo_ray.policies.sd3:SD3Policy",
    "flux": "flowgrpo_ray.policies.flux:FluxPolicy",
    "qwen_image": "flowgrpo_ray.policies.qwen_image:QwenImagePolicy",
    "bagel": "flowgrpo_ray.policies.bagel:BagelPolicy",
}


def load_policy(
    spec: TrainingSpec, device: torch.device, parts: frozenset[str] = Policy.PARTS
) -> Policy:
    """The spec's base model on ``device``, not yet tuned; only the ``parts`` named are loaded."""
    cls = policy_class(spec.model.family)
    return cls(spec.model, spec.tuning, spec.sampling.guidance, device, parts)


def policy_class(family: str) -> type[Policy]:
    """The adapter of a family of base models."""
    module, name = FAMILIES[family].split(":")
    return getattr(importlib.import_module(module), name)
