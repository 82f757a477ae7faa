"""`runs` and `compare`: what they print, in terminals of several widths, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sample_runs import make_run

from flowgrpo_ray.run.overview import overview
from flowgrpo_ray.spec.file import dump_spec, load_spec


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "runs"
    for name, seed, rate in (("a0", 0, 2e-4), ("a1", 1, 2e-4), ("prune", 0, 5e-4)):
        folder = make_run(root / name, iterations=2, prompts=4)
        settings = [f"seed={seed}", f"optimizer.learning_rate={rate}"]
        (folder / "spec.yaml").write_text(dump_spec(load_spec("tiny-ocr", settings)))
    return root


def printed(command_line: Any, *arguments: object) -> list[str]:
    status, output, error = command_line(*arguments)
    assert status == 0, error
    return [line.rstrip() for line in output.splitlines()]


def test_a_table_where_it_fits_and_blocks_where_not(command_line: Any, root: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    head, *rows, group = printed(command_line, "runs", root)
    assert head.split()[:5] == ["run", "state", "seed", "optimizer.learning_rate", "iterations"]
    assert [row.split()[:5] for row in rows] == [
        ["a0", "finished", "0", "0.0002", "2/2"],
        ["a1", "finished", "1", "0.0002", "2/2"],
        ["prune", "finished", "0", "0.0005", "2/2"],
    ]
    line = overview(root)["runs"][0]
    ocr = line["rewards"]["ocr"]
    assert f"{ocr['before']:.3g} → {ocr['after']:.3g}" in rows[0]
    assert group.startswith(f"2 seeds of a0, ocr {ocr['after']:.3g} ± 0")
    monkeypatch.setenv("COLUMNS", "88")
    *narrow, _, more = printed(command_line, "runs", "list", root)
    assert "optimizer" not in narrow[0]
    assert max(map(len, narrow)) <= 88
    assert more == "1 more keys differ: see --json, or compare RUN RUN"
    monkeypatch.setenv("COLUMNS", "40")
    block = printed(command_line, "runs", root)[:4]
    assert block == ["a0", "  state: finished", "  seed: 0", "  optimizer.learning_rate: 0.0002"]


def test_the_json_is_the_overview(command_line: Any, root: Path, monkeypatch):
    (text,) = printed(command_line, "runs", root, "--json")
    told = json.loads(text)
    expected = json.loads(json.dumps(overview(root)))
    for run in (*told["runs"], *expected["runs"]):
        del run["age"]
    assert told == expected
    monkeypatch.setenv("FLOWGRPO_RUNS", str(root))
    (text,) = printed(command_line, "runs", "--json")
    assert [run["name"] for run in json.loads(text)["runs"]] == ["a0", "a1", "prune"]
    (text,) = printed(command_line, "compare", root / "a1", root / "prune", "--json")
    found = json.loads(text)
    assert found["keys"] == ["seed", "optimizer.learning_rate"]
    assert [run["values"]["seed"] for run in found["runs"]] == [1, 0]


def test_a_comparison_has_a_column_for_each_run(command_line: Any, root: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = printed(command_line, "compare", root / "a0", root / "prune")
    table = {name: values for name, *values in (line.split() for line in lines[1:])}
    assert lines[0].split() == ["a0", "prune"]
    assert table["optimizer.learning_rate"] == ["0.0002", "0.0005"]
    assert table["state"] == ["finished", "finished"]
    assert "seed" not in table


def test_mistakes_are_one_message(command_line: Any, root: Path, tmp_path: Path):
    status, _, error = command_line("runs", tmp_path / "absent")
    assert (status, "no folder at" in error) == (2, True)
    status, _, error = command_line("compare", root)
    assert (status, "in it are a0, a1, prune" in " ".join(error.split())) == (2, True)
    status, _, error = command_line("compare", root / "a0", "--html", tmp_path / "x" / "c.html")
    assert (status, "make it" in error) == (2, True)
    assert printed(command_line, "runs", tmp_path) == [f"no run below {tmp_path}"]
