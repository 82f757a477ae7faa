"""Sampling a micro-batch and replaying it for the update, by ONE way to each prediction.

``rollout`` draws a trajectory; ``replay`` walks its points again and gives what the current weights
predict there: the distribution of a stochastic step (both call ``transition``), or the velocity of
a finished image that is noised anew (both call ``velocity_of``). So what an objective compares
before the first update of an iteration is equal by construction.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flowgrpo_ray.algorithm.flow import KERNELS, LIKELIHOODS, Gaussian
from flowgrpo_ray.algorithm.objectives.noised import Noised
from flowgrpo_ray.algorithm.objectives.steps import Step
from flowgrpo_ray.algorithm.solvers import SOLVERS
from flowgrpo_ray.common.types import (
    Condition,
    Float32,
    Noising,
    Provenance,
    Schedule,
    Trajectory,
    WeightsTicket,
    WorkUnit,
)

if TYPE_CHECKING:
    from flowgrpo_ray.policies.base import Policy

INITIAL = -1  # the "step" that draws the initial latents


def transition(
    policy: Policy, x: Tensor, step: int, schedule: Schedule, condition: dict[str, Tensor]
) -> Gaussian:
    """The distribution of the latents after ``step``, in float32 whatever the network's dtype.

    ``x [b, *D]`` float32; ``condition`` is what ``batch_condition`` gives.
    """
    sigma, sigma_next = schedule.sigma[step], schedule.sigma[step + 1]
    velocity = velocity_of(policy, x, sigma, condition)
    kernel = KERNELS[schedule.kernel]
    return kernel(x, velocity, sigma, sigma_next, schedule.eta[step], schedule.sigma_max)


def _mean(
    policy: Policy, x: Tensor, step: int, schedule: Schedule, condition: dict[str, Tensor]
) -> Tensor:
    return transition(policy, x, step, schedule, condition).mean


def draw_noise(unit: WorkUnit, step: int | str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal ``[b, *shape]``, a pure function of (seed, stream, iteration, prompt, sample,
    step): drawn on the CPU in float32, so it is the same on every worker and device. With
    ``same_latent`` every sample starts from that of its prompt's first one."""
    shared = unit.same_latent and step == INITIAL
    seeds = _seeds(replace(unit, samples=(0,) * unit.batch) if shared else unit, step)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def _seeds(unit: WorkUnit, what: int | str) -> Iterator[int]:
    """Of what is drawn for each sample."""
    for prompt, sample in zip(unit.prompts, unit.samples, strict=True):
        key = f"{unit.seed}/{unit.stream}/{unit.iteration}/{prompt}/{sample}/{what}"
        yield int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def draw_levels(unit: WorkUnit) -> Tensor:
    """The noise levels ``[b, K]`` at which finished images are trained, float32; pure as
    ``draw_noise`` is. Those of a sample go down, those of ``stratified`` one in each part."""
    assert unit.noising is not None
    levels = [_levels(unit.noising, unit.schedule, seed) for seed in _seeds(unit, "levels")]
    return torch.tensor(levels, dtype=torch.float32)


def _levels(noising: Noising, schedule: Schedule, seed: int) -> Sequence[float]:
    draw, count, (low, high) = random.Random(seed), noising.count, noising.within
    if noising.draw == "steps":
        return sorted(draw.sample(schedule.stops(noising), count), reverse=True)
    if noising.draw == "stratified":
        parts = [(count - 1 - k + draw.random()) / count for k in range(count)]
    else:
        parts = sorted((draw.random() for _ in range(count)), reverse=True)
    return [low + (high - low) * part for part in parts]


def noise_again(unit: WorkUnit, clean: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """At each of its noise levels: ``sigma [b, 1, ...]``, noise and noised latents, of finished
    ones ``clean [b, *D]``."""
    levels = draw_levels(unit).to(clean.device)
    for k in unit.points:
        noise = draw_noise(unit, f"noise {k}", tuple(clean.shape[1:])).to(clean.device)
        sigma = levels[:, k].view(-1, *[1] * (clean.dim() - 1))
        yield sigma, noise, (1 - sigma) * clean + sigma * noise


def velocity_of(
    policy: Policy, x: Tensor, sigma: float | Tensor, condition: dict[str, Tensor]
) -> Tensor:
    """``[b, *D]`` in float32 whatever the network's dtype; ``sigma`` is one for all samples, or
    ``[b, 1, ...]``."""
    level = sigma.flatten() if isinstance(sigma, Tensor) else sigma
    return policy.velocity(x, level, condition).float()


def batch_condition(
    policy: Policy, conditions: Mapping[int, Condition], prompts: tuple[int, ...]
) -> dict[str, Tensor]:
    """One row per sample from one condition per prompt, on the policy's device."""
    collated = policy.collate([conditions[prompt] for prompt in prompts])
    return {name: tensor.to(policy.device) for name, tensor in collated.items()}


def start(
    policy: Policy, unit: WorkUnit, conditions: Mapping[int, Condition], shape: tuple[int, ...]
) -> tuple[int, Tensor]:
    """The first step that is computed for every sample, and the latents ``[b, *D]`` before it.

    With ``same_latent`` samples of a prompt are alike up to the window, so each distinct prompt
    goes there once; the rows of the result are then copies.
    """
    before = unit.schedule.stochastic_steps.start
    if not (unit.same_latent and before):
        return 0, draw_noise(unit, INITIAL, shape).to(policy.device)
    once = unit.distinct_prompts
    each = replace(unit, prompts=once, samples=(0,) * len(once))
    condition = batch_condition(policy, conditions, once)
    x = draw_noise(each, INITIAL, shape).to(policy.device)
    for step in range(before):
        x = transition(policy, x, step, unit.schedule, condition).mean
    return before, x[[once.index(prompt) for prompt in unit.prompts]]


@torch.no_grad()
def rollout(
    policy: Policy,
    unit: WorkUnit,
    conditions: Mapping[int, Condition],
    size: tuple[int, int],
    weights: WeightsTicket,
    *,
    keep_old: bool = False,
) -> tuple[Trajectory, Tensor]:
    """Sample the unit's micro-batch: its trajectory and the final latents ``[b, *D]``.

    ``conditions`` maps each prompt index of the unit to its encodings; ``size`` is (height, width)
    in pixels; ``weights`` names what the policy's parameters are. ``keep_old`` keeps what it
    predicts at each point, for objectives that compare it. If the policy was tuned with a
    reference, the untrained model's predictions are kept too: they depend on the latents alone, so
    the learner need not hold a second network.
    """
    shape = policy.latent_shape(size)
    schedule, window = unit.schedule, unit.schedule.stochastic_steps
    condition = batch_condition(policy, conditions, unit.prompts)
    first, x = start(policy, unit, conditions, shape)
    latents = [x] if window.start == first else []
    kept = _Kept(policy, keep_old=keep_old)
    log_probs: list[Tensor] = []
    log_prob, solve = LIKELIHOODS[schedule.likelihood], SOLVERS[schedule.solver]()
    for step in range(first, schedule.steps):
        if step in window:
            gaussian = transition(policy, x, step, schedule, condition)
            kept.keep(gaussian.mean, partial(_mean, policy, x, step, schedule, condition))
            x = gaussian.sample(draw_noise(unit, step, shape).to(policy.device))
            log_probs.append(log_prob(gaussian, x))
        else:
            velocity = velocity_of(policy, x, schedule.sigma[step], condition)
            x = solve(x, velocity, schedule.sigma[step], schedule.sigma[step + 1])
        if window and window.start <= step + 1 <= window.stop:
            latents.append(x)
    if unit.noising:
        for sigma, _, noised in noise_again(unit, x):
            predict = partial(velocity_of, policy, noised, sigma, condition)
            kept.keep(predict(), predict)
    trajectory = Trajectory(
        latents=_stacked(latents if window else [x]),
        log_probs=_stacked(log_probs) if window else np.zeros((unit.batch, 0), np.float32),
        provenance=Provenance(
            weights_version=weights.version,
            weights_digest=weights.digest,
            batch=unit.batch,
            dtype=policy.dtype_name,
            schedule=schedule,
        ),
        old=_stacked(kept.old) if kept.old else None,
        reference=_stacked(kept.reference) if kept.reference else None,
    )
    return trajectory, x


class _Kept:
    """Predictions of the sampling policy, and of the untrained model, at each point."""

    def __init__(self, policy: Policy, *, keep_old: bool) -> None:
        self._policy, self._keep_old = policy, keep_old
        self.old: list[Tensor] = []
        self.reference: list[Tensor] = []

    def keep(self, prediction: Tensor, again: Callable[[], Tensor]) -> None:
        """``again`` gives the prediction of the weights at hand."""
        if self._keep_old:
            self.old.append(prediction)
        if self._policy.with_reference:
            with self._policy.reference():
                self.reference.append(again())


def _stacked(steps: list[Tensor]) -> Float32:
    return torch.stack(steps, 1).cpu().numpy()


def points(
    policy: Policy,
    trajectory: Trajectory,
    unit: WorkUnit,
    condition: dict[str, Tensor],
    anchors: Sequence[Tensor] | None = None,
) -> Iterator[Step] | Iterator[Noised]:
    """Each point of a stored trajectory, under the current weights."""
    if unit.noising:
        return replay_noised(policy, trajectory, unit, condition, anchors)
    return replay(policy, trajectory, unit.schedule, condition)


def replay(
    policy: Policy, trajectory: Trajectory, schedule: Schedule, condition: dict[str, Tensor]
) -> Iterator[Step]:
    """Each stochastic step of a stored trajectory, under the current weights.

    ``schedule`` is the learner's own, not the trajectory's: if they differ, the ratio shows it.
    """
    latents = _loaded(trajectory.latents, policy)
    log_probs = _loaded(trajectory.log_probs, policy)
    old, references = trajectory.old, trajectory.reference
    for k, step in enumerate(schedule.stochastic_steps):
        x, x_next = latents[:, k], latents[:, k + 1]
        new = transition(policy, x, step, schedule, condition)
        log_prob = LIKELIHOODS[schedule.likelihood](new, x_next)
        yield Step(
            step=step,
            dt=schedule.sigma[step + 1] - schedule.sigma[step],
            new=new,
            x_next=x_next,
            log_ratio=log_prob - log_probs[:, k],
            # All policies take the same step, so they share its std.
            old=None if old is None else replace(new, mean=_loaded(old[:, k], policy)),
            reference=(
                None if references is None else replace(new, mean=_loaded(references[:, k], policy))
            ),
        )


def replay_noised(
    policy: Policy,
    trajectory: Trajectory,
    unit: WorkUnit,
    condition: dict[str, Tensor],
    anchors: Sequence[Tensor] | None = None,
) -> Iterator[Noised]:
    """The finished images of a stored trajectory at each noise level, under the current weights.

    ``anchors`` are other weights' velocities there, ``[b, *D]`` each.
    """
    clean = _loaded(trajectory.latents[:, -1], policy)
    old, references = trajectory.old, trajectory.reference
    assert old is not None, "rollout workers keep velocities of finished images"
    for k, (sigma, noise, x) in enumerate(noise_again(unit, clean)):
        yield Noised(
            sigma=sigma,
            clean=clean,
            noise=noise,
            x=x,
            velocity=velocity_of(policy, x, sigma, condition),
            old=_loaded(old[:, k], policy),
            reference=None if references is None else _loaded(references[:, k], policy),
            anchor=None if anchors is None else anchors[k],
        )


def velocities(
    policy: Policy, trajectory: Trajectory, unit: WorkUnit, condition: dict[str, Tensor]
) -> list[Tensor]:
    """Of finished images at each noise level, under the current weights; without gradient."""
    clean = _loaded(trajectory.latents[:, -1], policy)
    with torch.no_grad():
        return [velocity_of(policy, x, s, condition) for s, _, x in noise_again(unit, clean)]


def _loaded(array: Float32, policy: Policy) -> Tensor:
    return torch.tensor(array, device=policy.device)
