"""Environments of their own: a real overlay, what python_of finds wrong, the commands."""

import importlib.metadata
import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from overlays import build_or_skip
from packaging.requirements import Requirement

import flowgrpo_ray
from flowgrpo_ray.common.errors import RewardEnvironmentError
from flowgrpo_ray.rewards import environment_build, environments

OLDER = "1.16.0"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the overlay `older`, that two callers wanted to build at once."""
    folder = tmp_path_factory.mktemp("environments")
    assert importlib.metadata.version("six") != OLDER
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv(environments.FOLDER_VARIABLE, str(folder))
        jobs = [pool.submit(build_or_skip, "older", f"six=={OLDER}") for _ in range(2)]
        assert jobs[0].result() == jobs[1].result()
    assert sorted(path.name for path in folder.iterdir()) == [".older.lock", "older"]
    return folder


@pytest.fixture
def older(built, tmp_path, monkeypatch):
    """A copy of that folder to spoil; its overlay."""
    shutil.copytree(built, tmp_path / "copy", symlinks=True)
    monkeypatch.setenv(environments.FOLDER_VARIABLE, str(tmp_path / "copy"))
    return tmp_path / "copy" / "older"


def in_overlay(code: str) -> str:
    run = subprocess.run(
        [environments.python_of("older"), "-I", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_an_overlay_sees_its_own_version_and_all_of_the_base(older):
    names = ["six", "torch", "ray", "flowgrpo_ray", "numpy"]
    code = f"""
import importlib.util, json, pickle, sys, numpy, six
places = {{name: importlib.util.find_spec(name).origin for name in {names}}}
array = pickle.loads(bytes.fromhex("{pickle.dumps(np.arange(6.0).reshape(2, 3)).hex()}"))
print(json.dumps([places, six.__version__, sys.prefix, pickle.dumps(array * 2).hex()]))
"""
    places, version, prefix, doubled = json.loads(in_overlay(code))
    assert version == OLDER
    assert Path(prefix) == older
    assert Path(places.pop("six")).is_relative_to(older)
    assert places["flowgrpo_ray"] == flowgrpo_ray.__file__  # of an editable install too
    assert all(Path(places[name]).is_relative_to(sys.prefix) for name in ("torch", "ray", "numpy"))
    np.testing.assert_array_equal(pickle.loads(bytes.fromhex(doubled)), [[0, 2, 4], [6, 8, 10]])


def test_only_what_differs_is_installed_and_written_down(older):
    manifest = environments.read_manifest("older")
    assert manifest is not None
    assert manifest.kind == "overlay"
    assert manifest.requirements == [f"six=={OLDER}"]
    assert manifest.packages == {"six": OLDER}
    assert manifest.base == sys.prefix
    for name in ("ray", "numpy", "pydantic"):
        assert manifest.shared[name] == importlib.metadata.version(name)


def test_python_of_is_its_python(older):
    assert environments.python_of("older") == str(older / "bin" / "python")


def change(**fields):
    def apply(folder: Path) -> None:
        file = folder / environments.MANIFEST
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return apply


def lose_python(folder: Path) -> None:
    (folder / "bin" / "python").unlink()


def lose_its_target(folder: Path) -> None:
    lose_python(folder)
    (folder / "bin" / "python").symlink_to("/nowhere/python")


def lose_the_right_to_run(folder: Path) -> None:
    lose_python(folder)
    (folder / "bin" / "python").write_text("#!/bin/sh\n")


def lose_the_package(folder: Path) -> None:
    (info,) = folder.glob("lib/*/site-packages/six-*.dist-info")
    shutil.rmtree(info)


BASE = {"ray": "2.1.0"}
BREAKAGES = {
    "no folder": (shutil.rmtree, r"not built: there is no folder .*older\. Build it: .*--requirem"),
    "no manifest": (lambda f: (f / environments.MANIFEST).unlink(), "not built to its end"),
    "half a manifest": (
        lambda f: (f / environments.MANIFEST).write_text('{"kind": "over'),
        "not built to its end",
    ),
    "a manifest of something else": (
        lambda f: (f / environments.MANIFEST).write_text('{"a": 1}'),
        "not built to its end",
    ),
    "no python": (lose_python, "bin/python is missing"),
    "python leads nowhere": (lose_its_target, "leads to no program"),
    "python cannot run": (lose_the_right_to_run, "leads to no program"),
    "another python": (change(python="3.9"), r"built for Python 3\.9, and this is 3\.1"),
    "another base": (change(base="/old"), "built over /old, and this program runs in"),
    "another ray": (change(shared=BASE), r"over ray 2\.1\.0, and the base now has 2\.\d+"),
    "the base lost a package": (change(shared={"gone": "1"}), "over gone 1, .* now has none"),
    "a package is gone": (lose_the_package, rf"its package six {OLDER} is gone"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_what_is_wrong_is_said_with_the_command_that_repairs_it(older, breakage):
    spoil, message = BREAKAGES[breakage]
    spoil(older)
    with pytest.raises(RewardEnvironmentError, match=rf"environment 'older': .*{message}") as error:
        environments.python_of("older")
    assert "flowgrpo-ray rewards env build older" in str(error.value)


def test_a_broken_environment_is_built_again_from_its_manifest(older):
    lose_the_package(older)
    manifest = environment_build.build("older")
    assert manifest.packages == {"six": OLDER}
    assert environments.python_of("older")


def test_a_build_that_fails_leaves_what_is_there(older):
    before = environments.read_manifest("older")
    with pytest.raises(RewardEnvironmentError, match=r"older.*uv pip compile failed"):
        environment_build.build("older", ["six==0.0.0.1"], rebuild=True)
    with pytest.raises(RewardEnvironmentError, match=f"with six=={OLDER}; to replace it add --reb"):
        environment_build.build("older", ["six"])
    assert environments.read_manifest("older") == before
    assert environments.python_of("older")


@pytest.mark.parametrize("requirement", ["ray==2.40.0", "torch<2.5", "numpy<2", "pydantic<2"])
def test_what_an_actor_could_not_live_with_is_refused(built, requirement):
    base = environments.packages_in(environments.base_sites())
    with pytest.raises(RewardEnvironmentError, match="No solution found"):
        environment_build._resolve("probe", [requirement], base)


def test_versions_stay_near_to_the_bases_and_at_the_pins(built, tmp_path, monkeypatch):
    assert f"six=={OLDER}" in environment_build._resolve("probe", ["six"], {"six": OLDER})
    assert environment_build._resolve("probe", ["six"], {}) != [f"six=={OLDER}"]
    monkeypatch.setitem(environments.BUILTIN, "probe", environments.BuiltIn("standalone"))
    monkeypatch.setattr(environment_build, "PINS", tmp_path)
    (tmp_path / "probe.txt").write_text(f"six=={OLDER}\n")
    assert environment_build._resolve("probe", ["six"], {}) == [f"six=={OLDER}"]


def test_of_two_copies_of_a_package_the_first_is_seen(tmp_path):
    for name in ("first/Some_Thing-1.0", "second/some_thing-2.0", "second/other-3.0+cu1"):
        (tmp_path / f"{name}.dist-info").mkdir(parents=True)
    sites = [tmp_path / part for part in ("first", "nowhere", "second")]
    assert environments.packages_in(sites) == {"some-thing": "1.0", "other": "3.0+cu1"}


def test_what_cannot_be_imported_is_no_environment():
    with pytest.raises(RewardEnvironmentError, match=r"(?s)at import ray, no_such_module:.*No mod"):
        environment_build._try("older", Path(sys.executable), ("ray", "no_such_module"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(environments.FOLDER_VARIABLE, str(tmp_path / "file" / "x"))
    with pytest.raises(RewardEnvironmentError, match=r"file/x, .*another folder: FLOWGRPO_ENV"):
        environment_build.build("older", ["six"])


def test_a_standalone_environment_has_nothing_of_the_base(built, tmp_path, monkeypatch):
    monkeypatch.setenv(environments.FOLDER_VARIABLE, str(tmp_path))
    environment_build.build("alone", ["six"], standalone=True)
    python = environments.python_of("alone")
    code = "import six, importlib.util as u; print(*map(u.find_spec, ['ray', 'flowgrpo_ray']))"
    run = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["None", "None"]
    change(base="/old", python=environments.python_version())(tmp_path / "alone")
    assert environments.python_of("alone") == python  # nothing of the base, so any will do


@pytest.mark.parametrize("name", environments.BUILTIN)
def test_built_in_environments_resolve_to_their_pins(built, name):
    """The pins are complete, agree with the extra, and need nothing that is not pinned."""
    pins = (environment_build.PINS / f"{name}.txt").read_text().splitlines()
    wanted = [requirement for _, requirement in environment_build._requires(name)]
    assert environment_build._resolve(name, wanted, {}) == pins
    versions = dict(pin.split("==") for pin in pins)
    assert versions[name] in Requirement(wanted[0]).specifier
    assert "paddlepaddle" not in versions


def test_the_base_holds_no_built_in_environment():
    for name in (*environments.BUILTIN, "paddlepaddle", "opencv-contrib-python"):
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)


@pytest.fixture
def run(monkeypatch, command_line):
    """`run("list") -> (status, output)` of `flowgrpo-ray rewards env ...`."""
    monkeypatch.setattr("flowgrpo_ray.cli.rewards_env.console.width", 200)

    def call(*arguments):
        status, out, err = command_line("rewards", "env", *arguments)
        return status, " ".join((out + err).split())

    return call


def test_commands_build_list_and_remove(older, run, tmp_path):
    file = tmp_path / "wanted.txt"
    file.write_text(f"# a comment\n\nsix=={OLDER}  # old\n")
    status, out = run("build", "older", "--requirements", file)
    assert status == 0
    assert "older: overlay, 1 packages of its own" in out
    assert out.endswith(str(older / "bin" / "python"))
    status, out = run("list")
    assert "older overlay 3.1" in out
    assert "MiB ok" in out
    assert "sglang - - - it is not built" in out
    lose_python(older)
    assert "is missing" in run("list")[1]
    assert run("remove", "older") == (0, "older removed")
    assert not older.exists()
    assert "older overlay" not in run("list")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "mine"], "'mine' is not built in (paddleocr, sglang are): say what to install"),
        (["build", "../x", "--requirement", "six"], "a name is made of small letters"),
        (["build", "sglang", "--requirement", "six"], "'sglang' is built in"),
        (["build", "paddleocr", "--standalone"], "'paddleocr' is built in"),
        (
            ["build", "mine", "--requirements", "nowhere.txt"],
            "nowhere.txt: cannot be read: No such",
        ),
        (["remove", "mine"], "'mine': there is no folder"),
    ],
)
def test_mistakes_end_in_one_message(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv(environments.FOLDER_VARIABLE, str(tmp_path))
    status, out = run(*arguments)
    assert status == 2
    assert message in out
    assert "Traceback" not in out
