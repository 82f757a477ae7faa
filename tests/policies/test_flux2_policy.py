"""What is FLUX.2's own; ``test_policy_contract.py`` holds the policy against its pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import (
    TOKENS,
    build_flux2,
    conditions_of,
    flux2_images,
    load_pipe,
    model_folder,
    pipeline_images,
    sources_of,
    spec_of,
)
from tiny_runs import CPU, LORA, UNTRAINED, one_thread, perturb, sampler, unit

from flowgrpo_ray.algorithm.sampling import INITIAL, batch_condition, draw_noise, replay, rollout
from flowgrpo_ray.common.errors import ModelError, SpecError
from flowgrpo_ray.common.types import Schedule
from flowgrpo_ray.policies import flux2 as flux2_policy
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.base import Policy

GUIDED = "sampling.guidance=4.0"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("distilled") / "model"
    build_flux2(folder, is_distilled=True)
    return folder


def flux2(*overrides: str) -> Policy:
    return load_policy(spec_of("flux2", *overrides), CPU, frozenset({"network", "decoder"}))


SHORT, EMPTY, LONG = 'red sign "407"', "", "a sign of many words " * 9
SIZE = (48, 80)  # 3 x 5 tokens


def drawn(policy: Any, pipe: Any, prompts: tuple[str, ...], guidance: float) -> tuple[Any, Any]:
    """Final latents of ours and of the pipeline, which is given ``guidance``."""
    policy.encoded_at_once = 1
    schedule = Schedule("flow_sde", policy.sigmas(3, SIZE), (0.0,) * 3)
    of = unit(schedule, tuple(range(len(prompts))), (0,) * len(prompts))
    _, x = rollout(policy, of, dict(enumerate(policy.encode(prompts))), SIZE, UNTRAINED)
    start = draw_noise(of, INITIAL, tuple(x.shape[1:]))
    return x, pipeline_images(pipe, prompts, start, 3, guidance, SIZE, "latent")


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_odd_sizes_and_any_prompts_are_drawn_as_by_the_pipeline(guidance):
    """Bit for bit alone; in a batch the pipeline encodes together, and other last bits come out."""
    policy = load_policy(spec_of("flux2", f"sampling.guidance={guidance}"), CPU)
    pipe = load_pipe(model_folder("flux2"))
    assert len(pipe.tokenizer(LONG).input_ids) > TOKENS, "it is cut"
    for prompts in ((SHORT,), (EMPTY,), (LONG,)):
        ours, theirs = drawn(policy, pipe, prompts, guidance)
        assert torch.equal(ours, theirs)
    ours, theirs = drawn(policy, pipe, (SHORT, EMPTY, LONG), guidance)
    assert (ours - theirs).abs().max() < 2e-5
    assert (ours[0] - ours[1]).abs().max() > 0.1


EDITED = (64, 80)  # the pipelines take no image of fewer pixels along a side


@pytest.mark.parametrize(
    ("family", "guidance", "count"),
    [("flux2", 1.0, 1), ("flux2", 4.0, 2), ("flux2_dev", 1.0, 2), ("flux2_dev", 4.0, 1)],
)
def test_images_are_changed_as_by_the_pipeline(family, guidance, count):
    """Bit for bit, tokens and positions of several images; and a replay of them has ratio 1."""
    spec = spec_of(family, f"sampling.guidance={guidance}", LORA)
    policy: Any = load_policy(spec, CPU)
    policy.encoded_at_once = 1
    images = {i: sources_of(text, count, EDITED) for i, text in enumerate((SHORT, LONG))}
    conditions = {0: policy.encode_edit(SHORT, images[0]), 1: policy.encode_edit(LONG, images[1])}
    assert conditions[0]["sources"].shape == (count, 16, 4, 5)
    policy.tune(spec.seed, with_reference=False)
    levels = policy.sigmas(3, EDITED)
    of = unit(Schedule("flow_sde", levels, (0.0,) * 3), (0, 1), (0, 1))
    _, x = rollout(policy, of, conditions, EDITED, UNTRAINED)
    start = draw_noise(of, INITIAL, tuple(x.shape[1:]))
    pipe = load_pipe(model_folder(family))
    for i, text in enumerate((SHORT, LONG)):
        given = [Image.fromarray(image) for image in images[i]]
        drawn = flux2_images(
            pipe, [text], start[i : i + 1], 3, guidance, EDITED, "latent", image=given
        )
        assert (x[i] - drawn[0]).abs().max() < 2e-5, "in a batch of two"
    one = replace(of, prompts=(0,), samples=(0,))
    _, alone = rollout(policy, one, conditions, EDITED, UNTRAINED)
    given = [Image.fromarray(image) for image in images[0]]
    drawn = flux2_images(pipe, [SHORT], start[:1], 3, guidance, EDITED, "latent", image=given)
    assert torch.equal(alone, drawn)
    perturb(policy)
    noisy = replace(of, schedule=Schedule("flow_sde", levels, (0.0, 0.8, 0.0)))
    trajectory, _ = rollout(policy, noisy, conditions, EDITED, UNTRAINED)
    condition = batch_condition(policy, conditions, (0, 1))
    (step,) = replay(policy, trajectory, noisy.schedule, condition)
    assert torch.equal(step.log_ratio, torch.zeros(2))


@pytest.mark.parametrize("size", [(64, 80), (1040, 1040), (784, 2000)])
def test_large_images_to_change_are_shown_smaller_as_by_the_pipeline(size, monkeypatch):
    """The autoencoder sees a megapixel at most; noise and result keep their size."""
    policy: Any = load_policy(spec_of("flux2"), CPU, frozenset({"network", "decoder"}))
    pipe = load_pipe(model_folder("flux2"))
    image = Image.fromarray(sources_of(SHORT, 1, size)[0])
    seen: list[torch.Tensor] = []

    def noted(images: Any, *_: Any, **__: Any) -> None:
        seen.extend(images)
        raise InterruptedError

    monkeypatch.setattr(pipe, "prepare_image_latents", noted)
    with pytest.raises(InterruptedError):
        pipe(prompt=SHORT, image=image, height=size[0], width=size[1])
    found = policy.source_pixels(image, pipe.image_processor)
    assert torch.equal(found, seen[0])
    assert tuple(found.shape[2:]) == policy.source_size(size)
    assert found[0, 0].numel() <= 2**20


def test_what_the_pipeline_says_of_an_image_names_the_key():
    policy = load_policy(spec_of("flux2"), CPU, frozenset({"encoder"}))
    with pytest.raises(SpecError, match=r"sampling\.size = \[32, 48\] does not fit.*at least 64px"):
        policy.encode_edit(SHORT, sources_of(SHORT, 1, (32, 48)))


def test_a_distilled_model_takes_no_guidance(distilled):
    """Its pipeline warns and ignores it; here it is an error that says so."""
    place = f"model.path={distilled}"
    with pytest.raises(SpecError, match=r"sampling\.guidance = 4\.0.*set it to 1"):
        flux2(place, GUIDED)
    policy = load_policy(spec_of("flux2", place), CPU)
    ours, theirs = drawn(policy, load_pipe(distilled), (SHORT,), 4.0)
    assert torch.equal(ours, theirs)


def test_guidance_leads_away_from_the_empty_prompt():
    conditions = conditions_of("flux2", GUIDED)
    guided, plain = flux2(GUIDED), flux2()
    x = torch.randn(2, 16, 2, 3, generator=torch.Generator().manual_seed(0))
    condition = batch_condition(guided, conditions, (0, 2))
    with torch.no_grad():
        found = guided.velocity(x, 0.5, condition)
        u = plain.velocity(x, 0.5, {"embeds": condition["negative_embeds"]})
        c = plain.velocity(x, 0.5, condition)
    assert (found - (4 * c - 3 * u)).abs().max() < 1e-5
    assert (c - u).abs().max() > 0.1
    encoder = load_policy(spec_of("flux2"), CPU, frozenset({"encoder"}))
    (empty,) = encoder.encode([""])
    assert condition["negative_embeds"][1].numpy().tobytes() == empty["embeds"].tobytes()


def test_conditions_are_three_hidden_layers_of_all_tokens():
    (condition,) = load_policy(spec_of("flux2"), CPU, frozenset({"encoder"})).encode([SHORT])
    pipe = load_pipe(model_folder("flux2"))
    text = f"<|im_start|>user\n{SHORT}<|im_end|>\n<|im_start|>assistant\n"
    given = pipe.tokenizer(text, padding="max_length", max_length=TOKENS, return_tensors="pt")
    with torch.no_grad():
        layers = pipe.text_encoder(**given, output_hidden_states=True).hidden_states
    expected = torch.cat([layers[k][0] for k in (9, 18, 27)], dim=-1)
    assert condition["embeds"].shape == (TOKENS, 48)
    assert np.abs(condition["embeds"] - expected.numpy()).max() < 1e-5


def test_both_kinds_of_block_are_trained():
    """Of a double block all products; of a single one its fused product before attention."""
    policy = sampler(spec_of("flux2", LORA))
    network: Any = policy.network
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):
        assert isinstance(block, policy.block_classes())
    assert len(policy.trainable()) == 2 * (2 * 12 + 2 * 1), "A and B of each layer"


def test_noise_levels_are_shifted_by_tokens_and_steps():
    """``exp(mu) s / (1 + (exp(mu) - 1) s)``: up to 4300 tokens mu is linear in the steps, through
    one line of the tokens at 10 steps and another at 200; beyond, it is the latter."""
    policy = flux2()
    for size, tokens in (((512, 512), 1024), ((1024, 1152), 4608)):
        for steps in (8, 50):
            at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
            mu = at_10 + (at_200 - at_10) * (steps - 10) / 190 if tokens <= 4300 else at_200
            s = np.linspace(1, 1 / steps, steps)
            expected = np.exp(mu) * s / (1 + (np.exp(mu) - 1) * s)
            assert policy.sigmas(steps, size) == pytest.approx((*expected, 0), abs=1e-6)
    s = np.linspace(1, 1 / 6, 6)
    shifted = flux2("model.shift=2.5").sigmas(6, (512, 512))
    assert shifted == pytest.approx((*(2.5 * s / (1 + 1.5 * s)), 0), abs=1e-7)


# --- dev


def test_guidance_of_dev_is_an_input_of_the_one_pass():
    x = torch.randn(2, 16, 2, 3, generator=torch.Generator().manual_seed(0))
    found: list[torch.Tensor] = []
    for guidance in (1.0, 4.0):
        override = f"sampling.guidance={guidance}"
        policy = load_policy(spec_of("flux2_dev", override), CPU, frozenset({"network", "decoder"}))
        conditions = conditions_of("flux2_dev", override)
        assert conditions[0].keys() == {"embeds"}
        calls: list[list[float]] = []
        policy.network.register_forward_pre_hook(
            lambda _, __, given, calls=calls: calls.append(given["guidance"].tolist()),
            with_kwargs=True,
        )
        with torch.no_grad():
            found.append(policy.velocity(x, 0.5, batch_condition(policy, conditions, (0, 1))))
        assert calls == [[guidance, guidance]]
    assert (found[0] - found[1]).abs().max() > 0.1


def test_the_published_processor_asks_for_torchvision(tmp_path, monkeypatch):
    """It is no dependency of this package; without it transformers' error names no cause."""
    monkeypatch.setattr(flux2_policy, "find_spec", lambda _: None)
    folder = Path(shutil.copytree(model_folder("flux2_dev"), tmp_path / "dev"))
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"its tokenizer is transformers.*needs torchvision"):
        load_policy(spec_of("flux2_dev", f"model.path={folder}"), CPU, frozenset({"encoder"}))
