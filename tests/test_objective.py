"""Advantages, clipping, Guard and KL against numpy, the textbook and closed forms, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from flowgrpo_ray.flow import Gaussian, flow_sde
from flowgrpo_ray.objective import (
    clipped,
    clipped_loss,
    group_advantages,
    guard_log_ratio,
    has_gradient,
    kl_to_reference,
)

NAN = float("nan")


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- advantages


def advantages_by_numpy(
    rewards: np.ndarray, group: np.ndarray, std: str, clamp: float
) -> np.ndarray:
    """The definition, sample by sample."""
    valid = ~np.isnan(rewards)
    result = np.zeros(len(rewards))
    for i in np.flatnonzero(valid):
        members = rewards[valid & (group == group[i])]
        if np.ptp(members) == 0:
            continue
        spread = np.std(members if std == "group" else rewards[valid])
        result[i] = np.clip((rewards[i] - np.mean(members)) / (spread + 1e-4), -clamp, clamp)
    return result


# Groups come in any order, of any size, flat ones among them (few distinct rewards), with NaN.
rows = st.lists(
    st.tuples(
        st.integers(-2, 2),
        st.one_of(st.sampled_from([0.0, 1 / 3, NAN]), st.floats(-10, 10, allow_nan=False)),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(rows=rows, std=st.sampled_from(["group", "global"]), clamp=st.sampled_from([0.7, 5.0]))
def test_advantages_are_numpys(rows, std, clamp):
    group, rewards = (np.array(column) for column in zip(*rows, strict=True))
    r, g = torch.from_numpy(rewards), torch.from_numpy(group)
    found = group_advantages(r, g, std, clamp)
    exact = advantages_by_numpy(rewards, group, std, clamp)
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(
        has_gradient(r, g).numpy(),
        [
            not math.isnan(rewards[i])
            and np.nanmax(rewards[group == k]) > np.nanmin(rewards[group == k])
            for i, k in enumerate(group)
        ],
    )


def test_advantages_by_hand():
    """Two interleaved groups: 0, 1 (population std 1/2, sample std 0.71) and 1, 1, 4."""
    found = group_advantages(f64(0, 1, 1, 1, 4), torch.tensor([3, 9, 3, 9, 9]))
    root2 = math.sqrt(2)
    assert found[[0, 2]].tolist() == pytest.approx([-0.5 / 0.5001, 0.5 / 0.5001], rel=1e-12)
    assert found[[1, 3, 4]].tolist() == pytest.approx(
        [-1 / (root2 + 1e-4)] * 2 + [2 / (root2 + 1e-4)], rel=1e-12
    )


def test_an_outlier_is_clamped_and_keeps_its_dtype():
    rewards = torch.zeros(40)
    rewards[7] = 1  # (1 - 1/40) / std = sqrt(39) = 6.2
    found = group_advantages(rewards, torch.zeros(40, dtype=torch.int64))
    assert found.dtype == torch.float32
    assert found[7] == 5
    assert group_advantages(rewards, torch.zeros(40, dtype=torch.int64), clamp=1e9)[7] > 6


def test_global_std_is_that_of_all_rewards():
    rewards, group = f64(0, 1, 10, 14), torch.tensor([0, 0, 1, 1])
    spread = np.std([0, 1, 10, 14]) + 1e-4
    found = group_advantages(rewards, group, std="global")
    assert found.tolist() == pytest.approx([c / spread for c in (-0.5, 0.5, -2, 2)], rel=1e-12)


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1e4 / 7])
def test_a_flat_group_has_exactly_no_advantage(value, dtype, std):
    """Rounding in the mean must not make a gradient: sum of 3 times 0.1, by 3, is not 0.1."""
    for size in range(1, 25):
        rewards = torch.full((size + 2,), value, dtype=dtype)
        rewards[-1] = value + 1  # a group with spread beside it, so that the global std is not 0
        group = torch.tensor([0] * size + [1, 1])
        found = group_advantages(rewards, group, std)
        assert (found[:size] == 0).all()
        assert has_gradient(rewards, group).tolist() == [False] * size + [True] * 2


def test_nan_leaves_its_sample_out_and_changes_nothing_else():
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    with_nan = group_advantages(f64(1, NAN, 3, 0, NAN, NAN), group)
    without = group_advantages(f64(1, 3), torch.tensor([0, 0]))
    assert with_nan[[0, 2]].tolist() == without.tolist()
    assert with_nan[[1, 3, 4, 5]].tolist() == [0, 0, 0, 0]  # one valid sample alone says nothing
    assert group_advantages(f64(NAN, NAN), torch.tensor([0, 0]), "global").tolist() == [0, 0]


def test_an_unknown_std_is_named():
    with pytest.raises(ValueError, match="'batch'"):
        group_advantages(f64(0, 1), torch.tensor([0, 0]), "batch")  # type: ignore[arg-type]


# --- the clipped loss

LOW, HIGH = 0.1, 0.3  # unequal, so that a swap shows
# log-ratios left of, inside and right of the clip range, for each sign of the advantage
LOG_RATIO = f64(*[-0.5, -0.2, -0.05, 0.0, 0.05, 0.2, 0.28, 0.5] * 3)
ADVANTAGE = f64(*[1.3] * 8, *[-0.7] * 8, *[0.0] * 8)


def textbook(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """PPO's clipped surrogate as printed: ``mean max(-A rho, -A clip(rho))``."""
    rho = log_ratio.exp()
    return torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - LOW, 1 + HIGH)).mean()


def test_clipped_loss_is_the_textbooks():
    for sample in zip(LOG_RATIO[:, None], ADVANTAGE[:, None], strict=True):
        assert clipped_loss(*sample, LOW, HIGH).item() == pytest.approx(
            textbook(*sample).item(), rel=1e-14
        )
    whole = clipped_loss(LOG_RATIO, ADVANTAGE, LOW, HIGH)
    assert whole.item() == pytest.approx(textbook(LOG_RATIO, ADVANTAGE).item(), rel=1e-14)


def gradient(loss, log_ratio: Tensor, *rest: object) -> Tensor:
    leaf = log_ratio.clone().requires_grad_()
    loss(leaf, *rest).backward()
    assert leaf.grad is not None
    return leaf.grad


def test_gradient_is_that_of_the_textbook_and_of_finite_differences():
    found = gradient(clipped_loss, LOG_RATIO, ADVANTAGE, LOW, HIGH)
    torch.testing.assert_close(found, gradient(textbook, LOG_RATIO, ADVANTAGE), rtol=1e-13, atol=0)
    h = 1e-6
    for i in range(len(LOG_RATIO)):
        up, down = LOG_RATIO.clone(), LOG_RATIO.clone()
        up[i] += h
        down[i] -= h
        slope = clipped_loss(up, ADVANTAGE, LOW, HIGH) - clipped_loss(down, ADVANTAGE, LOW, HIGH)
        assert found[i].item() == pytest.approx(slope.item() / (2 * h), abs=1e-9)


def test_at_zero_log_ratio_the_gradient_is_minus_the_advantage():
    """What the first update of an iteration does: plain policy gradient."""
    found = gradient(clipped_loss, torch.zeros(3, dtype=torch.float64), f64(2, -1, 0), LOW, HIGH)
    assert found.tolist() == pytest.approx([-2 / 3, 1 / 3, 0], rel=1e-14)


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.3), (1e-4, 1e-3), (2e-6, 5e-6)])
def test_clipped_tells_which_samples_have_no_gradient(low, high):
    """On either side of both bounds for both signs; exactly on a bound the two still agree."""
    bounds = (math.log1p(-low), math.log1p(high))
    points = [bound * factor for bound in bounds for factor in (1 - 1e-9, 1 + 1e-9, 1)]
    log_ratio, advantage = f64(*points, *points), f64(*[1.0] * 6, *[-1.0] * 6)
    below, above = clipped(log_ratio, advantage, low, high)
    outside_low, outside_high = 1, 4
    grad = gradient(clipped_loss, log_ratio, advantage, low, high)
    off_bound = [i for i in range(12) if i % 3 != 2]
    assert [i for i in off_bound if above[i]] == [outside_high]
    assert [i for i in off_bound if below[i]] == [6 + outside_low]
    assert ((grad == 0) == (below | above)).all()


def test_a_clip_range_of_2e_6_is_decided_sharply_in_float32():
    """``rho`` itself has 17 float32 values there; the log-ratio tells 0.1 % apart."""
    log_ratio = torch.tensor([1.998e-6, 2.002e-6, -1.998e-6, -2.002e-6])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    grad = gradient(clipped_loss, log_ratio, advantage, 2e-6, 2e-6)
    assert (grad == 0).tolist() == [False, True, False, True]
    below, above = clipped(log_ratio, advantage, 2e-6, 2e-6)
    assert below.tolist() == [False, False, False, True]
    assert above.tolist() == [False, True, False, False]


# --- Guard, ratios, KL


def test_guard_is_its_definition():
    std = 0.4
    new, old = Gaussian(randn(3, 2, 4), std), Gaussian(randn(3, 2, 4, seed=1), std)
    x_next = old.sample(randn(3, 2, 4, seed=2))
    mse = ((new.mean - old.mean) ** 2).mean(dim=(1, 2))
    exact = (new.log_prob(x_next) - old.log_prob(x_next) + mse / (2 * std**2)) * std
    found = guard_log_ratio(new, old, x_next)
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-13)


def test_guard_has_zero_mean_over_the_noise():
    """By pairs eps, -eps; exactly, where no rounding hides it (mean 0, std a power of two)."""
    old = Gaussian(torch.zeros(3, 8, dtype=torch.float64), 0.25)
    new = Gaussian(randn(3, 8), 0.25)
    noise = randn(3, 8, seed=1)
    pair = [guard_log_ratio(new, old, old.sample(sign * noise)) for sign in (1, -1)]
    assert (pair[0] + pair[1] == 0).all()
    assert (pair[0] != 0).all()


def test_summed_ratio_has_mean_one_and_the_meaned_one_lies_below():
    """``E_old[rho] = 1`` by Gauss-Hermite quadrature over two latent dimensions.

    Ours is the mean over D, the D-th root of that ratio; its mean is known in closed form.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    noise = torch.tensor([[a, b] for a in nodes for b in nodes])
    weight = torch.tensor([a * b for a in weights for b in weights])
    std, shift = 0.5, f64(0.3, -0.2)
    old = Gaussian(torch.zeros(1, 2, dtype=torch.float64), std)
    new = Gaussian(shift[None], std)
    log_ratio = new.log_prob(old.sample(noise)) - old.log_prob(old.sample(noise))
    assert (weight * (2 * log_ratio).exp()).sum().item() == pytest.approx(1, abs=1e-12)
    size = float((shift / std).square().sum())
    below = math.exp(-size / 4 + size / 8)
    assert (weight * log_ratio.exp()).sum().item() == pytest.approx(below, rel=1e-12)


def test_kl_forms():
    """``gaussian`` is the true KL; ``time_weighted`` is the authors', over ``g^2`` alone."""
    sigma, sigma_next, eta = 0.6, 0.4, 0.8
    dt, g = sigma_next - sigma, eta * math.sqrt(sigma / (1 - sigma))
    x = randn(3, 2, 4)
    new = flow_sde(x, randn(3, 2, 4, seed=1), sigma, sigma_next, eta, 0.9)
    reference = flow_sde(x, randn(3, 2, 4, seed=2), sigma, sigma_next, eta, 0.9)
    true = kl_divergence(Normal(new.mean, new.std), Normal(reference.mean, new.std)).mean((1, 2))
    torch.testing.assert_close(kl_to_reference(new, reference, dt, "gaussian"), true)
    authors = ((new.mean - reference.mean) ** 2 / (2 * g**2)).mean(dim=(1, 2))
    torch.testing.assert_close(kl_to_reference(new, reference, dt), authors)
