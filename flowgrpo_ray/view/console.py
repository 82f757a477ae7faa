"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from flowgrpo_ray.run.validation import Verdict
from flowgrpo_ray.spec.training import TrainingSpec

PLAIN_SECONDS = 10.0  # between two lines where the output is no terminal


class RunDisplay:
    """Progress of one run; a context manager."""

    def __init__(self, spec: TrainingSpec, console: Console) -> None:
        self.console, self.total, self._gate = console, spec.iterations, spec.objective.gate
        self._live: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._live = Progress(*_columns(console.width), console=console, expand=True)
            self._task = self._live.add_task("", total=self.total, numbers="", stage="", left="")
        self._printed = -PLAIN_SECONDS
        self._mean_seconds: float | None = None

    def __enter__(self) -> RunDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def stage(self, stage: str) -> None:
        """What the run is doing now."""
        if self._live:
            self._live.update(self._task, stage=stage)

    def iteration(self, row: Mapping[str, Any], seconds: float) -> None:
        """One finished iteration and its metrics row."""
        last = self._mean_seconds or seconds
        self._mean_seconds = 0.8 * last + 0.2 * seconds
        remaining = (self.total - row["iteration"]) * self._mean_seconds
        largest = row[self._gate.name]["max_abs"] or 0
        numbers = f"reward {row['reward']['mean']:.3f}  |{self._gate.symbol}| {largest:.1e}"
        if "tie" in row:
            numbers += f"  tie {row['tie']['weight']:.1e}"
        left = f"{_clock(remaining)} left"
        if self._live:
            self._live.update(self._task, completed=row["iteration"], numbers=numbers, left=left)
        elif time.monotonic() - self._printed >= PLAIN_SECONDS or row["iteration"] == self.total:
            self._printed = time.monotonic()
            done = f"iteration {row['iteration']:>4}/{self.total}"
            self.console.print(f"{done}  {numbers}  {seconds:.2f} s  {left}", highlight=False)

    def evaluation(self, iteration: int, rewards: Mapping[str, float | None]) -> None:
        """The rewards of held-out prompts after ``iteration`` iterations."""
        means = "  ".join(f"{name} {_score(mean)}" for name, mean in rewards.items())
        self.console.print(f"held-out after {iteration:>4} iterations:  {means}", highlight=False)

    def note(self, message: str) -> None:
        """Something the person should know, as it is: a prompt in it may hold square brackets."""
        say(self.console, message)


def _columns(width: int) -> Iterator[ProgressColumn]:
    """Of the live line: its numbers are whole in 60 columns, the bar and the stage give way."""
    wide = width >= 80
    yield TextColumn("[bold]{task.completed:>4}[/]/{task.total}")
    if wide:
        yield BarColumn(bar_width=None, table_column=Column(ratio=1))
    yield TextColumn("{task.fields[numbers]}")
    stage = Column(ratio=2, no_wrap=True, overflow="ellipsis")
    yield TextColumn("[dim]{task.fields[stage]}[/]", table_column=stage)
    if wide:
        yield TimeElapsedColumn()
    yield TextColumn("{task.fields[left]}")


@contextlib.contextmanager
def shown(spec: TrainingSpec, *, quiet: bool = False) -> Iterator[RunDisplay]:
    """The display of a run that Python code trains: in a notebook plain lines below the cell, in a
    terminal a live one; ``quiet`` shows nothing."""
    options: dict[str, Any] = {}
    if "ipykernel" in sys.modules:  # its output says that it is a terminal
        options = {"force_terminal": False, "force_jupyter": False, "width": 100}
        logging.getLogger("ray.widgets").setLevel(logging.WARNING)  # no advice on packages
    console = Console(quiet=quiet, **options)
    with RunDisplay(spec, console) as display:
        yield display


def printable(text: str) -> str:
    """Without characters that would move the cursor, or otherwise forge what the screen shows:
    they are written as ``\\x1b``. Lines stay lines."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def say(console: Console, message: str | Text) -> None:
    """A message as it is: in a terminal, which would wrap it between letters, wrapped between
    words, and what is longer than a line, as a path, left whole; elsewhere, as in a log, a line."""
    text = message.copy() if isinstance(message, Text) else Text(printable(message))
    if console.is_terminal:
        text.overflow = "ignore"
        text = Text("\n").join(text.wrap(console, console.width))
    console.print(text, soft_wrap=True)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The end of a run: each reward before and after."""
    table = Table(title=f"{summary['name']}: held-out prompts", title_justify="left")
    for column in ("reward", "before", "after"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    for name, after in summary["eval_after"].items():
        table.add_row(name, _score(summary["eval_before"].get(name)), _score(after))
    return table


LEDGER = 10  # iterations that the ledger's means are taken over


def ledger_table(timings: Sequence[Mapping[str, Any]]) -> Table | None:
    """Where the last iterations went, from the rows of timings.jsonl; None where they do not say.

    The first iteration, which warms up, is left out unless it is the only one.
    """
    rows = [row for row in timings if row["kind"] == "train" and "ledger" in row]
    rows = rows[1:][-LEDGER:] or rows
    if not rows:
        return None
    last = f"last {len(rows)} iterations" if len(rows) > 1 else "last iteration"
    title = f"mean seconds of a process in the {last}"
    table = Table(title=title, title_justify="left")
    columns = ("actors", "count", "busy", "loading", "overhead", "waiting", "mostly for")
    for column in columns:
        table.add_column(column, justify="left" if column in (columns[0], columns[-1]) else "right")
    for kind in rows[-1]["ledger"]:
        means = Counter[tuple[str, str]]()
        for row in rows:
            for state, entries in row["ledger"].get(kind, {}).items():
                for what, seconds in entries.items():
                    means[state, what] += seconds / len(rows)
        states = [
            f"{sum(s for (state, _), s in means.items() if state == column):.2f}"
            for column in columns[2:6]
        ]
        waits = [what for (state, what), s in means.most_common() if state == "waiting" and s > 0]
        count = f"{rows[-1]['processes'][kind]:g}"
        table.add_row(kind, count, *states, escape(waits[0] if waits else ""))
    return table


def verdict_table(verdict: Verdict) -> Table:
    """A validation run: each finding with its numbers."""
    failed = [f.name for f in verdict.findings if f.ok is False]
    open_ = [f.name for f in verdict.findings if f.ok is None or f.warning]
    outcome = "fit for a full run"
    if failed:
        outcome = f"not fit for a full run ({', '.join(failed)})"
    elif open_:
        outcome = f"nothing failed; look at {', '.join(open_)} before a full run"
    title = f"{verdict.name}, {verdict.iterations} iterations: {outcome}"
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("looked at", "", "found"):
        table.add_column(column)
    for finding in verdict.findings:
        mark = {True: "[green]ok[/]", False: "[bold red]failed[/]", None: "[yellow]unclear[/]"}
        state = "[yellow]look[/]" if finding.ok and finding.warning else mark[finding.ok]
        table.add_row(finding.name, state, escape(finding.says))
    return table


def _score(mean: float | None) -> str:
    return "-" if mean is None else f"{mean:.3f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
