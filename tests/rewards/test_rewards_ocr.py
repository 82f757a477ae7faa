"""The OCR reward: its formula, the text that a prompt quotes, and both readers on drawn text."""

import functools
import json
import os
import random
import subprocess
from pathlib import Path

import matplotlib as mpl
import numpy as np
import onnxruntime
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from overlays import build_or_skip
from PIL import Image, ImageDraw, ImageFont

from flowgrpo_ray.common.errors import ModelError, RewardEnvironmentError, SpecError
from flowgrpo_ray.rewards import build, environments, paddle_reader
from flowgrpo_ray.rewards.golden import check_golden, golden_of, score_golden
from flowgrpo_ray.rewards.ocr import OcrReward, edit_distance, text_score
from flowgrpo_ray.rewards.ocr_text import letters_of, plain, quoted_target
from flowgrpo_ray.rewards.signs import render
from flowgrpo_ray.rewards.text_readers import reading_order

FONTS = Path(mpl.get_data_path()) / "fonts" / "ttf"


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


@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_edit_distance_against_its_recursion(a, b):
    @functools.cache
    def distance(i, j):
        if 0 in (i, j):
            return i + j
        if a[i - 1] == b[j - 1]:
            return distance(i - 1, j - 1)
        return 1 + min(distance(i - 1, j), distance(i, j - 1), distance(i - 1, j - 1))

    assert edit_distance(a, b) == distance(len(a), len(b))


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
        ('"Café ½ €" on a cup', "Café ½ €"),
        ('a shop named "出口 EXIT" in Tokyo', "出口 EXIT"),
        ('a note "it\'s \'fine\'" on a door', "it's 'fine'"),
        ('a sign "say “hi” twice" there', "say “hi” twice"),
        ("a stone “first” beside \"second\"", "first"),
        ('a 5" nail and a 6" one', " nail and a 6"),  # what an odd prompt gets: see `target`
        ("ein Schild „Bäckerei“ am Haus", "Bäckerei"),
        ("an Polish shop „Kwiaty”", "Kwiaty"),
        ("une affiche « Liberté »", " Liberté "),
        ("看板「出口」", "出口"),
        ("a book 『雪国』 and “other”", "雪国"),
        ("a sign ＂ＯＰＥＮ＂", "ＯＰＥＮ"),
    ],
)  # fmt: skip
def test_quoted_target(prompt, target):
    assert quoted_target(prompt) == target


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("cafe\u0301", "café", 1.0),  # an accent that follows its letter
        ("café", "cafe\u0301", 1.0),
        ("ＯＰＥＮ", "open", 1.0),
        ("open", "\u200bo\u00adpen\ufeff", 1.0),  # what nobody sees
        ("O2", "O₂", 0.5),  # another letter, as published scores have it
        ("Dont", "Don’t", 0.8),
    ],
)
def test_what_looks_the_same_is_the_same(read, target, score):
    assert text_score(read, target) == score


@pytest.mark.parametrize(
    ("read", "score"),
    [("open", 1.0), ("open 24", 0.5), ("reopened", 0.0), ("a page with open in it", 0.0)],
)
def test_text_beyond_the_target_costs_where_it_is_penalised(read, score):
    assert text_score(read, "open", whole=True) == score
    assert text_score(read, "open") == 1


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("Привет", "'П' (CYRILLIC CAPITAL LETTER PE)"),
        ("안녕", "HANGUL SYLLABLE"),
        ("مرحبا", "ARABIC LETTER"),
        ("שלום", "HEBREW LETTER"),
        ("สวัสดี", "THAI CHARACTER"),
        ("नमस्ते", "DEVANAGARI LETTER"),
        ("Room13⅓", "'⅓' (VULGAR FRACTION ONE THIRD)"),
    ],
)
def test_a_text_that_the_reader_has_no_letters_for_is_refused(target, named):
    """By the reader that is chosen, and unless it is to be kept."""
    with pytest.raises(ValueError, match="not even a perfect picture") as caught:
        OcrReward.check_prompt(f'a sign "{target}"', {})
    assert named in str(caught.value)
    with pytest.raises(ValueError, match="has no"):
        OcrReward.check_prompt("a sign", {"target": target})
    OcrReward.check_prompt(f'a sign "{target}"', {}, {"unreadable": "keep"})
    OcrReward.check_prompt(f'a sign "{target}"', {}, {"rec_model": "cyrillic_PP-OCRv5_mobile_rec"})


def test_letters_of_a_recognition_model_in_a_folder(tmp_path):
    letters = {"PostProcess": {"character_dict": list("привет")}}
    (tmp_path / "inference.yml").write_text(yaml.safe_dump(letters, allow_unicode=True))
    options = {"engine": "paddleocr", "rec_model": str(tmp_path)}
    OcrReward.check_prompt('a sign "ПРИВЕТ 1"', {}, options)
    with pytest.raises(ValueError, match="CYRILLIC SMALL LETTER ZHE"):
        OcrReward.check_prompt('a sign "жир"', {}, options)


def test_every_plain_letter_can_be_read():
    """They are not looked up."""
    assert {chr(code) for code in range(33, 127)} <= (letters_of(None) or set())


@pytest.mark.parametrize(
    "prompt",
    ['a 27" monitor showing "HELLO"', 'a 27" monitor showing “HELLO”', 'a sign "\u200b\u00ad"'],
)
def test_a_prompt_that_means_no_one_text_is_refused(prompt):
    with pytest.raises(ValueError, match="double quotes"):
        OcrReward.check_prompt(prompt, {})


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


@given(
    st.text(st.characters(exclude_characters='"“”„«「『＂', exclude_categories=["Cs"]), min_size=1),
    st.sampled_from(['"{}"', "“{}”"]),
)
def test_any_text_comes_back_from_between_quotes(text, quotes):
    prompt = f"A poster, {quotes.format(text)}, isn't it?"
    if plain(text):
        assert quoted_target(prompt) == text
    else:
        with pytest.raises(ValueError, match="is empty"):
            quoted_target(prompt)


def refused(prompt: str) -> bool:
    try:
        OcrReward.check_prompt(prompt, {})
    except ValueError:
        return True
    return False


@pytest.mark.skipif("FLOWGRPO_TEST_DATA" not in os.environ, reason="needs FLOWGRPO_TEST_DATA")
def test_targets_of_the_public_prompt_set():
    lines = Path(os.environ["FLOWGRPO_TEST_DATA"], "ocr_test.txt").read_text("utf-8").splitlines()
    assert len(lines) == 1018
    targets = [quoted_target(line) for line in lines]
    unread = [line for line in lines if refused(line)]
    assert [line.split('"')[1] for line in unread] == ["Room 13⅓"]
    assert targets == [line.split('"')[1] for line in lines]
    for target in targets:
        letters = target.lower().replace(" ", "")
        assert text_score(f"~{target.upper()} !", target) == 1
        assert text_score(letters[:-1], target) == 1 - 1 / len(letters)  # one is missing
        assert text_score("\0" + letters[1:], target) == 1 - 1 / len(letters)  # one is wrong
        assert text_score("", target) == 0


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


def drawn(text, font="DejaVuSans", size=36, angle=0, ink="black", ground="white"):
    """`text` in the middle of 512 x 512, turned counter-clockwise by `angle` degrees."""
    image = Image.new("RGB", (512, 512), ground)
    face = ImageFont.truetype(str(FONTS / f"{font}.ttf"), size)
    ImageDraw.Draw(image).text((256, 256), text, fill=ink, font=face, anchor="mm")
    return np.asarray(image.rotate(angle, resample=Image.Resampling.BICUBIC, fillcolor=ground))


OPEN = "Open 24 Hours"
LEGIBLE = {
    **{f"{size} pixels": drawn(OPEN, size=size) for size in (8, 12, 24, 48)},
    **{f"{angle} degrees": drawn(OPEN, angle=angle) for angle in (-30, -10, 5, 20)},
    **{
        font: drawn(OPEN, font)
        for font in ("DejaVuSans-Bold", "DejaVuSerif-Italic", "DejaVuSansMono", "STIXGeneral")
    },
    "white on black": drawn(OPEN, ink="white", ground="black"),
    "pale": drawn(OPEN, ink=(140, 140, 140), ground=(128, 128, 128)),
}


@pytest.mark.parametrize("kind", LEGIBLE)
def test_legible_text_scores_one(detecting, kind):
    """Measured: everything from 8 to 60 pixels, from -45 to 45 degrees, in ten fonts."""
    image = LEGIBLE[kind][None]
    assert detecting(image, [f'"{OPEN}"'], [{}]) == [1]
    assert detecting(image, ['"Zebra"'], [{}]) == [0]


@pytest.mark.parametrize("angle", [90, 180])
def test_text_on_its_side_or_head_is_not_legible(detecting, angle):
    """The angle classifier is off on purpose: a person would not accept that sign either."""
    assert detecting(drawn(OPEN, angle=angle)[None], [f'"{OPEN}"'], [{}]) < 0.7


@pytest.mark.parametrize("detect", [True, False])
def test_golden_pictures_rank_as_they_should(detecting, signs, detect):
    reward = detecting if detect else signs
    rankings = golden_of(reward)
    scores = score_golden(reward, rankings)
    assert scores.tolist() == [1, 0]
    check_golden(rankings, scores)


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


# --- PaddleOCR, in the environment that `flowgrpo-ray rewards env build paddleocr` makes

PROGRAM = """
import json, sys
import numpy as np
from flowgrpo_ray.rewards import build
from flowgrpo_ray.rewards.golden import check_golden, golden_of, score_golden
images, found = np.load(sys.argv[1]), {}
for kind, options in json.loads(sys.argv[2]).items():
    reward = build("ocr", {"engine": "paddleocr", **options})
    check_golden(golden_of(reward), score_golden(reward, golden_of(reward)))
    found[kind] = reward._reader.read(images[kind])
import cv2
found["versions"] = [np.__version__, cv2.__version__]
print(json.dumps(found))
"""
RNG = random.Random(3)
NUMBERS = [f"{RNG.randrange(1000):03d}" for _ in range(9)]
IMAGES = {
    "pages": np.stack(
        [*LEGIBLE.values(), drawn("Jazz & Coffee"), np.full((512, 512, 3), 200, np.uint8)]
    ),
    "lines": _picture("Hello", "World 24")[None],
    "signs": np.stack([render(text, "green", RNG) for text in NUMBERS]),
}
TEXTS = {
    "pages": [OPEN] * len(LEGIBLE) + ["Jazz & Coffee", ""],
    "lines": ["Hello World 24"],
    "signs": NUMBERS,
}


def read_by_paddle(folder, *kinds):
    """What PaddleOCR reads in `IMAGES`, by kind, in a process of its own."""
    build_or_skip("paddleocr")
    models = (paddle_reader._detector(str(folder)), paddle_reader._recogniser(str(folder), 320))
    options = {
        "pages": {"threads": 2},
        "lines": {"det_model": models[0].folder, "rec_model": models[1].folder},
        "signs": {"detect": False, "batch": 4},
    }
    np.savez(folder / "images.npz", **IMAGES)
    asked = json.dumps({kind: options[kind] for kind in kinds})
    run = subprocess.run(
        [environments.python_of("paddleocr"), "-c", PROGRAM, folder / "images.npz", asked],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def paddle_reads(tmp_path_factory):
    return read_by_paddle(tmp_path_factory.mktemp("paddle"), "lines", "signs")


def reads_the_same(kind, read, reader):
    """What is drawn, up to white space, as the reward compares."""

    def plain(texts):
        return [text.lower().replace(" ", "") for text in texts]

    assert plain(read) == plain(TEXTS[kind])
    assert plain(read) == plain(reader._reader.read(IMAGES[kind]))


def test_paddleocr_reads_signs_as_rapidocr_does(paddle_reads, signs):
    reads_the_same("signs", paddle_reads["signs"], signs)


def test_paddleocr_reads_lines_by_models_from_folders_of_our_own(paddle_reads, detecting):
    reads_the_same("lines", paddle_reads["lines"], detecting)


@pytest.mark.slow
def test_paddleocr_reads_pages_as_rapidocr_does(tmp_path, detecting):
    reads_the_same("pages", read_by_paddle(tmp_path, "pages")["pages"], detecting)


def test_paddleocr_ran_beside_another_numpy_and_opencv(paddle_reads):
    numpy, opencv = paddle_reads["versions"]
    assert numpy != np.__version__
    assert opencv.startswith("4.10.")


def test_characters_survive_their_file(tmp_path):
    model = paddle_reader._recogniser(str(tmp_path), 320)
    config = yaml.safe_load(Path(model.folder, "inference.yml").read_text("utf-8"))
    session = onnxruntime.InferenceSession(Path(model.folder, "inference.onnx"))
    (classes,) = [output.shape[-1] for output in session.get_outputs()]
    characters = config["PostProcess"]["character_dict"]
    assert len(characters) == len(set(characters)) == classes - 2  # a blank and a space
    assert config["PreProcess"]["transform_ops"][1] == {
        "RecResizeImg": {"image_shape": [3, 48, 320]}
    }


def test_without_paddleocr_the_environment_is_named():
    with pytest.raises(
        RewardEnvironmentError, match=r"env build paddleocr.*environment: paddleocr"
    ):
        build("ocr", {"engine": "paddleocr"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tesseract"}, "engine: .*'rapidocr' or 'paddleocr', not 'tesseract'"),
        ({"det_model": "x"}, "det_model and rec_model are for engine: paddleocr"),
        ({"rec_model": "x"}, "det_model and rec_model are for engine: paddleocr"),
        (
            {"engine": "paddleocr", "rec_model": "x", "rec_width": 96},
            "rec_width is for the default",
        ),
        ({"engine": "paddleocr", "det_model": "x", "detect": False}, "det_model finds lines"),
        ({"threads": 0}, "threads: .*greater than or equal to 1, not 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        build("ocr", options)


def test_a_model_is_a_folder_or_a_name(tmp_path):
    assert paddle_reader._named("rec_model", "PP-OCRv6_medium_rec") == paddle_reader.Model(
        "PP-OCRv6_medium_rec"
    )
    with pytest.raises(ModelError, match=r"rec_model = './nowhere': .* nowhere/inference.yml"):
        paddle_reader._named("rec_model", "./nowhere")
    (tmp_path / "inference.yml").write_text("Global: {model_name: mine}")
    with pytest.raises(ModelError, match=r"inference\.onnx"):
        paddle_reader._named("rec_model", str(tmp_path))
    (tmp_path / "inference.onnx").touch()
    assert paddle_reader._named("rec_model", str(tmp_path)) == paddle_reader.Model(
        "mine", str(tmp_path)
    )
