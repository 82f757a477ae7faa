"""What a spec's model costs: parameters, FLOPs, the memory of every process and of other layouts.

The network is built from its config files without weights and run on shapes alone (``dry_run``),
through the policy's own ``velocity`` and ``decode``, so no model needs a formula of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.common.types import Parallel
from flowgrpo_ray.estimate.dry_run import Cost, give_shapes, measure, scaled, without_data
from flowgrpo_ray.estimate.layouts import Layout, compare
from flowgrpo_ray.estimate.memory import (
    ENCODING,
    Costs,
    Parts,
    Stages,
    actor_stages,
    moved_bytes,
    numbers_in,
    reward_parts,
)
from flowgrpo_ray.estimate.parallel import choose, presumed_nodes, unmeasured, ways
from flowgrpo_ray.estimate.published import ARCHITECTURES, PUBLISHED
from flowgrpo_ray.policies import policy_class
from flowgrpo_ray.policies.base import DTYPES, Configs, Policy
from flowgrpo_ray.policies.kernels import cast_by_autocast
from flowgrpo_ray.spec.sections import ModelSpec
from flowgrpo_ray.spec.training import TrainingSpec


@dataclass(frozen=True)
class Work:
    """What an iteration does; ``evaluation_forwards`` is per evaluation."""

    images: int
    micro_batches: int
    rollout_forwards: int  # network evaluations of one image, guidance counted
    trained_forwards: int  # each with its backward pass
    reference_forwards: int  # by which an objective compares: the untrained model's and others
    updates: int
    evaluation_forwards: int


@dataclass(frozen=True)
class Footprint:
    """FLOPs of an iteration, and bytes by stage and part of the processes that share them."""

    parameters: int
    trained_parameters: int
    rollout_flops: int  # KL reference and decoding included
    training_flops: int  # what activation checkpointing recomputes included
    actors: Mapping[str, Stages]  # of one process of each section of ``cluster``
    rewards: Mapping[str, Parts | None]  # of a replica on a GPU; None: not known
    host: int  # bytes of host memory per learner rank, of what offload_optimizer moves there
    parallel: Parallel  # how those that train hold the network
    encoders_known: bool  # else the stage "start" lacks the text encoders
    layouts: Sequence[Layout]  # other ways to use as many GPUs; none if there are none


def count_work(spec: TrainingSpec, held_out: int) -> Work:
    """Count an iteration of ``spec``, and an evaluation on ``held_out`` prompts."""
    sampling = spec.sampling
    passes = policy_class(spec.model.family).passes(sampling.guidance)
    trained = sampling.images * spec.points * passes
    beside = spec.objective.forwards(sampling.trained_steps)
    return Work(
        images=sampling.images,
        micro_batches=sampling.units,
        rollout_forwards=sampling.images * sampling.steps * passes,
        trained_forwards=trained * spec.objective.epochs,
        reference_forwards=sampling.images * beside * passes,
        updates=spec.objective.updates * spec.objective.epochs,
        evaluation_forwards=held_out * spec.evaluation.steps * passes,
    )


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
    """Of the text encoders' weights in ``encoder_dtype``; ``None`` if neither published nor on this
    disk."""
    if not policy_class(model.family).pipeline:
        return 0  # the network reads the prompts itself
    if model.folder is None:
        count = PUBLISHED.get(model.path)
    else:
        files = model.folder.glob("text_encoder*/*.safetensors")
        count = sum(map(_parameters_in, files)) or None
    return count and count * DTYPES[model.encoder_dtype or model.dtype].itemsize


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


def costs(spec: TrainingSpec, policy: Policy, configs: Configs, sources: int) -> Costs:
    """Of one ``velocity`` in sampling, evaluation and training, and of a decoded slice, where each
    prompt changes so many images.

    ``policy`` is a skeleton, and afterwards has shapes.
    """

    def velocity_cost(of: Policy, batch: int, *, backward: bool) -> Cost:
        size = spec.sampling.size
        if sources:
            condition = of.example_edit(batch, configs, sources, size)
        else:
            condition = of.example_condition(batch, configs)
        x = torch.empty(batch, *of.latent_shape(size))
        inputs = [x, *condition.values()]

        def run() -> Cost:
            velocity = lambda: of.velocity(x, 1.0, condition)  # noqa: E731
            return measure(velocity, of.network, inputs, backward=backward)

        return scaled(run, of.network, of.block_classes())

    batch, other = spec.sampling.micro_batch, spec.evaluation.micro_batch
    vae: nn.Module = policy.vae  # type: ignore[attr-defined]
    with without_data(gpu=spec.ranks.gpus > 0):
        give_shapes(policy.network)
        give_shapes(vae)
        sampled = evaluated = velocity_cost(policy, batch, backward=False)
        if other != batch:
            evaluated = velocity_cost(policy, other, backward=False)
        x = torch.empty(decoded_at_once(spec, policy), *policy.latent_shape(spec.sampling.size))
        decoded = measure(lambda: _tensor(policy.decode(x)), vae, [x], backward=False)
        if spec.cluster.learner.activation_checkpointing:
            policy.checkpoint_activations()
        trained = velocity_cost(policy, batch, backward=True)
    in_shards = trained
    if (
        max(spec.ranks.count, spec.gpus) > 1
        and policy.dtype != torch.float32
        and spec.tuning.kind == "full"
    ):
        gathered = _gathered(spec, configs)
        with without_data(gpu=spec.ranks.gpus > 0):
            give_shapes(gathered.network)
            if spec.cluster.learner.activation_checkpointing:
                gathered.checkpoint_activations()
            in_shards = velocity_cost(gathered, batch, backward=True)
    return Costs(sampled, evaluated, decoded, trained, in_shards)


def _gathered(spec: TrainingSpec, configs: Configs) -> Policy:
    """A skeleton whose masters are gathered in half precision, of which autocast then needs no
    copies."""
    policy = skeleton(spec, configs)
    cast = cast_by_autocast(policy.network)
    for parameter in policy.network.parameters():
        if id(parameter) in cast:
            parameter.data = parameter.data.to(policy.dtype)
    return policy


def decoded_at_once(spec: TrainingSpec, policy: Policy) -> int:
    """Images of the largest slice."""
    most = max(spec.sampling.micro_batch, spec.evaluation.micro_batch)
    return policy.decoded_at_once(most, spec.sampling.size)


def _tensor(images: Any) -> Tensor:
    assert isinstance(images, Tensor)  # within ``without_data`` arrays are tensors
    return images


# --- the whole


@dataclass(frozen=True)
class Sized:
    """The network of a spec and what it costs, whichever way it is shared out."""

    policy: Policy  # with shapes alone
    cost: Costs
    encoders: int | None  # bytes, if known
    rewards: Mapping[str, Parts | None]
    memory: float | None  # bytes of a GPU
    encodes_later: bool  # not all prompts at the start

    def on(
        self, spec: TrainingSpec, nodes: Sequence[object]
    ) -> tuple[Parallel, Mapping[str, Stages]]:
        """How ranks of ``spec``, or of it in another layout, hold the network on these machines,
        and the stages of each process."""

        def stages(way: Parallel) -> Mapping[str, Stages]:
            found = actor_stages(spec, self.policy, self.cost, self.encoders or 0, way)
            left_out = () if self.encodes_later else (ENCODING,)
            return {
                section: {stage: parts for stage, parts in of.items() if stage not in left_out}
                for section, of in found.items()
            }

        way = choose(spec, nodes, self.memory, stages, self.rewards)
        return way, stages(way)


def size_up(
    spec: TrainingSpec,
    memory: float | None,
    prompts: int | None = None,
    sources: int | None = None,
) -> Sized | None:
    """For GPUs of ``memory`` bytes and a training set of so many ``prompts``, each with so many
    ``sources``, if these are known; ``None`` if the model's configs are not to be had."""
    configs = find_configs(spec.model)
    if configs is None:
        return None
    policy = skeleton(spec, configs)
    least = policy.sources.start
    cost = costs(spec, policy, configs, least if sources is None else sources)
    encoders = encoder_bytes(spec.model)
    if encoders is not None and policy.sources.stop > 1:  # the autoencoder is with them
        encoders += sum(p.nbytes for p in policy.vae.parameters())  # type: ignore[attr-defined]
    rewards = {name: reward_parts(name, reward) for name, reward in spec.rewards.items()}
    encodes_later = prompts is None or prompts > spec.prompts.encode_ahead
    return Sized(policy, cost, encoders, rewards, memory, encodes_later)


def decide(
    spec: TrainingSpec,
    places: Sequence[tuple[object, float | None]],
    prompts: int | None = None,
    sources: int | None = None,
) -> Parallel:
    """How ranks hold the network that are at these ``places``: machine, and bytes of their GPU.

    For a training set as ``estimate`` has it, which so decides alike."""
    nodes, memory = [node for node, _ in places], [size for _, size in places if size]
    if not memory or len(ways(spec, nodes)) == 1:
        return ways(spec, nodes)[0]
    sized = size_up(spec, min(memory), prompts, sources)
    return sized.on(spec, nodes)[0] if sized else unmeasured(spec, nodes)


def estimate(
    spec: TrainingSpec,
    memory: float | None = None,
    prompts: int | None = None,
    sources: int | None = None,
) -> Footprint | None:
    """The footprint of ``spec`` on GPUs of ``memory`` bytes, its ranks on as few machines as there
    may be, for a training set of ``prompts`` (default: a large one), each with so many ``sources``
    (default: as few as the family takes); ``None`` if its model's configs are not to be had."""
    sized = size_up(spec, memory, prompts, sources)
    if sized is None:
        return None
    policy, cost, rewards = sized.policy, sized.cost, sized.rewards
    sampling, trained = spec.sampling, cost.trained
    sampled_steps = sampling.steps + spec.objective.forwards(sampling.trained_steps)
    per_image = cost.sampled.forward * sampled_steps / sampling.micro_batch
    per_image += cost.decoded.forward / decoded_at_once(spec, policy)
    trained_steps = spec.points * spec.objective.epochs
    flops = (
        round(sampling.images * per_image),
        sampling.units * trained_steps * (trained.forward + trained.backward),
    )
    parallel, actors = sized.on(spec, presumed_nodes(spec))
    return Footprint(
        parameters=numbers_in(policy.network.parameters()) - _adapters(policy),
        trained_parameters=numbers_in(policy.trainable().values()),
        rollout_flops=flops[0],
        training_flops=flops[1],
        actors=actors,
        rewards=rewards,
        host=moved_bytes(spec, policy, parallel) if spec.cluster.learner.offload_optimizer else 0,
        parallel=parallel,
        encoders_known=sized.encoders is not None,
        layouts=compare(spec, flops, lambda of: sized.on(of, presumed_nodes(of))[1], rewards),
    )


def _adapters(policy: Policy) -> int:
    return numbers_in(policy.trainable().values()) if policy.tuning.kind == "lora" else 0
