"""`flowgrpo-ray rewards env …`: environments of their own for rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flowgrpo_ray.common.errors import RewardEnvironmentError
from flowgrpo_ray.rewards import environment_build, environments
from flowgrpo_ray.view.tables import print_table

env_app = typer.Typer(
    no_args_is_help=True,
    help="Environments of their own, for rewards whose packages conflict with this one.",
)
console = Console(markup=False)  # what is printed may name a file of any name

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="paddleocr, sglang, or a name for your own")
]


@env_app.command()
def build(
    name: NameArgument,
    requirement: Annotated[
        list[str] | None,
        typer.Option(metavar="REQUIREMENT", help="a package, as 'transformers==4.56.2'"),
    ] = None,
    requirements: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a file with one package a line")
    ] = None,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="share nothing with this environment, not even ray")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="replace an environment that is sound")
    ] = False,
) -> None:
    """Build an environment; nothing is done if it is there and sound.

    A failed build leaves the environment that is there as it was.
    """
    wanted = [*(requirement or []), *(_lines(requirements) if requirements else [])]
    console.print(f"building {name} in {environments.environments_folder()}", soft_wrap=True)
    manifest = environment_build.build(name, wanted, standalone=standalone, rebuild=rebuild)
    shared = f", {len(manifest.shared)} shared with {manifest.base}" if manifest.shared else ""
    console.print(
        f"{name}: {manifest.kind}, {len(manifest.packages)} packages of its own{shared}",
        soft_wrap=True,
        highlight=False,
    )
    console.print(environments.python_of(name), soft_wrap=True, highlight=False)


@env_app.command("list")
def show() -> None:
    """List the environments with their state."""
    table = Table(box=None)
    for column in ("name", "kind", "python", "size", "state"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for name in environments.names():
        manifest = environments.read_manifest(name)
        fault = environments.fault_of(name)
        if manifest is None:
            table.add_row(name, "-", "-", "-", fault)
            continue
        size = f"{environments.size_of(name) / 2**20:,.0f} MiB"
        table.add_row(name, manifest.kind, manifest.python, size, fault or "ok")
    print_table(console, table)


@env_app.command()
def remove(name: NameArgument) -> None:
    """Delete an environment. Rewards that run in it fail when they import anything more."""
    environments.remove(name)
    console.print(f"{name} removed", highlight=False)


def _lines(file: Path) -> list[str]:
    """The requirements of a file, without comments."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RewardEnvironmentError(f"--requirements {file}: cannot be read: {why}") from error
    lines = (line.partition(" #")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]
