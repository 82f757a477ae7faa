"""Builds the embedded base model: a real Stable Diffusion 3 pipeline of 2 million parameters.

`python -m flowgrpo_ray.tiny.build --out DIR --seed 0` makes every part (`parts`; nothing is
downloaded), trains them on two CPU cores within minutes, and writes a folder that
`StableDiffusion3Pipeline.from_pretrained` loads:

1. the autoencoder learns to reconstruct signs (`flowgrpo_ray.rewards.signs` draws them),
2. flow matching with true captions teaches transformer and text encoders to spell,
3. flow matching with wrong digits in the captions makes them forget some of it on purpose:
   the model still draws legible signs, often with the wrong digits.

The third stage leaves something to learn for reinforcement learning. Every budget is a number of
steps, never of seconds, so one machine and one seed always give the same weights.
"""

# The annotations of diffusers are wrong about what its models and pipelines take and return.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor, nn

from flowgrpo_ray.rewards import signs
from flowgrpo_ray.rewards.ocr import OcrReward
from flowgrpo_ray.tiny.parts import LATENT_SHAPE, TOKENS, untrained_pipeline
from flowgrpo_ray.tiny.training import (
    arguments,
    as_pixels,
    encode_signs,
    exactly,
    log,
    noised,
    train_modules,
    trained_and_saved,
    update,
)


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much each stage trains: optimizer steps, and the number of different signs drawn."""

    vae_steps: int = 450
    clean_steps: int = 800
    noised_steps: int = 300
    images: int = 12_000


# --- training ----------------------------------------------------------------------------------


class Signs(NamedTuple):
    """Training signs: `images[i]` shows the text `texts[i]` on the colour `colours[i]`."""

    images: Tensor  # [N, 3, HEIGHT, WIDTH] in -1 to 1
    colours: Tensor  # [N], indices into signs.COLOURS
    texts: Tensor  # [N], indices into signs.TEXTS


def draw_signs(count: int, seed: int) -> Signs:
    """Draws `count` signs; none shows a held-out text."""
    rng = random.Random(f"signs {seed}")
    names = list(signs.COLOURS)
    allowed = [i for i, text in enumerate(signs.TEXTS) if not signs.is_heldout(text)]
    colours = [rng.randrange(len(names)) for _ in range(count)]
    texts = [rng.choice(allowed) for _ in range(count)]
    images = [
        signs.render(signs.TEXTS[text], names[colour], rng)
        for colour, text in zip(colours, texts, strict=True)
    ]
    return Signs(as_pixels(images), torch.tensor(colours), torch.tensor(texts))


def train_vae(vae: AutoencoderKL, images: Tensor, steps: int, seed: int) -> None:
    """Trains the autoencoder, then sets its scale and shift so that latents are about N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        x = images[torch.randint(len(images), (32,), generator=generator)]
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - x
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error.abs().mean() + error.square().mean() + 1e-3 * kl
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01
        update(optimizer, loss, rate=3e-3 * min(1.0, (step + 1) / 30) * cosine)
        log("autoencoder", step, steps, loss)
    z = vae.encode(images[:512]).latent_dist.mean.detach()
    vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())


class Captions:
    """Token ids of every possible caption, and of none, so that training only looks them up."""

    def __init__(self, pipe: StableDiffusion3Pipeline) -> None:
        captions = [signs.prompt_of(t, colour) for colour in signs.COLOURS for t in signs.TEXTS]
        options = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "pt"}
        self.clip = pipe.tokenizer([*captions, ""], **options).input_ids
        self.t5 = pipe.tokenizer_3([*captions, ""], **options).input_ids
        self.heldout = torch.tensor([signs.is_heldout(text) for text in signs.TEXTS])

    def pick(
        self, colours: Tensor, texts: Tensor, noise: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """CLIP and T5 tokens [B, TOKENS] of signs, each digit replaced with probability `noise`.

        No caption becomes a held-out text. One in ten is empty, which guidance needs.
        """
        place = torch.tensor([100, 10, 1])
        digits = texts[:, None] // place % 10
        other = torch.randint(10, digits.shape, generator=generator)
        replaced = torch.rand(digits.shape, generator=generator) < noise
        noised = (torch.where(replaced, other, digits) * place).sum(1)
        noised = torch.where(self.heldout[noised], texts, noised)
        dropped = torch.rand(texts.shape, generator=generator) < 0.1
        rows = torch.where(dropped, len(self.clip) - 1, colours * len(signs.TEXTS) + noised)
        return self.clip[rows], self.t5[rows]


def encode_captions(pipe: StableDiffusion3Pipeline, clip: Tensor, t5: Tensor) -> dict[str, Tensor]:
    """Text embeddings from token ids, put together as `StableDiffusion3Pipeline` does."""
    first = pipe.text_encoder(clip, output_hidden_states=True)
    second = pipe.text_encoder_2(clip, output_hidden_states=True)
    hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    words = pipe.text_encoder_3(t5)[0]
    hidden = nn.functional.pad(hidden, (0, words.shape[-1] - hidden.shape[-1]))
    return {
        "encoder_hidden_states": torch.cat([hidden, words], dim=1),
        "pooled_projections": torch.cat([first[0], second[0]], dim=-1),
    }


def train_flow(
    pipe: StableDiffusion3Pipeline,
    data: Signs,
    steps: int,
    *,
    seed: int,
    caption_noise: float,
    peak_rate: float,
) -> None:
    """Flow matching: learns the velocity noise - latent on the straight line between the two.

    Trains transformer and text encoders, and leaves their averaged weights in the pipeline.
    """
    generator = torch.Generator().manual_seed(seed)
    captions, latents = Captions(pipe), encode_signs(pipe.vae, data.images)
    modules = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)

    def loss() -> Tensor:
        batch = torch.randint(len(latents), (48,), generator=generator)
        tokens = captions.pick(data.colours[batch], data.texts[batch], caption_noise, generator)
        at = noised(latents[batch], generator)
        text = encode_captions(pipe, *tokens)
        velocity = pipe.transformer(at.xt, timestep=1000 * at.t, **text, return_dict=False)[0]
        return nn.functional.mse_loss(velocity, at.velocity)

    train_modules(modules, loss, steps, peak_rate, f"flow, caption noise {caption_noise}")


# --- evaluation --------------------------------------------------------------------------------


class Score(NamedTuple):
    """What an evaluation found, as means over its prompts."""

    ocr: float  # the OCR reward
    exact: float  # share of signs that read right
    colour_error: float  # of 255


def sample(
    pipe: StableDiffusion3Pipeline, prompts: Sequence[str], guidance: float, noise_seed: int = 7
) -> np.ndarray:
    """Draws `prompts` in 10 Euler steps from fixed noise: uint8 [N, HEIGHT, WIDTH, 3]."""
    generator = torch.Generator().manual_seed(noise_seed)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        list(prompts),
        height=signs.HEIGHT,
        width=signs.WIDTH,
        num_inference_steps=10,
        guidance_scale=guidance,
        max_sequence_length=TOKENS,
        latents=torch.randn((len(prompts), *LATENT_SHAPE), generator=generator),
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


def evaluate(
    pipe: StableDiffusion3Pipeline, prompts: Sequence[str], guidance: float, noise_seed: int = 7
) -> Score:
    """Samples `prompts` and measures how well the signs read and whether the colours agree."""
    images = sample(pipe, prompts, guidance, noise_seed)
    ocr = OcrReward(detect=False)(images, prompts, [{}] * len(prompts))
    colours = [signs.parse_prompt(prompt)[1] for prompt in prompts]
    errors = [signs.colour_error(*pair) for pair in zip(images, colours, strict=True)]
    return Score(float(ocr.mean()), float((ocr == 1).mean()), float(np.mean(errors)))


def _report(stage: str, pipe: StableDiffusion3Pipeline, prompts: Sequence[str]) -> None:
    for guidance in (1.0, 3.0) if prompts else ():
        score = evaluate(pipe, prompts, guidance)
        values = ", ".join(f"{name} {value:.3f}" for name, value in score._asdict().items())
        print(f"{stage}, guidance {guidance}: {values}", flush=True)


# --- the build ---------------------------------------------------------------------------------


def train(seed: int, budget: Budget, heldout: Sequence[str] = ()) -> StableDiffusion3Pipeline:
    """All three stages; with `heldout` prompts, prints how the second stage spells them."""
    with exactly(threads=2):
        pipe = untrained_pipeline(seed)
        data = draw_signs(budget.images, seed)
        train_vae(pipe.vae, data.images, budget.vae_steps, seed=3 * seed)
        clean = {"seed": 3 * seed + 1, "caption_noise": 0.0, "peak_rate": 2e-3}
        train_flow(pipe, data, budget.clean_steps, **clean)
        _report("true captions", pipe, heldout)
        noised_captions = {"seed": 3 * seed + 2, "caption_noise": 0.7, "peak_rate": 1e-3}
        train_flow(pipe, data, budget.noised_steps, **noised_captions)
    return pipe


def main() -> None:
    """Builds the model and its two prompt files from the command line."""
    out, prompts, seed, budget = arguments(__doc__ or "", Budget)
    heldout = signs.make_prompts(64, heldout=True, seed=seed)
    if prompts is not None:
        training = signs.make_prompts(256, heldout=False, seed=seed)
        prompts.mkdir(parents=True, exist_ok=True)
        for name, lines in (("train", training), ("heldout", heldout)):
            (prompts / f"tiny-signs-{name}.txt").write_text("\n".join(lines) + "\n")

    saved = trained_and_saved(lambda: train(seed, budget, heldout), out)
    _report("as saved", saved, heldout)


if __name__ == "__main__":
    main()
