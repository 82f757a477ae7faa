"""Starting reward deployments from a driver, waiting until they run, and taking them away."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ReplicaState

from flowgrpo_ray.common.errors import (
    ClusterError,
    RewardEnvironmentError,
    RewardError,
    SpecError,
)
from flowgrpo_ray.rewards.environments import FOLDER_VARIABLE, environments_folder
from flowgrpo_ray.serving.args import RewardServiceArgs
from flowgrpo_ray.serving.arrivals import arrivals
from flowgrpo_ray.serving.ray_private import end_replicas, http_address, serve_applications
from flowgrpo_ray.serving.service import app, quiet
from flowgrpo_ray.serving.types import app_name
from flowgrpo_ray.serving.waiting import until_running

REMOVED_S = 300.0  # more than replicas are given to answer the calls that they have (drain_s)


def deploy(args: Sequence[RewardServiceArgs], *, http_port: int | None) -> list[str]:
    """Asks Serve for one application per reward and returns while they start.

    Serve is started if it does not run, its HTTP on 127.0.0.1 alone, or without any if
    `http_port` is None. An application that is there already, from whomever and with whatever
    options, is used as it is: the names of these rewards are returned.
    """
    check_environments_there(args, built_there=False)
    names = [arg.name for arg in args]
    if len(set(names)) < len(names):
        raise SpecError(f"rewards need different names, got {names}")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="Disabled" if http_port is None else "HeadOnly",
        http_options=None if http_port is None else {"host": "127.0.0.1", "port": http_port},
        logging_config=quiet(),
    )
    if http_port is not None:
        _check_http(http_port)
    usable = (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING, ApplicationStatus.UNHEALTHY)
    applications = serve.status().applications
    present = [name for name in names if _status(applications, name) in usable]
    targets = [
        serve.RunTarget(
            app(arg),
            name=app_name(arg.name),
            route_prefix=f"/{arg.name}",
            logging_config=quiet(),
            external_scaler_enabled=arg.autoscaling is None,
        )
        for arg in args
        if arg.name not in present
    ]
    if targets:
        serve.run_many(
            targets,
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
    return present


def check_environments_there(args: Sequence[RewardServiceArgs], *, built_there: bool) -> None:
    """RewardEnvironmentError if environments are here and the cluster's machines do not find them,
    because one side alone has FLOWGRPO_ENVIRONMENTS: a replica would wait for its Python for ever.

    built_there: whether the applications are built on the cluster, and so with its variable.
    """
    here = environments_folder()
    named = {arg.environment for arg in args if arg.environment is not None}
    names = sorted(name for name in named if (here / name).is_dir())
    if not names:
        return
    ask = ray.remote(num_cpus=0)(_looks)
    there, why, lacks = ray.get(ask.remote(names, None if built_there else here))
    if there != here and lacks:
        raise RewardEnvironmentError(
            f"environments {', '.join(lacks)}: here they are in {here} ({_variable()}), and the "
            f"cluster's machines look in {there} ({why}): start Ray on all of them with the "
            f"{FOLDER_VARIABLE} of here, or build them there"
        )


def _looks(names: Sequence[str], folder: Path | None) -> tuple[Path, str, list[str]]:
    """Where a process of the cluster looks, why there, and which of the environments are not in
    `folder`, which by default is that one."""
    there = environments_folder()
    lacks = [name for name in names if not (folder or there).joinpath(name).is_dir()]
    return there, _variable(), lacks


def _variable() -> str:
    return f"{FOLDER_VARIABLE} is {'' if os.environ.get(FOLDER_VARIABLE) else 'not '}set"


def remove(names: Sequence[str]) -> None:
    """Deletes the applications of these rewards, and returns when they are gone.

    Replicas answer the calls that they have. Those that have not started have none: Serve would
    ask them to finish, and wait for their answer as long as for that of the others.
    """
    applications = serve_applications()
    started = {
        replica["actor_name"]
        for name in map(app_name, names)
        for deployment in applications.get(name, {"deployments": {}})["deployments"].values()
        for replica in deployment["replicas"]
        if replica["state"] != ReplicaState.STARTING
    }
    for name in names:
        serve.delete(app_name(name), _blocking=False)
    end = time.monotonic() + REMOVED_S
    while left := [name for name in map(app_name, names) if name in serve_applications()]:
        if time.monotonic() > end:
            raise RewardError(
                f"still there {REMOVED_S:g} s after they were taken away: {', '.join(left)}. Their "
                "replicas have calls to answer (drain_s): Serve goes on with it"
            )
        for name in left:
            end_replicas(name, but=started)
        time.sleep(0.1)


def _check_http(port: int) -> None:
    """ClusterError if Serve, which ran already, does not listen on this port."""
    address = http_address()
    if address is None or address[1] != port:
        listens = "without HTTP" if address is None else f"with HTTP on {address[0]}:{address[1]}"
        raise ClusterError(
            f"cluster.reward_http_port = {port}, but Serve runs on this cluster already, {listens}"
            ", and keeps that: leave the key out, give it that port, or end Serve first "
            "(serve shutdown)"
        )


async def check_same(args: RewardServiceArgs) -> None:
    """RewardError if the application of this name serves another reward or other options."""
    served = await serve.get_app_handle(app_name(args.name)).describe.remote()
    if served != args.identity:
        raise RewardError(
            f"{app_name(args.name)} is deployed on this cluster with {served}, and the spec asks "
            f"for {args.identity}. Name the reward otherwise in the spec (its `reward` key says "
            "what it is), or delete that application"
        )


def _status(
    applications: Mapping[str, ApplicationStatusOverview], name: str
) -> ApplicationStatus | None:
    overview = applications.get(app_name(name))
    return overview.status if overview else None


def wait(names: Sequence[str], *, deadline_s: float, present: Collection[str] = ()) -> None:
    """Returns when the applications of all these rewards run; RewardError if one cannot, or if for
    `deadline_s` nothing was downloaded either.

    Of those `present`, which are not this run's, one replica is enough: others may be missing for
    want of a machine.
    """

    def waiting() -> dict[str, str]:
        applications = serve.status().applications
        found: dict[str, str] = {}
        for name in map(app_name, names):
            overview = applications.get(name)
            if overview is None:
                raise RewardError(f"{name}: no such application on this cluster")
            if overview.status == ApplicationStatus.DEPLOY_FAILED:
                raise RewardError(f"{name}: {overview.status.value}: {_messages(overview)}")
            shared = name in map(app_name, present)
            if overview.status != ApplicationStatus.RUNNING and not (shared and _usable(overview)):
                found[name] = f"{overview.status.value} {_messages(overview)}".strip()
        return found

    with arrivals() as arrived:
        until_running(
            waiting,
            deadline_s=deadline_s,
            setting="cluster.ready_timeout_s",
            every_s=0.1,
            arrived=arrived,
        )


def _usable(overview: ApplicationStatusOverview) -> bool:
    """Whether each deployment of an application has a replica that runs."""
    states = [deployment.replica_states for deployment in overview.deployments.values()]
    return bool(states) and all(of.get(ReplicaState.RUNNING, 0) for of in states)


def _messages(overview: ApplicationStatusOverview) -> str:
    """What Serve says of an application and of its deployments."""
    parts = [overview.message, *(d.message for d in overview.deployments.values())]
    return " ".join(dict.fromkeys(part for part in parts if part))


def start_rewards(
    args: Sequence[RewardServiceArgs], *, http_port: int | None, deadline_s: float
) -> list[str]:
    """Deploys all rewards at once and waits until they run; names of those found there already."""
    present = deploy(args, http_port=http_port)
    wait([arg.name for arg in args], deadline_s=deadline_s, present=present)
    return present
