"""``benchmarks/gpu.py`` runs: on the CPU, over the embedded model's configs."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script
from tiny_runs import one_thread

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script(FILE)


@pytest.mark.slow
def test_every_case_and_a_run_at_tiny_scale(benchmark: ModuleType, tmp_path: Path):
    out = tmp_path / "gpu.json"
    with one_thread():
        benchmark.main(["--scale", "tiny", "--train", "1", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["results"].keys() == {case.name for case in benchmark.CASES}
    assert found["not_run"] == []
    exact = found["results"]["float32"]
    assert (exact["images"], exact["micro_batch"], exact["size"]) == (4, 1, [32, 48])
    for row in found["results"].values():
        assert row["floor"]["largest"] == [0.0] * 2, "one process, one device, one kernel"
        assert row["overflows"] == 0
        for part in benchmark.PARTS:
            measured = row[part]
            assert measured["images_per_second"] == pytest.approx(4 / measured["seconds"])
            assert measured["peak_bytes"] is measured["utilisation"] is None
            assert measured["estimated_bytes"] > row["parameters"] * 2
    assert 0.2 < found["tiny"]["before"] < 0.6
    assert found["tiny"]["ratio_floor"] == 0
    told = {one["claim"]: one["ok"] for one in found["verdicts"]}
    assert told.pop("the tiny model reaches 0.9") is False, "after one iteration"
    del told["compiling pays"]  # of matrices as small as these
    assert set(told.values()) == {True}


def test_what_was_found_becomes_verdicts(benchmark: ModuleType):
    part = {"seconds": 2.0, "peak_bytes": 3 << 30, "estimated_bytes": 2 << 30}
    row = {
        "dtype": "float16",
        "floor": {"largest": [1e-5, 2e-4]},
        "beyond_clip": 0.3,
        "overflows": 1,
        **dict.fromkeys(benchmark.PARTS, part),
    }
    failed = {"error": "RuntimeError: out of memory"}
    found = benchmark.verdicts(
        {"a": row, "b": failed}, {"before": 0.3, "after": 0.95, "seconds": 9}
    )
    assert [(one["claim"], one["ok"]) for one in found] == [
        ("b runs", False),
        ("a: noise is not clipped", False),
        ("a, rollout: no more memory than plan says", False),
        ("a, update: no more memory than plan says", False),
        ("a wastes no update at the start", False),
        ("the tiny model reaches 0.9", True),
    ]
    assert found[2]["says"] == "3.00 GiB, estimated 2.00"


def test_the_full_scale_needs_a_gpu(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main([])
    assert "--scale tiny" in capsys.readouterr().err
