"""Source images of prompt lines: found, looked at before a run, and a part of its digest."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from editing import FAMILY, add_family, write_image
from PIL import Image
from tiny_hub import COMMIT, REPO, tiny_hub
from tiny_runs import small_spec

from flowgrpo_ray.common.errors import PromptError
from flowgrpo_ray.common.sources import mask_of, mask_url, pictures, read_sources
from flowgrpo_ray.common.types import Edit, Source
from flowgrpo_ray.spec.families import FAMILIES
from flowgrpo_ray.spec.prompt_files import load_prompts
from flowgrpo_ray.spec.prompts import load_prompt_sets, prompts_digest
from flowgrpo_ray.spec.sources import with_sources

SIZE = (32, 48)


def load(folder: Path, *rows: dict[str, Any], allowed: range = range(1, 3)):
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return with_sources(load_prompts(str(file), "P"), str(file), "P", allowed, "family 'x'")


def test_paths_lead_from_the_folder_of_the_prompt_file(tmp_path: Path, monkeypatch):
    (tmp_path / "set" / "pictures").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    red = write_image(tmp_path / "set" / "pictures" / "red.png", (255, 0, 0))
    blue = write_image(tmp_path / "blue.png", (0, 0, 255))
    monkeypatch.chdir(tmp_path / "elsewhere")
    first, second = load(
        tmp_path / "set",
        {"prompt": "a", "image": "pictures/red.png", "n": 1},
        {"prompt": "b", "images": [str(blue)]},
    )
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (red, blue)]
    assert first.images == (Source(str(red), digests[0]),)
    assert second.images == (Source(str(blue), digests[1]),)
    assert first.metadata == {"image": "pictures/red.png", "n": 1}
    assert first.request(SIZE) == Edit("a", first.images, SIZE)
    assert (pictures(Edit("b", second.images, SIZE)) == (0, 0, 255)).all()


def test_what_a_digest_of_prompts_depends_on(tmp_path: Path):
    row = {"prompt": "a", "image": "x.png"}
    digests = []
    for colour in ((1, 2, 3), (3, 2, 1)):
        write_image(tmp_path / "x.png", colour)
        digests.append(prompts_digest(load(tmp_path, row)))
    assert digests[0] != digests[1]


BAD = [
    (
        [{"prompt": "a"}],
        r"prompt 1, keys .*: 0 source images; family 'x' takes 1 to 2 with each prompt",
    ),
    ([{"prompt": "a", "images": ["r.png"] * 3}], "prompt 1, keys .*: 3 source images"),
    (
        [{"prompt": "a", "image": "r.png", "images": ["r.png"]}],
        "prompt 1, keys .*: it has both keys",
    ),
    (
        [{"prompt": "a", "images": "r.png"}],
        "prompt 1, keys .*: \"image\" is the path of a file, .*'r.png'",
    ),
    ([{"prompt": "a", "image": 3}], r"a list of paths, not \[3\]"),
    (
        [{"prompt": "a", "image": "r.png"}, {"prompt": "b", "images": ["r.png"] * 2}],
        "P: some prompts name 1 source images and others 2",
    ),
    (
        [{"prompt": "a", "image": "r.png"}, {"prompt": "b", "image": "no.png"}],
        "P: prompt 2: its source image: .*No such file.*no.png",
    ),
    ([{"prompt": "a", "image": "p.jsonl"}], "prompt 1: its source image: .*p.jsonl' is no"),
    ([{"prompt": "a", "image": "cut.png"}], "prompt 1: its source image: .*cut.png' is no"),
    ([{"prompt": "a", "image": "r.gif"}], "prompt 1: its source image: .*r.gif' is no"),
    (
        [{"prompt": "a", "image": "r.png", "mask": [0, 0, 49, 2]}],
        'prompt 1, keys .*: "mask" is .* 48x32',
    ),
    (
        [{"prompt": "a", "image": "r.png", "mask": [0, 2, 3, 2]}],
        'prompt 1, keys .*: "mask" is',
    ),
    ([{"prompt": "a", "image": "r.png", "mask": {"x": 1}}], 'prompt 1, keys .*: "mask" is'),
    (
        [{"prompt": "a", "image": "r.png", "mask": "small.png"}],
        r"small.png' is 5x4 and the .*48x32",
    ),
    ([{"prompt": "a", "image": "r.png", "mask": "no.png"}], "prompt 1, keys .*: .*no.png"),
]


@pytest.mark.parametrize(("rows", "told"), BAD)
def test_a_line_whose_images_cannot_be_drawn_from_is_refused_by_name(rows, told, tmp_path: Path):
    red = write_image(tmp_path / "r.png", (255, 0, 0))
    write_image(tmp_path / "small.png", (255, 255, 255), (4, 5))
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])  # the header is all right
    Image.open(red).save(tmp_path / "r.gif")
    with pytest.raises(PromptError, match=told):
        load(tmp_path, *rows)


def test_a_mask_is_the_same_from_a_picture_and_from_a_box(tmp_path: Path):
    write_image(tmp_path / "r.png", (255, 0, 0))
    mask = np.zeros(SIZE, bool)
    mask[4:20, 10:30] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    box, file = load(
        tmp_path,
        {"prompt": "a", "image": "r.png", "mask": [10, 4, 30, 20]},
        {"prompt": "a", "image": "r.png", "mask": "mask.png"},
    )
    assert box.metadata["mask"] == file.metadata["mask"] == mask_url(mask)
    assert (mask_of(mask_url(mask), SIZE) == mask).all()
    square = mask_of(mask_url(mask), (32, 32))  # the middle 32 of 48 columns
    assert (square == mask[:, 8:40]).all()
    with pytest.raises(ValueError, match="a mask is text that begins with data:image/png"):
        mask_of("mask.png", SIZE)


def test_sources_are_scaled_until_they_cover_the_size_and_cut_to_their_middle(tmp_path: Path):
    wide = np.zeros((64, 200, 3), np.uint8)
    wide[:, 52:148] = 255  # what 48 of 100 columns, at half size, show
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (prompt,) = load(tmp_path, {"prompt": "a", "image": "wide.png"})
    (shown,) = pictures(Edit("a", prompt.images, SIZE))
    assert shown.shape == (*SIZE, 3)
    assert (shown[:, 3:-3] == 255).all()


def test_a_source_that_has_changed_since_is_refused(tmp_path: Path):
    write_image(tmp_path / "r.png", (255, 0, 0))
    (prompt,) = load(tmp_path, {"prompt": "a", "image": "r.png"})
    assert list(read_sources([prompt.request(SIZE), "text"])) == [prompt.images[0].digest]
    write_image(tmp_path / "r.png", (255, 0, 1))
    with pytest.raises(PromptError, match=r"r\.png' has changed since the prompts were read"):
        read_sources([prompt.request(SIZE)])
    (tmp_path / "r.png").unlink()
    with pytest.raises(PromptError, match=r"r\.png' is gone"):
        read_sources([prompt.request(SIZE)])


def test_all_prompts_of_a_run_name_as_many_and_only_an_editing_family_reads_them(
    tmp_path: Path, monkeypatch
):
    write_image(tmp_path / "r.png", (255, 0, 0))
    for name, images in (("t", ["r.png"]), ("e", ["r.png"] * 2)):
        row = {"prompt": 'red sign "1"', "images": images}
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    files = f"prompts={{train: {tmp_path}/t.jsonl, evaluate: {tmp_path}/e.jsonl}}"
    train, held_out = load_prompt_sets(small_spec(files))
    assert not any(prompt.images for prompt in (*train, *held_out))
    assert train[0].request(SIZE) == 'red sign "1"'
    rewards = "rewards={kept: {reward: rank, options: {reward: preservation}}}"
    with pytest.raises(PromptError, match=r"train: rewards\.kept compares with the source"):
        load_prompt_sets(small_spec(files, rewards))
    add_family(monkeypatch)
    with pytest.raises(PromptError, match="prompts: some prompts name 1 source images"):
        load_prompt_sets(small_spec(files, f"model.family={FAMILY}"))
    spec = small_spec(files.replace("e.jsonl", "t.jsonl"), f"model.family={FAMILY}")
    train, _ = load_prompt_sets(spec)
    assert [len(prompt.images) for prompt in train] == [1] * 4


OF_A_SET = """
import json, sys
from flowgrpo_ray.common.errors import PromptError
from flowgrpo_ray.spec.prompt_files import load_prompts
from flowgrpo_ray.spec.sources import with_sources
for path in sys.argv[1:]:
    try:
        prompts = with_sources(load_prompts(path, "P"), path, "P", range(1, 3), "family 'x'")
        rows = [[[image.digest for image in p.images], p.metadata.get("mask")] for p in prompts]
    except PromptError as error:
        rows = str(error)
    print(json.dumps(rows))
"""


def test_sources_of_a_set_on_the_hub_are_those_of_its_commit(tmp_path: Path):
    """Beside its prompt file, as on disk; fetched once; nothing from outside of the set."""
    (tmp_path / "data" / "train").mkdir(parents=True)
    files = [
        write_image(tmp_path / "data" / name, colour, SIZE)
        for name, colour in (("train/a.png", (1, 2, 3)), ("b.png", (3, 2, 1)))
    ]
    mask = np.zeros(SIZE, bool)
    mask[4:20, 10:30] = True
    Image.fromarray(mask).save(tmp_path / "data" / "mask.png")
    rows = [{"image": "a.png"}, {"image": "../b.png", "mask": "../mask.png"}]
    for name, of in {
        "p": rows,
        "absent": [{"image": "c.png"}],
        "out": [{"image": "../../b.png"}],
        "home": [{"image": "~/b.png"}],
        "root": [{"image": str(files[1])}],
    }.items():
        text = "".join(json.dumps({"prompt": "a", **row}) + "\n" for row in of)
        (tmp_path / "data" / "train" / f"{name}.jsonl").write_text(text)
    good = f"hf://datasets/{REPO}/train/p.jsonl"
    wrong = [good.replace("/p.", f"/{name}.") for name in ("absent", "out", "home", "root")]
    with tiny_hub(tmp_path / "data") as (address, asked):
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", OF_A_SET, good, good, *wrong],
            env=environment | {"HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
    first, again, absent, *out = map(json.loads, done.stdout.splitlines())
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert first == again == [[[digests[0]], None], [[digests[1]], mask_url(mask)]]
    of_images = [path for path in asked if path.endswith("b.png")]
    assert set(of_images) == {f"/datasets/{REPO}/resolve/{COMMIT}/b.png"}
    assert len(of_images) <= 2  # its head, its body
    assert "'train/c.png' cannot be fetched from the hub" in absent
    for text, name in zip(out, ("../../b.png", "~/b.png", str(files[1])), strict=True):
        assert text.endswith(f"{name!r} leads out of the data set on the hub")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_says_the_same_before_the_start_as_its_policy(family: str):
    from flowgrpo_ray.policies import policy_class

    assert FAMILIES[family].sources == policy_class(family).sources
