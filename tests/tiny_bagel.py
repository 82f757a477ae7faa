"""A tiny BAGEL with random weights, written file by file in the layout of the published model.

Names and shapes of the tensors are spelled out here (``published_shapes``), not taken from the
network under test, so that the two can be held against each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

GRID = 64  # positions of latent patches per side
MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 272,
    "hidden_act": "silu",
    "rope_theta": 100.0,  # unlike any default, as is the next: to forget them shows in the numbers
    "rms_norm_eps": 1e-2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
Shapes = dict[str, tuple[int, ...]]


def published_shapes(config: Mapping[str, int]) -> Shapes:
    """Every tensor of ``ema.safetensors`` for text and image generation, for a Qwen2 config."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    narrow = config["num_key_value_heads"] * head
    shapes: Shapes = {
        "language_model.model.embed_tokens.weight": (config["vocab_size"], hidden),
        "language_model.model.norm.weight": (hidden,),
        "language_model.model.norm_moe_gen.weight": (hidden,),
        "language_model.lm_head.weight": (config["vocab_size"], hidden),
        "time_embedder.mlp.0.weight": (hidden, 256),
        "time_embedder.mlp.0.bias": (hidden,),
        "time_embedder.mlp.2.weight": (hidden, hidden),
        "time_embedder.mlp.2.bias": (hidden,),
        "vae2llm.weight": (hidden, 64),
        "vae2llm.bias": (hidden,),
        "llm2vae.weight": (64, hidden),
        "llm2vae.bias": (64,),
        "latent_pos_embed.pos_embed": (GRID * GRID, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        for expert in ("", "_moe_gen"):
            name = f"language_model.model.layers.{layer}"
            for projection, rows in (("q", hidden), ("k", narrow), ("v", narrow)):
                shapes[f"{name}.self_attn.{projection}_proj{expert}.weight"] = (rows, hidden)
                shapes[f"{name}.self_attn.{projection}_proj{expert}.bias"] = (rows,)
            shapes |= {
                f"{name}.self_attn.o_proj{expert}.weight": (hidden, hidden),
                f"{name}.self_attn.q_norm{expert}.weight": (head,),
                f"{name}.self_attn.k_norm{expert}.weight": (head,),
                f"{name}.mlp{expert}.gate_proj.weight": (inner, hidden),
                f"{name}.mlp{expert}.up_proj.weight": (inner, hidden),
                f"{name}.mlp{expert}.down_proj.weight": (hidden, inner),
                f"{name}.input_layernorm{expert}.weight": (hidden,),
                f"{name}.post_attention_layernorm{expert}.weight": (hidden,),
            }
    return shapes


FOREIGN: Shapes = {  # of understanding images: passed on, never loaded
    "vit_model.vision_model.embeddings.patch_embedding.weight": (24, 12),
    "vit_model.vision_model.encoder.layers.0.layer_norm1.bias": (24,),
    "connector.fc1.weight": (32, 24),
    "connector.fc2.bias": (32,),
    "vit_pos_embed.pos_embed": (70 * 70, 8),
}

# Published beside the model for other programs.
OTHERS = ("config.json", "generation_config.json", "preprocessor_config.json")


def build_bagel(folder: Path, seed: int = 0) -> Path:
    """Write the model into ``folder``; the same seed gives the same files."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    shapes = published_shapes(CONFIG) | FOREIGN
    tensors = {name: _draw(name, shape, generator) for name, shape in shapes.items()}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, folder / "ema.safetensors", metadata={"format": "pt"})
    save_file(autoencoder_tensors(generator), folder / "ae.safetensors")
    (folder / "llm_config.json").write_text(json.dumps(CONFIG))
    (folder / "vit_config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    for name in OTHERS:
        (folder / name).write_text(json.dumps({"of": name}))
    _write_tokenizer(folder)
    return folder


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Weights that keep activations near 1, so that no part is lost in another's rounding."""
    noise = torch.randn(shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    if "embed" in name and "embedder" not in name:
        return noise
    return noise / math.sqrt(math.prod(shape[1:]))


def autoencoder_tensors(generator: torch.Generator) -> dict[str, Tensor]:
    """FLUX's autoencoder under Black Forest Labs' names: four levels of two residual blocks."""
    widths, latents = (32, 32, 64, 64), 16
    shapes: Shapes = {}

    def convolution(name: str, before: int, after: int, size: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (after, before, size, size), (after,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def residual(name: str, before: int, after: int) -> None:
        norm(f"{name}.norm1", before)
        convolution(f"{name}.conv1", before, after)
        norm(f"{name}.norm2", after)
        convolution(f"{name}.conv2", after, after)
        if before != after:
            convolution(f"{name}.nin_shortcut", before, after, 1)

    def ends(name: str, first: tuple[int, int], last: tuple[int, int]) -> None:
        convolution(f"{name}.conv_in", *first)
        for block in ("block_1", "block_2"):
            residual(f"{name}.mid.{block}", widths[-1], widths[-1])
        norm(f"{name}.mid.attn_1.norm", widths[-1])
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{name}.mid.attn_1.{part}", widths[-1], widths[-1], 1)
        norm(f"{name}.norm_out", last[0])
        convolution(f"{name}.conv_out", *last)

    ends("encoder", (3, widths[0]), (widths[-1], 2 * latents))
    ends("decoder", (latents, widths[-1]), (widths[0], 3))
    down, up = widths[0], widths[-1]
    for level, width in enumerate(widths):
        for block in range(2):
            residual(f"encoder.down.{level}.block.{block}", down, width)
            down = width
        if level < 3:
            convolution(f"encoder.down.{level}.downsample.conv", width, width)
    for level, width in reversed(list(enumerate(widths))):
        for block in range(3):
            residual(f"decoder.up.{level}.block.{block}", up, width)
            up = width
        if level > 0:
            convolution(f"decoder.up.{level}.upsample.conv", width, width)
    return {name: _draw(name, shape, generator) for name, shape in shapes.items()}


def _write_tokenizer(folder: Path) -> None:
    """Byte-level BPE as Qwen2's: 256 bytes, two merges, and the marks behind them."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    merges = [("e", "d"), ("r", "ed")]
    symbols = [*sorted(ByteLevel.alphabet()), "ed", "red", "<|endoftext|>"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens(list(MARKS), special_tokens=True)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges))
