"""What is FLUX.1's own; ``test_policy_contract.py`` holds the policy against its pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    PROMPTS,
    build_flux,
    conditions_of,
    load_pipe,
    pipeline_images,
    schedule_of,
    spec_of,
)
from tiny_runs import CPU, LORA, SIZE, UNTRAINED, one_thread, sampler, unit

from flowgrpo_ray.algorithm.sampling import INITIAL, batch_condition, draw_noise, rollout
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.policies.flux import FluxPolicy


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The spec's override that names a model without embedded guidance."""
    folder: Path = tmp_path_factory.mktemp("schnell") / "model"
    build_flux(folder, guidance_embeds=False)
    return f"model.path={folder}"


def flux(*overrides: str) -> Policy:
    return load_policy(spec_of("flux", *overrides), CPU, frozenset({"network", "decoder"}))


def test_guidance_is_an_input_of_the_one_pass():
    """Distilled: the same conditions whatever the scale, and no second prompt."""
    x = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    found: list[torch.Tensor] = []
    for guidance in (1.0, 4.0):
        override = f"sampling.guidance={guidance}"
        policy, conditions = flux(override), conditions_of("flux", override)
        assert {name: array.shape for name, array in conditions[0].items()} == {
            "embeds": (40, 32),
            "pooled": (16,),
        }
        rows: list[int] = []
        policy.network.register_forward_pre_hook(
            lambda _, __, given, rows=rows: rows.append(len(given["hidden_states"])),
            with_kwargs=True,
        )
        with torch.no_grad():
            found.append(policy.velocity(x, 0.5, batch_condition(policy, conditions, (0, 1))))
        assert rows == [2]
        assert FluxPolicy.passes(guidance) == 1
    assert (found[0] - found[1]).abs().max() > 0.1


def test_both_kinds_of_block_are_trained():
    """Of a single-stream block by default the attention alone, as no target names its others."""
    policy = sampler(spec_of("flux", LORA))
    network: Any = policy.network
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):
        assert isinstance(block, policy.block_classes())
    assert len(policy.trainable()) == 2 * (2 * 12 + 2 * 3), "A and B of each layer"


def test_latents_are_not_packed_outside_the_network():
    policy = flux()
    assert policy.latent_shape((32, 48)) == (16, 4, 6)
    assert policy.latent_shape((1024, 512)) == (16, 128, 64)
    x = torch.zeros(3, 16, 4, 6)
    condition = batch_condition(policy, conditions_of("flux"), (0, 1, 2))
    assert policy.velocity(x, 0.5, condition).shape == x.shape


def test_a_model_without_embedded_guidance_takes_none(schnell):
    with pytest.raises(SpecError, match=r"sampling\.guidance = 3\.5.*set it to 1"):
        flux(schnell, "sampling.guidance=3.5")


def test_schnell_draws_as_its_pipeline(schnell):
    spec = spec_of("flux", schnell)
    policy = load_policy(spec, CPU)
    of = unit(schedule_of(policy, range(0), 4), (1,), (0,))
    _, x = rollout(policy, of, {1: policy.encode(PROMPTS)[1]}, SIZE, UNTRAINED)
    start = draw_noise(of, INITIAL, tuple(x.shape[1:]))
    assert spec.model.folder is not None
    pipe = load_pipe(spec.model.folder)
    assert torch.equal(x, pipeline_images(pipe, PROMPTS[1:2], start, 4, 0.0, SIZE, "latent"))


def test_noise_levels_are_shifted_by_the_number_of_tokens():
    """``exp(mu) s / (1 + (exp(mu) - 1) s)``, mu linear from 0.5 (256 tokens) to 1.15 (4096)."""
    s = np.linspace(1, 1 / 6, 6)
    for size, mu in (((256, 256), 0.5), ((1024, 1024), 1.15), ((512, 512), 0.63)):
        expected = np.exp(mu) * s / (1 + (np.exp(mu) - 1) * s)
        assert flux().sigmas(6, size) == pytest.approx((*expected, 0), abs=1e-7)


def test_the_specs_shift_holds_at_every_size():
    s = np.linspace(1, 1 / 6, 6)
    policy = flux("model.shift=2.5")
    for size in ((32, 48), (1024, 1024)):
        assert policy.sigmas(6, size) == pytest.approx((*(2.5 * s / (1 + 1.5 * s)), 0), abs=1e-7)
