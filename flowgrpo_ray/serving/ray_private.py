"""All that this program takes from Ray beyond its public interface, and why it must.

Nothing else in the package touches a private name of Ray. Whoever moves to another version of Ray
runs `tests/serving/test_ray_private.py` first: it names what the new version lacks.

Serve is imported where it is needed: it takes 0.7 s, and processes that train need none of it.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray._private.worker import get_dashboard_url


def actor_id(actor: Any) -> str:
    """What Ray calls an actor in its errors; a handle does not tell it publicly."""
    return actor._actor_id.hex()


def cluster_here(address: str) -> str:
    """The address itself, or what "auto" stands for on this machine if Ray knows of a cluster: it
    may be gone, and Ray asks it for minutes."""
    from ray._private.services import get_ray_address_from_environment

    if address != "auto":
        return address
    with suppress(ConnectionError):  # none is known
        return get_ray_address_from_environment(address, None) or address
    return address


def dashboard_address() -> str | None:
    """Host and port of the connected cluster's dashboard, if it has one; only `ray.init` tells."""
    return get_dashboard_url()


def free_by_node() -> Mapping[str, Mapping[str, float]]:
    """What nobody holds of each node's resources; publicly Ray tells their sum over all nodes."""
    return available_resources_per_node()


def add_to_counter(counter: Any, value: float, tags: Mapping[str, str] | None) -> None:
    """Let a metric of `ray.util.metrics` grow by `value`, which may be 0: `inc` refuses that."""
    counter._record(value, tags)


def serve_applications() -> Mapping[str, Any]:
    """Applications of the connected cluster's Serve as its REST interface tells them, none where
    Serve does not run: `serve.status` does not tell how many replicas a deployment should have."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    return client.get_serve_details()["applications"] if client else {}


def end_replicas(application: str, *, but: Collection[str]) -> None:
    """Kills an application's replicas, started or not, but those that are called so: Serve tells
    none of an application that it deletes, yet their actors have names."""
    actors: Any = ray.util.list_named_actors(all_namespaces=True)
    for actor in actors:
        name = actor["name"]
        if name.startswith(f"SERVE_REPLICA::{application}#") and name not in but:
            with suppress(ValueError):  # it is gone
                ray.kill(ray.get_actor(name, namespace=actor["namespace"]))


def http_address() -> tuple[str, int] | None:
    """Host and port of Serve's HTTP proxies, or None where Serve runs without them."""
    from ray.serve.config import ProxyLocation
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    if ray.get(client._controller.get_proxy_location.remote()) == ProxyLocation.Disabled:
        return None
    options = client.http_config
    return options.host or "127.0.0.1", options.port


@contextmanager
def own_signals() -> Iterator[None]:
    """Within it `ray.init` leaves this process's handler of SIGTERM as it is, and starts Ray's in a
    process group of their own. Its two handlers (the second one, of C++, prints a stack and aborts)
    would end this process in the middle of a start, and what a terminal or `timeout` sends to the
    group of this one would end Ray first. Its end leaves SIGTERM to the system, which would end
    this process before Ray's are gone and the run's last files are written."""
    from ray import _raylet  # pyright: ignore[reportAttributeAccessIssue]
    from ray._private import services, utils

    raylet: Any = _raylet
    handler, process, core = utils.set_sigterm_handler, services.ConsolePopen, raylet.CoreWorker

    class WithOurHandler(core):
        def __init__(self, *_: Any, **__: Any) -> None:
            _set_handler_again()

        def shutdown_driver(self) -> None:
            super().shutdown_driver()
            _set_handler_again()

    utils.set_sigterm_handler = lambda _: None
    services.ConsolePopen = functools.partial(process, process_group=0)
    raylet.CoreWorker = WithOurHandler
    try:
        yield
    finally:
        utils.set_sigterm_handler, services.ConsolePopen = handler, process
        raylet.CoreWorker = core


def _set_handler_again() -> None:
    """Python's for SIGTERM, where C++ has set another one."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def stay_on_loopback() -> None:
    """In a replica: its internal port listens on loopback where Ray does.

    Serve opens that port on all interfaces, after it has made the replica, and has no option for
    it. The port asks for Ray's token wherever it listens.
    """
    from ray.serve._private import replica

    if ray.util.get_node_ip_address() != "127.0.0.1":
        return
    add_port = replica.add_port_to_grpc_server

    def on_loopback(server: Any, address: str) -> int:
        return add_port(server, address.replace("[::]", "127.0.0.1"))

    replica.add_port_to_grpc_server = on_loopback
