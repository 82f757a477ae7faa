"""`flowgrpo-ray monitor`: run folders as a live page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console

from flowgrpo_ray.common.loopback import is_loopback
from flowgrpo_ray.common.paths import runs_root


def monitor(
    runs: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUNS|RUN",
            help="a folder of run folders, or one run folder; default: FLOWGRPO_RUNS, else runs",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="the address to listen at; beyond this machine only if you say so")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="the port to listen at; 0 takes a free one")
    ] = 0,
) -> None:
    """Show runs as a live page: curves, samples, stages, workers and queues; until Ctrl-C.

    The printed address has the token that opens the page. It is new at every start, unless the
    variable FLOWGRPO_MONITOR_TOKEN has one.
    """
    from flowgrpo_ray.view.guard import TOKEN_VARIABLE, choose_token
    from flowgrpo_ray.view.monitor import Monitor

    console = Console(markup=False)
    given = os.environ.get(TOKEN_VARIABLE)
    token = choose_token(given)
    server = Monitor(runs_root(runs), host, port, token)
    shown = f"${TOKEN_VARIABLE}" if given else quote(token, safe="")
    console.print(f"monitor: {server.address}?token={shown}", soft_wrap=True, highlight=False)
    if not is_loopback(host):
        console.print(
            f"It listens at {host}, without encryption: who listens in on the network learns the "
            "token. Safer from another machine is ssh -L (docs/monitor.md)",
            highlight=False,
        )
    try:
        server.run()
    except KeyboardInterrupt:
        console.print("monitor stopped")
