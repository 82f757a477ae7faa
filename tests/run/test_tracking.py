"""What a run writes down: rows as given, the same bytes after a resume, mirrors that agree."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowgrpo_ray.common.errors import RunFolderError
from flowgrpo_ray.run.tracking import RunRecorder, read_rows, save_grid, save_samples, scalars


def row(iteration: int, kind: str = "train") -> dict:
    return {
        "kind": kind,
        "iteration": iteration,
        "reward": {"mean": 0.1 * iteration, "std": 0.2},
        "grad_norm": [1.0, 3.0],
        "window": [1, 3],
        "weights": {"version": iteration, "digest": "9f"},
    }


def recorder(folder: Path) -> RunRecorder:
    return RunRecorder(folder)


def test_rows_round_trip_in_order(tmp_path: Path):
    writer = recorder(tmp_path)
    rows = [row(0, "eval"), row(1), row(2)]
    for one in rows:
        writer.log(one)
    assert read_rows(tmp_path / "metrics.jsonl") == rows
    first = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert first == json.dumps(rows[0], sort_keys=True)


def test_not_a_number_becomes_null_and_numpy_becomes_plain(tmp_path: Path):
    values = {
        "nan": float("nan"),
        "inf": [np.float32("inf")],
        "f": np.float32(0.5),
        "i": np.int64(3),
    }
    recorder(tmp_path).log(
        {"kind": "train", "iteration": 1, "flag": True, "pair": (1, 2), **values}
    )
    (read,) = read_rows(tmp_path / "metrics.jsonl")
    assert read["nan"] is None
    assert read["inf"] == [None]
    assert (read["f"], read["i"], read["flag"], read["pair"]) == (0.5, 3, True, [1, 2])


@pytest.mark.parametrize("bad", [{"kind": "start"}, {"iteration": 1}, {"kind": "train"}])
def test_a_row_needs_its_kind_and_iteration(tmp_path: Path, bad: dict):
    with pytest.raises(ValueError, match=r"kind|iteration"):
        recorder(tmp_path).log(bad)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_tensor_is_refused(tmp_path: Path):
    with pytest.raises(TypeError, match="ndarray"):
        recorder(tmp_path).log({"kind": "train", "iteration": 1, "loss": np.zeros(2)})


@pytest.mark.parametrize("torn", [b"", b'{"kind": "train", "iterat', b"\x00\x00\xff"])
def test_resumed_metrics_are_the_same_bytes(tmp_path: Path, torn: bytes):
    """Six iterations at once; four, a crash inside a line, and back to the checkpoint of 3."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    plan = [row(0, "eval"), row(1), row(2), row(3), row(3, "eval"), row(4), row(5), row(6)]
    writer = recorder(straight)
    for one in plan:
        writer.log(one)
    writer = recorder(resumed)
    writer.log_timing({"kind": "start", "seconds": 31.0})
    for one in plan[:6]:
        writer.log(one)
        writer.log_timing({"kind": one["kind"], "iteration": one["iteration"], "seconds": 1.0})
    with (resumed / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    writer = recorder(resumed)
    writer.truncate(3)
    for one in plan[5:]:
        writer.log(one)
    assert (resumed / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    timings = read_rows(resumed / "timings.jsonl")
    assert [(one["kind"], one.get("iteration")) for one in timings] == [
        ("start", None),
        *((one["kind"], one["iteration"]) for one in plan[:5]),
    ]
    assert sorted(path.name for path in resumed.iterdir()) == ["metrics.jsonl", "timings.jsonl"]


def test_a_whole_last_line_without_newline_is_kept(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "kind": "train"}')
    recorder(tmp_path).truncate(1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 1, "kind": "train"}\n'


@pytest.mark.parametrize("bad", ["{torn\n", "[1]\n", '{"loss": NaN}\n', "\n"])
def test_a_bad_line_that_is_not_the_torn_last_is_named(tmp_path: Path, bad: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n' + bad + '{"iteration": 2}\n')
    before = path.read_bytes()
    with pytest.raises(RunFolderError, match="line 2"):
        read_rows(path)
    with pytest.raises(RunFolderError, match="line 2"):
        recorder(tmp_path).truncate(1)
    assert path.read_bytes() == before


def test_scalars_skip_what_is_no_curve():
    values = dict(scalars({"kind": "train", "iteration": 3, "loss": None, "flag": True}, "train"))
    assert values == {}


def test_names_of_scalars_have_no_spaces():
    row = {"kind": "train", "iteration": 3, "ledger": {"learner": {"scores of ocr": 0.5}}}
    assert dict(scalars(row, "time/train")) == {"time/train/ledger/learner/scores_of_ocr": 0.5}


def test_summary_is_replaced_whole(tmp_path: Path):
    writer = recorder(tmp_path)
    writer.write_summary({"name": "a", "eval_after": {"ocr": float("nan")}})
    writer.write_summary({"name": "b"})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"name": "b"}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_grid_has_exact_pixels_row_by_row(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    save_grid(tmp_path / "grid.png", images, columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (8, 18, 3)
    for index, image in enumerate(images):
        top, left = 4 * (index // 3), 6 * (index % 3)
        assert np.array_equal(grid[top : top + 4, left : left + 6], image)
    assert not grid[4:, 12:].any()


@pytest.mark.parametrize("images", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8)])
def test_grid_refuses_other_shapes(tmp_path: Path, images: np.ndarray):
    with pytest.raises(ValueError, match="uint8"):
        save_grid(tmp_path / "grid.png", images, columns=2)


def test_samples_have_a_sidecar(tmp_path: Path):
    images = np.zeros((3, 4, 6, 3), np.uint8)
    scores = {"ocr": np.array([0.5, np.nan, 1.0], np.float32)}
    path = save_samples(tmp_path, 70, images, ["a", "b", "c"], scores)
    assert path == tmp_path / "samples/iteration-000070.png"
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "iteration": 70,
        "prompts": ["a", "b", "c"],
        "scores": {"ocr": [0.5, None, 1.0]},
        "tile": [4, 6],
        "columns": 3,
    }
    with pytest.raises(ValueError, match="one entry per image"):
        save_samples(tmp_path, 71, images, ["a", "b"], scores)


def test_import_loads_neither_torch_nor_ray():
    code = (
        "import sys, flowgrpo_ray.run.tracking, flowgrpo_ray.view.report;"
        "print([m for m in ('torch', 'ray', 'PIL', 'tensorboard') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
