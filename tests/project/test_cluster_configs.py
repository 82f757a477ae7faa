"""`cluster_configs/` but for Kubernetes: launcher, machines by hand, images, Prometheus, docs."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from flowgrpo_ray import cli
from flowgrpo_ray.common import configs
from flowgrpo_ray.rewards.environments import BUILTIN
from flowgrpo_ray.serving.admin import read_config
from flowgrpo_ray.serving.args import RewardServiceArgs, args_of
from flowgrpo_ray.spec.file import load_spec

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "cluster_configs"
CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
FILES = [p for p in sorted(CONFIGS.rglob("*")) if p.is_file() and p.suffix != ".pyc"]
PAGE = (ROOT / "docs" / "cluster.md").read_text("utf-8")
LAUNCHER: dict[str, Any] = yaml.safe_load((CONFIGS / "on-premise.yaml").read_text("utf-8"))
PROJECT_FILE = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PROJECT_FILE["project"]
IMAGE = f"registry.example.com/flowgrpo-ray:{PROJECT['version']}"


# --- the launcher


def test_rays_own_validator_takes_the_launcher_file():
    config = prepare_config(copy.deepcopy(LAUNCHER))
    validate_config(config)
    (node,) = config["available_node_types"].values()
    assert (node["min_workers"], config["max_workers"]) == (3, 3)
    with pytest.raises(jsonschema.ValidationError, match="head_start_ray_comands"):
        validate_config(prepare_config(LAUNCHER | {"head_start_ray_comands": []}))


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with a program `ray` that prints its arguments as JSON."""
    ray = tmp_path / "ray"
    ray.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    ray.chmod(0o755)
    return tmp_path


def run_on(machine: Path, name: str, command: str) -> list[str]:
    """What `ray` is called with by a start command of the launcher on the machine `name`."""
    (machine / "hostname").write_text(f"#!/bin/sh\necho {name}\n")
    (machine / "hostname").chmod(0o755)
    variables = {"RAY_HEAD_IP": "10.0.0.10", "PATH": f"{machine}:/usr/bin:/bin"}
    return json.loads(subprocess.check_output(["bash", "-c", command], env=variables))


@pytest.mark.parametrize(
    ("name", "resource"),
    [("learner-1", "learner_node"), ("rollout7", "rollout_node"), ("cpu-box", "reward_node")],
)
def test_a_machine_offers_what_its_name_says(machine: Path, name: str, resource: str):
    stop, command = LAUNCHER["worker_start_ray_commands"]
    assert run_on(machine, name, stop) == ["stop"]
    program, *arguments = run_on(machine, name, command)
    assert program == "start"
    options = start.make_context("start", arguments).params
    assert json.loads(options["resources"]) == {resource: 1}
    assert options["address"] == "10.0.0.10:6379"
    assert not options["head"]


def test_the_head_has_a_dashboard_that_others_reach_and_no_gpu(machine: Path):
    stop, command = LAUNCHER["head_start_ray_commands"]
    assert run_on(machine, "head", stop) == ["stop"]
    program, *arguments = run_on(machine, "head", command)
    options = start.make_context(program, arguments).params
    assert (options["head"], options["port"], options["num_gpus"]) == (True, 6379, 0)
    assert options["dashboard_host"] == "0.0.0.0"
    assert options["autoscaling_config"]


def test_the_environment_of_nodes_can_be_sourced():
    command = f"source {CONFIGS / 'cluster.env'} && env"
    path = {"PATH": "/usr/bin:/bin"}
    printed = subprocess.check_output(["bash", "-c", command], env=path, text=True)
    found = dict(line.split("=", 1) for line in printed.splitlines())
    assert found["PATH"] == "/shared/flowgrpo_ray/.venv/bin:/usr/bin:/bin"
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["RAY_JOB_STOP_WAIT_TIME_S"] == "600"
    assert found["FLOWGRPO_RUNS"] == "/shared/runs"
    assert found[CALLBACK] == os.environ[CALLBACK], "as a run that starts its own Ray sets it"
    dockerfile = (CONFIGS / "docker" / "Dockerfile").read_text()
    assert f"ENV {CALLBACK}={os.environ[CALLBACK]}\n" in dockerfile


def test_the_token_is_copied_to_every_machine():
    assert LAUNCHER["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_variables_are_those_that_the_program_reads():
    sources = "".join(p.read_text("utf-8") for p in (ROOT / "flowgrpo_ray").rglob("*.py"))
    for path in FILES:
        if path.suffix != ".json":
            for name in re.findall(r"\bFLOWGRPO_\w+", path.read_text("utf-8")):
                assert f'"{name}"' in sources, f"{path.name}: {name}"


# --- spec and rewards


def test_deployed_rewards_are_those_that_the_spec_asks_for():
    spec = load_spec(str(CONFIGS / "sd35-ocr.yaml"))
    served = {}
    for application in read_config(CONFIGS / "rewards.yaml")["applications"]:
        args = RewardServiceArgs.model_validate(application["args"])
        served[args.name] = args
        (deployment,) = application["deployments"]
        assert deployment["num_replicas"] == spec.rewards[args.name].replicas
    assert served.keys() == spec.rewards.keys()
    for name, args in served.items():
        asked = args_of(name, spec.rewards[name])
        assert args.identity == asked.identity
        assert (args.cpus, args.gpus, args.resources) == (asked.cpus, asked.gpus, asked.resources)


def test_the_spec_is_the_recipe_with_places():
    spec, recipe = load_spec(str(CONFIGS / "sd35-ocr.yaml")), load_spec("sd35-ocr-4gpu")
    assert spec.essence() == recipe.essence()
    assert (spec.cluster.rollout.count, spec.cluster.learner.count) == (2, 2)


# --- images

DOCKERFILES = sorted(
    path for path in (CONFIGS / "docker").glob("Dockerfile*") if path.suffix != ".dockerignore"
)


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, its text), comments and line ends taken out."""
    text = re.sub(r"^#.*\n", "", path.read_text("utf-8"), flags=re.M).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(name, rest) for name, rest in lines]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_a_linter_takes_the_dockerfiles(path: Path):
    hadolint = Path(sys.executable).parent / "hadolint"
    run = subprocess.run([hadolint, path], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_what_dockerfiles_copy_is_there_and_sent(path: Path):
    ignored = (CONFIGS / "docker" / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = [shlex.split(text)[:-1] for name, text in instructions(path) if name == "COPY"]
    sources = {source for each in copied for source in each}
    assert all((ROOT / source).exists() for source in sources)
    assert sources == (sent if path.name == "Dockerfile" else set())
    # A wheel is built from what is copied.
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= sent


def test_the_wheel_has_the_files_and_writes_them(
    tmp_path: Path, command_line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, from where the wheel has them as from a checkout; over none that is there."""
    included = PROJECT_FILE["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    place = configs.IN_WHEEL.relative_to(configs.PACKAGE.parent)
    assert included == {name: (place / name).as_posix() for name in configs.FOLDERS}
    listed = ["git", "ls-files", "-z", *configs.FOLDERS]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True)
    tracked = {name: (ROOT / name).read_bytes() for name in files.stdout.split("\0") if name}
    installed = tmp_path / "installed"
    for folder in (tmp_path / "one", tmp_path / "two"):
        status, out, _ = command_line("configs", folder)
        assert (status, f"{len(tracked)} files written" in out) == (0, True)
        found = [path for path in folder.rglob("*") if path.is_file()]
        assert {str(p.relative_to(folder)): p.read_bytes() for p in found} == tracked
        shutil.copytree(folder, installed, dirs_exist_ok=True)
        monkeypatch.setattr(configs, "IN_WHEEL", installed)
    mine = tmp_path / "one" / "deployments" / "ocr.yaml"
    mine.write_text("mine")
    (tmp_path / "one" / "deployments" / "all.yaml").unlink()
    status, _, message = command_line("configs", tmp_path / "one")
    assert (status, "exist; give another folder" in message.replace("\n", " ")) == (2, True)
    assert not (tmp_path / "one" / "deployments" / "all.yaml").exists()
    assert mine.read_text() == "mine"
    assert command_line("configs", tmp_path / "one", "--overwrite")[0] == 0
    assert mine.read_bytes() == tracked["deployments/ocr.yaml"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_commands_in_dockerfiles_are_real(path: Path):
    built = []
    for name, text in instructions(path):
        if name == "RUN" and text.startswith("flowgrpo-ray "):
            words = shlex.split(text)[1:]
            command: Any = typer.main.get_command(cli.app)
            while hasattr(command, "commands"):
                command = command.commands[words.pop(0)]
            built.append(command.make_context(command.name, words).params["name"])
    kind = path.suffix.removeprefix(".")
    assert built == ([kind] if kind else [])
    assert set(built) <= BUILTIN.keys()


def test_images_agree_with_the_package():
    base = dict(instructions(CONFIGS / "docker" / "Dockerfile"))
    found = re.match(r"python:3\.(\d+)-", base["FROM"])
    assert found
    lowest, below = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    assert int(lowest) <= int(found[1]) < int(below)
    for path in DOCKERFILES[1:]:
        parts = dict(instructions(path))
        assert (parts["ARG"], parts["FROM"]) == (f"BASE={IMAGE}", "${BASE}")
    for path in FILES:
        for image in re.findall(r"registry\.example\.com/\S+", path.read_text("utf-8")):
            name, _, version = image.rpartition(":")
            suffix = name.removeprefix("registry.example.com/flowgrpo-ray").lstrip("-")
            assert suffix in ("", *BUILTIN), image
            assert version == PROJECT["version"], image


# --- Prometheus, docs


def test_prometheus_takes_its_config_and_reads_rays_list_of_nodes():
    path = CONFIGS / "prometheus.yaml"
    (job,) = yaml.safe_load(path.read_text("utf-8"))["scrape_configs"]
    (files,) = job["file_sd_configs"]
    assert files == {"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    run = subprocess.run(
        [promtool, "check", "config", path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_page_names_every_config_and_no_other():
    named = set(re.findall(r"cluster_configs/([\w./-]*\w)", PAGE))
    there = {
        str(path.relative_to(CONFIGS))
        for path in FILES
        if path.parent.name != "grafana" and path.suffix != ".dockerignore"
    }
    folders = {"docker", "grafana", "kuberay"}
    assert named - folders == there
    assert all((CONFIGS / folder).is_dir() for folder in folders)
