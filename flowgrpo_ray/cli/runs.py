"""`flowgrpo-ray runs` and `compare`: many runs side by side, without a server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from flowgrpo_ray.cli import completion
from flowgrpo_ray.cli.runs_prune import prune_runs
from flowgrpo_ray.common.errors import RunFolderError
from flowgrpo_ray.common.files import check_free
from flowgrpo_ray.common.paths import existing_runs
from flowgrpo_ray.run.brief import brief
from flowgrpo_ray.run.found import find_runs, is_run
from flowgrpo_ray.run.overview import compared, overview
from flowgrpo_ray.view.console import printable, say
from flowgrpo_ray.view.tables import fits, print_blocks

JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead")]
NONE = "–"
FEW = 4  # keys that the table of runs shows; `compare` shows all


class _ListsByDefault(TyperGroup):
    """`runs FOLDER` is `runs list FOLDER`; a folder that is named like a subcommand is ./NAME."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, *self.get_help_option_names(ctx)}:
            args = ["list", *args]
        return super().parse_args(ctx, args)


runs_app = typer.Typer(
    cls=_ListsByDefault,
    help="Runs below a folder, side by side: `runs [FOLDER]` lists them.",
)


runs_app.command("prune")(prune_runs)


@runs_app.callback()
def runs() -> None:
    """Runs below a folder, side by side; without another command, `list`."""


@runs_app.command("list")
def list_runs(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER", help="that holds run folders; default: FLOWGRPO_RUNS, else runs"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List runs: in which keys their specs differ, state, progress, pace, held-out rewards."""
    root = existing_runs(folder)
    found = overview(root)
    if as_json:
        print(json.dumps(found))
        return
    console = Console()
    if not found["runs"]:
        console.print(f"no run below {root}", soft_wrap=True, highlight=False, markup=False)
        return
    keys = found["keys"][:FEW]
    tables = [keys[:most] for most in range(len(keys), -1, -1)]
    lines = ((few, [_summary(run, few) for run in found["runs"]]) for few in tables)
    shown = next((few for few, of in lines if _as_table(console, of)), None)
    if shown is None:
        shown = keys
        print_blocks(console, [_summary(run, keys) for run in found["runs"]])
    for name, group in found["groups"].items():
        say(console, _group(name, group))
    if more := len(found["keys"]) - len(shown):
        say(console, f"{more} more keys differ: see --json, or compare RUN RUN")


def compare(
    chosen: Annotated[
        list[Path],
        typer.Argument(metavar="RUN RUN...", help="run folders", autocompletion=completion.runs),
    ],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write curves and pictures too, one file")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare runs: the keys in which their specs differ, and what became of them."""
    folders = _folders(chosen)
    if html:
        from flowgrpo_ray.view.compared import write_comparison

        check_free(html, overwrite, f"--html {html}")
        if not html.parent.is_dir():
            raise RunFolderError(f"--html {html}: there is no folder '{html.parent}'; make it")
        write_comparison(folders, html)
    found = compared([brief(folder, name) for name, folder in folders.items()])
    if as_json:
        print(json.dumps(found))
        return
    console = Console()
    lines = [_summary(run, found["keys"]) for run in found["runs"]]
    names = dict.fromkeys(name for line in lines for name in line)
    turned = [
        {"": name} | {line["run"]: line.get(name, NONE) for line in lines}
        for name in names
        if name != "run"
    ]
    if not _as_table(console, turned):
        print_blocks(console, lines)
    if html:
        console.print(f"{html} written", soft_wrap=True, highlight=False, markup=False)


def _folders(chosen: Sequence[Path]) -> dict[str, Path]:
    """By name: the folder's, or the path as it was given where two have one name."""
    for path in chosen:
        if not is_run(path):
            below = ", ".join(list(find_runs(path))[:5]) if path.is_dir() else ""
            hint = f"; in it are {below}" if below else ""
            raise RunFolderError(f"{path} is not a run folder: give one that a run wrote to{hint}")
    names = [path.resolve().name for path in chosen]
    return {
        str(path) if names.count(name) > 1 else name: path
        for path, name in zip(chosen, names, strict=True)
    }


# --- in words


def _summary(run: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """A run's line: what each column says; nothing of what has no value."""
    line = {"run": run["name"], "state": run["state"]}
    if run["state"] == "unreadable":
        return line | {"message": run["message"]}
    done, wanted = run["iteration"], run["iterations"]
    line |= {key: _value(run["values"].get(key)) for key in keys}
    line |= {"iterations": f"{done}/{wanted}" if wanted else str(done)}
    line |= {"images/s": _number(run["images_per_second"])}
    line |= {"time": _hours(run["seconds"]), "GPU time": _hours(run["gpu_seconds"])}
    for name, reward in run["rewards"].items():
        before, after = reward["before"], reward["after"]
        moved = f"{_number(before)} → {_number(after)}" if after is not None else _number(before)
        best = f", best {_number(reward['best'])} at {reward['best_iteration']}"
        line[name] = moved + (best if reward["best"] not in (None, after, before) else "")
    over = [f"{name} ({when})" for name, when in run["watch"].items()]
    line |= {"over-optimized": ", ".join(over) or NONE}
    return {name: value for name, value in line.items() if value != NONE or name in keys}


def _group(name: str, group: Mapping[str, Any]) -> str:
    told = [f"{group['size']} seeds of {name}"]
    for reward, values in group["rewards"].items():
        after = values["after"]
        if after["mean"] is not None:
            spread = "" if after["std"] is None else f" ± {_number(after['std'])}"
            told.append(f"{reward} {_number(after['mean'])}{spread}")
    return ", ".join(told)


def _as_table(console: Console, lines: Sequence[Mapping[str, str]]) -> bool:
    """Print a table, if the terminal is wide enough for it."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    names = list(dict.fromkeys(name for line in lines for name in line))
    for name in names:
        table.add_column(Text(printable(name)), no_wrap=True)
    for line in lines:
        table.add_row(*(Text(printable(line.get(name, NONE))) for name in names))
    if fits(console, table):
        console.print(table)
        return True
    return False


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _hours(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _value(value: object) -> str:
    return value if isinstance(value, str) else NONE if value is None else json.dumps(value)
