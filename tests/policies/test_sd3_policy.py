"""The Stable Diffusion 3 policy against plain diffusers, on the embedded model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import (
    CPU,
    FULL,
    LORA,
    PROMPTS,
    SIZE,
    TUNINGS,
    UNTRAINED,
    conditions,
    one_thread,
    perturb,
    sampler,
    schedule,
    small_spec,
    unit,
)

from flowgrpo_ray.algorithm.sampling import INITIAL, batch_condition, draw_noise, rollout
from flowgrpo_ray.common.errors import ModelError, SpecError
from flowgrpo_ray.common.types import Condition
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.base import Policy

MODEL = small_spec().model.folder
STEPS = 10


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Plain diffusers on the same folder."""
    from diffusers import StableDiffusion3Pipeline

    loaded = StableDiffusion3Pipeline.from_pretrained(MODEL, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def policy() -> Policy:
    """The base model, not tuned."""
    return load_policy(small_spec(), CPU, frozenset({"network", "decoder"}))


def encoded_alone(guidance: float) -> Mapping[int, Condition]:
    """Of each prompt in a batch of its own, as the pipeline encodes one."""
    spec = small_spec(f"sampling.guidance={guidance}")
    encoder: Any = load_policy(spec, CPU, frozenset({"encoder"}))
    encoder.encoded_at_once = 1
    return dict(enumerate(encoder.encode(PROMPTS)))


def ode_samples(policy: Policy, prompts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial noise and final latents of deterministic sampling through ``rollout``."""
    of = unit(schedule(range(0), steps=STEPS), prompts, tuple(range(len(prompts))))
    _, x = rollout(policy, of, encoded_alone(policy.guidance), SIZE, UNTRAINED)
    return draw_noise(of, INITIAL, tuple(x.shape[1:])), x


def call(pipe: Any, guidance: float, noise: torch.Tensor, output: str, **prompt: Any) -> Any:
    return pipe(
        **prompt,
        latents=noise,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        max_sequence_length=10,
        output_type=output,
    ).images


def guided_policy(guidance: float, policy: Policy) -> Policy:
    """``policy`` with another guidance; nothing else of it depends on that."""
    spec = small_spec(f"sampling.guidance={guidance}")
    made = load_policy(spec, CPU, frozenset())
    made.network, made.vae = policy.network, policy.vae  # type: ignore[attr-defined]
    return made


# --- sampling


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ode_sampling_is_the_pipelines_bit_for_bit(pipe, policy, guidance):
    """Several images of one prompt: the pipeline too encodes the prompt once."""
    noise, x = ode_samples(guided_policy(guidance, policy), (1, 1, 1))
    theirs = call(pipe, guidance, noise, "latent", prompt=PROMPTS[1], num_images_per_prompt=3)
    assert torch.equal(x, theirs)
    pictures = call(pipe, guidance, noise, "pil", prompt=PROMPTS[1], num_images_per_prompt=3)
    images = guided_policy(guidance, policy).decode(x)
    assert np.array_equal(images, np.stack([np.asarray(p) for p in pictures]))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ode_sampling_of_several_prompts(pipe, policy, guidance):
    """The pipeline encodes the prompts in one batch and we one by one, so matrix products round
    differently: measured, latents (up to 3) differ by 2e-6, and where a pixel's value lies that
    near the middle of two integers it is rounded to the other: one of 13,824 with guidance 3."""
    guided = guided_policy(guidance, policy)
    noise, x = ode_samples(guided, (0, 1, 2))
    theirs = call(pipe, guidance, noise, "latent", prompt=list(PROMPTS))
    assert (x - theirs).abs().max() < 2e-5
    pictures = call(pipe, guidance, noise, "pil", prompt=list(PROMPTS))
    off = np.abs(guided.decode(x).astype(int) - np.stack([np.asarray(p) for p in pictures]))
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-3


def test_guidance_changes_the_samples(policy):
    _, plain = ode_samples(policy, (0,))
    _, guided = ode_samples(guided_policy(3.0, policy), (0,))
    assert (plain - guided).abs().max() > 0.1


def test_decoded_images_are_uint8_with_channels_last(policy):
    _, x = ode_samples(policy, (0, 1))
    images = policy.decode(x)
    assert (images.shape, images.dtype) == ((2, *SIZE, 3), np.uint8)
    red, blue = images.astype(int).mean((1, 2))
    assert red[0] > red[2], "the red sign"
    assert blue[2] > blue[0], "the blue sign"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_prompts_condition_does_not_depend_on_the_others(guidance):
    together = conditions(guidance)
    encoder = load_policy(small_spec(f"sampling.guidance={guidance}"), CPU, frozenset({"encoder"}))
    names = {"embeds", "pooled"}
    if guidance > 1:
        names |= {"negative_embeds", "negative_pooled"}
    for index in (2, 0):
        (apart,) = encoder.encode([PROMPTS[index]])
        assert apart.keys() == together[index].keys() == names
        for name in names:
            assert apart[name].tobytes() == together[index][name].tobytes()
    assert not np.array_equal(together[0]["embeds"], together[1]["embeds"])


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_sigmas_are_the_schedulers(policy, steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(MODEL, subfolder="scheduler")
    scheduler.set_timesteps(steps)
    found = policy.sigmas(steps, SIZE)
    assert torch.equal(torch.tensor(found), scheduler.sigmas)
    assert (len(found), found[0], found[-1]) == (steps + 1, 1.0, 0.0)


def test_sigmas_follow_the_models_own_shift(tmp_path):
    """A shift of 3, as Stable Diffusion 3.5 has, keeps the noise high for longer."""
    shutil.copyfile(MODEL / "model_index.json", tmp_path / "model_index.json")
    shutil.copytree(MODEL / "scheduler", tmp_path / "scheduler")
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"shift": 1.0', '"shift": 3.0'))
    shifted = load_policy(small_spec(f"model.path={tmp_path}"), CPU, frozenset())
    plain = np.array(load_policy(small_spec(), CPU, frozenset()).sigmas(4, SIZE))
    found = np.array(shifted.sigmas(4, SIZE))
    assert (found[1:-1] > plain[1:-1]).all()
    assert (found[0], found[-1]) == (1.0, 0.0)


# --- sizes


def test_latent_shape_fits_the_network(policy):
    assert policy.latent_shape((32, 48)) == (4, 8, 12)
    assert policy.latent_shape((64, 16)) == (4, 16, 4)


@pytest.mark.parametrize("size", [(32, 44), (36, 48), (33, 48)])
def test_latent_shape_refuses_what_the_patches_do_not_divide(policy, size):
    with pytest.raises(SpecError, match=r"sampling\.size.*multiples of 8") as error:
        policy.latent_shape(size)
    assert str(list(size)) in str(error.value)


@pytest.mark.parametrize("size", [(72, 32), (32, 128)])
def test_latent_shape_refuses_more_patches_than_the_network_has_positions_for(policy, size):
    """64 pixels is this network's limit (``pos_embed_max_size`` 8); beyond, diffusers raises an
    error about the network, in a worker, that names no key of the spec."""
    with pytest.raises(SpecError, match=r"sampling\.size"):
        policy.latent_shape(size)


# --- loading


@pytest.mark.parametrize(
    ("missing", "part"),
    [
        ("transformer", "network"),
        ("vae", "decoder"),
        ("text_encoder_3", "encoder"),
        ("tokenizer_2", "encoder"),
        ("model_index.json", "encoder"),
    ],
)
def test_a_missing_part_is_an_error_that_names_the_model(tmp_path, missing, part):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns(missing))
    with pytest.raises(ModelError, match=r"model\.path") as error:
        load_policy(small_spec(f"model.path={folder}"), CPU, frozenset({part}))
    assert str(folder) in str(error.value)


def test_a_missing_scheduler_is_an_error_that_names_the_model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("scheduler"))
    policy = load_policy(small_spec(f"model.path={folder}"), CPU, frozenset())
    with pytest.raises(ModelError, match=r"model\.path.*'scheduler'"):
        policy.sigmas(4, SIZE)


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "network"),
        ("text_encoder/model.safetensors", "encoder"),
    ],
)
def test_a_cut_off_file_is_an_error_that_names_the_model(tmp_path, file, part):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (folder / file).write_bytes((MODEL / file).read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model\.path"):
        load_policy(small_spec(f"model.path={folder}"), CPU, frozenset({part}))


def test_a_folder_that_is_not_there_is_an_error_that_names_the_model(tmp_path):
    with pytest.raises(ModelError, match=r"model\.path.*nowhere"):
        load_policy(small_spec(f"model.path={tmp_path / 'nowhere'}"), CPU, frozenset({"network"}))


# --- tuning


def velocity(policy: Policy) -> torch.Tensor:
    """At a fixed place between noise and data."""
    condition = batch_condition(policy, conditions(policy.guidance), (0, 1))
    x = torch.randn((2, 4, 8, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.velocity(x, 0.6, condition)


def tuned(*overrides: str) -> Policy:
    made = load_policy(small_spec(*overrides), CPU, frozenset({"network"}))
    made.tune(seed=3, with_reference=True)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_adapters_change_nothing(dtype):
    """LoRA's B is 0 at the start: the velocity is the base model's, bit for bit."""
    base = load_policy(small_spec(LORA, f"model.dtype={dtype}"), CPU, frozenset({"network"}))
    before = velocity(base)
    base.tune(seed=3, with_reference=True)
    assert len(base.trainable()) > 10
    assert torch.equal(velocity(base), before)


def test_adapters_are_drawn_from_the_seed_alone():
    torch.manual_seed(1)
    first = tuned(LORA).trainable()
    torch.manual_seed(2)
    again = tuned(LORA).trainable()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = load_policy(small_spec(LORA), CPU, frozenset({"network"}))
    other.tune(seed=4, with_reference=True)
    assert not all(torch.equal(first[name], p) for name, p in other.trainable().items())


def test_targets_that_fit_no_layer_are_an_error_that_names_the_key():
    policy = load_policy(
        small_spec("tuning={kind: lora, rank: 4, alpha: 8, targets: [nothing]}"),
        CPU,
        frozenset({"network"}),
    )
    with pytest.raises(SpecError, match=r"tuning\.targets.*nothing"):
        policy.tune(seed=0, with_reference=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_reference_stays_the_untrained_model(tuning, dtype):
    policy = tuned(TUNINGS[tuning], f"model.dtype={dtype}")
    untrained = velocity(policy)
    perturb(policy)
    trained = velocity(policy)
    assert (trained - untrained).abs().max() > 1e-2
    with policy.reference():
        assert torch.equal(velocity(policy), untrained)
    assert torch.equal(velocity(policy), trained)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_reference_ends_with_its_block_even_after_an_error(tuning):
    policy = tuned(TUNINGS[tuning])
    perturb(policy)
    trained, names = velocity(policy), list(policy.trainable())
    with pytest.raises(ZeroDivisionError), policy.reference():
        raise ZeroDivisionError
    assert torch.equal(velocity(policy), trained)
    assert list(policy.trainable()) == names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_trainable_parameters_are_float32(tuning, dtype):
    policy = tuned(TUNINGS[tuning], f"model.dtype={dtype}")
    trainable = policy.trainable()
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    frozen = [p for p in policy.network.parameters() if not p.requires_grad]
    if tuning == "full":
        assert not frozen
        assert len(trainable) == len(list(policy.network.parameters()))
    else:
        assert all("lora_" in name for name in trainable)
        assert {p.dtype for p in frozen} == {getattr(torch, dtype)}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_bfloat16_is_near_float32_and_trains(tuning, guidance):
    """bfloat16 keeps 8 bits: velocities of size 1 to 4 differ by 0.03 when measured (0.1 with
    guidance 3, which multiplies differences)."""
    exact = velocity(tuned(tuning, f"sampling.guidance={guidance}"))
    policy = tuned(tuning, "model.dtype=bfloat16", f"sampling.guidance={guidance}")
    rounded = velocity(policy)
    difference = (rounded.float() - exact).abs().max()
    assert 0 < difference < (0.08 if guidance == 1 else 0.3)
    condition = batch_condition(policy, conditions(guidance), (0, 1))
    policy.velocity(torch.ones(2, 4, 8, 12), 0.6, condition).float().square().sum().backward()
    gradients = [p.grad for p in policy.trainable().values() if p.grad is not None]
    assert {g.dtype for g in gradients} == {torch.float32}
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


def test_a_bfloat16_worker_samples_and_decodes():
    policy = sampler(small_spec("model.dtype=bfloat16"))
    _, x = ode_samples(policy, (0, 1))
    assert x.dtype == torch.float32
    _, exact = ode_samples(sampler(small_spec()), (0, 1))
    images = [p.astype(int) for p in (policy.decode(x), policy.decode(exact))]
    assert np.abs(images[0] - images[1]).mean() < 8, "of 255"
