"""What can be wrong with a run and be seen without starting it, and what the run will cost."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from flowgrpo_ray.environments import python_of
from flowgrpo_ray.errors import ModelError
from flowgrpo_ray.prompts import Prompt, load_prompt_sets
from flowgrpo_ray.rewards import check_options
from flowgrpo_ray.spec import ModelSpec, TrainingSpec

ADAPTERS = ("sd3",)  # the families of flowgrpo_ray.policies, which would load torch
FLOAT32_BYTES = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_run(spec: TrainingSpec) -> tuple[list[Prompt], list[Prompt]]:
    """The training and held-out prompts, after every check that needs no cluster."""
    for name, reward in spec.rewards.items():
        check_options(reward.reward or name, reward.options)
    check_model(spec.model)
    return load_prompt_sets(spec)


def check_environments(spec: TrainingSpec) -> None:
    """``RewardEnvironmentError`` for a reward's environment that is not sound on this machine."""
    for reward in spec.rewards.values():
        if reward.environment is not None:
            python_of(reward.environment)


def check_model(model: ModelSpec) -> None:
    """``ModelError`` for a family without adapter, or a local folder that is no diffusers pipeline;
    hub ids pass."""
    if model.family not in ADAPTERS:
        raise ModelError(
            f"model.family = {model.family!r}: this version has no adapter for it yet; it can "
            f"train {', '.join(ADAPTERS)}"
        )
    if model.folder is None:
        return
    if not model.folder.is_dir():
        raise ModelError(
            f"model.path = {model.path!r}: there is no such folder (a hub id is written owner/name)"
        )
    if not (model.folder / "model_index.json").is_file():
        raise ModelError(
            f"model.path = {model.path!r} holds no model_index.json: give the folder that "
            "pipeline.save_pretrained wrote, not a part of it"
        )


@dataclass(frozen=True)
class Estimate:
    """What a spec will do; memory is ``None`` where the weights are not on this machine."""

    images: int  # per iteration, as all counts here
    micro_batches: int
    rollout_forwards: int  # network evaluations of one image, guidance counted
    trained_forwards: int  # each with its backward pass
    reference_forwards: int
    updates: int
    evaluation_forwards: int  # per evaluation
    gpus: float
    network_parameters: int | None
    rollout_bytes: int | None  # weights of the network in one rollout worker
    learner_bytes: int | None  # weights, gradients, AdamW moments and EMA, of all ranks together


def estimate(spec: TrainingSpec, gpus: float, held_out: int) -> Estimate:
    """Count the work of an iteration, and the memory that weights and optimizer take."""
    sampling = spec.sampling
    passes = 2 if sampling.guidance > 1 else 1
    trained = sampling.trained_steps * spec.objective.epochs
    parameters = network_parameters(spec.model)
    rollout = learner = None
    if parameters is not None:
        base = parameters * DTYPE_BYTES[spec.model.dtype]
        if spec.tuning.kind == "full":
            rollout = parameters * FLOAT32_BYTES * (2 if spec.objective.kl else 1)
            copies = 4 + (1 if spec.ema else 0)
            learner = copies * parameters * FLOAT32_BYTES
        else:
            rollout = learner = base  # adapters and their optimizer are small beside it
    return Estimate(
        images=sampling.images,
        micro_batches=sampling.units,
        rollout_forwards=sampling.images * sampling.steps * passes,
        trained_forwards=sampling.images * trained * passes,
        reference_forwards=sampling.images * sampling.trained_steps * passes
        if spec.objective.kl
        else 0,
        updates=spec.objective.updates * spec.objective.epochs,
        evaluation_forwards=held_out * spec.evaluation.steps * passes,
        gpus=gpus,
        network_parameters=parameters,
        rollout_bytes=rollout,
        learner_bytes=learner,
    )


def network_parameters(model: ModelSpec) -> int | None:
    """Parameters of the denoiser, from the headers of its weight files; ``None`` if not here."""
    if model.folder is None:
        return None
    files = list((model.folder / "transformer").glob("*.safetensors"))
    return sum(_count_parameters(file) for file in files) or None


def _count_parameters(file: Path) -> int:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            size = 1
            for dimension in tensor["shape"]:
                size *= dimension
            total += size
    return total
