"""What the benchmarks are held against: a target, what was found, and whether that meets it.

A target that is missed does not fail a run: a machine may be busy, and a figure is a figure. What
fails a run is an effect that is lost or doubled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Verdict(NamedTuple):
    """A target and how a figure stands to it."""

    part: str
    target: str
    figure: str
    """What was measured, with its unit."""
    ratio: float | None
    """The figure to what it is compared with, if the target is a ratio."""
    is_met: bool


def at_least(part: str, target: str, figure: str, ratio: float, bound: float) -> Verdict:
    """The verdict on a ratio that is to be `bound` or more."""
    return Verdict(part, target, figure, round(ratio, 3), ratio >= bound)


def at_most(part: str, target: str, figure: str, ratio: float, bound: float) -> Verdict:
    """The verdict on a ratio that is to be `bound` or less."""
    return Verdict(part, target, figure, round(ratio, 3), ratio <= bound)


def bounded(part: str, target: str, figure: str, *, is_met: bool) -> Verdict:
    """The verdict on a figure that is no ratio."""
    return Verdict(part, target, figure, None, is_met)


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Prints the table."""
    if not verdicts:
        return
    heads = ("part", "target", "figure", "ratio", "")
    rows = [
        (
            one.part,
            one.target,
            one.figure,
            "" if one.ratio is None else f"{one.ratio:.2f}",
            "met" if one.is_met else "MISSED",
        )
        for one in verdicts
    ]
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    print()
    for row in [heads, *rows]:
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )
