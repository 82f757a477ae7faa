"""The embedded editing model: the shipped folder, prompt files and pictures, and the builder."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

import flowgrpo_ray
from flowgrpo_ray.rewards import signs
from flowgrpo_ray.rewards.ocr import OcrReward
from flowgrpo_ray.tiny import build_edit, edits, parts
from flowgrpo_ray.tiny.training import as_pixels, digest, encode_signs, noised

ASSETS = Path(flowgrpo_ray.__file__).parent / "tiny" / "assets"
MODEL = ASSETS / "tiny-kontext"


@pytest.fixture(scope="module")
def pipe() -> FluxKontextPipeline:
    return FluxKontextPipeline.from_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def heldout() -> list[edits.Edit]:
    return edits.make_edits(*edits.SETS["heldout"], seed=0)


# --- the shipped files -------------------------------------------------------------------------


@pytest.mark.parametrize("split", edits.SETS)
def test_prompt_files_and_pictures_are_what_the_builder_writes(split, tmp_path):
    edits.write_prompts(tmp_path, seed=0)
    name = f"tiny-edit-{split}.jsonl"
    text = (tmp_path / name).read_text()
    assert (ASSETS / "prompts" / name).read_text() == text
    rows = [json.loads(line) for line in text.splitlines()]
    count, held_out = edits.SETS[split]
    assert len(rows) == len({row["target"] for row in rows}) == count
    assert all(signs.is_heldout(row["target"]) == held_out for row in rows)
    for row in rows:
        assert set(row) == {"prompt", "image", "target"}
        with Image.open(ASSETS / "prompts" / row["image"]) as shipped:
            with Image.open(tmp_path / row["image"]) as made:
                np.testing.assert_array_equal(np.asarray(shipped), np.asarray(made))
            assert shipped.size == (signs.WIDTH, signs.HEIGHT)


def test_no_picture_is_there_that_no_prompt_names():
    every = [edit for name in edits.SETS for edit in edits.make_edits(*edits.SETS[name], seed=0)]
    there = {f"{edits.FOLDER}/{path.name}" for path in (ASSETS / "prompts/tiny-edit").iterdir()}
    assert there == {edit.picture for edit in every}


def test_every_colour_becomes_every_other():
    wishes = Counter((e.source, e.wanted) for e in edits.make_edits(60, heldout=False, seed=0))
    pairs = {(a, b) for a in signs.COLOURS for b in signs.COLOURS if a != b}
    assert set(wishes) == pairs
    assert set(wishes.values()) == {2}


def test_the_pictures_read_as_their_targets_and_have_their_colour(heldout):
    images = np.stack([edits.picture_of(edit) for edit in heldout])
    targets = [{"target": edit.text} for edit in heldout]
    assert OcrReward(detect=False)(images, [""] * len(images), targets).mean() >= 0.98
    for image, edit in zip(images, heldout, strict=True):
        errors = {colour: signs.colour_error(image, colour) for colour in signs.COLOURS}
        assert min(errors, key=errors.__getitem__) == edit.source


def test_the_folder_is_small_half_precision_and_names_no_local_path():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert MODEL / "README.md" in files
    assert sum(path.stat().st_size for path in files) < 6_000_000
    for path in files:
        if path.suffix == ".json":
            assert '"/' not in path.read_text(), f"{path} names an absolute path"
    pipe = FluxKontextPipeline.from_pretrained(MODEL, dtype=torch.float16)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer", FluxTransformer2DModel),
        ("vae", AutoencoderKL),
        ("text_encoder", CLIPTextModel),
        ("text_encoder_2", T5EncoderModel),
        ("tokenizer", CLIPTokenizer),
        ("tokenizer_2", T5Tokenizer),
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


@pytest.mark.parametrize(("name", "length"), [("tokenizer", 6), ("tokenizer_2", 5)])
def test_every_prompt_has_equally_many_tokens_and_keeps_its_colour(pipe, name, length):
    tokenizer = pipe.components[name]
    made = {"tokenizer": parts.clip_tokenizer, "tokenizer_2": parts.t5_tokenizer}[name]
    assert tokenizer.get_vocab() == made(edits.WORDS).get_vocab()
    assert length <= tokenizer.model_max_length == parts.TOKENS
    for colour in signs.COLOURS:
        ids = tokenizer(edits.prompt_of(colour)).input_ids
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert len(tokens) == length, tokens
        assert tokens[-2].removesuffix("</w>").removeprefix("▁") == colour


def test_the_card_tells_the_digest_of_the_weights(pipe):
    assert digest(pipe) in (MODEL / "README.md").read_text()


def test_the_base_recolours_some_and_keeps_some_of_the_text(pipe, heldout):
    score = build_edit.evaluate(pipe, heldout)
    assert 0.45 <= score.ocr <= 0.65
    assert score.exact <= 0.3
    assert 0.3 <= score.recoloured <= 0.6


# --- the builder -------------------------------------------------------------------------------


def test_training_computes_what_the_pipeline_does(pipe, heldout):
    """One Euler step from noise goes to noise - velocity."""
    wanted = heldout[:3]
    colours = list(signs.COLOURS)
    text = build_edit.encode_prompts(pipe)
    rows = [colours.index(edit.wanted) for edit in wanted]
    text = {name: of_all[rows] for name, of_all in text.items()}
    pixels = as_pixels([edits.picture_of(edit) for edit in wanted])
    sources = encode_signs(pipe.vae, pixels)
    noise = noised(sources, torch.Generator().manual_seed(0)).xt
    with torch.no_grad():
        velocity = build_edit.velocity(pipe, noise, torch.ones(3), sources, text)
    found = build_edit.draw(pipe, wanted, noise, steps=1, output="latent")
    expected = pipe._pack_latents(noise - velocity, *noise.shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def ink(images: torch.Tensor) -> torch.Tensor:
    """How much of each pixel the digits cover, [N, HEIGHT, WIDTH]."""
    brightest = images.amax(dim=1)
    white, black = (at(brightest, dim=(1, 2), keepdim=True) for at in (torch.amax, torch.amin))
    return (white - brightest) / (white - black)


def test_right_pairs_differ_in_their_colour_alone():
    pairs = build_edit.draw_pairs(60, 0, build_edit.Faults())
    borders = [images[:, :, :4].mean(dim=(2, 3)) for images in (pairs.sources, pairs.results)]
    palette = torch.tensor(list(signs.COLOURS.values())) / 127.5 - 1
    before, after = (torch.cdist(border, palette).argmin(dim=1) for border in borders)
    assert torch.equal(after, pairs.wanted)
    assert not (before == after).any()
    torch.testing.assert_close(ink(pairs.sources), ink(pairs.results), rtol=0, atol=0.02)


def test_wrong_pairs_are_wrong_as_often_as_asked():
    pairs = build_edit.draw_pairs(400, 0, build_edit.Faults(digit=0.7, colour=0.4))
    palette = torch.tensor(list(signs.COLOURS.values())) / 127.5 - 1
    shown = torch.cdist(pairs.results[:, :, :4].mean(dim=(2, 3)), palette).argmin(dim=1)
    assert 0.27 < (shown != pairs.wanted).float().mean() < 0.40  # 0.4 x 5/6
    differ = ((ink(pairs.sources) - ink(pairs.results)).abs() > 0.3).flatten(1).any(dim=1)
    # 1 - (1 - 0.7 x 9/10)^3, but for what would be a held-out text, 12 in 100.
    assert 0.79 < differ.float().mean() < 0.88


BUDGET = build_edit.Budget(clean_steps=1, noised_steps=1, pairs=64)


def test_a_seed_decides_every_weight():
    first = build_edit.train(3, BUDGET)
    torch.manual_seed(11)  # neither the global generators nor the thread setting may matter
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert digest(build_edit.train(3, BUDGET)) == digest(first)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert digest(build_edit.train(4, BUDGET)) != digest(first)
