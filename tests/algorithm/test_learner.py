"""The learner: ratio gate, gradients, optimizer, averages, state; one rank, then two."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from tiny_runs import (
    CPU,
    LORA,
    TUNINGS,
    Batch,
    Case,
    RankResult,
    alone,
    conditions,
    draw_batch,
    draw_batches,
    gradients,
    in_shards,
    kept,
    largest_difference,
    largest_of,
    meeting,
    one_thread,
    other_rank,
    rank_results,
    sampler,
    schedule,
    small_spec,
    state_of,
    train_and_reload,
    unit,
    update,
)

from flowgrpo_ray.algorithm import optimizer as optimizer_module
from flowgrpo_ray.algorithm.learner import Learner
from flowgrpo_ray.algorithm.optimizer import LossScale
from flowgrpo_ray.algorithm.parallel import join_group
from flowgrpo_ray.algorithm.sampling import batch_condition
from flowgrpo_ray.algorithm.weights import digest, load_arrays
from flowgrpo_ray.common.errors import ContractError
from flowgrpo_ray.common.types import LearnerState, MicrobatchStats
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.policies.kernels import cast_by_autocast
from flowgrpo_ray.run.checkpoint import Progress, load_checkpoint, save_checkpoint
from flowgrpo_ray.spec.training import TrainingSpec

KL = "objective.kl={beta: 0.5, form: gaussian}"
TRUE_KL, WEIGHTED_KL = "{beta: 0.5, form: gaussian}", "{beta: 3, form: time_weighted}"


def grpo(bound: str, kl: str = "null", kind: str = "flow_grpo") -> str:
    return (
        f"objective={{kind: {kind}, updates: 1, clip_low: {bound}, clip_high: {bound}, kl: {kl}}}"
    )


def guard(bound: str, kl: str = "null") -> str:
    return grpo(bound, kl, kind="grpo_guard")


def dppo(bound: str, kl: str = "null") -> str:
    return f"objective={{kind: flow_dppo, updates: 1, max_divergence: {bound}, kl: {kl}}}"


GUARD, DPPO = guard("1e-3"), dppo("1e-5")
NO_NOISE = ("sampling.eta=null", "sampling.window=null")
TIMES = "times: {count: 2, within: [0.3, 1]}"
NFT = (
    *NO_NOISE,
    f"objective={{kind: diffusion_nft, beta: 0.5, {TIMES}, reference: 0.1, "
    "decay: {rate: 0.3, cap: 0.5}}",
)
AWM = (
    *NO_NOISE,
    f"objective={{kind: awm, {TIMES}, reference: 0.1, anchor: 0.5, "
    "anchor_decay: {rate: 0.3, cap: 0.5}}",
)


@pytest.fixture(scope="module", autouse=True)
def _alone_on_one_thread() -> Iterator[None]:
    with one_thread(), alone():
        yield


def published(learner: Learner, version: int, *overrides: str) -> tuple[Policy, Batch]:
    """Publish, load into a fresh worker, sample: a worker and an on-policy micro-batch."""
    ticket, arrays = learner.publish(version)
    worker = sampler(small_spec(*overrides))
    load_arrays(worker.trainable(), arrays)
    assert digest(worker.trainable()) == ticket.digest
    means = learner.spec.objective.keeps_old
    return worker, draw_batch(worker, unit(schedule(range(1, 3))), ticket, keep_old=means)


def arrays_digest(arrays: dict[str, np.ndarray]) -> str:
    return digest({name: torch.from_numpy(array) for name, array in arrays.items()})


def state_digests(state: LearnerState) -> dict[str, str]:
    """Of everything that the next update depends on."""
    arrays = {n: arrays_digest(getattr(state, n)) for n in ("weights", "ema", "follower")}
    arrays |= {n: arrays_digest(getattr(state, n)) for n in ("exp_avg", "exp_avg_sq")}
    numbers = ("updates", "loss_scale", "scale_held")
    return arrays | {name: repr(getattr(state, name)) for name in numbers}


# --- the ratio gate


@pytest.mark.parametrize(
    ("tuning", "objective", "guidance"),
    [("full", KL, 1.0), ("lora", KL, 3.0), ("lora", GUARD, 1.0), ("full", DPPO, 1.0)],
    ids=["full-grpo", "lora-grpo", "lora-guard", "full-dppo"],
)
def test_a_fresh_trajectory_passes_the_gate_with_a_ratio_of_exactly_one(
    tuning, objective, guidance
):
    overrides = (TUNINGS[tuning], objective, f"sampling.guidance={guidance}")
    learner = Learner(small_spec(*overrides), CPU)
    for version in range(2):  # the second under trained weights
        _, batch = published(learner, version, *overrides)
        floor = learner.measure_floor(batch.unit, batch.trajectory, conditions(guidance))
        assert largest_of(floor) == 0.0
        stats = batch.into(learner)
        assert (stats.samples, stats.gate_max) == (4, 0.0)
        assert stats.gate_sum.tolist() == stats.gate_square_sum.tolist() == [0, 0]
        assert (stats.sums["clip_fraction.low"], stats.sums["clip_fraction.high"]) == (0, 0)
        learner.step(4, 2)


@pytest.fixture(scope="module")
def gated() -> tuple[Learner, Batch]:
    """A learner before its first update, with a batch that the gate lets through."""
    learner = Learner(small_spec(), CPU)
    return learner, published(learner, 0)[1]


def refused(learner: Learner, batch: Batch) -> str:
    """The causes that the gate names."""
    with pytest.raises(ContractError, match="importance ratio") as error:
        batch.into(learner)
    return str(error.value).partition("Cause: ")[2]


def test_the_gate_names_stale_weights():
    learner = Learner(small_spec(), CPU)
    _, old = published(learner, 0)
    update(learner, [old])
    ticket, _ = learner.publish(1)
    cause = refused(learner, old)
    assert cause.startswith("stale weights: sampled with version 0")
    assert "published is 1" in cause
    assert old.trajectory.provenance.weights_digest[:8] in cause
    assert ticket.digest[:8] in cause
    assert ";" not in cause, "no other cause"


def test_the_gate_tells_weights_by_digest_not_by_number():
    """Same version, same values to within rounding, another digest: still not the published."""
    learner = Learner(small_spec(), CPU)
    _, batch = published(learner, 0)
    other = replace(batch.trajectory.provenance, weights_digest="0" * 32)
    forged = replace(batch, trajectory=replace(batch.trajectory, provenance=other))
    assert refused(learner, forged).startswith("stale weights: sampled with version 0 (00000000)")


def test_the_gate_names_another_micro_batch_size(gated):
    learner, batch = gated
    half = replace(
        batch,
        unit=replace(batch.unit, prompts=(0, 0), samples=(0, 1)),
        trajectory=replace(
            batch.trajectory,
            latents=batch.trajectory.latents[:2],
            log_probs=batch.trajectory.log_probs[:2],
        ),
        advantages=batch.advantages[:2],
        keep=batch.keep[:2],
    )
    found = refused(learner, half)
    assert found == "batch geometry: sampled in a micro-batch of 4, trained in one of 2"


def test_the_gate_names_another_dtype(gated):
    learner, _ = gated
    ticket, arrays = learner.publish(0)
    worker = sampler(small_spec("model.dtype=bfloat16"))
    load_arrays(worker.trainable(), arrays)
    batch = draw_batch(worker, unit(schedule(range(1, 3))), ticket)
    assert refused(learner, batch) == "dtype: sampled in bfloat16, trained in float32"


def test_the_gate_names_another_schedule(gated):
    learner, batch = gated
    shifted = replace(batch.unit.schedule, sigma=(1.0, 0.9, 0.7, 0.5, 0.3, 0.0))
    cause = refused(learner, replace(batch, unit=replace(batch.unit, schedule=shifted)))
    assert cause.startswith("schedule: sampled with ")
    assert "0.9" in cause


@pytest.mark.parametrize(
    ("objective", "part"),
    [(KL, "log_probs"), (GUARD, "old"), (DPPO, "log_probs")],
    ids=["grpo", "guard", "dppo"],
)
def test_the_gate_fires_on_the_smallest_difference_even_if_all_else_agrees(objective, part):
    learner = Learner(small_spec(LORA, objective), CPU)
    _, batch = published(learner, 0, LORA, objective)
    off = {part: np.nextafter(getattr(batch.trajectory, part), np.float32(9))}
    with pytest.raises(ContractError, match=r"where it must be 0.*compute differently"):
        replace(batch, trajectory=replace(batch.trajectory, **off)).into(learner)


def test_the_floor_is_that_of_the_ratio_that_the_objective_clips():
    """Guard's is made of means, not of log-probabilities."""
    learner = Learner(small_spec(LORA, GUARD), CPU)
    _, batch = published(learner, 0, LORA, GUARD)

    def floor(**changed: np.ndarray) -> float:
        trajectory = replace(batch.trajectory, **changed)
        return largest_of(learner.measure_floor(batch.unit, trajectory, conditions()))

    assert floor(log_probs=batch.trajectory.log_probs + 1) == 0
    assert batch.trajectory.old is not None
    assert 0 < floor(old=batch.trajectory.old + np.float32(1e-4)) < 1e-3


def test_there_is_no_gate_after_the_first_update():
    """Of two updates in an iteration the second is off-policy by one: that is what rho is for."""
    learner = Learner(small_spec(), CPU)
    _, batch = published(learner, 0)
    update(learner, [batch])
    assert batch.into(learner).gate_max > 0


# --- updates against autograd, written out


@dataclass(frozen=True)
class Terms:
    """What one stochastic step makes of the samples of a micro-batch that are kept, ``[kept]``."""

    policy_loss: torch.Tensor
    kl: torch.Tensor
    log_ratio: torch.Tensor
    low: torch.Tensor  # without gradient because the ratio is too low
    high: torch.Tensor


@dataclass(frozen=True)
class Pass:
    """One update over all micro-batches."""

    gradient: dict[str, torch.Tensor]
    norm: float
    terms: list[list[Terms]]  # by micro-batch and step


def oracle(
    spec: TrainingSpec, batches: Sequence[Batch], epochs: int
) -> tuple[list[Pass], dict[str, np.ndarray]]:
    """Plain PyTorch on one unsharded network: the passes, and the final weights.

    The formulas are those of the papers (``rho``, ``max``, ``clip``) in float64 after the network,
    the mean is taken over all terms at once, and samples that are left out are not looked at.
    """
    policy = load_policy(spec, CPU, frozenset({"network"}))
    policy.tune(spec.seed, with_reference=True)
    parameters = policy.trainable()
    rates = spec.optimizer
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=rates.learning_rate,
        betas=rates.betas,
        eps=rates.eps,
        weight_decay=rates.weight_decay,
    )
    beta = spec.objective.kl.beta if spec.objective.kl else 0.0
    passes = []
    for _ in range(epochs):
        terms = [terms_of(policy, spec, batch) for batch in batches]
        loss = torch.cat([t.policy_loss + beta * t.kl for steps in terms for t in steps]).mean()
        loss.backward()
        found = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        norm = float(torch.cat([g.flatten() for g in found.values()]).double().norm())
        passes.append(Pass({n: g.clone() for n, g in found.items()}, norm, terms))
        for gradient in found.values():
            gradient.mul_(min(1.0, rates.grad_norm / norm))
        optimizer.step()
        optimizer.zero_grad()
    return passes, {n: p.detach().numpy() for n, p in parameters.items()}


def terms_of(policy: Policy, spec: TrainingSpec, batch: Batch) -> list[Terms]:
    """Of each stochastic step. The batches were sampled under the untrained weights, so those give
    both the old means and the KL reference."""
    objective, of = spec.objective, batch.unit.schedule
    condition = batch_condition(policy, conditions(policy.guidance), batch.unit.prompts)
    latents, keep = torch.from_numpy(batch.trajectory.latents), torch.from_numpy(batch.keep)
    a = torch.from_numpy(batch.advantages).double()
    terms = []
    for k, step in enumerate(of.stochastic_steps):
        x, x_next, s = latents[:, k], latents[:, k + 1].double(), of.sigma[step]
        dt = of.sigma[step + 1] - s
        g2 = of.eta[step] ** 2 * s / (1 - s)
        var = g2 * -dt

        def mean(x=x, s=s, dt=dt, g2=g2):
            v = policy.velocity(x, s, condition).double()
            return x * (1 + g2 / (2 * s) * dt) + v * (1 + g2 * (1 - s) / (2 * s)) * dt

        new = mean()
        with torch.no_grad(), policy.reference():
            old = mean()
        change = ((x_next - old) ** 2 - (x_next - new) ** 2).flatten(1).mean(1)
        divergence = ((new - old) ** 2).flatten(1).mean(1) / (2 * var)
        log_ratio = change / (1 if of.likelihood == "squared_error" else 2 * var)
        if objective.kind == "grpo_guard":
            log_ratio = (log_ratio + divergence) * var**0.5
        rho = log_ratio.exp()
        if objective.kind == "flow_dppo":
            far = divergence >= objective.max_divergence
            low, high = far & (a < 0) & (rho < 1), far & (a > 0) & (rho > 1)
            loss = torch.where(low | high, 0.0, -a * rho)
        else:
            below, above = 1 - objective.clip_low, 1 + objective.clip_high
            low, high = (a < 0) & (rho < below), (a > 0) & (rho > above)
            loss = torch.maximum(-a * rho, -a * rho.clamp(below, above))
            loss = loss / (abs(dt) if objective.kind == "grpo_guard" else 1)
        kl = torch.zeros_like(loss)
        if objective.kl is not None:
            kl = divergence * (abs(dt) if objective.kl.form == "time_weighted" else 1)
        terms.append(Terms(*(t[keep] for t in (loss, kl, log_ratio, low, high))))
    return terms


def assert_stats(stats: MicrobatchStats, steps: Sequence[Terms]) -> None:
    """As in the oracle, to the rounding of a float32 log-probability, 1e-6."""
    n = len(steps[0].log_ratio)
    ratios = torch.stack([t.log_ratio.detach() for t in steps]).numpy()
    assert stats.samples == n
    assert stats.gate_sum == pytest.approx(ratios.sum(1), abs=n * 3e-6)
    assert stats.gate_square_sum == pytest.approx((ratios**2).sum(1), rel=1e-3, abs=1e-9)
    assert stats.gate_max == pytest.approx(np.abs(ratios).max(), abs=3e-6)
    assert stats.sums["clip_fraction.low"] == sum(int(t.low.sum()) for t in steps)
    assert stats.sums["clip_fraction.high"] == sum(int(t.high.sum()) for t in steps)
    policy_loss = sum(float(t.policy_loss.detach().sum()) for t in steps)
    assert stats.policy_loss_sum == pytest.approx(policy_loss, rel=1e-4, abs=2e-5)
    kl = sum(float(t.kl.detach().sum()) for t in steps)
    assert stats.sums.get("kl", 0.0) == pytest.approx(kl, rel=1e-3, abs=1e-12)


# eps: some gradients are 0 in exact arithmetic (a key's bias shifts all attention logits alike);
# AdamW with its usual eps = 1e-8 would turn their rounding noise into steps of a learning rate.
OPTIMIZER = "optimizer={learning_rate: 1e-3, betas: [0.8, 0.95], weight_decay: 0.1, eps: 1e-3, "


@pytest.mark.parametrize(
    ("tuning", "objective", "grad_norm", "likelihood"),
    [
        pytest.param("full", grpo("8e-4", TRUE_KL), 1e-2, "gaussian", id="full-grpo-kl"),
        pytest.param("full", grpo("4e-3"), 1e3, "squared_error", id="full-squared-error"),
        pytest.param("lora", grpo("8e-4", WEIGHTED_KL), 1e3, "gaussian", id="lora-grpo-kl"),
        pytest.param("full", guard("3e-3", WEIGHTED_KL), 1e3, "gaussian", id="full-guard-kl"),
        pytest.param("lora", guard("1e-4"), 1e-2, "gaussian", id="lora-guard"),
        pytest.param("full", dppo("1e-5"), 1e-2, "gaussian", id="full-dppo"),
        pytest.param("lora", dppo("2e-6", TRUE_KL), 1e3, "gaussian", id="lora-dppo-kl"),
    ],
)
def test_two_epochs_are_those_of_plain_autograd(tuning, objective, grad_norm, likelihood):
    """Two passes over the same micro-batches: in the second, ratios, bounds and KL all count.

    The two sum in another order (per micro-batch and divided at the end, or a mean over all at
    once), so they agree to float32 rounding. Measured: gradients to 1.2e-5 of the largest, weights
    to 1.2e-7 where the updates move them by 1e-3.
    """
    spec = small_spec(
        TUNINGS[tuning],
        objective,
        OPTIMIZER + f"grad_norm: {grad_norm}}}",
        f"sampling.likelihood={likelihood}",
    )
    batches = draw_batches(spec, 2)
    learner = Learner(spec, CPU)
    passes, weights = oracle(spec, batches, 2)
    terms = kept(batches) * 2
    assert terms == 14
    stats: list[MicrobatchStats] = []
    for n, exact in enumerate(passes):
        stats = [batch.into(learner) for batch in batches]
        for one, steps in zip(stats, exact.terms, strict=True):
            assert_stats(one, steps)
        scaled = {name: g / terms for name, g in gradients(learner).items()}
        top = max(float(g.abs().max()) for g in exact.gradient.values())
        assert largest_difference(scaled, exact.gradient) < GRADIENT_BOUND * top
        found = learner.step(kept(batches), 2).grad_norm
        assert found == pytest.approx(exact.norm, rel=1e-5)
        assert (found > grad_norm) == (grad_norm < 1)
        bounded = sum(s.sums["clip_fraction.low"] + s.sums["clip_fraction.high"] for s in stats)
        assert 0 < bounded < terms if n else bounded == 0
    assert stats[0].gate_max > 1e-4
    assert largest_difference(state_of(learner).weights, weights) < WEIGHT_BOUND
    untrained = sampler(spec).trainable()
    moved = largest_difference(weights, {n: p.detach() for n, p in untrained.items()})
    assert moved > 100 * WEIGHT_BOUND


GRADIENT_BOUND = 3e-5  # of the largest gradient
WEIGHT_BOUND = 5e-7


@pytest.mark.parametrize(
    ("tuning", "objective"),
    [
        pytest.param("full", grpo("0.9"), id="full-grpo"),
        pytest.param("lora", grpo("0.9", TRUE_KL), id="lora-grpo-kl"),
        pytest.param("full", guard("0.9", TRUE_KL), id="full-guard-kl"),
        pytest.param("lora", dppo("1", TRUE_KL), id="lora-dppo-kl"),
    ],
)
def test_masked_samples_contribute_nothing(tuning, objective):
    """Bit for bit the same gradient if their latents are anything else."""
    spec = small_spec(TUNINGS[tuning], objective)
    worker = sampler(spec)
    batch = draw_batch(worker, unit(schedule(range(1, 3))), masked=[1, 2], keep_old=True)
    latents, log_probs = batch.trajectory.latents.copy(), batch.trajectory.log_probs.copy()
    latents[1:3] = np.random.default_rng(1).normal(size=latents[1:3].shape)
    log_probs[1:3] -= 0.5
    other = replace(
        batch, trajectory=replace(batch.trajectory, latents=latents, log_probs=log_probs)
    )
    learner = Learner(spec, CPU)
    update(learner, [batch])  # away from the reference, so that KL has a gradient
    found = []
    for given in (batch, other):
        stats = given.into(learner)
        assert stats.samples == 2
        kl = stats.sums.get("kl", 0.0)
        found.append((gradients(learner), stats.policy_loss_sum, kl, stats.gate_max))
        learner.step(0, 2)
    (a, *sums), (b, *other_sums) = found
    assert any(bool(g.any()) for g in a.values())
    assert largest_difference(a, b) == 0.0
    assert sums == other_sums


def test_a_tie_is_the_weight_of_the_kl_from_now_on():
    """Bit for bit the gradient of a learner whose spec says so."""
    changed, weaker = (
        Learner(small_spec(grpo("1e-3", kl)), CPU)
        for kl in ("{beta: 0.3, adapt: {reward: sign_colour}}", "{beta: 0.07}")
    )
    first, second = draw_batches(changed.spec, 2)
    found = []
    for learner, weight in ((changed, None), (changed, 0.07), (weaker, None)):
        if not learner.optimizer.updates:
            update(learner, [first])  # away from the reference, so that KL has a gradient
        if weight:
            learner.tie(weight)
        second.into(learner)
        found.append(gradients(learner))
        learner.step(0, 2)
    assert largest_difference(found[1], found[2]) == 0
    assert largest_difference(found[0], found[1]) > 0


def test_a_step_without_samples_changes_nothing():
    spec = small_spec(KL)
    batches = draw_batches(spec, 2)
    learner, other = Learner(spec, CPU), Learner(spec, CPU)
    update(learner, batches)
    update(other, batches)
    before = state_digests(state_of(learner))
    nothing = replace(batches[0], advantages=np.zeros(4, np.float32), keep=np.zeros(4, bool))
    stats = nothing.into(learner)
    assert (stats.samples, stats.gate_max, stats.sums.get("kl", 0.0)) == (0, 0.0, 0.0)
    assert stats.gate_sum.tolist() == [0, 0]
    assert learner.step(0, 2).grad_norm is None
    assert state_digests(state_of(learner)) == before
    assert not gradients(learner)
    update(learner, batches)
    update(other, batches)
    assert state_digests(state_of(learner)) == state_digests(state_of(other))


# --- float16 losses are scaled


@pytest.mark.parametrize("scale", [2.0**12, 2.0**-3])
def test_an_update_does_not_depend_on_the_scale(scale):
    """Powers of two cost no bits in float32: the gradient times the scale, the same update."""
    spec = small_spec(LORA, KL, "optimizer.grad_norm=1e-2")
    batches = draw_batches(spec, 2)
    plain, scaled = Learner(spec, CPU), Learner(spec, CPU)
    scaled.scale.value = scale
    for _ in range(2):
        for batch in batches:
            assert batch.into(plain).policy_loss_sum == batch.into(scaled).policy_loss_sum
        times = {name: g * scale for name, g in gradients(plain).items()}
        assert largest_difference(times, gradients(scaled)) == 0.0
        steps = [learner.step(kept(batches), 2) for learner in (plain, scaled)]
        assert steps[0].grad_norm == steps[1].grad_norm
        assert [step.loss_scale for step in steps] == [1, scale]
    scaled.scale.value = 1.0
    assert state_digests(state_of(scaled)) == state_digests(state_of(plain))


@pytest.mark.parametrize(("samples", "exponent"), [(1, 16), (4, 14), (24, 11), (64, 10)])
def test_the_first_scale_is_that_of_a_mean(samples, exponent):
    assert LossScale(torch.float16, samples).value == 2.0**exponent
    assert LossScale(torch.bfloat16, samples).value == 1.0


@pytest.mark.parametrize("objective", [(grpo("0.9"),), NFT], ids=["grpo", "nft"])
def test_no_update_is_lost_at_the_first_scale(objective):
    """Of the first ten, with the advantages of one good image in 24; that of a mean, which a sum
    over the samples is not, may be too large already."""
    spec = small_spec(TUNINGS["full"], "model.dtype=float16", *objective)
    (batch,) = draw_batches(spec, 1)
    advantages = np.array([4.8, -0.2, 4.8, -0.2], np.float32)
    batch = replace(batch, advantages=advantages, keep=np.ones(4, bool))
    learner = Learner(spec, CPU)
    assert [update(learner, [batch]).overflow for _ in range(10)] == [False] * 10
    assert learner.scale.value == 2.0**14


def test_an_overflow_costs_an_update_and_halves_the_scale():
    """The next update is that of a learner that never overflowed, but for its scale."""
    spec = small_spec(LORA, "model.dtype=float16", "ema={decay: 0.5, every: 1}", grpo("0.9"))
    batches = draw_batches(spec, 1)
    learner, other = Learner(spec, CPU), Learner(spec, CPU)
    assert learner.scale.value == 2.0**14, "2^16 of a mean over the micro-batch of 4"
    assert update(learner, batches) == replace(update(other, batches), seconds=ANY)
    learner.scale.value = 2.0**100
    before = state_digests(state_of(learner))
    stats = update(learner, batches)
    assert (stats.overflow, stats.grad_norm, stats.loss_scale) == (True, None, 2.0**100)
    after = state_digests(state_of(learner))
    changed = {name for name, of in after.items() if of != before[name]}
    assert changed == {"loss_scale", "scale_held"}
    assert (learner.scale.value, learner.scale.held) == (2.0**99, 0)
    assert not gradients(learner)
    learner.scale.value, learner.scale.held = 2.0**14, 1
    stats = update(learner, batches)
    assert not stats.overflow
    assert stats == replace(update(other, batches), seconds=ANY)
    assert state_digests(state_of(learner)) == state_digests(state_of(other))


def test_the_scale_doubles_after_enough_updates_without_overflow(monkeypatch):
    monkeypatch.setattr(optimizer_module, "SCALE_HOLDS", 2)
    spec = small_spec(LORA, "model.dtype=float16", grpo("0.9"))
    batches = draw_batches(spec, 1)
    learner = Learner(spec, CPU)
    learner.scale.value = 2.0**10
    scales = [update(learner, batches).loss_scale for _ in range(2)]
    assert scales == [2.0**10, 2.0**10]
    assert (learner.scale.value, learner.scale.held) == (2.0**11, 0)
    update(learner, batches)
    learner.scale.value = 2.0**100
    assert update(learner, batches).overflow
    assert (learner.scale.value, learner.scale.held) == (2.0**99, 0)  # it counts anew


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gradient_that_is_not_finite_stops_the_run(dtype):
    """In float16 once the scale is 1: then it is not the scale that makes it so."""
    learner = Learner(small_spec(LORA, f"model.dtype={dtype}"), CPU)
    learner.scale.value = 1.0
    (batch,) = draw_batches(learner.spec, 1)
    bad = replace(batch, advantages=np.full(4, np.inf, np.float32))
    bad.into(learner)
    before = arrays_digest(state_of(learner).weights)
    with pytest.raises(ContractError, match="gradient of update 1 is not finite"):
        learner.step(4, 2)
    assert arrays_digest(state_of(learner).weights) == before


# --- averaged weights


def test_averaging_follows_the_decay_of_its_formula():
    """``min((1 + n) / (10 + n), d)`` every second update; in float64 here, so to rounding."""
    spec = small_spec("ema={decay: 0.3, every: 2}", LORA)
    batches = draw_batches(spec, 1)
    learner = Learner(spec, CPU)
    average = {n: a.astype(np.float64) for n, a in state_of(learner).ema.items()}
    assert digest_of_ema(learner) == arrays_digest(state_of(learner).weights), "starts as they are"
    for n, decay in ((1, None), (2, 3 / 12), (3, None), (4, 0.3)):  # 5 / 14 is above 0.3
        before = digest_of_ema(learner)
        update(learner, batches)
        if decay is None:
            assert digest_of_ema(learner) == before, f"update {n}"
            continue
        weights = state_of(learner).weights
        average = {k: decay * a + (1 - decay) * weights[k] for k, a in average.items()}
        assert largest_difference(state_of(learner).ema, average) < 2e-7  # 6e-8 measured
    assert largest_difference(state_of(learner).ema, state_of(learner).weights) > 1e-4


def digest_of_ema(learner: Learner) -> str:
    return arrays_digest(state_of(learner).ema)


def test_no_decay_means_the_weights_themselves():
    spec = small_spec("ema={decay: 0, every: 1}", LORA)
    learner = Learner(spec, CPU)
    update(learner, draw_batches(spec, 1))
    assert digest_of_ema(learner) == arrays_digest(state_of(learner).weights)


# --- publishing


@pytest.mark.parametrize("tuning", TUNINGS)
def test_published_weights_are_those_that_a_worker_loads(tuning):
    spec = small_spec(TUNINGS[tuning])
    batches = draw_batches(spec, 1)
    learner = Learner(spec, CPU)
    update(learner, batches)
    last, arrays = learner.publish(5)
    averaged, mean_arrays = learner.publish(6, averaged=True)
    assert (last.version, averaged.version) == (5, 6)
    assert last.digest == arrays_digest(arrays) == arrays_digest(state_of(learner).weights)
    assert averaged.digest == arrays_digest(mean_arrays) == digest_of_ema(learner)
    assert last.digest != averaged.digest
    worker = sampler(spec)
    for ticket, loaded in ((last, arrays), (averaged, mean_arrays)):
        load_arrays(worker.trainable(), loaded)
        assert digest(worker.trainable()) == ticket.digest
    learner.step(0, 1)  # off-policy from here on: no gate
    update(learner, batches)
    assert arrays_digest(arrays) == last.digest, "later updates do not reach published arrays"
    assert arrays_digest(mean_arrays) == averaged.digest
    assert learner.publish(7)[0].digest not in (last.digest, averaged.digest)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_only_what_is_trained_is_published(tuning):
    """LoRA: the factors alone, a fraction of the network."""
    learner = Learner(small_spec(TUNINGS[tuning]), CPU)
    sizes = {name: part.numel() for name, part in learner.policy.network.named_parameters()}
    _, arrays = learner.publish(1)
    assert {name: array.size for name, array in arrays.items()} == {
        name: size for name, size in sizes.items() if tuning == "full" or ".lora_" in name
    }
    assert all(array.flags.c_contiguous for array in arrays.values())
    assert (len(arrays) < len(sizes)) == (tuning != "full")


def test_a_learner_holds_neither_encoders_nor_decoder():
    policy = Learner(small_spec(LORA), CPU).policy
    held = [part for part in vars(policy).values() if hasattr(part, "parameters")]
    assert held == [policy.network]
    pixels = load_policy(small_spec(LORA), CPU, frozenset({"network", "decoder"}))
    assert len([part for part in vars(pixels).values() if hasattr(part, "parameters")]) > 1


def test_a_run_without_averaging_publishes_the_weights():
    spec = small_spec(LORA, "ema=null")
    learner = Learner(spec, CPU)
    update(learner, draw_batches(spec, 1))
    assert learner.publish(1, averaged=True)[0].digest == learner.publish(1)[0].digest
    assert not state_of(learner).ema


def test_weights_of_another_network_are_refused():
    _, arrays = Learner(small_spec(LORA), CPU).publish(0)
    with pytest.raises(ContractError, match="do not fit the network"):
        load_arrays(sampler(small_spec()).trainable(), arrays)
    other = sampler(small_spec("tuning={kind: lora, rank: 2, alpha: 8}")).trainable()
    with pytest.raises(ContractError, match=r"\(2, 128\) here and \(4, 128\) there"):
        load_arrays(other, arrays)


# --- state

PROGRESS = Progress(2, 0, 0.0, 0, "", "")


@pytest.mark.parametrize(
    ("tuning", "ema", "dtype"),
    [
        ("full", "ema={decay: 0.9, every: 2}", "float32"),
        ("lora", "ema=null", "float32"),
        ("lora", "ema={decay: 0.9, every: 2}", "float16"),
    ],
    ids=["full-ema", "lora-no-ema", "lora-ema-float16"],
)
def test_saved_and_continued_is_the_same_as_never_stopped(
    tuning, ema, dtype, tmp_path, monkeypatch
):
    """Down to the scale of float16 losses, which doubles after the second update."""
    monkeypatch.setattr(optimizer_module, "SCALE_HOLDS", 2)
    spec = small_spec(TUNINGS[tuning], KL, ema, f"model.dtype={dtype}")
    batches = draw_batches(spec, 2)
    whole = Learner(spec, CPU)
    for _ in range(3):
        update(whole, batches)
    first = Learner(spec, CPU)
    update(first, batches)
    path = save_checkpoint(tmp_path, [state_of(first)], PROGRESS, keep=1)
    second = Learner(spec, CPU)
    second.load_state(load_checkpoint(path)[0])
    assert state_digests(state_of(second)) == state_digests(state_of(first))
    for _ in range(2):
        update(second, batches)
    assert state_digests(state_of(second)) == state_digests(state_of(whole))
    assert whole.scale.value == (2.0**15 if dtype == "float16" else 1.0)
    assert second.publish(3)[0] == whole.publish(3)[0]


def test_a_state_before_the_first_update_can_be_saved_and_loaded(tmp_path):
    spec = small_spec(LORA)
    first = Learner(spec, CPU)
    path = save_checkpoint(tmp_path, [state_of(first)], PROGRESS, keep=1)
    second = Learner(small_spec(LORA, "seed=8"), CPU)
    second.load_state(load_checkpoint(path)[0])
    assert state_digests(state_of(second)) == state_digests(state_of(first))


# --- several ranks

FULL_KL = (TUNINGS["full"], KL)
FRUGAL = "cluster.learner={offload_optimizer: true, activation_checkpointing: true}"
CASES = {
    "full-guard-kl": (TUNINGS["full"], guard("1e-3", TRUE_KL)),
    "full-sharded": FULL_KL,
    "full-lean": FULL_KL,
    "full-weights": FULL_KL,
    "full-gradients": FULL_KL,
    "full-copies": FULL_KL,
    "lora-grpo-kl": (LORA, KL),
    "lora-dppo": (LORA, DPPO),
    "lora-sharded": (LORA, KL, "cluster.learner.parallel=shard"),
    "full-lean-frugal": (*FULL_KL, FRUGAL),
    "lora-grpo-kl-frugal": (LORA, KL, FRUGAL),
    "full-nft": (TUNINGS["full"], *NFT),
    "full-nft-sharded": (TUNINGS["full"], *NFT),
    "lora-awm": (LORA, *AWM),
    "full-awm-sharded": (TUNINGS["full"], *AWM),
}
OTHERS = {
    "overflow": (LORA, "model.dtype=float16"),
    "full-bfloat16": (*FULL_KL, "model.dtype=bfloat16"),
}
LEAN = {"weights": False, "gradients": False}
PARALLEL = {
    "full-sharded": {},
    "full-nft-sharded": {},
    "full-awm-sharded": {},
    "full-bfloat16": {},
    "full-lean": LEAN,
    "full-weights": {"gradients": False},
    "full-gradients": {"weights": False},
    "full-lean-frugal": LEAN,
    "full-copies": {"copies": 2},
}
# Which cases run together, by fixture: so many ranks, and what they train on.
GROUPS = {
    "two_ranks": (
        2,
        {"full-guard-kl", "full-sharded", "full-lean", "lora-grpo-kl", *OTHERS}
        | {"full-nft-sharded"},
    ),
    "two_ranks_more": (
        2,
        {"full-weights", "full-gradients", "lora-dppo", "lora-sharded"}
        | {"full-lean-frugal", "lora-grpo-kl-frugal", "full-nft", "full-awm-sharded"}
        | {"lora-awm"},
    ),
    "four_ranks": (4, {"full-guard-kl", "full-sharded", "full-copies", "lora-grpo-kl"}),
}
Results = dict[int, RankResult]
Find = Callable[..., Results]


def group_of(case: str, count: int) -> str:
    return next(g for g, (ranks, names) in GROUPS.items() if ranks == count and case in names)


def on(case: str, count: int, *more: object) -> Any:
    """A test's parameters; all but the first group are slow."""
    marks = () if group_of(case, count) == "two_ranks" else pytest.mark.slow
    return pytest.param(case, count, *more, marks=marks)


TOGETHER = [on(n, count) for count, names in GROUPS.values() for n in CASES if n in names]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, Results]:
    return on_ranks("two_ranks", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def two_ranks_more(tmp_path_factory) -> dict[str, Results]:
    return on_ranks("two_ranks_more", tmp_path_factory.mktemp("more"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> dict[str, Results]:
    return on_ranks("four_ranks", tmp_path_factory.mktemp("four"))


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Find:
    """By case, and number of ranks if it is not two: what one rank and so many make of it."""
    return lambda case, count=2: request.getfixturevalue(group_of(case, count))[case]


def on_ranks(group: str, folder: Path) -> dict[str, Results]:
    """By case and number of gloo ranks, 1 or the group's: what they make of the same
    micro-batches."""
    count, names = GROUPS[group]
    listener = meeting()
    # Their imports take longer than their work: they start before there is any.
    others = torch.multiprocessing.spawn(
        other_rank,
        (count, listener.getsockname(), folder),
        nprocs=count - 1,
        join=False,
        daemon=True,
    )
    cases: dict[str, Case] = {}
    found: dict[str, Results] = {}
    known: dict[tuple[str, ...], tuple[Case, RankResult]] = {}
    for name, overrides in (CASES | OTHERS).items():
        if name not in names:
            continue
        if overrides not in known:
            spec = small_spec(*overrides, OPTIMIZER + "grad_norm: 0.5}")
            batches = draw_batches(spec, 2 if name == "overflow" else 4)
            if name == "overflow":  # on rank 1 alone
                huge = batches[1].advantages * np.float32(1e30)
                batches[1] = replace(batches[1], advantages=huge)
            case = Case(spec, batches, state_of(Learner(spec, CPU)))
            known[overrides] = case, train_and_reload(case, batches)
        case, alone = known[overrides]
        found[name] = {1: alone}
        cases[name] = replace(case, load=alone.state, parallel=PARALLEL.get(name))
    torch.distributed.destroy_process_group()
    (folder / f"{count}.pickle").write_bytes(pickle.dumps(cases))
    for name, together in rank_results(0, count, listener, folder).items():
        found[name][count] = together
    join_group(0, 1, meeting(), CPU)  # alone again
    while not others.join():  # pyright: ignore[reportOptionalMemberAccess]
        pass
    return found


def test_an_overflow_on_one_rank_is_one_of_all(ranks):
    """Both updates are skipped by rank 0 too, whose own micro-batches have good gradients."""
    one, two = ranks("overflow").values()
    assert one.grad_norms == two.grad_norms == [None, None]
    assert state_digests(two.state) == state_digests(one.state)
    untrained = state_of(Learner(small_spec(*OTHERS["overflow"]), CPU))
    skipped = replace(untrained, loss_scale=2.0**12)
    assert state_digests(one.state) == state_digests(skipped)


@pytest.mark.parametrize(("case", "count"), TOGETHER)
def test_several_ranks_train_as_one_process(ranks, case, count):
    """The ranks' gradients are summed in another order: rounding, and nothing else.

    Measured: gradients to 9e-8 of the largest, weights after two updates to 1.5e-8.
    """
    one, several = ranks(case, count).values()
    top = max(np.abs(g).max() for g in one.gradient.values())
    assert largest_difference(one.gradient, several.gradient) < 1e-6 * top
    assert several.grad_norms == pytest.approx(one.grad_norms, rel=1e-5)
    assert largest_difference(one.state.weights, several.state.weights) < 1e-6
    assert largest_difference(one.state.ema, several.state.ema) < 1e-6
    if one.state.follower:
        assert largest_difference(one.state.follower, several.state.follower) < 1e-6
    assert one.state.updates == several.state.updates == 2


@pytest.mark.parametrize(
    ("case", "count"), [on(case, 2) for case in ("full-guard-kl", "lora-grpo-kl", "lora-dppo")]
)
def test_replicas_meet_once_an_update(ranks, case, count):
    """To send what is trained, and nothing of what is frozen."""
    one, two = ranks(case, count).values()
    trained = sum(array.nbytes for array in one.state.weights.values())
    assert (one.sent, two.sent) == ([], [("allgather_", trained)])


def groups_of(case: str, ranks: int) -> tuple[list[int], list[int]]:
    """Bytes of what is gathered together, what lies outside of blocks first: a rank's shards, in
    half precision where autocast would cast them; and of the gradients, whole, in float32."""
    policy = sampler(small_spec(*(CASES | OTHERS)[case]))
    parameters = list(policy.network.parameters())
    halved = cast_by_autocast(policy.network) if policy.dtype == torch.bfloat16 else set()
    kinds = policy.block_classes()
    blocks = [[*m.parameters()] for m in policy.network.modules() if isinstance(m, kinds)]
    inside = {id(p) for block in blocks for p in block}
    shards, gradients = [], []
    for group in ([p for p in parameters if id(p) not in inside], *blocks):
        rows = [(-(-len(p) // ranks) * (p.numel() // len(p)), p) for p in group]
        shards.append(sum(n * (2 if id(p) in halved else 4) for n, p in rows))
        gradients.append(sum(n * 4 * ranks for n, p in rows if p.requires_grad))
    return shards, gradients


@pytest.mark.parametrize(
    ("case", "count", "shards"),
    [
        on("full-sharded", 2, 2),
        on("lora-sharded", 2, 2),
        on("full-bfloat16", 2, 2),
        on("full-sharded", 4, 4),
        on("full-copies", 4, 2),
    ],
)
def test_shards_meet_once_an_update_where_they_stay_whole(ranks, case, count, shards):
    """Four micro-steps on two ranks: each block is gathered in the first of them, its gradient
    reduced after the last; between copies of the network, the shards' gradients alone."""
    gathered, gradients = groups_of(case, shards)
    expected = [("_allgather_base_", size) for size in gathered]
    for size in filter(None, (*reversed(gradients[1:]), gradients[0])):
        expected.append(("_reduce_scatter_base_", size))
        if count > shards:
            expected.append(("allreduce_", size // shards))
    assert ranks(case, count)[count].sent == expected


@pytest.mark.parametrize(
    ("case", "count"), [on(case, 2) for case in ("full-lean", "full-weights", "full-gradients")]
)
def test_shards_meet_in_every_micro_step_for_what_is_not_kept_whole(ranks, case, count):
    """There are four. Weights: of blocks in each forward and backward, outside of them once."""
    keeps = {"weights": True, "gradients": True} | PARALLEL[case]
    (outside, *blocks), gradients = groups_of(case, count)
    gathered = [outside, *blocks] if keeps["weights"] else 4 * [outside, *blocks, *blocks]
    reduced = gradients if keeps["gradients"] else 4 * gradients
    expected = [("_allgather_base_", size) for size in gathered]
    expected += [("_reduce_scatter_base_", size) for size in reduced]
    assert sorted(ranks(case)[count].sent) == sorted(expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full-lean", "lora-grpo-kl"])
def test_what_saves_memory_changes_no_bit(ranks, case):
    """Offloaded moments and averages, recomputed activations; on one rank and on two."""
    for count in (1, 2):
        plain, frugal = ranks(case)[count], ranks(f"{case}-frugal")[count]
        assert largest_difference(plain.gradient, frugal.gradient) == 0.0
        assert frugal.grad_norms == plain.grad_norms
        assert state_digests(frugal.state) == state_digests(plain.state)


@pytest.mark.parametrize(("case", "count"), TOGETHER)
def test_a_state_moves_between_several_ranks_and_one_exactly(ranks, case, count):
    one, several = ranks(case, count).values()
    assert state_digests(several.reloaded) == state_digests(one.state), "from one rank to several"
    learner = Learner(small_spec(*CASES[case]), CPU)
    learner.load_state(several.state)
    assert state_digests(state_of(learner)) == state_digests(several.state), "from several to one"


HALF = ("model.dtype=bfloat16", grpo("1e-3"), "sampling.guidance=3.0")


@pytest.mark.parametrize(
    ("tuning", "keep"),
    [
        ("full", LEAN),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("full", {}), ("lora", {}), ("lora", LEAN))
        ),
    ],
)
def test_weights_gathered_in_half_precision_give_the_bits_that_autocast_gives(tuning, keep):
    """The ratio of shards to a worker's float32 weights is exactly 1, after updates and loads."""
    overrides = (TUNINGS[tuning], *HALF)
    learner = Learner(small_spec(*overrides), CPU, parallel=in_shards(**keep))
    first = state_of(learner)
    for version in range(3):
        if version == 2:  # while the weights of the last update are gathered
            learner.load_state(first)
        _, batch = published(learner, version, *overrides)
        floor = learner.measure_floor(batch.unit, batch.trajectory, conditions(3.0))
        assert largest_of(floor) == 0.0
        assert batch.into(learner).gate_max == 0.0
        if version < 1:
            learner.step(4, 2)
    assert state_digests(state_of(learner))["weights"] == state_digests(first)["weights"]
