"""`flowgrpo-ray rewards deploy | status | scale | remove`: rewards of a running cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flowgrpo_ray.cli import completion
from flowgrpo_ray.view.console import say
from flowgrpo_ray.view.tables import print_table

if TYPE_CHECKING:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    from flowgrpo_ray.serving.admin import RewardStatus

AddressOption = Annotated[
    str | None,
    typer.Option(help="of the Ray cluster; default: RAY_ADDRESS, else the one that runs here"),
]
DeadlineOption = Annotated[
    float, typer.Option("--deadline", min=0, help="seconds to wait until all replicas run")
]
console, progress = Console(markup=False), Console(stderr=True)


NameArgument = Annotated[
    str, typer.Argument(help="of the reward, as ocr", autocompletion=completion.rewards)
]


@contextmanager
def _connected(address: str | None) -> Iterator[ServeSubmissionClient]:
    """A connection to the cluster, and a word while it is made."""
    from flowgrpo_ray.serving import admin

    with ExitStack() as stack:
        with progress.status("connecting to the Ray cluster"):
            client = stack.enter_context(admin.connection(address))
        yield client


def deploy(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="as deployments/ocr.yaml")],
    address: AddressOption = None,
    deadline: DeadlineOption = 600,
) -> None:
    """Deploy the rewards of a Serve config file beside those that run, and wait for them."""
    from flowgrpo_ray.serving import admin

    config = admin.read_config(file)
    with _connected(address) as client:
        names = admin.deploy_file(client, file, config)
        with progress.status(f"starting {', '.join(names)}"):
            admin.wait_for(client, names, deadline)
        _show([row for row in admin.status(client) if row.name in names])


def status(
    address: AddressOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Replicas, queue, latency, errors and environment of every reward."""
    from flowgrpo_ray.serving import admin

    with _connected(address) as client:
        rows = admin.status(client)
    if as_json:
        print(json.dumps([_as_json(row) for row in rows]))
    elif rows:
        _show(rows)
    else:
        print("no rewards are deployed; deploy some with: flowgrpo-ray rewards deploy FILE")


def scale(
    name: NameArgument,
    replicas: Annotated[int, typer.Argument(min=1, help="that shall run")],
    address: AddressOption = None,
    deadline: DeadlineOption = 600,
    beyond: Annotated[
        bool, typer.Option("--beyond", help="ask for more than fits: the cluster grows by itself")
    ] = False,
) -> None:
    """Change the number of replicas of one reward, while runs use it."""
    from flowgrpo_ray.serving import admin

    with _connected(address) as client:
        admin.scale(client, name, replicas, beyond=beyond)
        with progress.status(f"{escape(name)}: waiting for {replicas} replicas"):
            admin.wait_for(client, [name], deadline)
        _show([row for row in admin.status(client) if row.name == name])


def remove(
    name: NameArgument,
    address: AddressOption = None,
) -> None:
    """Take a reward away, after it has answered the calls that it has."""
    from flowgrpo_ray.serving import admin

    with _connected(address) as client, progress.status(f"taking {escape(name)} away"):
        admin.remove(client, name)
    print(f"{name} is removed")


def _show(rows: list[RewardStatus]) -> None:
    table = Table()
    for column in ("reward", "state", "replicas", "queue", "calls", "errors", "p50/p95 ms"):
        table.add_column(column, justify="left" if column in ("reward", "state") else "right")
    for row in rows:
        table.add_row(
            row.name,
            row.state,
            f"{row.running}/{row.target}",
            str(row.queue),
            str(sum(replica.calls for replica in row.stats)),
            str(sum(replica.failures for replica in row.stats)),
            f"{_milliseconds(row.latency(0.5))}/{_milliseconds(row.latency(0.95))}",
        )
    print_table(console, table)
    for row in rows:
        images = sum(replica.images for replica in row.stats)
        environments = {replica.environment or "base" for replica in row.stats}
        told = [
            f"{images} images; environment {', '.join(sorted(environments)) or '-'}; "
            f"pids {' '.join(map(str, row.pids)) or '-'}",
            *filter(None, [row.message]),
            *sorted({f"last error: {r.last_error}" for r in row.stats if r.last_error}),
        ]
        for line in told:
            say(console, f"{row.name}: {line}")


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f}"


def _as_json(row: RewardStatus) -> dict[str, object]:
    latency = {"p50": row.latency(0.5), "p95": row.latency(0.95)}
    return {**asdict(row), "queue": row.queue, "latency_s": latency}
