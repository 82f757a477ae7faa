"""Solvers of steps without noise, against diffusers' own and a flow with a known solution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from flowgrpo_ray.algorithm.solvers import SOLVERS

LEVELS = {
    "even": [1 - k / 10 for k in range(11)],
    "shifted": [3 * s / (1 + 2 * s) for s in (1 - k / 7 for k in range(8))],
}


def field(x: Tensor, sigma: float) -> Tensor:
    """Some velocity that depends on both."""
    return torch.sin(3 * x) + x * math.cos(4 * sigma)


def walk(name: str, sigmas: list[float], x: Tensor, velocity=field) -> list[Tensor]:
    solve, seen = SOLVERS[name](), [x]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        seen.append(solve(seen[-1], velocity(seen[-1], sigma), sigma, sigma_next))
    return seen


def diffusers_scheduler(name: str):
    import diffusers

    if name == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        final_sigmas_type="zero",
    )


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_step_is_that_of_diffusers(name: str, levels: str):
    """Of which float32 is all that it computes in; sigma 1, whose log-SNR is infinite, included."""
    sigmas = LEVELS[levels]
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = walk(name, sigmas, x)
    scheduler = diffusers_scheduler(name)
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas)
    scheduler.timesteps = scheduler.sigmas[:-1] * 1000
    for step, sigma in enumerate(sigmas[:-1]):
        x = scheduler.step(field(x, sigma), scheduler.timesteps[step], x).prev_sample
        torch.testing.assert_close(found[step + 1], x, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpm2", 2)])
def test_the_error_shrinks_with_the_solvers_order(name: str, order: int):
    """Data ``N(m, s^2)`` under ``x = (1 - sigma) data + sigma noise`` has a flow in closed form."""
    m, s = 2.0, 0.5

    def velocity(x: Tensor, sigma: float) -> Tensor:
        variance = (1 - sigma) ** 2 * s**2 + sigma**2
        around = x - (1 - sigma) * m
        return -m + around * (sigma - (1 - sigma) * s**2) / variance

    def exact(sigma: float) -> Tensor:
        z = torch.linspace(-2, 2, 5, dtype=torch.float64)[None]
        return (1 - sigma) * m + ((1 - sigma) ** 2 * s**2 + sigma**2) ** 0.5 * z

    def error(solver: str, steps: int, start: float = 0.9, end: float = 0.1) -> float:
        sigmas = [start + (end - start) * k / steps for k in range(steps + 1)]
        sigmas[-1] = end
        found = walk(solver, sigmas, exact(start), velocity)[-1]
        return float((found - exact(end)).abs().max())

    assert error(name, 100) / error(name, 200) == pytest.approx(2**order, rel=0.05)
    assert error("dpm2", 10, 1, 0) < error("euler", 10, 1, 0) / 2, "the whole way, in ten steps"


def test_a_walk_starts_afresh():
    """A solver that remembers is made anew for each micro-batch."""
    x = torch.ones(1, 2)
    assert torch.equal(walk("dpm2", LEVELS["even"], x)[-1], walk("dpm2", LEVELS["even"], x)[-1])
