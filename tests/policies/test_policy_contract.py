"""What every base model must keep, on a tiny one: a family is one row of ``tiny_models.MODELS``.

The families over diffusers' pipelines are also held against those, from the same noise.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    EDITING,
    MODELS,
    PIPELINES,
    PROMPTS,
    conditions_of,
    draw_batch_of,
    encoded,
    image_for,
    load_pipe,
    model_folder,
    schedule_of,
    spec_of,
    train_as_rank,
    train_as_second_rank,
    train_once,
)
from tiny_runs import (
    CPU,
    TUNINGS,
    UNTRAINED,
    alone,
    gradients,
    largest_difference,
    meeting,
    one_thread,
    perturb,
    sampler,
    unit,
)

from flowgrpo_ray.algorithm.learner import Learner
from flowgrpo_ray.algorithm.parallel import join_group
from flowgrpo_ray.algorithm.sampling import INITIAL, batch_condition, draw_noise, replay, rollout
from flowgrpo_ray.algorithm.weights import digest, gather, load_arrays, share
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.types import Condition
from flowgrpo_ray.policies import base, load_policy
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.spec.families import FAMILIES

STEPS = 6
OWN_LIMITS = {"z_image", "qwen_image_2", "sana"}  # of the networks: see their own tests
UNLIMITED = {"flux2", "flux2_dev"}  # pipelines that name a length, and refuse none
NFT = (  # the objective, and what of a tiny model's spec it does not know
    "objective={kind: diffusion_nft, times: {count: 2, within: [0.3, 1]}}",
    "sampling.eta=null",
    "sampling.window=null",
)
GUIDED = [(family, g) for family, model in MODELS.items() for g in model.guidances]
GUIDED_PIPELINES = [(family, g) for family, g in GUIDED if family in PIPELINES]


@pytest.fixture(scope="module", autouse=True)
def _alone_on_one_thread() -> Iterator[None]:
    with one_thread(), alone():
        yield


@cache
def pipe_of(family: str) -> Any:
    return load_pipe(model_folder(family))


def guided(family: str) -> str:
    return f"sampling.guidance={MODELS[family].guidances[-1]}"


def noise(policy: Policy, rows: int) -> torch.Tensor:
    shape = policy.latent_shape(MODELS[policy.model.family].size)
    return torch.randn((rows, *shape), generator=torch.Generator().manual_seed(0))


def velocity(policy: Policy, prompts: tuple[int, ...], *overrides: str) -> torch.Tensor:
    """Halfway between noise and data, a level that every dtype holds exactly."""
    conditions = conditions_of(policy.model.family, *overrides)
    with torch.no_grad():
        condition = batch_condition(policy, conditions, prompts)
        return policy.velocity(noise(policy, len(prompts)), 0.5, condition)


WORDS = [a + b for a in "abcde" for b in "uvwxyz"]  # more than a batch, of one length each


def test_every_family_has_its_row():
    assert MODELS.keys() == FAMILIES.keys()


# --- against the pipeline


@pytest.mark.parametrize("family", MODELS)
def test_images_are_decoded_in_slices(family, monkeypatch):
    """The same images, of as many pixels at once as fit; those of one slice are decoded as ever."""
    policy = load_policy(spec_of(family), CPU, frozenset({"network", "decoder"}))
    size, x = MODELS[family].size, noise(policy, 5)
    assert np.array_equal(policy.images(x, size), policy.decode(x))
    slices: list[int] = []
    decode = policy.decode

    def noted(part: torch.Tensor):
        slices.append(len(part))
        return decode(part)

    monkeypatch.setattr(policy, "decode", noted)
    monkeypatch.setattr(base, "DECODED_PIXELS", 2 * size[0] * size[1] + 1)
    found = policy.images(x, size)
    assert slices == [2, 2, 1]
    expected = np.concatenate([decode(part) for part in x.split(2)])
    assert np.array_equal(found, expected)
    monkeypatch.setattr(base, "DECODED_PIXELS", 1)
    assert policy.decoded_at_once(5, size) == 1, "one image is always decoded"


@pytest.mark.parametrize(("family", "guidance"), GUIDED_PIPELINES)
@pytest.mark.parametrize("prompts", [(2,), (0, 1, 2)], ids=["alone", "batch"])
def test_ode_sampling_is_the_pipelines(family, guidance, prompts):
    """Bit for bit where both encode a prompt alone. With several the pipeline encodes them in one
    batch, so matrix products may round differently: measured, by 2e-6 for SD3, and not for the
    others."""
    policy: Any = load_policy(spec_of(family, f"sampling.guidance={guidance}"), CPU)
    policy.encoded_at_once = 1
    model, texts = MODELS[family], [PROMPTS[i] for i in prompts]
    of = unit(schedule_of(policy, range(0), STEPS), prompts, tuple(range(len(prompts))))
    conditions = dict(enumerate(encoded(policy, PROMPTS)))
    _, x = rollout(policy, of, conditions, model.size, UNTRAINED)
    start = draw_noise(of, INITIAL, tuple(x.shape[1:]))
    assert model.pipeline_images is not None
    drawn = (pipe_of(family), texts, start, STEPS, guidance, model.size)
    latents, images = model.pipeline_images(*drawn, "latent"), model.pipeline_images(*drawn)
    off = np.abs(policy.decode(x).astype(int) - images)
    assert images.std() > 10, "something is drawn"
    if len(prompts) == 1:
        assert torch.equal(x, latents)
        assert off.max() == 0
    else:
        assert (x - latents).abs().max() < 2e-5
        assert off.max() <= 1
        assert (off > 0).mean() < 1e-3


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen_image"])
def test_decoding_rounds_as_the_pipelines_do(family):
    """In bfloat16, by a pipeline whose network leaves the noise as it is."""
    spec = spec_of(family, "model.dtype=bfloat16")
    policy: Any = load_policy(spec, CPU, frozenset({"network", "decoder"}))
    pipe = load_pipe(model_folder(family), policy.dtype)
    pipe.transformer.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states),)
    start, pipeline_images = noise(policy, 1).to(policy.dtype), MODELS[family].pipeline_images
    assert pipeline_images is not None
    images = pipeline_images(pipe, PROMPTS[:1], start, 2, 1.0, MODELS[family].size)
    assert np.array_equal(policy.decode(start.float()), images)
    assert images.std() > 10


@pytest.mark.parametrize(("family", "guidance"), GUIDED_PIPELINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_network_is_asked_what_the_pipeline_asks(family, guidance, dtype):
    """The same encodings, timesteps, guidance and positions, in every dtype, and the same tokens.

    Only the latents of later steps differ: ours stay float32 between the steps.
    """
    overrides = (f"sampling.guidance={guidance}", f"model.dtype={dtype}")
    policy: Any = load_policy(spec_of(family, *overrides), CPU)
    policy.encoded_at_once = 1  # as the pipeline does with one
    pipe = load_pipe(model_folder(family), policy.dtype)
    start, size = noise(policy, 1), MODELS[family].size
    condition = batch_condition(policy, {2: encoded(policy, PROMPTS[2:])[0]}, (2,))
    pipeline_images = MODELS[family].pipeline_images
    assert pipeline_images is not None
    with calls_of(pipe.transformer) as theirs, calls_of(policy.network) as ours, torch.no_grad():
        pipeline_images(pipe, PROMPTS[2:], start.to(policy.dtype), STEPS, guidance, size, "latent")
        for sigma in policy.sigmas(STEPS, size)[:-1]:
            policy.velocity(start, sigma, condition)
    assert len(ours) == len(theirs) >= STEPS
    latents = next(iter(inspect.signature(policy.network.forward).parameters))
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        first_step = i < len(ours) // STEPS
        for name in mine.keys() - (set() if first_step else {latents}):
            assert alike(mine[name], other[name]), name


def alike(mine: Any, other: Any) -> bool:
    """Bit for bit, whichever dtype holds them."""
    if isinstance(mine, list):
        return all(alike(*pair) for pair in zip(mine, other, strict=True))
    if isinstance(mine, torch.Tensor):
        return torch.equal(mine.float(), other.float())
    return mine == other


@contextmanager
def calls_of(network: Any) -> Iterator[list[dict[str, Any]]]:
    """The arguments of every call of ``network`` within the block, by name."""
    calls: list[dict[str, Any]] = []
    named = inspect.signature(network.forward)
    hook = network.register_forward_pre_hook(
        lambda _, args, given: calls.append(dict(named.bind(*args, **given).arguments)),
        with_kwargs=True,
    )
    yield calls
    hook.remove()


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("size", [(32, 64), (64, 64)])
def test_noise_levels_are_the_pipelines(family, size):
    policy = load_policy(spec_of(family), CPU, frozenset({"network", "decoder"}))
    start = torch.zeros(1, *policy.latent_shape(size))
    pipeline_images = MODELS[family].pipeline_images
    assert pipeline_images is not None
    for steps in (2, 7):
        pipeline_images(pipe_of(family), PROMPTS[:1], start, steps, 1.0, size, "latent")
        found = policy.sigmas(steps, size)
        assert torch.equal(torch.tensor(found), pipe_of(family).scheduler.sigmas)
        assert (len(found), found[0], found[-1]) == (steps + 1, 1.0, 0.0)


@pytest.mark.parametrize("family", PIPELINES)
def test_what_the_pipeline_refuses_is_an_error_that_names_the_key(family):
    policy: Any = load_policy(spec_of(family), CPU, frozenset({"network", "decoder"}))
    uneven = 32 + policy.factor  # whole latents, and not whole tokens
    for size in ((uneven, 48), (48, uneven)):
        with pytest.raises(SpecError, match=r"sampling\.size = \[\d\d, \d\d\] does not fit"):
            policy.latent_shape(size)
    most = policy.max_tokens
    if family in UNLIMITED:
        assert pipe_of(family).tokenizer_max_length == most
    elif family not in OWN_LIMITS:
        with pytest.raises(ValueError, match=f"cannot be greater than {most} but"):
            pipe_of(family)(
                prompt=PROMPTS[0], max_sequence_length=most + 1, **image_for(family, PROMPTS[0])
            )
    longer = spec_of(family, f"model.max_sequence_length={most + 1}")
    with pytest.raises(SpecError, match=rf"model\.max_sequence_length = {most + 1}: .*Pipeline"):
        load_policy(longer, CPU, frozenset({"encoder"}))


# --- conditions and velocity


@pytest.mark.parametrize(("family", "guidance"), GUIDED)
def test_a_prompts_condition_does_not_depend_on_the_others(family, guidance):
    """Nor on its place among them, bit for bit. In batches of one matrix products have another
    shape: encodings of up to 5 differ by up to 1e-6 when measured."""
    spec = spec_of(family, f"sampling.guidance={guidance}")
    policy: Any = load_policy(spec, CPU, frozenset({"encoder"}))
    words = WORDS[:3] if family in EDITING else WORDS  # each is encoded alone at any rate
    prompts = [*PROMPTS, *(f"{PROMPTS[0]} {word}" for word in words)]
    together = encoded(policy, prompts)
    shuffled = encoded(policy, prompts[::-1])[::-1]
    for index, condition in enumerate(together):
        assert same(condition, shuffled[index])
    (apart,) = encoded(policy, [prompts[5]])
    assert same(apart, together[5])
    first, other = together[0], together[1]
    assert any(first[name].tobytes() != other[name].tobytes() for name in first)
    batch, policy.encoded_at_once = policy.encoded_at_once, 1
    for condition, single in zip(together, encoded(policy, prompts), strict=True):
        for name, array in single.items():
            difference = np.abs(array - condition[name]).max()
            assert difference <= (3e-6 if batch > 1 else 0)


def same(one: Condition, other: Condition) -> bool:
    """Bit for bit."""
    assert one.keys() == other.keys()
    return all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.parametrize("family", MODELS)
def test_who_never_trains_needs_no_masters(family):
    """Published weights in half precision where autocast casts them anyway: the same bits."""
    spec = spec_of(family, "tuning={kind: full}", "model.dtype=bfloat16")
    trained, sampling = (
        load_policy(spec, CPU, frozenset({"network", "decoder"}), masters=masters)
        for masters in (True, False)
    )
    for policy in (trained, sampling):
        policy.tune(spec.seed, with_reference=False)
    perturb(trained, size=0.1)
    found, arrays = gather(trained.trainable(), keep=True, dtypes=trained.halved(trained.network))
    load_arrays(sampling.trainable(), arrays)
    assert digest(sampling.trainable()) == found != digest(trained.trainable())
    overrides = ("tuning={kind: full}", "model.dtype=bfloat16")
    assert torch.equal(
        velocity(trained, (0, 1, 2), *overrides), velocity(sampling, (0, 1, 2), *overrides)
    )
    sizes = [sum(p.nbytes for p in of.network.parameters()) for of in (trained, sampling)]
    halves = [trained.network.get_parameter(n) for n in trained.halved(trained.network)]
    assert sizes[0] - sizes[1] == sum(2 * p.numel() for p in halves if p.dtype == torch.float32)
    assert sum(array.nbytes for array in arrays.values()) == sum(
        p.nbytes for p in sampling.trainable().values()
    )
    assert sizes[0] - sizes[1] > 0.9 * 2 * sum(p.numel() for p in trained.trainable().values())


@pytest.mark.parametrize(("family", "guidance"), GUIDED)
def test_a_velocity_does_not_depend_on_the_batch(family, guidance):
    """Padding and masks change nothing. Matrix products of other shapes sum in another order:
    velocities of up to 7 differ by up to 7e-6 when measured, whether padded or not."""
    override = f"sampling.guidance={guidance}"
    policy = load_policy(spec_of(family, override), CPU, frozenset({"network", "decoder"}))
    conditions, x = conditions_of(family, override), noise(policy, 3)
    together = velocity(policy, (0, 1, 2), override)
    with torch.no_grad():
        for i in range(3):
            condition = batch_condition(policy, conditions, (i,))
            assert (policy.velocity(x[i : i + 1], 0.5, condition) - together[i]).abs().max() < 2e-5
    assert (velocity(policy, (1, 2, 0), override) - together).abs().max() > 0.1, "prompts count"


@pytest.mark.parametrize(("family", "guidance"), GUIDED)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_bfloat16_is_near_float32_and_trains(family, guidance, tuning):
    """bfloat16 keeps 8 bits, of which some are lost on the way: measured, 0.3 to 2 % on average."""
    overrides = (f"sampling.guidance={guidance}", TUNINGS[tuning])
    exact = velocity(sampler(spec_of(family, *overrides)), (0, 2), *overrides)
    half = spec_of(family, *overrides, "model.dtype=bfloat16")
    policy = load_policy(half, CPU, frozenset({"network", "decoder"}))
    policy.tune(half.seed, with_reference=False)
    rounded = velocity(policy, (0, 2), *overrides)
    difference = (rounded.float() - exact).abs().mean() / exact.abs().mean()
    assert 0 < difference < 0.04
    condition = batch_condition(policy, conditions_of(family, *overrides), (0, 2))
    policy.velocity(noise(policy, 2), 0.5, condition).float().square().sum().backward()
    found = [p.grad for p in policy.trainable().values() if p.grad is not None]
    assert {g.dtype for g in found} == {torch.float32}
    assert all(g.isfinite().all() for g in found)
    assert any(g.abs().max() > 0 for g in found)


# --- tuning


@pytest.mark.parametrize("family", MODELS)
def test_the_default_targets_hit_every_block(family):
    from peft.tuners.tuners_utils import BaseTunerLayer

    policy = sampler(spec_of(family, TUNINGS["lora"]))
    blocks = {n: m for n, m in policy.network.named_modules() if type(m) in policy.block_classes()}
    adapted = [n for n, m in policy.network.named_modules() if isinstance(m, BaseTunerLayer)]
    assert len(blocks) >= 2
    for block in blocks:
        assert any(name.startswith(f"{block}.") for name in adapted), block
    for target in policy.lora_targets:
        assert any(name.endswith(f".{target}") for name in adapted), target


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_reference_is_the_untrained_model(family, tuning):
    overrides = (guided(family), TUNINGS[tuning])
    policy = load_policy(spec_of(family, *overrides), CPU, frozenset({"network", "decoder"}))
    untrained = velocity(policy, (0, 2), *overrides)
    policy.tune(seed=3, with_reference=True)
    perturb(policy)
    trained = velocity(policy, (0, 2), *overrides)
    assert (trained - untrained).abs().max() > 1e-2
    with policy.reference():
        assert torch.equal(velocity(policy, (0, 2), *overrides), untrained)
    assert torch.equal(velocity(policy, (0, 2), *overrides), trained)


# --- training


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_replayed_trajectory_has_a_log_ratio_of_exactly_zero(family, dtype, tuning):
    overrides = (guided(family), f"model.dtype={dtype}", TUNINGS[tuning])
    worker = sampler(spec_of(family, *overrides))
    perturb(worker)
    rank = load_policy(spec_of(family, *overrides), CPU, frozenset({"network"}))
    rank.tune(seed=3, with_reference=False)
    load_arrays(rank.trainable(), share(worker.trainable(), 0, 1))
    conditions = conditions_of(family, *overrides)
    for prompts in ((0, 0, 0), (0, 1, 2)):  # of one length, and of several
        batch = draw_batch_of(worker, conditions, prompts)
        condition = batch_condition(rank, conditions, prompts)
        for step in replay(rank, batch.trajectory, batch.unit.schedule, condition):
            assert step.log_ratio.requires_grad
            assert torch.equal(step.log_ratio, torch.zeros(3))


@pytest.mark.parametrize("family", MODELS)
def test_a_finished_image_is_trained_with_the_velocities_it_was_sampled_with(family):
    """DiffusionNFT: the change of velocity is exactly 0 before the first update, which moves."""
    spec = spec_of(family, guided(family), TUNINGS["lora"], *NFT)
    learner, worker = Learner(spec, CPU), sampler(spec)
    ticket, arrays = learner.publish(0)
    load_arrays(worker.trainable(), arrays)
    conditions = conditions_of(family, guided(family), TUNINGS["lora"])
    batch = draw_batch_of(worker, conditions, ticket=ticket, noising=spec.objective.noising)
    stats = batch.into(learner)
    assert (stats.gate_max, stats.gated) == (0, True)
    assert learner.step(batch.unit.batch, len(batch.unit.points)).grad_norm


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_an_update_moves_weights_that_the_sampler_then_holds(family, tuning):
    overrides = (guided(family), TUNINGS[tuning])
    conditions = conditions_of(family, *overrides)
    learner, worker = (
        Learner(spec_of(family, *overrides), CPU),
        sampler(spec_of(family, *overrides)),
    )
    digests: list[str] = []
    for version in range(3):
        ticket, arrays = learner.publish(version)
        load_arrays(worker.trainable(), arrays)
        assert digest(worker.trainable()) == ticket.digest
        digests.append(ticket.digest)
        batch = draw_batch_of(worker, conditions, ticket=ticket)
        assert batch.into(learner).gate_max == 0
        assert learner.step(batch.unit.batch, 2).grad_norm
    assert len(set(digests)) == 3


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_activation_checkpointing_changes_no_bit(family, tuning):
    plain, recomputed = (
        gradients_and_calls(family, tuning, f"cluster.learner.activation_checkpointing={on}")
        for on in ("false", "true")
    )
    assert largest_difference(plain[0], recomputed[0]) == 0
    assert recomputed[1] == 2 * plain[1], "the blocks ran again in the backward pass"


def gradients_and_calls(family: str, tuning: str, override: str) -> tuple[dict[str, Any], int]:
    """Of one micro-batch of prompts of several lengths; the calls are those of blocks."""
    overrides = (guided(family), TUNINGS[tuning], override)
    learner, worker = (
        Learner(spec_of(family, *overrides), CPU),
        sampler(spec_of(family, *overrides)),
    )
    ticket, arrays = learner.publish(0)
    load_arrays(worker.trainable(), arrays)
    batch = draw_batch_of(worker, conditions_of(family, *overrides), ticket=ticket)
    calls: list[object] = []
    for module in learner.policy.network.modules():
        if isinstance(module, learner.policy.block_classes()):
            module.register_forward_pre_hook(lambda block, _: calls.append(block))
    batch.into(learner)
    return {name: g.numpy() for name, g in gradients(learner).items()}, len(calls)


CASES = [(family, tuning) for family in MODELS for tuning in TUNINGS]
TWO_RANKS = (
    "objective={kind: flow_grpo, clip_low: 0.5, clip_high: 0.5, updates: 1}",
    "cluster.learner.activation_checkpointing=true",  # which FSDP must bear too
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[tuple[str, str], tuple[Any, Any]]:
    """By family and tuning: what one process and what two make of the same micro-batches."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    other = torch.multiprocessing.spawn(train_as_second_rank, (folder,), join=False, daemon=True)
    cases = {}
    for family, tuning in CASES:
        spec = spec_of(family, guided(family), TUNINGS[tuning], *TWO_RANKS)
        worker = sampler(spec)
        perturb(worker)
        conditions = conditions_of(family, guided(family))
        batches = [
            draw_batch_of(worker, conditions, (0, 2), window=range(1, 2), index=i) for i in (0, 1)
        ]
        cases[family, tuning] = (spec, batches)
    single = {name: train_once(spec, batches, batches) for name, (spec, batches) in cases.items()}
    while not (folder / "ready").exists():
        other.join(timeout=0.1)  # raises if it died
    listener = meeting()
    partial = folder / "partial"
    partial.write_bytes(pickle.dumps((listener.getsockname(), cases)))
    partial.rename(folder / "cases.pickle")
    torch.distributed.destroy_process_group()
    both = train_as_rank(0, folder, listener)
    join_group(0, 1, meeting(), CPU)  # alone again
    while not other.join():
        pass
    return {case: (single[case], both[case]) for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_ranks_train_as_one_process(ranks, case):
    """Bit for bit: a sum of two micro-batches has one order, and their mean is a half of it."""
    (gradient, state), (sharded_gradient, sharded_state) = ranks[case]
    assert max(np.abs(g).max() for g in gradient.values()) > 1e-3
    assert largest_difference(gradient, sharded_gradient) == 0
    assert largest_difference(state.weights, sharded_state.weights) == 0
    assert largest_difference(state.exp_avg, sharded_state.exp_avg) == 0
