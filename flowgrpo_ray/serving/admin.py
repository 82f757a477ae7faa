"""Reward deployments of a running cluster, from outside of any training run.

Deploying and scaling go through Serve's REST interface on the Ray dashboard. Unlike with `serve
deploy`, deploying one file leaves the rewards of other files alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import AuthenticationError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from flowgrpo_ray.common.addresses import probe_cluster, ray_address
from flowgrpo_ray.common.errors import ClusterError, RewardError, SpecError, token_refused
from flowgrpo_ray.common.own_classes import nearest
from flowgrpo_ray.rewards import check_options
from flowgrpo_ray.rewards.environments import python_of
from flowgrpo_ray.serving.args import RewardServiceArgs
from flowgrpo_ray.serving.deploy import check_environments_there
from flowgrpo_ray.serving.deploy import remove as take_away
from flowgrpo_ray.serving.ray_private import cluster_here, free_by_node
from flowgrpo_ray.serving.types import ReplicaStats, app_name
from flowgrpo_ray.serving.waiting import until_running
from flowgrpo_ray.spec.file import parse_yaml

LOOPBACK = "127.0.0.1"
BUILDER = "flowgrpo_ray.serving.service:app"


@contextmanager
def connection(address: str | None) -> Iterator[ServeSubmissionClient]:
    """A connection to the cluster at `address` (default: RAY_ADDRESS, else the one that runs here)
    and to its dashboard."""
    source = "--address" if address else "RAY_ADDRESS"
    address = cluster_here(address or ray_address() or "auto")
    probe_cluster(address, source)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except AuthenticationError as error:
        raise token_refused(address, error) from error
    except ConnectionError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address!r}: start one with ray start --head, or name one "
            f"with --address or RAY_ADDRESS. Cause: {error}"
        ) from error
    try:
        if not context.dashboard_url:
            raise ClusterError(
                f"the cluster at {address!r} runs without its dashboard: start its "
                "head without --include-dashboard=false"
            )
        yield ServeSubmissionClient(f"http://{context.dashboard_url}")
    finally:
        ray.shutdown()


def read_config(path: Path) -> dict[str, Any]:
    """A Serve config file of rewards, checked; SpecError names the file, the key and the value."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        config = ServeDeploySchema.model_validate(content)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not a Serve config file: {error}") from error
    check_keys(str(path), content, ServeDeploySchema)
    # Serve's own default is every interface of the machine.
    content["http_options"] = {"host": LOOPBACK} | (content.get("http_options") or {})
    for application, given in zip(config.applications, content["applications"], strict=True):
        where = f"{path}: application {application.name!r}"
        check_keys(where, given, ServeApplicationSchema)
        if application.import_path != BUILDER:
            raise SpecError(f"{where}: import_path is {application.import_path!r}, not {BUILDER!r}")
        try:
            args = RewardServiceArgs.model_validate(application.args)
        except ValidationError as error:
            raise SpecError(f"{where}: args: {error}") from error
        if application.name != app_name(args.name):
            raise SpecError(f"{where}: must be called {app_name(args.name)!r}, after args.name")
        if args.autoscaling and application.external_scaler_enabled:
            raise SpecError(
                f"{where}: args.autoscaling and external_scaler_enabled: true exclude each other"
            )
        check_options(args.reward, args.options)
        if args.environment is not None:
            python_of(args.environment)
    return content


def check_keys(where: str, given: Mapping[str, Any], schema: type[BaseModel]) -> None:
    """SpecError for a key that Serve would ignore."""
    for key in given:
        if key not in schema.model_fields:
            raise SpecError(f"{where}: unknown key {key!r}{nearest(key, schema.model_fields)}")


def deploy_file(client: ServeSubmissionClient, path: Path, config: dict[str, Any]) -> list[str]:
    """Deploys the rewards of a config file, as `read_config` gave it, beside those that run; their
    names."""
    args = [RewardServiceArgs.model_validate(a["args"]) for a in config["applications"]]
    check_environments_there(args, built_there=True)
    names = [arg.name for arg in args]
    details = client.get_serve_details()
    _check_same_http(config, details, path)
    config["applications"] += [
        _as_it_is(application)
        for name, application in details["applications"].items()
        if application.get("deployed_app_config") and name not in map(app_name, names)
    ]
    client.deploy_applications(config)
    return names


def _check_same_http(config: Mapping[str, Any], details: Mapping[str, Any], path: Path) -> None:
    """Serve keeps the HTTP options that it was started with, and says so in its log alone."""
    if not details.get("http_options"):
        return  # Serve does not run yet
    running, asked = _http_keys(details), _http_keys(config)
    for key, value in asked.items():
        if value is not None and running.get(key) != value:
            raise SpecError(
                f"{path}: {key} = {value!r}, but Serve runs with {running.get(key)!r} and cannot "
                "change it while it runs: write that, or end Serve (serve shutdown)"
            )


def _http_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    options = {f"http_options.{key}": value for key, value in config["http_options"].items()}
    return options | {"proxy_location": config.get("proxy_location")}


def _as_it_is(application: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a running application, with the replicas that it was scaled to."""
    config = dict(application["deployed_app_config"])
    overrides = {entry["name"]: dict(entry) for entry in config.get("deployments", [])}
    for name, deployment in application["deployments"].items():
        entry = overrides.setdefault(name, {"name": name})
        if not deployment["deployment_config"].get("autoscaling_config"):
            entry["num_replicas"] = deployment["target_num_replicas"]
    return config | {"deployments": list(overrides.values())}


def scale(client: ServeSubmissionClient, name: str, replicas: int, *, beyond: bool = False) -> None:
    """Asks Serve for so many replicas of a reward; those that run keep running.

    RewardError if nodes have no room for them, unless the cluster may grow `beyond` what it has.
    """
    known = details_of(client)
    if name not in known:
        raise _unknown(name, known)
    if not beyond:
        _check_room(name, replicas, known[name]["deployments"].get(name, {}))
    path = f"/api/v1/applications/{app_name(name)}/deployments/{name}/scale"
    answer = client._do_request("POST", path, json_data={"target_num_replicas": replicas})
    if answer.status_code == 412:
        raise RewardError(
            f"{app_name(name)} cannot be scaled by hand: {answer.json()['error']} With "
            "args.autoscaling it scales itself; otherwise its config file needs "
            "external_scaler_enabled: true"
        )
    if answer.status_code != 200:
        raise ClusterError(f"scaling {app_name(name)}: {answer.status_code} {answer.text}")


def _check_room(name: str, replicas: int, deployment: Mapping[str, Any]) -> None:
    """RewardError if more replicas are asked for than the nodes have room for."""
    options = deployment.get("deployment_config", {}).get("ray_actor_options", {})
    cpus, gpus = options.get("num_cpus", 1), options.get("num_gpus", 0)
    needed = {"CPU": cpus, "GPU": gpus, **(options.get("resources") or {})}
    needed = {resource: count for resource, count in needed.items() if count}
    placed = sum(bool(replica.get("node_id")) for replica in deployment.get("replicas", []))
    free = list(free_by_node().values())
    room = sum(
        min(int(node.get(resource, 0) / count + 1e-9) for resource, count in needed.items())
        for node in free
        if needed
    )
    if needed and replicas - placed > room:
        each = " and ".join(f"{count:g} {resource}" for resource, count in needed.items())
        left = ", ".join(
            f"{sum(node.get(resource, 0) for node in free):g} {resource}" for resource in needed
        )
        raise RewardError(
            f"{app_name(name)}: {replicas} replicas are asked for and {placed} are placed; each "
            f"takes {each}, and {left} are free on {len(free)} nodes: room for {room} more, "
            f"{placed + room} in all. Ask for fewer, or let a cluster that grows by itself have "
            "them: --beyond"
        )


def remove(client: ServeSubmissionClient, name: str) -> None:
    """Takes a reward away; its replicas answer the calls that they have."""
    known = details_of(client)
    if name not in known:
        raise _unknown(name, known)
    take_away([name])


def _unknown(name: str, known: Mapping[str, Any]) -> RewardError:
    deployed = ", ".join(known) or "none"
    return RewardError(f"no reward {name!r} is deployed on this cluster; deployed: {deployed}")


def details_of(client: ServeSubmissionClient) -> dict[str, dict[str, Any]]:
    """What Serve tells of every reward's application, by the reward's name."""
    applications = client.get_serve_details()["applications"]
    prefix = app_name("")
    rewards = {name: a for name, a in applications.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): a for name, a in rewards.items()}


@dataclass(frozen=True)
class RewardStatus:
    """One reward: what Serve says of it, and what its replicas have done."""

    name: str
    state: str
    message: str
    running: int
    target: int
    pids: tuple[int, ...]
    stats: tuple[ReplicaStats, ...]  # of the replicas that answered

    @property
    def queue(self) -> int:
        """Calls that are waited for now."""
        return sum(replica.ongoing for replica in self.stats)

    def latency(self, quantile: float) -> float | None:
        """Seconds from a call's arrival to its answer, over the last calls of all replicas."""
        seen = [seconds for replica in self.stats for seconds in replica.latencies]
        return float(np.quantile(seen, quantile)) if seen else None


def status(client: ServeSubmissionClient) -> list[RewardStatus]:
    """Every reward of the cluster."""
    return [_status(name, application) for name, application in details_of(client).items()]


def _status(name: str, application: Mapping[str, Any]) -> RewardStatus:
    deployment = application["deployments"].get(name, {})
    replicas = [r for r in deployment.get("replicas", []) if r["state"] == "RUNNING"]
    return RewardStatus(
        name=name,
        state=application["status"],
        message=" ".join(filter(None, [application["message"], deployment.get("message")])),
        running=len(replicas),
        target=deployment.get("target_num_replicas", 0),
        pids=tuple(sorted(replica["pid"] for replica in replicas)),
        stats=_replica_stats(name) if replicas else (),
    )


def _replica_stats(name: str) -> tuple[ReplicaStats, ...]:
    """Of the replicas that answer; one that dies meanwhile is left out."""
    try:
        answers = serve.get_app_handle(app_name(name)).broadcast("stats")
        found = answers.results(timeout_s=10, return_exceptions=True)
    except (DeploymentUnavailableError, TimeoutError):
        return ()
    return tuple(answer for answer in found if isinstance(answer, ReplicaStats))


def wait_for(client: ServeSubmissionClient, names: list[str], deadline_s: float) -> None:
    """Returns when these rewards run with all their replicas; RewardError if one cannot."""

    def waiting() -> dict[str, str]:
        details = details_of(client)
        found = {name: _summary(name, details[name]) for name in names}
        for name, said in found.items():
            if details[name]["status"] == "DEPLOY_FAILED":
                raise RewardError(f"{app_name(name)}: {said}")
        return {name: said for name, said in found.items() if said != "RUNNING"}

    until_running(waiting, deadline_s=deadline_s, setting="--deadline", every_s=0.5)


def _summary(name: str, application: Mapping[str, Any]) -> str:
    """`RUNNING`, or the state and what is said of it."""
    deployment = application["deployments"].get(name, {})
    running = sum(r["state"] == "RUNNING" for r in deployment.get("replicas", []))
    target, total = deployment.get("target_num_replicas", 0), len(deployment.get("replicas", []))
    if application["status"] == "RUNNING" and running == target == total:
        return "RUNNING"
    said = f"{application['message']} {deployment.get('message', '')}".strip()
    return f"{application['status']} with {running} of {target} replicas. {said}".strip()
