"""Prompts of which a model reads a part only: counted by its tokenizer, told or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny_models import MODELS, load_pipe, model_folder, spec_of
from tiny_runs import CPU

from flowgrpo_ray.common.errors import ModelError, PromptError, SpecError
from flowgrpo_ray.common.types import Overlong
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.encodings import EncodingCache
from flowgrpo_ray.run.inference import cut_off
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.prompts import Prompt, check_lengths
from flowgrpo_ray.spec.training import TrainingSpec

LONG = 'dark pink sign "550", of the size of a wall'
LIMIT = "model.max_sequence_length=16"


def overlong(spec: TrainingSpec, *prompts: str) -> Overlong:
    return EncodingCache(load_policy(spec, CPU, frozenset())).overlong(prompts)


@pytest.mark.parametrize(
    ("family", "tokenizer", "marks_behind"),
    [("sd3", "tokenizer_3", 1), ("flux", "tokenizer_2", 1), ("qwen_image", "tokenizer", 0)],
)
def test_prompts_are_counted_as_the_pipelines_tokenizer_does(family, tokenizer, marks_behind):
    """What is read are whole tokens from the beginning: one more does not fit."""
    found = overlong(spec_of(family, LIMIT), "red sign", LONG)
    pipe = load_pipe(model_folder(family))
    count = lambda text: len(getattr(pipe, tokenizer)(text).input_ids)  # noqa: E731
    template = 5 if family == "qwen_image" else 0  # tokens behind the prompt
    ((prompt, (tokens, read)),) = found.cut.items()
    assert (prompt, tokens, found.limit) == (LONG, count(LONG) + template, 16)
    assert found.most == (1024 if family == "qwen_image" else 512)
    assert count(LONG[:read]) == 16
    assert count(LONG[: read + 2]) > 16 - marks_behind
    at_limit = f"model.max_sequence_length={tokens}"
    assert not overlong(spec_of(family, at_limit), LONG).cut


def test_bagels_limit_counts_the_prompt_alone():
    found = overlong(spec_of("bagel", LIMIT), LONG)
    assert found.cut[LONG] == (len(LONG), 16), "a byte is a token"


def test_tokens_are_counted_once_for_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And short prompts, by their bytes, not at all."""
    monkeypatch.setenv("FLOWGRPO_ENCODINGS", str(tmp_path))
    policy = load_policy(spec_of("flux", LIMIT), CPU, frozenset())
    first = EncodingCache(policy).overlong([LONG, "red"])
    monkeypatch.setattr(type(policy), "load_tokens", None)
    again = EncodingCache(policy).overlong(["red", LONG, LONG])
    assert (again.limit, {t: tuple(c) for t, c in again.cut.items()}) == (16, dict(first.cut))
    assert not EncodingCache(policy).overlong([""]).cut, "16 marks, and no text"


def test_a_folder_that_names_no_tokenizer_is_refused(tmp_path: Path):
    folder = Path(shutil.copytree(model_folder("flux"), tmp_path / "flux"))
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "tokenizer_2": [None, None]}))
    with pytest.raises(ModelError, match=r"names no tokenizer of transformers as 'tokenizer_2'"):
        overlong(MODELS["flux"].spec(folder, LIMIT), LONG)


def check(prompt: Prompt, found: Overlong) -> str | None:
    return check_lengths(load_spec("tiny-ocr", [LIMIT]), [prompt, Prompt('red sign "4"')], found)


@pytest.mark.parametrize(
    ("prompt", "refused"),
    [
        (Prompt('a wall "ab" beside "much more"'), False),  # the second one is not asked for
        (Prompt('a wall beside much more "ab"'), True),
        (Prompt('a wall, its inches: "ab cd ef"'), True),  # cut in the middle
        (Prompt("a wall, beside much more", {"target": "A WALL"}), False),
        (Prompt("a wall, beside much more", {"target": "much more"}), True),
        (Prompt("a wall, beside much more", {"target": "not in the prompt"}), False),
    ],
)
def test_a_text_that_is_cut_off_is_refused(prompt: Prompt, refused: bool):
    found = Overlong(16, 512, {prompt.text: (30, len('a wall, its inches: "ab'))})
    if refused:
        with pytest.raises(PromptError) as caught:
            check(prompt, found)
        assert "rewards.ocr: the text" in str(caught.value)
        assert "reads 16 of the prompt's 30 tokens. Raise model.max_sequence" in str(caught.value)
        return
    told = check(prompt, found)
    assert told is not None
    assert told.startswith("1 of 2 prompts are cut off after 16 tokens; the longest has 30: 'a wa")
    assert told.endswith("Raise model.max_sequence_length = 16")
    ends = {20: "max_sequence_length = 16 (at most 20)", 16: "takes no more: shorten them"}
    for most, end in ends.items():
        assert (check(prompt, Overlong(16, most, found.cut)) or "").endswith(end)
    assert check(prompt, Overlong(16, 512, {})) is None


# --- SD3 without T5


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sd3"
    shutil.copytree(model_folder("sd3"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
    return folder


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sd3_without_t5_encodes_as_its_pipeline_does(without_t5: Path, guidance: float):
    spec = MODELS["sd3"].spec(without_t5, f"sampling.guidance={guidance}")
    policy = load_policy(spec, CPU)
    policy.encoded_at_once = 1  # as the pipeline does with one
    (condition,) = policy.encode(["red sign"])
    pipe = StableDiffusion3Pipeline.from_pretrained(
        without_t5, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    embeds = pipe.encode_prompt("red sign", None, None, max_sequence_length=40)
    names = ("embeds", "negative_embeds", "pooled", "negative_pooled")
    for name, expected in zip(names, embeds, strict=True):
        if name in condition:
            assert np.array_equal(condition[name], expected[0].detach().numpy())
    assert len(condition) == (4 if guidance > 1 else 2)
    assert not condition["embeds"][-40:].any()
    config = json.loads((without_t5 / "text_encoder" / "config.json").read_text())
    example = policy.example_condition(1, {"text_encoder/config.json": config})
    assert {n: tuple(t.shape[1:]) for n, t in example.items()} == {
        name: array.shape for name, array in condition.items()
    }
    x = torch.zeros(1, *policy.latent_shape((32, 48)))
    assert policy.velocity(x, 0.5, policy.collate([condition])).isfinite().all()


def test_without_t5_clips_limit_is_told(without_t5: Path):
    long = "red sign " * 6
    assert overlong(MODELS["sd3"].spec(model_folder("sd3")), long).cut == {}, "T5 has the rest"
    found = overlong(MODELS["sd3"].spec(without_t5), long)
    assert (found.limit, found.most) == (10, 10)
    assert found.cut[long] == (14, len("red sign " * 4) - 1)


# --- the negative prompt


@pytest.mark.parametrize("family", ["sd3", "qwen_image"])
def test_the_negative_prompt_is_the_specs(family: str):
    """Encoded as any prompt is, in place of the pipeline's own, and under a folder of its own."""
    guided, text = "sampling.guidance=3", "red sign"
    own = load_policy(spec_of(family, guided, f"model.negative_prompt={text}"), CPU)
    plain = load_policy(spec_of(family, guided), CPU)
    (found,), (other,) = own.encode([text]), plain.encode([text])
    assert found["negative_embeds"].tobytes() == found["embeds"].tobytes()
    assert other["negative_embeds"].tobytes() != found["embeds"].tobytes()
    assert EncodingCache(own).folder != EncodingCache(plain).folder


@pytest.mark.parametrize(("family", "guidance"), [("flux", 3.5), ("bagel", 4.0), ("sd3", 1.0)])
def test_a_negative_prompt_that_nobody_reads_is_refused(family: str, guidance: float):
    spec = spec_of(family, f"sampling.guidance={guidance}", "model.negative_prompt=blurred")
    with pytest.raises(SpecError, match=r"model\.negative_prompt = 'blurred': .* Leave it out"):
        load_policy(spec, CPU, frozenset())


def test_who_draws_or_scores_is_told_what_is_not_read():
    """`sample` scores nothing, so it draws all the same; `evaluate` refuses what a reward asks."""
    spec = load_spec("tiny-ocr", ["model.max_sequence_length=6"])
    policy = load_policy(spec, CPU, frozenset())
    unscored = spec.model_copy(update={"rewards": {}})
    told = cut_off(policy, unscored, [Prompt(LONG), Prompt("red")])
    assert told is not None
    assert told.startswith("1 of 2 prompts are cut off after 6 tokens; the longest has ")
    assert cut_off(policy, unscored, [Prompt("red")]) is None
    with pytest.raises(PromptError, match=r"rewards\.ocr: the text"):
        cut_off(policy, spec, [Prompt(LONG)])
