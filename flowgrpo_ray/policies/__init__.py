"""Base models by family: one file each, and a line in ``spec/families.py``.

``base`` says what a model must offer, ``pipeline`` what those of diffusers share; ``loading`` and
``hub`` find weights, ``lora`` tunes them, ``encodings`` keeps what prompts became. The only wing,
beside ``tiny``, that knows diffusers. This file, ``hub`` and ``fit`` load without
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.policies.hub import check_model_files
from flowgrpo_ray.spec.families import FAMILIES

if TYPE_CHECKING:
    import torch

    from flowgrpo_ray.policies.base import Policy
    from flowgrpo_ray.spec.training import TrainingSpec

__all__ = ["load_policy", "policy_class"]


def policy_class(family: str) -> type[Policy]:
    """The class that drives models of a family; loads no model."""
    module, name = FAMILIES[family].adapter.split(":")
    return getattr(importlib.import_module(module), name)


def load_policy(
    spec: TrainingSpec,
    device: torch.device,
    parts: frozenset[str] | None = None,
    *,
    on_host: bool = False,
    masters: bool = True,
) -> Policy:
    """The spec's base model on ``device``, not yet tuned; all its parts, or those named.

    ``on_host`` leaves the network on the CPU, for whoever shards it; who never trains needs no
    float32 ``masters``.
    """
    check_model_files(spec.model)
    cls = policy_class(spec.model.family)
    parts = cls.PARTS if parts is None else parts
    guidance = spec.sampling.guidance
    negative = spec.model.negative_prompt
    if negative is not None and (cls.negative_prompt is None or cls.passes(guidance) == 1):
        raise SpecError(
            f"model.negative_prompt = {negative!r}: family {spec.model.family!r} compares no two "
            f"prompts at sampling.guidance = {guidance:g}. Leave it out"
        )
    policy = cls(spec.model, spec.tuning, guidance, device, parts, on_host=on_host, masters=masters)
    policy.onednn = spec.cluster.cpu_linear == "onednn" and device.type == "cpu"
    return policy
