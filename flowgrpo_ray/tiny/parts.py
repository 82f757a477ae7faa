"""The parts of the embedded models before any training: tokenizers, encoders, transformer, VAE.

They are made from the classes of diffusers and transformers; nothing is downloaded. Here is what
the text-to-image model is made of; `edit_parts` makes the editing model of the same pieces.
"""

# The annotations of diffusers are wrong about what its models and pipelines take and return.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flowgrpo_ray.rewards import signs

TOKENS = 10  # per tokenizer; a sign prompt takes 9 CLIP tokens and 8 T5 tokens
LATENT_SHAPE = (4, signs.HEIGHT // 4, signs.WIDTH // 4)

DIM, CLIP_DIM, HEADS = 128, 64, 4
_LETTERS, _PUNCTUATION = "abcdefghijklmnopqrstuvwxyz", "\"'.,!?-:"
_WORDS = ("sign", *signs.COLOURS)


def clip_tokenizer(words: Sequence[str] = _WORDS) -> CLIPTokenizer:
    """Byte-pair encoding with one token per character, and one for each of `words`.

    A merge learnt for one word may fire inside another (`re` of red inside green), so each word's
    merges start from what the earlier merges make of it.
    """
    characters = _LETTERS + signs.DIGITS + _PUNCTUATION
    symbols = ["<|startoftext|>", "<|endoftext|>", *(c + "</w>" for c in characters), *characters]
    merges: list[tuple[str, str]] = []
    for word in words:
        while len(parts := _apply_merges(word, merges)) > 1:
            merges.append((parts[0], parts[1]))
            symbols.append(parts[0] + parts[1])
    vocabulary = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def _apply_merges(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The parts of `word` after byte-pair merges, the earliest merge first."""
    parts = [*word[:-1], word[-1] + "</w>"]
    for merge in merges:
        for i in reversed(range(len(parts) - 1)):
            if (parts[i], parts[i + 1]) == merge:
                parts[i : i + 2] = ["".join(merge)]
    return parts


def t5_tokenizer(words: Sequence[str] = _WORDS) -> T5Tokenizer:
    """A unigram vocabulary with one token per character, and one for each of `words`."""
    characters = _LETTERS + _LETTERS.upper() + signs.DIGITS + _PUNCTUATION
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(character, -6.0) for character in characters]
    vocabulary += [("▁" + word, -1.0) for word in (*words, '"')]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TOKENS)


def untrained_pipeline(seed: int) -> StableDiffusion3Pipeline:
    """The pipeline with its initial weights, which depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusion3Pipeline(
            transformer=_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
            vae=_vae(),
            text_encoder=_clip_encoder(layers=2),
            tokenizer=clip_tokenizer(),
            text_encoder_2=_clip_encoder(layers=1),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder(len(t5_tokenizer())),
            tokenizer_3=t5_tokenizer(),
        )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=LATENT_SHAPE[0],
        norm_num_groups=2,  # 8 groups on 8 channels would normalize the colour away
        sample_size=signs.WIDTH,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def _clip_encoder(layers: int) -> CLIPTextModelWithProjection:
    encoder = CLIPTextModelWithProjection(clip_config(len(clip_tokenizer()), layers))
    strong_positions(encoder)
    return encoder


def clip_config(vocabulary: int, layers: int) -> CLIPTextConfig:
    """Of a text encoder for a tokenizer with so many tokens."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=CLIP_DIM,
        intermediate_size=2 * CLIP_DIM,
        projection_dim=CLIP_DIM,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_act="gelu",
    )


def strong_positions(encoder: nn.Module) -> None:
    """Large embeddings of tokens and places: SD3 and FLUX give text tokens no places."""
    for module in encoder.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.7)


def t5_encoder(vocabulary: int) -> T5EncoderModel:
    """For a tokenizer with so many tokens."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=DIM,
        d_kv=DIM // HEADS,
        d_ff=2 * DIM,
        num_layers=1,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def _transformer() -> SD3Transformer2DModel:
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        num_layers=3,
        attention_head_dim=DIM // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=DIM,
        caption_projection_dim=DIM,
        pooled_projection_dim=2 * CLIP_DIM,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    norms = [n for block in model.transformer_blocks for n in (block.norm1, block.norm1_context)]
    soft_start(model, [model.transformer_blocks, model.context_embedder], norms)
    return model


def soft_start(model: nn.Module, parts: Iterable[nn.Module], norms: Sequence[nn.Module]) -> None:
    """Initial weights with which the first steps of training already learn.

    The modulation of `norms` is small with half-open gates, and so is the output.
    """
    for module in [module for part in parts for module in part.modules()]:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for linear in [*(norm.linear for norm in norms), model.norm_out.linear, model.proj_out]:
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        if linear.out_features % (3 * DIM) == 0:  # shift, scale, gate; twice where there is an MLP
            linear.bias.data.view(-1, 3, DIM)[:, 2] = 0.5
