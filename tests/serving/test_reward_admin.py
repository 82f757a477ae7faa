"""The rewards of a cluster that runs on its own: deployed, scaled, watched and removed by command.

A real `ray start --head` with its dashboard, the real command line, traffic meanwhile.
"""

import json
import subprocess
import sys
from pathlib import Path

import clusters
import pytest
import yaml

from flowgrpo_ray.common.errors import RewardEnvironmentError, RewardError, SpecError
from flowgrpo_ray.serving import admin

HERE = Path(__file__).parents[1]
DEPLOYMENTS = HERE.parent / "deployments"
FILES = sorted(DEPLOYMENTS.glob("*.yaml"))


def _write(path, port, *applications):
    """A Serve config file of (args, replicas), in the manner of deployments/."""
    content = yaml.safe_load((DEPLOYMENTS / "ocr.yaml").read_text())
    content["http_options"]["port"] = port
    (template,) = content["applications"]
    content["applications"] = [
        template
        | {
            "name": f"reward-{args['name']}",
            "route_prefix": f"/{args['name']}",
            "args": args,
            "deployments": [{"name": args["name"], "num_replicas": replicas}],
        }
        for args, replicas in applications
    ]
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def cluster():
    with clusters.cluster({"CPU": 8}) as running:
        running.wait_until_it_answers()
        yield running


@pytest.mark.slow
def test_rewards_are_deployed_scaled_and_removed_while_they_are_used(cluster, tmp_path):
    colours = _write(tmp_path / "a.yaml", cluster.http_port, ({"name": "sign_colour"}, 1))
    probe = {"name": "probe", "reward": "reward_samples:Probe", "max_batch_images": 1}
    others = _write(
        tmp_path / "b.yaml", cluster.http_port, (probe, 2), (probe | {"name": "alone"}, 1)
    )
    assert "no rewards are deployed" in cluster.rewards("status")
    cluster.shell("serve", "deploy", str(colours))  # the file is what Serve itself takes
    shown = cluster.rewards("deploy", others)
    assert "probe" in shown
    assert "2/2" in shown
    first = cluster.status()
    assert first.keys() == {"sign_colour", "probe", "alone"}, "deploying a file leaves others alone"

    traffic = subprocess.Popen(
        [sys.executable, HERE / "reward_traffic.py", "sign_colour", "probe"],
        env=cluster.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert traffic.stdout.readline() == "started\n"
    said = cluster.rewards("scale", "probe", 99, status=2)
    assert "99 replicas are asked for and 2 are placed; each takes 0.25 CPU" in said
    assert cluster.status()["probe"]["target"] == 2
    cluster.rewards("scale", "probe", 3)
    grown = cluster.status()
    assert grown["probe"]["running"] == grown["probe"]["target"] == 3
    assert set(first["probe"]["pids"]) < set(grown["probe"]["pids"])
    assert grown["probe"]["latency_s"]["p95"] >= grown["probe"]["latency_s"]["p50"] >= 0.02
    # Another file again: what was scaled by hand stays so.
    cluster.rewards("deploy", colours)
    # The same file with another number: those that run keep running.
    others.write_text(others.read_text().replace("num_replicas: 2", "num_replicas: 4"))
    cluster.rewards("deploy", others)
    most = cluster.status()["probe"]["pids"]
    assert set(grown["probe"]["pids"]) < set(most)
    cluster.rewards("scale", "probe", 1)
    seen, _ = traffic.communicate()
    after = cluster.status()
    assert after["probe"]["running"] == 1
    assert set(after["probe"]["pids"]) < set(most)
    for name in ("sign_colour", "alone"):
        assert after[name]["pids"] == first[name]["pids"] != []

    seen = json.loads(seen)
    assert seen["failures"] == [], "no request was lost"
    assert seen["stats"]["probe"]["replicas"] >= 3
    assert seen["stats"]["probe"]["calls"] > 100
    calls = sum(replica["calls"] for replica in after["sign_colour"]["stats"])
    assert calls == seen["stats"]["sign_colour"]["calls"]

    elsewhere = _write(tmp_path / "c.yaml", cluster.http_port + 1, ({"name": "sign_colour"}, 1))
    said = cluster.rewards("deploy", elsewhere, status=2)
    assert f"http_options.port = {cluster.http_port + 1}, but Serve runs with" in said
    said = cluster.rewards("scale", "nobody", 2, status=2)
    assert "no reward 'nobody' is deployed on this cluster; deployed: " in said
    assert "alone is removed" in cluster.rewards("remove", "alone")
    assert cluster.status().keys() == {"sign_colour", "probe"}


@pytest.mark.parametrize(
    ("replicas", "cpus", "gpus", "refused"),
    [
        (3, 0.25, 0, None),
        (11, 0.25, 0, None),  # 2 are placed; 7 fit on one node, 2 on the other
        (12, 0.25, 0, "each takes 0.25 CPU, and 2.4 CPU are free on 2 nodes: room for 9 more, 11"),
        (3, 1, 0.5, None),
        (4, 1, 0.5, "each takes 1 CPU and 0.5 GPU, and 2.4 CPU, 4 GPU are free .*room for 1 more"),
        (1, 8, 0, None),  # fewer than run
        (99, 0, 0, None),
    ],
)
def test_more_replicas_than_fit_are_refused_with_the_numbers(
    monkeypatch, replicas, cpus, gpus, refused
):
    free = {"a": {"CPU": 1.8, "GPU": 1.0}, "b": {"CPU": 0.6, "GPU": 3.0}}
    monkeypatch.setattr(admin, "free_by_node", lambda: free)
    deployment = {
        "deployment_config": {"ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus}},
        "replicas": [{"node_id": "a"}, {"node_id": "b"}, {"node_id": None}],
    }
    if refused is None:
        admin._check_room("ocr", replicas, deployment)
    else:
        with pytest.raises(
            RewardError, match=f"reward-ocr: {replicas} replicas.* 2 are.*{refused}"
        ):
            admin._check_room("ocr", replicas, deployment)


# --- config files


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_of_the_repository_are_right(path, monkeypatch):
    monkeypatch.setattr(admin, "python_of", lambda name: name)  # environments need building
    content = admin.read_config(path)
    assert content["http_options"]["host"] == "127.0.0.1"
    names = [application["args"]["name"] for application in content["applications"]]
    assert path.stem == "all" or len(names) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"args": {"name": "ocr", "replica": 2}}, "args.*replica.*Extra inputs"),
        ({"args": {"name": "ocr", "options": {"detekt": 1}}}, "no option 'detekt'.*'detect'"),
        ({"args": {"name": "ocrr"}, "name": "reward-ocrr"}, "unknown reward 'ocrr'.*'ocr'"),
        ({"name": "ocr"}, "must be called 'reward-ocr'"),
        ({"import_path": "os:system"}, "import_path is 'os:system'"),
        ({"args": {"name": "ocr", "autoscaling": {"max_replicas": 2}}}, "exclude each other"),
        (
            {"args": {"name": "ocr", "replicas": 2, "autoscaling": {"max_replicas": 2}}},
            "replicas = 2 and autoscaling exclude",
        ),
        (
            {"args": {"name": "ocr", "autoscaling": {"min_replicas": 3, "max_replicas": 2}}},
            "min_replicas = 3 is above max_replicas = 2",
        ),
        ({"route_prefx": "/o"}, "unknown key 'route_prefx', did you mean 'route_prefix'"),
        ({"deployments": [{"name": "ocr", "num_replicas": "two"}]}, "not a Serve config file.*two"),
    ],
)
def test_a_wrong_file_is_named_before_anything_starts(tmp_path, change, message):
    path = _write(tmp_path / "wrong.yaml", 8000, ({"name": "ocr"}, 1))
    content = yaml.safe_load(path.read_text())
    content["applications"][0] |= change
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SpecError, match=f"(?s){message}"):
        admin.read_config(path)


def test_http_stays_on_this_machine_unless_the_file_says_otherwise(tmp_path):
    path = _write(tmp_path / "open.yaml", 8000, ({"name": "ocr"}, 1))
    content = yaml.safe_load(path.read_text())
    del content["http_options"]["host"]
    path.write_text(yaml.safe_dump(content))
    assert admin.read_config(path)["http_options"] == {"host": "127.0.0.1", "port": 8000}
    content["http_options"]["host"] = "0.0.0.0"
    path.write_text(yaml.safe_dump(content))
    assert admin.read_config(path)["http_options"]["host"] == "0.0.0.0"


def test_a_missing_environment_is_named_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWGRPO_ENVIRONMENTS", str(tmp_path))
    path = _write(tmp_path / "env.yaml", 8000, ({"name": "ocr", "environment": "nowhere"}, 1))
    with pytest.raises(RewardEnvironmentError, match="rewards env build nowhere"):
        admin.read_config(path)
