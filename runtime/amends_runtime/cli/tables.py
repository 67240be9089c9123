"""What people see: tables on a terminal, plain columns in a pipe.

On a terminal cells wrap inside their column, except ids and states, which are copied and searched
for; instants are short, and states have colours (NO_COLOR turns them off). In
a pipe or a file every row is one line, however long, columns are separated by spaces, and there are
no escape sequences. Text that others wrote is shown with its control characters written out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from amends_runtime.cli.documents import instant
from amends_runtime.cli.exits import one_line

__all__ = ["Columns", "print_facts", "print_line", "print_table", "short_instant"]

STYLES: Final = {
    "COMPLETED": "green",
    "EXECUTED": "green",
    "CLOSED": "green",
    "COMPENSATING": "magenta",
    "COMPENSATED": "yellow",
    "HALF_OPEN": "yellow",
    "REJECTED": "yellow",
    "UNKNOWN": "yellow",
    "ABANDONED": "red",
    "MIXED": "red",
    "OPEN": "red",
    "STUCK": "bold red",
    "BROKEN": "bold red",
    "COMMIT": "green",
    "ABORT": "yellow",
    "RUNNING": "cyan",
    "EXECUTING": "cyan",
    "PREPARING": "cyan",
    "PREPARED": "cyan",
}
WHOLE: Final = frozenset({"ID", "STATE", "HASH", "STARTED", "ENDED", "REGISTERED", "AT", "SINCE"})
"""Columns whose cells never wrap."""
UNBOUNDED: Final = 1_000_000  # columns of a pipe, which has none
COLUMN_GAP: Final = 2
LEAST_ROOM: Final = 24  # narrower than this a column is not read but spelt
INDENT: Final = "    "


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints rows under their columns' names."""
    _print(_table(columns, rows))


class Columns:
    """A table whose rows come one by one, each printed as it comes.

    A column is as wide as its widest cell so far, and at least as the longest of `expected`, which
    gives texts by column; the last takes the rest, and on a terminal goes on below itself where
    there is no room.
    """

    def __init__(self, *names: str, expected: Mapping[str, Iterable[str]] | None = None) -> None:
        self._names = names
        self._widths = [
            max(len(name), *map(len, (expected or {}).get(name, ())), 0) for name in names[:-1]
        ]
        self._begun = False

    def print(self, *cells: str) -> None:
        """Prints a row, before the first one the columns' names."""
        fixed = [one_line(cell) for cell in cells[:-1]]
        self._widths = [max(*each) for each in zip(self._widths, map(cell_len, fixed), strict=True)]
        if not self._begun:
            self._begun = True
            self._write([Text(name, style="bold") for name in self._names])
        self._write([*(Text(cell, style=STYLES.get(cell, "")) for cell in fixed), _cell(cells[-1])])

    def _write(self, cells: Sequence[Text]) -> None:
        *fixed, last = cells
        line = Text()
        for cell, width in zip(fixed, self._widths, strict=True):
            cell.pad_right(width - cell.cell_len + COLUMN_GAP)
            line.append_text(cell)
        console = _console()
        room = console.width - line.cell_len
        if last.cell_len <= room:
            lines = [line.append_text(last)]
        elif room >= LEAST_ROOM:
            first, *more = last.wrap(console, room)
            indent = " " * line.cell_len
            lines = [line.append_text(first), *(Text(indent).append_text(each) for each in more)]
        else:
            below = last.wrap(console, max(console.width - len(INDENT), 1))
            lines = [line, *(Text(INDENT).append_text(each) for each in below)]
        with console.capture() as capture:
            for each in lines:
                each.rstrip()
                console.print(each, no_wrap=True, overflow="ignore", crop=False)
        sys.stdout.write(capture.get())
        sys.stdout.flush()


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Prints names and values, one pair a line; pairs without a value are left out."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        if value:
            table.add_row(name, _cell(value))
    _print(table)


def short_instant(at_ms: int, *, with_ms: bool = False) -> str:
    """An instant in a table, UTC: on a terminal as much of it as tells it from now."""
    whole = instant(at_ms)
    if not sys.stdout.isatty() or not whole.endswith("Z"):
        return whole
    date, _, clock = whole.removesuffix("Z").partition("T")
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    if date == today:
        return f"{clock if with_ms else clock[:8]}Z"
    if with_ms:
        return f"{date} {clock}Z"
    return f"{date[5:]} {clock[:5]}Z" if date[:4] == today[:4] else date


def print_line(text: str = "") -> None:
    """Prints one line of text."""
    sys.stdout.write(one_line(text) + "\n")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    is_terminal = sys.stdout.isatty()
    gap = 1 if is_terminal else 2
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    cells = list(rows)
    # A program counts columns; a person has no use for one without a cell.
    shown = [n for n in range(len(columns)) if not is_terminal or any(row[n] for row in cells)]
    for number in shown if cells else range(len(columns)):
        column = columns[number]
        whole = column in WHOLE
        # no_wrap alone would have rich cut the cell off where there is no room.
        longest = max(len(column), *(len(row[number]) for row in cells), 0) if whole else None
        table.add_column(column, overflow="fold", no_wrap=whole, min_width=longest)
    for row in cells:
        table.add_row(*(_cell(row[number]) for number in shown))
    return table


def _cell(value: str) -> Text:
    return Text(one_line(value), style=STYLES.get(value, ""))


def _print(table: Table) -> None:
    console = _console()
    with console.capture() as capture:
        console.print(table, crop=False)
    # rich fills the last column with spaces, which a pipe's reader has no use for.
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def _console() -> Console:
    is_terminal = sys.stdout.isatty()
    plain = not is_terminal or bool(os.environ.get("NO_COLOR"))
    return Console(
        file=sys.stdout,
        width=None if is_terminal else UNBOUNDED,
        color_system=None if plain else "auto",
        force_terminal=is_terminal,
        highlight=False,
        markup=False,
        emoji=False,
    )
