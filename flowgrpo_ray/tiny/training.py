"""What the builds of the embedded models share: flow matching, the optimizer, the digest.

Every budget is a number of steps, never of seconds, so one machine and one seed always give the
same weights.
"""

# The annotations of diffusers are wrong about what its models and pipelines take and return.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


@contextmanager
def exactly(threads: int) -> Iterator[None]:
    """Within it, torch computes with `threads`: another number sums in another order, and gives
    other weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_pixels(images: Sequence[np.ndarray]) -> Tensor:
    """Images uint8 [H, W, 3] as [N, 3, H, W] in -1 to 1."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def encode_signs(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The latents that the transformer sees, [N, *LATENT_SHAPE]."""
    means = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(500)])
    return (means - vae.config.shift_factor) * vae.config.scaling_factor


class Noised(NamedTuple):
    """Points on the straight lines between latents and noise, and the velocities there."""

    xt: Tensor  # [B, *LATENT_SHAPE]
    t: Tensor  # [B], 0 at the latents and 1 at the noise
    velocity: Tensor  # [B, *LATENT_SHAPE], noise - latent


def noised(x0: Tensor, generator: torch.Generator) -> Noised:
    """One point for each latent of `x0`."""
    noise = torch.randn(x0.shape, generator=generator)
    # Times nearer to noise, where the colour is decided, come more often.
    t = torch.sigmoid(0.4 + 1.2 * torch.randn(len(x0), generator=generator))
    return Noised(torch.lerp(x0, noise, t.view(-1, 1, 1, 1)), t, noise - x0)


def train_modules(
    modules: Sequence[nn.Module],
    loss_of_batch: Callable[[], Tensor],
    steps: int,
    peak_rate: float,
    stage: str,
) -> None:
    """Trains `modules`, and leaves their averaged weights in them."""
    weights = [parameter for module in modules for parameter in module.parameters()]
    averages = [weight.detach().clone() for weight in weights]
    decays = {0.01: [w for w in weights if w.ndim > 1], 0.0: [w for w in weights if w.ndim <= 1]}
    groups = [{"params": params, "weight_decay": decay} for decay, params in decays.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    for step in range(steps):
        loss = loss_of_batch()
        warmup, cooldown = (step + 1) / 100, (1 - step / steps) / 0.4 + 0.02
        update(optimizer, loss, peak_rate * min(1.0, warmup) * min(1.0, cooldown))
        decay = min(0.995, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - decay)
        log(stage, step, steps, loss)
    for weight, average in zip(weights, averages, strict=True):
        weight.data.copy_(average)


def update(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """One step of `optimizer` at the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()


def log(stage: str, step: int, steps: int, loss: Tensor) -> None:
    """A line now and then."""
    if step % 50 == 0 or step == steps - 1:
        print(f"{stage}: step {step + 1}/{steps}, loss {loss.item():.4f}", flush=True)


def digest(pipe: DiffusionPipeline) -> str:
    """SHA-256 over all weights, to compare builds."""
    state = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        if isinstance(component, nn.Module):
            for key, value in sorted(component.state_dict().items()):
                state.update(f"{name}.{key}".encode() + value.numpy().tobytes())
    return state.hexdigest()


def trained_and_saved(train: Callable[[], Pipeline], out: Path) -> Pipeline:
    """What ``train`` makes, told and written to ``out`` in half precision, and read from there."""
    start = time.perf_counter()
    pipe = train()
    print(f"trained in {time.perf_counter() - start:.0f} s, evaluations included")
    pipe.to(torch.float16).save_pretrained(out)
    saved = type(pipe).from_pretrained(out, dtype=torch.float32)
    print(f"weights as saved: sha256 {digest(saved)}")
    return saved


def arguments(description: str, budget: type[Any]) -> tuple[Path, Path | None, int, Any]:
    """Of a build's command line: folders for the pipeline and for the prompts, seed and budget."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--prompts", type=Path, help="folder for the prompt files (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="decides every weight (default: 0)")
    for field in dataclasses.fields(budget):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=int, default=field.default, help="default: %(default)s")
    options = vars(parser.parse_args())
    out, prompts, seed = options.pop("out"), options.pop("prompts"), options.pop("seed")
    return out, prompts, seed, budget(**options)
