"""The recipes against the published hyper-parameters, written down here once more."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowgrpo_ray.algorithm.objectives import DiffusionNft
from flowgrpo_ray.estimate.preflight import check_run
from flowgrpo_ray.policies import policy_class
from flowgrpo_ray.spec.file import RECIPES, load_spec, recipe_names
from flowgrpo_ray.spec.plan import plan_iteration
from flowgrpo_ray.spec.prompts import load_prompt_sets
from flowgrpo_ray.spec.training import TrainingSpec, required_resources

TINY = [name for name in recipe_names() if name.startswith("tiny-")]
ATTENTION = {
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
}
FLUX_LORA = (
    64,
    128,
    frozenset(
        ATTENTION | {"ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"}
    ),
)
QWEN_LORA = (
    64,
    128,
    frozenset(
        ATTENTION | {"img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"}
    ),
)
QWEN_2_LORA = frozenset(
    {
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("img_mlp.gate_layer", "img_mlp.proj", "img_mlp.out"),
    }
)
Z_IMAGE_ATTENTION = frozenset(
    {"attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"}
)
Z_IMAGE_LORA = Z_IMAGE_ATTENTION | {"feed_forward.w1", "feed_forward.w2", "feed_forward.w3"}
FLUX2_LORA = (
    64,
    128,
    frozenset(
        ATTENTION
        | {f"{ff}.linear_{end}" for ff in ("ff", "ff_context") for end in ("in", "out")}
        | {"attn.to_qkv_mlp_proj"}
    ),
)
BAGEL_LORA = (
    64,
    128,
    frozenset(
        {f"self_attn.{x}_proj_moe_gen" for x in "qkvo"}
        | {f"mlp_moe_gen.{x}_proj" for x in ("gate", "up", "down")}
    ),
)
ALL, FIRST_HALF = "all", ("random", 3, (0, 5))
EMA = (0.9, 8)


@dataclass(frozen=True)
class Published:
    """A row: Flow-GRPO on Stable Diffusion 3.5 Medium, except where it says otherwise."""

    rewards: dict[str, float]
    model: tuple[str, str] = ("sd3", "stabilityai/stable-diffusion-3.5-medium")
    dtype: str = "float16"
    lora: tuple[int, int, frozenset[str]] | None = (
        32,
        64,
        frozenset(ATTENTION),
    )  # None: all weights
    steps: tuple[int, int] = (10, 40)  # in training, in evaluation
    guidance: float = 4.5
    micro_batch: int = 9
    groups: tuple[int, int] = (24, 48)  # images of a group, groups
    kernel: tuple[str, str, float] = ("flow_sde", "gaussian", 0.7)
    window: Any = ALL
    objective: tuple[str, float] = ("flow_grpo", 1e-4)
    kl: tuple[float, str] | None = None
    std: str = "global"
    learning_rate: float = 3e-4
    ema: tuple[float, int] | None = EMA
    gpus: int = 32
    weight_decay: float = 1e-4
    size: tuple[int, int] = (512, 512)
    per_reward: bool = False


CPS = ("cps", "squared_error", 0.8)
GRPO_FAST = ("flow_grpo", 1e-5)
PICK = Published({"pickscore": 1}, kl=(0.01, "time_weighted"))
OCR = replace(PICK, rewards={"ocr": 1}, kl=(0.04, "time_weighted"))
GENEVAL = replace(OCR, rewards={"geneval": 1})
FAST = replace(PICK, kl=None, guidance=1, kernel=CPS, window=FIRST_HALF, objective=GRPO_FAST)
FLUX = replace(
    PICK,
    model=("flux", "black-forest-labs/FLUX.1-dev"),
    dtype="bfloat16",
    lora=FLUX_LORA,
    steps=(6, 28),
    guidance=3.5,
    micro_batch=3,
    kernel=("flow_sde", "gaussian", 0.9),
    kl=None,
)
BAGEL = replace(
    PICK,
    model=("bagel", "ByteDance-Seed/BAGEL-7B-MoT"),
    dtype="bfloat16",
    lora=None,
    steps=(15, 50),
    guidance=4,
    micro_batch=6,
    groups=(16, 48),
    kernel=("flow_sde", "gaussian", 1.3),
    window=("random", 3, (0, 7)),
    objective=GRPO_FAST,
    kl=None,
    std="group",
    learning_rate=1e-4,
    ema=None,
)
Z_IMAGE = replace(
    PICK,
    model=("z_image", "Tongyi-MAI/Z-Image"),
    dtype="bfloat16",
    lora=(64, 128, Z_IMAGE_ATTENTION),
    steps=(16, 40),
    guidance=5,
    micro_batch=8,
    groups=(16, 64),
    window=("random", 3, (0, 8)),
    kl=None,
    ema=None,
    gpus=8,
    weight_decay=0,
)
FLUX2 = replace(
    PICK,
    model=("flux2", "black-forest-labs/FLUX.2-klein-base-9B"),
    dtype="bfloat16",
    lora=FLUX2_LORA,
    steps=(8, 28),
    guidance=4,
    micro_batch=2,
    groups=(16, 48),
    window=("random", 1, (1, 4)),
    kl=None,
    std="group",
    ema=(0.9, 4),
    gpus=8,
    size=(384, 384),
)
FLUX2_DEV = replace(
    FLUX2,
    rewards={"clipscore": 1, "pickscore": 0.5},
    model=("flux2_dev", "black-forest-labs/FLUX.2-dev"),
    micro_batch=4,
    kernel=("flow_sde", "gaussian", 1.0),
    size=(512, 512),
    per_reward=True,
)
GUARD = replace(PICK, kl=None, std="group", learning_rate=1e-4)
PUBLISHED = {
    "sd35-ocr": OCR,
    "sd35-geneval": GENEVAL,
    "sd35-pickscore": PICK,
    "sd35-geneval-fast-cps": replace(FAST, rewards={"geneval": 1}),
    "sd35-pickscore-fast-cps": replace(FAST, groups=(18, 64)),
    "sd35-ocr-4gpu": replace(OCR, micro_batch=8, groups=(16, 16), gpus=4),
    "sd35-ocr-1gpu-24gb": replace(OCR, micro_batch=2, groups=(8, 8), gpus=1),
    "sd35-pickscore-1gpu": replace(PICK, micro_batch=8, groups=(8, 8), gpus=1),
    "flux-pickscore": FLUX,
    "flux-pickscore-fast": replace(
        FLUX, kernel=CPS, window=("random", 3, (0, 3)), objective=GRPO_FAST, std="group"
    ),
    "qwen-image-pickscore": replace(
        PICK,
        model=("qwen_image", "Qwen/Qwen-Image"),
        dtype="bfloat16",
        lora=QWEN_LORA,
        steps=(10, 50),
        guidance=4,
        micro_batch=4,
        groups=(16, 32),
        kernel=("flow_sde", "gaussian", 1.2),
        window=("random", 2, (0, 5)),
        kl=None,
        ema=None,
    ),
    "qwen-image-2512-multi": replace(
        FLUX2_DEV,
        model=("qwen_image", "Qwen/Qwen-Image-2512"),
        lora=QWEN_LORA,
        steps=(10, 28),
    ),
    "qwen-image-2-pickscore": replace(
        Z_IMAGE,
        model=("qwen_image_2", "Qwen/Qwen-Image-2.1"),
        lora=(64, 128, QWEN_2_LORA),
        steps=(16, 40),
        guidance=1,
        micro_batch=4,
        groups=(16, 48),
    ),
    "z-image-pickscore": Z_IMAGE,
    "z-image-turbo-pickscore": replace(
        Z_IMAGE,
        model=("z_image", "Tongyi-MAI/Z-Image-Turbo"),
        lora=(64, 128, Z_IMAGE_LORA),
        steps=(6, 10),
        guidance=1,
        micro_batch=2,
        groups=(16, 48),
        window=("random", 1, (1, 4)),
        std="group",
        ema=(0.9, 8),
        weight_decay=1e-4,
    ),
    "flux2-klein-pickscore": FLUX2,
    "flux2-dev-multi": FLUX2_DEV,
    "flux-kontext-pickscore": replace(
        FLUX,
        model=("flux_kontext", "black-forest-labs/FLUX.1-Kontext-dev"),
        steps=(10, 20),
        guidance=2.5,
        micro_batch=1,
        groups=(16, 48),
        window=("random", 1, (1, 4)),
        std="group",
        ema=(0.9, 4),
        gpus=8,
        size=(384, 384),
    ),
    "flux2-klein-edit-pickscore": replace(
        FLUX2,
        model=("flux2", "black-forest-labs/FLUX.2-klein-9B"),
        steps=(4, 10),
        guidance=1,
        kernel=("flow_sde", "gaussian", 0.5),
        window=("random", 1, (1, 3)),
    ),
    "bagel-pickscore-full": BAGEL,
    "bagel-pickscore-lora": replace(BAGEL, lora=BAGEL_LORA, window=("random", 2, (0, 7)), gpus=8),
    "sd35-guard-ocr": replace(GUARD, rewards={"ocr": 1}, objective=("grpo_guard", 2e-6)),
    "sd35-guard-geneval": replace(GUARD, rewards={"geneval": 1}, objective=("grpo_guard", 2e-6)),
    "sd35-guard-pickscore": replace(GUARD, objective=("grpo_guard", 4e-6)),
}


EARLY, LATE = (0, 0.001, 0.5), (75, 0.0075, 0.999)  # decays of the sampling weights


@dataclass(frozen=True)
class PublishedNft:
    """A row of DiffusionNFT, on Stable Diffusion 3.5 Medium, 8 GPUs and without guidance."""

    rewards: dict[str, float]
    steps: int = 10
    times: int = 9
    updates: int = 1
    beta: float = 1.0
    decay: tuple[int, float, float] = EARLY


NFT = {
    "sd35-nft-geneval": PublishedNft({"geneval": 1}),
    "sd35-nft-pickscore": PublishedNft({"pickscore": 1}),
    "sd35-nft-ocr": PublishedNft({"ocr": 1}, updates=2, beta=0.1, decay=LATE),
    "sd35-nft-multi": PublishedNft(
        {"pickscore": 1, "hps": 1, "clipscore": 0.3}, steps=25, times=24, beta=0.1
    ),
}
NFT_COMMON = {  # to all that follow, by the spec's keys
    "model.dtype": "bfloat16",
    "tuning.rank": 64,
    "tuning.alpha": 128,
    "tuning.targets": None,
    "sampling.solver": "euler",
    "sampling.size": (512, 512),
    "sampling.guidance": 1,
    "sampling.group_size": 16,
    "sampling.groups": 48,
    "advantages.std": "group",
    "advantages.clamp": 5,
    "objective.beta": 0.1,
    "objective.updates": 1,
    "objective.epochs": 1,
    "objective.decay.flat": 0,
    "objective.decay.rate": 0.001,
    "objective.decay.cap": 0.5,
    "objective.times.count": 2,
    "objective.times.draw": "steps",
    "objective.times.within": (0, 1),
    "objective.reference": 0,
    "optimizer.learning_rate": 3e-4,
    "optimizer.weight_decay": 1e-4,
    "optimizer.grad_norm": 1,
    "ema": None,
    "evaluation.steps": 40,
}
NFT_OF_OTHERS = {  # of Flow-Factory, UniRL and Sol-RL: what differs
    "z-image-nft-pickscore": {
        "model.path": "Tongyi-MAI/Z-Image",
        "sampling.steps": 10,
        "sampling.guidance": 5,
        "objective.times.within": (0.5, 1),
    },
    "z-image-turbo-nft-pickscore": {
        "model.path": "Tongyi-MAI/Z-Image-Turbo",
        "tuning.kind": "full",
        "sampling.steps": 6,
        "advantages.std": "global",
        "objective.times.count": 3,
        "objective.times.within": (0.01, 1),
        "optimizer.learning_rate": 1e-5,
        "evaluation.steps": 10,
    },
    "flux-nft-pickscore": {
        "model.path": "black-forest-labs/FLUX.1-dev",
        "sampling.size": (384, 384),
        "sampling.steps": 8,
        "sampling.guidance": 3.5,
        "objective.beta": 1,
        "objective.times.within": (0.3, 1),
        "evaluation.steps": 28,
    },
    "qwen-image-2512-nft-pickscore": {
        "model.path": "Qwen/Qwen-Image-2512",
        "sampling.size": (384, 384),
        "sampling.steps": 12,
        "advantages.std": "global",
        "objective.beta": 1,
        "objective.times.count": 11,
        "optimizer.weight_decay": 0,
        "evaluation.steps": 50,
    },
    "sana-nft-pickscore": {
        "model.path": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        "model.max_sequence_length": 300,
        "tuning.rank": 4,
        "tuning.alpha": 4,
        "sampling.size": (1024, 1024),
        "sampling.steps": 10,
        "sampling.group_size": 24,
        "advantages.std": "global",
        "objective.beta": 1,
        "objective.times.count": 9,
        "objective.reference": 1e-4,
        "ema.decay": 0.9,
        "ema.every": 1,
    },
}
NFT_EDITING = {  # of Edit-R1, by the spec's keys
    "model.path": "Qwen/Qwen-Image-Edit-2509",
    "tuning.rank": 32,
    "tuning.alpha": 64,
    "sampling.size": (512, 512),
    "sampling.steps": 6,
    "sampling.solver": "dpm2",
    "sampling.guidance": 1,
    "sampling.group_size": 12,
    "sampling.groups": 24,
    "sampling.micro_batch": 3,
    "objective.beta": 1,
    "objective.updates": 1,
    "objective.reference": 1e-4,
    "objective.decay.flat": 0,
    "objective.decay.rate": 0.001,
    "objective.decay.cap": 0.5,
    "evaluation.steps": 15,
}
EDITING = (  # whose prompts name images
    *("flux-kontext-pickscore", "flux2-klein-edit-pickscore"),
    "qwen-image-edit-nft-judge",
)
OWN = {"sd35-ocr-geneval-pickscore": 32}  # of nobody's but ours, with their GPUs
NFT_OF_FLUX2 = "flux2-klein-nft-pickscore"
EIGHT = [*NFT, *NFT_OF_OTHERS, NFT_OF_FLUX2, "qwen-image-edit-nft-judge"]
GPUS = {name: row.gpus for name, row in PUBLISHED.items()} | OWN | dict.fromkeys(EIGHT, 8)


def trained(spec: TrainingSpec) -> dict[str, float]:
    return {name: weight for name, weight in spec.weights.items() if weight}


def read(spec: TrainingSpec) -> Published:
    """What a row of the table says, of a spec."""
    sampling, objective, tuning = spec.sampling, spec.objective, spec.tuning
    window = sampling.window
    assert objective.kind != "flow_dppo"
    assert objective.clip_low == objective.clip_high
    lora = None
    if tuning.kind == "lora":
        targets = tuning.targets or policy_class(spec.model.family).lora_targets
        lora = (tuning.rank, tuning.alpha, frozenset(targets))
    assert window.kind != "progressive"
    return Published(
        rewards=trained(spec),
        model=(spec.model.family, spec.model.path),
        dtype=spec.model.dtype,
        lora=lora,
        steps=(sampling.steps, spec.evaluation.steps),
        guidance=sampling.guidance,
        micro_batch=sampling.micro_batch,
        groups=(sampling.group_size, sampling.groups),
        kernel=(sampling.kernel, sampling.likelihood, sampling.eta),
        window=ALL if window.kind == "all" else ("random", window.length, window.within),
        objective=(objective.kind, objective.clip_low),
        kl=None if objective.kl is None else (objective.kl.beta, objective.kl.form),
        std=spec.advantages.std,
        learning_rate=spec.optimizer.learning_rate,
        ema=None if spec.ema is None else (spec.ema.decay, spec.ema.every),
        gpus=spec.gpus,
        weight_decay=spec.optimizer.weight_decay,
        size=sampling.size,
        per_reward=spec.advantages.per_reward,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_are_the_published_ones(name: str):
    spec = load_spec(name)
    assert read(spec) == PUBLISHED[name]
    assert (spec.objective.updates, spec.objective.epochs) == (2, 1)
    optimizer = spec.optimizer
    assert optimizer.betas == (0.9, 0.999)
    assert (optimizer.eps, optimizer.grad_norm) == (1e-8, 1.0)
    advantages = spec.advantages
    assert (advantages.clamp, advantages.refill) == (5, 0)


@pytest.mark.parametrize("name", NFT)
def test_the_numbers_of_nft_are_the_published_ones(name: str):
    spec = load_spec(name)
    sampling, objective, tuning = spec.sampling, spec.objective, spec.tuning
    assert isinstance(objective, DiffusionNft)
    decay = objective.decay
    assert NFT[name] == PublishedNft(
        rewards=trained(spec),
        steps=sampling.steps,
        times=objective.times.count,
        updates=objective.updates,
        beta=objective.beta,
        decay=(decay.flat, decay.rate, decay.cap),
    )
    assert (objective.times.draw, objective.times.within) == ("steps", (0, 1))
    assert (objective.reference, objective.advantage_max, objective.epochs) == (1e-4, 5, 1)
    assert objective.adaptive
    assert objective.advantage == "graded"
    assert (sampling.solver, sampling.guidance, sampling.size) == ("dpm2", 1, (512, 512))
    assert (sampling.group_size, sampling.groups, sampling.micro_batch) == (24, 48, 9)
    assert tuning.kind == "lora"
    assert (tuning.rank, tuning.alpha, tuning.targets) == (32, 64, None)
    assert (spec.model.dtype, spec.model.max_sequence_length) == ("float16", 128)
    assert (spec.advantages.std, spec.advantages.clamp) == ("global", 5)
    optimizer = spec.optimizer
    assert (optimizer.learning_rate, optimizer.betas) == (3e-4, (0.9, 0.999))
    assert (optimizer.weight_decay, optimizer.grad_norm) == (1e-4, 1)
    assert spec.ema is not None
    assert (spec.ema.decay, spec.ema.every) == (0.9, 1)
    assert (spec.evaluation.steps, spec.evaluation.solver) == (40, "euler")


@pytest.mark.parametrize("name", NFT_OF_OTHERS)
def test_the_numbers_of_nft_on_other_models_are_the_published_ones(name: str):
    spec, published = load_spec(name), NFT_COMMON | NFT_OF_OTHERS[name]
    if published.get("tuning.kind") == "full":
        published = {k: v for k, v in published.items() if k[:7] != "tuning." or k == "tuning.kind"}
    if "ema.decay" in published:
        del published["ema"]
    assert {key: attrgetter(key)(spec) for key in published} == published
    assert trained(spec) == {"pickscore": 1}


def test_the_numbers_of_nft_that_edits_are_the_published_ones():
    spec = load_spec("qwen-image-edit-nft-judge")
    assert {key: attrgetter(key)(spec) for key in NFT_EDITING} == NFT_EDITING
    assert trained(spec) == {"edit": 1}
    judge = spec.rewards["edit"].options
    assert (judge["answer"], judge["low"], judge["high"]) == ("digits", 0, 5)


def test_the_numbers_of_nft_on_flux2_are_the_published_ones():
    spec = load_spec("flux2-klein-nft-pickscore")
    sampling, objective, tuning = spec.sampling, spec.objective, spec.tuning
    assert isinstance(objective, DiffusionNft)
    assert trained(spec) == {"pickscore": 1}
    assert spec.model.path == "black-forest-labs/FLUX.2-klein-base-4B"
    assert (spec.model.dtype, spec.model.max_sequence_length) == ("bfloat16", 512)
    assert tuning.kind == "lora"
    assert (tuning.rank, tuning.alpha, tuning.targets) == (64, 128, None)
    assert (sampling.size, sampling.steps, sampling.guidance) == ((384, 384), 8, 1)
    assert (sampling.solver, sampling.group_size, sampling.groups) == ("euler", 16, 48)
    assert (objective.updates, objective.beta, objective.reference) == (1, 0.1, 0)
    times, decay = objective.times, objective.decay
    assert (times.count, times.draw, times.within) == (2, "stratified", (0.5, 1))
    assert (decay.flat, decay.rate, decay.cap) == EARLY
    assert (spec.advantages.std, spec.advantages.clamp) == ("group", 5)
    optimizer = spec.optimizer
    assert (optimizer.learning_rate, optimizer.betas) == (1e-4, (0.9, 0.999))
    assert (optimizer.weight_decay, optimizer.grad_norm) == (1e-4, 1)
    assert spec.ema is None
    assert (spec.evaluation.every, spec.evaluation.steps) == (20, 28)


def test_every_recipe_is_in_a_table():
    assert {*PUBLISHED, *OWN, *EIGHT, *TINY} == set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_what_it_is_and_where_its_numbers_come_from(name: str):
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    lines = text.splitlines()
    assert len(lines) <= 30
    assert max(len(line) for line in lines) <= 100
    first, *rest = (line for line in lines if line.startswith("#"))
    assert re.fullmatch(r"# \w.{20,100}\.", first)
    source = " ".join(rest)
    assert "arXiv" in source or (name in TINY and "measur" in source)


@pytest.mark.parametrize("name", recipe_names())
def test_the_sets_and_the_counts_fit(name: str):
    """The plan tiles; every reward of a GPU recipe that needs one has one."""
    spec = load_spec(name)
    steps = spec.sampling.steps
    plan = plan_iteration(spec, 1, 10_000, tuple(k / steps for k in range(steps, -1, -1)))
    assert len(plan.units) == spec.sampling.units
    if name in EDITING:
        (one,) = spec.prompts.sets.values()
        assert (one.file, one.evaluate) == ("prompts/edit-train.jsonl", "prompts/edit-test.jsonl")
        assert 1 in policy_class(spec.model.family).sources
    elif name not in TINY:
        task = next(r for r in ("ocr", "geneval", "pickscore") if r in name or r in spec.rewards)
        for one in spec.prompts.sets.values():
            of = one.name or task
            ending = "jsonl" if of == "geneval" else "txt"
            assert one.file == f"prompts/{of}-train.{ending}"
            assert one.evaluate == f"prompts/{of}-test.{ending}"
        for reward, section in spec.rewards.items():
            assert (section.gpus > 0) == (reward != "ocr")
            assert section.options.get("as_published", False) == (reward == "geneval")


@pytest.mark.parametrize("name", GPUS)
def test_a_reward_is_watched_that_is_not_trained(name: str):
    """Another judge than the trained one, at a tenth of a GPU in all for every eight or less."""
    spec = load_spec(name)
    (judge,) = spec.weights.keys() - trained(spec).keys()
    assert judge == ("imagereward" if "pickscore" in trained(spec) else "pickscore")
    watched = spec.rewards[judge]
    assert watched.replicas * watched.gpus <= max(0.2, 0.05 * spec.gpus + 1e-6)


def check_placed(spec: TrainingSpec, gpus: int) -> None:
    """Each GPU has one that samples or trains, and rewards have room in what these leave."""
    assert spec.gpus == gpus == sum(kind.count for kind in spec.actors.values())
    left = 1 - max(kind.gpus for kind in spec.actors.values())
    shares = [(r.replicas, r.gpus) for r in spec.rewards.values() if r.gpus]
    assert all(share <= left + 1e-6 for _, share in shares)
    assert sum(n * share for n, share in shares) <= gpus * left + 1e-6
    assert required_resources(spec)["GPU"] <= gpus + 1e-6


@pytest.mark.parametrize("name", GPUS)
def test_gpus_are_shared_by_those_that_sample_train_and_score(name: str):
    """As published, on 8 GPUs, and with processes of their own for either side."""
    gpus = GPUS[name]
    check_placed(load_spec(name), gpus)
    if gpus > 1:
        check_placed(load_spec(name, ["cluster.layout=separate"]), gpus)
    if gpus > 8:
        eight = load_spec(name, ["cluster.workers.count=8"])
        check_placed(eight, 8)
        assert eight.identity() == load_spec(name).identity()


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_recipe_passes_every_check_before_a_run(name: str):
    spec = load_spec(name)
    train, held_out = check_run(spec)
    edits = name == "tiny-edit"
    assert len(train) == (64 if edits else 256 * len(spec.prompts.sets))
    assert len(held_out) == (32 if edits else 64)
    assert {len(prompt.images) for prompt in [*train, *held_out]} == {int(edits)}


def test_the_tiny_recipes_differ_in_what_their_names_say():
    def keys(name: str) -> dict[str, Any]:
        return yaml.safe_load((RECIPES / f"{name}.yaml").read_text("utf-8")) | {"name": ""}

    plain = keys("tiny-ocr")
    no_steps = {"iterations", "sampling", "advantages", "objective", "optimizer", "evaluation"}
    for name, sections in {
        "tiny-ocr-guard": {"objective"},
        "tiny-ocr-steady": {"objective"},
        "tiny-ocr-flow-grpo": {"sampling", "objective"},
        "tiny-ocr-cps": {"sampling"},
        "tiny-two-rewards": {"rewards", "advantages", "objective"},
        "tiny-two-sets": {"prompts", "rewards", "evaluation"},
        "tiny-edit": {"iterations", "model", "prompts", "rewards", "advantages", "objective"},
        "tiny-ocr-nft": no_steps,
        "tiny-ocr-awm": no_steps,
    }.items():
        other = keys(name)
        differ = {key for key in plain.keys() | other if plain.get(key) != other.get(key)}
        assert differ == sections, name


@pytest.mark.skipif("FLOWGRPO_TEST_DATA" not in os.environ, reason="needs FLOWGRPO_TEST_DATA")
@pytest.mark.parametrize("name", [n for n in [*PUBLISHED, *NFT] if "ocr" in n or "geneval" in n])
def test_a_recipe_takes_the_public_prompts(name: str):
    file = "geneval_test.jsonl" if "geneval" in name else "ocr_test.txt"
    path = Path(os.environ["FLOWGRPO_TEST_DATA"], file)
    spec = load_spec(name, [f"prompts={{train: '{path}', evaluate: '{path}'}}"])
    train, held_out = load_prompt_sets(spec)
    assert len(train) >= 1000
    assert held_out == train[: spec.evaluation.prompts]


# --- what is said of them


def page(name: str) -> str:
    return (RECIPES.parent.parent / "docs" / name).read_text("utf-8")


def test_every_recipe_is_on_the_page():
    named = set(re.findall(r"^\| `([a-z0-9-]+)` \|", page("recipes.md"), re.M))
    assert named >= set(recipe_names())


def test_the_gpus_on_the_page_are_those_of_the_recipes():
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|.*\| (\d+) \| ([^|]+) \|$", page("recipes.md"), re.M)
    assert [name for name, *_ in rows] == [*PUBLISHED, *OWN]
    for name, gpus, rewards in rows:
        spec = load_spec(name)
        assert int(gpus) == spec.gpus
        shares = [(r.replicas, r.gpus or "CPU") for r in spec.rewards.values()]
        told = re.findall(r"(\d+) × ([\d.]+|CPU)", rewards)
        assert told == [(str(n), str(share)) for n, share in shares]


def test_conformance_names_tests_and_keys_that_exist():
    text = page("conformance.md")
    tests = "".join(
        file.read_text("utf-8") for file in Path(__file__).parents[1].rglob("test_*.py")
    )
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 30
    assert not named - set(re.findall(r"def (test_\w+)", tests))
    reference = page("spec.md")
    for row in re.findall(r"^\|.*\|$", text, re.M):
        *_, keys, _ = row.strip("|").split("|")
        for key in re.findall(r"`([a-z_.]+)[:`]", keys):
            assert f"`{key.rpartition('.')[2]}`" in reference, key
