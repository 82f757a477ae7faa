"""What `submit` checks and uploads; a job itself runs in test_on_a_cluster.py."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from editing import write_image
from ports import own_port

from flowgrpo_ray.cluster.upload import pack
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.paths import runs_root
from flowgrpo_ray.spec.families import FAMILIES
from flowgrpo_ray.spec.file import load_spec


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's folder, which is the current one; modules in it can be imported."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for key in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "FLOWGRPO_RUNS"):
        monkeypatch.delenv(key, raising=False)
    yield folder
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def _prompts(path, first=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f'red sign "{n}"\n' for n in range(first, first + 20)))
    return path


def _files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_prompts_and_own_modules_are_uploaded_and_nothing_else(project, tmp_path):
    _prompts(project / "sets" / "train.txt")
    outside = _prompts(tmp_path / "elsewhere" / "heldout.txt", 200)
    (project / "own_reward.py").write_text("class Good:\n    def __call__(self): ...\n")
    package = project / "own_package" / "deep"
    package.mkdir(parents=True)  # a package without __init__.py
    (package / "scores.py").write_text("class Better:\n    def __call__(self): ...\n")
    (project / "secret.bin").write_bytes(b"x" * 1000)
    (project / "own_objective.py").write_text(
        "from flowgrpo_ray.algorithm.objectives import FlowGrpo\nclass Mine(FlowGrpo): ...\n"
    )
    spec = load_spec(
        "tiny-ocr",
        [
            f"prompts={{train: sets/train.txt, evaluate: '{outside}'}}",
            "rewards={ocr: {}, a: {reward: 'own_reward:Good'}, "
            "b: {reward: 'own_package.deep.scores:Better'}, "
            "c: {reward: 'flowgrpo_ray.rewards.jpeg:JpegCompressibilityReward'}}",
            "objective={kind: 'own_objective:Mine', clip_low: 0.5}",
        ],
    )
    target = tmp_path / "upload"
    target.mkdir()
    files = pack(spec, target)
    assert files == _files(target)
    assert files == [
        "own_objective.py",
        "own_package/deep/scores.py",
        "own_reward.py",
        "prompts/heldout.txt",
        "sets/train.txt",
        "spec.yaml",
    ]
    assert (target / "prompts/heldout.txt").read_text() == outside.read_text()
    there = load_spec(str(target / "spec.yaml"))
    assert there.prompts.train == "sets/train.txt"
    assert there.prompts.evaluate == "prompts/heldout.txt"
    assert (there.rewards, there.objective) == (spec.rewards, spec.objective)


def test_a_spec_of_this_folder_stays_the_same_run(project, tmp_path):
    _prompts(project / "train.txt")
    spec = load_spec("tiny-ocr", ["prompts.train=train.txt"])
    target = tmp_path / "upload"
    target.mkdir()
    assert pack(spec, target) == ["spec.yaml", "train.txt"]
    assert load_spec(str(target / "spec.yaml")).identity() == spec.identity()


def test_source_images_keep_their_place_beside_the_prompt_file(project, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "sd3", replace(FAMILIES["sd3"], sources=range(1, 2)))
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "pictures").mkdir(parents=True)
    for name in ("a", "b", "mask"):
        write_image(elsewhere / "pictures" / f"{name}.png", (1, 2, 3))
    (project / "sets").mkdir()
    write_image(project / "c.png", (1, 2, 3))
    row = {"prompt": "x", "image": "pictures/a.png", "mask": "pictures/mask.png"}
    rows = [row, {"prompt": "x", "images": [str(elsewhere / "pictures" / "b.png")]}]
    (elsewhere / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (project / "sets" / "q.jsonl").write_text('{"prompt": "x", "image": "../c.png"}\n')
    files = f"prompts={{train: '{elsewhere}/p.jsonl', evaluate: sets/q.jsonl}}"
    target = tmp_path / "upload"
    target.mkdir()
    assert pack(load_spec("tiny-ocr", [files]), target) == [
        *("c.png", "prompts/p.jsonl", "prompts/pictures/a.png", "prompts/pictures/mask.png"),
        *("sets/q.jsonl", "spec.yaml"),
    ]
    (project / "q.jsonl").write_text('{"prompt": "x", "image": "../d.png"}\n')
    with pytest.raises(SpecError, match=r"d\.png' cannot keep its place in what is uploaded"):
        pack(load_spec("tiny-ocr", ["prompts.evaluate=q.jsonl"]), tmp_path / "again")


def test_two_files_of_one_name_are_not_mixed_up(project, tmp_path):
    train = _prompts(tmp_path / "a" / "signs.txt")
    held_out = _prompts(tmp_path / "b" / "signs.txt", 300)
    spec = load_spec("tiny-ocr", [f"prompts={{train: '{train}', evaluate: '{held_out}'}}"])
    target = tmp_path / "upload"
    target.mkdir()
    with pytest.raises(SpecError, match=r"two prompt files .*'signs\.txt'"):
        pack(spec, target)


@pytest.mark.parametrize("key", ["model.path", "model.lora"])
def test_a_model_of_this_machine_alone_is_refused(project, tmp_path, key):
    (project / "model").mkdir()
    spec = load_spec("tiny-ocr", [f"{key}=./model"])
    with pytest.raises(SpecError, match=f"{key} = './model' is a folder or file of this machine"):
        pack(spec, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-ocr", "--set", "seed=x"], "seed: Input should be a valid integer"),
        (["tiny-ocr", "--set", "prompts.train=nowhere.txt"], "prompts.train = 'nowhere.txt'"),
        (["tiny-ocr", "--runs", "runs"], "--runs runs: give an absolute path"),
        (["tiny-ocr", "--address", "http://127.0.0.1:1"], "no Ray cluster takes jobs at http"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_submitted(
    project, command_line, monkeypatch, arguments, message
):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:2")  # an option goes before it
    status, _, said = command_line("submit", *arguments)
    assert status == 2
    assert message in " ".join(said.split())


def test_a_model_folder_that_only_the_cluster_has_passes(project, command_line):
    address = f"http://127.0.0.1:{own_port()}"
    status, _, said = command_line(
        "submit", "tiny-ocr", "--set", "model.path=/on/the/cluster", "--address", address
    )
    assert status == 2
    assert f"no Ray cluster takes jobs at {address}" in said.replace("\n", " ")


def test_where_runs_go(monkeypatch, tmp_path):
    for key in ("RAY_JOB_CONFIG_JSON_ENV_VAR", "FLOWGRPO_RUNS"):
        monkeypatch.delenv(key, raising=False)
    assert runs_root(None) == Path("runs")
    assert runs_root(Path("other")) == Path("other")
    monkeypatch.setenv("FLOWGRPO_RUNS", str(tmp_path))
    assert runs_root(None) == tmp_path
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert runs_root(None) == tmp_path
    with pytest.raises(SpecError, match="--runs = 'runs': in a Ray job this must be an absolute"):
        runs_root(Path("runs"))
    monkeypatch.setenv("FLOWGRPO_RUNS", "runs")
    with pytest.raises(SpecError, match="FLOWGRPO_RUNS = 'runs'"):
        runs_root(None)
    monkeypatch.delenv("FLOWGRPO_RUNS")
    assert runs_root(None) == Path.home() / "flowgrpo-runs"
