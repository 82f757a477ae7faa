"""What is FLUX.1-Kontext's own; ``test_policy_contract.py`` holds it against its pipeline."""

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
    sources_of,
    spec_of,
)
from tiny_runs import CPU, SIZE, UNTRAINED, one_thread, unit

from flowgrpo_ray.algorithm.sampling import INITIAL, batch_condition, draw_noise, rollout
from flowgrpo_ray.common.types import Schedule
from flowgrpo_ray.policies import load_policy


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_a_source_is_the_mode_of_its_latents_scaled():
    """In the autoencoder's dtype, which may be another than the encoders'."""
    source = sources_of(PROMPTS[0], 1, SIZE)
    vae = load_pipe(model_folder("flux_kontext")).vae
    pixels = torch.from_numpy(source).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
    expected = ((mode - 0.1159) * 0.3611).numpy()
    spec = spec_of("flux_kontext", "model.dtype=bfloat16", "model.decoder_dtype=float32")
    policy: Any = load_policy(spec, CPU, frozenset({"encoder"}))
    found = policy.encode_edit(PROMPTS[0], source)
    assert found["sources"].shape == (1, 16, 4, 6)
    assert found["sources"].dtype == np.float32
    assert found["embeds"].dtype == np.uint16, "bfloat16"
    assert np.abs(found["sources"] - expected).max() < 1e-5
    policy.drop_encoder()
    assert not hasattr(policy, "encoder"), "nor its autoencoder"


def test_the_velocity_is_that_of_the_latents_and_follows_the_source():
    policy = load_policy(spec_of("flux_kontext"), CPU, frozenset({"network", "decoder"}))
    condition = batch_condition(policy, conditions_of("flux_kontext"), (0, 1))
    x = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    calls: list[dict[str, Any]] = []
    policy.network.register_forward_pre_hook(
        lambda _, __, given: calls.append(given), with_kwargs=True
    )
    with torch.no_grad():
        found = policy.velocity(x, 0.5, condition)
        other = policy.velocity(x, 0.5, {**condition, "sources": condition["sources"].flip(0)})
    assert found.shape == x.shape
    assert (found - other).abs().max() > 0.05
    assert calls[0]["hidden_states"].shape == (2, 6 + 6, 64)
    rows = [(0, row, column) for row in range(2) for column in range(3)]
    assert calls[0]["img_ids"].tolist() == [
        *map(list, rows),
        *([1, row, column] for _, row, column in rows),
    ]


@pytest.mark.parametrize("prompt", ["", "a sign of many words " * 9])
def test_odd_sizes_and_any_prompts_are_drawn_as_by_the_pipeline(prompt):
    size = (48, 80)
    policy: Any = load_policy(spec_of("flux_kontext", f"sampling.size={list(size)}"), CPU)
    condition = policy.encode_edit(prompt, sources_of(prompt, 1, size))
    of = unit(Schedule("flow_sde", policy.sigmas(3, size), (0.0,) * 3), (0,), (0,))
    _, x = rollout(policy, of, {0: condition}, size, UNTRAINED)
    start = draw_noise(of, INITIAL, tuple(x.shape[1:]))
    pipe = load_pipe(model_folder("flux_kontext"))
    assert torch.equal(x, pipeline_images(pipe, [prompt], start, 3, 1.0, size, "latent"))
