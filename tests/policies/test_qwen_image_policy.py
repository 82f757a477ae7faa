"""What is Qwen-Image's own; ``test_policy_contract.py`` holds the policy against its pipeline."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tiny_models import PROMPTS, conditions_of, load_pipe, model_folder, spec_of
from tiny_runs import CPU, LORA, one_thread, sampler

from flowgrpo_ray.algorithm.sampling import batch_condition
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.policies.qwen_image import QwenImagePolicy

GUIDED = "sampling.guidance=4.0"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def qwen(*overrides: str) -> Policy:
    return load_policy(spec_of("qwen_image", *overrides), CPU, frozenset({"network", "decoder"}))


def test_conditions_are_the_prompts_own_tokens():
    """The template's 34 tokens before the prompt are dropped; its five behind it stay."""
    tokenizer = load_pipe(model_folder("qwen_image")).tokenizer
    lengths = [len(tokenizer(prompt).input_ids) for prompt in PROMPTS]
    assert len(set(lengths)) == 3
    for prompt, length in enumerate(lengths):
        plain, guided = conditions_of("qwen_image")[prompt], conditions_of("qwen_image", GUIDED)
        assert {name: array.shape for name, array in plain.items()} == {"embeds": (length + 5, 32)}
        assert guided[prompt]["embeds"].tobytes() == plain["embeds"].tobytes()
        assert guided[prompt]["negative_embeds"].shape == (1 + 5, 32)


def test_long_prompts_are_cut_as_the_pipeline_cuts_them():
    short = conditions_of("qwen_image", "model.max_sequence_length=7")
    for prompt, whole in conditions_of("qwen_image").items():
        assert np.array_equal(short[prompt]["embeds"], whole["embeds"][:7])


def test_only_prompts_of_several_lengths_are_padded_and_masked():
    policy, conditions = qwen(GUIDED), conditions_of("qwen_image", GUIDED)
    lengths = [len(conditions[prompt]["embeds"]) for prompt in range(3)]
    same = batch_condition(policy, conditions, (0, 0))
    assert same.keys() == {"embeds", "negative_embeds"}
    mixed = batch_condition(policy, conditions, (0, 1, 2))
    assert mixed.keys() == {"embeds", "embeds_mask", "negative_embeds"}
    assert mixed["embeds"].shape == (3, max(lengths), 32)
    assert mixed["embeds_mask"].sum(1).tolist() == lengths


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_each_pass_has_its_own_text(guidance):
    override = f"sampling.guidance={guidance}"
    policy = qwen(override)
    condition = batch_condition(policy, conditions_of("qwen_image", override), (0, 1))
    texts: list[tuple[int, ...]] = []
    policy.network.register_forward_pre_hook(
        lambda _, __, given: texts.append(tuple(given["encoder_hidden_states"].shape)),
        with_kwargs=True,
    )
    policy.velocity(torch.zeros(2, 16, 4, 6), 0.5, condition)
    expected = [tuple(condition["embeds"].shape), (2, 6, 32)]
    assert texts == expected[: QwenImagePolicy.passes(guidance)]
    assert len(texts) == (2 if guidance > 1 else 1)


def test_attention_and_both_feed_forwards_are_adapted():
    assert len(sampler(spec_of("qwen_image", LORA)).trainable()) == 2 * 2 * 12, "A and B of each"


def test_guidance_keeps_the_length_of_each_tokens_velocity():
    """``v = u + g (c - u)``, then ``v |c| / |v|`` over the 2 x 2 x 16 latents of a token."""
    conditions = conditions_of("qwen_image", GUIDED)
    guided, plain = qwen(GUIDED), qwen()
    x = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    condition = batch_condition(guided, conditions, (0, 2))
    with torch.no_grad():
        found = guided.velocity(x, 0.5, condition).double()
        u = plain.velocity(x, 0.5, {"embeds": condition["negative_embeds"]}).double()
        c = plain.velocity(x, 0.5, condition).double()
    v = u + 4 * (c - u)
    length_c, length_v = (
        t.square().unflatten(3, (3, 2)).unflatten(2, (2, 2)).sum((1, 3, 5)).sqrt() for t in (c, v)
    )  # [b, 2, 3], one per token
    scale = (length_c / length_v).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    assert (found - v * scale).abs().max() < 1e-5
    assert (found - v).abs().max() > 0.1
    assert (scale - scale.mean()).abs().max() > 0.01, "tokens differ"


@pytest.mark.parametrize(("overrides", "shift"), [((), np.exp(0.9)), (("model.shift=2.5",), 2.5)])
def test_noise_levels_end_at_the_terminal_shift(overrides, shift):
    """Shifted by the number of tokens (or the spec), then stretched to end at 0.02 before 0."""
    s = np.linspace(1, 1 / 6, 6)
    shifted = shift * s / (1 + (shift - 1) * s)
    stretched = 1 - (1 - shifted) * 0.98 / (1 - shifted[-1])
    size = (1024, 2048)  # 8192 tokens, where mu is 0.9
    assert qwen(*overrides).sigmas(6, size) == pytest.approx((*stretched, 0), abs=1e-6)


def test_one_step_is_an_error():
    """The scheduler's stretching divides 0 by 0 there."""
    with pytest.raises(SpecError, match=r"shift_terminal = 0\.02: set evaluation\.steps"):
        qwen().sigmas(1, (32, 48))
