"""What is Qwen-Image-2.1's own; ``test_policy_contract.py`` holds the policy against its
pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    MODELS,
    PROMPTS,
    build_qwen_image_2,
    conditions_of,
    load_pipe,
    model_folder,
    pipeline_images,
    spec_of,
)
from tiny_runs import CPU, UNTRAINED, one_thread, unit

from flowgrpo_ray.algorithm.sampling import INITIAL, batch_condition, draw_noise, rollout
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.types import Schedule
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.policies.qwen_image_2 import TURN

GUIDED = "sampling.guidance=4.0"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def qwen(*overrides: str) -> Policy:
    return load_policy(spec_of("qwen_image_2", *overrides), CPU, frozenset({"network", "decoder"}))


def test_conditions_are_the_prompts_own_tokens_before_the_last_norm():
    """The system message is dropped, the user's turn is kept; the empty prompt is a space."""
    pipe = load_pipe(model_folder("qwen_image_2"))
    tokenizer = pipe.processor.tokenizer
    for prompt, text in enumerate(PROMPTS):
        length = min(len(tokenizer(text).input_ids) + TURN - 1, 40)
        guided = conditions_of("qwen_image_2", GUIDED)[prompt]
        assert guided["embeds"].shape == (length, 32)
        assert guided["negative_embeds"].shape == (TURN, 32)
    text = pipe.prompt_template_t2i.format(PROMPTS[0])
    with torch.no_grad():
        layers = pipe.text_encoder.model.language_model.layers
        heard: list[Any] = []
        hook = layers[-1].register_forward_hook(lambda *given: heard.append(given[2]))
        pipe.text_encoder(**tokenizer([text], return_tensors="pt"))
        hook.remove()
    last = heard[0][0] if isinstance(heard[0], tuple) else heard[0]
    found = torch.from_numpy(conditions_of("qwen_image_2")[0]["embeds"])
    assert (last[0][pipe._drop_idx :][: len(found)] - found).abs().max() < 1e-5


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("size", [(32, 32), (160, 96)])
def test_odd_sizes_and_prompts_of_every_length_are_drawn_as_the_pipeline_draws_each(guidance, size):
    """An empty prompt, one as long as may be and one of a letter, in one batch. The pipeline, which
    would place an image behind what fills its prompt up, draws each alone."""
    prompts = ["", "a very long sign", "x"]
    spec = spec_of("qwen_image_2", f"sampling.guidance={guidance}", f"sampling.size={list(size)}")
    policy: Any = load_policy(spec, CPU)
    policy.encoded_at_once = 1
    conditions = dict(enumerate(policy.encode(prompts)))
    assert [len(conditions[i]["embeds"]) for i in range(3)] == [TURN, TURN + 15, TURN]
    of = unit(Schedule("flow_sde", policy.sigmas(4, size), (0.0,) * 4), (0, 1, 2), (0, 1, 2))
    _, x = rollout(policy, of, conditions, size, UNTRAINED)
    start = draw_noise(of, INITIAL, tuple(x.shape[1:]))
    pipe = load_pipe(model_folder("qwen_image_2"))
    drawn = pipeline_images(pipe, prompts, start, 4, guidance, size, "latent")
    assert (x - drawn).abs().max() < 2e-5
    assert (x[0] - x[2]).abs().max() > 0.1


def test_the_network_computes_what_diffusers_forward_does():
    """Without what fills up, bit for bit; and the same weights under the same names."""
    pipe = load_pipe(model_folder("qwen_image_2"))
    policy: Any = qwen()
    x = torch.randn(2, 64, 4, 6, generator=torch.Generator().manual_seed(0))
    condition = batch_condition(policy, conditions_of("qwen_image_2"), (1, 1))
    tokens = condition["embeds"].shape[1]
    slots = torch.arange(tokens + 6)[None].expand(2, -1) >= tokens  # one for 2 x 2 latents
    with torch.no_grad():
        theirs = pipe.transformer(
            policy.pack(x),
            condition["embeds"],
            torch.full((2,), 0.5),
            [[(1, 4, 6)]] * 2,
            slots,
            return_dict=False,
        )[0]
        ours = policy.velocity(x, 0.5, condition)
    assert torch.equal(ours, policy.unpack(theirs[:, tokens:], x))
    assert policy.network.state_dict().keys() == pipe.transformer.state_dict().keys()


def test_pictures_are_on_white_where_they_let_through(monkeypatch):
    policy: Any = qwen()
    rgba = torch.tensor([[1.0, -1.0, 0.0, 1.0], [1.0, -1.0, 0.0, -1.0], [-1.0, -1.0, -1.0, 0.0]])
    decoded = rgba.T[None, :, None, None]  # one row of three pixels
    monkeypatch.setattr(policy.vae, "decode", lambda *_, **__: (decoded,))
    found = policy.decode(torch.zeros(1, 64, 2, 2))
    assert found[0, 0].tolist() == [[255, 0, 128], [255, 255, 255], [128, 128, 128]]


def test_noise_levels_are_shifted_by_tokens_and_end_at_the_terminal_shift():
    s = np.linspace(1, 1 / 6, 6)
    shift = np.exp(0.9)
    shifted = shift * s / (1 + (shift - 1) * s)
    stretched = 1 - (1 - shifted) * 0.98 / (1 - shifted[-1])
    size = (1024, 2048)  # 8192 tokens, where mu is 0.9
    assert qwen().sigmas(6, size) == pytest.approx((*stretched, 0), abs=1e-6)


def test_a_distilled_model_draws_at_its_own_levels(tmp_path: Path):
    levels = [1.0, 0.9, 0.5]
    build_qwen_image_2(tmp_path / "turbo", sample_sigmas=levels)
    spec = MODELS["qwen_image_2"].spec(tmp_path / "turbo")
    policy: Any = load_policy(spec, CPU)
    assert policy.sigmas(3, (64, 96)) == pytest.approx((*levels, 0), abs=1e-6)
    with pytest.raises(SpecError, match=r"draw in 3 steps, and not in 5 .* evaluation\.steps to 3"):
        policy.sigmas(5, (64, 96))
    policy.save_pipeline(tmp_path / "out")
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["sample_sigmas"] == levels
    assert index["processor"] == ["transformers", "Qwen3VLProcessor"]
    processor = {file.name for file in (tmp_path / "turbo/processor").iterdir()}
    assert {file.name for file in (tmp_path / "out/processor").iterdir()} == processor


def test_prompts_are_counted_with_the_turn_around_them():
    policy = load_policy(spec_of("qwen_image_2"), CPU, frozenset())
    tokens = policy.reading().load()
    for prompt, condition in zip(PROMPTS, conditions_of("qwen_image_2").values(), strict=True):
        length = len(condition["embeds"])
        if length < policy.model.max_sequence_length:
            assert tokens.cut(prompt, length) is None
            assert tokens.cut(prompt, length - 1)[0] == length
