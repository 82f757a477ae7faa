"""The kernels against closed forms in float64, torch.distributions, diffusers' Euler step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from flowgrpo_ray.algorithm.flow import KERNELS, Gaussian, dance_sde, flow_sde, ode

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


@pytest.mark.parametrize("other_std", [0.5, 0.8, torch.tensor(0.1, dtype=torch.float64)])
def test_kl_is_that_of_torch_distributions(other_std):
    found = Gaussian(X, 0.5).kl(Gaussian(V, other_std))
    exact = kl_divergence(Normal(X, 0.5), Normal(V, float(other_std))).mean(dim=(1, 2))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("std", [0.1, 0.3, 0.7])
def test_a_kl_of_1e_7_is_exact_in_float32_and_one_of_0_is_0(std):
    """Flow-DPPO masks from 1e-5 on: no term of order 1 may cancel. Oracle: the same, in float64."""
    mean = latents(3, 64).float()
    off = mean + (math.sqrt(2e-7) * std * latents(3, 64, seed=1)).float()
    found = Gaussian(mean, std).kl(Gaussian(off, std))
    exact = ((mean.double() - off.double()) ** 2).mean(1) / (2 * std**2)
    assert found.dtype == torch.float32
    assert 5e-8 < exact.min() < exact.max() < 2e-7
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    assert Gaussian(mean, std).kl(Gaussian(mean.clone(), std)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("std", [0.3, torch.tensor(1.7, dtype=torch.float64)])
def test_squared_error_is_the_log_density_without_scale_and_normaliser(std):
    """So the logarithm of a ratio is ``2 std^2`` times that of the densities."""
    new, old, x = Gaussian(X, std), Gaussian(V, std), latents(3, 2, 5, seed=2)
    exact = torch.stack([-((a - b) ** 2).mean() for a, b in zip(x, X, strict=True)])
    torch.testing.assert_close(new.squared_error(x), exact, rtol=1e-14, atol=0)
    log_ratio = new.squared_error(x) - old.squared_error(x)
    of_densities = new.log_prob(x) - old.log_prob(x)
    torch.testing.assert_close(log_ratio, 2 * float(std) ** 2 * of_densities, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("sigma", "sigma_next", "eta"), STEPS)
def test_dance_sde_with_flow_sdes_g_is_flow_sde(sigma, sigma_next, eta):
    g = eta * (sigma / (1 - sigma)) ** 0.5
    dance = dance_sde(X, V, sigma, sigma_next, g, SIGMA_MAX)
    flow = flow_sde(X, V, sigma, sigma_next, eta, SIGMA_MAX)
    torch.testing.assert_close(dance.mean, flow.mean, rtol=1e-12, atol=1e-13)
    assert dance.std == pytest.approx(flow.std, rel=1e-12)


# --- marginals of a flow whose velocity is known: data N(M, s^2), so x is N((1-sigma) M, V)

M, S = 1.5, 0.6


def marginal(sigma: float, spread: float) -> tuple[float, float]:
    """Mean and variance of x at noise level sigma."""
    return (1 - sigma) * M, (1 - sigma) ** 2 * spread**2 + sigma**2


def velocity(x: Tensor, sigma: float, spread: float) -> Tensor:
    """``E[noise - data | x]``: the best prediction, by regression of one Gaussian on another."""
    mean, variance = marginal(sigma, spread)
    return -M + (sigma - (1 - sigma) * spread**2) / variance * (x - mean)


def end_of_walk(kernel: str, steps: int, eta: float, spread: float = S) -> tuple[float, float]:
    """Errors of mean and variance at sigma = 0.2 after ``steps`` steps from the exact marginal.

    A step is affine in x, so what it does to mean and variance follows from its values at 0 and 1:
    the recursion is exact and needs no samples.
    """
    levels = torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64).tolist()
    mean, variance = marginal(levels[0], spread)
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for sigma, sigma_next in pairwise(levels):
        v = velocity(probe, sigma, spread)
        step = KERNELS[kernel](probe, v, sigma, sigma_next, eta, SIGMA_MAX)
        assert step.std > 0
        at_0, at_1 = step.mean.flatten().tolist()
        mean, variance = at_0 + (at_1 - at_0) * mean, (at_1 - at_0) ** 2 * variance + step.std**2
    exact_mean, exact_variance = marginal(levels[-1], spread)
    return abs(mean - exact_mean), abs(variance - exact_variance)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_keeps_the_flows_marginals(kernel):
    """The reason why a kernel may replace the ODE in sampling: same distributions as dt -> 0.

    Half the step, half the error. ``cps`` puts the same noise into a step of any length, so for it
    that is true of an eta that falls with ``sqrt(-dt)``, as the noise of an SDE does.
    """
    errors = [
        end_of_walk(kernel, steps, 0.8 if kernel != "cps" else 3 / math.sqrt(steps))
        for steps in (250, 500, 1000)
    ]
    assert max(mean for mean, _ in errors) < 1e-12  # a straight line, exact at any dt
    variances = [variance for _, variance in errors]
    assert variances[-1] < 2e-3
    assert [a / b for a, b in pairwise(variances)] == pytest.approx([2, 2], rel=0.05)


@pytest.mark.parametrize("steps", [1, 3, 100])
@pytest.mark.parametrize("eta", [0.2, 0.7, 1.0])
def test_cps_keeps_the_noise_level_on_schedule_exactly(eta, steps):
    """For data at one point the prediction is exact, and x' is (1 - sigma') data + sigma' noise.

    Of the noise's variance sigma'^2 a part comes from x and the rest is fresh, at any step size.
    """
    assert max(end_of_walk("cps", steps, eta, spread=0.0)) < 1e-13
