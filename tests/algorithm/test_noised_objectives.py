"""DiffusionNFT and AWM against their formulas written down again, in float64, and against closed
forms; what they draw; and what a learner makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import (
    CPU,
    SIZE,
    TUNINGS,
    UNTRAINED,
    Batch,
    alone,
    conditions,
    draw_batches,
    kept,
    largest_of,
    one_thread,
    sampler,
    schedule,
    small_spec,
    state_of,
    unit,
    update,
)
from torch import Tensor

from flowgrpo_ray.algorithm.learner import Learner
from flowgrpo_ray.algorithm.objectives import Awm, DiffusionNft, Noised, NoisedObjective, Times
from flowgrpo_ray.algorithm.objectives.noised import Follower
from flowgrpo_ray.algorithm.sampling import (
    batch_condition,
    draw_levels,
    draw_noise,
    noise_again,
    replay_noised,
    rollout,
    velocities,
)
from flowgrpo_ray.algorithm.weights import digest, load_arrays
from flowgrpo_ray.common.errors import ContractError, SpecError
from flowgrpo_ray.common.types import Noising, WeightsTicket
from flowgrpo_ray.run.checkpoint import Progress, load_checkpoint, save_checkpoint
from flowgrpo_ray.spec.plan import plan_iteration
from flowgrpo_ray.spec.training import TrainingSpec

A = np.array([1.7, -0.6, 0.0, -7.0, 6.0])  # advantages: within the bounds, and beyond them
SHAPE = (5, 2, 3)


@pytest.fixture(scope="module", autouse=True)
def _alone_on_one_thread():
    with one_thread(), alone():
        yield


def drawn(seed: int = 0) -> dict[str, np.ndarray]:
    """A point with five samples, as plain arrays: all velocities lie near one another."""
    rng = np.random.default_rng(seed)
    clean, noise, old, away, off, drift = rng.normal(size=(6, *SHAPE))
    sigma = rng.uniform(0.2, 1, (5, 1, 1))
    return {
        "sigma": sigma,
        "clean": clean,
        "noise": noise,
        "x": (1 - sigma) * clean + sigma * noise,
        "velocity": old + 0.3 * away,
        "old": old,
        "reference": old + 0.2 * off,
        "anchor": old + 0.1 * drift,
    }


def point(arrays: dict[str, np.ndarray], velocity: Tensor | None = None) -> Noised:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Noised(**tensors | ({} if velocity is None else {"velocity": velocity}))


def mean_d(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1).mean(1)


def whole_loss(objective: NoisedObjective, at: Noised, advantage: np.ndarray) -> Tensor:
    """As the learner has it: the mean of the losses and of every penalty."""
    term = objective.terms(at, torch.from_numpy(advantage))
    loss = term.loss.mean() * term.weight
    for name, weight in objective.penalties.items():
        loss = loss + weight * term.statistics[name].mean()
    return loss


def gradient(objective: NoisedObjective, arrays: dict[str, np.ndarray], a: np.ndarray) -> Tensor:
    velocity = torch.from_numpy(arrays["velocity"]).requires_grad_()
    whole_loss(objective, point(arrays, velocity), a).backward()
    assert velocity.grad is not None
    return velocity.grad


# --- DiffusionNFT


def nft(**options) -> DiffusionNft:
    return DiffusionNft(kind="diffusion_nft", times=Times(count=1), **options)


def nft_by_numpy(p: dict[str, np.ndarray], beta: float, weight: float, *, adaptive: bool) -> float:
    """The paper's loss, with the published code's factor of 5 and its weights without gradient."""
    r = np.clip(np.clip(A, -5, 5) / 10 + 0.5, 0, 1)
    towards = beta * p["velocity"] + (1 - beta) * p["old"]
    away = (1 + beta) * p["old"] - beta * p["velocity"]
    branches = []
    for v in (towards, away):
        error = p["x"] - p["sigma"] * v - p["clean"]
        size = np.maximum(mean_d(np.abs(error)), 1e-5) if adaptive else 1.0
        branches.append(mean_d(error**2) / size)
    loss = 5 * (r * branches[0] + (1 - r) * branches[1]) / beta
    return float(loss.mean() + weight * mean_d((p["velocity"] - p["reference"]) ** 2).mean())


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize(("beta", "weight"), [(1.0, 1e-4), (0.1, 0.3), (1.7, 0.0)])
def test_nft_is_its_formula(beta: float, weight: float, adaptive: bool):
    """And its gradient that of finite differences, where the adaptive weights stay as they are."""
    p, objective = drawn(), nft(beta=beta, reference=weight, adaptive=adaptive)
    loss = whole_loss(objective, point(p), A)
    assert loss.item() == pytest.approx(nft_by_numpy(p, beta, weight, adaptive=adaptive), rel=1e-12)
    found = gradient(objective, p, A).numpy()
    sizes = None
    if adaptive:
        errors = [
            p["x"] - p["sigma"] * v - p["clean"]
            for v in (
                beta * p["velocity"] + (1 - beta) * p["old"],
                (1 + beta) * p["old"] - beta * p["velocity"],
            )
        ]
        sizes = [mean_d(np.abs(error)) for error in errors]
    r = np.clip(A / 10 + 0.5, 0, 1)

    def held(v: np.ndarray) -> float:
        towards = beta * v + (1 - beta) * p["old"]
        away = (1 + beta) * p["old"] - beta * v
        parts = [
            mean_d((p["x"] - p["sigma"] * b - p["clean"]) ** 2) / (sizes[i] if sizes else 1)
            for i, b in enumerate((towards, away))
        ]
        loss = 5 * (r * parts[0] + (1 - r) * parts[1]) / beta
        return float(loss.mean() + weight * mean_d((v - p["reference"]) ** 2).mean())

    for index in np.ndindex(SHAPE):
        step = np.zeros(SHAPE)
        step[index] = 1e-2  # it is a parabola
        slope = (held(p["velocity"] + step) - held(p["velocity"] - step)) / 2e-2
        assert found[index] == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_at_the_sampling_weights_nft_is_one_regression_times_its_sign(beta: float):
    """There both branches are one loss, and the gradient is ``2 r - 1`` times that of it."""
    p = drawn()
    p["velocity"] = p["old"].copy()
    objective = nft(beta=beta, reference=0.0)
    r = np.clip(A / 10 + 0.5, 0, 1)
    velocity = torch.from_numpy(p["velocity"]).requires_grad_()
    error = torch.from_numpy(p["x"] - p["clean"]) - torch.from_numpy(p["sigma"]) * velocity
    size = error.detach().abs().flatten(1).mean(1)
    regression = (error**2).flatten(1).mean(1) / size
    (5 * torch.from_numpy(2 * r - 1) * regression).mean().backward()
    torch.testing.assert_close(gradient(objective, p, A), velocity.grad, rtol=1e-12, atol=1e-14)
    term = objective.terms(point(p), torch.from_numpy(A))
    assert (term.gate == 0).all()
    assert torch.equal(term.statistics["regression.towards"], term.statistics["regression.away"])


def test_an_image_is_wholly_good_or_bad_at_the_ends():
    graded, strict = nft(), nft(advantage="strict")
    advantage = torch.tensor([-9.0, -5, -2.5, 0, 2.5, 5, 9], dtype=torch.float64)
    assert graded.optimality(advantage).tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert strict.optimality(advantage).tolist() == [0, 0, 0, 0.5, 1, 1, 1]
    assert nft(advantage_max=2.5).optimality(advantage).tolist() == [0, 0, 0, 0.5, 1, 1, 1]


@pytest.mark.parametrize(
    ("decay", "by_hand"),
    [
        (Follower(flat=0, rate=0.001, cap=0.5), {0: 0, 1: 0.001, 200: 0.2, 500: 0.5, 900: 0.5}),
        (
            Follower(flat=75, rate=0.0075, cap=0.999),
            {0: 0, 75: 0, 76: 0.0075, 175: 0.75, 209: 0.999, 1000: 0.999},
        ),
    ],
)
def test_the_published_decays_by_hand(decay: Follower, by_hand: dict[int, float]):
    assert {n: decay.decay(n) for n in by_hand} == pytest.approx(by_hand, rel=1e-12)


# --- AWM


def awm(**options) -> Awm:
    return Awm(kind="awm", **options)


def awm_by_numpy(p: dict[str, np.ndarray], v: np.ndarray, clip: float, power: float) -> float:
    """The clipped surrogate as printed, of the public code's `ghuber` likelihood."""

    def likelihood(velocity: np.ndarray) -> np.ndarray:
        error = mean_d((velocity - (p["noise"] - p["clean"])) ** 2)
        return -p["sigma"].ravel() * ((error + 1e-10) ** power - 1e-10**power) / power

    rho, a = np.exp(likelihood(v) - likelihood(p["old"])), A / 5
    loss = np.maximum(-a * rho, -a * np.clip(rho, 1 - clip, 1 + clip)).mean()
    loss += 0.02 * mean_d((v - p["reference"]) ** 2).mean()
    return float(loss + 0.7 * mean_d((v - p["anchor"]) ** 2).mean())


@pytest.mark.parametrize(("clip", "power"), [(1.0, 0.25), (0.01, 0.25), (1.0, 1.0)])
def test_awm_is_its_formula(clip: float, power: float):
    p, objective = drawn(), awm(clip=clip, power=power, reference=0.02, anchor=0.7)
    term = objective.terms(point(p), torch.from_numpy(A))
    bounded = term.statistics["clip_fraction.low"] | term.statistics["clip_fraction.high"]
    assert bool(bounded.any()) == (clip < 1)
    loss = whole_loss(objective, point(p), A).item()
    assert loss == pytest.approx(awm_by_numpy(p, p["velocity"], clip, power), rel=1e-12)
    found = gradient(objective, p, A).numpy()
    for index in np.ndindex(SHAPE):
        step = np.zeros(SHAPE)
        step[index] = 1e-5
        up, down = (awm_by_numpy(p, p["velocity"] + s * step, clip, power) for s in (1, -1))
        assert found[index] == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-9)


def test_awm_without_its_anchor_has_no_second_weights():
    assert awm(anchor=0.0).follower is None
    assert set(awm(anchor=0.0, reference=0.0).penalties) == set()


# --- what they draw


def noised_unit(noising: Noising, prompts=(0, 0, 1, 1), samples=(0, 1, 0, 1), **more):
    return unit(schedule(range(0), steps=8), prompts, samples, noising=noising, **more)


def test_draws_are_a_samples_own():
    """Whatever else is in its micro-batch; other samples, iterations and points have others."""
    noising = Noising(3, "uniform", (0.25, 0.75))
    both = noised_unit(noising)
    other = noised_unit(noising, (1, 2, 0), (1, 5, 1), index=3)
    levels, others = draw_levels(both), draw_levels(other)
    assert torch.equal(levels[3], others[0])
    assert torch.equal(levels[1], others[2])
    assert len(torch.unique(torch.cat([levels, others[1:2]]))) == 15
    assert not torch.equal(levels, draw_levels(replace(both, iteration=2)))
    assert ((levels >= 0.25) & (levels <= 0.75)).all()
    noise = [draw_noise(both, f"noise {k}", (2,)) for k in range(3)]
    assert torch.equal(noise[1][3], draw_noise(other, "noise 1", (2,))[0])
    assert len(torch.unique(torch.stack(noise))) == 24
    clean = torch.zeros(4, 2)
    for k, (sigma, drawn_noise, x) in enumerate(noise_again(both, clean)):
        assert torch.equal(sigma[:, 0], levels[:, k])
        assert torch.equal(drawn_noise, noise[k])
        assert torch.equal(x, sigma * drawn_noise)


def test_levels_are_where_they_are_asked_for():
    many = {"prompts": (0,) * 400, "samples": tuple(range(400))}
    uniform = draw_levels(noised_unit(Noising(1, "uniform", (0.5, 1)), **many))
    assert uniform.mean().item() == pytest.approx(0.75, abs=0.02)
    parts = draw_levels(noised_unit(Noising(5, "stratified", (0, 1)), **many))
    edges = torch.tensor([0.8, 0.6, 0.4, 0.2, 0.0])
    assert ((parts >= edges) & (parts <= edges + 0.2)).all()
    steps = noised_unit(Noising(3, "steps", (0.3, 1)), **many)
    stops = [s for s in steps.schedule.sigma[:-1] if s >= 0.3]
    found = draw_levels(steps)
    assert set(found.unique().tolist()) == set(torch.tensor(stops).tolist())
    assert (found[:, :-1] > found[:, 1:]).all(), "different ones"
    few = "objective.times={count: 4, draw: steps, within: [0.5, 1]}"
    spec = small_spec(*NO_NOISE, KINDS["nft"], few)
    with pytest.raises(SpecError, match=r"count = 4 .* stops at 2 noise levels in within"):
        plan_iteration(spec, 1, 256, (*steps.schedule.sigma[::2], 0.0))


# --- a learner

TIMES = "times: {count: 2, within: [0.3, 1]}"
NO_NOISE = ("sampling.eta=null", "sampling.window=null")
KINDS = {
    "nft": f"objective={{kind: diffusion_nft, beta: 0.5, {TIMES}, reference: 0.1, "
    "decay: {rate: 0.3, cap: 0.4}}",
    "awm": f"objective={{kind: awm, {TIMES}, reference: 0.1, anchor: 0.5, "
    "anchor_decay: {rate: 0.3, cap: 0.4}}",
}


def spec_of(kind: str, tuning: str = "full"):
    return small_spec(*NO_NOISE, KINDS[kind], TUNINGS[tuning])


def progress(spec: TrainingSpec) -> Progress:
    return Progress(2, 0, 0.0, 0, spec.identity(), "")


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_image_has_the_velocities_it_was_sampled_with(kind: str, tuning: str):
    """Bit for bit, of the sampling weights and of the untrained model; so the gate is exactly 0,
    and the smallest difference opens it."""
    spec = spec_of(kind, tuning)
    batch = draw_batches(spec)[0]
    learner = Learner(spec, CPU)
    ticket = WeightsTicket(UNTRAINED.version, digest(learner.parameters))
    trajectory = replace(
        batch.trajectory,
        provenance=replace(batch.trajectory.provenance, weights_digest=ticket.digest),
    )
    learner.publish(0)
    assert largest_of(learner.measure_floor(batch.unit, trajectory, conditions())) == 0
    stats = replace(batch, trajectory=trajectory).into(learner)
    assert (stats.gate_max, stats.gated) == (0, True)
    assert stats.sums["reference_distance"] == 0, "untrained"
    assert trajectory.old is not None
    off = replace(trajectory, old=np.nextafter(trajectory.old, np.float32(9)))
    with pytest.raises(ContractError, match=r"before the first update.*compute differently"):
        replace(batch, trajectory=off).into(learner)


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_of_weights_follows_after_the_last_update(kind: str):
    spec = spec_of(kind)
    learner, batches = Learner(spec, CPU), draw_batches(spec)
    for batch in batches:
        batch.into(learner)
    untrained = state_of(learner).weights
    learner.step(kept(batches), 2, last=False)
    state = state_of(learner)
    assert all((state.follower[n] == untrained[n]).all() for n in untrained), "not yet"
    update(learner, batches)
    state = state_of(learner)
    moved = 0.0
    for name, weights in state.weights.items():  # two updates: 0.3 x 2, at most 0.4
        expected = 0.4 * untrained[name].astype(np.float64) + 0.6 * weights
        np.testing.assert_allclose(state.follower[name], expected, rtol=1e-5, atol=1e-7)
        moved = max(moved, float(np.abs(weights - untrained[name]).max()))
    assert moved > 1e-3


def test_nft_samples_with_the_weights_that_follow():
    """They are published, and gated by version and digest alone once they are not the trained."""
    spec = spec_of("nft")
    learner, batches = Learner(spec, CPU, sampler(spec)), draw_batches(spec)
    update(learner, batches)
    update(learner, batches)
    ticket, arrays = learner.publish(1)
    state = state_of(learner)
    assert all((arrays[name] == state.follower[name]).all() for name in arrays)
    assert ticket.digest != digest(learner.parameters)
    held = learner.announce(1, averaged=False)  # as a worker that samples and trains does
    assert held == ticket == WeightsTicket(1, digest(learner.parameters))
    of = replace(batches[0].unit, iteration=2)
    trajectory, _ = rollout(learner.policy, of, conditions(), SIZE, held, keep_old=True)
    batch = replace(batches[0], unit=of, trajectory=trajectory)
    floor = learner.measure_floor(of, trajectory, conditions())
    assert largest_of(floor) == 0, "under the same weights"
    stats = batch.into(learner)
    assert not stats.gated
    assert stats.gate_max > 1e-4
    assert digest(learner.parameters) != ticket.digest, "the trained ones are back"
    stale = replace(trajectory.provenance, weights_digest="0" * 32)
    with pytest.raises(ContractError, match="stale weights"):
        replace(batch, trajectory=replace(trajectory, provenance=stale)).into(learner)
    evaluated = learner.announce(1, averaged=True)
    averages = {name: torch.tensor(array) for name, array in state.ema.items()}
    assert evaluated.digest == digest(averages)
    after = state_of(learner)
    for name in state.weights:
        assert (after.weights[name] == state.weights[name]).all()
        assert (after.follower[name] == state.follower[name]).all()
        assert (after.ema[name] == state.ema[name]).all()


def test_nft_with_a_lag_is_held_against_the_weights_that_sampled(tmp_path: Path):
    """``v_old`` is theirs, not that of the weights published since; what is older still, or was
    never published, is refused; and a run that is saved with samples on their way goes on alike."""
    spec = small_spec(*NO_NOISE, KINDS["nft"], TUNINGS["lora"], "sampling.max_lag=1")
    batches, worker = draw_batches(spec, 2), sampler(spec)

    def sampled(ticket: WeightsTicket, arrays: dict[str, np.ndarray]) -> list[Batch]:
        load_arrays(worker.trainable(), arrays)
        assert digest(worker.trainable()) == ticket.digest
        trajectories = [
            rollout(worker, b.unit, conditions(), SIZE, ticket, keep_old=True)[0] for b in batches
        ]
        return [replace(b, trajectory=t) for b, t in zip(batches, trajectories, strict=True)]

    learner = Learner(spec, CPU)
    first = sampled(*learner.publish(1))
    update(learner, first)
    update(learner, first)  # from two updates on the weights that sample are not the trained ones
    second = sampled(*learner.publish(2))
    update(learner, second)
    behaviour = learner.gate.published
    path = save_checkpoint(tmp_path, [state_of(learner)], progress(spec), keep=1)
    third = learner.publish(3)
    assert third[0].digest != behaviour.digest
    stats = second[0].into(learner)
    assert not stats.gated, "neither lag nor the weights that follow let v - v_old be 0"

    batch = second[0]
    condition = batch_condition(worker, conditions(), batch.unit.prompts)
    with torch.no_grad():
        of = [p.velocity for p in replay_noised(worker, batch.trajectory, batch.unit, condition)]
        load_arrays(worker.trainable(), state_of(learner).weights)
        now = list(replay_noised(worker, batch.trajectory, batch.unit, condition))
    assert batch.trajectory.old is not None
    assert all((p.old == v).all() for p, v in zip(now, of, strict=True)), "theirs, bit for bit"
    change = sum(float(((p.velocity - p.old) ** 2).flatten(1).mean(1).sum()) for p in now)
    assert stats.sums["old_distance"] == pytest.approx(change, rel=1e-5)
    assert change > 1e-6
    with pytest.raises(ContractError, match="stale weights: sampled with version 1 "):
        first[0].into(learner)
    learner.step(kept([batch]), 2)

    resumed = Learner(spec, CPU)
    assert resumed.load_state(load_checkpoint(path)[0]) == behaviour
    resumed.publish(3)
    second[0].into(resumed)
    resumed.step(kept([batch]), 2)
    one, other = state_of(learner), state_of(resumed)
    for part in ("weights", "follower", "behaviour"):
        arrays, others = getattr(one, part), getattr(other, part)
        assert all((arrays[name] == others[name]).all() for name in arrays), part


def test_the_anchor_is_the_velocity_of_the_weights_that_follow():
    spec = spec_of("awm")
    learner, batches = Learner(spec, CPU), draw_batches(spec)
    update(learner, batches)
    update(learner, batches)
    state = state_of(learner)
    other = sampler(spec)
    with torch.no_grad():
        for name, parameter in other.trainable().items():
            parameter.copy_(torch.from_numpy(state.follower[name]))
    batch = batches[2]
    condition = batch_condition(other, conditions(), batch.unit.prompts)
    anchors = velocities(other, batch.trajectory, batch.unit, condition)
    points = replay_noised(learner.policy, batch.trajectory, batch.unit, condition, anchors)
    with torch.no_grad():
        expected = sum(
            float(((p.velocity - p.anchor) ** 2).flatten(1).mean(1).sum())
            for p in points
            if p.anchor is not None
        )
    assert expected > 1e-6
    found = batch.into(learner).sums["anchor_distance"]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_continued_is_the_same_as_never_stopped(tmp_path: Path, kind: str):
    spec = spec_of(kind, "lora")
    batches = draw_batches(spec)

    def train(learner: Learner, times: int) -> None:
        for _ in range(times):
            update(learner, batches)

    straight = Learner(spec, CPU)
    train(straight, 4)
    first = Learner(spec, CPU)
    train(first, 2)
    path = save_checkpoint(tmp_path, [state_of(first)], progress(spec), keep=1)
    assert (path / "follower.safetensors").exists()
    second = Learner(spec, CPU)
    second.load_state(load_checkpoint(path)[0])
    train(second, 2)
    one, other = state_of(straight), state_of(second)
    for part in ("weights", "ema", "follower", "exp_avg", "exp_avg_sq"):
        arrays, others = getattr(one, part), getattr(other, part)
        assert arrays.keys() == others.keys() != set()
        assert all((arrays[name] == others[name]).all() for name in arrays), part
    assert one.updates == other.updates == 4
