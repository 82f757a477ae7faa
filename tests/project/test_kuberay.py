"""`cluster_configs/kuberay/`: fields, pods, resources, what a run there needs, its end.

There is no Kubernetes here. Fields are held against the tables below, which list what the manifests
use of KubeRay 1.5.1's API, and pods against the published schema of Kubernetes.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clusters
import kubernetes_validate
import pytest
import typer
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient
from scripts import load_script
from waiting import PATIENCE_S, wait_until

from flowgrpo_ray import cli
from flowgrpo_ray.estimate.preflight import check_run
from flowgrpo_ray.rewards import build
from flowgrpo_ray.serving.admin import read_config
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.training import TrainingSpec, required_resources

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "cluster_configs"
PAGE = (ROOT / "docs" / "cluster.md").read_text("utf-8")
FILES = {path.stem: path for path in (CONFIGS / "kuberay").glob("*.yaml")}
MANIFESTS: dict[str, Any] = {
    name: yaml.safe_load(path.read_text("utf-8")) for name, path in FILES.items()
}
POD = "a pod's template"  # checked against the schema of Kubernetes
TEXTS = {str: str}
GROUP = {"rayStartParams": TEXTS, "template": POD}
WORKERS = GROUP | {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}
CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": str},
    "headGroupSpec": GROUP,
    "workerGroupSpecs": [WORKERS],
}
KUBERAY = {
    "RayCluster": CLUSTER,
    "RayService": {"serveConfigV2": str, "rayClusterConfig": CLUSTER},
    "RayJob": {
        "entrypoint": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": CLUSTER,
    },
}


def problems(value: Any, table: Any, where: str) -> Iterator[str]:
    """Where ``value`` has a field or a type that ``table`` has not, or lacks one."""
    if table == POD:
        try:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | value
            kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{where}.{'.'.join(map(str, error.path))}: {error.message}"
    elif isinstance(table, list):
        for i, item in enumerate(value):
            yield from problems(item, table[0], f"{where}[{i}]")
    elif table is TEXTS:
        if not all(isinstance(part, str) for pair in value.items() for part in pair):
            yield f"{where}: not texts only: {value}"
    elif isinstance(table, dict):
        if value.keys() != table.keys():
            yield f"{where}: {sorted(value.keys() ^ table.keys())}"
        for key in value.keys() & table.keys():
            yield from problems(value[key], table[key], f"{where}.{key}")
    elif type(value) is not table:
        yield f"{where}: {value!r} is no {table.__name__}"


def cluster_of(name: str) -> dict[str, Any]:
    spec = MANIFESTS[name]["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def groups_of(name: str) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(name, group, pods) of the head and of each worker group."""
    cluster = cluster_of(name)
    yield "head", cluster["headGroupSpec"], 1
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group, group["replicas"]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


def variables(group: dict[str, Any]) -> dict[str, Any]:
    """Value, or [secret, key], of each environment variable."""
    found = {}
    for entry in container(group)["env"]:
        secret = entry.get("valueFrom", {}).get("secretKeyRef", {})
        found[entry["name"]] = entry.get("value") or [secret["name"], secret["key"]]
    return found


CLUSTERS = ("raycluster", "rayjob", "rayservice")
each_cluster = pytest.mark.parametrize("name", CLUSTERS)


@each_cluster
def test_fields_are_kuberays_and_kubernetes(name: str):
    manifest = MANIFESTS[name]
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert not list(problems(manifest["spec"], KUBERAY[manifest["kind"]], "spec"))


def test_a_wrong_field_or_type_is_found():
    spec = json.loads(json.dumps(MANIFESTS["rayjob"]["spec"]))
    spec["entryPoint"] = spec.pop("entrypoint")
    spec["backoffLimit"] = "3"
    group = spec["rayClusterSpec"]["workerGroupSpecs"][1]
    group["rayStartParams"]["num-cpus"] = 0
    group["template"]["spec"]["gracePeriod"] = 1
    found = "\n".join(problems(spec, KUBERAY["RayJob"], "spec"))
    assert "spec: ['entryPoint', 'entrypoint']" in found
    assert "spec.backoffLimit: '3' is no int" in found
    assert "spec.rayClusterSpec.workerGroupSpecs[1].rayStartParams: not texts only" in found
    assert "workerGroupSpecs[1].template.spec: " in found
    assert found.count("\n") == 3


def test_names_are_short_enough_for_what_kuberay_makes_of_them():
    for name in CLUSTERS:
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", MANIFESTS[name]["metadata"]["name"])
        assert len(MANIFESTS[name]["metadata"]["name"]) <= 41


def test_the_claim_is_kubernetes_and_that_of_every_pod():
    claim = MANIFESTS["storage"]
    kubernetes_validate.validate(claim, kubernetes_validate.latest_version(), strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name in CLUSTERS:
        for _, group, _ in groups_of(name):
            (volume,) = group["template"]["spec"]["volumes"]
            named = volume["persistentVolumeClaim"]["claimName"]
            assert named == claim["metadata"]["name"]
            (mount,) = container(group)["volumeMounts"]
            assert mount == {"name": volume["name"], "mountPath": "/shared"}


@each_cluster
def test_every_node_is_the_same_program_with_a_token(name: str):
    pins = dict(re.findall(r"(.*)==(.*)", (ROOT / "constraints.txt").read_text("utf-8")))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    cluster = cluster_of(name)
    assert cluster["rayVersion"] == pins["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    described = [(container(group)["image"], variables(group)) for _, group, _ in groups_of(name)]
    assert all(one == described[0] for one in described)
    image, found = described[0]
    assert image == f"registry.example.com/flowgrpo-ray:{project['version']}"
    assert "RAY_AUTH_TOKEN" not in found, "KubeRay sets it"
    if name != "rayservice":
        assert found["FLOWGRPO_RUNS"] == "/shared/runs"
    for secret, key in (value for value in found.values() if isinstance(value, list)):
        (created,) = re.findall(rf"create secret generic {secret} (.*)", PAGE)
        assert f"--from-literal={key}=" in created
        assert secret != MANIFESTS[name]["metadata"]["name"], "KubeRay's own secret has that name"


# --- resources


def node_of(name: str, group: dict[str, Any]) -> dict[str, float]:
    """What a pod of a group offers to Ray: `ray start` counts limits where it is not told."""
    limits, params = container(group)["resources"]["limits"], group["rayStartParams"]
    node = {
        "CPU": float(params.get("num-cpus", limits["cpu"])),
        "GPU": float(params.get("num-gpus", limits.get("nvidia.com/gpu", 0))),
    }
    if "resources" in params:  # KubeRay writes it into a command for bash, as it stands
        printed = subprocess.check_output(["bash", "-c", f"printf %s {params['resources']}"])
        node |= json.loads(printed)
    return node


def run_of(name: str) -> TrainingSpec:
    """The spec that is trained on this cluster."""
    spec = str(CONFIGS / "sd35-ocr.yaml")
    return load_spec(spec, options()["overrides"] if name == "rayjob" else ())


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_a_cluster_has_room_for_the_run(name: str):
    spec = run_of(name)
    total: dict[str, float] = {}
    for _, group, pods in groups_of(name):
        for resource, amount in node_of(name, group).items():
            total[resource] = total.get(resource, 0) + pods * amount
    for resource, needed in required_resources(spec).items():
        assert needed <= total[resource], resource
    kinds = [(spec.cluster.rollout.count, spec.cluster.rollout)]
    kinds += [(spec.cluster.learner.count, spec.cluster.learner)]
    kinds += [(reward.replicas, reward) for reward in spec.rewards.values()]
    left = [node_of(name, group) for _, group, pods in groups_of(name) for _ in range(pods)]
    for count, kind in kinds:
        needed = {"CPU": kind.cpus, "GPU": kind.gpus, **kind.resources}
        for _ in range(count):
            node = next(n for n in left if all(n.get(k, 0) >= v for k, v in needed.items()))
            node |= {key: node[key] - value for key, value in needed.items() if value}


@each_cluster
def test_roles_are_the_names_of_the_groups(name: str):
    for group_name, group, _ in groups_of(name):
        roles = node_of(name, group).keys() - {"CPU", "GPU"}
        expected = {"reward_node"} if name == "rayjob" else set()
        if group_name != "head":
            expected = {f"{group_name.removesuffix('s')}_node"}
        assert roles == expected


# --- the service and the job


def service(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "rewards.yaml"
    path.write_text(MANIFESTS["rayservice"]["spec"]["serveConfigV2"], "utf-8")
    return read_config(path)


def test_the_service_has_the_rewards_of_the_other_file_and_a_token(tmp_path: Path):
    config, other = service(tmp_path), read_config(CONFIGS / "rewards.yaml")
    assert config["applications"] == other["applications"]
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000}
    assert config["proxy_location"] == "EveryNode"
    for _, group, _ in groups_of("rayservice"):
        assert "FLOWGRPO_REWARD_TOKEN" in variables(group)
        ports = {port["name"]: port["containerPort"] for port in container(group)["ports"]}
        assert ports["serve"] == 8000
    needed = [a["args"] for a in config["applications"]]
    (_, group, pods) = list(groups_of("rayservice"))[1]
    node = node_of("rayservice", group)
    replicas = {
        a["args"]["name"]: a["deployments"][0]["num_replicas"] for a in other["applications"]
    }
    assert sum(args["cpus"] * replicas[args["name"]] for args in needed) <= pods * node["CPU"]
    assert sum(args.get("gpus", 0) * replicas[args["name"]] for args in needed) <= node["GPU"]


def options() -> dict[str, Any]:
    """The parsed command of the RayJob."""
    program, name, *arguments = shlex.split(MANIFESTS["rayjob"]["spec"]["entrypoint"])
    assert (program, name) == ("flowgrpo-ray", "train")
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    return command.make_context(name, arguments).params


def test_the_command_of_the_job_trains_the_spec(tmp_path: Path):
    given = options()
    assert given["resume"], "a job that is tried again goes on"
    folder = Path("/shared/sd35-ocr")
    assert given["spec"] == str(folder / "sd35-ocr.yaml")
    assert f"{folder}/" in PAGE, "the page says what must be copied there"
    overrides = dict(text.split("=", 1) for text in given["overrides"])
    plain = load_spec(str(CONFIGS / "sd35-ocr.yaml")).prompts
    for key in ("train", "evaluate"):
        assert overrides[f"prompts.{key}"] == str(folder / getattr(plain, key))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f'a sign "{n}"\n' for n in range(2000)))
    overrides |= {"prompts.train": str(prompts), "prompts.evaluate": str(prompts)}
    check_run(load_spec(str(CONFIGS / "sd35-ocr.yaml"), [f"{k}={v}" for k, v in overrides.items()]))


def test_the_job_calls_the_service_with_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = MANIFESTS["rayservice"]["metadata"]["name"]
    config = service(tmp_path)
    routes = {a["args"]["name"]: a["route_prefix"] for a in config["applications"]}
    host = f"http://{name}-serve-svc:{config['http_options']['port']}"
    monkeypatch.setenv("FLOWGRPO_REWARD_TOKEN", "t")
    for reward_name, reward in run_of("rayjob").rewards.items():
        assert reward.reward == "http"
        assert reward.options["url"] == host + routes[reward_name]
        build("http", reward.options)
        for _, group, _ in groups_of("rayjob"):
            assert reward.options["token_env"] in variables(group)


def test_the_monitor_selects_what_kuberay_writes_on_its_pods():
    spec = MANIFESTS["podmonitor"]["spec"]
    assert MANIFESTS["podmonitor"]["apiVersion"] == "monitoring.coreos.com/v1"
    assert spec["selector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert spec["podMetricsEndpoints"] == [{"port": "metrics", "interval": "15s"}]


# --- the end of a pod


def test_pods_with_a_part_of_a_run_let_it_save():
    dockerfile = (CONFIGS / "docker" / "Dockerfile").read_text("utf-8")
    (target,) = re.findall(
        r"^COPY cluster_configs/kuberay/before_pod_ends.py (\S+)", dockerfile, re.M
    )
    hook = f"{target}before_pod_ends.py"
    for name, word in (("raycluster", "stop"), ("rayjob", "wait")):
        for group_name, group, _ in groups_of(name):
            if group_name == "rewards":
                assert container(group)["lifecycle"] == {}
                continue
            command = container(group)["lifecycle"]["preStop"]["exec"]["command"]
            assert command == ["python", hook, word]
            grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
            assert grace > int(variables(group)["RAY_JOB_STOP_WAIT_TIME_S"])


HOOK = CONFIGS / "kuberay" / "before_pod_ends.py"


@pytest.mark.parametrize(
    ("command", "part"),
    [
        (b"/usr/local/bin/python\0/usr/local/bin/flowgrpo-ray\0train\0spec.yaml\0", True),
        (b"ray::rollout-0:RolloutWorker.__init__", True),
        (b"ray::LearnerRank", True),
        (b"ray::ServeReplica:reward-ocr:ocr", False),
        (b"python\0/opt/flowgrpo/before_pod_ends.py\0wait\0", False),
        (b"grep\0LearnerRank\0", False),
        (b"", False),
    ],
)
def test_the_hook_knows_the_processes_of_a_run(tmp_path: Path, command: bytes, part: bool):
    for pid, text in (("1", b"bash\0-c\0ray start --head --block\0"), ("27", command)):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes(text)
    assert load_script(HOOK).part_of_a_run(tmp_path) is part


def submit(client: JobSubmissionClient, command: str, deadline: float) -> str:
    """Submit a job, as soon as the node that has just been started takes one; its id."""
    while True:
        try:
            return client.submit_job(entrypoint=command)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@pytest.mark.slow
def test_the_hook_stops_training_jobs_and_no_others():
    """A real cluster; the jobs are no training runs but for their command lines."""
    with clusters.cluster({"CPU": 1}) as cluster:
        cluster.wait_until_it_answers()
        client = JobSubmissionClient(cluster.dashboard)
        deadline = time.monotonic() + PATIENCE_S
        names = ("flowgrpo-ray train x", "another job")
        jobs = [submit(client, f"sleep 3000 # {name}", deadline) for name in names]

        def wait_for(job: str, status: JobStatus) -> None:
            wait_until(
                lambda: client.get_job_status(job) == status,
                f"{job} {status}",
                deadline - time.monotonic(),
            )

        for job in jobs:
            wait_for(job, JobStatus.RUNNING)
        load_script(HOOK).stop_runs(client)
        wait_for(jobs[0], JobStatus.STOPPED)
        assert client.get_job_status(jobs[1]) == JobStatus.RUNNING
