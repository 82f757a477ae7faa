"""A run folder as a Python object."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import flowgrpo_ray
from flowgrpo_ray.common.errors import RunFolderError
from flowgrpo_ray.run.tracking import RunRecorder, save_samples, save_sources
from flowgrpo_ray.spec.file import dump_spec, load_spec

TRAIN = [{"kind": "train", "iteration": i, "reward": {"mean": i / 4}} for i in (1, 2)]
EVAL = {"kind": "eval", "iteration": 0, "rewards": {"ocr": {"mean": 0.5}}}


@pytest.fixture
def run(tmp_path: Path) -> flowgrpo_ray.Run:
    (tmp_path / "spec.yaml").write_text(dump_spec(load_spec("tiny-ocr")))
    recorder = RunRecorder(tmp_path)
    for row in (EVAL, *TRAIN):
        recorder.log(row)
    return flowgrpo_ray.Run(tmp_path)


def test_rows_are_dictionaries_or_a_frame(
    run: flowgrpo_ray.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert run.metrics("train") == TRAIN
    assert run.metrics() == [EVAL, *TRAIN]
    assert run.timings() == []

    class Pandas(ModuleType):
        @staticmethod
        def json_normalize(rows: Any) -> tuple[str, Any]:
            return "frame", rows

    monkeypatch.setitem(sys.modules, "pandas", Pandas("pandas"))
    assert run.metrics("eval") == ("frame", [EVAL])
    assert run.rows("eval") == [EVAL]


def test_samples_are_the_pictures_that_were_drawn(run: flowgrpo_ray.Run) -> None:
    images = np.random.default_rng(0).integers(0, 256, (11, 6, 9, 3), dtype=np.uint8)
    for iteration in (0, 20):
        shown = images if iteration else 255 - images
        prompts, scores = [f"p{i}" for i in range(11)], {"ocr": [None] + [0.5] * 10}
        save_samples(run.path, iteration, shown, prompts, scores)
    assert run.evaluations == [0, 20]
    np.testing.assert_array_equal(run.samples().images, images)
    first = run.samples(0)
    np.testing.assert_array_equal(first.images, 255 - images)
    assert (first.iteration, first.prompts[-1], first.scores["ocr"][:2]) == (0, "p10", [None, 0.5])
    with pytest.raises(RunFolderError, match="no samples of iteration 10; there are: 0, 20"):
        run.samples(10)
    assert first.sources is None
    sources = np.random.default_rng(1).integers(0, 256, (11, 2, 6, 9, 3), dtype=np.uint8)
    save_sources(run.path, sources)
    np.testing.assert_array_equal(run.samples(0).sources, sources)


def test_a_run_that_has_hardly_begun(run: flowgrpo_ray.Run, tmp_path: Path) -> None:
    assert run.spec == load_spec("tiny-ocr")
    assert run.summary is None
    assert run.checkpoints == []
    with pytest.raises(RunFolderError, match="no samples of iteration None; there are: none yet"):
        run.samples()
    with pytest.raises(RunFolderError, match="no checkpoint yet"):
        run.policy()
    with pytest.raises(RunFolderError, match="is not a run folder"):
        flowgrpo_ray.Run(tmp_path / "nowhere")
    (tmp_path / "summary.json").write_text(json.dumps({"iterations": 2}))
    assert run.summary == {"iterations": 2}


def test_importing_the_package_loads_none_of_it() -> None:
    program = (
        "import sys, flowgrpo_ray\n"
        "print(sorted(m for m in sys.modules if m.startswith('flowgrpo_ray')))\n"
        "print(all(hasattr(flowgrpo_ray, name) for name in flowgrpo_ray.__all__))\n"
        "print(sorted({'torch', 'ray', 'diffusers'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["['flowgrpo_ray']", "True", "[]"], done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = flowgrpo_ray.trian  # type: ignore[attr-defined]
