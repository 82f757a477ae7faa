"""The notebooks: each runs from a fresh kernel, its results are right, what is stored is small.

They run with few iterations in one folder of their own, as ``notebooks/execute.py`` runs them.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import yaml
from matplotlib import font_manager
from nbformat.v4 import new_code_cell
from scripts import load_script

from flowgrpo_ray.run.tracking import read_rows

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
ITERATIONS = 2


def stored(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def printed(notebook: Any) -> str:
    """All text that its code cells gave; pictures left out."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts.append(output.get("text", ""))
            texts += [text for kind, text in output.get("data", {}).items() if "image" not in kind]
    return "\n".join(texts)


def check_outputs(notebook: Any) -> None:
    """Every code cell was run, in order, without an error, a warning or a trace of the machine."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.get("name", output.output_type) for cell in code for output in cell.outputs}
    assert kinds == {"stdout", "display_data"}, printed(notebook)
    text = printed(notebook)
    for place in (ROOT, Path.home()):
        assert str(place) not in text
    assert not re.search(r"/(home|root|tmp|Users|usr|opt)/", text)
    assert not re.search(r"\d+\.\d+\.\d+\.\d+|\(pid=|\x1b", text), "addresses, Ray's log, colours"
    assert len(platform.node()) < 9 or platform.node() not in text


# --- as they are stored


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_whole_and_small(name: str) -> None:
    notebook = stored(name)
    nbformat.validate(notebook)
    check_outputs(notebook)
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 300_000
    assert not any("execution" in cell.metadata for cell in notebook.cells), "clock times"


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_says_what_and_how_long(name: str) -> None:
    first = stored(name).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert re.search(r"take\w* (about|seconds)[^.]*", first.source)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name: str) -> None:
    text = "\n".join(cell.source for cell in stored(name).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links
    for link in links:
        assert (NOTEBOOKS / link).exists(), link


def test_all_are_run_by_the_program_and_listed() -> None:
    assert sorted(load_script(NOTEBOOKS / "execute.py").NOTEBOOKS) == NAMES
    page = (NOTEBOOKS / "README.md").read_text("utf-8")
    assert set(re.findall(r"\((\w+)\.ipynb\)", page)) == set(NAMES)


# --- as they run


class Desk:
    """A folder in which notebooks run, without the settings of the tests' Ray."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST_"))}
        self._environment = kept | {"FLOWGRPO_NOTEBOOK_ITERATIONS": str(ITERATIONS)}
        # matplotlib lists the fonts once for a user; a notebook should not be the one to tell.
        assert font_manager.fontManager.ttflist

    def run(self, name: str, values: str = "", changes: Mapping[str, str] | None = None) -> Any:
        """The executed notebook, and the arrays that it calls ``values`` (names, with commas)."""
        notebook = stored(name)
        for cell in notebook.cells:
            for old, new in (changes or {}).items():
                cell.source = cell.source.replace(old, new)
        probe = "\n".join(f"np.save('{value}.npy', {value})" for value in values.split())
        notebook.cells.append(new_code_cell(f"import numpy as np\n{probe}"))
        load_script(NOTEBOOKS / "execute.py").execute(notebook, self.folder, self._environment)
        check_outputs(notebook)
        return notebook, {v: np.load(self.folder / f"{v}.npy") for v in values.split()}

    def rows(self, run: str, kind: str) -> list[dict[str, Any]]:
        rows = read_rows(self.folder / "runs" / run / "metrics.jsonl")
        return [row for row in rows if row["kind"] == kind]

    def spec(self, run: str) -> Any:
        return yaml.safe_load((self.folder / "runs" / run / "spec.yaml").read_text("utf-8"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("notebooks"))


@pytest.fixture(scope="module")
def quickstart(desk: Desk) -> Any:
    return desk.run("quickstart")[0]


@pytest.fixture(scope="module")
def own_reward(desk: Desk) -> Any:
    return desk.run("own_reward", "images scores")


@pytest.mark.slow
def test_quickstart(desk: Desk, quickstart: Any) -> None:
    trained = desk.rows("quickstart", "train")
    assert [row["iteration"] for row in trained] == [1, ITERATIONS]
    assert {row["log_ratio"]["gate"] for row in trained} == {0.0}
    held_out = [row["rewards"]["ocr"]["mean"] for row in desk.rows("quickstart", "eval")]
    text = printed(quickstart)
    assert f"held-out after    {ITERATIONS} iterations:  ocr {held_out[-1]:.3f}" in text
    assert f"first update, of {ITERATIONS} iterations: 0.0" in text


@pytest.mark.slow
def test_own_reward(desk: Desk, own_reward: Any) -> None:
    notebook, values = own_reward
    cells = {
        cell.id: "".join(o.get("text", "") for o in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert "my_reward:Vivid fails" in cells["check-first"]
    assert "exit status 1" in cells["check-first"]
    assert "my_reward:Vivid passes" in cells["check-second"]
    edge = np.concatenate([values["images"][:, :4], values["images"][:, -4:]], axis=1)
    colour = edge.reshape(6, -1, 3).astype(np.float64).mean(1)
    expected = (colour.max(1) - colour.min(1)) / 255
    np.testing.assert_allclose(values["scores"], expected, atol=1e-6)
    rewards = desk.spec("own-reward")["rewards"]
    assert rewards["vivid"]["reward"] == "my_reward:Vivid"
    weights = {name: reward["weight"] for name, reward in rewards.items()}
    assert weights == {"vivid": 1, "sign_colour": 0, "ocr": 0}
    trained = desk.rows("own-reward", "train")
    assert [row["reward"] == row["rewards"]["vivid"] for row in trained] == [True] * ITERATIONS


@pytest.mark.slow
def test_one_iteration(desk: Desk) -> None:
    names = "rewards advantages scale mse before after_plain after_guard all_advantages"
    stored_by_rollout = "trajectory.latents trajectory.old trajectory.log_probs"
    _, found = desk.run("one_iteration", f"{names} sigmas {stored_by_rollout}")
    assert not found["before"].any(), "the ratio is exactly 1 before the update"
    # std of flow_sde, from the formula
    sigma = found["sigmas"].astype(np.float64)
    g = 0.8 * np.sqrt(sigma[:9] / (1 - np.where(sigma[:9] == 1, sigma[1], sigma[:9])))
    np.testing.assert_allclose(found["scale"], g * np.sqrt(-np.diff(sigma)[:9]), rtol=1e-5)
    latents, means, log_probs = (found[n].astype(np.float64) for n in stored_by_rollout.split())
    error = ((latents[:, 1:] - means) ** 2).reshape(12, 9, -1).mean(2)
    density = -error / (2 * found["scale"] ** 2) - np.log(found["scale"] * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(log_probs, density, atol=1e-5)
    reward = found["rewards"].astype(np.float64)
    expected = (reward - reward.mean()) / (reward.std() + 1e-4)
    np.testing.assert_allclose(found["advantages"], expected, atol=1e-5)
    # RatioNorm of the plain ratio
    plain, guard = found["after_guard"].astype(np.float64)
    s = found["scale"][:, None]
    np.testing.assert_allclose(guard, s * plain + found["mse"] / (2 * s), atol=1e-6)
    # what the two updates taught the first steps
    learned = [
        [np.corrcoef(found["all_advantages"], of_step)[0, 1] for of_step in found[name][0]]
        for name in ("after_plain", "after_guard")
    ]
    assert np.mean(learned[1][:4]) > np.mean(learned[0][:4]) + 0.2
    assert min(learned[1]) > 0.4


def lines_of(notebook: Any) -> list[list[str]]:
    return [line.split() for line in printed(notebook).splitlines()]


@pytest.mark.slow
def test_compare_runs_of_ones_own(desk: Desk, quickstart: Any, own_reward: Any) -> None:
    notebook, _ = desk.run("compare_runs", changes={"runs/quickstart-guard": "runs/own-reward"})
    lines = lines_of(notebook)
    assert ["objective.kl.beta", "0.1", "0.02"] in lines
    assert ["rewards.vivid.weight", "-", "1.0"] in lines
    shown = {line[0] for line in lines if line and line[0].startswith(("sampling.", "model."))}
    assert not shown, "keys that agree are left out"
    for run in ("quickstart", "own-reward"):
        assert [f"{run}:", "gate", "0.0"] in lines
        images = sum(row["images"] for row in desk.rows(run, "train"))
        assert f"{run}: {ITERATIONS} iterations, {images} images".split() in lines
    assert "held-out" not in printed(notebook), "nothing was trained"


@pytest.mark.slow  # two trainings more; the cells are the same
def test_compare_runs_trains_the_two_that_it_names(tmp_path: Path) -> None:
    notebook, _ = Desk(tmp_path).run("compare_runs")
    lines = lines_of(notebook)
    assert ["objective.kind", "flow_grpo", "grpo_guard"] in lines
    assert ["objective.clip_low", "0.001", "0.0002"] in lines
    for run in ("quickstart", "quickstart-guard"):
        assert [f"{run}:", "gate", "0.0"] in lines
