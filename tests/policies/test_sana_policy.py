"""What is SANA's own; ``test_policy_contract.py`` holds the policy against its pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import (
    conditions_of,
    load_pipe,
    model_folder,
    pipeline_images,
    schedule_of,
    spec_of,
)
from tiny_runs import CPU, UNTRAINED, one_thread, unit

from flowgrpo_ray.algorithm.sampling import INITIAL, draw_noise, rollout
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.policies.sana import LinearAttention
from flowgrpo_ray.run.checkpoint import Progress
from flowgrpo_ray.run.model_card import Exported, model_card

GUIDED = "sampling.guidance=4.5"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def sana(*overrides: str) -> Policy:
    return load_policy(spec_of("sana", *overrides), CPU, frozenset({"network", "decoder"}))


def test_prompts_are_read_behind_the_instruction_and_the_negative_one_is_not():
    plain, guided = conditions_of("sana")[0], conditions_of("sana", GUIDED)[0]
    assert {name: array.shape for name, array in plain.items()} == {
        "embeds": (40, 32),
        "mask": (40,),
    }
    assert guided["embeds"].tobytes() == plain["embeds"].tobytes()
    pipe = load_pipe(model_folder("sana"))
    with torch.no_grad():
        embeds, mask, *_ = pipe.encode_prompt(
            [""], False, max_sequence_length=40, complex_human_instruction=None
        )
    assert (embeds[0] - torch.from_numpy(guided["negative_embeds"])).abs().max() < 1e-5
    assert guided["negative_mask"].tolist() == mask[0].tolist() == [1] + [0] * 39
    assert plain["mask"].sum() > 10


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("size", [(32, 32), (160, 96)])
def test_odd_sizes_and_prompts_of_every_length_are_drawn_as_the_pipeline_draws_them(guidance, size):
    """An empty prompt, one that is cut and one of two letters, in one batch. Measured: no
    difference."""
    prompts = ["", "A very long sign, " * 9, "X "]
    spec = spec_of("sana", f"sampling.guidance={guidance}", f"sampling.size={list(size)}")
    policy: Any = load_policy(spec, CPU)
    policy.encoded_at_once = 3
    conditions = dict(enumerate(policy.encode(prompts)))
    of = unit(schedule_of(policy, range(0), 4), (0, 1, 2), (0, 1, 2))
    _, x = rollout(policy, of, conditions, size, UNTRAINED)
    start = draw_noise(of, INITIAL, tuple(x.shape[1:]))
    pipe = load_pipe(model_folder("sana"))
    drawn = pipeline_images(pipe, prompts, start, 4, guidance, size, "latent")
    assert (x - drawn).abs().max() < 2e-5
    assert (x[0] - x[1]).abs().max() > 0.01


@pytest.mark.parametrize(("overrides", "shift"), [((), 3.0), (("model.shift=2",), 2.0)])
def test_noise_levels_have_the_shift_of_the_models_own_scheduler(overrides, shift):
    """Which takes other steps: of a solver of second order."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    euler.set_timesteps(7)
    assert sana(*overrides).sigmas(7, (64, 96)) == tuple(euler.sigmas.tolist())


def test_linear_attention_is_diffusers_and_stays_in_float32_under_autocast():
    from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0

    network: Any = sana().network
    attention = network.transformer_blocks[0].attn1
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(attention(x), SanaLinearAttnProcessor2_0()(attention, x))
        half, given = attention.to(torch.bfloat16), x.to(torch.bfloat16)
        theirs = SanaLinearAttnProcessor2_0()(half, given)  # as the pipeline has it
        with torch.autocast("cpu", torch.bfloat16):
            ours, rounded = half(given), SanaLinearAttnProcessor2_0()(half, given)
    assert torch.equal(ours, theirs)
    assert not torch.equal(rounded, theirs)
    assert isinstance(attention.processor, LinearAttention)


def test_prompts_are_counted_as_the_pipeline_cuts_them():
    """In lower case, without the spaces around; a byte is a token, and one begins them."""
    tokens = load_policy(spec_of("sana"), CPU, frozenset()).reading().load()
    pipe = load_pipe(model_folder("sana"))
    for length in (30, 60):
        text = "A" * length
        with torch.no_grad():
            _, mask, *_ = pipe.encode_prompt(
                [text],
                False,
                max_sequence_length=40,
                complex_human_instruction=load_policy(
                    spec_of("sana"), CPU, frozenset()
                ).instruction,
            )
        cut = tokens.cut(f" {text} ", 40)
        assert (cut is None) == (length == 30)
        assert int(mask.sum()) == 40 if cut else int(mask.sum()) < 40


@pytest.mark.parametrize(
    ("override", "shift"),
    [("seed=7", "pipe.scheduler.config.flow_shift"), ("model.shift=2", "2.0")],
)
def test_the_model_card_draws_in_euler_steps(override, shift):
    spec = spec_of("sana", override)
    policy = sana(override)
    progress = Progress(1, 4, 1.0, 0, spec.identity(), "")
    call = (policy.call_arguments, progress, {}, policy.call_takes_length, policy.call_scheduler)
    card = model_card(spec, Exported("pipeline", "ema", *call))
    assert "from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler\n" in card
    assert f"pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift})\n" in card
    assert "    max_sequence_length=40,\n    guidance_scale=1.0,\n" in card
