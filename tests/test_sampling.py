"""Rollout and replay: noise, shapes, and the ratio contract before any update."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from tiny_runs import (
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

from flowgrpo_ray.policies import Policy
from flowgrpo_ray.sampling import INITIAL, batch_condition, draw_noise, replay, rollout
from flowgrpo_ray.types import WorkUnit

SHAPE = (4, 8, 12)  # of one image's latents


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@cache
def policy(tuning: str = "full", dtype: str = "float32", guidance: float = 1.0) -> Policy:
    """A policy whose weights are no longer the base model's."""
    spec = small_spec(TUNINGS[tuning], f"model.dtype={dtype}", f"sampling.guidance={guidance}")
    made = sampler(spec)
    perturb(made)
    return made


# --- noise


def test_noise_belongs_to_a_sample_whatever_it_is_batched_with():
    window = schedule(range(2))
    whole = unit(window, (0, 0, 1, 1), (0, 1, 0, 1))
    mixed = replace(whole, prompts=(1, 2, 0), samples=(1, 5, 0), index=3)
    for step in (INITIAL, 0, 1):
        a, b = draw_noise(whole, step, SHAPE), draw_noise(mixed, step, SHAPE)
        assert torch.equal(a[3], b[0])
        assert torch.equal(a[0], b[2])


def test_noise_ignores_and_leaves_alone_the_global_generator():
    of = unit(schedule(range(2)))
    torch.manual_seed(1)
    first = draw_noise(of, 0, SHAPE)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    assert torch.equal(first, draw_noise(of, 0, SHAPE))


def test_noise_differs_in_each_part_of_its_key():
    """(seed, stream, iteration, prompt, sample, step): no two of these share a single value."""
    base = WorkUnit(7, "train", 1, 0, (12,), (3,), schedule(range(2)))
    drawn = [
        draw_noise(base, 0, SHAPE),
        draw_noise(base, 1, SHAPE),
        draw_noise(base, INITIAL, SHAPE),
        draw_noise(replace(base, seed=8), 0, SHAPE),
        draw_noise(replace(base, stream="eval"), 0, SHAPE),
        draw_noise(replace(base, iteration=2), 0, SHAPE),
        draw_noise(replace(base, prompts=(13,)), 0, SHAPE),
        draw_noise(replace(base, samples=(4,)), 0, SHAPE),
        # Digits must not run together: prompt 1, sample 23 is not prompt 12, sample 3.
        draw_noise(replace(base, prompts=(1,), samples=(23,)), 0, SHAPE),
    ]
    for a, b in itertools.combinations(drawn, 2):
        assert not (a == b).any()


def test_noise_is_standard_normal_float32():
    of = unit(schedule(range(2)), (0,) * 50, tuple(range(50)))
    noise = draw_noise(of, 0, SHAPE)  # 19,200 values
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 5 / math.sqrt(noise.numel())
    assert abs(noise.std() - 1) < 5 / math.sqrt(2 * noise.numel())


# --- trajectories


def test_the_same_unit_gives_the_same_bits():
    of = unit(schedule(range(1, 3)))
    first, x = rollout(policy(), of, conditions(), SIZE, UNTRAINED)
    again, y = rollout(policy(), of, conditions(), SIZE, UNTRAINED)
    assert first.latents.tobytes() == again.latents.tobytes()
    assert first.log_probs.tobytes() == again.log_probs.tobytes()
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    "window", [range(2), range(1, 3), range(4)], ids=["start", "middle", "all"]
)
def test_a_trajectory_holds_the_latents_around_its_window(window: range):
    of = unit(schedule(window))
    trajectory, x = rollout(policy(), of, conditions(), SIZE, UNTRAINED)
    assert trajectory.latents.shape == (4, len(window) + 1, *SHAPE)
    assert trajectory.log_probs.shape == (4, len(window))
    assert trajectory.latents.dtype == trajectory.log_probs.dtype == np.float32
    assert x.shape == (4, *SHAPE)

    # The first are those that plain Euler steps lead to, the last those that they go on from.
    condition = batch_condition(conditions(), of.prompts, torch.device("cpu"))
    sigma = of.schedule.sigma

    def euler(latents: torch.Tensor, steps: range) -> torch.Tensor:
        with torch.no_grad():
            for i in steps:
                velocity = policy().velocity(latents, sigma[i], condition)
                latents = latents + (sigma[i + 1] - sigma[i]) * velocity
        return latents

    before = euler(draw_noise(of, INITIAL, SHAPE), range(window.start))
    assert torch.equal(before, torch.from_numpy(trajectory.latents[:, 0]))
    after = euler(torch.from_numpy(trajectory.latents[:, -1]), range(window.stop, 5))
    assert torch.equal(after, x)


def test_an_ode_trajectory_is_its_final_latents_alone():
    trajectory, x = rollout(policy(), unit(schedule(range(0))), conditions(), SIZE, UNTRAINED)
    assert np.array_equal(trajectory.latents, x.numpy()[:, None])
    assert trajectory.log_probs.shape == (4, 0)


def test_a_trajectory_says_under_what_it_was_sampled():
    of = unit(schedule(range(1, 3)))
    ticket = replace(UNTRAINED, version=4, digest="abc")
    found = rollout(policy("lora", "bfloat16"), of, conditions(), SIZE, ticket)[0].provenance
    assert (found.weights_version, found.weights_digest) == (4, "abc")
    assert (found.batch, found.dtype, found.schedule) == (4, "bfloat16", of.schedule)


STEP_STD = {  # maths.md, the table of kernels
    "flow_sde": lambda s, s1, eta: eta * math.sqrt(s / (1 - s)) * math.sqrt(s - s1),
    "cps": lambda s, s1, eta: s1 * math.sin(eta * math.pi / 2),
    "dance_sde": lambda s, s1, eta: eta * math.sqrt(s - s1),
}


@pytest.mark.parametrize("kernel", STEP_STD)
def test_a_log_probability_is_that_of_the_noise_that_was_drawn(kernel: str):
    """``-mean(eps^2)/2 - log std - log sqrt(2 pi)`` in float64, from the noise alone.

    The stored one is taken from the latents in float32: the difference is the rounding of
    ``x' - mean``, about 2e-6 when measured.
    """
    of = unit(schedule(range(1, 4), kernel=kernel))
    trajectory, _ = rollout(policy(), of, conditions(), SIZE, UNTRAINED)
    for k, step in enumerate(of.schedule.stochastic_steps):
        std = STEP_STD[kernel](*of.schedule.sigma[step : step + 2], of.schedule.eta[step])
        noise = draw_noise(of, step, SHAPE).double().flatten(1).numpy()
        exact = -(noise**2).mean(1) / 2 - math.log(std * math.sqrt(2 * math.pi))
        assert np.abs(trajectory.log_probs[:, k] - exact).max() < 1e-5


@pytest.mark.parametrize("kernel", STEP_STD)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_replay_gives_a_ratio_of_exactly_one(tuning, dtype, guidance, kernel):
    """With gradients on, as in the update, and the latents and log-probabilities as stored."""
    of = unit(schedule(range(4), kernel=kernel))
    made, given = policy(tuning, dtype, guidance), conditions(guidance)
    trajectory, _ = rollout(made, of, given, SIZE, UNTRAINED)
    condition = batch_condition(given, of.prompts, made.device)
    seen = []
    for step, new, x_next, old in replay(made, trajectory, of.schedule, condition):
        log_ratio = new.log_prob(x_next) - old
        assert log_ratio.requires_grad
        assert torch.equal(log_ratio, torch.zeros(4))
        assert new.mean.dtype == x_next.dtype == torch.float32
        seen.append(step)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("change", ["weights", "latents", "log_probs", "schedule"])
def test_replay_of_anything_else_gives_another_ratio(change: str):
    """So the test above can fail: each input of the ratio moves it."""
    of = unit(schedule(range(1, 3)))
    trajectory, _ = rollout(policy(), of, conditions(), SIZE, UNTRAINED)
    other, replayed, levels = policy(), trajectory, of.schedule
    if change == "weights":
        other = sampler(small_spec())
    elif change == "schedule":
        levels = replace(levels, sigma=tuple(s**1.01 for s in levels.sigma))
    else:
        arrays = getattr(trajectory, change)
        replayed = replace(trajectory, **{change: np.nextafter(arrays, np.float32(9))})
    condition = batch_condition(conditions(), of.prompts, other.device)
    with torch.no_grad():
        ratios = [
            new.log_prob(x_next) - old
            for _, new, x_next, old in replay(other, replayed, levels, condition)
        ]
    assert torch.stack(ratios).abs().max() > 0
