"""Prompt encodings on disk: made once, shared, told apart by all that they depend on."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from editing import FAMILY, add_family, write_image
from tiny_runs import CPU, LORA, PROMPTS, SIZE, small_spec

from flowgrpo_ray.cluster.pictures import Encoding, encode_on, with_files
from flowgrpo_ray.cluster.rollout import RolloutWorker
from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.sources import find_source, read_sources
from flowgrpo_ray.common.types import Edit
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.policies.encodings import EncodingCache, fingerprint

MODEL = small_spec().model.folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("FLOWGRPO_ENCODINGS", str(tmp_path / "encodings"))
    return tmp_path / "encodings"


def policy(*overrides: str) -> Policy:
    """A policy that has loaded nothing."""
    return load_policy(small_spec(*overrides), CPU, frozenset())


class Counting:
    """A policy whose encodings are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, of: Policy) -> None:
        self.encoded: list[str] = []
        real = of.encode

        def encode(prompts: Sequence[str]):
            self.encoded += prompts
            return real(prompts)

        monkeypatch.setattr(of, "encode", encode)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_encoding_is_made_once_and_read_back_bit_for_bit(monkeypatch, dtype):
    first = policy(f"model.encoder_dtype={dtype}", "sampling.guidance=3")
    counting, cache = Counting(monkeypatch, first), EncodingCache(first)
    assert cache.add([PROMPTS[0], PROMPTS[1], PROMPTS[0]]) == 2
    assert counting.encoded == [PROMPTS[0], PROMPTS[1]]
    assert cache.add(PROMPTS) == 1
    assert counting.encoded == list(PROMPTS)

    first.load_encoder()
    for prompt, fresh in zip(PROMPTS, first.encode(PROMPTS), strict=True):
        read = cache.get(prompt)
        assert read.keys() == fresh.keys() == {"embeds", "pooled", *NEGATIVE}
        for name, array in fresh.items():
            assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
            assert read[name].tobytes() == array.tobytes()


NEGATIVE = ("negative_embeds", "negative_pooled")


def test_whoever_comes_later_needs_no_text_encoder(monkeypatch):
    EncodingCache(policy()).add(PROMPTS)
    later = policy()
    monkeypatch.setattr(later, "load_encoder", lambda: pytest.fail("the encoders were loaded"))
    cache = EncodingCache(later)
    assert cache.add(PROMPTS) == 0
    assert np.isfinite(cache.get(PROMPTS[2])["embeds"]).all()


def test_a_gpus_memory_is_handed_back_before_text_encoders_come_and_after_they_went(monkeypatch):
    """What sampling has left in torch's cache makes room for them, and theirs for the network."""
    made, did = policy(), list[str]()
    for name in ("load_encoder", "drop_encoder"):
        real = getattr(made, name)
        monkeypatch.setattr(made, name, lambda name=name, real=real: (did.append(name), real()))
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr(
        "torch.cuda.empty_cache", lambda: did.append(f"free: {hasattr(made, 'encoder')}")
    )
    cache = EncodingCache(made)
    cache.add(PROMPTS[:1], more=True)
    cache.add(PROMPTS)
    assert did == ["free: False", "load_encoder", "drop_encoder", "free: False"]
    cache.add(PROMPTS)
    assert len(did) == 4, "nothing was encoded"


@pytest.mark.parametrize(
    "override",
    [
        "model.max_sequence_length=12",
        "model.encoder_dtype=bfloat16",
        "model.dtype=float16",
        "sampling.guidance=3",
    ],
)
def test_what_changes_an_encoding_changes_the_fingerprint(override):
    assert fingerprint(policy(override)) != fingerprint(policy())


@pytest.mark.parametrize(
    "override", ["seed=8", LORA, "model.decoder_dtype=float16", "sampling.steps=7", "model.shift=3"]
)
def test_what_does_not_change_an_encoding_does_not_change_the_fingerprint(override):
    assert fingerprint(policy(override)) == fingerprint(policy())


def test_the_strength_of_guidance_does_not_matter_only_that_there_is_some():
    three, four = policy("sampling.guidance=3"), policy("sampling.guidance=4")
    assert fingerprint(three) == fingerprint(four)


def test_other_weights_have_another_fingerprint_and_a_moved_folder_the_same(tmp_path):
    shutil.copytree(MODEL, tmp_path / "one")  # copies the times of change, too
    shutil.copytree(MODEL, tmp_path / "two")
    one, two = (policy(f"model.path={tmp_path / name}") for name in ("one", "two"))
    assert fingerprint(one) == fingerprint(two)
    weights = tmp_path / "two" / "text_encoder" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert fingerprint(one) != fingerprint(two)


def test_a_torn_or_lost_file_is_an_error_that_names_it():
    cache = EncodingCache(policy())
    cache.add(PROMPTS[:1])
    file = cache.file(PROMPTS[0])
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ModelError, match=r"Delete the folder") as error:
        cache.get(PROMPTS[0])
    assert str(file) in str(error.value)
    assert PROMPTS[0] in str(error.value)
    file.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        cache.get(PROMPTS[0])


def test_a_rollout_worker_holds_nothing_else_while_prompts_are_encoded(monkeypatch):
    """Encoders come first and leave; then the network; a worker that starts later does the same."""
    monkeypatch.setattr("os.nice", lambda _: 0)  # of the tests' own process
    worker = RolloutWorker(small_spec("model.dtype=bfloat16"), 0)
    worker.start()
    held: list[bool] = []
    reader = worker.encodings._policy
    load_encoder = reader.load_encoder

    def noted() -> None:
        held.append(hasattr(worker, "policy"))
        load_encoder()

    monkeypatch.setattr(reader, "load_encoder", noted)
    assert worker.encode(PROMPTS) == len(PROMPTS)
    assert held == [False]
    assert not hasattr(reader, "encoder")
    worker.load_model()
    network = worker.policy.network
    halves = [network.get_parameter(name) for name in worker.policy.halved(network)]
    assert {weight.dtype for weight in halves} == {torch.bfloat16}, "no masters"
    numbers = sum(weight.numel() for weight in network.parameters())
    assert sum(weight.numel() for weight in halves) > 0.9 * numbers
    worker.load_model()
    assert worker.policy.network is network, "loaded once"
    assert not hasattr(worker.policy, "encoder")
    assert worker.encodings.folder == EncodingCache(worker.policy).folder, "the same fingerprint"


def test_a_lost_negative_prompt_is_an_error():
    cache = EncodingCache(policy("sampling.guidance=3"))
    cache.add(PROMPTS[:1])
    (cache.folder / "negative.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot be read from .*negative\.safetensors"):
        cache.get(PROMPTS[0])


def test_a_folder_that_cannot_be_written_is_an_error_that_says_what_to_do(folder):
    folder.write_text("a file stands where the folder should be")
    with pytest.raises(ModelError, match="FLOWGRPO_ENCODINGS"):
        EncodingCache(policy()).add(PROMPTS[:1])


def test_one_file_per_prompt_and_one_for_the_negative_prompt_are_all_that_is_kept():
    cache = EncodingCache(policy("sampling.guidance=3"))
    cache.add(PROMPTS)
    files = {p for p in cache.folder.rglob("*") if p.is_file()}
    assert files == {cache.file(p) for p in PROMPTS} | {cache.folder / "negative.safetensors"}
    assert os.environ["FLOWGRPO_ENCODINGS"] in str(cache.folder)


def test_what_nobody_used_for_the_longest_time_goes_first(monkeypatch):
    """Of all models; never what was just asked for, nor a model's negative prompt."""
    old, new = EncodingCache(policy("sampling.guidance=3")), EncodingCache(policy())
    old.add(PROMPTS)
    for age, prompt in enumerate(PROMPTS):
        os.utime(old.file(prompt), (age, age))
    new.add(PROMPTS[:1])
    old.add(PROMPTS[:1])  # is there, and used
    size = old.file(PROMPTS[0]).stat().st_size
    monkeypatch.setenv("FLOWGRPO_ENCODINGS_GIB", str(3.5 * size / 2**30))
    new.add(PROMPTS[:2])
    there = [cache.file(p).exists() for cache in (old, new) for p in PROMPTS]
    assert there == [True, False, False, True, True, False]
    monkeypatch.setenv("FLOWGRPO_ENCODINGS_GIB", "1e-9")
    new.add(new.missing(PROMPTS))
    there = [cache.file(p).exists() for cache in (old, new) for p in PROMPTS]
    assert there == [False] * 3 + [True] * 3
    assert (old.folder / "negative.safetensors").exists()


@pytest.mark.parametrize("given", ["0", "-1", "much", "inf", "nan"])
def test_a_limit_that_is_none_is_an_error_that_names_it(monkeypatch, given):
    monkeypatch.setenv("FLOWGRPO_ENCODINGS_GIB", given)
    with pytest.raises(ModelError, match=f"FLOWGRPO_ENCODINGS_GIB = '{given}'"):
        EncodingCache(policy()).add(PROMPTS[:1])


# --- of prompts that change images


def edit_of(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = SIZE) -> Edit:
    return Edit(PROMPTS[0], (find_source(write_image(path, colour))[0],), size)


def test_an_edit_is_kept_by_its_images_and_their_size(monkeypatch, tmp_path):
    add_family(monkeypatch)
    made = policy(f"model.family={FAMILY}", "sampling.guidance=3")
    loads: list[str] = []
    for name in ("load_encoder", "drop_encoder"):
        real = getattr(made, name)
        monkeypatch.setattr(made, name, lambda name=name, real=real: (loads.append(name), real()))
    cache = EncodingCache(made)
    red, other = (edit_of(tmp_path / f"{n}.png", (n, 0, 0)) for n in (200, 100))
    smaller = replace(red, size=(16, 48))
    copy = edit_of(tmp_path / "copy.png", (200, 0, 0))
    assert cache.file(red) == cache.file(copy), "the content counts, not the name"
    assert len({cache.file(of) for of in (red, other, smaller, PROMPTS[0])}) == 4

    files = read_sources([red, other])
    for path in tmp_path.glob("*.png"):
        path.unlink()  # another machine has none of them
    assert cache.missing([red, other, red]) == [red, other]
    assert cache.add([red], files, more=True) == 1
    assert loads == ["load_encoder"], "more will come"
    assert cache.add([red, other], files) == 1
    assert loads == ["load_encoder", "drop_encoder"]
    assert cache.add([red, other]) == 0

    found = cache.get(red)
    assert found["seen"].tolist() == [[200, 0, 0]]
    assert {name for name in found if name.startswith("negative_")} == set(NEGATIVE)
    moved = found["pooled"] - cache.get(other)["pooled"]
    np.testing.assert_allclose(moved, (200 - 100) / 3 / 255, atol=1e-6)


def test_a_worker_makes_the_conditions_of_an_edit_from_files_that_it_is_sent(monkeypatch, tmp_path):
    add_family(monkeypatch)
    worker = RolloutWorker.__new__(RolloutWorker)
    worker.encodings = EncodingCache(policy(f"model.family={FAMILY}"))
    edit = edit_of(tmp_path / "a.png", (90, 0, 0))
    given = with_files([edit])
    assert with_files([PROMPTS[0]]) == ([PROMPTS[0]],), "a text travels as before"
    (tmp_path / "a.png").unlink()
    condition: Any = worker.conditions(*given)
    assert condition["seen"].tolist() == [[90, 0, 0]]

    sent: list[tuple[int, int, bool]] = []

    class Actor:
        class missing:  # noqa: N801
            remote = staticmethod(lambda prompts: _done(list(prompts[1:])))

        class encode:  # noqa: N801
            remote = staticmethod(lambda p, f, more: _done(sent.append((len(p), len(f), more))))

    monkeypatch.setattr("flowgrpo_ray.cluster.pictures.SENT", 2)
    edits = [edit_of(tmp_path / f"{n}.png", (n, 0, 0)) for n in range(5)]
    told: list[tuple[int, int]] = []
    progress = Encoding(lambda *counts: told.append(counts))
    asyncio.run(encode_on(Actor, ["there", *edits], progress))
    assert sent == [(2, 2, True), (2, 2, True), (1, 1, False)]
    assert told == [(0, 5), (2, 5), (4, 5), (5, 5)]
    asyncio.run(encode_on(Actor, ["there"], progress))
    asyncio.run(encode_on(Actor, ["there", "a", "b", "c"], progress))
    assert sent[3:] == [(2, 0, True), (1, 0, False)], "texts likewise"
    assert told[-1] == (8, 8), "of all actors together"


async def _done(value: Any) -> Any:
    return value
