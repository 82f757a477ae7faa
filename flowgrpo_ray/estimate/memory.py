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
from flowgrpo_ray.algorithm.parallel import PIECE, asked_for
from flowgrpo_ray.estimate.dry_run import Cost
from flowgrpo_ray.policies.base import DTYPES, Policy
from flowgrpo_ray.rewards import resolve
from flowgrpo_ray.rewards.loading import ModelSize
from flowgrpo_ray.spec.sections import RewardSpec
from flowgrpo_ray.spec.training import TrainingSpec

FLOAT32_BYTES = 4
GATHERED_BLOCKS = 2  # whole at once under FSDP: the one at work, and the next that is prefetched
RESERVED = 2 * 2**30  # bytes of a GPU for CUDA's context, kernels' workspaces and fragmentation
START = "start"  # the stage in which text encoders are there, and nothing else

Parts = Mapping[str, int]  # bytes by what they are for
Stages = Mapping[str, Parts]


class Costs(NamedTuple):
    """What the spec's network costs."""

    sampled: Cost  # a velocity without gradient, of a micro-batch of training
    evaluated: Cost  # and of one of an evaluation
    decoded: Cost  # a slice of images
    trained: Cost  # a velocity with its backward pass


def actor_stages(
    spec: TrainingSpec, policy: Policy, costs: Costs, encoders: int
) -> dict[str, Stages]:
    """Bytes of one process of each section of ``cluster``; ``encoders`` are those of their
    weights."""
    reserved = {"reserved": RESERVED if spec.ranks.gpus else 0}
    start: Stages = {START: {"text encoders": encoders}}
    beside = _beside_the_network(spec, policy)
    state, network = learner_state(spec, policy), _whole_network(policy)
    if spec.cluster.layout == "colocated":
        held = {**state, **beside, "gathered weights": _gathered_weights(spec, policy)}
        idle = held if spec.advantages.std == "group" else {**held, "gradients": 0}
        found: dict[str, Stages] = {
            "workers": {
                **start,
                "loading": {**network, **beside},
                **_sampling(spec, policy, costs, idle),
                **_training(spec, policy, costs, held),
            }
        }
    else:
        largest = max(map(_size, policy.trainable().values()))
        found = {
            "rollout": {
                **start,
                "loading": {**network, **beside},
                **_sampling(spec, policy, costs, {**network, **beside}),
            },
            "learner": {
                "loading": network,
                **_training(spec, policy, costs, state),
                "publishing": {**state, "gradients": 0, "gathered weights": largest},
            },
        }
    return {
        section: {stage: {**parts, **reserved} for stage, parts in stages.items()}
        for section, stages in found.items()
    }


def _whole_network(policy: Policy) -> Parts:
    return {"weights": _bytes([*policy.network.parameters(), *policy.network.buffers()])}


def _beside_the_network(spec: TrainingSpec, policy: Policy) -> Parts:
    """What sampling needs as well."""
    vae: nn.Module = policy.vae  # type: ignore[attr-defined]
    copied = spec.tuning.kind == "full" and spec.objective.kl is not None
    frozen = [*policy.trainable().values(), *policy.network.buffers()] if copied else []
    return {
        "frozen copy for the KL": _bytes(frozen),
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


def _training(spec: TrainingSpec, policy: Policy, costs: Costs, held: Parts) -> Stages:
    trainable = list(policy.trainable().values())
    sharded = shards(spec) > 1
    training = {
        "gathered weights": _gathered_weights(spec, policy),
        "gathered gradients": _gathered_gradients(policy) if sharded else 0,
        "activations": costs.trained.peak,
        "latents": latent_bytes(spec, policy),
    }
    added_up = 0 if sharded else _added_up(trainable, spec.ranks.count)
    update = {**held, "gathered weights": 0, "gathered gradients": added_up}
    return {"training": {**held, **training}, "update": update}


# --- of the learner


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


def _blocks(policy: Policy) -> list[nn.Module]:
    kinds = policy.block_classes()
    return [block for block in policy.network.modules() if isinstance(block, kinds)]


def _gathered_weights(spec: TrainingSpec, policy: Policy) -> int:
    """Whole at once of a sharded network."""
    if shards(spec) == 1:
        return 0
    sizes = [_bytes(block.parameters()) for block in _blocks(policy)]
    outside = _bytes(policy.network.parameters()) - sum(sizes)
    return outside + GATHERED_BLOCKS * max(sizes)


def _gathered_gradients(policy: Policy) -> int:
    """FSDP packs a block's gradients anew to send them."""
    gradients = [
        _bytes(p for p in block.parameters() if p.requires_grad) for block in _blocks(policy)
    ]
    return _bytes(policy.trainable().values()) - sum(gradients) + 2 * max(gradients)


def _added_up(tensors: Iterable[Tensor], ranks: int) -> int:
    """Bytes that ``add_up`` takes: all gradients in one, and a piece of each rank's."""
    numbers = _numbers(tensors) if ranks > 1 else 0
    return (numbers + ranks * min(numbers, PIECE)) * FLOAT32_BYTES


def _shard(tensors: Iterable[Tensor], ranks: int) -> int:
    """Bytes of the largest shard: FSDP2 cuts along the first dimension, rounding up."""
    return sum(-(-len(t) // ranks) * t.numel() // len(t) * t.itemsize for t in tensors)


# --- of rewards


def reward_parts(name: str, reward: RewardSpec) -> Parts | None:
    """Bytes of a replica on a GPU, of the published model; ``None`` if its size is not known."""
    if not reward.gpus or reward.options.get("device") == "cpu":
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


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)
