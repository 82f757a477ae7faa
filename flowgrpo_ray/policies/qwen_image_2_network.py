"""Qwen-Image-2.1's network as text to image needs it, and its processor without pictures.

The weights, blocks and arithmetic are diffusers'. Its own ``forward`` lays out any sequence of text
and pictures, for which it fetches numbers from the GPU, and counts what fills a prompt up among the
positions before an image: a prompt's velocity would depend on the longest of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from transformers import ProcessorMixin, Qwen3VLProcessor

Grids = Sequence[Sequence[tuple[int, int, int]]]  # frames, height and width of each sample's images


def draw_from_text(network: Any) -> nn.Module:
    """Let ``network`` compute by ``forward`` below."""
    for block in network.transformer_blocks:
        block.attn.set_processor(Attention())
    network.forward = MethodType(forward, network)
    return network


def forward(
    network: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    img_shapes: Grids,
    encoder_hidden_states_mask: Tensor | None = None,
    *,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """The velocity at ``[b, text + h w]`` tokens: of prompts ``[b, text, dim]`` and the latents
    ``[b, h w, C]`` of one image each, which are behind; a mask ``[b, text]`` is True on prompts."""
    image, text = network.img_in(hidden_states), network.txt_in(encoder_hidden_states)
    _, height, width = img_shapes[0][0]
    lengths = key_valid = of_image = None
    if (mask := encoder_hidden_states_mask) is not None:
        lengths = mask.sum(1)
        key_valid = torch.cat([mask, mask.new_ones(len(mask), height * width)], 1)
    rotary = rotations(network.pos_embed, text.shape[1], lengths, (height, width), image.device)
    joint = torch.cat([text, image], 1)
    time = timestep.to(image.dtype)
    if network.config.causal_condition:  # a row more, of time 0: what text is modulated by
        time = torch.cat([time, time.new_zeros(1)])
        of_image = torch.arange(joint.shape[1], device=image.device) >= text.shape[1]
    embedded = network.time_text_embed(time, image)
    modulation = network.modulation(embedded)
    given = (modulation, rotary, None, of_image, None, None, None, text.shape[1], key_valid)
    for block in network.transformer_blocks:
        if torch.is_grad_enabled() and network.gradient_checkpointing:
            joint = network._gradient_checkpointing_func(block, joint, *given)
        else:
            joint = block(joint, *given)
    return (network.proj_out(network.norm_out(joint, embedded, of_image)),)


def rotations(
    rope: Any, text: int, lengths: Tensor | None, grid: tuple[int, int], device: torch.device
) -> Tensor:
    """``[b or 1, text + h w, 1, head / 2]`` complex. A prompt's token has its place on all three
    axes; one of the image has the prompt's length, and its place around the image's middle."""
    behind = torch.full((1,), text, device=device) if lengths is None else lengths
    words = torch.arange(text, device=device)[None, :, None].expand(len(behind), -1, 3)
    height, width = (torch.arange(n, device=device) - (n - n // 2) for n in grid)
    places = torch.cartesian_prod(height, width).expand(len(behind), -1, 2)
    image = torch.cat([behind[:, None, None].expand(-1, places.shape[1], 1), places], -1)
    positions = torch.cat([words, image], 1)
    angles: list[Tensor] = []
    for axis, dim in enumerate(rope.axes_dim):
        steps = torch.arange(0, dim, 2, device=device).to(torch.float32)
        angles.append(positions[..., axis, None] * (1.0 / torch.pow(rope.theta, steps.div(dim))))
    turned = torch.cat(angles, -1)[:, :, None]
    return torch.polar(torch.ones_like(turned), turned)


class Attention:
    """A prompt's tokens attend to those before them, the image's to all that are no filling.

    ``segments`` is the number of the text's tokens.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        rotary_emb: Tensor,
        segments: int,
        key_valid: Tensor | None,
        **_: object,
    ) -> Tensor:
        head = attn.inner_dim // attn.heads
        parts = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        query, key, value = (part.unflatten(-1, (-1, head)) for part in parts)
        query = _turn(attn.norm_q(query).to(value.dtype), rotary_emb)
        key = _turn(attn.norm_k(key).to(value.dtype), rotary_emb)
        text = segments
        causal = torch.ones(text, text, dtype=torch.bool, device=query.device).tril()[None, None]
        read = (query[:, :text], key[:, :text], value[:, :text])
        seen = None if key_valid is None else key_valid[:, None, None]
        found = [
            dispatch_attention_fn(*read, attn_mask=causal),
            dispatch_attention_fn(query[:, text:], key, value, attn_mask=seen),
        ]
        return attn.to_out[0](torch.cat(found, 1).flatten(2, 3).type_as(query))


def _turn(x: Tensor, rotary: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rotary
    return torch.view_as_real(turned).flatten(3).type_as(x)


class Words(Qwen3VLProcessor):
    """The pipeline's processor without its parts for pictures, which need torchvision."""

    return_mm_token_type_ids = False

    def __init__(self, tokenizer: Any) -> None:
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        ProcessorMixin.__init__(self, tokenizer, chat_template=tokenizer.chat_template)

    def save_pretrained(self, *_: object, **__: object) -> list[str]:
        """Nothing: whoever saves the pipeline copies the processor's own files."""
        return []
