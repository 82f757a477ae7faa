"""Flow-GRPO on the embedded model as one straight script, in the usual style of the field.

One process samples everything, then scores everything, then trains on everything, over the parts of
a diffusers pipeline; every image's prompt goes through the text encoders. Nothing of the package's
training code is used, only its assets: model folder, prompts, text reader. What it can have without
changing its style it has: fused AdamW, one reader session per thread, no gradients in sampling.

    .venv/bin/python benchmarks/baseline.py [--micro-batch 48] [--threads 2] [--seconds 120]

Several values take turns, iteration by iteration: --micro-batch 12 24 48 --threads 1 2.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor

import flowgrpo_ray
from flowgrpo_ray.rewards.ocr import OcrReward

ASSETS = Path(flowgrpo_ray.__file__).parent / "tiny" / "assets"
PROMPTS, IMAGES = 8, 12  # of an iteration; of a prompt
STEPS, WINDOW, LAST_START = 10, 2, 2  # of denoising; of them with noise; where these begin at most
NOISE_LEVEL, CLIP, UPDATES = 0.8, 1e-3, 2
HEIGHT, WIDTH, TOKENS, HELD_OUT = 32, 48, 10, 64

Seconds = dict[str, float]


@dataclass
class Samples:
    """A micro-batch: latents around the noisy steps, with their log-probabilities and prompts."""

    embeds: Tensor
    pooled: Tensor
    latents: Tensor  # [b, WINDOW + 1, C, h, w]
    log_probs: Tensor  # [b, WINDOW]
    images: np.ndarray  # uint8 [b, H, W, 3]


class Script:
    """Model, optimizer, prompts and reward; ``iterate`` is the training loop's body."""

    def __init__(self, micro_batch: int = 48, threads: int | None = None, seed: int = 0) -> None:
        threads = threads or os.cpu_count() or 1
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        self.micro_batch, self.draw = micro_batch, random.Random(seed)
        harness.quiet()
        from diffusers import StableDiffusion3Pipeline

        self.pipe = StableDiffusion3Pipeline.from_pretrained(
            ASSETS / "tiny-sd3", dtype=torch.float32
        )
        for part in (*self._encoders(), self.pipe.vae):
            part.requires_grad_(False)
        self.network = self.pipe.transformer.eval()
        factor = self.pipe.vae_scale_factor
        self.shape = (self.network.config.in_channels, HEIGHT // factor, WIDTH // factor)
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=2e-4, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
        )
        self.reward = OcrReward(detect=False, threads=threads)
        self.prompts = _lines("tiny-signs-train.txt")
        self.held_out = _lines("tiny-signs-heldout.txt")[:HELD_OUT]
        self.pipe.scheduler.set_timesteps(STEPS)
        self.sigmas = self.pipe.scheduler.sigmas.tolist()

    def _encoders(self) -> list[Any]:
        return [self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3]

    def iterate(self) -> Seconds:
        """One iteration: 96 images and two updates; what each part took."""
        began = time.perf_counter()
        texts = [p for p in self.draw.sample(self.prompts, PROMPTS) for _ in range(IMAGES)]
        start = self.draw.randint(0, LAST_START)
        text_s = 0.0
        batches = []
        for first in range(0, len(texts), self.micro_batch):
            before = time.perf_counter()
            encoded = self.encode(texts[first : first + self.micro_batch])
            text_s += time.perf_counter() - before
            batches.append(self.sample(*encoded, start))
        sampled = time.perf_counter()
        rewards = self.score(np.concatenate([b.images for b in batches]), texts)
        scored = time.perf_counter()
        advantages = normalised(rewards).split(self.micro_batch)
        per_update = len(batches) // UPDATES
        for first in range(0, len(batches), per_update):
            part = slice(first, first + per_update)
            self.update(batches[part], advantages[part], start)
        ended = time.perf_counter()
        return {
            "iteration": ended - began,
            "text": text_s,
            "sample": sampled - began - text_s,
            "score": scored - sampled,
            "train": ended - scored,
            "reward": float(rewards.mean()),
        }

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        return embeds, pooled

    def velocity(self, x: Tensor, step: int, embeds: Tensor, pooled: Tensor) -> Tensor:
        return self.network(
            hidden_states=x,
            timestep=torch.full((len(x),), self.sigmas[step] * 1000),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def sample(self, embeds: Tensor, pooled: Tensor, start: int) -> Samples:
        """Denoise a micro-batch, with noise in the window that begins at step ``start``."""
        x = torch.randn(len(embeds), *self.shape)
        latents, log_probs = [], []
        for step in range(STEPS):
            v = self.velocity(x, step, embeds, pooled)
            if start <= step < start + WINDOW:
                mean, std = sde(x, v, step, self.sigmas)
                latents.append(x)
                x = mean + std * torch.randn_like(x)
                log_probs.append(log_prob(x, mean, std))
                if step == start + WINDOW - 1:
                    latents.append(x)
            else:
                x = x + (self.sigmas[step + 1] - self.sigmas[step]) * v
        kept = torch.stack(latents, 1), torch.stack(log_probs, 1)
        return Samples(embeds, pooled, *kept, self.decode(x))

    @torch.no_grad()
    def decode(self, x: Tensor) -> np.ndarray:
        config = self.pipe.vae.config
        pixels = self.pipe.vae.decode(x / config.scaling_factor + config.shift_factor).sample
        pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        return pixels.permute(0, 2, 3, 1).contiguous().numpy()

    def score(self, images: np.ndarray, texts: list[str]) -> Tensor:
        return torch.tensor(self.reward(images, texts, [{}] * len(texts)))

    def update(self, batches: list[Samples], advantages: tuple[Tensor, ...], start: int) -> None:
        """Accumulate the gradients of some micro-batches, then one optimizer step."""
        for batch, advantage in zip(batches, advantages, strict=True):
            for k in range(WINDOW):
                x, x_next = batch.latents[:, k], batch.latents[:, k + 1]
                v = self.velocity(x, start + k, batch.embeds, batch.pooled)
                mean, std = sde(x, v, start + k, self.sigmas)
                ratio = torch.exp(log_prob(x_next, mean, std) - batch.log_probs[:, k])
                bounded = ratio.clamp(1 - CLIP, 1 + CLIP)
                loss = torch.maximum(-advantage * ratio, -advantage * bounded).mean()
                (loss / (len(batches) * WINDOW)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean reward of the held-out prompts: fixed noise, Euler steps without noise."""
        noise = torch.stack([held_out_noise(number, self.shape) for number in range(HELD_OUT)])
        images = []
        for first in range(0, HELD_OUT, self.micro_batch):
            part = slice(first, first + self.micro_batch)
            x, encoded = noise[part], self.encode(self.held_out[part])
            for step in range(STEPS):
                dt = self.sigmas[step + 1] - self.sigmas[step]
                x = x + dt * self.velocity(x, step, *encoded)
            images.append(self.decode(x))
        return float(self.score(np.concatenate(images), self.held_out).mean())


def sde(x: Tensor, v: Tensor, step: int, sigmas: list[float]) -> tuple[Tensor, float]:
    """Mean and standard deviation of a noisy step of Flow-GRPO."""
    sigma, dt = sigmas[step], sigmas[step + 1] - sigmas[step]
    g = NOISE_LEVEL * (sigma / (1 - (sigmas[1] if step == 0 else sigma))) ** 0.5
    drift = v + g**2 / (2 * sigma) * (x + (1 - sigma) * v)
    return x + drift * dt, g * (-dt) ** 0.5


def log_prob(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """Of ``x [b, ...]``, averaged over its dimensions: ``[b]``."""
    return torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)


def normalised(rewards: Tensor) -> Tensor:
    """Rewards less their prompt's mean, over its spread."""
    grouped = rewards.view(-1, IMAGES)
    spread = grouped.std(1, correction=0, keepdim=True) + 1e-4
    return ((grouped - grouped.mean(1, keepdim=True)) / spread).flatten()


def held_out_noise(number: int, shape: tuple[int, ...]) -> Tensor:
    """That of the package's evaluation, so that learning curves begin at the same point."""
    key = hashlib.blake2b(f"0/eval/0/{number}/0/-1".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    return torch.randn(shape, generator=generator)


def _lines(name: str) -> list[str]:
    return (ASSETS / "prompts" / name).read_text(encoding="utf-8").splitlines()


def serve(connection: Connection, micro_batch: int, threads: int, seed: int) -> None:
    """For ``side_by_side.py``: does what it is asked, in a process of its own."""
    script = Script(micro_batch, threads, seed)
    connection.send("ready")
    while True:
        connection.send(getattr(script, connection.recv())())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[48], choices=[12, 24, 48])
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=8, help="iterations of each setting")
    parser.add_argument("--seconds", type=float, help="train so long instead")
    parser.add_argument("--evaluate-every", type=int, default=0, metavar="N", help="iterations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    script = Script(threads=max(arguments.threads), seed=arguments.seed)
    print(f"ready after {time.perf_counter() - began:.1f} s")
    settings = list(itertools.product(arguments.micro_batch, arguments.threads))
    found: dict[tuple[int, int], list[Seconds]] = {setting: [] for setting in settings}
    curve: list[dict[str, float]] = []
    began, ready = time.perf_counter(), False
    for number in itertools.count():
        over = time.perf_counter() - began
        if arguments.evaluate_every and number % (arguments.evaluate_every * len(settings)) == 0:
            curve.append({"seconds": over, "iteration": number, "ocr": script.evaluate()})
            print(f"{over:7.1f} s  iteration {number:4}  held-out ocr {curve[-1]['ocr']:.3f}")
        enough = number >= (arguments.rounds + 1) * len(settings)
        if enough if arguments.seconds is None else ready and over > arguments.seconds:
            break
        setting = settings[number % len(settings)]
        script.micro_batch = setting[0]
        torch.set_num_threads(setting[1])
        seconds = script.iterate()
        ready = number >= len(settings)  # the first of each warms up
        if ready:
            found[setting].append(seconds)
    report(found)
    rows = [{"micro_batch": m, "threads": t, "rounds": r} for (m, t), r in found.items()]
    harness.save(arguments.json, {"settings": rows, "curve": curve})


def report(found: dict[tuple[int, int], list[Seconds]]) -> None:
    header = ("micro-batch, threads", "images/s", "iteration s", "text", "sample", "score", "train")
    rows = []
    for (micro_batch, threads), rounds in found.items():
        if rounds:
            walls = [row["iteration"] for row in rounds]
            speeds = harness.spread((PROMPTS * IMAGES / wall for wall in walls), 1)
            parts = (f"{median(row[p] for row in rounds):.2f}" for p in header[3:])
            rows.append((f"{micro_batch}, {threads}", speeds, harness.spread(walls), *parts))
    harness.table(header, rows)


if __name__ == "__main__":
    main()
