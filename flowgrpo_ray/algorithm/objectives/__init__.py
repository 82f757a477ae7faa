"""What updates are made of, a page each: how an image is trained, and what keeps that in bounds.

An objective is a class with its options, as a spec has them, and its mathematics (``base``). Those
of this package stand in ``BUILTIN``; any other is named by its import path ``module:Class``. A
spec is made of them, so they stand below it: nothing here imports torch, Ray or the spec.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from flowgrpo_ray.algorithm.objectives.awm import Awm
from flowgrpo_ray.algorithm.objectives.base import Gate, Objective, Statistic, Term
from flowgrpo_ray.algorithm.objectives.diffusion_nft import DiffusionNft
from flowgrpo_ray.algorithm.objectives.flow_dppo import FlowDppo
from flowgrpo_ray.algorithm.objectives.flow_grpo import FlowGrpo
from flowgrpo_ray.algorithm.objectives.grpo_guard import GrpoGuard
from flowgrpo_ray.algorithm.objectives.noised import Noised, NoisedObjective, Times
from flowgrpo_ray.algorithm.objectives.steps import KlSpec, Step, StepObjective
from flowgrpo_ray.algorithm.objectives.surrogate import (
    clipped,
    clipped_loss,
    diverged,
    guard_log_ratio,
    kl_to_reference,
)
from flowgrpo_ray.algorithm.objectives.tie import Adapt, Tie
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.own_classes import import_class, nearest

__all__ = [
    "BUILTIN",
    "Adapt",
    "Awm",
    "DiffusionNft",
    "FlowDppo",
    "FlowGrpo",
    "Gate",
    "GrpoGuard",
    "KlSpec",
    "Noised",
    "NoisedObjective",
    "Objective",
    "Statistic",
    "Step",
    "StepObjective",
    "Term",
    "Tie",
    "Times",
    "clipped",
    "clipped_loss",
    "diverged",
    "guard_log_ratio",
    "kl_to_reference",
    "own",
]

BUILTIN: dict[str, type[Objective]] = {
    "flow_grpo": FlowGrpo,
    "grpo_guard": GrpoGuard,
    "flow_dppo": FlowDppo,
    "diffusion_nft": DiffusionNft,
    "awm": Awm,
}


def own(given: Mapping[str, Any]) -> Objective:
    """A user's objective from its section of a spec; ``SpecError`` names every wrong option."""
    kind = given["kind"]
    cls = import_class("objective", kind, dict.fromkeys(BUILTIN, ""))
    if not issubclass(cls, Objective):
        raise SpecError(
            f"objective {kind!r}: {cls.__name__} is no objective: derive it from StepObjective or "
            "NoisedObjective of flowgrpo_ray.algorithm.objectives, or from one of those built in"
        )
    if missing := sorted(cls.__abstractmethods__):
        raise SpecError(f"objective {kind!r}: {cls.__name__} lacks {', '.join(missing)}")
    inherited = typing.get_args(cls.model_fields["kind"].annotation)  # of one built in
    options = {**given, "kind": inherited[0] if inherited else kind}
    try:
        made = cls.model_validate_json(json.dumps(options))
    except ValidationError as error:
        wrong = "; ".join(_explain(cls, problem) for problem in error.errors())
        raise SpecError(f"objective {kind!r}: {wrong}") from error
    return made.model_copy(update={"kind": kind})


def _explain(cls: type[Objective], problem: Any) -> str:
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        known = [name for name in cls.model_fields if name != "kind"]
        return f"no option {key!r}{nearest(key, known)}; options: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{key}: this option is required"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, not {problem['input']!r}" if key else message
