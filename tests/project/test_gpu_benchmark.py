"""``benchmarks/gpu_sd35.py`` runs: on the CPU, over the embedded model's configs."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script
from tiny_runs import one_thread

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu_sd35.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script(FILE)


def test_it_measures_a_group_and_an_update(benchmark: ModuleType, tmp_path: Path):
    out = tmp_path / "gpu.json"
    with one_thread():
        benchmark.main(["--scale", "tiny", "--dtypes", "float32", "bfloat16", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found.keys() == {"scale", "machine", "versions", "results"}
    assert found["machine"].keys() == {"device", "memory_bytes", "cores", "system"}
    assert [row["dtype"] for row in found["results"]] == ["float32", "bfloat16"]
    exact, rounded = found["results"]
    assert (exact["images"], exact["micro_batch"], exact["size"]) == (4, 2, [32, 48])
    assert exact["log_rho_max"] == 0, "one process, one device, one kernel"
    for part in ("rollout", "update"):
        row = exact[part]
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"])
        assert row["peak_bytes"] is row["reserved_bytes"] is row["utilisation"] is None
        assert row["estimated_bytes"] > exact["parameters"] * 4
        assert rounded[part]["flops"] == row["flops"]


def test_the_full_scale_needs_a_gpu(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main([])
    assert "--scale tiny" in capsys.readouterr().err
