"""Rollout and replay: noise, shapes, and the ratio contract before any update."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import (
    SIZE,
    TUNINGS,
    UNTRAINED,
    conditions,
    one_thread,
    perturb,
    sampler,
    schedule,
    sigmas,
    small_spec,
    unit,
)

from flowgrpo_ray.algorithm import sampling
from flowgrpo_ray.algorithm.flow import KERNELS, LIKELIHOODS
from flowgrpo_ray.algorithm.objectives import FlowDppo, FlowGrpo, GrpoGuard
from flowgrpo_ray.algorithm.sampling import (
    INITIAL,
    batch_condition,
    draw_noise,
    replay,
    rollout,
    transition,
)
from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.types import Schedule, WorkUnit
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.spec.plan import draw_eta

SHAPE = (4, 8, 12)  # of one image's latents


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@cache
def policy(
    tuning: str = "full", dtype: str = "float32", guidance: float = 1.0, *overrides: str
) -> Policy:
    """A policy whose weights are no longer the base model's."""
    spec = small_spec(
        TUNINGS[tuning], f"model.dtype={dtype}", f"sampling.guidance={guidance}", *overrides
    )
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


# --- schedules


class Still:
    """A policy whose velocity is known."""

    def velocity(self, x: torch.Tensor, sigma: float, condition: object) -> torch.Tensor:
        return sigma - 2 * x


@given(
    inner=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=8, unique=True),
    window=st.tuples(st.integers(0, 7), st.integers(0, 8)),
    kernel=st.sampled_from(sorted(KERNELS)),
    eta=st.floats(0.01, 1),
)
def test_a_step_has_noise_inside_the_window_and_is_eulers_outside(inner, window, kernel, eta):
    """Euler's bit for bit, whatever the kernel; and a noisy last step cannot be asked for."""
    levels = (1.0, *sorted(inner, reverse=True), 0.0)
    steps, of = len(levels) - 1, range(*window)
    etas = tuple(eta if i in of else 0.0 for i in range(steps))
    if etas[-1]:
        with pytest.raises(ValueError, match="last step"):
            Schedule(kernel, levels, etas)
        return
    x = torch.linspace(-3, 3, 24).reshape(2, 12)
    for i, (s, s_next) in enumerate(itertools.pairwise(levels)):
        found = transition(Still(), x, i, Schedule(kernel, levels, etas), {})  # type: ignore[arg-type]
        if etas[i]:
            assert found.std > 0
            assert found.mean.isfinite().all()
        else:
            assert found.std == 0
            assert torch.equal(found.mean, x + (s_next - s) * (s - 2 * x))


def test_stochastic_steps_are_contiguous():
    with pytest.raises(ValueError, match="contiguous"):
        Schedule("cps", (1.0, 0.8, 0.5, 0.2, 0.0), (0.5, 0.0, 0.5, 0.0))


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
    condition = batch_condition(policy(), conditions(), of.prompts)
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


def flow_sde_std(s: float, s1: float, eta: float) -> float:
    return eta * math.sqrt(s / (1 - (s1 if s == 1 else s))) * math.sqrt(s - s1)


STEP_STD = {
    "flow_sde": flow_sde_std,
    "cps": lambda s, s1, eta: s1 * math.sin(eta * math.pi / 2),
    "dance_sde": lambda s, s1, eta: eta * math.sqrt(s - s1),
}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kernel", STEP_STD)
def test_a_log_probability_is_that_of_the_noise_that_was_drawn(kernel: str, likelihood: str):
    """``-mean(eps^2)/2 - log std - log sqrt(2 pi)``, or ``-std^2 mean(eps^2)``, in float64.

    The stored one is taken from the latents in float32: the difference is the rounding of
    ``x' - mean``, about 2e-6 when measured.
    """
    of = unit(schedule(range(4), kernel=kernel, likelihood=likelihood))
    trajectory, _ = rollout(policy(), of, conditions(), SIZE, UNTRAINED)
    for k, step in enumerate(of.schedule.stochastic_steps):
        std = STEP_STD[kernel](*of.schedule.sigma[step : step + 2], of.schedule.eta[step])
        square = (draw_noise(of, step, SHAPE).double().flatten(1).numpy() ** 2).mean(1)
        exact = -square / 2 - math.log(std * math.sqrt(2 * math.pi))
        if likelihood == "squared_error":
            exact = -(std**2) * square
        assert np.abs(trajectory.log_probs[:, k] - exact).max() < 1e-5


def test_means_are_those_of_the_sampling_and_of_the_untrained_policy():
    """Bit for bit, of each stochastic step at the latents that it started from; kept if asked."""
    overrides = ("objective.kl={beta: 0.1, form: gaussian}",)
    sampled, untrained = policy("lora", "float32", 1.0, *overrides), sampler(small_spec())
    of = unit(schedule(range(1, 3)))
    condition = batch_condition(sampled, conditions(), of.prompts)
    trajectory, _ = rollout(sampled, of, conditions(), SIZE, UNTRAINED, keep_old=True)
    current = sampler(small_spec())
    perturb(current, seed=1)
    with torch.no_grad():
        steps = list(replay(current, trajectory, of.schedule, condition))
        for k, step in enumerate(steps):
            x = torch.from_numpy(trajectory.latents[:, k])
            made = [
                transition(by, x, k + 1, of.schedule, condition)
                for by in (current, sampled, untrained)
            ]
            given = (step.new, step.old, step.reference)
            for found, exact in zip(given, made, strict=True):
                assert found is not None
                assert torch.equal(found.mean, exact.mean)
                assert found.std == exact.std
            assert (step.step, len(steps)) == (k + 1, 2)
            now = made[0].log_prob(torch.from_numpy(trajectory.latents[:, k + 1]))
            assert torch.equal(step.log_ratio, now - torch.from_numpy(trajectory.log_probs[:, k]))
            assert (step.log_ratio != 0).all()
            assert torch.equal(step.x_next, torch.from_numpy(trajectory.latents[:, k + 1]))
            assert len({float(one.mean.sum()) for one in made}) == 3
    plain, _ = rollout(policy(), of, conditions(), SIZE, UNTRAINED)
    assert plain.old is None
    assert plain.reference is None


WINDOWS = (
    "{kind: all}",
    "{kind: random, length: 2, within: [0, 4]}",
    "{kind: progressive, length: 2, stride: 2, iterations: 1}",
)


@cache
def etas(window: str) -> tuple[float, ...]:
    """Of the second iteration."""
    return draw_eta(small_spec(f"sampling.window={window}").sampling, 2, random.Random(0))


@pytest.mark.slow  # a minute for the compiler
@pytest.mark.parametrize(
    ("tuning", "dtype"), [("full", "float32"), ("lora", "bfloat16"), ("lora", "float16")]
)
def test_compiled_blocks_replay_what_they_sampled(tuning: str, dtype: str) -> None:
    """Without gradients and with them, bit for bit, after an evaluation of another batch size."""
    spec = small_spec(TUNINGS[tuning], "model.compile=true", f"model.dtype={dtype}")
    policy = sampler(spec)
    of = unit(schedule(range(2)))
    rollout(policy, of, conditions(), SIZE, UNTRAINED)
    half = replace(of, prompts=of.prompts[:2], samples=of.samples[:2])
    rollout(policy, half, conditions(), SIZE, UNTRAINED)
    trajectory, _ = rollout(policy, of, conditions(), SIZE, UNTRAINED)
    condition = batch_condition(policy, conditions(), of.prompts)
    for step in replay(policy, trajectory, of.schedule, condition):
        assert step.log_ratio.requires_grad
        assert step.log_ratio.abs().max() == 0
    blocks = [m for m in policy.network.modules() if isinstance(m, policy.block_classes())]
    assert all(block._compiled_call_impl is not None for block in blocks)


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match=r"model\.compile = true needs .*'no-such-compiler'"):
        sampler(small_spec("model.compile=true"))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_shared_start_is_computed_once_and_changes_nothing(
    guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts, two samples of each: two rows up to the window, then four."""
    policy = sampler(small_spec(f"sampling.guidance={guidance}"))
    of = replace(unit(schedule(range(2, 4))), same_latent=True)
    given, rows = conditions(guidance), []
    real = policy.velocity

    def counted(x: torch.Tensor, sigma: float, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        rows.append(len(x))
        return real(x, sigma, condition)

    monkeypatch.setattr(policy, "velocity", counted)
    shared, x = rollout(policy, of, given, SIZE, UNTRAINED)
    assert rows == [2, 2, 4, 4, 4]
    starts = shared.latents[:, 0]
    assert [starts[0].tobytes(), starts[2].tobytes()] == [starts[1].tobytes(), starts[3].tobytes()]
    assert len({row.tobytes() for row in shared.latents[:, 1]}) == 4, "their steps are their own"
    condition = batch_condition(policy, given, of.prompts)
    for step in replay(policy, shared, of.schedule, condition):
        assert step.log_ratio.abs().max() == 0, "the window is computed as it is replayed"

    def every_row(_: Policy, of: WorkUnit, __: object, shape: tuple[int, ...]) -> object:
        return 0, draw_noise(of, INITIAL, shape)

    monkeypatch.setattr(sampling, "start", every_row)
    plain, y = rollout(policy, of, given, SIZE, UNTRAINED)
    assert rows[-5:] == [4] * 5
    assert np.abs(shared.latents - plain.latents).max() < 1e-4, "rounding in another batch"
    assert torch.allclose(x, y, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("tuning", "guidance"), [("full", 1.0), ("lora", 3.0)])
def test_replay_gives_every_objective_a_ratio_of_exactly_one(tuning, guidance, dtype, kernel):
    """With gradients on, as in the update, and latents, log-probabilities and means as stored.

    Half precision is slow here and a matter of the network alone: one window with each kernel.
    """
    turn = (list(KERNELS).index(kernel) + (tuning == "lora")) % len(WINDOWS)
    windows = WINDOWS if dtype == "float32" else WINDOWS[turn : turn + 1]
    made, encoded = policy(tuning, dtype, guidance), conditions(guidance)
    objectives = (
        FlowGrpo(kind="flow_grpo"),
        GrpoGuard(kind="grpo_guard"),
        FlowDppo(kind="flow_dppo"),
    )
    advantage = torch.tensor([1.0, -1.0, 2.0, 0.0])
    assert len({etas(window) for window in WINDOWS}) == 3
    for window, likelihood in itertools.product(windows, LIKELIHOODS):
        of = unit(Schedule(kernel, sigmas(5), etas(window), likelihood))
        trajectory, _ = rollout(made, of, encoded, SIZE, UNTRAINED, keep_old=True)
        condition = batch_condition(made, encoded, of.prompts)
        seen = []
        for step in replay(made, trajectory, of.schedule, condition):
            for objective in objectives:
                found = objective.terms(step, advantage)
                assert found.gate.requires_grad
                assert torch.equal(found.gate, torch.zeros(4))
                low, high = (found.statistics[f"clip_fraction.{s}"] for s in ("low", "high"))
                assert not (low | high).any()
            assert step.new.mean.dtype == step.x_next.dtype == torch.float32
            seen.append(step.step)
        assert seen == list(of.schedule.stochastic_steps)


@pytest.mark.parametrize("change", ["weights", "latents", "log_probs", "old", "schedule"])
def test_replay_of_anything_else_gives_another_ratio(change: str):
    """So the test above can fail: each input of a ratio moves it. Guard's is made of means."""
    of = unit(schedule(range(1, 3)))
    trajectory, _ = rollout(policy(), of, conditions(), SIZE, UNTRAINED, keep_old=True)
    other, replayed, levels = policy(), trajectory, of.schedule
    if change == "weights":
        other = sampler(small_spec())
    elif change == "schedule":
        levels = replace(levels, sigma=tuple(s**1.01 for s in levels.sigma))
    else:
        arrays = getattr(trajectory, change)
        replayed = replace(trajectory, **{change: np.nextafter(arrays, np.float32(9))})
    condition = batch_condition(other, conditions(), of.prompts)
    with torch.no_grad():
        steps = list(replay(other, replayed, levels, condition))
    for objective in (FlowGrpo(kind="flow_grpo"), GrpoGuard(kind="grpo_guard")):
        ratios = [objective.terms(s, torch.zeros(4)).gate for s in steps]
        blind = change == ("old" if objective.kind == "flow_grpo" else "log_probs")
        assert bool(torch.stack(ratios).abs().max() > 0) == (not blind)
