"""`flowgrpo-ray recipes`: what ships with the package, by what it needs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flowgrpo_ray.cli import completion
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.files import check_free
from flowgrpo_ray.spec.file import RECIPES, load_spec, recipe_names, unknown_recipe

recipes_app = typer.Typer(help="List, show and copy the training specs of this package.")


NameArgument = Annotated[str, typer.Argument(metavar="NAME", autocompletion=completion.recipes)]


@dataclass(frozen=True)
class Recipe:
    """A line of the list."""

    name: str
    gpus: int
    model: str
    objective: str
    says: str


@recipes_app.callback(invoke_without_command=True)
def list_recipes(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead")] = False,
) -> None:
    """List the training specs of this package, those first that need no GPU."""
    if context.invoked_subcommand is not None:
        return
    found = sorted(map(_recipe, recipe_names()), key=lambda recipe: (recipe.gpus, recipe.name))
    if as_json:
        print(json.dumps([asdict(recipe) for recipe in found]))
        return
    console = Console()
    for gpus in sorted({recipe.gpus for recipe in found}):
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)  # names are copied
        table.add_column()
        for recipe in found:
            if recipe.gpus == gpus:
                table.add_row(f"[bold]{recipe.name}[/]", recipe.says)
        console.print(f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "no GPU", highlight=False)
        console.print(table)
    console.print("next: flowgrpo-ray plan NAME, recipes copy NAME FILE", highlight=False)


def _recipe(name: str) -> Recipe:
    spec = load_spec(name)
    says = (RECIPES / f"{name}.yaml").read_text("utf-8").splitlines()[0].lstrip("# ")
    return Recipe(name, spec.gpus, spec.model.path, spec.objective.kind, says)


@recipes_app.command()
def show(name: NameArgument) -> None:
    """Print a recipe, with its comments."""
    print(_text(name), end="")


@recipes_app.command()
def copy(
    name: NameArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the YAML file to write")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file")] = False,
) -> None:
    """Copy a recipe, with its comments, into a file of your own to change."""
    text = _text(name)
    check_free(file, overwrite, str(file))
    if not file.parent.is_dir():
        raise SpecError(f"{file}: there is no folder '{file.parent}'; make it")
    file.write_text(text, encoding="utf-8")
    console = Console()
    told = f"{file} written; next: flowgrpo-ray plan {file}"
    console.print(told, soft_wrap=True, highlight=False, markup=False)


def _text(name: str) -> str:
    if name not in recipe_names():
        raise unknown_recipe(name)
    return (RECIPES / f"{name}.yaml").read_text("utf-8")
