"""The kernels against closed forms in float64, torch.distributions, diffusers' Euler step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from flowgrpo_ray.flow import KERNELS, Gaussian, cps, dance_sde, flow_sde, ode

# (sigma, sigma_next, eta): an early, a middle and a late step, with little and with much noise
STEPS = [(0.95, 0.9, 0.3), (0.7, 0.55, 0.8), (0.3, 0.1, 1.0)]
SIGMA_MAX = 0.9


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, V = latents(3, 2, 5), latents(3, 2, 5, seed=1)


def sde_step(x: Tensor, v: Tensor, sigma: float, dt: float, g: float) -> tuple[Tensor, float]:
    """Euler-Maruyama of the reverse SDE ``dx = (v - g^2/2 score) dt + g dw``, from the textbook."""
    noise = x + (1 - sigma) * v  # the predicted noise; the score is -noise / sigma
    return x + dt * (v + g * g / 2 * noise / sigma), g * math.sqrt(-dt)


def expected(
    kernel: str, sigma: float, sigma_next: float, eta: float, stand_in: float
) -> tuple[Tensor, float]:
    """Mean and std of a step; ``stand_in``: sigma in the denominator of flow_sde's g."""
    if kernel == "cps":  # sigma' noise is a rotation by eta pi/2 of predicted and of fresh noise
        angle = eta * math.pi / 2
        data, noise = X - sigma * V, X + (1 - sigma) * V
        kept = sigma_next * math.cos(angle)
        return (1 - sigma_next) * data + kept * noise, sigma_next * math.sin(angle)
    g = eta if kernel == "dance_sde" else eta * math.sqrt(sigma / (1 - stand_in))
    return sde_step(X, V, sigma, sigma_next - sigma, g)


@pytest.mark.parametrize("number", [float, lambda s: torch.tensor(s, dtype=torch.float64)])
@pytest.mark.parametrize(("sigma", "sigma_next", "eta"), STEPS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_is_its_closed_form(kernel, sigma, sigma_next, eta, number):
    step = KERNELS[kernel](X, V, number(sigma), number(sigma_next), eta, number(SIGMA_MAX))
    mean, std = expected(kernel, sigma, sigma_next, eta, stand_in=sigma)
    torch.testing.assert_close(step.mean, mean, rtol=1e-12, atol=1e-13)
    assert float(step.std) == pytest.approx(std, rel=1e-12)


@pytest.mark.parametrize("number", [float, lambda s: torch.tensor(s, dtype=torch.float64)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_first_step_from_pure_noise(kernel, number):
    """At sigma = 1 flow_sde's g would be infinite: sigma_max stands in, in the denominator only."""
    step = KERNELS[kernel](X, V, number(1.0), number(0.85), 0.7, number(0.85))
    mean, std = expected(kernel, 1.0, 0.85, 0.7, stand_in=0.85)
    torch.testing.assert_close(step.mean, mean, rtol=1e-12, atol=1e-13)
    assert float(step.std) == pytest.approx(std, rel=1e-12)


@pytest.mark.parametrize("sigma", [1.0, 0.6])
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_noise_is_the_ode_step_exactly(kernel, sigma):
    step = KERNELS[kernel](X, V, sigma, 0.4, 0.0, SIGMA_MAX)
    assert torch.equal(step.mean, ode(X, V, sigma, 0.4).mean)
    assert step.std == 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ode_step_is_diffusers_euler_step_bit_for_bit(shift):
    """Over a whole schedule, in float32, with noise levels as floats, as `sampling` passes them."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.tolist()
    ours = theirs = X.float()
    for i, timestep in enumerate(scheduler.timesteps):
        v = latents(*X.shape, seed=i).float()
        ours = ode(ours, v, sigmas[i], sigmas[i + 1]).mean
        theirs = scheduler.step(v, timestep, theirs, return_dict=False)[0]
        assert torch.equal(ours, theirs), f"step {i}"


def test_sample_is_mean_plus_std_noise():
    assert torch.equal(Gaussian(X, 0.25).sample(V), X + 0.25 * V)


@pytest.mark.parametrize("std", [0.3, torch.tensor(1.7, dtype=torch.float64)])
def test_log_prob_is_the_mean_over_latent_dimensions(std):
    found = Gaussian(X, std).log_prob(V)
    assert found.shape == (3,)
    exact = Normal(X, float(std)).log_prob(V).mean(dim=(1, 2))
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("other_std", [0.5, 0.8])
def test_kl_is_that_of_torch_distributions(other_std):
    found = Gaussian(X, 0.5).kl(Gaussian(V, other_std))
    exact = kl_divergence(Normal(X, 0.5), Normal(V, other_std)).mean(dim=(1, 2))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("sigma", "sigma_next", "eta"), STEPS)
def test_dance_sde_with_flow_sdes_g_is_flow_sde(sigma, sigma_next, eta):
    g = eta * (sigma / (1 - sigma)) ** 0.5
    dance = dance_sde(X, V, sigma, sigma_next, g, SIGMA_MAX)
    flow = flow_sde(X, V, sigma, sigma_next, eta, SIGMA_MAX)
    torch.testing.assert_close(dance.mean, flow.mean, rtol=1e-12, atol=1e-13)
    assert dance.std == pytest.approx(flow.std, rel=1e-12)


# --- marginals of a flow whose velocity is known: data N(m, s^2), so x is N((1-sigma) m, V)

M, S = 1.5, 0.6


def marginal(sigma: float) -> tuple[float, float]:
    """Mean and variance of x at noise level sigma."""
    return (1 - sigma) * M, (1 - sigma) ** 2 * S**2 + sigma**2


def velocity(x: Tensor, sigma: float) -> Tensor:
    """``E[noise - data | x]``: the best prediction, by regression of one Gaussian on another."""
    mean, variance = marginal(sigma)
    return -M + (sigma - (1 - sigma) * S**2) / variance * (x - mean)


def end_of_walk(kernel: str, steps: int) -> tuple[float, float]:
    """Errors of mean and variance at sigma = 0.2 after ``steps`` steps from the exact marginal.

    A step is affine in x, so what it does to mean and variance follows from its values at 0 and 1:
    the recursion is exact and needs no samples.
    """
    levels = torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64).tolist()
    mean, variance = marginal(levels[0])
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for sigma, sigma_next in pairwise(levels):
        step = KERNELS[kernel](probe, velocity(probe, sigma), sigma, sigma_next, 0.8, SIGMA_MAX)
        at_0, at_1 = step.mean.flatten().tolist()
        mean, variance = at_0 + (at_1 - at_0) * mean, (at_1 - at_0) ** 2 * variance + step.std**2
    exact_mean, exact_variance = marginal(levels[-1])
    return abs(mean - exact_mean), abs(variance - exact_variance)


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde"])
def test_sde_keeps_the_flows_marginals(kernel):
    """The reason why the SDE may replace the ODE in sampling: same distributions as dt -> 0."""
    (_, coarse), (mean, fine) = end_of_walk(kernel, 250), end_of_walk(kernel, 500)
    assert mean < 1e-13  # the mean's path is a straight line: exact at any dt
    assert fine < 3e-4
    assert coarse / fine == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("eta", [0.2, 0.7, 1.0])
def test_cps_keeps_the_noise_level_on_schedule_exactly(eta):
    """For data at one point the prediction is exact, and x' is (1 - sigma') data + sigma' noise.

    Of the noise's variance sigma'^2 a part comes from x and the rest is fresh, at any step size.
    """
    sigma, sigma_next, data = 0.8, 0.3, 1.5
    noise = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    x, v = (1 - sigma) * data + sigma * noise, noise - data
    step = cps(x, v, sigma, sigma_next, eta, SIGMA_MAX)
    at_0, at_1 = step.mean.flatten().tolist()
    assert at_0 == pytest.approx((1 - sigma_next) * data, abs=1e-14)
    assert (at_1 - at_0) ** 2 + step.std**2 == pytest.approx(sigma_next**2, rel=1e-13)
    assert step.std > 0
