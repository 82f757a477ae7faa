"""`flowgrpo-ray prompts fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flowgrpo_ray.common.errors import PromptError
from flowgrpo_ray.spec import public_prompts

prompts_app = typer.Typer(no_args_is_help=True, help="Public prompt sets.")


@prompts_app.callback()
def _group() -> None:
    """A group even while it has one command."""


@prompts_app.command()
def fetch(
    names: Annotated[
        list[str], typer.Argument(metavar="SET...", help=" or ".join(public_prompts.SETS))
    ],
    folder: Annotated[Path, typer.Option(help="where recipes look for them")] = Path("prompts"),
    source: Annotated[
        str, typer.Option(help="address of a mirror with the same files")
    ] = public_prompts.SOURCE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace other files")] = False,
) -> None:
    """Fetch the public prompt sets that recipes name."""
    for name in names:
        if name not in public_prompts.SETS:
            known = ", ".join(public_prompts.SETS)
            raise PromptError(f"{name!r} is no public set; sets: {known}")
    console = Console()

    def tell(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    tell(f"from {public_prompts.REPOSITORY}; licence: {public_prompts.LICENCE}")
    for name in names:
        public_prompts.fetch(name, folder, source, overwrite, tell)
