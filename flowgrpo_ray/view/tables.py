"""Tables that keep their numbers in a narrow terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Column, Table

from flowgrpo_ray.view.console import say


def print_table(console: Console, table: Table) -> None:
    """Print ``table``, whose columns of numbers are those on the right.

    Where it is too wide its names and headers are wrapped, then the lines around its cells go, and
    if even so it does not fit, each row becomes a block. No number is cut or wrapped.
    """
    if not fits(console, table):
        for column in table.columns:
            column.overflow = "fold"
            if column.justify == "right":
                column.width = _width(console, column)
        if _least(console, table) > console.width:
            table.box, table.padding, table.pad_edge = None, (0, 1, 0, 0), False
        if _least(console, table) > console.width:
            _print_rows(console, table)
            return
    console.print(table)


def fits(console: Console, table: Table) -> bool:
    """Whether the terminal is wide enough for each cell in one line."""
    wide = console.options.update(width=10**6)
    return console.measure(table, options=wide).maximum <= console.width


def print_blocks(console: Console, rows: Sequence[Mapping[str, str]]) -> None:
    """A block for each row, which begins with its first value; nothing of what is empty."""
    for row in rows:
        name, *rest = row.items()
        say(console, name[1])
        for key, value in rest:
            if value:
                say(console, f"  {key}: {value}")


def _print_rows(console: Console, table: Table) -> None:
    if table.title:
        say(console, str(table.title))
    headers = [str(column.header) for column in table.columns]
    cells = ([console.render_str(str(cell)).plain for cell in col.cells] for col in table.columns)
    rows = zip(*cells, strict=True)
    print_blocks(console, [dict(zip(headers, row, strict=True)) for row in rows])


def _width(console: Console, column: Column) -> int:
    """Of the longest number, or of the longest word above."""
    sizes = [console.measure(cell).maximum for cell in column.cells]
    return max([console.measure(column.header).minimum, *sizes])


def _least(console: Console, table: Table) -> int:
    """The width in which each word of a name is whole."""
    return console.measure(table, options=console.options.update(width=10**6)).minimum
