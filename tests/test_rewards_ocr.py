import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from flowgrpo_ray.rewards.ocr import (
    OcrReward,
    edit_distance,
    quoted_target,
    reading_order,
    text_score,
)
from flowgrpo_ray.signs import render


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("abc", "abc", 0),
        ("flaw", "lawn", 2),
        ("ab", "ba", 2),
    ],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == distance


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("Spring Collection", "spring collection", 1.0),
        ("SPRING\nCollection", "Spring Collection", 1.0),
        ("shop OPEN now", "open", 1.0),  # containment
        ("opan", "open", 0.75),
        ("pen", "open", 0.75),
        ("", "open", 0.0),
        ("a completely different long line", "xyz", 0.0),  # capped
        ("Dont", "Don’t", 0.8),
    ],
)
def test_score_of_a_text_by_hand(read, target, score):
    assert text_score(read, target) == score


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('a sign that reads "Open 24 Hours", at night', "Open 24 Hours"),
        ("a sign that reads “Open”", "Open"),
        ("a sign “say "
         '"hi"” there', 'say "hi"'),
        ('"first" and "second"', "first"),
        ('the label "Honk If You’re Holographic"', "Honk If You’re Holographic"),
        ("it's \"O₂ LOW\", isn't it", "O₂ LOW"),
    ],
)  # fmt: skip
def test_quoted_target(prompt, target):
    assert quoted_target(prompt) == target


@pytest.mark.parametrize("prompt", ["a sign", 'a 5" nail', 'a sign "  "', "a sign 'open'", ""])
def test_prompt_without_target_is_refused_by_name(prompt):
    with pytest.raises(ValueError, match="double quotes") as caught:
        OcrReward.check_prompt(prompt, {})
    assert repr(prompt) in str(caught.value)


def test_metadata_target_overrides():
    OcrReward.check_prompt("a sign", {"target": "open"})
    for bad in ("", " ", 7, None):
        with pytest.raises(ValueError, match="metadata 'target'"):
            OcrReward.check_prompt('a sign "open"', {"target": bad})


@pytest.mark.skipif("FLOWGRPO_TEST_DATA" not in os.environ, reason="needs FLOWGRPO_TEST_DATA")
def test_targets_of_the_public_prompt_set():
    lines = Path(os.environ["FLOWGRPO_TEST_DATA"], "ocr_test.txt").read_text("utf-8").splitlines()
    assert len(lines) == 1018
    assert [quoted_target(line) for line in lines] == [line.split('"')[1] for line in lines]


def test_reading_order_of_tilted_lines():
    # "a b" slopes down, "c" stands below, "d" far below; given in another order
    left_top = {"b": (50, 6), "d": (0, 60), "a": (0, 0), "c": (5, 22)}
    boxes = np.array(
        [[(x, y), (x + 40, y), (x + 40, y + 16), (x, y + 16)] for x, y in left_top.values()]
    )
    assert [list(left_top)[i] for i in reading_order(boxes)] == ["a", "b", "c", "d"]


def _picture(*lines, size=(256, 256), colour="white"):
    image = Image.new("RGB", size, colour)
    font = ImageFont.load_default(size=36)
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((20, 20 + 60 * i), line, fill="black", font=font)
    return np.asarray(image)


@pytest.fixture(scope="module")
def detecting():
    return OcrReward()


@pytest.fixture(scope="module")
def signs():
    return OcrReward(detect=False)


def test_reads_lines_in_order_and_scores_their_distance(detecting):
    images = np.stack([_picture("Hello", "World 24"), _picture("Hallo")])
    scores = detecting(images, ['says "hello world 24"', 'says "Hello"'], [{}, {}])
    assert scores.dtype == np.float32
    assert scores.tolist() == pytest.approx([1, 0.8])


def test_blank_image_scores_zero(detecting, signs):
    blank = np.full((1, 128, 128, 3), 200, dtype=np.uint8)
    assert detecting(blank, ['"open"'], [{}]).tolist() == [0]
    assert signs(blank[:, :32, :48], ['"407"'], [{}]).tolist() == [0]


def test_signs_are_read_without_detection_in_their_order(signs):
    rng = random.Random(1)
    texts = [f"{rng.randrange(1000):03d}" for _ in range(19)]  # not a multiple of the batch
    images = np.stack([render(text, "yellow", rng) for text in texts])
    right = signs(images, [f'"{text}"' for text in texts], [{}] * 19)
    assert right.mean() > 0.98
    wrong = signs(images, [f'"{text}"' for text in [*texts[1:], texts[0]]], [{}] * 19)
    assert wrong.mean() < 0.6


def test_threads_give_the_same_scores_in_the_same_order(signs):
    rng = random.Random(2)
    texts = [f"{rng.randrange(1000):03d}" for _ in range(5)]
    images = np.stack([render(text, "pink", rng) for text in texts])
    prompts = ['"123"' for _ in texts]
    two = OcrReward(detect=False, threads=2)
    np.testing.assert_array_equal(two(images, prompts, [{}] * 5), signs(images, prompts, [{}] * 5))
    assert two(images[:1], prompts[:1], [{}]).shape == (1,)  # fewer images than threads
    assert two(images[:0], [], []).shape == (0,)


def test_channels_are_red_green_blue(signs, monkeypatch):
    seen = []
    engine = signs._reader._engines[0]
    monkeypatch.setattr(
        engine, "text_rec", lambda asked: seen.append(asked.img) or type("R", (), {"txts": ["x"]})
    )
    signs(np.full((1, 8, 8, 3), (1, 2, 3), dtype=np.uint8), ['"x"'], [{}])
    assert seen[0][0][0, 0].tolist() == [3, 2, 1]  # the engine wants blue first


def test_engine_failure_is_an_error_and_never_a_score(signs, monkeypatch):
    def fail(asked):
        raise RuntimeError("session lost")

    monkeypatch.setattr(signs._reader._engines[0], "text_rec", fail)
    with pytest.raises(RuntimeError, match="session lost"):
        signs(np.zeros((2, 32, 48, 3), np.uint8), ['"1"', '"2"'], [{}, {}])
