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

from flowgrpo_ray.common.errors import RunFolderError
from flowgrpo_ray.common.files import check_free
from flowgrpo_ray.common.paths import runs_root
from flowgrpo_ray.run.brief import brief
from flowgrpo_ray.run.found import find_runs, is_run
from flowgrpo_ray.run.overview import compared, overview

JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead")]
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
    root = runs_root(folder)
    if not root.is_dir():
        raise RunFolderError(f"no folder at {root}: give a run folder or a folder of them")
    found = overview(root)
    if as_json:
        print(json.dumps(found))
        return
    console = Console()
    if not found["runs"]:
        console.print(f"no run below {root}", soft_wrap=True, highlight=False, markup=False)
        return
    tables = [
        [_summary(run, found["keys"][:keys]) for run in found["runs"]]
        for keys in range(min(FEW, len(found["keys"])), -1, -1)
    ]
    fits = next((lines for lines in tables if _fits(console, lines)), None)
    if fits is None:
        _blocks(console, tables[0], "run")
    shown = len(tables) - 1 - tables.index(fits or tables[0])
    for name, group in found["groups"].items():
        told = _group(name, group)
        console.print(told, highlight=False, markup=False)
    if more := len(found["keys"]) - shown:
        console.print(f"{more} more keys differ: see --json, or compare RUN RUN", highlight=False)


def compare(
    chosen: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="run folders")],
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
        {"": name} | {line["run"]: line.get(name, "–") for line in lines}
        for name in names
        if name != "run"
    ]
    if not _fits(console, turned):
        _blocks(console, lines, "run")
    if html:
        console.print(f"{html} written", soft_wrap=True, highlight=False, markup=False)


def _folders(chosen: Sequence[Path]) -> dict[str, Path]:
    """By name: the folder's, or the path as it was given where two have one name."""
    for path in chosen:
        if not is_run(path):
            below = find_runs(path) if path.is_dir() else {}
            hint = f": {', '.join(list(below)[:5])}" if below else ""
            raise RunFolderError(
                f"{path} is not a run folder{hint and '; there are runs in it'}{hint}"
            )
    names = [path.resolve().name for path in chosen]
    return {
        str(path) if names.count(name) > 1 else name: path
        for path, name in zip(chosen, names, strict=True)
    }


# --- in words


def _summary(run: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """A run's line: what each column says."""
    if run["state"] == "unreadable":
        return {"run": run["name"], "state": f"unreadable: {run['message']}"}
    done, wanted = run["iteration"], run["iterations"]
    line = {"run": run["name"]}
    line |= {key: _value(run["values"].get(key)) for key in keys}
    line |= {"state": run["state"], "iterations": f"{done}/{wanted}" if wanted else str(done)}
    line |= {"images/s": _number(run["images_per_second"])}
    line |= {"time": _hours(run["seconds"]), "GPU time": _hours(run["gpu_seconds"])}
    for name, reward in run["rewards"].items():
        before, after = reward["before"], reward["after"]
        moved = f"{_number(before)} → {_number(after)}" if after is not None else _number(before)
        best = f", best {_number(reward['best'])} at {reward['best_iteration']}"
        line[name] = moved + (best if reward["best"] not in (None, after, before) else "")
    over = [f"{name} ({when})" for name, when in run["watch"].items()]
    return line | ({"over-optimized": ", ".join(over)} if over else {})


def _group(name: str, group: Mapping[str, Any]) -> str:
    told = [f"{group['size']} seeds of {name}"]
    for reward, values in group["rewards"].items():
        after = values["after"]
        if after["mean"] is not None:
            spread = "" if after["std"] is None else f" ± {_number(after['std'])}"
            told.append(f"{reward} {_number(after['mean'])}{spread}")
    return ", ".join(told)


def _fits(console: Console, lines: Sequence[Mapping[str, str]]) -> bool:
    """Prints a table if the terminal is wide enough for it."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(Text(name), no_wrap=True)
    for line in lines:
        table.add_row(*(Text(line.get(name, "–")) for name in names))
    fits = (
        console.measure(table, options=console.options.update(width=10**6)).maximum <= console.width
    )
    if fits:
        console.print(table)
    return fits


def _blocks(console: Console, lines: Sequence[Mapping[str, str]], first: str) -> None:
    """What a table would show, a block for each of its lines."""
    for line in lines:
        rest = [f"  {name}: {value}" for name, value in line.items() if name != first]
        told = "\n".join([line[first], *rest])
        console.print(told, soft_wrap=True, highlight=False, markup=False)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _hours(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _value(value: object) -> str:
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value)
