"""Scores of image files without a run: the command, its table, and every mistake before a model."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowgrpo_ray.common.images import ImageError, decode_rgb
from flowgrpo_ray.rewards.ocr import OcrReward
from flowgrpo_ray.rewards.preservation import PreservationReward
from flowgrpo_ray.rewards.sign_colour import SignColourReward
from flowgrpo_ray.rewards.signs import render, render_plain
from flowgrpo_ray.run.scoring import find_images, plan_batches

PROBE = "reward_samples:Probe"  # mean brightness, or what the metadata ask for
DARKNESS = "reward_samples:Darkness"
OWN = "own_rewards:Own"  # its option `level`, infinite for bright images; leaves a file when built


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch, command_line: Any, tmp_path: Path):
    """``score("images", "prompts.txt", ...) -> (status, stdout, stderr)``, in a folder of its own.

    It holds ``grey/``, pictures of brightness 0, 51, 102 of 255, and a prompt file for them.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    Path("own_rewards.py").write_text(
        "import numpy as np\n"
        "from pathlib import Path\n"
        "class Own:\n"
        "    def __init__(self, level=1.0):\n"
        "        Path('built').touch()\n"
        "        self.level = level\n"
        "    def __call__(self, images, prompts, metadata):\n"
        "        assert not images.flags.writeable\n"
        "        bright = images.mean(axis=(1, 2, 3)) > 100\n"
        "        return np.where(bright, np.inf, self.level).astype(np.float32)\n"
    )
    for name, value in (("COLUMNS", "100"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    for i in range(3):
        save(f"grey/{i}.png", np.full((4, 6, 3), 51 * i, np.uint8))
    Path("three.txt").write_text("a\nb\nc\n")

    def call(*arguments: str) -> tuple[int, str, str]:
        status, out, err = command_line("rewards", "score", *arguments)
        return status, out, " ".join(re.sub("[│╭╮╰╯─]", " ", err).split())

    return call


def save(path: str, image: np.ndarray, **options: object) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Image.fromarray(image).save(path, **options)


def lines(path: str, *rows: object) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def csv_of(path: str) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_scores_are_those_of_the_classes(score):
    """Signs of two sizes in three formats; of some the text or the colour is another."""
    names = ["a1.png", "a2.jpg", "a9.webp", "a10.PNG", "a11.png"]
    signs = [("407", "red"), ("255", "blue"), ("318", "white"), ("902", "pink"), ("119", "green")]
    prompts = [f'{colour} sign "{text}"' for text, colour in signs]
    prompts[1], prompts[3] = 'blue sign "256"', 'white sign "902"'
    rng = random.Random(0)
    for i in (3, 0, 4, 1, 2):
        text, colour = signs[i]
        big = render_plain(text, colour, (64, 96))
        save(f"signs/{names[i]}", big if i % 2 else render(text, colour, rng))
    Path("signs/notes.txt").write_text("not an image")
    Path("signs/._a1.png").write_text("what macOS leaves behind")
    Path("signs/more.png").mkdir()
    Path("prompts.txt").write_text("\n".join(prompts), "utf-8")

    ocr, colour = OcrReward(detect=False), SignColourReward()
    expected = []
    for name, prompt in zip(names, prompts, strict=True):
        image = np.asarray(Image.open(f"signs/{name}").convert("RGB"))[None]
        read, shade = (float(r(image, [prompt], [{}])[0]) for r in (ocr, colour))
        total = float(np.float32(2 * read - 0.5 * shade))
        expected.append({"file": name, "prompt": prompt, "ocr": read, "sign_colour": shade})
        expected[-1]["total"] = total
    assert {round(row["ocr"], 3) for row in expected} == {0.667, 1}, "the reader sees the other 6"

    common = ["signs", "prompts.txt", "--reward", "ocr=2", "--reward", "sign_colour=-.5"]
    common += ["--option", "ocr.detect=false", "--batch", "2"]
    status, out, _ = score(*common)
    assert status == 0
    assert out.splitlines()[-1] == "scores of 5 images in scores.csv"
    assert csv_of("scores.csv") == [{k: str(v) for k, v in row.items()} for row in expected]
    assert score(*common, "--out", "scores.jsonl")[0] == 0
    rows = [json.loads(line) for line in Path("scores.jsonl").read_text("utf-8").splitlines()]
    assert rows == expected
    assert list(rows[0]) == ["file", "prompt", "ocr", "sign_colour", "total"]


def test_no_score_is_an_empty_cell_and_null_and_no_zero(score):
    """By hand: brightness 0, 0.2, 0.4, of which the middle one has no score; a watched one too."""
    rows = ({"prompt": 'say "a", b'}, {"prompt": "café\u2028", "nan": 1}, {"prompt": "c"})
    arguments = ["grey", lines("p.jsonl", *rows), "--reward", f"{PROBE}=0.5"]
    arguments += ["--reward", f"{DARKNESS}=1", "--out"]
    status, out, _ = score(*arguments, "s.jsonl")
    assert status == 0
    probe, dark = (0.0, None, float(np.float32(0.4))), [float(np.float32(x)) for x in (1, 0.8, 0.6)]
    total = (1.0, None, float(np.float32(0.8)))
    expected = [
        {"file": f"{i}.png", "prompt": rows[i]["prompt"], PROBE: a, DARKNESS: b, "total": c}
        for i, (a, b, c) in enumerate(zip(probe, dark, total, strict=True))
    ]
    found = [json.loads(line) for line in Path("s.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert found == expected
    assert "café" in Path("s.jsonl").read_text("utf-8")
    shown = [re.findall(r"[\w.:-]+", line) for line in out.splitlines()]
    assert [PROBE, "0.5", "0.2", "0.2", "1"] in shown
    assert [DARKNESS, "1", "0.8", "0.1633", "0"] in shown
    assert ["total", "0.9", "0.1", "1"] in shown

    assert score(*arguments, "s.csv")[0] == 0
    cells = csv_of("s.csv")
    assert cells == [{k: "" if v is None else str(v) for k, v in r.items()} for r in expected]
    # Watched only, the missing score leaves the total alone.
    watched = [f"{PROBE}=0" if a == f"{PROBE}=0.5" else a for a in arguments]
    assert score(*watched, "w.csv")[0] == 0
    assert [row["total"] for row in csv_of("w.csv")] == [str(x) for x in dark]
    # No score at all: no mean to show.
    _, out, _ = score("grey", lines("n.jsonl", rows[1]), "--reward", PROBE, "--out", "n.csv")
    assert [PROBE, "1", "-", "-", "3"] in [re.findall(r"[\w.:-]+", x) for x in out.splitlines()]


def test_an_option_reaches_its_reward_and_infinity_is_no_score(score):
    arguments = ["--reward", OWN, "--reward", DARKNESS, "--option", f"{OWN}.level=1e-3"]
    status, out, _ = score("grey", "three.txt", *arguments)
    assert status == 0
    assert [row[OWN] for row in csv_of("scores.csv")] == [str(float(np.float32(1e-3)))] * 2 + [""]
    assert [row["total"] == "" for row in csv_of("scores.csv")] == [False, False, True]
    assert [OWN, "1", "0.001", "0", "1"] in [re.findall(r"[\w.:-]+", x) for x in out.splitlines()]


def test_one_prompt_for_all_and_one_file(score):
    Path("one.txt").write_text("\n\na\n")
    assert score("grey", "one.txt", "--reward", PROBE)[0] == 0
    assert [row["prompt"] for row in csv_of("scores.csv")] == ["a"] * 3
    assert score("grey/1.png", "one.txt", "--reward", PROBE, "--overwrite")[0] == 0
    (row,) = csv_of("scores.csv")
    assert (row["file"], row["total"]) == ("1.png", str(float(np.float32(0.2))))


def test_batches_are_of_one_size(score):
    for i in (3, 4):
        save(f"grey/{i}.png", np.zeros((6, 4, 3), np.uint8))
    save("grey/5.png", np.zeros((4, 6, 3), np.uint8))
    files = find_images(Path("grey"))
    assert plan_batches(files, 3) == [[0, 1, 2], [5], [3, 4]]
    row = {"prompt": "p", "batch size": 1}
    assert score("grey", lines("p.jsonl", row), "--reward", PROBE, "--batch", "3")[0] == 0
    assert [row["total"] for row in csv_of("scores.csv")] == ["3.0"] * 3 + ["2.0"] * 2 + ["1.0"]


def test_files_are_in_the_order_that_people_count(tmp_path: Path):
    names = ["0.jpeg", "2 a.png", "10.png", "b1.png", "B2.webp", "b10.jpg", "b10c2.png", "bb.png"]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [file.name for file in find_images(tmp_path)] == names


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"fail": 1}, "RuntimeError: the probe was asked to fail"),
        ({"short": 1}, r"TypeError: it must return float32 [2], not float32 [1]"),
        ({"double": 1}, r"TypeError: it must return float32 [2], not float64 [2]"),
    ],
)
def test_a_reward_that_fails_leaves_no_table(score, asked: dict[str, int], message: str):
    Path("scores.csv").write_text("of before")
    rows = [{"prompt": "a", **(asked if i == 1 else {})} for i in range(3)]
    arguments = ["grey", lines("p.jsonl", *rows), "--reward", DARKNESS, "--reward", PROBE]
    before = sorted(Path().iterdir())
    status, out, err = score(*arguments, "--batch", "2", "--overwrite")
    assert (status, out) == (2, "")
    assert f"reward '{PROBE}' failed on 2 images, '0.png' to '1.png': {message}" in err
    assert Path("scores.csv").read_text() == "of before"
    assert sorted(Path().iterdir()) == before


@pytest.fixture
def broken(score):
    """Broken inputs of every kind."""
    Path("two.txt").write_text("a\nb\n")
    Path("four.txt").write_text("a\nb\nc\nfour\n")
    Path("broken.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    Path("empty").mkdir()
    save("torn/0.png", np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    whole = Path("torn/0.png").read_bytes()
    Path("torn/1.png").write_bytes(whole[: len(whole) // 2])
    save("deep/0.png", np.zeros((4, 6), np.uint16))
    Path("liar").mkdir()
    Path("liar/0.png").write_text("no image")
    save("gif/0.gif", np.zeros((4, 6, 3), np.uint8))
    Path("gif/0.gif").rename("gif/0.png")
    Path("there.csv").touch()
    Path("folder.csv").mkdir()
    return score


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no"], "IMAGES = 'no': there is no such folder or file"),
        (["empty"], "IMAGES = 'empty': the folder holds no .png, .jpg, .jpeg, .webp files"),
        (["torn", "two.txt"], "'torn/1.png' is not a readable PNG, JPEG, WEBP file"),
        (["grey", "three.txt", "--background", "whitish"], "--background 'whitish' is no colour"),
        (["liar", "one.txt"], "'liar/0.png' is not a readable PNG, JPEG, WEBP file"),
        (["gif", "one.txt"], "'gif/0.png' is not a readable PNG, JPEG, WEBP file"),
        (["grey", "two.txt"], "3 files, but PROMPTS 2 prompts: '2.png' has no prompt. Give one"),
        (["grey", "four.txt"], "3 files, but PROMPTS 4 prompts: the prompt 'four' has no image"),
        (["grey", "no.txt"], "PROMPTS = 'no.txt': there is no such file"),
        (["grey", "empty.txt"], "PROMPTS = 'empty.txt': the file holds no prompts"),
        (["grey", "broken.jsonl"], "'broken.jsonl': line 2 holds no prompt: expected a JSON"),
        (["grey", "three.txt", "--reward", "ocr"], "PROMPTS: prompt 1, for the reward 'ocr': no"),
        (["grey", "three.txt", "--reward", "orc=1"], "did you mean 'ocr'?"),
        (["grey", "three.txt", "--reward", "ocr=much"], "the weight is 'much', not a number"),
        (["grey", "three.txt", "--reward", "ocr=nan"], "write it as ocr=0.5"),
        (["grey", "three.txt", "--reward", "ocr="], "the weight is '', not a number"),
        (["grey", "three.txt", "--reward", f"{OWN}=2"], f"{OWN!r} is there twice"),
        (["grey", "three.txt", "--reward", "nowhere:X"], "cannot import 'nowhere'"),
        (["grey", "three.txt", "--option", "size=2"], "'' is no --reward of this command; write"),
        (["grey", "three.txt", "--option", "ocr.detect=0"], "'ocr' is no --reward"),
        (["grey", "three.txt", "--option", f"{OWN}.lebel=2"], "did you mean 'level'?"),
        (["grey", "three.txt", "--option", f"{OWN}.level"], "for example --option ocr.detect="),
        (["grey", "three.txt", "--out", "s.txt"], "--out s.txt: the name must end in .csv or"),
        (["grey", "three.txt", "--out", "there.csv"], "--out there.csv exists; give another"),
        (["grey", "three.txt", "--out", "folder.csv", "--overwrite"], "--out folder.csv exists"),
        (["grey", "three.txt", "--out", "new/s.csv"], "no folder 'new' that can be written to"),
        (["grey", "three.txt", "--batch", "0"], "--batch"),
    ],
)
def test_a_mistake_ends_before_a_reward_is_built(broken, arguments: list[str], message: str):
    Path("one.txt").write_text("a\n")
    Path("empty.txt").write_text("\n")
    images, prompts, *rest = [*arguments, "three.txt"] if len(arguments) == 1 else arguments
    before = sorted(Path().rglob("*"))
    status, out, err = broken(images, prompts, "--reward", f"{OWN}=1", *rest)
    assert status == 2
    assert message in err
    assert out == ""
    assert {p for p in Path().rglob("*") if "__pycache__" not in p.parts} == set(before)


def test_a_total_of_watched_rewards_alone_is_refused(score):
    status, _, err = score("grey", "three.txt", "--reward", f"{PROBE}=0", "--reward", "ocr=0")
    assert status == 2
    assert f"every weight is 0 ({PROBE}, ocr): there would be no total" in err
    status, _, err = score("grey", "three.txt")
    assert status == 2
    assert "--reward" in err


def file_of(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def turned() -> bytes:
    """Blue left of red as it lies in the file, to be turned by a quarter to the right."""
    image = Image.new("RGB", (2, 1), "blue")
    image.putpixel((1, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(image, exif=exif)


def clear_palette() -> bytes:
    image = Image.new("P", (1, 2), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 1), 1)
    return file_of(image, transparency=1)


def deep(*values: int) -> bytes:
    return file_of(Image.fromarray(np.array([values], np.uint16)))


SEEN = {  # what a viewer shows on white, pixel by pixel
    "opaque": (file_of(Image.new("RGBA", (1, 1), (9, 8, 7, 255))), [(9, 8, 7)]),
    "half transparent": (file_of(Image.new("RGBA", (1, 1), (255, 0, 0, 128))), [(255, 127, 127)]),
    "transparent": (file_of(Image.new("RGBA", (1, 1), (0, 0, 0, 0))), [(255, 255, 255)]),
    "transparent grey": (file_of(Image.new("LA", (1, 1), (0, 0))), [(255, 255, 255)]),
    "a grey that is clear": (file_of(Image.new("L", (1, 1), 7), transparency=7), [(255,) * 3]),
    "palette": (clear_palette(), [(10, 20, 30), (255, 255, 255)]),
    "grey": (file_of(Image.new("L", (1, 1), 77)), [(77, 77, 77)]),
    "16 bits": (deep(0, 257, 32768, 65535), [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]),
    "turned": (turned(), [(0, 0, 255), (255, 0, 0)]),
    "CMYK": (file_of(Image.new("CMYK", (1, 1), (0, 0, 0, 255)), "JPEG"), [(0, 0, 0)]),
}


@pytest.mark.parametrize("name", SEEN)
def test_images_are_scored_as_a_viewer_shows_them(name: str):
    data, pixels = SEEN[name]
    found = decode_rgb(data, "x")
    assert found.dtype == np.uint8
    assert [tuple(pixel) for pixel in found.reshape(-1, 3).tolist()] == pixels
    if name == "turned":
        assert found.shape == (2, 1, 3)


def test_what_is_transparent_shows_the_background():
    data, _ = SEEN["half transparent"]
    assert decode_rgb(data, "x", background="black").tolist() == [[[128, 0, 0]]]
    assert decode_rgb(data, "x", background="#0000ff").tolist() == [[[128, 0, 127]]]


def test_an_image_of_floats_is_refused():
    data = file_of(Image.new("F", (1, 1)), "TIFF")
    with pytest.raises(ImageError, match="not a readable"):
        decode_rgb(data, "x")


def test_an_image_that_is_too_large_is_told_from_one_that_is_none(monkeypatch):
    file = io.BytesIO()
    Image.new("L", (6, 4), 7).save(file, "PNG")
    np.testing.assert_array_equal(decode_rgb(file.getvalue(), "x", 24), np.full((4, 6, 3), 7))
    with pytest.raises(ImageError, match=r"^x is 6x4; at most 23 pixels$") as large:
        decode_rgb(file.getvalue(), "x", 23)
    assert large.value.too_large
    with pytest.raises(ImageError, match=r"^x is not a readable PNG") as broken:
        decode_rgb(file.getvalue()[:50], "x", 24)
    assert not broken.value.too_large
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)  # Pillow refuses twice that
    with pytest.raises(ImageError, match=r"^x: .*24 pixels") as bomb:
        decode_rgb(file.getvalue(), "x")
    assert bomb.value.too_large


def test_an_edit_is_scored_beside_its_source(score):
    """One with a mask on what has changed."""
    rng = np.random.default_rng(0)
    sources = rng.integers(0, 256, (2, 12, 16, 3), np.uint8)
    changed = sources.copy()
    changed[:, :, 8:] = rng.integers(0, 256, (2, 12, 8, 3), np.uint8)
    for i in range(2):
        save(f"edits/{i}.png", changed[i])
        save(f"sources/{i}.png", sources[i])
    box = [8, 0, 16, 12]
    rows = [{"prompt": "x", "image": f"sources/{i}.png"} for i in range(2)]
    lines("p.jsonl", rows[0], {**rows[1], "mask": box})
    assert score("edits", "p.jsonl", "--reward", "preservation")[0] == 0
    first, second = csv_of("scores.csv")
    by_class = PreservationReward()(changed[:1], ["x"], [{}], sources[:1, None])
    assert float(first["preservation"]) == float(by_class[0]) < 0.9
    assert float(second["preservation"]) == 1.0

    lines("q.jsonl", {"prompt": "x"})
    status, _, err = score("edits", "q.jsonl", "--reward", "preservation", "--overwrite")
    assert status == 2
    assert "PROMPTS: the reward 'preservation' compares with the source image of each" in err
