"""Options of the benchmarks' command lines: what is beyond its bounds is a usage error.

argparse names the option, what is here says what it may be, and the program ends with exit code 2
before anything is measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Final

MOST_SAGAS: Final = 10_000_000
"""As many as a runtime may be told to have under way; a store of them is some tens of GB."""

MOST_AT_ONCE: Final = 10_000
"""Loops of one client. More would measure its event loop."""

MOST_ROUNDS: Final = 1_000
LEAST_SECONDS: Final = 0.05
MOST_SECONDS: Final = 900.0
"""Of one load, which is given up after half an hour: see `bench_loads.LOADED_WITHIN_S`."""


def whole(least: int, most: int) -> Callable[[str], int]:
    """What reads a whole number from `least` to `most`; else raises ArgumentTypeError."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {least} to {most}, not {text!r}"
            )
        return number

    return read


def seconds(least: float = LEAST_SECONDS, most: float = MOST_SECONDS) -> Callable[[str], float]:
    """What reads seconds from `least` to `most`; else raises ArgumentTypeError."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:  # which NaN never is
            raise argparse.ArgumentTypeError(
                f"must be seconds from {least:g} to {most:g}, not {text!r}"
            )
        return number

    return read


def add_output(parser: argparse.ArgumentParser, default: Path) -> None:
    """Adds `--output`, the file that figures go to."""
    parser.add_argument(
        "--output",
        type=_output_file,
        default=default,
        help="where the figures go, as JSON; its folder is made; default %(default)s",
    )


def _output_file(text: str) -> Path:
    """The file of that name; ArgumentTypeError if it cannot be one: hours may lie between."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file to write, and {text!r} is a folder")
    if any(above.exists() and not above.is_dir() for above in path.parents):
        raise argparse.ArgumentTypeError(f"{text!r} lies in what is no folder")
    return path
