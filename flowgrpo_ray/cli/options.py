"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flowgrpo_ray.cli import completion
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.run.checkpoint import BEST
from flowgrpo_ray.spec.file import parse_yaml

SpecArgument = Annotated[
    str,
    typer.Argument(
        metavar="SPEC|RECIPE",
        help="a YAML training spec, or a recipe by name",
        autocompletion=completion.specs,
    ),
]
TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN|SPEC",
        help="a run folder, or a spec or recipe, which stands for its untrained base model",
        autocompletion=completion.runs_and_specs,
    ),
]
RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="a run folder, as runs/tiny-ocr", autocompletion=completion.runs
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key of the spec, as seed=1"),
]
WeightsOption = Annotated[
    Literal["ema", "last"], typer.Option(help="averaged weights, or those of the last update")
]
StepsOption = Annotated[
    int | None,
    typer.Option(min=1, max=1000, help="denoising steps; default: evaluation.steps of the spec"),
]
RunsOption = Annotated[
    Path | None,
    typer.Option(
        help="folder that holds the run folders; default: FLOWGRPO_RUNS, else runs, and in a Ray "
        "job ~/flowgrpo-runs"
    ),
]


def _iteration(text: str) -> int | str:
    if text == BEST:
        return text
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is neither a number of iterations nor {BEST}")
    return int(text)


IterationOption = Annotated[
    Any,  # a number, BEST or None
    typer.Option(
        metavar=f"N|{BEST}",
        parser=_iteration,
        help=f"of the checkpoint, or {BEST}: by checkpoint.best; default: newest",
    ),
]


def parse_option(text: str, example: str = "batch=4") -> tuple[str, Any]:
    """Key and value of `--option key=value`; the value is JSON or YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SpecError(f"--option {text!r}: write it as key=value, for example --option {example}")
    try:
        return key, parse(value)
    except ValueError:
        return key, parse_yaml(value, f"--option {text!r}")
