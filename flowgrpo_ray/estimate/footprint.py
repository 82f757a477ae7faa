"""What a spec's model costs: parameters, FLOPs, and the memory of rollout worker and learner rank.

The network is built from its config files without weights and run on shapes alone (``dry_run``),
through the policy's own ``velocity`` and ``decode``, so no model needs a formula of its own. What
each process holds of it is added up here. docs/plan.md has the assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowgrpo_ray.algorithm.optimizer import MOMENTS
from flowgrpo_ray.algorithm.parallel import PIECE, asked_for
from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.estimate.dry_run import Cost, give_shapes, measure, scaled, without_data
from flowgrpo_ray.policies import policy_class
from flowgrpo_ray.policies.base import DTYPES, Configs, Policy
from flowgrpo_ray.spec.sections import ModelSpec
from flowgrpo_ray.spec.training import TrainingSpec

FLOAT32_BYTES = 4
GATHERED_BLOCKS = 2  # whole at once under FSDP: the one at work, and the next that is prefetched
RESERVED = 2 * 2**30  # bytes of a GPU for CUDA's context, kernels' workspaces and fragmentation
ARCHITECTURES = Path(__file__).parent / "architectures"
PUBLISHED = {  # hub ids whose configs are in ARCHITECTURES
    "stabilityai/stable-diffusion-3.5-medium",
    "black-forest-labs/FLUX.1-dev",
    "Qwen/Qwen-Image",
    "ByteDance-Seed/BAGEL-7B-MoT",
}

Parts = Mapping[str, int]  # bytes by what they are for


@dataclass(frozen=True)
class Work:
    """What an iteration does; ``evaluation_forwards`` is per evaluation."""

    images: int
    micro_batches: int
    rollout_forwards: int  # network evaluations of one image, guidance counted
    trained_forwards: int  # each with its backward pass
    reference_forwards: int
    updates: int
    evaluation_forwards: int


@dataclass(frozen=True)
class Footprint:
    """FLOPs of an iteration, and bytes by stage and part, of one rollout worker or learner rank.

    A worker or rank goes through its stages one after the other, so the largest one counts.
    """

    parameters: int
    trained_parameters: int
    rollout_flops: int  # KL reference and decoding included
    training_flops: int  # what activation checkpointing recomputes included
    rollout: Mapping[str, Parts]
    learner: Mapping[str, Parts]
    learner_host: int  # bytes of host memory per rank, of what offload_optimizer moves there
    encoders_known: bool  # else the stage "encoding" lacks the text encoders


def count_work(spec: TrainingSpec, held_out: int) -> Work:
    """Count an iteration of ``spec``, and an evaluation on ``held_out`` prompts."""
    sampling = spec.sampling
    passes = policy_class(spec.model.family).passes(sampling.guidance)
    stochastic = sampling.images * sampling.trained_steps * passes
    return Work(
        images=sampling.images,
        micro_batches=sampling.units,
        rollout_forwards=sampling.images * sampling.steps * passes,
        trained_forwards=stochastic * spec.objective.epochs,
        reference_forwards=stochastic if spec.objective.kl else 0,
        updates=spec.objective.updates * spec.objective.epochs,
        evaluation_forwards=held_out * spec.evaluation.steps * passes,
    )


def gpu_here() -> tuple[str, float] | None:
    """Name and GiB of this machine's first GPU."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return found.name, found.total_memory / 2**30


# --- configs


def find_configs(model: ModelSpec) -> dict[str, Any] | None:
    """The model's config files: of its folder or the hub cache, or as published; ``None`` if not
    known without a download. ``ModelError`` for a folder that lacks one, or holds nonsense."""
    names = policy_class(model.family).config_files
    paths = [_local_file(model, name) for name in names]
    found = [path for path in paths if path is not None]
    if len(found) == len(names):
        return {name: _read(model, path) for name, path in zip(names, found, strict=True)}
    if model.path not in PUBLISHED:
        return None
    return _read(model, ARCHITECTURES / f"{model.path.split('/')[1]}.json")


def _local_file(model: ModelSpec, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if model.folder is not None:
        return model.folder / name
    cached = try_to_load_from_cache(model.path, name, revision=model.revision)
    return Path(cached) if isinstance(cached, str) else None


def _read(model: ModelSpec, path: Path) -> dict[str, Any]:
    try:
        return parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path = {model.path!r}: {path} cannot be read: {error}. Copy the whole model "
            "folder"
        ) from error


def encoder_bytes(model: ModelSpec) -> int | None:
    """Of the text encoders' weights in ``encoder_dtype``; ``None`` if they are not on this disk."""
    if not policy_class(model.family).pipeline:
        return 0  # the network reads the prompts itself
    if model.folder is None:
        return None
    files = list(model.folder.glob("text_encoder*/*.safetensors"))
    dtype = DTYPES[model.encoder_dtype or model.dtype]
    return sum(_parameters_in(file) for file in files) * dtype.itemsize if files else None


def _parameters_in(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return sum(math.prod(tensors.get_slice(n).get_shape()) for n in tensors.keys())  # noqa: SIM118


# --- the model without weights


def skeleton(spec: TrainingSpec, configs: Configs) -> Policy:
    """The spec's tuned policy on the meta device."""
    model = spec.model.model_copy(update={"lora": None})  # its values make no difference here
    cls = policy_class(model.family)
    guidance, cpu = spec.sampling.guidance, torch.device("cpu")
    with torch.device("meta"):
        policy = cls(model, spec.tuning, guidance, cpu, frozenset())
        full = spec.tuning.kind == "full"
        policy.skeleton(configs, torch.float32 if full else policy.dtype)
        policy.tune(spec.seed, with_reference=False)
    return policy


def costs(spec: TrainingSpec, policy: Policy, configs: Configs) -> tuple[Cost, Cost, Cost]:
    """Of one ``velocity`` in sampling, of one with its backward pass, and of ``decode``.

    The first and last for a micro-batch of the training or evaluation, whichever is larger; the
    second for one of the training. ``policy`` is a skeleton, and afterwards has shapes.
    """
    learner, sampling = spec.cluster.learner, spec.sampling
    vae: nn.Module = policy.vae  # type: ignore[attr-defined]
    most = largest_batch(spec)
    with without_data(gpu=learner.gpus > 0):
        give_shapes(policy.network)
        give_shapes(vae)
        sampled = _velocity_cost(spec, policy, configs, most, backward=False)
        x = torch.empty(most, *policy.latent_shape(sampling.size))
        decoded = measure(lambda: _tensor(policy.decode(x)), vae, [x], backward=False)
        if learner.activation_checkpointing:
            network: Any = policy.network
            network.enable_gradient_checkpointing()
        trained = _velocity_cost(spec, policy, configs, sampling.micro_batch, backward=True)
    return sampled, trained, decoded


def _velocity_cost(
    spec: TrainingSpec, policy: Policy, configs: Configs, batch: int, *, backward: bool
) -> Cost:
    condition = policy.example_condition(batch, configs)
    x = torch.empty(batch, *policy.latent_shape(spec.sampling.size))
    inputs = [x, *condition.values()]

    def run() -> Cost:
        velocity = lambda: policy.velocity(x, 1.0, condition)  # noqa: E731
        return measure(velocity, policy.network, inputs, backward=backward)

    return scaled(run, policy.network, policy.block_classes())


def largest_batch(spec: TrainingSpec) -> int:
    """Images that a rollout worker samples at once, in training or evaluation."""
    return max(spec.sampling.micro_batch, spec.evaluation.micro_batch)


def _tensor(images: Any) -> Tensor:
    assert isinstance(images, Tensor)  # within ``without_data`` arrays are tensors
    return images


# --- who holds what


def estimate(spec: TrainingSpec) -> Footprint | None:
    """The footprint of ``spec``; ``None`` if its model's configs are not to be had."""
    configs = find_configs(spec.model)
    if configs is None:
        return None
    policy = skeleton(spec, configs)
    encoders = encoder_bytes(spec.model)
    sampled, trained, decoded = costs(spec, policy, configs)
    sampling = spec.sampling
    sampled_steps = sampling.steps + (sampling.trained_steps if spec.objective.kl else 0)
    per_image = (sampled.forward * sampled_steps + decoded.forward) / largest_batch(spec)
    trained_steps = sampling.trained_steps * spec.objective.epochs
    return Footprint(
        parameters=_numbers(policy.network.parameters()) - _adapters(policy),
        trained_parameters=_numbers(policy.trainable().values()),
        rollout_flops=round(sampling.images * per_image),
        training_flops=sampling.units * trained_steps * (trained.forward + trained.backward),
        rollout=rollout_parts(spec, policy, sampled, decoded, encoders or 0),
        learner=learner_parts(spec, policy, trained),
        learner_host=moved_bytes(spec, policy) if spec.cluster.learner.offload_optimizer else 0,
        encoders_known=encoders is not None,
    )


def rollout_parts(
    spec: TrainingSpec, policy: Policy, sampled: Cost, decoded: Cost, encoders: int
) -> dict[str, Parts]:
    """Bytes in one rollout worker, by stage."""
    vae: nn.Module = policy.vae  # type: ignore[attr-defined]
    buffers = list(policy.network.buffers())
    copied = spec.tuning.kind == "full" and spec.objective.kl is not None
    held = {
        "weights": _bytes([*policy.network.parameters(), *buffers]),
        "frozen copy for the KL": _bytes([*policy.trainable().values(), *buffers]) if copied else 0,
        "autoencoder": _bytes([*vae.parameters(), *vae.buffers()]),
    }
    reserved = {"reserved": RESERVED if spec.cluster.rollout.gpus else 0}
    latents = 2 * latent_bytes(spec, policy)  # as a list of steps, and stacked
    return {
        "encoding": held | {"text encoders": encoders} | reserved,
        "sampling": held | {"activations": sampled.peak, "latents": latents} | reserved,
        "decoding": held | {"activations": decoded.peak} | reserved,
    }


def learner_parts(spec: TrainingSpec, policy: Policy, trained: Cost) -> dict[str, Parts]:
    """Bytes in one learner rank, by stage."""
    held = learner_state(spec, policy)
    kinds = policy.block_classes()
    blocks = [block for block in policy.network.modules() if isinstance(block, kinds)]
    sizes = [_bytes(block.parameters()) for block in blocks]
    gradients = [_bytes(p for p in block.parameters() if p.requires_grad) for block in blocks]
    parameters = list(policy.network.parameters())
    trainable = list(policy.trainable().values())
    outside = _bytes(parameters) - sum(sizes)
    reserved = {"reserved": RESERVED if spec.cluster.learner.gpus else 0}
    sharded = shards(spec) > 1
    update = {
        "gathered weights": outside + GATHERED_BLOCKS * max(sizes) if sharded else 0,
        # FSDP packs a block's gradients anew to send them; replicas get those of every rank.
        "gathered gradients": _bytes(trainable) - sum(gradients) + 2 * max(gradients)
        if sharded
        else _added_up(trainable, spec.ranks.count),
        "activations": trained.peak,
        "latents": latent_bytes(spec, policy),
    }
    without = {part: size for part, size in held.items() if part != "gradients"}
    return {
        "loading": {"weights": _bytes([*parameters, *policy.network.buffers()])} | reserved,
        "update": held | update | reserved,
        "publishing": without | {"gathered weights": max(map(_size, trainable))} | reserved,
    }


def shards(spec: TrainingSpec) -> int:
    """That the network is cut into."""
    return asked_for(spec, spec.ranks.count).shards


def learner_state(spec: TrainingSpec, policy: Policy) -> dict[str, int]:
    """Bytes that a rank holds from its first update on, on its device."""
    ranks = shards(spec)
    trainable = list(policy.trainable().values())
    moved = spec.cluster.learner.offload_optimizer
    return {
        "weights": _shard(policy.network.parameters(), ranks) + _bytes(policy.network.buffers()),
        "gradients": _shard(trainable, ranks),
        "optimizer": 0 if moved else len(MOMENTS) * _shard(trainable, ranks),
        "averages": 0 if moved or not spec.ema else _shard(trainable, ranks),
    }


def moved_bytes(spec: TrainingSpec, policy: Policy) -> int:
    """Of a rank's moments and averages, which ``offload_optimizer`` moves to the host."""
    copies = len(MOMENTS) + (1 if spec.ema else 0)
    ranks = shards(spec)
    return copies * _shard(policy.trainable().values(), ranks)


def latent_bytes(spec: TrainingSpec, policy: Policy) -> int:
    """Of a micro-batch's trajectory in float32: latents, and the means that its objective needs."""
    sampling = spec.sampling
    steps = sampling.trained_steps
    means = spec.objective.compares_means + (spec.objective.kl is not None)
    kept = steps + 1 + steps * means
    size = math.prod(policy.latent_shape(sampling.size))
    return sampling.micro_batch * kept * size * FLOAT32_BYTES


def _added_up(tensors: Iterable[Tensor], ranks: int) -> int:
    """Bytes that ``add_up`` takes: all gradients in one, and a piece of each rank's."""
    numbers = _numbers(tensors) if ranks > 1 else 0
    return (numbers + ranks * min(numbers, PIECE)) * FLOAT32_BYTES


def _shard(tensors: Iterable[Tensor], ranks: int) -> int:
    """Bytes of the largest shard: FSDP2 cuts along the first dimension, rounding up."""
    return sum(-(-len(t) // ranks) * t.numel() // len(t) * t.itemsize for t in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(map(_size, tensors))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _adapters(policy: Policy) -> int:
    return _numbers(policy.trainable().values()) if policy.tuning.kind == "lora" else 0
