"""BAGEL's network against a second computation, written out in float64 without transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tiny_bagel import CONFIG, build_bagel, published_shapes
from tiny_runs import one_thread

from flowgrpo_ray.policies.bagel_network import load_network
from flowgrpo_ray.spec.sections import ModelSpec

HEADS, GROUPS, HEAD = 4, 2, 8
START, END = 261, 262  # the tokens around an image
GENERATION = "_moe_gen"
TOKENS = {"short": (259, 64, 220, 260), "long": (259, 69, 78, 87, 257, 220, 260)}
PLACES = (0, 1, 2, 64, 65, 66)  # two rows of three patches

Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Any:
    folder = build_bagel(tmp_path_factory.mktemp("bagel"))
    model = ModelSpec(family="bagel", path=str(folder), dtype="float32")
    return load_network(model, lambda _: torch.float64).requires_grad_(False)


@pytest.fixture(scope="module")
def weights(network) -> Weights:
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def latents(samples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((samples, len(PLACES), 64), dtype=torch.float64, generator=generator)


def call(network: Any, x: torch.Tensor, time: list[float], *names: str, **more: Any) -> Any:
    """The network on prompts of ``TOKENS`` (none: unconditional), padded by hand."""
    pasts = [network.read(torch.tensor(TOKENS[name])) for name in names]
    lengths = [len(past) for past in pasts] or [0] * len(x)
    given: dict[str, Any] = {"position": torch.tensor(lengths)}
    if pasts:
        given["past"] = torch.nn.utils.rnn.pad_sequence(pasts, batch_first=True)
    if len(set(lengths)) > 1:
        given["mask"] = torch.arange(max(lengths)) < given["position"][:, None]
    return network(x, torch.tensor(time), torch.tensor(PLACES), **{**given, **more})


# --- the second computation


class Token(NamedTuple):
    x: np.ndarray
    expert: str
    position: int


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG["rms_norm_eps"])


def rotate(x: np.ndarray, position: int) -> np.ndarray:
    """Features i and i + 4 of a head turn by position / theta^(i / 4)."""
    angle = position / CONFIG["rope_theta"] ** (np.arange(HEAD // 2) / (HEAD // 2))
    first, second = x[..., : HEAD // 2], x[..., HEAD // 2 :]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def attend(query: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray]) -> np.ndarray:
    """One token's ``[heads, h]`` over ``[groups, h]`` keys: two heads share a group."""
    heads: list[np.ndarray] = []
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        scores = np.array([query[head] @ key[group] / np.sqrt(HEAD) for key in keys])
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        heads.append(sum(s * value[group] for s, value in zip(shares, values, strict=True)))
    return np.concatenate(heads)


def layer(
    w: Weights, number: int, tokens: list[Token], past: tuple[list, list], *, causal: bool
) -> tuple[list[Token], tuple[list, list]]:
    """The tokens after a layer; also the keys and values, those of ``past`` before their own."""
    at = f"language_model.model.layers.{number}."
    keys, values, queries = list(past[0]), list(past[1]), []
    for x, e, position in tokens:
        y = norm(x, w[f"{at}input_layernorm{e}.weight"])
        query, key, value = (
            w[f"{at}self_attn.{n}_proj{e}.weight"] @ y + w[f"{at}self_attn.{n}_proj{e}.bias"]
            for n in "qkv"
        )
        query = norm(query.reshape(HEADS, HEAD), w[f"{at}self_attn.q_norm{e}.weight"])
        key = norm(key.reshape(GROUPS, HEAD), w[f"{at}self_attn.k_norm{e}.weight"])
        queries.append(rotate(query, position))
        keys.append(rotate(key, position))
        values.append(value.reshape(GROUPS, HEAD))
    after: list[Token] = []
    for i, (x, e, position) in enumerate(tokens):
        seen = len(past[0]) + i + 1 if causal else len(keys)
        attended = attend(queries[i], keys[:seen], values[:seen])
        z = x + w[f"{at}self_attn.o_proj{e}.weight"] @ attended
        y = norm(z, w[f"{at}post_attention_layernorm{e}.weight"])
        gate, up = (w[f"{at}mlp{e}.{n}_proj.weight"] @ y for n in ("gate", "up"))
        inner = w[f"{at}mlp{e}.down_proj.weight"] @ (silu(gate) * up)
        after.append(Token(z + inner, e, position))
    return after, (keys, values)


def read(w: Weights, prompt: tuple[int, ...]) -> list[tuple[list, list]]:
    """Keys and values of a prompt, by layer."""
    embedding = w["language_model.model.embed_tokens.weight"]
    tokens = [Token(embedding[token], "", i) for i, token in enumerate(prompt)]
    caches: list[tuple[list, list]] = []
    for number in range(2):
        tokens, cache = layer(w, number, tokens, ([], []), causal=True)
        caches.append(cache)
    return caches


def time_embedding(w: Weights, time: float) -> np.ndarray:
    angle = time * np.exp(-np.log(10000) * np.arange(128) / 128)
    y = np.concatenate([np.cos(angle), np.sin(angle)])
    y = silu(w["time_embedder.mlp.0.weight"] @ y + w["time_embedder.mlp.0.bias"])
    return w["time_embedder.mlp.2.weight"] @ y + w["time_embedder.mlp.2.bias"]


def velocity(w: Weights, x: np.ndarray, time: float, prompt: tuple[int, ...]) -> np.ndarray:
    """The velocity ``[n, 64]`` of one sample; the empty prompt is the unconditional one."""
    embedding = w["language_model.model.embed_tokens.weight"]
    position = len(prompt)
    tokens = [Token(embedding[START], "", position)]
    for patch, place in zip(x, PLACES, strict=True):
        hidden = w["vae2llm.weight"] @ patch + w["vae2llm.bias"] + time_embedding(w, time)
        hidden = hidden + w["latent_pos_embed.pos_embed"][place]
        tokens.append(Token(hidden, GENERATION, position))
    tokens.append(Token(embedding[END], "", position))
    for number, cache in enumerate(read(w, prompt)):
        tokens, _ = layer(w, number, tokens, cache, causal=False)
    last = w["language_model.model.norm_moe_gen.weight"]
    out = [w["llm2vae.weight"] @ norm(t.x, last) + w["llm2vae.bias"] for t in tokens[1:-1]]
    return np.stack(out)


# Norms, rotary angles and time features are computed in float32 by transformers and diffusers in
# any dtype: measured, 5e-7 remains of velocities up to 4.
ROUNDING = 2e-6


@pytest.mark.parametrize("name", TOKENS)
def test_a_prompts_keys_and_values_are_those_written_out(network, weights, name):
    found = network.read(torch.tensor(TOKENS[name])).numpy()
    wanted = np.array(read(weights, TOKENS[name]))  # [layers, 2, P, k, h]
    assert found.shape == (len(TOKENS[name]), 2, 2, GROUPS, HEAD)
    assert np.abs(found - wanted.transpose(2, 0, 1, 3, 4)).max() < ROUNDING


@pytest.mark.parametrize("time", [1.0, 0.37])
@pytest.mark.parametrize("names", [(), ("short",), ("long",)])
def test_the_velocity_is_the_one_written_out(network, weights, names, time):
    x = latents(1)
    found = call(network, x, [time], *names)[0].numpy()
    prompt = TOKENS[names[0]] if names else ()
    wanted = velocity(weights, x[0].numpy(), time, prompt)
    assert np.abs(wanted).max() > 1
    assert np.abs(found - wanted).max() < ROUNDING


def test_names_and_shapes_are_the_published_ones():
    """At the published size, without memory; the sizes are those of ``llm_config.json``."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from flowgrpo_ray.policies.bagel_network import BagelNetwork

    sizes = {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    }
    config = Qwen2Config(**sizes, rope_theta=1e6, tie_word_embeddings=False)
    with torch.device("meta"):
        state = BagelNetwork(config, (0, 1)).state_dict()
        plain = {n: p.numel() for n, p in Qwen2ForCausalLM(config).named_parameters()}
    unused = {"language_model.lm_head.weight", "language_model.model.norm.weight"}
    wanted = {n: s for n, s in published_shapes(sizes).items() if n not in unused}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == wanted
    # Two of Qwen2's stacks of layers with norms of queries and keys, and what is BAGEL's own.
    layers = sum(size for name, size in plain.items() if ".layers." in name) + 28 * 2 * 128
    own = 3584 * (152064 + 1 + 4096 + 257 + 3585 + 65 + 64) + 64
    assert sum(tensor.numel() for tensor in state.values()) == 2 * layers + own == 13_625_163_840


# --- batches


def test_prompts_of_other_lengths_in_the_batch_change_nothing_but_rounding(network):
    """Not bit by bit: sums over padded keys are taken in another order. Measured 1e-16."""
    x = latents(2)
    together = call(network, x, [0.7, 0.3], "short", "long")
    for i, (time, name) in enumerate([(0.7, "short"), (0.3, "long")]):
        alone = call(network, x[i : i + 1], [time], name)[0]
        assert (together[i] - alone).abs().max() < 1e-14


def test_padding_is_not_looked_at(network):
    """Whatever stands there, bit for bit; without its mask it would show."""
    x = latents(2)
    pasts = [network.read(torch.tensor(TOKENS[name])) for name in ("short", "long")]
    past = torch.nn.utils.rnn.pad_sequence(pasts, batch_first=True)
    plain = call(network, x, [0.7, 0.7], "short", "long", past=past)
    past[0, len(TOKENS["short"]) :] = 5.0
    assert torch.equal(call(network, x, [0.7, 0.7], "short", "long", past=past), plain)
    unmasked = call(network, x, [0.7, 0.7], "short", "long", past=past, mask=None)
    assert (unmasked[0] - plain[0]).abs().max() > 0.1
    assert (unmasked[1] - plain[1]).abs().max() < 1e-14


# --- training


def gradients(network: Any) -> dict[str, torch.Tensor]:
    network.zero_grad()
    call(network, latents(2), [0.7, 0.3], "short", "long").square().sum().backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def test_checkpointed_gradients_are_the_same_bit_for_bit(network):
    network.requires_grad_(True)
    calls: list[int] = []
    hook = (
        network.language_model["model"]
        .layers[1]
        .register_forward_pre_hook(lambda *_: calls.append(1))
    )
    plain, once = gradients(network), len(calls)
    network.enable_gradient_checkpointing()
    again, twice = gradients(network), len(calls) - once
    hook.remove()
    network.checkpointing = False
    network.zero_grad()
    network.requires_grad_(False)
    assert twice == once + 1  # the recomputation; prompts are read in both
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
