"""live.json and the gauges of a run, without a cluster: what is written when, and what is not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from flowgrpo_ray.cluster import telemetry
from flowgrpo_ray.cluster.live import Live
from flowgrpo_ray.cluster.telemetry import Telemetry
from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.serving.metric_table import FROM_ROWS, Metric, gauge
from flowgrpo_ray.spec.file import load_spec

SPEC = load_spec("tiny-ocr", ["iterations=5"])


class Heard:
    """A display that remembers."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.rest: list[tuple[Any, Any]] = []

    def stage(self, stage: str) -> None:
        self.stages.append(stage)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def iteration(self, row: dict[str, Any], seconds: float) -> None:
        self.rest.append((row, seconds))

    def evaluation(self, iteration: int, rewards: dict[str, float | None]) -> None:
        self.rest.append((iteration, rewards))


class Doing:
    """In place of a trainer."""

    def __init__(self, **status: Any) -> None:
        self.now = status

    def status(self) -> dict[str, Any]:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def read(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.path / "live.json").read_text())


@pytest.mark.parametrize(
    ("done", "error", "state", "message"),
    [
        (5, None, "finished", None),
        (3, None, "stopped", None),
        (3, KeyboardInterrupt(), "stopped", None),
        (5, RewardError("ocr gave up"), "failed", "ocr gave up"),
        (0, ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero"),
    ],
)
def test_how_a_run_ends(
    folder: RunFolder, done: int, error: BaseException | None, state: str, message: str | None
):
    threads = threading.active_count()
    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        a_run(folder, done, error)
    last = read(folder)
    assert (last["state"], last["message"], last["iteration"]) == (state, message, done)
    assert threading.active_count() == threads


def a_run(folder: RunFolder, done: int, error: BaseException | None) -> None:
    with Live(folder, SPEC, Heard()) as live:
        assert read(folder)["state"] == "starting", "before anything else"
        live.follow(Doing(state="stopping", iteration=done))
        wait_until(lambda: read(folder)["state"] == "stopping", "stopping")
        if error:
            raise error


def test_a_stage_is_there_at_once_and_all_is_passed_on(folder: RunFolder):
    display = Heard()
    with Live(folder, SPEC, display) as live:
        began = time.monotonic()
        live.stage("evaluating")
        wait_until(lambda: read(folder)["stage"] == "evaluating", "evaluating")
        assert time.monotonic() - began < 0.9, "sooner than the next beat"
        live.note("a note")
        live.iteration({"iteration": 1}, 2.0)
        live.evaluation(1, {"ocr": None})
    assert display.stages == ["evaluating"]
    assert display.notes == ["a note"]
    assert display.rest == [({"iteration": 1}, 2.0), (1, {"ocr": None})]


def test_it_goes_on_while_the_driver_computes(folder: RunFolder):
    with Live(folder, SPEC, Heard()):
        first = read(folder)["updated"]
        time.sleep(1.5)  # nothing else runs in this thread, as while Ray starts
        assert read(folder)["updated"] > first


def test_the_last_checkpoint_is_known_before_ray_runs(folder: RunFolder):
    (folder.checkpoints / "iteration-000002").mkdir(parents=True)
    (folder.checkpoints / "iteration-000004").mkdir()
    with Live(folder, SPEC, Heard()):
        content = read(folder)
    assert content["iteration"] == content["checkpoint"]["iteration"] == 4
    assert content["checkpoint"]["at"] == pytest.approx(time.time(), abs=60)


def test_a_file_that_cannot_be_written_is_told_once_and_ends_nothing(folder: RunFolder):
    display = Heard()
    with Live(folder, SPEC, display) as live:
        shutil.rmtree(folder.path)
        for stage in "abc":
            live.stage(stage)
            time.sleep(0.1)
        wait_until(lambda: display.notes, "a note")
        folder.path.mkdir()
        live.stage("d")
        wait_until((folder.path / "live.json").exists, "live.json")
    (note,) = display.notes
    assert note.startswith("live.json cannot be written, so nobody sees this run live: ")
    assert read(folder)["state"] == "stopped"


# --- gauges


class Recorder:
    """In place of Ray: what was set since it was last looked at."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.values: dict[str, float] = {}

    def set(self, metric: Metric, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[" ".join([metric.name, *(tags or {}).values()])] = value

    def add(self, metric: Metric, value: float, tags: dict[str, str] | None = None) -> None:
        key = " ".join([metric.name, *(tags or {}).values()])
        self.values[key] = self.values.get(key, 0) + value

    def taken(self) -> dict[str, float]:
        taken, self.values = self.values, {}
        return taken


@pytest.fixture
def seen(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> tuple[Telemetry, Recorder]:
    monkeypatch.setattr(telemetry, "Exporter", Recorder)
    made = Telemetry(SPEC, folder, Heard())
    recorder: Any = made._export
    return made, recorder


def test_a_number_that_is_gone_is_not_exported_again(seen: tuple[Telemetry, Recorder]):
    made, ray = seen
    rewards = {"ocr": {"mean": 0.5, "std": 0.1}}
    made.see("metrics.jsonl", {"kind": "train", "iteration": 1, "kl": 0.2, "rewards": rewards})
    made.see("timings.jsonl", {"kind": "train", "seconds": 3.0})
    first = ray.taken()
    assert (first["kl"], first["reward_mean ocr"], first["iteration_seconds"]) == (0.2, 0.5, 3.0)
    nothing = {"ocr": {"mean": None, "std": None}}
    made.see("metrics.jsonl", {"kind": "train", "iteration": 2, "kl": None, "rewards": nothing})
    then = ray.taken()
    assert then["iteration"] == 2
    assert then["iteration_seconds"] == 3.0, "of the other kind of row: still holds"
    assert not {"kl", "reward_mean ocr", "reward_std ocr"} & then.keys()


def test_counters_add_up_and_start_at_zero(seen: tuple[Telemetry, Recorder]):
    made, ray = seen
    assert ray.taken()["reward_failures ocr"] == 0, "before the first failure"
    for _ in range(2):
        made.see("metrics.jsonl", {"kind": "train", "images": 32, "unscored": {"ocr": 3}})
    found = ray.taken()
    assert (found["images"], found["unscored_images ocr"]) == (64, 6)


def test_what_breaks_in_the_background_is_told(
    seen: tuple[Telemetry, Recorder], monkeypatch: pytest.MonkeyPatch
):
    made, _ = seen
    monkeypatch.setattr(telemetry, "_where", lambda: None)
    monkeypatch.setattr(made, "_beating", broken)

    async def run() -> str:
        async with made:
            await asyncio.sleep(0.05)
            return "trained"

    monkeypatch.setattr(made, "_beat", lambda: None)
    assert asyncio.run(run()) == "trained"
    (note,) = made._display.notes  # pyright: ignore[reportAttributeAccessIssue]
    assert "ZeroDivisionError" in note


async def broken() -> None:
    raise ZeroDivisionError


# --- the table


@pytest.mark.parametrize(
    ("path", "row", "values"),
    [
        ("a.b", {"a": {"b": 2}}, [({}, 2.0)]),
        ("a.b", {"a": None}, []),
        ("a", {"a": None}, []),
        ("a", {}, []),
        ("a", {"a": float("nan")}, []),
        ("a", {"a": True}, [({}, 1.0)]),
        ("a", {"a": "text"}, []),
        ("a", {"a": [1, None, 3]}, [({}, 2.0)]),
        ("a", {"a": [None]}, []),
        ("", 3, [({}, 3.0)]),
        ("{t}", {"x": 1, "y": None}, [({"t": "x"}, 1.0)]),
        ("r.{t}.m", {"r": {"x": {"m": 1}, "y": {"m": 2}}}, [({"t": "x"}, 1.0), ({"t": "y"}, 2.0)]),
        ("{t}.m", {"t": [3, 5], "m": [0.5, None]}, [({"t": "3"}, 0.5)]),
    ],
)
def test_where_a_metric_finds_its_values(path: str, row: Any, values: list[Any]):
    assert gauge("name", path, "meaning").read(row) == values


def test_names_are_told_apart():
    """Ray has one name for a gauge and a counter, so ours must differ before the ending."""
    names = [metric.name for metrics in FROM_ROWS.values() for metric in metrics]
    assert len(set(names)) == len(names)
