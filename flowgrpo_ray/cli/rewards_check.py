"""`flowgrpo-ray rewards check`."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flowgrpo_ray.cli import completion
from flowgrpo_ray.cli.options import parse_option
from flowgrpo_ray.common.errors import RewardError, SpecError
from flowgrpo_ray.rewards import BUILTIN, build, check_options, needs_sources, prompt_check
from flowgrpo_ray.spec.file import load_spec, recipe_names
from flowgrpo_ray.spec.sections import RewardSpec
from flowgrpo_ray.view.console import say
from flowgrpo_ray.view.tables import print_table

if TYPE_CHECKING:
    from flowgrpo_ray.rewards.calibration import Picture, Report

DEFAULT_SIZE = (512, 512)


def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="SPEC|RECIPE|REWARD",
            help="a YAML training spec, a recipe, or one reward: built in, or module:Class",
            autocompletion=completion.specs_and_rewards,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a key of the spec"),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="an option of the one reward"),
    ] = None,
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="H W", help="of the pictures; default: sampling.size of the spec, or 512 512"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """May I train on this reward? Scores pictures whose ranking is known, and judges the scores.

    Exit status 1 if a reward fails that enters the trained total.
    """
    from flowgrpo_ray.rewards.calibration import calibration_set

    chosen, spec_size = _chosen(target, overrides or [], options or [])
    size = size or spec_size
    pictures = calibration_set(size)
    for name, reward in chosen.items():
        _check_can_score(name, reward, pictures)
    console = Console()
    reports: dict[str, Report] = {}
    for name, reward in chosen.items():
        reports[name] = _report(name, reward, pictures)
        if not as_json:
            _show(console, name, reward, reports[name], size)
    passed = all(report.passed for name, report in reports.items() if chosen[name].weight)
    if as_json:
        rows = {name: _as_row(chosen[name], report) for name, report in reports.items()}
        print(json.dumps({"passed": passed, "size": size, "rewards": rows}))
    if not passed:
        raise typer.Exit(1)


def _chosen(
    target: str, overrides: Sequence[str], options: Sequence[str]
) -> tuple[Mapping[str, RewardSpec], tuple[int, int]]:
    """The rewards by name, and the size of the pictures."""
    if Path(target).is_file() or target in recipe_names():
        if options:
            raise SpecError(
                f"--option is for a reward named alone; for those of {target} "
                "write --set rewards.NAME.options.KEY=VALUE"
            )
        spec = load_spec(target, overrides)
        return spec.rewards, spec.sampling.size
    if target not in BUILTIN and not re.fullmatch(r"[\w.]+:\w+", target):
        known = [*recipe_names(), *BUILTIN]
        near = difflib.get_close_matches(target, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SpecError(
            f"{target!r} is neither a file, nor a recipe, nor a reward{hint} (rewards: "
            f"{', '.join(BUILTIN)}, or your own as module:Class; recipes: "
            f"{', '.join(recipe_names())})"
        )
    if overrides:
        raise SpecError(f"--set is for a spec; for the reward {target} write --option KEY=VALUE")
    return {target: RewardSpec(options=dict(map(parse_option, options)))}, DEFAULT_SIZE


def _check_can_score(name: str, reward: RewardSpec, pictures: Sequence[Picture]) -> None:
    check_options(reward.reward or name, reward.options)
    check_prompt = prompt_check(reward.reward or name, reward.options)
    for prompt in dict.fromkeys(picture.prompt for picture in pictures):
        try:
            check_prompt(prompt, {})
        except ValueError as error:
            raise SpecError(
                f"reward {name!r} cannot be checked: it does not score prompts such as "
                f"{prompt!r} without metadata ({error}). Other rewards of a spec can be "
                "checked one by one: flowgrpo-ray rewards check REWARD"
            ) from error


def _report(name: str, reward: RewardSpec, pictures: Sequence[Picture]) -> Report:
    from flowgrpo_ray.rewards.calibration import check_reward

    of = reward.reward or name
    scorer, lower = build(of, reward.options), reward.weight < 0
    try:
        return check_reward(scorer, pictures, lower, with_sources=needs_sources(of, reward.options))
    except RewardError as error:
        raise RewardError(f"reward {name!r}: {error}") from error


def _show(
    console: Console, name: str, reward: RewardSpec, report: Report, size: tuple[int, int]
) -> None:
    verdict = "[green]passes[/]" if report.passed else "[bold red]fails[/]"
    role = "" if reward.weight > 0 else " (lower is better)" if reward.weight else " (only watched)"
    pictures = f"{report.pictures} pictures of {size[0]} x {size[1]}"
    say(console, Text.from_markup(f"{escape(name)}{role} {verdict}: {pictures}"))
    table = Table()
    for column in ("picture", "mean score", "worse", "equal", "better", "than clean"):
        numeric = column not in ("picture", "than clean")
        table.add_column(column, justify="right" if numeric else "left")
    table.add_row("clean", _number(report.clean))
    for found in report.comparisons:
        counts = map(str, (found.worse, found.equal, found.better))
        table.add_row(found.kind, _number(found.mean), *counts, found.order)
    print_table(console, table)
    lines = [
        f"scores: min {_number(report.minimum)}, mean {_number(report.mean)}, "
        f"max {_number(report.maximum)}, std {_number(report.std)}",
        f"seconds per image: {report.alone_s:.2g} alone, {report.batch_s:.2g} in a batch of "
        f"{report.pictures}; first call {report.first_call_s:.2g} s in all",
        f"differences: {report.repeat_difference:.2g} between two calls, "
        f"{report.alone_difference:.2g} alone against in a batch",
    ]
    if report.unscored:
        lines.append(f"without a score: {report.unscored} of {report.pictures} pictures")
    for finding in sorted(report.findings, key=lambda finding: not finding.fails):
        lines.append(f"{'FAILS' if finding.fails else 'note'}: {finding.text}")
    for line in lines:
        say(console, line)
    console.print()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _as_row(reward: RewardSpec, report: Report) -> dict[str, Any]:
    """Plain values, without NaN and infinity."""
    row = asdict(report)
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            row[key] = None
    return {
        "passed": report.passed,
        "weight": reward.weight,
        "reward": reward.reward,
        "options": reward.options,
        **row,
    }
