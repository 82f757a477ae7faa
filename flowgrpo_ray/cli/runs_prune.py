"""`flowgrpo-ray runs prune`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from flowgrpo_ray.cli.options import RunsOption
from flowgrpo_ray.common.paths import existing_runs
from flowgrpo_ray.run.prune import leftovers, prune


def prune_runs(
    runs: RunsOption = None,
    checkpoints: Annotated[
        bool,
        typer.Option(
            "--checkpoints",
            help="of finished runs also checkpoints but the last one, the best, and those from "
            "before an alarm",
        ),
    ] = False,
    delete: Annotated[bool, typer.Option("--delete", help="delete it; without, only list")] = False,
) -> None:
    """List, or delete, runs that finished no iteration; a run that trains is left alone."""
    console = Console(markup=False, highlight=False)
    found = leftovers(existing_runs(runs), checkpoints=checkpoints)
    for leftover in found:
        line = f"{leftover.path}: {leftover.why}, {leftover.size / 2**20:,.1f} MiB"
        console.print(line, soft_wrap=True)
    if not found:
        console.print("nothing to delete")
    elif delete:
        console.print(f"deleted: {prune(found) / 2**20:,.1f} MiB")
    else:
        console.print("nothing is deleted yet: add --delete")
