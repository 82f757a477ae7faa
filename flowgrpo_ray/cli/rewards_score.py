"""`flowgrpo-ray rewards score`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from flowgrpo_ray.cli import completion
from flowgrpo_ray.cli.options import parse_option
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.images import WHITE, check_colour
from flowgrpo_ray.rewards import (
    build,
    check_options,
    keys_read,
    needs_sources,
    prompt_check,
    takes_sources,
    weighted_total,
)
from flowgrpo_ray.run.metrics import mean_and_std
from flowgrpo_ray.spec.prompt_keys import check_keys
from flowgrpo_ray.spec.prompts import Prompt, check_needed, check_prompts, load_prompts
from flowgrpo_ray.spec.sources import with_sources
from flowgrpo_ray.view.tables import print_table


def score(
    images: Annotated[
        Path,
        typer.Argument(metavar="IMAGES", help="a folder of PNG, JPEG or WebP files, or one file"),
    ],
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="PROMPTS",
            help="a prompt file, .txt or .jsonl: one line per image in the order of their names, "
            "or one for all",
        ),
    ],
    rewards: Annotated[
        list[str],
        typer.Option(
            "--reward",
            metavar="REWARD[=WEIGHT]",
            help="built in, or module:Class, and its weight in the total (1); may be repeated",
            autocompletion=completion.rewards,
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="REWARD.KEY=VALUE",
            help="an option of a reward, as ocr.detect=false",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="the table to write, .csv or .jsonl")] = Path(
        "scores.csv"
    ),
    batch: Annotated[int, typer.Option(min=1, help="images that a reward is given at once")] = 32,
    background: Annotated[
        str, typer.Option(help="what shows through where an image is transparent: a colour")
    ] = WHITE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the table")] = False,
) -> None:
    """Score image files against their prompts, without training and without Ray."""
    from flowgrpo_ray.run import scoring

    weights = _weights(rewards)
    chosen = _options(options or [], weights)
    scoring.check_table_file(out, overwrite)
    _check_background(background)
    files = scoring.find_images(images)
    own = scoring.pair(files, _prompts(prompts, chosen))
    batches = scoring.plan_batches(files, batch, background)

    console = Console()
    scores: dict[str, np.ndarray] = {}
    for name, watched in _in_turn(chosen, batches, console):
        reward = build(name, chosen[name])
        scores[name] = scoring.score_files(name, reward, files, own, watched, background)
    scores[scoring.TOTAL] = weighted_total(scores, weights)
    scoring.write_table(out, scoring.as_rows(files, own, scores))
    _show(console, weights, scores)
    count = f"{len(files)} image{'s' if len(files) > 1 else ''}"
    console.print(f"scores of {count} in {out}", soft_wrap=True, highlight=False, markup=False)


def _in_turn(
    rewards: Iterable[str], batches: Sequence[list[int]], console: Console
) -> Iterator[tuple[str, Iterable[list[int]]]]:
    """Each reward with the batches, whose progress shows. Built one after another: two large models
    may not fit beside each other."""
    with Progress(transient=True, disable=not console.is_terminal, console=console) as progress:
        for name in rewards:
            yield name, progress.track(batches, description=escape(name))


def _prompts(file: str, chosen: Mapping[str, Mapping[str, Any]]) -> list[Prompt]:
    """Those of a file, which every chosen reward can score."""
    prompts = load_prompts(file, "PROMPTS")
    called = {f"the reward {name!r}": keys_read(name, of) for name, of in chosen.items()}
    check_keys(prompts, f"PROMPTS = {file!r}", None, called)
    if any(map(takes_sources, chosen)) and any(prompt.names_images for prompt in prompts):
        prompts = with_sources(prompts, file, "PROMPTS", range(1, 17), "a reward")
    for name, options in chosen.items():
        needs = needs_sources(name, options)
        check_needed(prompts, "PROMPTS", needs, f"the reward {name!r}")
        check = prompt_check(name, options)
        check_prompts(prompts, "PROMPTS", check, f"the reward {name!r}")
    return prompts


def _check_background(name: str) -> None:
    try:
        check_colour(name)
    except ValueError as error:
        raise SpecError(f"--background {name!r} is no colour: write a name, or #rrggbb") from error


def _weights(rewards: Sequence[str]) -> dict[str, float]:
    """Weight per reward, from `reward=weight`."""
    weights: dict[str, float] = {}
    for text in rewards:
        name, equals, number = text.partition("=")
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise SpecError(
                f"--reward {text!r}: the weight is {number!r}, not a number; write it as {name}=0.5"
            )
        if name in weights:
            raise SpecError(f"--reward {text!r}: {name!r} is there twice; name a reward once")
        weights[name] = weight
    if not any(weights.values()):
        raise SpecError(f"every weight is 0 ({', '.join(weights)}): there would be no total")
    return weights


def _options(options: Sequence[str], weights: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Options per reward, from `reward.key=value`; all are checked against the classes."""
    chosen: dict[str, dict[str, Any]] = {name: {} for name in weights}
    for text in options:
        place, value = parse_option(text, example="ocr.detect=false")
        name, _, key = place.rpartition(".")
        if name not in chosen:
            raise SpecError(
                f"--option {text!r}: {name!r} is no --reward of this command; write "
                f"REWARD.KEY=VALUE with one of {', '.join(chosen)}"
            )
        chosen[name][key] = value
    for name, values in chosen.items():
        check_options(name, values)
    return chosen


def _show(console: Console, weights: dict[str, float], scores: dict[str, np.ndarray]) -> None:
    """Mean and spread over the images that have a score, and how many have none."""
    table = Table()
    for column in ("reward", "weight", "mean", "std", "unscored"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    for name, values in scores.items():
        found = mean_and_std(values)
        numbers = (f"{number:.4g}" if math.isfinite(number) else "-" for number in found.values())
        weight = f"{weights[name]:g}" if name in weights else ""
        table.add_row(escape(name), weight, *numbers, str(int(np.isnan(values).sum())))
    print_table(console, table)
