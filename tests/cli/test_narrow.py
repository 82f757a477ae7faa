"""Terminals of 60 and of 80 columns: tables keep their numbers, messages wrap between words."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from sample_runs import make_run

from flowgrpo_ray.cli import commands, rewards_env, rewards_serve, train
from flowgrpo_ray.estimate import footprint
from flowgrpo_ray.estimate.footprint import Footprint
from flowgrpo_ray.estimate.layouts import Layout
from flowgrpo_ray.estimate.parallel import Parallel
from flowgrpo_ray.rewards import calibration
from flowgrpo_ray.rewards.environments import MANIFEST
from flowgrpo_ray.run.tracking import TIMINGS, read_rows
from flowgrpo_ray.run.validation import Finding, Verdict
from flowgrpo_ray.serving.admin import RewardStatus
from flowgrpo_ray.serving.types import ReplicaStats
from flowgrpo_ray.spec.file import dump_spec, load_spec
from flowgrpo_ray.view.console import RunDisplay, say, verdict_table
from flowgrpo_ray.view.tables import print_table

WIDE = 300


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs and pictures to score."""
    world = tmp_path_factory.mktemp("world")
    for name, seed in (("a-run-of-some-length", 0), ("another", 1)):
        folder = make_run(world / "runs" / name, iterations=2, prompts=4)
        (folder / "spec.yaml").write_text(dump_spec(load_spec("tiny-ocr", [f"seed={seed}"])))
    (world / "grey").mkdir()
    for level in (0, 99):
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(world / "grey" / f"{level}.png")
    (world / "two.txt").write_text('red sign "4"\nblue sign "7"\n')
    environment = world / "environments" / "of-mine"
    environment.mkdir(parents=True)
    manifest = {"kind": "overlay", "requirements": [], "packages": {}, "shared": {}}
    manifest |= {"python": "3.12.11", "base": ""}
    (environment / MANIFEST).write_text(json.dumps(manifest))
    return world


def status_of_rewards() -> None:
    stats = ReplicaStats("r", 71234, None, 1204993, 4819972, 1201, 38, 9e4, 8e4, (0.9123, 1.25), "")
    row = RewardStatus("jpeg_compressibility", "RUNNING", "", 16, 32, (71234, 71235), (stats,))
    rewards_serve._show([row])


def end_of_a_run(world: Path) -> None:
    summary = json.loads((world / "runs" / "another" / "summary.json").read_text())
    rewards = {"jpeg_compressibility": -104.123, **summary["eval_after"]}
    summary |= {"name": "n" * 50, "eval_before": rewards, "eval_after": rewards}
    timings = world / "runs" / "another" / TIMINGS
    outcome: Any = type("Outcome", (), {"summary": summary, "folder": timings.parent})
    train._say_what_came_of_it(load_spec("tiny-ocr"), outcome)
    assert read_rows(timings)[-2]["kind"] == "train", "else there is no second table"


def verdict_of_a_run() -> None:
    says = "largest |log rho| 0.0000123456 of 1,204 samples, at most 0.00012 is allowed by the clip"
    findings = (Finding("log-ratio of the window", True, says), Finding("pace", None, "3.14 s"))
    print_table(train.console, verdict_table(Verdict("a-run", 8, findings)))


def needs_much(*_: object) -> Footprint:
    """The memory of a plan with long numbers, without the minutes of counting it."""
    gib = 2**30
    stages = {"training": {"weights": 44 * gib, "activations": 123 * gib}, "start": {"weights": 1}}
    separate = [
        Layout("separate", parallel, (16, 16), 0.5, (140.5 * gib, 157.1 * gib))
        for parallel in ("replicate", "shard")
    ]
    colocated = [
        Layout("colocated", parallel, (32,), 1.0, (167.0 * gib,))
        for parallel in ("replicate", "shard")
    ]
    return Footprint(
        parameters=11_901_410_000,
        trained_parameters=179_310_000,
        rollout_flops=113_977_981 * 10**9,
        training_flops=194_210_697 * 10**9,
        actors={"workers": stages},
        rewards={"pickscore": None, "imagereward": {"weights": 4 * gib}},
        host=0,
        parallel=Parallel(),
        encoders_known=True,
        layouts=[*separate, *colocated],
    )


def of(*words: str) -> Callable[[Any, Path], Any]:
    def call(command_line: Any, world: Path) -> Any:
        return command_line(*words)

    return call


PRINTED = {
    "plan": of("plan", "flux-pickscore", "--gpu", "h100"),
    "runs": of("runs", "runs"),
    "compare": of("compare", "runs/another", "runs/a-run-of-some-length"),
    "recipes": of("recipes"),
    "rewards check": of("rewards", "check", "jpeg_compressibility", "--size", "32", "48"),
    "rewards score": of(
        *("rewards", "score", "grey", "two.txt", "--out", "scores.csv", "--overwrite"),
        *("--reward", "jpeg_compressibility=0.12345", "--reward", "sign_colour"),
    ),
    "rewards env list": of("rewards", "env", "list"),
    "rewards status": lambda *_: status_of_rewards(),
    "train": lambda _, world: end_of_a_run(world),
    "train --validate": lambda *_: verdict_of_a_run(),
}


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, command_line: Any, capsys: Any, world: Path):
    """``printed("plan", 60)``: its lines on a terminal of that many columns."""
    monkeypatch.chdir(world)
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FLOWGRPO_ENVIRONMENTS", str(world / "environments"))

    def call(command: str, width: int) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        for module in (commands, rewards_env, rewards_serve, train):
            console = Console(markup=module is train)
            monkeypatch.setattr(module, "console", console)
        monkeypatch.setattr(footprint, "estimate", needs_much)
        monkeypatch.setattr(calibration.time, "perf_counter", itertools.count().__next__)
        answer = PRINTED[command](command_line, world)
        status, out, error = answer or (0, capsys.readouterr().out, "")
        assert status == (command == "rewards check"), error
        _, _, last = out.rpartition("\x1b[2K")  # of a progress bar that goes when all is done
        return [line.rstrip() for line in seen(last).splitlines()]

    return call


def seen(text: str) -> str:
    return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", text)


def numbers(lines: list[str]) -> set[str]:
    """Words with a digit, and whatever is cut."""
    words = re.split(r"[\s│┃]+", " ".join(lines))
    return {word for word in words if re.search(r"[\d…]", word)}


def too_long(line: str, width: int) -> bool:
    """Not so where a path or a command is, which are to be copied."""
    return len(line) > width and not re.search("/|flowgrpo-ray", line)


@pytest.mark.parametrize("command", PRINTED)
def test_tables_keep_their_numbers(printed, command: str):
    wide = numbers(printed(command, WIDE))
    assert wide or command == "recipes"
    for width in (80, 60):
        lines = printed(command, width)
        assert numbers(lines) == wide
        assert [line for line in lines if too_long(line, width)] == []


def on_terminal(width: int) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, color_system=None, width=width), file


def test_messages_wrap_between_words_and_keep_a_path_whole():
    path = "/data/" + "deep/" * 30 + "run"
    message = f"jpeg_compressibility-of-all failed 12,345 times; {path} has what it said [at] last"
    for width in (60, 80):
        console, file = on_terminal(width)
        say(console, message)
        lines = file.getvalue().splitlines()
        assert " ".join(line.strip() for line in lines) == message
        assert [line for line in lines if len(line) > width] == [path]
    log = io.StringIO()
    say(Console(file=log, width=60), message)
    assert log.getvalue() == f"{message}\n"


@pytest.mark.parametrize("width", [60, 80])
def test_the_live_line_keeps_its_numbers(width: int):
    console, file = on_terminal(width)
    with RunDisplay(load_spec("tiny-ocr", ["iterations=1000"]), console) as display:
        display.stage("starting learner, rollout workers and rewards")
        row = {"iteration": 123, "reward": {"mean": -12.345}, "log_ratio": {"max_abs": 1.2e-5}}
        display.iteration(row, 12.0)
    last = re.split(r"[\r\n]+", seen(file.getvalue()).rstrip())[-1]
    assert last.startswith(" 123/1000 ")
    assert "reward -12.345  |log rho| 1.2e-05 " in last
    assert last.rstrip().endswith("175:24 left")
