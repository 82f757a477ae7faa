"""Imports point down only, wing by wing: maths without a cluster, a light driver.

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

# A wing imports from itself and from the rows above its own, as docs/architecture.md draws them.
ORDER = [
    {"common"},
    {"rewards", "algorithm/objectives"},
    {"spec", "tiny"},
    {"policies"},
    {"algorithm"},
    {"run", "estimate"},
    {"view", "serving"},
    {"cluster"},
    {"cli"},
    {"__main__"},
]
RANK = {wing: rank for rank, wings in enumerate(ORDER) for wing in wings}

# Who may import a heavy library, at module level or in a function: wings, or single files.
OWNERS = {
    "ray": {"serving", "cluster"},
    "torch": {
        "algorithm",
        "policies",
        "tiny",
        "estimate",
        "rewards",
        "run/inference",
    }
    | {"cluster/actors", "cluster/learner_group"},
    "diffusers": {"policies", "tiny"},
    "transformers": {"policies", "tiny", "rewards"},
    "peft": {"policies"},
    "rapidocr": {"rewards"},
    "safetensors": {"policies", "rewards", "run/checkpoint", "estimate/footprint"},
    "pydantic": {"common/strict", "rewards", "algorithm/objectives", "spec", "serving"},
    "fastapi": {"view/monitor", "view/guard", "serving/http"},
    "uvicorn": {"view/monitor"},
    "matplotlib": {"rewards/signs"},
    "typer": {"cli"},
    "rich": {"cli", "view"},
}
LONGEST_FILE, LONGEST_FUNCTION = 350, 60  # lines


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


def name_of(path: Path) -> str:
    """``cluster/driver`` of its file."""
    return path.relative_to(ROOT).with_suffix("").as_posix()


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT}
IMPORTS = {
    name: set(runtime_imports(ast.parse(path.read_text("utf-8")))) for name, path in FILES.items()
}


def module_of(imported: str) -> str | None:
    """The file of the package that ``a.b.name`` comes from; a wing's own is its ``__init__``."""
    parts = imported.split(".")[1:]
    for end in (len(parts), len(parts) - 1):
        for name in ("/".join(parts[:end]), "/".join([*parts[:end], "__init__"])):
            if name in FILES:
                return name
    return None


def wing_of(name: str) -> str | None:
    """The wing that a file, or a name below the package, belongs to."""
    wings = sorted(RANK, reverse=True)  # the longer of two names first
    return next((wing for wing in wings if f"{name}/".startswith(f"{wing}/")), None)


def test_the_package_is_its_wings():
    assert {p.name for p in ROOT.iterdir() if p.name != "__pycache__"} == {
        *(wing.partition("/")[0] for wing in RANK if wing != "__main__"),
        *("recipes", "__init__.py", "__main__.py", "py.typed"),
    }


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name: str):
    wing = wing_of(name)
    assert wing is not None
    for imported in IMPORTS[name]:
        top, _, rest = imported.partition(".")
        if top != "flowgrpo_ray":
            owners = OWNERS.get(top)
            assert not owners or {wing, name} & owners, f"{name} imports {top}: only {owners} may"
        elif (target := wing_of(rest.replace(".", "/"))) and target != wing:
            assert RANK[target] < RANK[wing], f"{name} imports {target}, which is not below it"


def test_no_file_imports_itself_in_a_circle():
    below: dict[str, set[str]] = {
        name: {m for i in imports if (m := module_of(i)) and m != name}
        for name, imports in IMPORTS.items()
    }
    while leaves := [name for name, targets in below.items() if not targets & below.keys()]:
        for leaf in leaves:
            del below[leaf]
    assert not below, f"import circles among {sorted(below)}"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_short(name: str):
    text = FILES[name].read_text("utf-8")
    assert text.count("\n") <= LONGEST_FILE
    long = {
        node.name: length
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
    }
    assert not long


@pytest.mark.parametrize("wing", sorted(RANK.keys() - {"__main__"}))
def test_every_wing_says_what_it_is_for(wing: str):
    assert ast.get_docstring(ast.parse(FILES[f"{wing}/__init__"].read_text("utf-8")))


def test_the_walk_finds_imports_inside_functions():
    """The test of the test: a lazy import counts, one for the type checker does not."""
    code = (
        "if TYPE_CHECKING:\n  import a\nelse:\n  import b\ndef f():\n  with x:\n    from c import d"
    )
    assert set(runtime_imports(ast.parse(code))) == {"b", "c.d"}
    assert "flowgrpo_ray.algorithm.advantages.has_gradient" in IMPORTS["run/metrics"]
    assert module_of("flowgrpo_ray.algorithm.advantages.has_gradient") == "algorithm/advantages"
    assert module_of("flowgrpo_ray.policies.load_policy") == "policies/__init__"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("common/types", set()),
        ("common/errors", set()),
        ("algorithm/advantages", set()),
        ("algorithm/objectives/surrogate", set()),
        ("algorithm/flow", {"algorithm/objectives/surrogate"}),
        ("algorithm/objectives/base", {"common/strict", "common/types"}),
        (
            "algorithm/sampling",
            {"algorithm/flow", "algorithm/objectives/noised", "algorithm/objectives/steps"}
            | {"algorithm/solvers", "common/types"},
        ),
    ],
)
def test_the_maths_knows_nothing_of_the_rest(name: str, allowed: set[str]):
    assert {module for i in IMPORTS[name] if (module := module_of(i))} == allowed


HEAVY = {"torch", "ray", "ray.serve", "diffusers", "transformers", "peft"}
HEAVY |= {"rapidocr", "matplotlib", "fastapi"}


@pytest.mark.parametrize(
    ("modules", "allowed"),
    [
        (
            "algorithm, algorithm.sampling, algorithm.learner, policies.base, run.checkpoint",
            {"torch"},
        ),
        ("cluster.driver, cluster.run", {"ray", "ray.serve", "fastapi"}),
        ("cluster.colocated", {"ray"}),
        ("view.monitor", {"fastapi"}),
        (
            "cli, common.images, rewards.ocr, rewards.calibration, rewards.environments, spec, "
            "policies.hub, run.folder, run.metrics, run.watch, run.validation, run.scoring, "
            "estimate.preflight, view.console, view.report, tiny",
            set(),
        ),
    ],
)
def test_what_an_import_loads(modules: str, allowed: set[str]):
    """In a fresh interpreter: what third parties pull in counts as well."""
    names = ", ".join(f"flowgrpo_ray.{name}" for name in modules.split(", "))
    code = f"import {names}, sys, json; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY.intersection(json.loads(run.stdout)) <= allowed
