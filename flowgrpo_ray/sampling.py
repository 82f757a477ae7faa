"""Sampling a micro-batch and replaying it for the update, over ONE transition function.

``rollout`` draws a trajectory; ``replay`` walks the same stored latents again and gives the
distributions that the current weights assign to them. Both call ``transition``, so the first
log-ratio of an iteration is exactly 0 by construction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flowgrpo_ray.flow import KERNELS, Gaussian
from flowgrpo_ray.types import Condition, Provenance, Schedule, Trajectory, WeightsTicket, WorkUnit

if TYPE_CHECKING:
    from flowgrpo_ray.policies.base import Policy

INITIAL = -1  # the "step" that draws the initial latents


def transition(
    policy: Policy, x: Tensor, step: int, schedule: Schedule, condition: dict[str, Tensor]
) -> Gaussian:
    """The distribution of the latents after ``step``, in float32 whatever the network's dtype.

    ``x [b, *D]`` float32; ``condition`` holds one row per sample.
    """
    sigma, sigma_next = schedule.sigma[step], schedule.sigma[step + 1]
    velocity = policy.velocity(x, sigma, condition).float()
    kernel = KERNELS[schedule.kernel]
    return kernel(x, velocity, sigma, sigma_next, schedule.eta[step], schedule.sigma_max)


def draw_noise(unit: WorkUnit, step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal ``[b, *shape]``, a pure function of (seed, stream, iteration, prompt, sample,
    step): drawn on the CPU in float32, so it is the same on every worker and device."""
    rows: list[Tensor] = []
    for prompt, sample in zip(unit.prompts, unit.samples, strict=True):
        key = f"{unit.seed}/{unit.stream}/{unit.iteration}/{prompt}/{sample}/{step}"
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        rows.append(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


def batch_condition(
    conditions: Mapping[int, Condition], prompts: tuple[int, ...], device: torch.device
) -> dict[str, Tensor]:
    """One row per sample from one condition per prompt: ``{name: [b, ...]}`` on ``device``."""
    names = next(iter(conditions.values())).keys()
    return {
        name: torch.from_numpy(np.stack([conditions[p][name] for p in prompts])).to(device)
        for name in names
    }


@torch.no_grad()
def rollout(
    policy: Policy,
    unit: WorkUnit,
    conditions: Mapping[int, Condition],
    size: tuple[int, int],
    weights: WeightsTicket,
) -> tuple[Trajectory, Tensor]:
    """Sample the unit's micro-batch: its trajectory and the final latents ``[b, *D]``.

    ``conditions`` maps each prompt index of the unit to its encodings; ``size`` is (height, width)
    in pixels; ``weights`` names what the policy's parameters are. If the policy was tuned with a
    reference, the untrained model's mean of each stochastic step is kept too: it depends on the
    latents alone, so the learner need not hold a second network.
    """
    shape = policy.latent_shape(size)
    schedule, window = unit.schedule, unit.schedule.stochastic_steps
    condition = batch_condition(conditions, unit.prompts, policy.device)
    x = draw_noise(unit, INITIAL, shape).to(policy.device)
    latents = [x] if window.start == 0 else []
    log_probs: list[Tensor] = []
    references: list[Tensor] = []
    for step in range(schedule.steps):
        gaussian = transition(policy, x, step, schedule, condition)
        if step in window:
            if policy.with_reference:
                with policy.reference():
                    references.append(transition(policy, x, step, schedule, condition).mean)
            x = gaussian.sample(draw_noise(unit, step, shape).to(policy.device))
            log_probs.append(gaussian.log_prob(x))
        else:
            x = gaussian.mean
        if window and window.start <= step + 1 <= window.stop:
            latents.append(x)
    if not window:
        latents = [x]
    trajectory = Trajectory(
        latents=torch.stack(latents, 1).cpu().numpy(),
        log_probs=(
            torch.stack(log_probs, 1).cpu().numpy()
            if log_probs
            else np.zeros((unit.batch, 0), np.float32)
        ),
        provenance=Provenance(
            weights_version=weights.version,
            weights_digest=weights.digest,
            batch=unit.batch,
            dtype=policy.dtype_name,
            schedule=schedule,
        ),
        reference_means=torch.stack(references, 1).cpu().numpy() if references else None,
    )
    return trajectory, x


def replay(
    policy: Policy, trajectory: Trajectory, schedule: Schedule, condition: dict[str, Tensor]
) -> Iterator[tuple[int, Gaussian, Tensor, Tensor]]:
    """For each stochastic step of a stored trajectory, what the current weights make of it.

    Yields ``(step, distribution, x_next [b, *D], log_prob_old [b])``. ``schedule`` is
    the learner's own, not the trajectory's: if they differ, the ratio shows it.
    """
    latents = torch.from_numpy(trajectory.latents.copy()).to(policy.device)
    old = torch.from_numpy(trajectory.log_probs.copy()).to(policy.device)
    for k, step in enumerate(schedule.stochastic_steps):
        x, x_next = latents[:, k], latents[:, k + 1]
        yield step, transition(policy, x, step, schedule, condition), x_next, old[:, k]
