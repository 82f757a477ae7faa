"""The commands as typed: help, counts, lists, and mistakes that end in one message and status 2."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest

from flowgrpo_ray import cli
from flowgrpo_ray.run_folder import RunFolder
from flowgrpo_ray.spec_file import load_spec, recipe_names

COMMANDS = {
    "train": "Train a model",
    "plan": "Check a spec",
    "sample": "one image per prompt",
    "evaluate": "held-out prompts",
    "export": "for diffusers",
    "report": "report.html",
    "recipes": "List the training specs",
    "schema": "JSON schema",
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, command_line: Any, tmp_path: Path):
    """``run("plan", "tiny-ocr") -> (status, stdout, stderr)`` through the program's entry point."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "COLUMNS": "250", "NO_COLOR": "1"})
    level = logging.getLogger("diffusers").level

    def call(*arguments: str) -> tuple[int, str, str]:
        answer = command_line(*arguments)
        logging.getLogger("diffusers").setLevel(level)
        return answer

    return call


def squeezed(text: str) -> str:
    """Without the line breaks and boxes of the terminal."""
    return " ".join(re.sub(r"[│╭╮╰╯─┃━┏┓┡┩└┘]", " ", text).split())


def test_every_command_is_listed_and_known_here(run):
    status, out, _ = run("--help")
    assert status == 0
    registered = {c.name or c.callback.__name__ for c in cli.app.registered_commands}  # type: ignore[union-attr]
    assert registered >= COMMANDS.keys()
    assert all(re.search(rf"\b{name}\b", out) for name in registered)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_is_for(run, command: str):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert COMMANDS[command] in squeezed(out)


def table(out: str) -> dict[str, list[int]]:
    """``{label: [per iteration, in all]}`` of the plan's table."""
    rows = re.findall(r"^\W*(\w[\w ,-]*?)\s*[│|]\s*([\d,]+)\s*[│|]\s*([\d,]+)\W*$", out, re.M)
    return {label: [int(n.replace(",", "")) for n in numbers] for label, *numbers in rows}


def test_plan_counts_the_work(run):
    """8 groups of 12 images, 10 steps of which 2 are trained, no guidance, KL, 2 updates."""
    status, out, _ = run("plan", "tiny-ocr", "--set", "iterations=10")
    assert status == 0
    assert table(out) == {
        "images": [96, 960],
        "micro-batches": [4, 40],
        "forwards of one image, sampling": [960, 9600],
        "forwards and backwards, training": [192, 1920],
        "forwards of the KL reference": [192, 1920],
        "optimizer updates": [2, 20],
    }
    assert "256 to train on, 64 held out" in out
    assert "0 GPUs" in out
    assert re.search(r"memory of the network's [\d.]+ M parameters", out)


def test_plan_counts_guidance_and_all_steps(run):
    status, out, _ = run(
        *("plan", "tiny-ocr", "--set", "sampling.guidance=4.5", "--set", "objective.kl=null"),
        *("--set", "sampling.window={kind: all}", "--set", "iterations=1"),
    )
    assert status == 0
    counts = {label: each for label, (each, _) in table(out).items()}
    assert counts["forwards of one image, sampling"] == 2 * 960
    assert counts["forwards and backwards, training"] == 2 * 96 * 9
    assert counts["forwards of the KL reference"] == 0


def test_recipes_lists_each_with_its_line(run):
    status, out, _ = run("recipes")
    assert status == 0
    for name in recipe_names():
        assert re.search(rf"^\W*{name}\s+\w+", out, re.M)


def test_schema_is_json_with_descriptions(run):
    """What an editor needs to complete keys and to show what they mean."""
    status, out, _ = run("schema")
    assert status == 0
    schema = json.loads(out)
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert {"model", "sampling", "rewards", "objective"} <= schema["properties"].keys()
    sampling = schema["$defs"]["SamplingSpec"]["properties"]
    for key in ("steps", "guidance", "eta", "group_size", "groups", "micro_batch"):
        assert sampling[key]["description"], key


MISTAKES = {
    "no such recipe": (["plan", "tiny-orc"], "did you mean the recipe 'tiny-ocr'?"),
    "no such spec to train": (["train", "x.yaml"], "'x.yaml' is neither a file nor a recipe"),
    "unknown key": (
        ["plan", "tiny-ocr", "--set", "sed=1"],
        "sed: unknown key; did you mean 'seed'",
    ),
    "unknown key, before training": (["train", "tiny-ocr", "--set", "sed=1"], "'seed'"),
    "bad --set": (["plan", "tiny-ocr", "--set", "seed"], "write it as key=value"),
    "brackets in a message": (["plan", "tiny-ocr", "--set", "seed=[b]x"], "[b]x"),
    "no such prompts": (
        ["plan", "tiny-ocr", "--set", "prompts.train=no.txt"],
        "prompts.train = 'no.txt': there is no such file",
    ),
    "no such model": (["plan", "tiny-ocr", "--set", "model.path=./no"], "model.path = './no'"),
    "not a run": (["export", "nowhere", "--out", "new"], "nowhere is not a run folder"),
    "no run to report on": (["report", "nowhere"], "nowhere"),
    "neither run nor spec": (["sample", "nowhere", "a sign"], "'nowhere' is neither"),
    "no prompts to evaluate on": (
        ["evaluate", "tiny-ocr", "--prompts", "no.txt"],
        "--prompts = 'no.txt': there is no such file",
    ),
    "unknown option": (["plan", "tiny-ocr", "--sett", "a=1"], "--sett"),
    "unknown command": (["trian", "tiny-ocr"], "trian"),
    "missing argument": (["train"], "SPEC|RECIPE"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_message_and_status_2(run, tmp_path: Path, case: str):
    arguments, message = MISTAKES[case]
    status, out, err = run(*arguments)
    assert status == 2
    assert message in squeezed(err)
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == [], "nothing was started or written"


def test_more_gpus_than_there_are_ends_before_ray_starts(run, tmp_path: Path):
    greedy = ["cluster.learner.gpus=1", "cluster.rollout={count: 99, gpus: 1}"]
    status, _, err = run("train", "tiny-ocr", *(a for key in greedy for a in ("--set", key)))
    assert status == 2
    assert "100 GPUs" in squeezed(err)
    assert "RAY_ADDRESS" in squeezed(err)
    # Who corrects the spec can train: a run that never began needs no --resume.
    RunFolder.claim(tmp_path / "runs", load_spec("tiny-ocr"), resume=False).release()


def test_training_over_a_run_asks_for_resume(run, tmp_path: Path):
    folder = RunFolder.claim(tmp_path / "runs", load_spec("tiny-ocr"), resume=False)
    folder.release()
    (folder.path / "metrics.jsonl").write_text('{"kind": "eval", "iteration": 0}\n')
    status, _, err = run("train", "tiny-ocr")
    assert status == 2
    assert "--resume" in err
