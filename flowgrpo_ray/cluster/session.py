"""The Ray cluster of a run: the one that is there, or a private one on this machine.

A private cluster listens on loopback only, keeps Ray's token authentication on with a token that
lives in this process's environment, and leaves no file behind but the logs in the run folder.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowgrpo_ray.cluster.janitor import MARK, RAY, janitor, keep_logs
from flowgrpo_ray.cluster.machine import temporary_root
from flowgrpo_ray.common.addresses import probe_cluster, ray_address
from flowgrpo_ray.common.errors import ClusterError, token_refused
from flowgrpo_ray.estimate.store import store_size
from flowgrpo_ray.spec.training import TrainingSpec, required_resources


@contextmanager
def ray_session(spec: TrainingSpec, logs: Path) -> Iterator[None]:
    """Within it, Ray is connected and has what ``spec`` asks for.

    Joins the cluster that ``RAY_ADDRESS`` names (``ray job submit`` sets it), else starts one for
    this run alone and copies its logs to ``logs`` at the end.
    """
    if joined():
        with _joined(spec):
            yield
    else:
        with _private(spec, logs):
            yield


def joined() -> bool:
    """Whether a cluster is named to join."""
    return ray_address() is not None


def probe() -> None:
    """``ClusterError`` if a cluster is named to join and none is there."""
    if (address := ray_address()) is None:
        return
    if address == "auto":
        from flowgrpo_ray.serving.ray_private import cluster_here

        os.environ["RAY_ADDRESS"] = address = cluster_here(address)
    probe_cluster(address, "RAY_ADDRESS")


@contextmanager
def _joined(spec: TrainingSpec) -> Iterator[None]:
    import ray
    from ray.exceptions import AuthenticationError

    from flowgrpo_ray.serving.ray_private import own_signals

    probe()
    try:
        with own_signals():
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except AuthenticationError as error:
        raise token_refused(os.environ["RAY_ADDRESS"], error) from error
    except ConnectionError as error:
        raise ClusterError(
            f"RAY_ADDRESS = {os.environ['RAY_ADDRESS']!r}: no cluster answers there. Start one "
            f"(ray start --head), or unset RAY_ADDRESS to run on this machine alone. Cause: {error}"
        ) from error
    try:
        check_resources(spec)
        yield
    finally:
        ray.shutdown()


@contextmanager
def _private(spec: TrainingSpec, logs: Path) -> Iterator[None]:
    gpus = check_local_gpus(spec)
    os.environ.update(private_environment())
    os.environ.pop("RAY_ADDRESS", None)  # it is empty, if it is there
    import ray

    from flowgrpo_ray.serving.ray_private import own_signals

    needed = required_resources(spec)
    temporary = Path(tempfile.mkdtemp(prefix="flowgrpo-", dir=temporary_root()))
    with own_signals(), janitor(temporary, logs), _cleared(temporary, logs):
        os.environ[MARK] = str(temporary)  # which all that Ray starts inherits
        try:
            ray.init(
                num_gpus=gpus,
                object_store_memory=store_size(spec),
                num_cpus=max(os.cpu_count() or 1, math.ceil(needed["CPU"])),
                # This one machine stands for all that the spec places by custom resources.
                resources={k: math.ceil(n) for k, n in needed.items() if k not in ("CPU", "GPU")},
                include_dashboard=spec.cluster.dashboard,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(temporary / RAY),  # it opens this one to all users of the machine
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:  # Ray has no class for it
            if "timed out during startup" not in str(error):
                raise
            raise ClusterError(
                "Ray did not start within the 30 s that it gives itself: this machine is busy "
                "with other work, or short of memory. Try again when it is not"
            ) from error
        check_resources(spec)
        yield


@contextmanager
def _cleared(temporary: Path, logs: Path) -> Iterator[None]:
    """Ends Ray, keeps its logs and deletes its folder."""
    import ray

    try:
        yield
    finally:
        ray.shutdown()
        os.environ.pop(MARK, None)
        keep_logs(temporary, logs)
        shutil.rmtree(temporary, ignore_errors=True)


def private_environment() -> dict[str, str]:
    """Ray's settings for a cluster that nobody else can reach; to be set before ``import ray``."""
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # bind to loopback, not to all interfaces
        "RAY_AUTH_MODE": "token",
        # In the environment, so no file in ~/.ray; kept, because Ray reads it once per process.
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "flowgrpo_ray.serving.json_errors:middlewares",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Finished calls that Ray remembers, 2 kB each: its own 100,000 grow for hours.
        "RAY_task_events_max_num_task_in_gcs": "10000",
    }


def check_resources(spec: TrainingSpec) -> None:
    """``ClusterError`` if the connected cluster is too small for the spec."""
    import ray

    have = ray.cluster_resources()
    for resource, needed in required_resources(spec).items():
        if needed > have.get(resource, 0) + 1e-9:
            raise ClusterError(_too_few(spec, resource, needed, have.get(resource, 0)))


def check_local_gpus(spec: TrainingSpec) -> int | None:
    """The same for GPUs before a private cluster starts: how many there are, where ``spec`` asks
    for any. They are those that torch finds: in WSL and in containers there are no files of them.
    """
    needed = required_resources(spec)["GPU"]
    if not needed:
        return None
    program = "import torch; print(torch.cuda.device_count())"  # not here: torch takes seconds
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, check=True, process_group=0)
    have = int(found.stdout)
    if needed > have:
        raise ClusterError(_too_few(spec, "GPU", needed, have))
    return have


def _too_few(spec: TrainingSpec, resource: str, needed: float, have: float) -> str:
    if resource not in ("CPU", "GPU"):
        return (
            f"the spec's `resources` ask for {needed:g} {resource} and the cluster has {have:g}: "
            f"start the machines that are meant with ray start --resources "
            f"'{{\"{resource}\": 1}}', or lower or leave out that key"
        )
    key = f"{resource.lower()}s"
    rewards = ", ".join(f"rewards.{name}.{key}" for name in spec.rewards)
    actors = ", ".join(
        f"cluster.{section}.{key} = {getattr(kind, key):g} (x {kind.count})"
        for section, kind in spec.actors.items()
    )
    return (
        f"the spec asks for {needed:g} {resource}s and the cluster has {have:g}: lower {actors} "
        f"or {rewards}, or join a larger cluster with RAY_ADDRESS"
    )
