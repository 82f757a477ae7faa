"""Keys of prompt lines that nobody reads, and that nearly name one that is read, are told."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from editing import FAMILY, add_family, write_image
from tiny_runs import small_spec

from flowgrpo_ray.common.errors import PromptError
from flowgrpo_ray.rewards import BUILTIN, keys_read
from flowgrpo_ray.spec.prompts import load_prompt_sets, prompts_for

ENTRY = {"class": "cat", "count": 1}
GENEVAL: dict[str, Any] = {"tag": "single_object", "include": [ENTRY]}
JUDGE = (
    "{reward: vlm_judge, options: {question: 'Is {prompt} {style}?', url: 'http://h', model: m}}"
)
OWN = "reward_samples:Probe"


def lines(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "p.jsonl"
    file.write_text("\n\n".join(json.dumps({"prompt": 'red sign "407"', **row}) for row in rows))
    return str(file)


def told(file: str, rewards: str, *more: str) -> str | None:
    """What is said of the file before a run, after where it stands."""
    try:
        prompts_for(small_spec(f"rewards={rewards}", *more), file, "prompts.train")
    except PromptError as error:
        return str(error).removeprefix(f"prompts.train = {file!r}: ")
    return None


NEAR = [
    ("{ocr: {}}", "targt", "target", "rewards.ocr"),
    ("{ocr: {}}", "Target", "target", "rewards.ocr"),
    ("{ocr: {}}", "target_text", "target", "rewards.ocr"),
    ("{g: {reward: geneval}}", "excludes", "exclude", "rewards.g"),
    ("{g: {reward: geneval}}", "tags", "tag", "rewards.g"),
    ("{r: {reward: rank, options: {reward: ocr}}}", "targets", "target", "rewards.r"),
    ("{ocr: {}, kept: {reward: preservation}}", "masks", "mask", "rewards.kept"),
    (f"{{j: {JUDGE}}}", "styles", "style", "rewards.j"),
]
FAR = [
    ("{ocr: {}}", "text"),
    ("{ocr: {}}", "tag"),
    ("{ocr: {}}", "image"),
    ("{ocr: {}}", "img"),
    ("{kept: {reward: preservation}}", "task"),
    ("{jpeg_compressibility: {}}", "targt"),
    (f"{{ocr: {{}}, own: {{reward: '{OWN}'}}}}", "targt"),
    ("{ocr: {}, far: {reward: http, options: {url: 'http://h'}}}", "targt"),
]


@pytest.mark.parametrize(("rewards", "name", "meant", "who"), NEAR)
def test_a_key_that_is_nearly_one_that_a_reward_reads_is_told(
    rewards: str, name: str, meant: str, who: str, tmp_path: Path
) -> None:
    file = lines(tmp_path, {}, {name: "a"})
    assert told(file, rewards) == (
        f"line 3 has a key {name!r} that nobody reads: did you mean {meant!r}, which {who} reads? "
        "Rename it, or leave it out"
    )
    assert told(lines(tmp_path, {}, {name: "a", meant: "b"}), rewards) is None, "it is there"


@pytest.mark.parametrize(("rewards", "name"), FAR)
def test_other_keys_are_the_users_own(rewards: str, name: str, tmp_path: Path) -> None:
    assert told(lines(tmp_path, {name: "a"}), rewards) is None


@pytest.mark.parametrize("name", ["img", "imags", "input_image", "Image"])
def test_a_model_that_changes_images_would_have_read_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever else may read any key: without its images the model would draw from text alone."""
    add_family(monkeypatch)
    write_image(tmp_path / "r.png", (255, 0, 0))
    of = f"{{own: {{reward: '{OWN}'}}}}", f"model.family={FAMILY}"
    said = told(lines(tmp_path, {"image": "r.png"}, {name: "r.png"}), *of)
    meant = "images" if name == "imags" else "image"
    assert said
    assert said.startswith(f"line 3 has a key {name!r} that nobody reads: did you mean {meant!r},")
    assert f"which family {FAMILY!r} reads?" in said
    assert told(lines(tmp_path, {"image": "r.png", name: "r.png", "image_id": 3}), *of) is None
    without = told(lines(tmp_path, {"image_id": 391895, "image_style": "oil"}), *of)
    assert without
    assert "0 source images" in without


def test_rows_of_tables_are_told_as_lines_are(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    with file.open("w") as stream:
        csv.writer(stream).writerows([["prompt", "targets"], ["a\nb", "c"], ["d", "e"]])
    assert (told(str(file), "{ocr: {}}") or "").startswith("line 3 has a key 'targets'")


def test_both_files_of_a_run_are_looked_at(tmp_path: Path) -> None:
    good = Path(lines(tmp_path, *[{"target": "1"}] * 4)).rename(tmp_path / "good.jsonl")
    bad = lines(tmp_path, {"targt": "1"})
    files = f"prompts={{train: {good}, evaluate: {bad}}}"
    with pytest.raises(PromptError, match=r"prompts\.evaluate = '.*': line 1 has a key 'targt'"):
        load_prompt_sets(small_spec(files, "rewards={ocr: {}}"))


def test_what_every_reward_reads() -> None:
    found = {name: keys_read(name, {"reward": "ocr"}) for name in BUILTIN}
    own = {
        "ocr": {"target"},
        "rank": {"target"},
        "geneval": {"tag", "include", "exclude"},
        "preservation": {"mask"},
    }
    assert found == {name: own.get(name, set()) for name in BUILTIN} | {"http": None}
    assert keys_read(OWN) is None
    assert keys_read("pairwise_judge", {"question": "{{x}} {style} {prompt}"}) == {"style"}
