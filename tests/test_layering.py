"""Imports point down only, as CONTRIBUTING.md tells: maths without a cluster, a light driver.

Read from the source with ``ast``, function-level imports included; imports under ``TYPE_CHECKING``
do not count, they are never run.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flowgrpo_ray

ROOT = Path(flowgrpo_ray.__file__).parent

# A module may import modules of lower layers only. A package (policies, rewards, cluster) is one
# entry; its files may import each other. A new module: give it the lowest layer that works.
LAYERS = [
    {"errors"},
    {"strict_json", "families", "paths", "types", "flow", "signs", "ledger", "dry_run"},
    {"loopback", "run_state", "page", "spec_cluster"},
    {"environments", "hub", "images", "spec_sections", "monitor_guard"},
    {"objective", "sampling", "rewards", "tracking", "checkpoint", "watch", "validation"},
    {"spec", "policies", "report", "weights", "calibration", "scoring"},
    {"spec_file", "prompts", "optimizer", "monitor", "bottleneck"},
    {"metrics", "preflight", "upload", "learner", "model_card", "footprint"},
    {"run_folder"},
    {"inference", "tiny_base"},
    {"cluster", "console"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

# Who may import a heavy library, at module level or anywhere.
OWNERS = {
    "ray": {"cluster"},
    "diffusers": {"policies", "tiny_base"},
    "transformers": {"policies", "tiny_base", "rewards"},
    "peft": {"policies"},
    "rapidocr": {"rewards"},
    "fastapi": {"cluster", "monitor", "monitor_guard"},
    "uvicorn": {"monitor"},
    "typer": {"cli"},
    "safetensors": {"checkpoint", "policies", "rewards", "footprint"},
    "pydantic": {"spec_cluster", "spec_sections", "spec", "spec_file", "cluster"},
    "torch": {
        *("flow", "objective", "sampling", "policies", "weights", "optimizer", "learner"),
        *("dry_run", "footprint", "inference", "tiny_base", "metrics", "cluster", "rewards"),
    },
}


def unit_of(path: Path) -> str:
    """``flow`` of flow.py, ``cluster`` of cluster/driver.py."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def runtime_imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that the code imports when it runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from runtime_imports(ast.Module(node.orelse, []))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from runtime_imports(node)


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
IMPORTS = {path: set(runtime_imports(ast.parse(path.read_text("utf-8")))) for path in FILES}


def test_every_module_has_a_layer():
    unknown = {unit_of(path) for path in FILES} - RANK.keys()
    assert not unknown, f"give {sorted(unknown)} a place in LAYERS of this file"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    unit = unit_of(path)
    for name in IMPORTS[path]:
        top, _, rest = name.partition(".")
        if top != "flowgrpo_ray":
            owners = OWNERS.get(top)
            assert owners is None or unit in owners, f"{unit} imports {top}: only {owners} may"
        elif (target := rest.partition(".")[0]) in RANK and target != unit:
            assert RANK[target] < RANK[unit], f"{unit} imports {target}, which is not below it"


def test_the_walk_finds_imports_inside_functions():
    """The test of the test: a lazy import counts, one for the type checker does not."""
    code = (
        "if TYPE_CHECKING:\n  import a\nelse:\n  import b\ndef f():\n  with x:\n    from c import d"
    )
    assert set(runtime_imports(ast.parse(code))) == {"b", "c.d"}
    assert "flowgrpo_ray.objective.has_gradient" in IMPORTS[ROOT / "metrics.py"]


@pytest.mark.parametrize(
    ("unit", "allowed"),
    [
        ("flow", set()),
        ("types", set()),
        ("errors", set()),
        ("objective", {"flow"}),
        ("sampling", {"flow", "types"}),
    ],
)
def test_the_maths_knows_nothing_of_the_rest(unit: str, allowed: set[str]):
    mine = {n.split(".")[1] for n in IMPORTS[ROOT / f"{unit}.py"] if n.startswith("flowgrpo_ray.")}
    assert mine == allowed


@pytest.mark.parametrize("unit", ["cluster/driver.py", "cluster/run.py", "cluster/session.py"])
def test_the_driver_never_touches_torch(unit: str):
    """It routes references; torch in it would cost seconds at every start."""
    assert not {name for name in IMPORTS[ROOT / unit] if name.split(".")[0] == "torch"}


HEAVY = {"torch", "ray", "diffusers", "transformers", "peft", "rapidocr", "matplotlib", "fastapi"}


@pytest.mark.parametrize(
    ("modules", "allowed"),
    [
        ("flow, objective, types, sampling, policies, learner, checkpoint, weights", {"torch"}),
        ("cluster.driver, cluster.run", {"ray", "fastapi"}),
        ("monitor", {"fastapi"}),
        (
            "cli, spec_file, prompts, preflight, metrics, run_folder, report, rewards.ocr, watch, "
            "validation, console, calibration, scoring, images, environments",
            set(),
        ),
    ],
)
def test_what_an_import_loads(modules: str, allowed: set[str]):
    """In a fresh interpreter: what third parties pull in counts as well."""
    names = ", ".join(f"flowgrpo_ray.{name}" for name in modules.split(", "))
    code = f"import {names}, sys, json; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(run.stdout)}
    assert loaded & HEAVY <= allowed
