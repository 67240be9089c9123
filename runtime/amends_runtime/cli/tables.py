"""What people see: tables on a terminal, plain columns in a pipe.

On a terminal cells wrap inside their column, except ids and states, which are copied and searched
for; instants are short, and states have colours (NO_COLOR turns them off). In
a pipe or a file every row is one line, however long, columns are separated by spaces, and there are
no escape sequences. Text that others wrote is shown with its control characters written out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from amends_runtime.cli.documents import instant, to_json
from amends_runtime.cli.exits import one_line

__all__ = ["print_facts", "print_json", "print_line", "print_table", "short_instant"]

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
    "RUNNING": "cyan",
    "EXECUTING": "cyan",
}
WHOLE: Final = frozenset({"ID", "STATE", "HASH", "STARTED", "ENDED", "REGISTERED", "AT"})
"""Columns whose cells never wrap."""
UNBOUNDED: Final = 1_000_000  # columns of a pipe, which has none


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints rows under their columns' names."""
    _print(_table(columns, rows))


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


def print_json(value: object) -> None:
    """Prints one JSON document."""
    sys.stdout.write(to_json(value) + "\n")


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
