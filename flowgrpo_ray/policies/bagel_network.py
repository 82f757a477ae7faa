"""BAGEL's mixture of two transformers, as far as text to image needs it.

Every layer holds two experts, which share its attention and nothing else: the understanding expert
works on text, the generation expert (``_moe_gen``) on latents. Parameters have the names of the
published ``ema.safetensors``. Left out is what only images as input or text as output need: the
vision model and its connector, ``lm_head`` and the final norm of text.

Shapes: ``b`` samples, ``P`` prompt tokens, ``n`` latent tokens, ``d`` hidden, ``k`` key-value heads
of ``h`` features. transformers is imported with this module, so import it late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

from flowgrpo_ray.policies.bagel_weights import (
    CONFIG,
    GRID,
    IMAGE_MARKS,
    NETWORK,
    PATCH_VALUES,
    check_network,
    load_tokenizer,
    opened,
)
from flowgrpo_ray.policies.fit import check_memory
from flowgrpo_ray.policies.hub import model_file, unavailable

if TYPE_CHECKING:
    from flowgrpo_ray.spec.sections import ModelSpec

EXPERTS = ("", "_moe_gen")  # suffixes of the names: understanding, generation
TIME_FEATURES = 256

Streams = Sequence[Tensor]  # hidden states by expert: text [b, m, d] and, if any, latents [b, n, d]
Rotary = tuple[Tensor, Tensor]  # cosines and sines, [b, m or 1, h] each
KeyValue = tuple[Tensor, Tensor]  # [b, k, m, h] each


class BagelAttention(nn.Module):
    """Grouped-query attention over all streams; each has the projections of its own expert."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        groups = config.num_key_value_heads or heads
        self.head_size, self.repeats = hidden // heads, heads // groups
        sizes = {"q": hidden, "k": groups * self.head_size, "v": groups * self.head_size}
        for expert in EXPERTS:
            for name, size in sizes.items():
                setattr(self, f"{name}_proj{expert}", nn.Linear(hidden, size))
            setattr(self, f"o_proj{expert}", nn.Linear(hidden, hidden, bias=False))
            for name in ("q_norm", "k_norm"):
                norm = Qwen2RMSNorm(self.head_size, eps=config.rms_norm_eps)
                setattr(self, f"{name}{expert}", norm)

    def forward(
        self, streams: Streams, rotary: Rotary, past: Tensor | None, mask: Tensor | None
    ) -> tuple[list[Tensor], KeyValue]:
        """Attention's output by stream, and the streams' own keys and values.

        Text alone is causal, as prompts are read; with latents, every token sees every other.
        """
        projected = [self._heads(x, e, rotary) for x, e in zip(streams, EXPERTS, strict=False)]
        query, *own = (torch.cat(parts, 2) for parts in zip(*projected, strict=True))
        key, value = own
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        attended = scaled_dot_product_attention(
            query,
            repeat_kv(key, self.repeats),  # kernels that take a mask do not group queries
            repeat_kv(value, self.repeats),
            attn_mask=mask,
            is_causal=len(streams) == 1,
        )
        parts = attended.transpose(1, 2).flatten(2).split([x.shape[1] for x in streams], 1)
        outputs = [getattr(self, f"o_proj{e}")(x) for x, e in zip(parts, EXPERTS, strict=False)]
        return outputs, (own[0], own[1])

    def _heads(self, x: Tensor, expert: str, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[b, heads, m, h]``; norm per head, then rotation."""
        query, key, value = (
            getattr(self, f"{name}_proj{expert}")(x).unflatten(2, (-1, self.head_size))
            for name in "qkv"
        )
        query = getattr(self, f"q_norm{expert}")(query)
        key = getattr(self, f"k_norm{expert}")(key)
        query, key = apply_rotary_pos_emb(query, key, *rotary, unsqueeze_dim=2)
        # A norm whose weight is a float32 master gives float32, also under autocast.
        return tuple(t.to(value.dtype).transpose(1, 2) for t in (query, key, value))


class BagelDecoderLayer(nn.Module):
    """One layer of both experts; what FSDP shards."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.self_attn = BagelAttention(config)
        for expert in EXPERTS:
            setattr(self, f"mlp{expert}", Qwen2MLP(config))
            for name in ("input_layernorm", "post_attention_layernorm"):
                norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
                setattr(self, f"{name}{expert}", norm)

    def forward(
        self,
        streams: Streams,
        rotary: Rotary,
        past: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[list[Tensor], KeyValue]:
        """The streams after this layer, and their keys and values in it.

        ``past [2, b, k, P, h]`` are keys and values that are attended to as well, before the
        streams' own; ``mask [b, 1, 1, P + m + n]`` is False on those that are padding.
        """
        attended, own = self.self_attn(self._each("input_layernorm", streams), rotary, past, mask)
        streams = [x + y for x, y in zip(streams, attended, strict=True)]
        inner = self._each("mlp", self._each("post_attention_layernorm", streams))
        return [x + y for x, y in zip(streams, inner, strict=True)], own

    def _each(self, name: str, streams: Streams) -> list[Tensor]:
        return [getattr(self, name + e)(x) for x, e in zip(streams, EXPERTS, strict=False)]


class BagelDecoder(nn.Module):
    """The layers between embeddings and final norm: ``language_model.model`` of the file."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            BagelDecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm_moe_gen = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config)


class PositionTable(nn.Module):
    """One row per place of a latent patch, ``row * GRID + column``; a parameter, never trained."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(GRID * GRID, hidden))


class BagelNetwork(nn.Module):
    """Velocity of latent patches given a prompt's keys and values; also reads the prompts.

    ``image_marks`` are the tokens before and after an image.
    """

    def __init__(self, config: Qwen2Config, image_marks: tuple[int, int]) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.language_model = nn.ModuleDict({"model": BagelDecoder(config)})
        self.time_embedder = nn.ModuleDict(
            {
                "mlp": nn.Sequential(
                    nn.Linear(TIME_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
                )
            }
        )
        self.vae2llm = nn.Linear(PATCH_VALUES, hidden)
        self.llm2vae = nn.Linear(hidden, PATCH_VALUES)
        self.latent_pos_embed = PositionTable(hidden)
        self.register_buffer("image_marks", torch.tensor(image_marks), persistent=False)
        self.checkpointing = False

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each layer's activations in the backward pass."""
        self.checkpointing = True

    def read(self, tokens: Tensor) -> Tensor:
        """Keys and values ``[P, layers, 2, k, h]`` of the prompt ``tokens [P]``, without padding.

        The understanding expert alone computes them.
        """
        decoder = self._decoder
        streams: Streams = [decoder.embed_tokens(tokens[None])]
        positions = torch.arange(len(tokens), device=tokens.device)
        rotary = decoder.rotary_emb(streams[0], positions[None])
        caches: list[Tensor] = []
        for layer in decoder.layers:
            streams, (key, value) = layer(streams, rotary)
            caches.append(torch.stack([key[0], value[0]]))  # [2, k, P, h]
        return torch.stack(caches).permute(3, 0, 1, 2, 4)

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        places: Tensor,
        position: Tensor,
        past: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity of the patches ``latents [b, n, PATCH_VALUES]``, in the same shape.

        ``time [b]`` in 0..1; ``places [n]`` rows of the position table; ``position [b]``, that of
        all tokens of the image, is the length of its prompt; ``past [b, P, layers, 2, k, h]`` as
        ``read`` gives it, ``None`` without a prompt; ``mask [b, P]`` is False on its padding.
        """
        decoder = self._decoder
        features = get_timestep_embedding(
            time, TIME_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        moment = self.time_embedder["mlp"](features.to(latents.dtype))
        hidden = self.vae2llm(latents) + moment[:, None] + self.latent_pos_embed.pos_embed[places]
        marks = decoder.embed_tokens(self.image_marks)
        streams: Streams = [marks.expand(len(latents), -1, -1), hidden]
        rotary = decoder.rotary_emb(hidden, position[:, None])
        if mask is not None:
            image = mask.new_ones(len(latents), marks.shape[0] + hidden.shape[1])
            mask = torch.cat([mask, image], 1)[:, None, None]
        for i, layer in enumerate(decoder.layers):
            before = None if past is None else past[:, :, i].permute(2, 0, 3, 1, 4)
            if self.checkpointing and torch.is_grad_enabled():
                streams, _ = checkpoint(layer, streams, rotary, before, mask, use_reentrant=False)
            else:
                streams, _ = layer(streams, rotary, before, mask)
        return self.llm2vae(decoder.norm_moe_gen(streams[1]))

    @property
    def _decoder(self) -> BagelDecoder:
        decoder = self.language_model["model"]
        assert isinstance(decoder, BagelDecoder)
        return decoder


def load_network(model: ModelSpec, dtype_of: Callable[[str], torch.dtype]) -> BagelNetwork:
    """The network on the CPU, frozen, each parameter in the dtype ``dtype_of(name)``."""
    tokenizer = load_tokenizer(model)
    try:
        config = Qwen2Config.from_json_file(model_file(model, CONFIG))
    except (OSError, ValueError) as error:
        raise unavailable(model, f"{CONFIG} of it is no Qwen2 config", error) from error
    start, end = tokenizer.convert_tokens_to_ids(list(IMAGE_MARKS))
    with init_empty_weights():
        network = BagelNetwork(config, (start, end))
    sizes = [p.numel() * dtype_of(n).itemsize for n, p in network.named_parameters()]
    check_memory(model, NETWORK, sum(sizes))
    with opened(model, NETWORK) as file:
        check_network(model, {n: tuple(p.shape) for n, p in network.named_parameters()}, file)
        tensors = {n: file.get_tensor(n).to(dtype_of(n)) for n, _ in network.named_parameters()}
    network.load_state_dict(tensors, assign=True)
    return network.requires_grad_(False)
