"""The estimate against the real thing: tiny models that are built, run and trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from estimates import costs_once
from tiny_models import EDITING, MODELS, conditions_of, encoded, model_folder
from tiny_runs import (
    CPU,
    FULL,
    LORA,
    PROMPTS,
    TUNINGS,
    alone,
    conditions,
    draw_batches,
    kept,
    one_thread,
    small_spec,
)
from torch import Tensor, nn

from flowgrpo_ray.algorithm.learner import Learner
from flowgrpo_ray.algorithm.sampling import batch_condition
from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.types import Parallel
from flowgrpo_ray.estimate import footprint, memory
from flowgrpo_ray.estimate.dry_run import Cost, measure
from flowgrpo_ray.estimate.gpus import gpus
from flowgrpo_ray.estimate.layouts import recommended
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.policies.kernels import cast_by_autocast
from flowgrpo_ray.rewards.clipscore import ClipScoreReward
from flowgrpo_ray.rewards.pickscore import PickScoreReward
from flowgrpo_ray.spec.file import load_spec, recipe_names
from flowgrpo_ray.spec.training import TrainingSpec

GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def configs_of(spec: TrainingSpec) -> dict[str, Any]:
    found = footprint.find_configs(spec.model)
    assert found is not None
    return found


def skeleton(spec: TrainingSpec) -> Policy:
    return footprint.skeleton(spec, configs_of(spec))


def tuned(spec: TrainingSpec) -> Policy:
    policy = load_policy(spec, CPU, frozenset({"network", "decoder"}))
    policy.tune(spec.seed, with_reference=False)
    return policy


def shapes(module: nn.Module) -> dict[str, Any]:
    return {n: (tuple(p.shape), p.dtype, p.requires_grad) for n, p in module.named_parameters()}


# --- the model without weights


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("family", MODELS)
def test_a_skeleton_has_the_parameters_of_the_model(family: str, tuning: str):
    targets = {"full": FULL, "lora": "tuning={kind: lora, rank: 2, alpha: 4}"}
    spec = MODELS[family].spec(model_folder(family), targets[tuning], "model.dtype=bfloat16")
    made, real = skeleton(spec), tuned(spec)
    assert shapes(made.network) == shapes(real.network)
    assert {p.device.type for p in made.network.parameters()} == {"meta"}
    assert made.latent_shape(spec.sampling.size) == real.latent_shape(spec.sampling.size)
    if tuning == "lora":  # counted by hand: rank x (in + out) of each adapted layer
        adapted = [m for m in real.network.modules() if hasattr(m, "lora_A")]
        by_hand = sum(2 * (m.in_features + m.out_features) for m in adapted)  # type: ignore[operator]
        assert sum(p.numel() for p in made.trainable().values()) == by_hand


@pytest.mark.parametrize("family", MODELS)
def test_an_example_condition_is_shaped_as_encoded_prompts_are(family: str):
    """Of the longest prompts: real ones may have fewer tokens where the model pads."""
    model = MODELS[family]
    spec = model.spec(model_folder(family), f"sampling.guidance={model.guidances[-1]}")
    encoder = load_policy(spec, CPU, frozenset({"encoder"}))
    real = encoder.collate(encoded(encoder, PROMPTS))
    policy, given = skeleton(spec), (len(PROMPTS), configs_of(spec))
    if model.sources:
        made = policy.example_edit(*given, model.sources, model.size)
    else:
        made = policy.example_condition(*given)
    assert made.keys() >= real.keys()
    for name, tensor in real.items():
        found = made[name]
        assert (found.dtype, found.ndim) == (tensor.dtype, tensor.ndim), name
        differing = [i for i, n in enumerate(tensor.shape) if found.shape[i] != n]
        assert not differing or (differing == [1] and found.shape[1] > tensor.shape[1]), name


# --- FLOPs and bytes of a run


def velocity_cost(spec: TrainingSpec, policy: Policy, *, backward: bool) -> Cost:
    drawn = batch_condition(policy, conditions(spec.sampling.guidance), (0, 0, 1, 1))
    condition = {name: tensor.to(policy.encoder_dtype) for name, tensor in drawn.items()}
    x = torch.zeros(4, *policy.latent_shape(spec.sampling.size))
    return measure(
        lambda: policy.velocity(x, 0.6, condition),
        policy.network,
        [x, *condition.values()],
        backward=backward,
    )


@pytest.mark.parametrize(
    ("tuning", "dtype", "checkpointing"),
    [
        *(("full", "float32", False), ("lora", "bfloat16", True)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(TUNINGS, ("float32", "bfloat16"), (False, True))
            if case not in (("full", "float32", False), ("lora", "bfloat16", True))
        ),
    ],
)
def test_shapes_alone_cost_what_the_model_costs(tuning: str, dtype: str, checkpointing: bool):
    """Bit for bit, FLOPs and bytes: sampling, an update and the decoder, run on real tensors."""
    spec = small_spec(
        *(TUNINGS[tuning], f"model.dtype={dtype}", "sampling.guidance=3"),
        f"cluster.learner.activation_checkpointing={str(checkpointing).lower()}",
        "cluster.learner.count=2",
    )
    cost = footprint.costs(spec, skeleton(spec), configs_of(spec), 0)
    sampled, evaluated, decoded, trained, in_shards = cost
    real = tuned(spec)
    assert velocity_cost(spec, real, backward=False) == sampled == evaluated
    if checkpointing:
        real.network.enable_gradient_checkpointing()  # type: ignore[operator]
    assert velocity_cost(spec, real, backward=True) == trained
    x = torch.zeros(4, *real.latent_shape(spec.sampling.size))
    vae: nn.Module = real.vae  # type: ignore[attr-defined]
    images = measure(lambda: torch.from_numpy(real.decode(x)), vae, [x], backward=False)
    assert images._replace(kept=0) == decoded._replace(kept=0)
    cast = cast_by_autocast(real.network) if tuning == "full" else set()
    for parameter in real.network.parameters():  # as shards are gathered
        if id(parameter) in cast:
            parameter.data = parameter.data.to(real.dtype)
    assert velocity_cost(spec, real, backward=True) == in_shards
    assert (in_shards.peak < trained.peak) == (tuning == "full" and dtype == "bfloat16")


@pytest.mark.parametrize("tuning", TUNINGS)
def test_bytes_kept_are_those_that_autograd_saves(tuning: str):
    """Storages that saved_tensors_hooks sees, without parameters and inputs, and the result's."""
    spec = small_spec(TUNINGS[tuning])
    policy = tuned(spec)
    condition = batch_condition(policy, conditions(), (0, 0, 1, 1))
    x = torch.zeros(4, *policy.latent_shape(spec.sampling.size))
    saved: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = policy.velocity(x, 0.6, condition)
    before = [*policy.network.parameters(), *policy.network.buffers(), x, *condition.values()]
    for tensor in before:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    saved[result.untyped_storage().data_ptr()] = result.untyped_storage().nbytes()
    assert velocity_cost(spec, policy, backward=True).kept == sum(saved.values())


def test_flops_of_a_forward_are_those_of_its_matrix_products():
    """The embedded model by hand: 3 joint blocks of width 128, the last without text output."""
    spec = small_spec("sampling.guidance=3")
    cost = footprint.costs(spec, skeleton(spec), configs_of(spec), 0).sampled
    b, d, image, text = 8, 128, (32 // 8) * (48 // 8), 20  # two passes of four images
    channels, features, pixels = 4, 256, 2 * 2
    stream = 12 * d * d  # queries, keys, values, output; and the MLP's 2 x 4 d
    blocks = 3 * image * stream + 2 * text * stream + text * 3 * d * d
    modulation = 3 * 6 * d * d + 2 * 6 * d * d + 2 * d * d
    attention = 3 * 2 * (image + text) ** 2 * d
    embedding = image * pixels * channels * d + text * d * d
    moment = features * d + d * d + d * d + d * d  # the time's two layers, the pooled text's two
    ends = 2 * d * d + image * d * pixels * channels
    assert cost.forward == 2 * b * (blocks + modulation + attention + embedding + moment + ends)


@pytest.mark.parametrize("family", EDITING)
def test_tokens_of_the_images_to_change_are_counted(family: str):
    """To the FLOP and byte, where prompts are padded to one length."""
    model = MODELS[family]
    guided = f"sampling.guidance={model.guidances[-1]}"
    spec = model.spec(model_folder(family), LORA, guided, "evaluation.micro_batch=3")
    found = footprint.costs(spec, skeleton(spec), configs_of(spec), model.sources).evaluated
    policy = tuned(spec)
    condition = batch_condition(policy, conditions_of(family, guided), (0, 1, 2))
    x = torch.zeros(3, *policy.latent_shape(spec.sampling.size))
    inputs = [x, *condition.values()]
    run = lambda: policy.velocity(x, 0.6, condition)  # noqa: E731
    real = measure(run, policy.network, inputs, backward=False)
    if family == "flux_kontext":
        assert found == real
    else:  # the longest prompts, and their marks
        assert real.forward < found.forward < 1.5 * real.forward


# --- who holds what


def local_bytes(tensors: Any) -> int:
    from torch.distributed.tensor import DTensor

    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in local)}.values())


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("ema", ["null", "{decay: 0.9, every: 1}"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_learner_holds_after_an_update_what_the_estimate_says(
    tuning: str, ema: str, offload: bool
):
    spec = small_spec(
        *(TUNINGS[tuning], f"ema={ema}", "model.dtype=bfloat16"),
        f"cluster.learner.offload_optimizer={str(offload).lower()}",
    )
    batches = draw_batches(spec, 1)
    with alone():
        learner = Learner(spec, CPU)
        batches[0].into(learner)
        gradients = local_bytes(p.grad for p in learner.parameters.values())
        learner.step(kept(batches), 2)
        network, optimizer = learner.policy.network, learner.optimizer
        weights = local_bytes([*network.parameters(), *network.buffers()])
        moments = sum(local_bytes(shelf.values()) for shelf in optimizer.moments.values())
        averages = local_bytes(optimizer.ema.values())
    estimated = memory.learner_state(spec, skeleton(spec), Parallel())
    host = memory.moved_bytes(spec, skeleton(spec), Parallel())
    assert (estimated["weights"], estimated["gradients"]) == (weights, gradients)
    if offload:
        assert (estimated["optimizer"], estimated["averages"]) == (0, 0)
        assert host == moments + averages
    else:
        assert (estimated["optimizer"], estimated["averages"]) == (moments, averages)
    assert averages == (0 if ema == "null" else moments // 2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 5)


class TwoBlocks:
    """A policy of two blocks of 35 numbers, 10 numbers outside and a buffer of 3."""

    blocks_of = Policy.blocks_of
    dtype = torch.float32

    def __init__(self, kind: str) -> None:
        self.network = nn.Sequential(Block(), Block(), nn.Linear(4, 2))
        self.vae = nn.Linear(5, 1)
        self.network.register_buffer("table", torch.zeros(3))
        self.network.requires_grad_(kind == "full")
        if kind == "lora":
            for module in self.network.modules():
                if isinstance(module, Block):
                    module.inner.lora = nn.Parameter(torch.zeros(7, 1))
                    module.inner.weight.data = module.inner.weight.data.bfloat16()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

    def halved(self, network: nn.Module) -> dict[str, torch.dtype]:
        return {}

    def block_classes(self) -> tuple[type[nn.Module], ...]:
        return (Block,)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return (11,)


def stages_of(spec: TrainingSpec, policy: Any, parallel: Parallel | None = None) -> dict[str, Any]:
    """Of processes for which a velocity takes 1000 bytes with its backward pass (of shards 900),
    without 600 in training and 700 in an evaluation, and decoding 500; text encoders 90."""
    costs = memory.Costs(*(Cost(0, 0, 0, peak) for peak in (600, 700, 500, 1000, 900)))
    return memory.actor_stages(spec, policy, costs, 90, parallel or Parallel())  # type: ignore[return-value]


def shared(*, weights: bool = False, gradients: bool = False) -> Parallel:
    """Shards on two ranks."""
    return Parallel(True, ((0, 1),), weights, gradients)


ALL, BLOCK = 80, 35  # numbers
SHARED = [  # bytes of weights and of gradients while it trains, and of both in the update
    (Parallel(), 4, (0, 0), (0, 0)),
    (shared(), 4, (4 * (10 + 2 * BLOCK), 4 * (10 + 2 * BLOCK)), (0, 0)),
    (shared(), 2, (2 * (10 + 2 * BLOCK), 4 * (10 + 2 * BLOCK)), (0, 0)),
    (shared(weights=True), 2, (2 * (ALL + BLOCK), 4 * (10 + 2 * BLOCK)), (2 * (ALL + BLOCK), 0)),
    (shared(gradients=True), 4, (4 * (10 + 2 * BLOCK), 4 * ALL), (0, 4 * (ALL + BLOCK))),
]


@pytest.mark.parametrize(("parallel", "itemsize", "training", "update"), SHARED)
def test_parts_of_a_learner_rank_by_hand(
    parallel: Parallel, itemsize: int, training: tuple[int, int], update: tuple[int, int]
):
    """4 images, 4 trained steps of 5; a shard is rounded up: 3 of 5 rows."""
    spec = small_spec("sampling.groups=8")
    rows = (3, 1) if parallel.sharded else (5, 2)
    shard = 4 * (2 * rows[0] * (6 + 1) + rows[1] * (4 + 1))
    policy = TwoBlocks("full")
    policy.dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    found = stages_of(spec, policy, parallel)["learner"]
    held = {
        "weights": shard + 12,
        "gradients": shard,
        "optimizer": 2 * shard,
        "averages": shard,
        "reserved": 0,
    }
    parts = ("gathered weights", "gathered gradients")
    during = dict(zip(parts, training, strict=True))
    during |= {"activations": 900 if parallel.sharded else 1000, "latents": 4 * 4 * 5 * 11}
    assert found["training"] == held | during
    assert found["update"] == held | dict(zip(parts, update, strict=True))
    assert sum(found["publishing"].values()) == 4 * shard + 12 + 4 * 30
    # Sharded: when the second block is cut, beside both blocks' shards.
    loading = 4 * (2 * 3 * 7 + BLOCK) if parallel.sharded else 4 * ALL
    assert sum(found["loading"].values()) == loading + 12


@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_parts_of_a_rank_with_lora_by_hand(parallel: str):
    """Two ranks; 14 trained numbers. A replica adds up all gradients in one: its own copy, and one
    of each rank."""
    spec = small_spec(LORA, "sampling.groups=8")
    way = shared() if parallel == "shard" else Parallel(groups=((0,), (1,)))
    found = stages_of(spec, TwoBlocks("lora"), way)["learner"]
    training, update = found["training"], found["update"]
    if parallel == "replicate":
        assert training["weights"] - 12 == 2 * 5 * (6 * 2 + 4) + 2 * 20 + 4 * 14
        assert training["gathered weights"] == training["gathered gradients"] == 0
        assert update["gathered gradients"] == 4 * (14 + 2 * 14)
    else:
        assert training["weights"] - 12 == 2 * 3 * (6 * 2 + 4) + 20 + 4 * (14 // 2 + 1)
        assert training["gathered weights"] > 0
        assert training["gathered gradients"] == 4 * 14
        assert update["gathered gradients"] == 0


@pytest.mark.parametrize("std", ["global", "group"])
def test_parts_of_a_worker_that_samples_and_trains_by_hand(std: str):
    """One network for both parts; a gradient is there between sampled units where groups are
    trained on while others are sampled."""
    spec = small_spec(
        "cluster.layout=colocated", "cluster.workers.count=1", f"advantages.std={std}"
    )
    (found,) = stages_of(spec, TwoBlocks("full")).values()
    network = 4 * 80 + 12
    state = {
        "weights": network,
        "optimizer": 2 * 4 * 80,
        "averages": 4 * 80,
        "frozen copy of the base model": 0,
        "autoencoder": 24,
    }
    while_sampling = {"gradients": 4 * 80 if std == "group" else 0}
    sizes = {stage: sum(parts.values()) for stage, parts in found.items()}
    for part, size in (state | while_sampling).items():
        assert found["sampling"][part] == size, part
    idle = sum((state | while_sampling).values())
    latents = 4 * 4 * 5 * 11
    assert sizes == {
        "start": 90,
        "loading": network + 24,
        "encoding more prompts": idle + 90,
        "sampling": idle + 600 + 2 * latents,
        "decoding": idle + 500,
        "evaluation": idle + 700,
        "training": sum(state.values()) + 4 * 80 + 1000 + latents,
        "update": sum(state.values()) + 4 * 80,
    }


def test_a_reward_is_counted_where_it_takes_a_gpu():
    def parts(options: str, gpus: float = 0.1, reward: str = "pickscore") -> Any:
        rewards = f"rewards={{{reward}: {{gpus: {gpus}, options: {options}}}}}"
        return memory.reward_parts(reward, small_spec(rewards).rewards[reward])

    exact, half = parts("{}"), parts("{dtype: float16, batch: 8}")
    assert exact["weights"] == 4 * 986_109_441
    assert half["weights"] == exact["weights"] / 2
    assert half["activations"] == exact["activations"] / 2 / 4, "8 of 32 images at once"
    assert parts("{device: cpu}", gpus=0) == parts("{}", gpus=0) == {}
    assert parts("{}", reward="sign_colour") is None


def test_sizes_of_published_models_are_those_of_their_configs():
    """Built on the meta device by transformers, from what their config files say."""
    import transformers as hf

    heads = {"L": (768, 12, 12), "bigG": (1280, 32, 20), "H": (1024, 24, 16)}

    def text(name: str) -> dict[str, Any]:
        width, layers, count = heads[name]
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
        return shape | {"num_hidden_layers": layers, "num_attention_heads": count}

    def clip(name: str, width: int, layers: int) -> int:
        vision: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width}
        vision |= {"num_hidden_layers": layers, "num_attention_heads": 16, "patch_size": 14}
        both: dict[str, Any] = {"text_config": text(name), "vision_config": vision}
        return size(hf.CLIPModel(hf.CLIPConfig(**both, projection_dim=heads[name][0])))

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        config = hf.CLIPTextConfig(**text("L"))
        small, projected = hf.CLIPTextModel(config), hf.CLIPTextModelWithProjection(config)
        big = hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**text("bigG")))
        t5 = hf.T5EncoderModel(
            hf.T5Config(
                d_model=4096,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )
        large = (clip("H", 1280, 32), clip("L", 1024, 24))
    published = footprint.PUBLISHED
    sd35 = size(projected) + size(big) + size(t5)
    assert published["stabilityai/stable-diffusion-3.5-medium"] == sd35
    assert published["black-forest-labs/FLUX.1-dev"] == size(small) + size(t5)
    assert (PickScoreReward.SIZE.parameters, ClipScoreReward.SIZE.parameters) == large


def test_parts_of_a_rollout_worker_by_hand():
    """Weights without masters, twice with KL; the encoders as the files have them."""
    spec = small_spec("objective.kl={beta: 0.1}", "model.dtype=bfloat16")
    real = load_policy(spec, CPU, masters=False)
    found = footprint.estimate(spec)
    assert found is not None
    assert found.layouts == [], "no GPU is asked for"
    rollout = found.actors["rollout"]
    weights = local_bytes([*real.network.parameters(), *real.network.buffers()])
    vae: nn.Module = real.vae  # type: ignore[attr-defined]
    pipe: Any = real.encoder  # type: ignore[attr-defined]
    encoders = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    held = {
        "weights": weights,
        "frozen copy of the base model": weights,
        "autoencoder": local_bytes([*vae.parameters(), *vae.buffers()]),
    }
    read = 2 * sum(p.numel() for encoder in encoders for p in encoder.parameters())
    assert rollout["start"] == {"text encoders": read, "reserved": 0}
    assert {part: rollout["sampling"][part] for part in held} == held
    latents = 4 * (4 + 1 + 4) * math.prod(real.latent_shape((32, 48))) * 4
    assert rollout["sampling"]["latents"] == 2 * latents
    assert found.encoders_known
    plain = footprint.estimate(small_spec(LORA, "objective.kl={beta: 0.1}"))
    assert plain is not None
    assert plain.actors["rollout"]["decoding"]["frozen copy of the base model"] == 0


def test_flops_of_an_iteration():
    """16 images in 4 micro-batches, 5 steps, 4 trained, 2 epochs, KL; counted by hand per image."""
    spec = small_spec(
        *("objective.kl={beta: 0.1}", "objective.epochs=2", "evaluation.micro_batch=8"),
    )
    cost = footprint.costs(spec, skeleton(spec), configs_of(spec), 0)
    sampled, evaluated, decoded, trained, _ = cost
    found = footprint.estimate(spec)
    assert found is not None
    assert found.rollout_flops == 4 * (5 + 4) * sampled.forward + 2 * decoded.forward
    assert found.training_flops == 4 * 4 * 2 * (trained.forward + trained.backward)
    assert evaluated.forward == 2 * sampled.forward, "micro-batches of 8 and 4"


def test_one_pass_of_a_distilled_model_is_counted_once():
    """FLUX takes the guidance as an input, Stable Diffusion compares two passes."""
    flux, sd3 = load_spec("flux-pickscore-fast", []), load_spec("sd35-ocr", [])
    assert footprint.count_work(flux, 10).rollout_forwards == 24 * 48 * 6
    work = footprint.count_work(sd3, 10)
    assert work.rollout_forwards == 2 * 24 * 48 * 10
    assert work.reference_forwards == work.trained_forwards == 2 * 24 * 48 * 9
    assert work.evaluation_forwards == 2 * 10 * 40


# --- configs


def test_configs_of_models_that_are_not_here():
    assert footprint.find_configs(small_spec("model.path=owner/name").model) is None
    assert footprint.estimate(small_spec("model.path=owner/name")) is None
    published = {path.split("/")[1] for path in footprint.PUBLISHED}
    assert {file.stem for file in footprint.ARCHITECTURES.iterdir()} == published


def test_a_folder_without_its_config_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(ModelError, match=r"model\.path = .*transformer/config\.json"):
        footprint.find_configs(small_spec(f"model.path={tmp_path}").model)


# --- recipes

# Billions of parameters: of the model cards of Stable Diffusion 3.5 Medium (2.2 without its table
# of positions), FLUX.1-dev, Qwen-Image and FLUX.2-klein (4B, 9B); BAGEL's two experts of 7B
# without lm_head and vision.
SIZES = {
    "tiny": (0.001, 0.003),
    "sd35": (2.2, 2.5),
    "flux": (11.85, 11.95),
    "qwen": (6.9, 20.5),  # Qwen-Image-2.1, "7B", and Qwen-Image
    "sana": (1.55, 1.65),
    "z": (6.1, 6.2),  # Z-Image, "6B"
    "flux2": (3.8, 32.5),  # klein and dev
    "bagel": (13.0, 14.7),
}
QUICK = ("tiny-ocr", "sd35-ocr-1gpu-24gb")
H100 = 79  # GiB that torch can use
LARGER = {"flux2-dev-multi": 139}  # of an H200


@pytest.fixture(scope="module", autouse=True)
def _costs_once() -> Iterator[None]:
    with costs_once():
        yield


@cache
def estimate_of(recipe: str) -> tuple[TrainingSpec, footprint.Footprint]:
    spec = load_spec(recipe)
    found = footprint.estimate(spec, LARGER.get(recipe, H100) * GIB)
    assert found is not None
    return spec, found


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in recipe_names()],
)
def test_every_recipe_has_an_estimate(name: str):
    spec, found = estimate_of(name)
    low, high = SIZES[name.partition("-")[0]]
    assert low < found.parameters / 1e9 < high
    if spec.tuning.kind == "lora":
        assert 0.001 < found.trained_parameters / found.parameters < 0.03
    # A multiply-add per parameter and token, and attention on top.
    tokens = math.prod(spec.sampling.size) // 256
    images = spec.sampling.images * spec.sampling.steps
    least = 2 * found.parameters * tokens * images / 4
    assert least < found.rollout_flops < 40 * least
    assert found.training_flops > 0
    for stages in found.actors.values():
        for parts in stages.values():
            assert min(parts.values()) >= 0
            assert sum(parts.values()) < 200 * GIB
        if not found.parallel.sharded:  # else by blocks
            assert stages["loading"]["weights"] >= 2 * found.parameters
    if spec.gpus:  # each has the layout that plan recommends, and fits
        limit = LARGER.get(name, H100) * GIB
        chosen = recommended(found.layouts, limit)
        assert chosen is not None
        assert chosen.layout == spec.cluster.layout
        assert (chosen.parallel == "shard") == found.parallel.sharded
        kinds = gpus(spec, found.actors, found.rewards)
        assert max(gpu.largest()[1] for gpu in kinds) < limit


def test_a_gpu_of_24_gb_has_room_for_every_phase_of_its_recipe():
    spec, found = estimate_of("sd35-ocr-1gpu-24gb")
    (gpu,) = gpus(spec, found.actors, found.rewards)
    phases = gpu.phases()
    names = ["start", "loading", "encoding more prompts", "sampling", "decoding", "evaluation"]
    assert [*phases] == [*names, "training", "update"]
    assert max(phases.values()) < 22 * GIB
    encoders = 123_650_304 + 694_659_840 + 4_762_310_656
    assert phases["start"] == 2 * encoders + 2 * GIB, "the encoders alone, in 16 bits"


FEW_STEPS = (
    *("sampling.steps=4", "evaluation.steps=4"),
    "sampling.window={kind: random, length: 1, within: [0, 3]}",
)
CHECKPOINTS = "cluster.learner.activation_checkpointing=true"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "recipe", "overrides"),
    [
        ("stabilityai/stable-diffusion-3.5-large", "sd35-pickscore", (CHECKPOINTS,)),
        (
            "stabilityai/stable-diffusion-3.5-large-turbo",
            "sd35-pickscore-fast-cps",
            FEW_STEPS,
        ),
        ("black-forest-labs/FLUX.1-Krea-dev", "flux-pickscore-fast", ()),
        (
            "black-forest-labs/FLUX.1-schnell",
            "flux-pickscore-fast",
            (*FEW_STEPS, "sampling.guidance=1"),
        ),
    ],
)
def test_the_models_page_says_what_plan_does(path: str, recipe: str, overrides: tuple[str, ...]):
    spec = load_spec(recipe, [f"model.path={path}", *overrides])
    found = footprint.estimate(spec, H100 * GIB)
    assert found is not None
    most = max(gpu.largest()[1] for gpu in gpus(spec, found.actors, found.rewards)) / GIB
    flops = [f"{round(n / 1e12):,}" for n in (found.rollout_flops, found.training_flops)]
    told = f"| {found.parameters / 1e9:.2f} B | {' and '.join(flops)} | {most:.1f} |"
    page = Path(__file__).parents[2] / "docs" / "models.md"
    (row,) = (line for line in page.read_text("utf-8").splitlines() if f"| `{path}` |" in line)
    assert row.startswith(f"| `{path}` | `{recipe}`")
    assert row.endswith(told)
    assert most < H100
