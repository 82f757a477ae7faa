"""The embedded base model: the shipped folder, its prompt files, and its builder."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

import flowgrpo_ray
from flowgrpo_ray.rewards import signs
from flowgrpo_ray.rewards.ocr import OcrReward
from flowgrpo_ray.tiny import build as tiny_base
from flowgrpo_ray.tiny import parts
from flowgrpo_ray.tiny.training import digest

ASSETS = Path(flowgrpo_ray.__file__).parent / "tiny" / "assets"
MODEL = ASSETS / "tiny-sd3"
FILES = {"train": (256, False), "heldout": (64, True)}


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(MODEL, dtype=torch.float32)


def read_prompts(split: str) -> list[str]:
    return (ASSETS / "prompts" / f"tiny-signs-{split}.txt").read_text().splitlines()


# --- signs -------------------------------------------------------------------------------------


def test_signs_imports_no_heavy_library():
    code = "import sys, flowgrpo_ray.rewards.signs; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "flowgrpo_ray.rewards.signs" in loaded
    assert loaded.isdisjoint({"torch", "diffusers", "transformers", "PIL", "matplotlib"})


def test_about_twelve_percent_are_held_out_and_every_digit_is_seen_in_every_place():
    seen = [text for text in signs.TEXTS if not signs.is_heldout(text)]
    assert 100 <= len(signs.TEXTS) - len(seen) <= 140
    for place in range(3):
        assert {text[place] for text in seen} == set(signs.DIGITS)


@pytest.mark.parametrize("colour", signs.COLOURS)
def test_drawn_signs_have_their_colour_and_depend_on_the_generator_alone(colour):
    image = signs.render("407", colour, random.Random(3))
    assert image.shape == (signs.HEIGHT, signs.WIDTH, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, signs.render("407", colour, random.Random(3)))
    assert not np.array_equal(image, signs.render("407", colour, random.Random(4)))
    errors = {name: signs.colour_error(image, name) for name in signs.COLOURS}
    assert min(errors, key=errors.__getitem__) == colour
    assert errors[colour] <= 12


def test_colour_error_of_a_plain_image_is_exact():
    image = np.full((signs.HEIGHT, signs.WIDTH, 3), (235, 70, 55), dtype=np.uint8)
    assert signs.colour_error(image, "red") == pytest.approx((10 + 0 + 5) / 3)


@pytest.mark.parametrize("colour", signs.COLOURS)
def test_prompts_parse_back(colour):
    assert signs.parse_prompt(signs.prompt_of("038", colour)) == ("038", colour)


@pytest.mark.parametrize("prompt", ['red sign "40"', 'mauve sign "407"', 'a red sign "407"', ""])
def test_other_prompts_are_refused_with_their_value(prompt):
    with pytest.raises(ValueError, match="not a sign prompt") as error:
        signs.parse_prompt(prompt)
    assert repr(prompt) in str(error.value)


# --- the shipped files -------------------------------------------------------------------------


@pytest.mark.parametrize("split", FILES)
def test_prompt_files_are_what_the_builder_writes(split):
    count, heldout = FILES[split]
    prompts = read_prompts(split)
    assert prompts == signs.make_prompts(count, heldout=heldout, seed=0)
    assert len(prompts) == len(set(prompts)) == count
    texts, colours = zip(*map(signs.parse_prompt, prompts), strict=True)
    assert all(signs.is_heldout(text) == heldout for text in texts)
    shares = Counter(colours)
    assert set(shares) == set(signs.COLOURS)
    assert max(shares.values()) - min(shares.values()) <= 1


def test_no_text_is_in_both_prompt_files():
    train, heldout = ({signs.parse_prompt(p)[0] for p in read_prompts(s)} for s in FILES)
    assert train.isdisjoint(heldout)


def test_the_folder_is_small_half_precision_and_names_no_local_path():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert MODEL / "README.md" in files
    assert sum(path.stat().st_size for path in files) < 16_000_000
    for path in files:
        if path.suffix == ".json":
            assert '"/' not in path.read_text(), f"{path} names an absolute path"
    pipe = StableDiffusion3Pipeline.from_pretrained(MODEL, dtype=torch.float16)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer", SD3Transformer2DModel),
        ("vae", AutoencoderKL),
        ("text_encoder", CLIPTextModelWithProjection),
        ("text_encoder_2", CLIPTextModelWithProjection),
        ("text_encoder_3", T5EncoderModel),
        ("tokenizer", CLIPTokenizer),
        ("tokenizer_2", CLIPTokenizer),
        ("tokenizer_3", T5Tokenizer),
        ("scheduler", FlowMatchEulerDiscreteScheduler),
    ],
)
def test_components_are_the_real_classes_with_finite_float32_weights(pipe, name, kind):
    component = pipe.components[name]
    assert type(component) is kind
    if isinstance(component, torch.nn.Module):
        for key, weight in component.named_parameters():
            assert weight.dtype == torch.float32, key
            assert torch.isfinite(weight).all(), key


@pytest.mark.parametrize(
    ("name", "length"), [("tokenizer", 9), ("tokenizer_2", 9), ("tokenizer_3", 8)]
)
def test_every_prompt_has_equally_many_tokens_and_keeps_its_digits(pipe, name, length):
    tokenizer = pipe.components[name]
    assert length <= tokenizer.model_max_length == parts.TOKENS
    prompts = [signs.prompt_of(text, colour) for colour in signs.COLOURS for text in signs.TEXTS]
    for prompt, ids in zip(prompts, tokenizer(prompts).input_ids, strict=True):
        tokens = [token.removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(ids)]
        assert len(tokens) == length, (prompt, tokens)
        text, colour = signs.parse_prompt(prompt)
        assert "".join(token for token in tokens if token in signs.DIGITS) == text
        assert any(token.removeprefix("▁") == colour for token in tokens)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_saved_tokenizers_agree_with_the_builder(pipe, name):
    build = parts.t5_tokenizer if name == "tokenizer_3" else parts.clip_tokenizer
    assert pipe.components[name].get_vocab() == build().get_vocab()


def test_plain_diffusers_draws_a_sign(pipe):
    pipe.set_progress_bar_config(disable=True)
    result = pipe(
        'red sign "407"',
        height=32,
        width=48,
        num_inference_steps=10,
        guidance_scale=1.0,
        max_sequence_length=10,
        generator=torch.Generator().manual_seed(0),
    )
    image = np.asarray(result.images[0])
    assert image.shape == (32, 48, 3)
    errors = {name: signs.colour_error(image, name) for name in signs.COLOURS}
    assert min(errors, key=errors.__getitem__) == "red"
    assert image.min() < 90  # dark ink on it


def test_training_encodes_captions_as_the_pipeline_does(pipe):
    prompts = read_prompts("heldout")[:4]
    wanted, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=10
    )
    options = {"padding": "max_length", "max_length": 10, "return_tensors": "pt"}
    clip = pipe.tokenizer(prompts, **options).input_ids
    t5 = pipe.tokenizer_3(prompts, **options).input_ids
    text = tiny_base.encode_captions(pipe, clip, t5)
    torch.testing.assert_close(text["encoder_hidden_states"], wanted)
    torch.testing.assert_close(text["pooled_projections"], pooled)


def test_the_base_misspells_heldout_prompts_on_the_right_colours(pipe):
    score = tiny_base.evaluate(pipe, read_prompts("heldout"), guidance=1.0)
    assert 0.28 <= score.ocr <= 0.44
    assert score.exact <= 0.25
    assert score.colour_error <= 9


# --- the builder -------------------------------------------------------------------------------


def test_drawn_signs_read_right_and_none_is_held_out():
    data = tiny_base.draw_signs(32, seed=5)
    texts = [signs.TEXTS[i] for i in data.texts]
    assert not any(map(signs.is_heldout, texts))
    images = ((data.images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    prompts = [signs.prompt_of(text, "red") for text in texts]
    assert OcrReward(detect=False)(images, prompts, [{}] * 32).mean() >= 0.98


def test_caption_noise_replaces_digits_but_never_makes_a_heldout_text(pipe):
    captions = tiny_base.Captions(pipe)
    data = tiny_base.draw_signs(2000, seed=1)
    generator = torch.Generator().manual_seed(0)
    by_ids = {tuple(ids.tolist()): i for i, ids in enumerate(captions.clip)}
    assert len(by_ids) == len(captions.clip) == len(signs.COLOURS) * len(signs.TEXTS) + 1

    def picked(noise: float) -> list[int]:
        clip, t5 = captions.pick(data.colours, data.texts, noise, generator)
        rows = [by_ids[tuple(ids.tolist())] for ids in clip]
        torch.testing.assert_close(captions.t5[rows], t5)
        return rows

    true = (data.colours * len(signs.TEXTS) + data.texts).tolist()
    empty = len(captions.clip) - 1
    assert {row for row, own in zip(picked(0.0), true, strict=True) if row != own} == {empty}
    rows = picked(0.6)
    assert 0.07 < rows.count(empty) / len(rows) < 0.13
    pairs = [(row, own) for row, own in zip(rows, true, strict=True) if row != empty]
    assert all(row // len(signs.TEXTS) == own // len(signs.TEXTS) for row, own in pairs)
    shown = [signs.TEXTS[row % len(signs.TEXTS)] for row, _ in pairs]
    assert not any(map(signs.is_heldout, shown))
    assert 0.7 < np.mean([row != own for row, own in pairs]) < 0.9


BUDGETS = [tiny_base.Budget(vae_steps=2, clean_steps=1, noised_steps=1, images=64)]


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_seed_decides_every_weight(budget):
    first = tiny_base.train(3, budget)
    torch.manual_seed(11)  # neither the global generators nor the thread setting may matter
    random.seed(11)
    np.random.seed(11)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert digest(tiny_base.train(3, budget)) == digest(first)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)

    untrained, other = map(parts.untrained_pipeline, (3, 4))
    for name, module in first.components.items():
        if isinstance(module, torch.nn.Module):
            assert all(torch.isfinite(weight).all() for weight in module.parameters()), name
            start = untrained.components[name].state_dict()
            assert any(not torch.equal(w, start[key]) for key, w in module.state_dict().items())
    assert digest(untrained) != digest(other)

    latents = tiny_base.encode_signs(first.vae, tiny_base.draw_signs(64, 3).images)
    assert latents.shape == (64, *parts.LATENT_SHAPE)
    assert latents.mean().item() == pytest.approx(0, abs=1e-3)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
