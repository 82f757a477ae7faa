"""Advantages, clipping, Guard and KL against numpy, the textbook and closed forms, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from flowgrpo_ray.algorithm.advantages import (
    group_advantages,
    has_gradient,
    reward_wise_advantages,
)
from flowgrpo_ray.algorithm.flow import LIKELIHOODS, Gaussian, flow_sde
from flowgrpo_ray.algorithm.objectives import (
    FlowDppo,
    FlowGrpo,
    GrpoGuard,
    Objective,
    clipped,
    clipped_loss,
    diverged,
    guard_log_ratio,
    kl_to_reference,
)
from flowgrpo_ray.algorithm.objectives import Step as Replayed

NAN = float("nan")


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- advantages


def vector(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


def advantages_by_numpy(
    rewards: np.ndarray, weights: Sequence[float], group: np.ndarray, std: str, clamp: float
) -> np.ndarray:
    """The definition, sample by sample and reward by reward; ``rewards [R, B]``."""
    valid = np.asarray(~np.isnan(rewards).any(0))
    result = np.zeros(len(group))
    for i in np.flatnonzero(valid):
        for reward, weight in zip(rewards, weights, strict=True):
            members = reward[valid & (group == group[i])]
            if np.ptp(members) > 0:
                spread = np.std(members if std == "group" else reward[valid])
                result[i] += weight * (reward[i] - np.mean(members)) / (spread + 1e-4)
    return np.clip(result, -clamp, clamp)


def has_gradient_by_numpy(rewards: np.ndarray, group: np.ndarray) -> list[bool]:
    valid = np.asarray(~np.isnan(rewards).any(0))
    return [
        bool(valid[i] and np.ptp(rewards[:, valid & (group == k)], axis=1).any())
        for i, k in enumerate(group)
    ]


# Groups come in any order, of any size, flat ones among them (few distinct rewards), with NaN.
score = st.one_of(st.sampled_from([0.0, 1 / 3, NAN]), st.floats(-10, 10, allow_nan=False))
rows = st.lists(st.tuples(st.integers(-2, 2), score, score), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(rows=rows, std=st.sampled_from(["group", "global"]), clamp=st.sampled_from([0.7, 5.0]))
def test_advantages_are_numpys(rows, std, clamp):
    group, *columns = (np.array(column) for column in zip(*rows, strict=True))
    rewards, weights = np.stack(columns), vector(0.3, 2.0)

    def agree(found: np.ndarray, exact: np.ndarray) -> None:
        np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-9)

    one = group_advantages(rewards[0], group, std, clamp)
    exact = (rewards[:1], (1.0,), group, std, clamp)
    agree(one, advantages_by_numpy(*exact))
    assert (reward_wise_advantages(rewards[:1], vector(1), group, std, clamp) == one).all()
    agree(
        reward_wise_advantages(rewards, weights, group, std, clamp),
        advantages_by_numpy(rewards, (0.3, 2.0), group, std, clamp),
    )
    assert has_gradient(rewards[0], group).tolist() == has_gradient_by_numpy(rewards[:1], group)
    assert has_gradient(rewards, group).tolist() == has_gradient_by_numpy(rewards, group)


@pytest.mark.parametrize("std", ["group", "global"])
def test_no_reward_drowns_another_by_its_scale(std):
    """One reward in thousandths: to within ``ADVANTAGE_EPS`` of a spread of 1 nothing changes.

    Normalised after they are summed, it would be heard no more.
    """
    rewards, group, weights = randn(2, 64).numpy(), np.arange(64) % 8, vector(0.7, -1.5)
    scaled = rewards * vector(1, 1000)[:, None]
    before = reward_wise_advantages(rewards, weights, group, std)
    after = reward_wise_advantages(scaled, weights, group, std)
    assert 0 < np.abs(after - before).max() < 1e-3
    summed = group_advantages(weights @ scaled, group, std)
    assert np.abs(summed - before).max() > 0.5


def test_a_nan_in_one_reward_leaves_its_sample_out_of_all():
    group = np.array([0, 0, 0, 1, 1])
    rewards = np.stack([vector(1, 9, 3, 1, 2), vector(5, NAN, 6, NAN, 7)])
    found = reward_wise_advantages(rewards, vector(1, 1), group)
    alone = reward_wise_advantages(rewards[:, [0, 2]], vector(1, 1), group[[0, 2]])
    assert found[[0, 2]].tolist() == alone.tolist()
    assert alone.tolist() == pytest.approx([-1 / 1.0001 - 0.5 / 0.5001, 1 / 1.0001 + 0.5 / 0.5001])
    assert found[[1, 3, 4]].tolist() == [0, 0, 0]
    assert has_gradient(rewards, group).tolist() == [True, False, True, False, False]


def test_advantages_by_hand():
    """Two interleaved groups: 0, 1 (population std 1/2, sample std 0.71) and 1, 1, 4."""
    found = group_advantages(vector(0, 1, 1, 1, 4), np.array([3, 9, 3, 9, 9]))
    root2 = math.sqrt(2)
    assert found[[0, 2]].tolist() == pytest.approx([-0.5 / 0.5001, 0.5 / 0.5001], rel=1e-12)
    assert found[[1, 3, 4]].tolist() == pytest.approx(
        [-1 / (root2 + 1e-4)] * 2 + [2 / (root2 + 1e-4)], rel=1e-12
    )


def test_an_outlier_is_clamped_and_keeps_its_dtype():
    rewards = np.zeros(40, np.float32)
    rewards[7] = 1  # (1 - 1/40) / std = sqrt(39) = 6.2
    found = group_advantages(rewards, np.zeros(40, int))
    assert found.dtype == np.float32
    assert found[7] == 5
    assert group_advantages(rewards, np.zeros(40, int), clamp=1e9)[7] > 6


def test_global_std_is_that_of_all_rewards():
    rewards, group = vector(0, 1, 10, 14), np.array([0, 0, 1, 1])
    spread = np.std([0, 1, 10, 14]) + 1e-4
    found = group_advantages(rewards, group, std="global")
    assert found.tolist() == pytest.approx([c / spread for c in (-0.5, 0.5, -2, 2)], rel=1e-12)


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1e4 / 7])
def test_a_flat_group_has_exactly_no_advantage(value, dtype, std):
    """Rounding in the mean must not make a gradient: sum of 3 times 0.1, by 3, is not 0.1."""
    for size in range(1, 25):
        rewards = np.full(size + 2, value, dtype)
        rewards[-1] = value + 1  # a group with spread beside it, so that the global std is not 0
        group = np.array([0] * size + [1, 1])
        found = group_advantages(rewards, group, std)
        assert (found[:size] == 0).all()
        assert has_gradient(rewards, group).tolist() == [False] * size + [True] * 2


def test_nan_leaves_its_sample_out_and_changes_nothing_else():
    group = np.array([0, 0, 0, 1, 1, 1])
    with_nan = group_advantages(vector(1, NAN, 3, 0, NAN, NAN), group)
    without = group_advantages(vector(1, 3), np.array([0, 0]))
    assert with_nan[[0, 2]].tolist() == without.tolist()
    assert with_nan[[1, 3, 4, 5]].tolist() == [0, 0, 0, 0]  # one valid sample alone says nothing
    assert group_advantages(vector(NAN, NAN), np.array([0, 0]), "global").tolist() == [0, 0]


def test_an_unknown_std_is_named():
    with pytest.raises(ValueError, match="'batch'"):
        group_advantages(vector(0, 1), np.array([0, 0]), "batch")  # type: ignore[arg-type]


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


# --- Flow-DPPO's mask


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("log_ratio", [-1e-7, 1e-7])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_what_is_left_out_has_diverged_and_would_go_further(far, log_ratio, advantage):
    """Up with a ratio above 1, down with one below; a step back counts however far it has gone."""
    divergence = torch.tensor([1e-5 * (1.001 if far else 0.999)])
    away = (advantage > 0) == (log_ratio > 0)
    found = diverged(torch.tensor([log_ratio]), torch.tensor([advantage]), divergence, 1e-5)
    assert found.tolist() == [far and away]


def test_the_mask_on_its_edges():
    """Nothing is left out at a ratio of exactly 1; a divergence of the threshold is too much."""
    advantage, divergence = torch.tensor([-2.0, 0.0, 2.0]), torch.full((3,), 1e9)
    assert not diverged(torch.zeros(3), advantage, divergence, 1e-5).any()
    on = torch.full((3,), 0.25)
    assert diverged(torch.ones(3), advantage, on, 0.25).tolist() == [False, False, True]


# --- the objectives as a whole, against their formulas in numpy

STD, DT = 0.45, -0.15


@dataclass(frozen=True)
class Step:
    """One step of ``B`` samples in float64, ``[B, D]``."""

    new: np.ndarray
    old: np.ndarray
    reference: np.ndarray
    x_next: np.ndarray
    advantage: np.ndarray

    def log_ratio(self, kind: str, likelihood: str) -> np.ndarray:
        """As printed: the difference of two log-probabilities; with RatioNorm for Guard."""
        scale = 1.0 if likelihood == "squared_error" else 2 * STD**2
        change = (self.x_next - self.old) ** 2 - (self.x_next - self.new) ** 2
        found = change.mean(1) / scale
        return (found + self.divergence()) * STD if kind == "grpo_guard" else found

    def divergence(self) -> np.ndarray:
        """KL to the policy that sampled."""
        return ((self.new - self.old) ** 2).mean(1) / (2 * STD**2)

    def loss(self, objective: Objective, likelihood: str) -> float:
        log_ratio, a = self.log_ratio(objective.kind, likelihood), self.advantage
        rho = np.exp(log_ratio)
        if objective.kind == "flow_dppo":
            corrective = np.sign(rho - 1) != np.sign(a)
            keep = (self.divergence() < objective.max_divergence) | corrective
            each = -a * rho * keep
        else:
            bounded = np.clip(rho, 1 - objective.clip_low, 1 + objective.clip_high)
            each = np.maximum(-a * rho, -a * bounded)
            each = each / (abs(DT) if objective.kind == "grpo_guard" else 1)
        kl = 0.0
        if objective.kl is not None:
            kl = objective.kl.beta * ((self.new - self.reference) ** 2).mean(1) / (2 * STD**2)
            kl *= abs(DT) if objective.kl.form == "time_weighted" else 1
        return float(np.mean(each + kl))

    def slopes(self, objective: Objective, likelihood: str) -> np.ndarray:
        """Of the loss by the network's means, by central differences."""
        found, h = np.zeros_like(self.new), 1e-6
        for at in np.ndindex(*self.new.shape):
            up, down = self.new.copy(), self.new.copy()
            up[at] += h
            down[at] -= h
            pair = [replace(self, new=new).loss(objective, likelihood) for new in (up, down)]
            found[at] = (pair[0] - pair[1]) / (2 * h)
        return found


def draw_step(upwards: bool, advantage: float) -> Step:
    """Sample 0 has a ratio above or below 1, and ``advantage``; the others are as they come."""
    rng = np.random.default_rng(3)
    old, noise, shift, off = rng.normal(size=(4, 3, 8))
    new = old + 0.02 * shift
    new[0] = old[0] + (0.1 if upwards else -0.1) * noise[0] + 0.02 * shift[0]
    return Step(new, old, old + 0.1 * off, old + STD * noise, np.array([advantage, 0.8, -1.3]))


def bounded_near(step: Step, kind: str, likelihood: str, factor: float, kl: object) -> Objective:
    """The objective whose bound lies at ``factor`` times where sample 0 is, on the same side."""
    if kind == "flow_dppo":
        bound = float(step.divergence()[0]) * factor
        return FlowDppo.model_validate({"kind": kind, "max_divergence": bound, "kl": kl})
    at = float(step.log_ratio(kind, likelihood)[0])
    low, high = (10 * at, at) if at > 0 else (-at, -10 * at)
    bounds = {"clip_low": -math.expm1(-low * factor), "clip_high": math.expm1(high * factor)}
    cls = FlowGrpo if kind == "flow_grpo" else GrpoGuard
    return cls.model_validate({"kind": kind, **bounds, "kl": kl})


@pytest.mark.parametrize("form", [None, "time_weighted", "gaussian"])
@pytest.mark.parametrize("factor", [0.5, 0.999, 1.001, 2])
@pytest.mark.parametrize(("upwards", "advantage"), [(u, a) for u in (0, 1) for a in (-0.7, 1.1)])
@pytest.mark.parametrize(
    ("kind", "likelihood"),
    [
        ("flow_grpo", "gaussian"),
        ("flow_grpo", "squared_error"),
        ("grpo_guard", "gaussian"),
        ("flow_dppo", "gaussian"),
    ],
)
def test_every_objective_is_its_formula(kind, likelihood, upwards, advantage, factor, form):
    """Loss and gradient, well inside its bound, well outside and just beside it on both sides."""
    step = draw_step(bool(upwards), advantage)
    kl = None if form is None else {"beta": 0.3, "form": form}
    objective = bounded_near(step, kind, likelihood, factor, kl)
    mean = torch.from_numpy(step.new).requires_grad_()
    new, x_next = Gaussian(mean, STD), torch.from_numpy(step.x_next)
    old, reference = (Gaussian(torch.from_numpy(m), STD) for m in (step.old, step.reference))
    log_prob = LIKELIHOODS[likelihood]
    log_ratio = log_prob(new, x_next) - log_prob(old, x_next)
    replayed = Replayed(2, DT, new, x_next, log_ratio, old, reference)
    found = objective.terms(replayed, torch.from_numpy(step.advantage))
    low, high = (found.statistics[f"clip_fraction.{side}"] for side in ("low", "high"))

    loss = found.loss.mean() * found.weight
    if objective.kl is not None:
        assert objective.penalties == {"kl": 0.3}
        loss = loss + 0.3 * found.statistics["kl"].mean()
    loss.backward()
    assert mean.grad is not None
    assert loss.item() == pytest.approx(step.loss(objective, likelihood), rel=1e-12)
    slopes = step.slopes(objective, likelihood)
    np.testing.assert_allclose(mean.grad.numpy(), slopes, rtol=1e-6, atol=1e-9)
    exact = step.log_ratio(kind, likelihood)
    np.testing.assert_allclose(found.gate.detach().numpy(), exact, rtol=1e-10, atol=1e-12)

    away = bool(upwards) == (advantage > 0)
    outside = away and factor < 1
    assert (bool(high[0]), bool(low[0])) == (
        outside and advantage > 0,
        outside and advantage < 0,
    )
    if form is None:
        assert (slopes[0] == 0).all() == outside
        free = (slopes == 0).all(1)
        assert (low | high).tolist() == free.tolist()


# --- Guard, ratios, KL


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
