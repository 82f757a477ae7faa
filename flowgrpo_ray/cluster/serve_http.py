"""Where Serve listens on the connected cluster."""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private import replica
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client  # Serve's public interface does not tell


def http_address() -> tuple[str, int] | None:
    """Host and port of Serve's HTTP proxies, or None where Serve runs without them."""
    client = _get_global_client()
    assert client is not None
    if ray.get(client._controller.get_proxy_location.remote()) == ProxyLocation.Disabled:
        return None
    options = client.http_config
    return options.host or "127.0.0.1", options.port


def stay_on_loopback() -> None:
    """In a replica: its internal port listens on loopback where Ray does.

    Serve opens that port on all interfaces, after it has made the replica, and has no option for
    it. The port asks for Ray's token wherever it listens.
    """
    if ray.util.get_node_ip_address() != "127.0.0.1":
        return
    add_port = replica.add_port_to_grpc_server

    def on_loopback(server: Any, address: str) -> int:
        return add_port(server, address.replace("[::]", "127.0.0.1"))

    replica.add_port_to_grpc_server = on_loopback
