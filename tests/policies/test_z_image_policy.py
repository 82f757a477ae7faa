"""What is Z-Image's own; ``test_policy_contract.py`` holds the policy against its pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    PROMPTS,
    conditions_of,
    load_pipe,
    model_folder,
    pipeline_images,
    schedule_of,
    spec_of,
)
from tiny_runs import CPU, LORA, UNTRAINED, one_thread, sampler, unit

from flowgrpo_ray.algorithm.sampling import INITIAL, batch_condition, draw_noise, rollout
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.policies.z_image import ZImagePolicy
from flowgrpo_ray.run.checkpoint import Progress
from flowgrpo_ray.run.model_card import Exported, model_card

GUIDED = "sampling.guidance=3.0"
TEMPLATE = 8  # tokens around a prompt: a turn of the user, and the beginning of the answer


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def z_image(*overrides: str) -> Policy:
    return load_policy(spec_of("z_image", *overrides), CPU, frozenset({"network", "decoder"}))


def test_conditions_are_the_prompts_own_tokens():
    """Of the layer before the last, without padding; the template's tokens are kept."""
    pipe = load_pipe(model_folder("z_image"))
    lengths = [len(pipe.tokenizer(prompt).input_ids) + TEMPLATE for prompt in PROMPTS]
    assert len(set(lengths)) == 3
    for prompt, length in enumerate(lengths):
        plain, guided = conditions_of("z_image")[prompt], conditions_of("z_image", GUIDED)[prompt]
        assert {name: array.shape for name, array in plain.items()} == {"embeds": (length, 32)}
        assert guided["embeds"].tobytes() == plain["embeds"].tobytes()
        assert guided["negative_embeds"].shape == (TEMPLATE, 32)
    text = f"<|im_start|>user\n{PROMPTS[0]}<|im_end|>\n<|im_start|>assistant\n"
    with torch.no_grad():
        layers = pipe.text_encoder(
            **pipe.tokenizer([text], return_tensors="pt"), output_hidden_states=True
        ).hidden_states
    found = torch.from_numpy(conditions_of("z_image")[0]["embeds"])
    assert (layers[-2][0] - found).abs().max() < 1e-5
    assert (layers[-1][0] - found).abs().max() > 0.1


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("size", [(16, 16), (80, 144), (208, 48)])
def test_odd_sizes_and_prompts_of_every_length_are_drawn_as_the_pipeline_draws_them(guidance, size):
    """An empty prompt, one as long as may be and one of two tokens, in one batch: 1, 45 and 39
    tokens of an image, of which none fills up 32. Measured: no difference."""
    prompts = ["", "a very long sign, " * 9, "x"]
    spec = spec_of(
        "z_image",
        f"sampling.guidance={guidance}",
        f"sampling.size={list(size)}",
    )
    policy: Any = load_policy(spec, CPU)
    policy.encoded_at_once = 1
    conditions = dict(enumerate(policy.encode(prompts)))
    assert [len(conditions[i]["embeds"]) for i in range(3)] == [TEMPLATE, 40, TEMPLATE + 1]
    schedule = schedule_of(policy, range(0), 4)
    of = unit(schedule, (0, 1, 2), (0, 1, 2))
    _, x = rollout(policy, of, conditions, size, UNTRAINED)
    start = draw_noise(of, INITIAL, tuple(x.shape[1:]))
    pipe = load_pipe(model_folder("z_image"))
    drawn = pipeline_images(pipe, prompts, start, 4, guidance, size, "latent")
    assert (x - drawn).abs().max() < 2e-5
    assert (x[0] - x[2]).abs().max() > 0.1


def test_guidance_is_what_the_pipelines_scale_has_beyond_one():
    """``v = u + g (c - u)``, noise - data: minus what the network says, of one pass of two."""
    guided, plain = z_image(GUIDED), z_image()
    condition = batch_condition(guided, conditions_of("z_image", GUIDED), (0, 2))
    x = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    times: list[torch.Tensor] = []
    guided.network.register_forward_pre_hook(lambda _, given: times.append(given[1]))
    with torch.no_grad():
        found = guided.velocity(x, 0.75, condition)
        c = plain.velocity(x, 0.75, condition)
        swapped = {f"embeds.{i}": condition[f"negative_embeds.{i}"] for i in range(2)}
        u = plain.velocity(x, 0.75, swapped)
        texts = [condition[f"embeds.{i}"][0] for i in range(2)]
        raw: Any = plain.network(list(x[:, :, None]), torch.full((2,), 0.25), texts)
    assert torch.equal(c, -torch.stack(raw.sample)[:, :, 0])
    assert (found - (u + 3 * (c - u))).abs().max() < 2e-5
    assert (found - c).abs().max() > 0.1
    assert [time.tolist() for time in times] == [[0.25] * 4]
    assert (ZImagePolicy.passes(1), ZImagePolicy.passes(3)) == (1, 2)


def test_every_block_is_adapted_the_refiners_too():
    """Two blocks, one that refines the image and one the text: seven layers of each, A and B."""
    policy = sampler(spec_of("z_image", LORA))
    assert len(policy.trainable()) == (2 + 1 + 1) * 7 * 2
    assert {name.split(".")[0] for name in policy.trainable()} == {
        *("layers", "noise_refiner", "context_refiner")
    }


@pytest.mark.parametrize(("overrides", "shift"), [((), 6.0), (("model.shift=3",), 3.0)])
def test_noise_levels_have_one_shift_at_every_size(overrides, shift):
    s = np.linspace(1, 1 / 7, 7)
    expected = (*(shift * s / (1 + (shift - 1) * s)), 0)
    for size in ((32, 48), (1024, 1024)):
        assert z_image(*overrides).sigmas(7, size) == pytest.approx(expected, abs=1e-6)


def test_the_network_has_positions_for_so_many_tokens_and_pixels():
    """1504 of a prompt, and one more has none; 512 of an image's side."""
    policy = z_image()
    assert policy.latent_shape((8192, 16)) == (16, 1024, 2)
    with pytest.raises(SpecError, match=r"sampling\.size = \[16, 8208\] is too large.*to 8192"):
        policy.latent_shape((16, 8208))
    x = torch.zeros(1, 16, 4, 6)
    with torch.no_grad():
        policy.velocity(x, 0.5, {"embeds.0": torch.zeros(1, ZImagePolicy.max_tokens, 32)})
        with pytest.raises(IndexError):
            policy.velocity(x, 0.5, {"embeds.0": torch.zeros(1, ZImagePolicy.max_tokens + 1, 32)})


@pytest.mark.parametrize(("guidance", "scale"), [(1.0, "0.0"), (5.0, "4.0")])
def test_the_model_card_gives_the_pipelines_scale(guidance, scale):
    spec = spec_of("z_image", f"sampling.guidance={guidance}")
    progress = Progress(1, 4, 1.0, 0, spec.identity(), "")
    card = model_card(spec, Exported("pipeline", "ema", ZImagePolicy.call_arguments, progress, {}))
    assert f"    guidance_scale={scale},\n" in card


def test_prompts_are_counted_with_the_chat_around_them():
    """As many tokens as their conditions have, which hold no padding."""
    policy = load_policy(spec_of("z_image"), CPU, frozenset())
    tokens = policy.reading().load()
    for prompt, condition in zip(PROMPTS, conditions_of("z_image").values(), strict=True):
        length = len(condition["embeds"])
        if length < policy.model.max_sequence_length:
            assert tokens.cut(prompt, length) is None
            assert tokens.cut(prompt, length - 1)[0] == length
