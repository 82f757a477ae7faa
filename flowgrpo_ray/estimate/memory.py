"""Which bytes each process of a run holds, stage by stage, given what its network costs.

A process goes through its stages one after the other, so the largest one counts.
docs/plan.md has the assumptions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from flowgrpo_ray.algorithm.optimizer import MOMENTS
from flowgrpo_ray.algorithm.parallel import PIECE
from flowgrpo_ray.common.types import Parallel
from flowgrpo_ray.estimate.dry_run import Cost
from flowgrpo_ray.policies.base import DTYPES, Policy
from flowgrpo_ray.policies.kernels import cast_by_autocast
from flowgrpo_ray.rewards import resolve
from flowgrpo_ray.rewards.loading import ModelSize
from flowgrpo_ray.spec.sections import RewardSpec
from flowgrpo_ray.spec.training import TrainingSpec

FLOAT32_BYTES = 4
GATHERED_BLOCKS = 2  # whole at once under FSDP: the one at work, and the next that is prefetched
RESERVED = 2 * 2**30  # bytes of a GPU for CUDA's context, kernels' workspaces and fragmentation
START = "start"  # the stage in which text encoders are there, and nothing else
ENCODING = "encoding more prompts"  # of a set larger than prompts.encode_ahead, between iterations

Parts = Mapping[str, int]  # bytes by what they are for
Stages = Mapping[str, Parts]


class Costs(NamedTuple):
    """What the spec's network costs."""

    sampled: Cost  # a velocity without gradient, of a micro-batch of training
    evaluated: Cost  # and of one of an evaluation
    decoded: Cost  # a slice of images
    trained: Cost  # a velocity with its backward pass
    in_shards: Cost  # the same with the weights that shards are gathered into


def actor_stages(
    spec: TrainingSpec, policy: Policy, costs: Costs, encoders: int, parallel: Parallel
) -> dict[str, Stages]:
    """Bytes of one process of each section of ``cluster``; ``encoders`` are those of their
    weights."""
    reserved = {"reserved": RESERVED if spec.ranks.gpus else 0}
    reading = {"text encoders": encoders}
    start: Stages = {START: reading}
    beside = _beside_the_network(spec, policy)
    state, network = learner_state(spec, policy, parallel), _whole_network(policy)
    saved, copy = _saved_by_halves(policy), "frozen copy of the base model"
    sampled = {"weights": network["weights"] - saved, **beside}
    sampled[copy] -= saved if sampled[copy] else 0
    loading = _loaded_by_blocks(policy, parallel) if parallel.sharded else network
    training = _training(spec, policy, costs, state, parallel)
    if spec.cluster.layout == "colocated":
        held = {**state, **beside, "gathered weights": _gathered_weights(policy, parallel)}
        idle = held if spec.advantages.std == "group" else {**held, "gradients": 0}
        found: dict[str, Stages] = {
            "workers": {
                **start,
                "loading": {**loading, **beside},
                ENCODING: {**idle, **reading},
                **_sampling(spec, policy, costs, idle),
                **{stage: {**beside, **parts} for stage, parts in training.items()},
            }
        }
    else:
        largest = max(map(_size, policy.trainable().values()))
        found = {
            "rollout": {
                **start,
                "loading": sampled,
                ENCODING: {**sampled, **reading},
                **_sampling(spec, policy, costs, sampled),
            },
            "learner": {
                "loading": loading,
                **training,
                "publishing": {**state, "gradients": 0, "gathered weights": largest},
            },
        }
    return {
        section: {stage: {**parts, **reserved} for stage, parts in stages.items()}
        for section, stages in found.items()
    }


def _whole_network(policy: Policy) -> Parts:
    return {"weights": _bytes([*policy.network.parameters(), *policy.network.buffers()])}


def _saved_by_halves(policy: Policy) -> int:
    """Bytes that a rollout worker saves, which has no masters of full tuning."""
    halved = policy.halved(policy.network)
    weights = (policy.network.get_parameter(name) for name in halved)
    return sum(w.numel() * (w.itemsize - policy.dtype.itemsize) for w in weights)


def _beside_the_network(spec: TrainingSpec, policy: Policy) -> Parts:
    """What sampling needs as well."""
    vae: nn.Module = policy.vae  # type: ignore[attr-defined]
    copied = spec.tuning.kind == "full" and spec.objective.compares_reference
    frozen = [*policy.trainable().values(), *policy.network.buffers()] if copied else []
    return {
        "frozen copy of the base model": _bytes(frozen),
        "autoencoder": _bytes([*vae.parameters(), *vae.buffers()]),
    }


def _sampling(spec: TrainingSpec, policy: Policy, costs: Costs, held: Parts) -> Stages:
    latents = 2 * latent_bytes(spec, policy)  # as a list of steps, and stacked
    evaluated = max(costs.evaluated.peak, costs.decoded.peak)
    return {
        "sampling": {**held, "activations": costs.sampled.peak, "latents": latents},
        "decoding": {**held, "activations": costs.decoded.peak},
        "evaluation": {**held, "activations": evaluated},
    }


def _training(
    spec: TrainingSpec, policy: Policy, costs: Costs, held: Parts, parallel: Parallel
) -> Stages:
    gathered = _gathered_weights(policy, parallel)
    sends, receives = _gradients(policy, parallel)
    training = {
        "gathered weights": gathered,
        "gathered gradients": sends,
        "activations": (costs.in_shards if parallel.sharded else costs.trained).peak,
        "latents": latent_bytes(spec, policy),
    }
    kept = gathered if parallel.keep_weights else 0
    update = {**held, "gathered weights": kept, "gathered gradients": receives}
    return {"training": {**held, **training}, "update": update}


# --- of the learner


def learner_state(spec: TrainingSpec, policy: Policy, parallel: Parallel) -> dict[str, int]:
    """Bytes that a rank holds from its first update on, on its device."""
    ranks = parallel.shards
    trainable = list(policy.trainable().values())
    moved = spec.cluster.learner.offload_optimizer
    return {
        "weights": _shard(policy.network.parameters(), ranks) + _bytes(policy.network.buffers()),
        "gradients": _shard(trainable, ranks),
        "optimizer": 0 if moved else len(MOMENTS) * _shard(trainable, ranks),
        "averages": 0 if moved else averages(spec) * _shard(trainable, ranks),
    }


def averages(spec: TrainingSpec) -> int:
    """Sets of weights that follow the trained ones."""
    return (spec.ema is not None) + (spec.objective.follower is not None)


def moved_bytes(spec: TrainingSpec, policy: Policy, parallel: Parallel) -> int:
    """Of a rank's moments and averages, which ``offload_optimizer`` moves to the host."""
    copies = len(MOMENTS) + averages(spec)
    return copies * _shard(policy.trainable().values(), parallel.shards)


def latent_bytes(spec: TrainingSpec, policy: Policy) -> int:
    """Of a micro-batch's trajectory in float32: latents, and predictions that its objective
    needs."""
    sampling = spec.sampling
    predictions = spec.objective.keeps_old + spec.objective.compares_reference
    kept = sampling.trained_steps + 1 + spec.points * predictions
    size = math.prod(policy.latent_shape(sampling.size))
    return sampling.micro_batch * kept * size * FLOAT32_BYTES


def _groups(policy: Policy) -> list[list[nn.Parameter]]:
    """Parameters that are gathered together: those of each block, then those outside."""
    blocks = [list(block.parameters()) for block in policy.blocks_of(policy.network)]
    inside = {id(parameter) for block in blocks for parameter in block}
    return [*blocks, [p for p in policy.network.parameters() if id(p) not in inside]]


def _loaded_by_blocks(policy: Policy, parallel: Parallel) -> Parts:
    """Shards of what is there, and beside them whole what is being cut."""
    held = most = 0
    for group in _groups(policy):
        held += _shard(group, parallel.shards)
        most = max(most, held + _bytes(group))
    return {"weights": most + _bytes(policy.network.buffers())}


def _gathered_weights(policy: Policy, parallel: Parallel) -> int:
    """Whole at once of a sharded network, each weight in the dtype that it is gathered in."""
    if not parallel.sharded:
        return 0
    cast = cast_by_autocast(policy.network)
    sizes = [
        sum(p.numel() * (policy.dtype if id(p) in cast else p.dtype).itemsize for p in group)
        for group in _groups(policy)
    ]
    if parallel.keep_weights:
        return sum(sizes) + max(sizes)  # as they come, in one piece for each block
    return sizes[-1] + GATHERED_BLOCKS * max(sizes[:-1])


def _gradients(policy: Policy, parallel: Parallel) -> tuple[int, int]:
    """Bytes of gradients beside a rank's own: while it trains, and when an update adds them up.

    FSDP packs a block's gradients anew to send them.
    """
    trainable = list(policy.trainable().values())
    if not parallel.sharded:
        return 0, _added_up(trainable, parallel.ranks)
    *blocks, outside = (_bytes(p for p in group if p.requires_grad) for group in _groups(policy))
    if parallel.keep_gradients:
        return _bytes(trainable), _bytes(trainable) + max(*blocks, outside)
    return outside + 2 * max(blocks), 0


def _added_up(tensors: Iterable[Tensor], ranks: int) -> int:
    """Bytes that ``add_up`` takes: all gradients in one, and a piece of each rank's."""
    numbers = numbers_in(tensors) if ranks > 1 else 0
    return (numbers + ranks * min(numbers, PIECE)) * FLOAT32_BYTES


def _shard(tensors: Iterable[Tensor], ranks: int) -> int:
    """Bytes of the largest shard: FSDP2 cuts along the first dimension, rounding up."""
    return sum(-(-len(t) // ranks) * t.numel() // len(t) * t.itemsize for t in tensors)


# --- of rewards


def reward_parts(name: str, reward: RewardSpec) -> Parts | None:
    """Bytes of a replica on a GPU, of the published model; ``None`` if its size is not known."""
    if not reward.gpus:
        return {}
    cls = resolve(reward.reward or name)
    size: ModelSize | None = getattr(cls, "SIZE", None)
    if size is None:
        return None
    defaults = {n: p.default for n, p in inspect.signature(cls).parameters.items()}
    options = {"dtype": "float32", "batch": 1} | defaults | reward.options
    itemsize = DTYPES[options["dtype"]].itemsize
    images = options["batch"] * size.image_bytes * itemsize // FLOAT32_BYTES
    return {
        "weights": size.parameters * itemsize,
        "activations": images,
        "reserved": RESERVED,
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(map(_size, tensors))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def numbers_in(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)
