"""Who may ask for scores over HTTP: the bearer token of a deployment."""

from __future__ import annotations

import os

from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.common.loopback import is_loopback
from flowgrpo_ray.serving.args import RewardServiceArgs
from flowgrpo_ray.serving.ray_private import http_address


def token_of(args: RewardServiceArgs) -> str | None:
    """The bearer token of this deployment; RewardError where it needs one and has none."""
    token = os.environ.get(args.token_env) or None
    if token is None and "token_env" in args.model_fields_set:
        raise RewardError(
            f"token_env = {args.token_env!r}: the replica of reward {args.name!r} has no such "
            "environment variable: set it in the environment of the cluster's nodes (or in "
            "runtime_env.env_vars of the application), or leave token_env out"
        )
    address = http_address()
    if token is None and address and not is_loopback(address[0]):
        raise RewardError(
            f"Serve's HTTP listens on {address[0]!r}, beyond this machine, and there is no token: "
            f"set {args.token_env} in the environment of the cluster's nodes (or in runtime_env."
            "env_vars of the application), or keep http_options.host at 127.0.0.1"
        )
    return token
