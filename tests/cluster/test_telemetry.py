"""What a run tells the outside, as Ray's metrics port, Prometheus and live.json show it.

One small training run on a cluster of its own, with a reward that fails on purpose. Where there is
one (Debian's package `prometheus`), a real Prometheus watches it as Ray has configured it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from clusters import BIN, Cluster, cluster
from grafana import DASHBOARD, FOLDER, queries
from ports import own_port
from prometheus_client.parser import text_string_to_metric_families
from waiting import PATIENCE_S, wait_until

from flowgrpo_ray.run.tracking import read_rows
from flowgrpo_ray.serving.client import RewardClient, Traffic
from flowgrpo_ray.serving.metric_table import FROM_ROWS, OF_DRIVER, OF_REPLICAS

RUN = "watched"
ITERATIONS = 3
GROUPS = 8
GROUP_SIZE = 4  # a micro-batch each
EVALUATIONS = 3  # before training, after 2 iterations and at the end
SETTINGS = {
    "name": RUN,
    "iterations": ITERATIONS,
    "model.dtype": "float16",
    "sampling.steps": 4,
    "sampling.window": "{kind: all}",
    "sampling.group_size": GROUP_SIZE,
    "sampling.groups": GROUPS,
    "sampling.micro_batch": GROUP_SIZE,
    "rewards": "{bright: {reward: 'reward_samples:Probe', retries: 0}, "
    "dark: {reward: 'reward_samples:Darkness', weight: 0}}",
    "watch.window": 1,
    "evaluation": "{every: 2, steps: 2, prompts: 4, micro_batch: 4, grid: 4}",
    "checkpoint.every": 1,
    "cluster.max_failed_groups": 100,
}
# The probe reward has no score for one prompt of the eight, and raises for another.
WORDS = [{"prompt": f'red sign "{number}"'} for number in range(100, 100 + GROUPS)]
TRAIN = [WORDS[0] | {"nan": True}, WORDS[1] | {"fail": True}, *WORDS[2:]]
HELD_OUT = [WORDS[0] | {"nan": True}, *WORDS[1:4]]

ROW_METRICS = [metric for metrics in FROM_ROWS.values() for metric in metrics]
STATES = ["starting", "running", "stopping", "stopped", "finished", "failed"]
OUR_TAGS = {"run", "reward", "replica"} | {t for m in (*ROW_METRICS, *OF_DRIVER) for t in m.tags}


@dataclass(frozen=True)
class Watched:
    """A run that has ended, and all that was seen of it."""

    folder: Path
    live: list[dict[str, Any]]  # each content of live.json that was met
    metrics: str  # what Ray's metrics ports showed when it had ended
    prometheus: str | None

    def rows(self, file: str, kind: str) -> list[dict[str, Any]]:
        return [r for r in read_rows(self.folder / f"{file}.jsonl") if r["kind"] == kind]

    def samples(self) -> dict[str, float]:
        """All of ours that was exported, as `reward_mean reward=ocr`; buckets left out."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.metrics):
            for sample in family.samples:
                name = sample.name.removeprefix("ray_flowgrpo_")
                if name == sample.name or "le" in sample.labels:
                    continue
                key = f"{name} {labels(sample.labels)}".strip()
                assert key not in found, f"exported twice: {key}"
                found[key] = sample.value
        return found

    def ask(self, query: str) -> list[dict[str, Any]]:
        """Prometheus' answer."""
        url = f"{self.prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.load(answer)["data"]["result"]


def labels(tags: Mapping[str, str]) -> str:
    """Our tags without the run, which all have, and the replica, whose name is random."""
    known = OUR_TAGS - {"run", "replica"}
    return " ".join(f"{tag}={value}" for tag, value in sorted(tags.items()) if tag in known)


def of_session(of: Cluster, path: str) -> Path:
    """A file that Ray writes into its session's folder soon after its start."""
    pattern = f"*/session_latest/{path}"
    wait_until(lambda: [*Path(of.folder).glob(pattern)], path)
    return next(Path(of.folder).glob(pattern))


def metrics_of(of: Cluster) -> str:
    """What the cluster shows where Ray tells Prometheus to look. Ray names a port more than it
    opens."""
    (entry,) = json.loads(of_session(of, "prom_metrics_service_discovery.json").read_text())
    pages: list[str] = []
    for target in entry["targets"]:
        with (
            contextlib.suppress(urllib.error.URLError),
            urllib.request.urlopen(f"http://{target}/metrics", timeout=20) as answer,
        ):
            pages.append(answer.read().decode())
    return "".join(pages)


def start_training(
    of: Cluster, folder: Path, **changes: object
) -> tuple[subprocess.Popen[str], Path]:
    """The command, and the run folder that it will write."""
    for name, prompts in (("train", TRAIN), ("heldout", HELD_OUT)):
        lines = [json.dumps(prompt) + "\n" for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = SETTINGS | changes
    settings |= {"prompts.train": folder / "train.jsonl"}
    settings |= {"prompts.evaluate": folder / "heldout.jsonl"}
    command = [BIN / "flowgrpo-ray", "train", "tiny-ocr", "--runs", folder / "runs"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    process = subprocess.Popen(
        command,
        env=of.environment | {"RAY_metrics_report_interval_ms": "1000"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process, folder / "runs" / str(settings["name"])


def follow(
    process: subprocess.Popen[str],
    live: Path,
    seen: list[dict[str, Any]],
    then: Callable[[], None] = lambda: None,
) -> None:
    """Read live.json until the run ends; each read must be a whole content."""
    end = time.monotonic() + PATIENCE_S
    while process.poll() is None:
        assert time.monotonic() < end, "the run does not end"
        if live.exists():
            content = json.loads(live.read_text("utf-8"))
            if not seen or content != seen[-1]:
                seen.append(content)
                then()
        time.sleep(0.02)


@contextlib.contextmanager
def prometheus(of: Cluster, folder: Path) -> Iterator[str | None]:
    """The address of a Prometheus with the configuration that Ray wrote, but more eager."""
    program = shutil.which("prometheus")
    if program is None:
        yield None
        return
    written = of_session(of, "metrics/prometheus/prometheus.yml")
    config = yaml.safe_load(written.read_text())
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = own_port()
    options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    options += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    running = subprocess.Popen([program, *options])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait(20)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    dashboards = tmp_path_factory.mktemp("dashboards")
    shutil.copy(FOLDER / "flowgrpo-run.json", dashboards)
    variables = {"RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR": str(dashboards)}
    with cluster({"CPU": 4}, OMP_NUM_THREADS="1", **variables) as running:
        running.wait_until_it_answers()
        yield running


@pytest.fixture(scope="module")
def watched(head: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    with prometheus(head, folder) as address:
        process, run = start_training(head, folder)
        seen: list[dict[str, Any]] = []
        follow(process, run / "live.json", seen)
        text = metrics_of(head)  # what the driver exported last stays for 20 s
        output = process.communicate()[0]
        assert process.returncode == 0, output
        seen.append(json.loads((run / "live.json").read_text("utf-8")))
        if address:
            time.sleep(2)  # a last scrape
        yield Watched(run, seen, text, address)


# --- metrics


def of_rewards(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name} reward={reward}": value for reward, value in values.items()}


def expected_from_rows(run: Watched) -> dict[str, Any]:
    """Of every metric that comes from rows, by hand: the last row's numbers, or sums over rows."""
    rows, evaluation = run.rows("metrics", "train"), run.rows("metrics", "eval")[-1]
    row, times = rows[-1], run.rows("timings", "train")[-1]
    ratio, steps = row["log_ratio"], row["log_ratio"]["per_step"]
    rewards, held_out = row["rewards"], evaluation["rewards"]
    found: dict[str, Any] = {
        "iteration": ITERATIONS,
        "total_reward_mean": row["reward"]["mean"],
        "total_reward_std": row["reward"]["std"],
        "log_ratio_gate": ratio["gate"],
        "log_ratio_max": ratio["max_abs"],
        "log_ratio_mean": ratio["mean"],
        "log_ratio_std": ratio["std"],
        "log_ratio_excess_total": sum(r["log_ratio"]["excess"] for r in rows),
        "clip_fraction bound=low": row["clip_fraction"]["low"],
        "clip_fraction bound=high": row["clip_fraction"]["high"],
        "grad_norm": sum(row["grad_norm"]) / len(row["grad_norm"]),
        "loss_scale": row["loss_scale"]["last"],
        "overflows_total": sum(r["loss_scale"]["overflows"] for r in rows),
        "images_total": ITERATIONS * GROUPS * GROUP_SIZE,
        "eval_iteration": ITERATIONS,
        "iteration_seconds": times["seconds"],
        "images_per_second": times["images_per_second"],
        "eval_seconds": run.rows("timings", "eval")[-1]["seconds"],
        "watch_diverging reward=dark": float(evaluation["watch"]["dark"]["diverging"]),
    }
    found |= {name: row[name] for name in ("kl", "policy_loss", "loss", "updates", "learning_rate")}
    found |= of_rewards("reward_mean", {n: r["mean"] for n, r in rewards.items()})
    found |= of_rewards("reward_std", {n: r["std"] for n, r in rewards.items()})
    found |= of_rewards("eval_reward_mean", {n: r["mean"] for n, r in held_out.items()})
    found |= of_rewards("eval_reward_std", {n: r["std"] for n, r in held_out.items()})
    found |= of_rewards("eval_unscored_images", {"bright": 1, "dark": 0})
    lost = 2 * GROUP_SIZE * ITERATIONS  # a group without scores, and one whose call raised
    found |= of_rewards("unscored_images_total", {"bright": lost, "dark": 0})
    for i, step in enumerate(steps["step"]):
        found[f"log_ratio_step_mean step={step}"] = steps["mean"][i]
        found[f"log_ratio_step_std step={step}"] = steps["std"][i]
    for kind, count in row["groups"].items():
        found[f"groups kind={kind}"] = count
        found[f"groups_sampled_total kind={kind}"] = sum(r["groups"][kind] for r in rows)
    for actors, states in times["ledger"].items():
        for state, entries in states.items():
            for what, seconds in entries.items():
                found[f"ledger_seconds actors={actors} state={state} what={what}"] = seconds
    found |= {f"busy_share actors={a}": value for a, value in times["busy"].items()}
    return found


@pytest.mark.slow
def test_every_metric_of_a_row_is_exported_as_it_was_written(watched: Watched):
    expected = expected_from_rows(watched)
    names = {name.partition(" ")[0] for name in expected}
    assert names == {metric.exported.removeprefix("ray_flowgrpo_") for metric in ROW_METRICS}
    exported = {k: v for k, v in watched.samples().items() if k.partition(" ")[0] in names}
    assert exported == expected
    assert expected["groups_sampled_total kind=dropped"] == 2 * ITERATIONS
    assert expected["busy_share actors=rollout"] > 0


@pytest.mark.slow
def test_the_ledger_of_each_kind_adds_up_to_the_wall_clock(watched: Watched):
    for row in watched.rows("timings", "train"):
        assert row["ledger"].keys() == {"rollout", "learner", "reward-bright", "reward-dark"}
        for kind, states in row["ledger"].items():
            told = sum(sum(entries.values()) for entries in states.values())
            assert told == pytest.approx(row["seconds"], rel=0.02), kind
        assert row["ledger"]["rollout"]["busy"]["sample"] > 0
        assert row["ledger"]["learner"]["busy"]["accumulate"] > 0
        assert row["processes"]["rollout"] == 2
        assert row["processes"]["reward-bright"] == pytest.approx(1)


@pytest.mark.slow
def test_what_the_driver_and_the_replicas_count(watched: Watched):
    last, found = watched.live[-1], watched.samples()
    calls = {"bright": ITERATIONS * (GROUPS - 1), "dark": ITERATIONS * GROUPS}  # one raises
    calls = {name: count + EVALUATIONS for name, count in calls.items()}
    failures = {"bright": ITERATIONS, "dark": 0}
    images = {name: count * GROUP_SIZE for name, count in calls.items()}
    expected: dict[str, Any] = {
        "iterations": ITERATIONS,
        "checkpoint_iteration": ITERATIONS,
        "checkpoint_time_seconds": last["checkpoint"]["at"],
    }
    for worker in ("rollout-0", "rollout-1"):
        expected[f"weights_version worker={worker}"] = ITERATIONS
        expected[f"units_in_flight worker={worker}"] = 0
    for who in ("reward", "replica"):
        expected |= of_rewards(f"{who}_queue", {"bright": 0, "dark": 0})
        expected |= of_rewards(f"{who}_calls_total", calls)
        expected |= of_rewards(f"{who}_images_total", images)
        expected |= of_rewards(f"{who}_failures_total", failures)
        expected |= of_rewards(f"{who}_latency_seconds_count", calls)
    for name in ("reward_replicas", "reward_replicas_target"):
        expected |= of_rewards(name, {"bright": 1, "dark": 1})
    known = {m.exported.removeprefix("ray_flowgrpo_") for m in (*OF_DRIVER, *OF_REPLICAS)}
    clocked = {"reward_seconds_total", "replica_seconds_total", "replica_busy_seconds_total"}
    histograms = {"reward_latency_seconds", "replica_latency_seconds"}
    row = watched.rows("metrics", "train")[-1]
    for name in ("gate", "max_abs", "mean", "std"):
        expected[f"objective statistic=log_ratio.{name}"] = row["log_ratio"][name]
    names = {name.partition(" ")[0].removesuffix("_count") for name in expected}
    assert names | clocked == known, "every metric of the table is looked at"
    assert {name: found[name] for name in expected} == expected
    assert {f"{name}_sum" for name in histograms} <= {key.partition(" ")[0] for key in found}
    for name, count in calls.items():
        seen = last["rewards"][name]
        assert (seen["calls"], seen["failures"], seen["queue"]) == (count, failures[name], 0)
        waited = found[f"reward_seconds_total reward={name}"]
        assert waited == pytest.approx(count * seen["mean_latency_s"])
        within = found[f"replica_seconds_total reward={name}"]
        assert waited > within > found[f"replica_busy_seconds_total reward={name}"] > 0


@pytest.mark.slow
def test_each_number_is_told_with_its_run_and_nothing_else_of_ours(watched: Watched):
    known = {metric.exported for metric in (*ROW_METRICS, *OF_DRIVER, *OF_REPLICAS)}
    for family in text_string_to_metric_families(watched.metrics):
        for sample in family.samples:
            if not sample.name.startswith("ray_flowgrpo_"):
                continue
            plain = sample.name
            for part in ("_bucket", "_count", "_sum"):
                plain = plain.removesuffix(part)
            assert plain in known
            of_replica = plain.startswith("ray_flowgrpo_replica_")
            assert sample.labels.get("run") == (None if of_replica else RUN)
            assert bool(sample.labels.get("replica")) == of_replica


# --- Prometheus and Grafana


needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None,
    reason="no prometheus on this machine (Debian: apt-get install prometheus)",
)


@needs_prometheus
@pytest.mark.slow
def test_every_query_of_the_dashboard_finds_the_run(watched: Watched):
    empty = [title for title, query in queries(RUN) if not watched.ask(query)]
    assert not empty
    assert not any(watched.ask(query) for _, query in queries("another") if 'run="' in query)
    (variable,) = [v for v in DASHBOARD["templating"]["list"] if v["name"] == "run"]
    name = variable["query"]["query"].removeprefix("label_values(").partition(",")[0]
    assert {series["metric"]["run"] for series in watched.ask(name)} == {RUN}


@needs_prometheus
@pytest.mark.slow
def test_prometheus_has_the_numbers_of_the_last_row(watched: Watched):
    row = watched.rows("metrics", "train")[-1]
    shown = {title: watched.ask(query) for title, query in queries(RUN)}
    by_reward = {s["metric"]["reward"]: float(s["value"][1]) for s in shown["Reward in training A"]}
    assert by_reward == {name: of["mean"] for name, of in row["rewards"].items()}
    assert [s["value"][1] for s in shown["Progress A"]] == ["1"]


@pytest.mark.slow
def test_ray_puts_its_dashboards_beside_ours(head: Cluster):
    """The way of docs/dashboard.md: one folder, which Ray fills and tells Grafana to show."""
    provisioning = of_session(head, "metrics/grafana/provisioning/dashboards/default.yml")
    (provider,) = yaml.safe_load(provisioning.read_text())["providers"]
    shown = Path(provider["options"]["path"])
    uids = {json.loads(page.read_text())["uid"] for page in shown.glob("*.json")}
    assert {"flowgrpo-run", "rayDefaultDashboard", "rayServeDashboard"} <= uids
    assert {link["url"] for link in DASHBOARD["links"]} <= {f"/d/{uid}" for uid in uids}
    ours = yaml.safe_load((FOLDER / "provisioning.yml").read_text())["providers"][0]
    assert (ours["folder"], ours["type"]) == (provider["folder"], provider["type"])


# --- live.json


def check_live(content: dict[str, Any]) -> None:
    """Types and ranges of every key."""
    assert content.keys() == {
        *("state", "stage", "message", "iteration", "iterations", "started", "updated", "pid"),
        *("host", "ray", "checkpoint", "workers", "learners", "rewards"),
        "restarts",
    }
    assert content["state"] in STATES
    assert 0 <= content["iteration"] <= content["iterations"]
    assert content["started"] <= content["updated"] <= time.time()
    assert content["ray"] is None or content["ray"].keys() == {"address", "dashboard", "job"}
    for worker in content["workers"]:
        assert worker.keys() == {"name", "weights_version", "in_flight"}
        assert 0 <= worker["in_flight"] <= 2
    for name, reward in content["rewards"].items():
        assert reward["deployment"] == f"reward-{name}"
        assert reward.keys() == {
            *("deployment", "state", "replicas", "target", "queue", "calls", "failures"),
            "mean_latency_s",
        }
        assert (reward["mean_latency_s"] is None) == (reward["calls"] == 0)


@pytest.mark.slow
def test_live_json_is_whole_at_every_moment(watched: Watched):
    for content in watched.live:
        check_live(content)
    states = [content["state"] for content in watched.live]
    assert list(dict.fromkeys(states)) == ["starting", "running", "finished"]
    iterations = [content["iteration"] for content in watched.live]
    assert iterations == sorted(iterations)
    stages = dict.fromkeys(content["stage"] for content in watched.live)
    told = ["starting Ray", "evaluating", "sampling, scoring, training", "saving a checkpoint"]
    assert [stage for stage in stages if stage in told] == told
    updates = [content["updated"] for content in watched.live]
    assert max(b - a for a, b in itertools.pairwise(updates)) < 15, "a reader: lost"
    assert any(w["in_flight"] for c in watched.live for w in c["workers"]), "work is seen"


def test_calls_that_wait_are_counted(monkeypatch: pytest.MonkeyPatch):
    traffic = {"ocr": Traffic()}
    client, seen = RewardClient({}, traffic), []

    async def ask(*_: object) -> str:
        await asyncio.sleep(0)
        seen.append(traffic["ocr"].queue)
        if len(seen) == 3:
            raise RuntimeError("lost")
        return "no score"

    async def three_calls() -> list[object]:
        calls = [client.ask("ocr", [], [], []) for _ in range(3)]
        return await asyncio.gather(*calls, return_exceptions=True)

    monkeypatch.setattr(client, "_ask", ask)
    assert [type(outcome) for outcome in asyncio.run(three_calls())] == [str, str, RuntimeError]
    assert (seen, traffic["ocr"].queue) == ([3, 2, 1], 0)


@pytest.mark.slow
def test_live_json_at_the_end(watched: Watched, head: Cluster):
    last = watched.live[-1]
    assert last["message"] is None
    assert (last["iteration"], last["iterations"], last["learners"]) == (ITERATIONS, ITERATIONS, 1)
    assert last["checkpoint"]["iteration"] == ITERATIONS
    address = f"127.0.0.1:{head.port}"
    assert last["ray"] == {"address": address, "dashboard": head.dashboard, "job": None}
    assert [worker["name"] for worker in last["workers"]] == ["rollout-0", "rollout-1"]
    assert {worker["weights_version"] for worker in last["workers"]} == {ITERATIONS}
    serving = [(r["state"], r["replicas"], r["target"]) for r in last["rewards"].values()]
    assert serving == [("RUNNING", 1, 1)] * 2
    assert not (watched.folder / "live.json.part").exists()


@pytest.mark.slow
def test_a_run_that_may_lose_no_actor_has_failed(head: Cluster, tmp_path: Path, watched: Watched):
    one = {"cluster.rollout": "{count: 1, cpus: 0.5}", "cluster.max_restarts": "0"}
    process, run = start_training(head, tmp_path, name="lost", **one)
    seen: list[dict[str, Any]] = []

    def kill() -> None:
        if seen[-1]["state"] == "running" and not victims:
            victims.extend(rollout_workers())
            victims[0].kill()

    victims: list[psutil.Process] = []
    follow(process, run / "live.json", seen, kill)
    output = process.communicate()[0]
    assert process.returncode == 2, output
    assert len(victims) == 1
    last = json.loads((run / "live.json").read_text("utf-8"))
    check_live(last)
    assert last["state"] == "failed"
    assert last["message"].startswith("rollout-0 was lost 1 times")
    assert last["restarts"] == 1
    assert last["message"].split() == output.partition("error: ")[2].split()


def rollout_workers() -> list[psutil.Process]:
    """Of the cluster, which this process has started."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "ollout" in "".join(process.cmdline()[:1])]
