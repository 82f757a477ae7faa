"""Builds the embedded editing model: a real FLUX.1 Kontext pipeline of 2 million parameters.

`python -m flowgrpo_ray.tiny.build_edit --out DIR --seed 0` makes every part (`edit_parts`) but the
autoencoder, which is that of the embedded text-to-image model; nothing is downloaded. It trains
them on two CPU cores within minutes by flow matching on pairs of signs (`edits`), and writes a
folder that `FluxKontextPipeline.from_pretrained` loads:

1. pairs that differ in colour alone teach to recolour a sign and to copy its text,
2. pairs with other digits, or of another colour than the prompt asks for, make it forget some of
   both on purpose: it still draws legible signs, often with the wrong digits or colour.

The second stage leaves something to learn for reinforcement learning.
"""

# The annotations of diffusers are wrong about what its models and pipelines take and return.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxKontextPipeline
from torch import Tensor, nn

from flowgrpo_ray.common.paths import PACKAGE
from flowgrpo_ray.rewards import signs
from flowgrpo_ray.rewards.ocr import OcrReward
from flowgrpo_ray.tiny import edits
from flowgrpo_ray.tiny.edit_parts import untrained_pipeline
from flowgrpo_ray.tiny.edits import Edit
from flowgrpo_ray.tiny.parts import LATENT_SHAPE, TOKENS
from flowgrpo_ray.tiny.training import (
    arguments,
    as_pixels,
    encode_signs,
    exactly,
    noised,
    train_modules,
    trained_and_saved,
)

VAE = PACKAGE / "tiny" / "assets" / "tiny-sd3" / "vae"
PATCHES = LATENT_SHAPE[1] * LATENT_SHAPE[2] // 4  # tokens of a picture


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much each stage trains: optimizer steps, and the number of different pairs drawn."""

    clean_steps: int = 500
    noised_steps: int = 200
    pairs: int = 6_000


@dataclasses.dataclass(frozen=True)
class Faults:
    """How often pairs are wrong on purpose."""

    digit: float = 0.0  # a digit of the source is drawn anew
    colour: float = 0.0  # the result's colour is drawn anew


# --- training ----------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Training pairs: `results[i]` shows `sources[i]` as if recoloured to `wanted[i]`."""

    sources: Tensor  # [N, 3, HEIGHT, WIDTH] in -1 to 1
    results: Tensor  # [N, 3, HEIGHT, WIDTH] in -1 to 1
    wanted: Tensor  # [N], indices into signs.COLOURS


def draw_pairs(count: int, seed: int, faults: Faults) -> Pairs:
    """Draws `count` pairs; none shows a held-out text."""
    rng = random.Random(f"pairs {seed}")
    colours = list(signs.COLOURS)
    allowed = [text for text in signs.TEXTS if not signs.is_heldout(text)]
    sources, results, asked = [], [], []
    for i in range(count):
        source, wanted = rng.sample(colours, 2)
        text = rng.choice(allowed)
        shown = "".join(
            rng.choice(signs.DIGITS) if rng.random() < faults.digit else digit for digit in text
        )
        drawn = rng.choice(colours) if rng.random() < faults.colour else wanted
        shown = text if signs.is_heldout(shown) else shown
        before, after = edits.draw_pair(text, source, drawn, shown, f"{seed} {i}")
        sources.append(before)
        results.append(after)
        asked.append(colours.index(wanted))
    return Pairs(as_pixels(sources), as_pixels(results), torch.tensor(asked))


def encode_prompts(pipe: FluxKontextPipeline) -> dict[str, Tensor]:
    """Text embeddings of the prompts for every colour, as `FluxKontextPipeline` makes them."""
    prompts = [edits.prompt_of(colour) for colour in signs.COLOURS]
    options = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "pt"}
    clip = pipe.tokenizer(prompts, **options).input_ids
    t5 = pipe.tokenizer_2(prompts, **options).input_ids
    return {
        "encoder_hidden_states": pipe.text_encoder_2(t5)[0],
        "pooled_projections": pipe.text_encoder(clip).pooler_output,
    }


def velocity(
    pipe: FluxKontextPipeline, xt: Tensor, t: Tensor, sources: Tensor, text: dict[str, Tensor]
) -> Tensor:
    """Of latents `xt` [B, *LATENT_SHAPE] at the times `t` [B], given their sources' latents."""
    tokens = [pipe._pack_latents(x, *x.shape) for x in (xt, sources)]
    places = pipe._prepare_latent_image_ids(1, xt.shape[2] // 2, xt.shape[3] // 2, "cpu", xt.dtype)
    of_sources = places.clone()
    of_sources[:, 0] = 1
    found = pipe.transformer(
        hidden_states=torch.cat(tokens, dim=1),
        timestep=t,
        txt_ids=torch.zeros(TOKENS, 3),
        img_ids=torch.cat([places, of_sources]),
        **text,
        return_dict=False,
    )[0]
    size = signs.HEIGHT, signs.WIDTH
    return pipe._unpack_latents(found[:, :PATCHES], *size, pipe.vae_scale_factor)


def train_flow(
    pipe: FluxKontextPipeline, data: Pairs, steps: int, *, seed: int, peak_rate: float, stage: str
) -> None:
    """Flow matching: learns the velocity noise - latent on the straight line between the two.

    Trains transformer and text encoders, and leaves their averaged weights in the pipeline.
    """
    generator = torch.Generator().manual_seed(seed)
    sources, results = (encode_signs(pipe.vae, images) for images in (data.sources, data.results))
    modules = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)

    def loss() -> Tensor:
        batch = torch.randint(len(results), (48,), generator=generator)
        at = noised(results[batch], generator)
        text = {name: of_all[data.wanted[batch]] for name, of_all in encode_prompts(pipe).items()}
        found = velocity(pipe, at.xt, at.t, sources[batch], text)
        return nn.functional.mse_loss(found, at.velocity)

    train_modules(modules, loss, steps, peak_rate, stage)


# --- evaluation --------------------------------------------------------------------------------


class Score(NamedTuple):
    """What an evaluation found, as means over its edits."""

    ocr: float  # the OCR reward for the source's text
    exact: float  # share of signs that read right
    colour_error: float  # of 255
    recoloured: float  # share of signs nearest to the wanted colour


def draw(
    pipe: FluxKontextPipeline, wanted: Sequence[Edit], noise: Tensor, steps: int, output: str
) -> Any:
    """What the pipeline makes of the edits' pictures from `noise` [N, *LATENT_SHAPE]."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        image=as_pixels([edits.picture_of(edit) for edit in wanted]) / 2 + 0.5,
        prompt=[edits.prompt_of(edit.wanted) for edit in wanted],
        height=signs.HEIGHT,
        width=signs.WIDTH,
        max_area=signs.HEIGHT * signs.WIDTH,
        _auto_resize=False,
        num_inference_steps=steps,
        max_sequence_length=TOKENS,
        latents=pipe._pack_latents(noise, *noise.shape),
        output_type=output,
    ).images


def sample(pipe: FluxKontextPipeline, wanted: Sequence[Edit], noise_seed: int = 7) -> np.ndarray:
    """Makes the edits in 10 Euler steps from fixed noise: uint8 [N, HEIGHT, WIDTH, 3]."""
    generator = torch.Generator().manual_seed(noise_seed)
    noise = torch.randn((len(wanted), *LATENT_SHAPE), generator=generator)
    return (draw(pipe, wanted, noise, 10, "np") * 255).round().astype(np.uint8)


def evaluate(pipe: FluxKontextPipeline, wanted: Sequence[Edit], noise_seed: int = 7) -> Score:
    """Makes the edits and measures how well texts are kept and whether the colours agree."""
    images = sample(pipe, wanted, noise_seed)
    targets = [{"target": edit.text} for edit in wanted]
    ocr = OcrReward(detect=False)(images, [""] * len(images), targets)
    errors = np.array([[signs.colour_error(image, c) for c in signs.COLOURS] for image in images])
    asked = np.array([list(signs.COLOURS).index(edit.wanted) for edit in wanted])
    return Score(
        float(ocr.mean()),
        float((ocr == 1).mean()),
        float(errors[np.arange(len(images)), asked].mean()),
        float((errors.argmin(axis=1) == asked).mean()),
    )


def _report(stage: str, pipe: FluxKontextPipeline, heldout: Sequence[Edit]) -> None:
    if heldout:
        score = evaluate(pipe, heldout)
        values = ", ".join(f"{name} {value:.3f}" for name, value in score._asdict().items())
        print(f"{stage}: {values}", flush=True)


# --- the build ---------------------------------------------------------------------------------


def trained_vae() -> AutoencoderKL:
    """That of the text-to-image model; its config does not say where it was loaded from."""
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(VAE))
    vae.load_state_dict(AutoencoderKL.from_pretrained(VAE, dtype=torch.float32).state_dict())
    return vae.eval()


def train(seed: int, budget: Budget, heldout: Sequence[Edit] = ()) -> FluxKontextPipeline:
    """Both stages; with `heldout` edits, prints how the first stage makes them."""
    with exactly(threads=1):
        pipe = untrained_pipeline(seed, trained_vae())
        right = draw_pairs(budget.pairs, 2 * seed, Faults())
        clean = {"seed": 2 * seed, "peak_rate": 2e-3, "stage": "right pairs"}
        train_flow(pipe, right, budget.clean_steps, **clean)
        _report("right pairs", pipe, heldout)
        wrong = draw_pairs(budget.pairs, 2 * seed + 1, Faults(digit=0.7, colour=0.4))
        faulty = {"seed": 2 * seed + 1, "peak_rate": 1e-3, "stage": "wrong pairs"}
        train_flow(pipe, wrong, budget.noised_steps, **faulty)
    return pipe


def main() -> None:
    """Builds the model and its two prompt files from the command line."""
    out, prompts, seed, budget = arguments(__doc__ or "", Budget)
    if prompts is not None:
        edits.write_prompts(prompts, seed)
    count, held_out = edits.SETS["heldout"]
    heldout = edits.make_edits(count, held_out, seed)

    saved = trained_and_saved(lambda: train(seed, budget, heldout), out)
    _report("as saved", saved, heldout)


if __name__ == "__main__":
    main()
