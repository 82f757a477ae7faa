"""Where Serve's HTTP listens on the connected cluster."""

from __future__ import annotations

import ray
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
