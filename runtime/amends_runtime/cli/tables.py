"""What people see: tables on a terminal, plain columns in a pipe.

On a terminal cells wrap inside their column and states have colours (NO_COLOR turns them off). In
a pipe or a file every row is one line, however long, columns are separated by spaces, and there are
no escape sequences. Text that others wrote is shown with its control characters written out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from amends_runtime.cli.documents import to_json
from amends_runtime.cli.exits import one_line

__all__ = ["print_facts", "print_json", "print_line", "print_table"]

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


def print_line(text: str = "") -> None:
    """Prints one line of text."""
    sys.stdout.write(one_line(text) + "\n")


def print_json(value: object) -> None:
    """Prints one JSON document."""
    sys.stdout.write(to_json(value) + "\n")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    return table


def _cell(value: str) -> Text:
    return Text(one_line(value), style=STYLES.get(value, ""))


def _print(table: Table) -> None:
    console = _console()
    with console.capture() as capture:
        console.print(table)
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
