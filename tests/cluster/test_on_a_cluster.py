"""The proof: a cluster of several nodes is used as people use one, and loses nothing.

One script: `ray start` with token authentication, rewards by `serve deploy`, a training job from
another shell, `rewards scale` during the run, the job stopped and submitted again, a node of
rewards taken away, a node of rollout workers added and all such nodes taken away, one by one. In
the end the weights are those of a run on one machine that nobody disturbed. `pytest -s` shows what
every command printed.

All is real but the network: the nodes' `flowgrpo-ray` has the actors of `chained.py`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import clusters
import pytest
from waiting import wait_until
from whole_runs import SLOW_IN_TURNS, alone, final_digests, trained

from flowgrpo_ray.run.checkpoint import list_checkpoints
from flowgrpo_ray.run.tracking import read_rows

pytestmark = SLOW_IN_TURNS
ITERATIONS = 300
patiently = partial(wait_until, pause=0.3)
SPEC = """
name: signs
seed: 5
iterations: {iterations}
model: {{family: sd3, path: "builtin:tiny-sd3", dtype: float32, max_sequence_length: 10}}
tuning: {{kind: full}}
prompts: {{train: prompts/train.txt, evaluate: prompts/heldout.txt}}
sampling: {{size: [32, 48], steps: 8, eta: 0.8, window: {{kind: random, length: 2, within: [0, 4]}},
           group_size: 6, groups: 4, micro_batch: 12}}
rewards:
  ocr: {{options: {{detect: false}}}}
  bright: {{reward: "own.rewards:Bright", weight: 0.1, resources: {{reward_node: 0.001}}}}
objective: {{kind: flow_grpo, clip_low: 1e-3, clip_high: 1e-3}}
optimizer: {{learning_rate: 2e-4}}
evaluation: {{every: 200, steps: 4, prompts: 8, micro_batch: 4, grid: 8}}
checkpoint: {{every: 10, keep: 2}}
cluster:
  rollout: {{count: 2, max_count: 4, cpus: 0.5, resources: {{rollout_node: 0.5}}}}
  learner: {{count: 1, cpus: 0.5, resources: {{learner_node: 0.001}}}}
"""
OWN_REWARD = '''
import numpy as np

class Bright:
    """Mean brightness, from 0 to 1."""

    def __call__(self, images, prompts, metadata):
        return images.mean(axis=(1, 2, 3), dtype=np.float64).astype(np.float32) / 255
'''
REWARDS = """
proxy_location: HeadOnly
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - name: reward-ocr
    route_prefix: /ocr
    import_path: flowgrpo_ray.serving.service:app
    external_scaler_enabled: true
    args: {{name: ocr, options: {{detect: false}}, cpus: 0.5, resources: {{reward_node: 0.6}}}}
"""


class Shell:
    """Somebody at a machine that reaches the cluster, in a project folder of their own."""

    def __init__(self, cluster: clusters.Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def __call__(self, *command: object, status: int = 0) -> str:
        printed = self.cluster.shell(*command, status=status, folder=self.folder)
        print(f"\n$ {' '.join(map(str, command))}\n{printed.rstrip()}", flush=True)
        return printed

    def submit(self, *more: str) -> str:
        """Submit the run; the job's id."""
        printed = self("flowgrpo-ray", "submit", "signs.yaml", *more)
        found = re.match(r"job (\S+) is submitted", printed)
        assert found, printed
        return found[1]

    def job(self, job: str) -> dict[str, Any]:
        """What the cluster's job interface says of a job."""
        return json.loads(self.cluster.ask(f"/api/jobs/{job}"))

    def train_until(self, run: Path, iteration: int, job: str) -> None:
        """Wait until the job has trained that far."""

        def done() -> bool:
            found = self.job(job)
            assert found["status"] in ("PENDING", "RUNNING", "SUCCEEDED"), found["message"]
            return trained(run) >= iteration

        patiently(done, f"iteration {iteration}")

    def actors(self) -> dict[str, dict[str, Any]]:
        """Every living actor that has a name, by its name."""
        alive = self.state("actors", "filter_keys=state&filter_predicates=%3D&filter_values=ALIVE")
        return {actor["name"]: actor for actor in alive if actor["name"]}

    def nodes_with(self, resource: str) -> set[str]:
        """The ids of living nodes that have it; one that is just lost still seems to live."""
        nodes = [node for node in self.state("nodes") if node["state"] == "ALIVE"]
        return {node["node_id"] for node in nodes if resource in node["resources_total"]}

    def state(self, of: str, query: str = "") -> list[dict[str, Any]]:
        """What `ray list` of actors or nodes would show."""
        answer = json.loads(self.cluster.ask(f"/api/v0/{of}?detail=1&{query}"))
        return answer["data"]["result"]["result"]


def write_project(folder: Path, http_port: int) -> Path:
    """What a user keeps in a folder: spec, prompts, a reward class, a Serve config."""
    files = {
        "signs.yaml": SPEC.format(iterations=ITERATIONS),
        "prompts/train.txt": "".join(f'red sign "{n}"\n' for n in range(100, 164)),
        "prompts/heldout.txt": "".join(f'blue sign "{n}"\n' for n in range(200, 208)),
        "own/rewards.py": OWN_REWARD,
        "rewards.yaml": REWARDS.format(port=http_port),
        "bin/flowgrpo-ray": f"#!{sys.executable}\nimport chained\n\nchained.main()\n",
        "large-and-not-for-the-cluster.bin": "0" * 1_000_000,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "bin" / "flowgrpo-ray").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def undisturbed(hardly_disturbed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on this machine alone, from start to end; its folder."""
    folder = write_project(tmp_path_factory.mktemp("alone"), 0)
    subprocess.run(
        [folder / "bin" / "flowgrpo-ray", "train", "signs.yaml", "--runs", "runs"],
        env=alone() | {"PYTHONPATH": f".:{clusters.HERE}"},
        cwd=folder,
        check=True,
        timeout=600,
    )
    return folder / "runs" / "signs"


@pytest.fixture(scope="module")
def shell(hardly_disturbed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    runs = tmp_path_factory.mktemp("shared-storage")
    folder = tmp_path_factory.mktemp("project")
    head = {"CPU": 4, "learner_node": 1}
    path = f"{folder}/bin:{clusters.BIN}:{os.environ['PATH']}"
    with clusters.cluster(head, several=True, FLOWGRPO_RUNS=str(runs), PATH=path) as cluster:
        cluster.wait_until_it_answers()
        write_project(folder, cluster.http_port)
        cluster.environment |= {"PYTHONPATH": "."}
        yield Shell(cluster, folder)


def test_a_cluster_is_used_and_disturbed_and_nothing_is_lost(
    shell: Shell, undisturbed: Path
) -> None:
    cluster = shell.cluster
    run = Path(cluster.variables["FLOWGRPO_RUNS"]) / "signs"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/")  # without the token
    rollout_node = cluster.add_node({"CPU": 2, "rollout_node": 1})
    cluster.add_node({"CPU": 2, "reward_node": 1})
    patiently(lambda: bool(shell.nodes_with("rollout_node")), "the node of rollout workers")
    shell("serve", "deploy", "rewards.yaml")
    patiently(lambda: shell_state(shell, "ocr") == "RUNNING", "reward-ocr")

    other_rewards = cluster.add_node({"CPU": 2, "reward_node": 1})

    first = shell.submit()
    shell.train_until(run, 1, first)
    before = cluster.status()["ocr"]["pids"]
    shell("flowgrpo-ray", "rewards", "scale", "ocr", "2")
    after = cluster.status()["ocr"]["pids"]
    print("pids of reward-ocr before and after:", before, after)
    assert len(before) == 1
    assert len(after) == 2
    assert set(before) < set(after), "the replica that was there has stayed"
    scaled_at = trained(run)
    assert scaled_at < ITERATIONS, "the run was still going on"
    shell.train_until(run, scaled_at + 3, first)

    shell("ray", "job", "stop", first)
    assert shell.job(first)["status"] == "STOPPED"
    done = trained(run)
    assert scaled_at < done < ITERATIONS
    assert list_checkpoints(run / "checkpoints")[-1].name == f"iteration-{done:06d}"
    assert shell.actors().keys().isdisjoint({"rollout-0", "rollout-1", "learner-0"})
    assert cluster.status()["ocr"]["pids"] == after, "rewards outlive the job"
    assert lost_requests(run) == 0

    second = shell.submit()
    shell.train_until(run, done + 1, second)
    look_at_actors(shell)
    logs = shell("ray", "job", "logs", second)
    assert f"run folder: {run}" in logs
    assert f"resuming {run} after iteration {done}\n" in logs
    shell("flowgrpo-ray", "submit", "signs.yaml", status=2)  # already training

    cluster.end_node(other_rewards)  # one of the two replicas
    gone_at = trained(run)
    shell.train_until(run, gone_at + 3, second)
    assert shell.job(second)["status"] == "RUNNING"

    second_node = cluster.add_node({"CPU": 2, "rollout_node": 1})
    patiently(lambda: len(workers(run)) == 4, "two more workers join")
    cluster.end_node(rollout_node)
    patiently(lambda: workers(run) == {"rollout-2", "rollout-3"}, "they go on alone")
    shell.train_until(run, trained(run) + 3, second)
    cluster.end_node(second_node)
    patiently(lambda: workers(run) == set(), "nobody is left")
    third_node = cluster.add_node({"CPU": 2, "rollout_node": 1})
    shell.train_until(run, trained(run) + 3, second)
    logs = shell("ray", "job", "logs", second)
    assert logs.count("was lost and is replaced") >= 4
    assert "Traceback" not in logs
    shell("ray", "job", "stop", second)
    assert trained(run) < ITERATIONS, "the run was still going on"

    cluster.end_node(third_node)
    patiently(lambda: not shell.nodes_with("rollout_node"), "the cluster notices")
    printed = shell("flowgrpo-ray", "submit", "signs.yaml", "--wait", status=1)
    assert "ask for 1 rollout_node and the cluster has 0" in " ".join(printed.split())
    cluster.add_node({"CPU": 2, "rollout_node": 1})
    patiently(lambda: bool(shell.nodes_with("rollout_node")), "another such node")
    plainly = ["ray", "job", "submit", "--working-dir", ".", "--"]
    shell(*plainly, "flowgrpo-ray", "train", "signs.yaml", "--resume")
    assert final_digests(run, ITERATIONS) == final_digests(undisturbed, ITERATIONS)
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def shell_state(shell: Shell, reward: str) -> str:
    return shell.cluster.status()[reward]["state"]


def workers(run: Path) -> set[str]:
    """The rollout workers that are up."""
    return {worker["name"] for worker in json.loads((run / "live.json").read_text())["workers"]}


def lost_requests(run: Path) -> int:
    """Calls to rewards that were not answered at once, and images without a score."""
    timings = [row for row in read_rows(run / "timings.jsonl") if row["kind"] == "train"]
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]
    failures = sum(stats["failures"] for row in timings for stats in row["rewards"].values())
    return failures + sum(count for row in rows for count in row["unscored"].values())


def look_at_actors(shell: Shell) -> None:
    """Each actor is where the spec places it, under its name, and its log says who it is."""
    actors = shell.actors()
    nodes = {
        node["node_id"]: next((r for r in node["resources_total"] if r.endswith("_node")), None)
        for node in shell.state("nodes")
    }
    placed = {name: nodes[actor["node_id"]] for name, actor in actors.items()}
    assert {name: placed[name] for name in ("rollout-0", "rollout-1", "learner-0")} == {
        "rollout-0": "rollout_node",
        "rollout-1": "rollout_node",
        "learner-0": "learner_node",
    }
    replicas = [name for name in actors if name.startswith("SERVE_REPLICA::reward-")]
    assert sorted(name.split("#")[0].split("::")[1] for name in replicas) == [
        "reward-bright",
        "reward-ocr",
        "reward-ocr",
    ]
    assert {placed[name] for name in replicas} == {"reward_node"}
    for name in ("rollout-1", "learner-0"):
        log = shell("ray", "logs", "actor", "--id", actors[name]["actor_id"])
        assert f"{name} of run signs: pid {actors[name]['pid']} on " in log
