"""The parts of the embedded editing model before any training."""

# The annotations of diffusers are wrong about what its models and pipelines take and return.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextModel

from flowgrpo_ray.tiny.edits import WORDS
from flowgrpo_ray.tiny.parts import (
    CLIP_DIM,
    DIM,
    HEADS,
    LATENT_SHAPE,
    clip_config,
    clip_tokenizer,
    soft_start,
    strong_positions,
    t5_encoder,
    t5_tokenizer,
)


def untrained_pipeline(seed: int, vae: AutoencoderKL) -> FluxKontextPipeline:
    """The pipeline around a trained autoencoder, with initial weights that depend on `seed` alone.

    As FLUX.1-schnell it takes no guidance scale.
    """
    words, pieces = clip_tokenizer(WORDS), t5_tokenizer(WORDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        summary = CLIPTextModel(clip_config(len(words), layers=1))
        strong_positions(summary)
        return FluxKontextPipeline(
            transformer=_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
            vae=vae,
            text_encoder=summary,
            tokenizer=words,
            text_encoder_2=t5_encoder(len(pieces)),
            tokenizer_2=pieces,
        )


def _transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=4 * LATENT_SHAPE[0],
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=DIM // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=DIM,
        pooled_projection_dim=CLIP_DIM,
        axes_dims_rope=(8, 12, 12),  # of picture (0: the drawn one, 1: its source), row and column
    )
    double, single = model.transformer_blocks, model.single_transformer_blocks
    norms = [norm for block in double for norm in (block.norm1, block.norm1_context)]
    norms += [block.norm for block in single]
    soft_start(model, [double, single, model.context_embedder, model.x_embedder], norms)
    return model
