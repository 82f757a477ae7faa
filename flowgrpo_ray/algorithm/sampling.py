"""Sampling a micro-batch and replaying it for the update, over ONE transition function.

``rollout`` draws a trajectory; ``replay`` walks the same stored latents again and gives the
distributions that the current weights assign to them. Both call ``transition``, so the first
log-ratio of an iteration is exactly 0 by construction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flowgrpo_ray.algorithm.flow import KERNELS, LIKELIHOODS, Gaussian
from flowgrpo_ray.common.types import (
    Condition,
    Float32,
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
    velocity = policy.velocity(x, sigma, condition).float()
    kernel = KERNELS[schedule.kernel]
    return kernel(x, velocity, sigma, sigma_next, schedule.eta[step], schedule.sigma_max)


def draw_noise(unit: WorkUnit, step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal ``[b, *shape]``, a pure function of (seed, stream, iteration, prompt, sample,
    step): drawn on the CPU in float32, so it is the same on every worker and device. With
    ``same_latent`` every sample starts from that of its prompt's first one."""
    rows: list[Tensor] = []
    shared = unit.same_latent and step == INITIAL
    for prompt, own in zip(unit.prompts, unit.samples, strict=True):
        sample = 0 if shared else own
        key = f"{unit.seed}/{unit.stream}/{unit.iteration}/{prompt}/{sample}/{step}"
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        rows.append(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


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
    keep_means: bool = False,
) -> tuple[Trajectory, Tensor]:
    """Sample the unit's micro-batch: its trajectory and the final latents ``[b, *D]``.

    ``conditions`` maps each prompt index of the unit to its encodings; ``size`` is (height, width)
    in pixels; ``weights`` names what the policy's parameters are. ``keep_means`` keeps the mean of
    each stochastic step, for objectives that compare distributions. If the policy was tuned with a
    reference, the untrained model's means are kept too: they depend on the latents alone, so the
    learner need not hold a second network.
    """
    shape = policy.latent_shape(size)
    schedule, window = unit.schedule, unit.schedule.stochastic_steps
    condition = batch_condition(policy, conditions, unit.prompts)
    first, x = start(policy, unit, conditions, shape)
    latents = [x] if window.start == first else []
    log_probs: list[Tensor] = []
    means: list[Tensor] = []
    references: list[Tensor] = []
    log_prob = LIKELIHOODS[schedule.likelihood]
    for step in range(first, schedule.steps):
        gaussian = transition(policy, x, step, schedule, condition)
        if step in window:
            if policy.with_reference:
                with policy.reference():
                    references.append(transition(policy, x, step, schedule, condition).mean)
            x = gaussian.sample(draw_noise(unit, step, shape).to(policy.device))
            log_probs.append(log_prob(gaussian, x))
            if keep_means:
                means.append(gaussian.mean)
        else:
            x = gaussian.mean
        if window and window.start <= step + 1 <= window.stop:
            latents.append(x)
    if not window:
        latents = [x]
    trajectory = Trajectory(
        latents=_stacked(latents),
        log_probs=_stacked(log_probs) if window else np.zeros((unit.batch, 0), np.float32),
        provenance=Provenance(
            weights_version=weights.version,
            weights_digest=weights.digest,
            batch=unit.batch,
            dtype=policy.dtype_name,
            schedule=schedule,
        ),
        means=_stacked(means) if means else None,
        reference_means=_stacked(references) if references else None,
    )
    return trajectory, x


def _stacked(steps: list[Tensor]) -> Float32:
    return torch.stack(steps, 1).cpu().numpy()


@dataclass(frozen=True)
class Replayed:
    """One stochastic step of a stored micro-batch, as the current weights see it."""

    step: int
    new: Gaussian
    x_next: Tensor  # [b, *D]
    log_ratio: Tensor  # [b], log rho: of the step's log-probability, new against sampled
    old: Gaussian | None  # where the trajectory kept the sampling policy's means
    reference: Gaussian | None  # where it kept the untrained model's


def replay(
    policy: Policy, trajectory: Trajectory, schedule: Schedule, condition: dict[str, Tensor]
) -> Iterator[Replayed]:
    """Each stochastic step of a stored trajectory, under the current weights.

    ``schedule`` is the learner's own, not the trajectory's: if they differ, the ratio shows it.
    """
    latents = _loaded(trajectory.latents, policy)
    log_probs = _loaded(trajectory.log_probs, policy)
    means, references = trajectory.means, trajectory.reference_means
    for k, step in enumerate(schedule.stochastic_steps):
        x, x_next = latents[:, k], latents[:, k + 1]
        new = transition(policy, x, step, schedule, condition)
        log_prob = LIKELIHOODS[schedule.likelihood](new, x_next)
        yield Replayed(
            step=step,
            new=new,
            x_next=x_next,
            log_ratio=log_prob - log_probs[:, k],
            # All policies take the same step, so they share its std.
            old=None if means is None else replace(new, mean=_loaded(means[:, k], policy)),
            reference=(
                None if references is None else replace(new, mean=_loaded(references[:, k], policy))
            ),
        )


def _loaded(array: Float32, policy: Policy) -> Tensor:
    return torch.tensor(array, device=policy.device)
