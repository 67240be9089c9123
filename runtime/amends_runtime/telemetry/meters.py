"""Meters: the numbers behind the metrics, cheap enough for every turn of every saga.

How to think about it. The event loop writes, once per fact; a scrape or an export reads, in a
thread of its own, once in many seconds. So the writer pays as little as Python allows (a dictionary
look-up and an addition, no lock), and the reader takes what it finds:

1. One writer. A series changes only in the event loop's thread, so `+=` never loses an addition.
2. Readers copy. `dict.copy()` and `list.copy()` are one step of the interpreter each: they run no
   Python code, neither a key's hash nor a finalizer, so that no other thread gets its turn in
   between, and a dictionary never changes its size under its reader. (A comprehension over the live
   dictionary would be exactly that.) Without an interpreter lock both take the object's own lock.
3. A histogram's count is the sum of its buckets, so the two always agree. Its sum is added last: a
   reader may see it without the newest value, and has it the next time. No number ever falls.
4. Bounded. At most `SERIES_LIMIT` series a meter; what would be one more is counted in a series
   whose labels are all `OVERFLOW`, and in `overflowed`. Callers register definitions, and must not
   be able to fill the memory with their names.

The numbers of a process begin at 0, as those of all cumulative metrics do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

__all__ = ["OVERFLOW", "SERIES_LIMIT", "Counter", "Histogram", "HistogramValue", "Labels"]

SERIES_LIMIT: Final = 2000  # OpenTelemetry's own default; a histogram's are 1 MB then
OVERFLOW: Final = "(other)"  # no name of a definition, a step or a participant has a bracket

Labels = tuple[str, ...]
"""The values of a meter's labels, in the order in which the meter names them."""


class Counter:
    """A number that only grows, per labels."""

    __slots__ = ("_labels", "_series", "overflowed")

    def __init__(self, labels: int = 0) -> None:
        self._labels = labels
        # Without labels there is one series, and it is there from the start.
        self._series: dict[Labels, int] = {} if labels else {(): 0}
        self.overflowed = 0

    def add(self, labels: Labels = (), amount: int = 1) -> None:
        """Counts. As many labels as the meter has."""
        try:
            self._series[labels] += amount
        except KeyError:
            self._begin(labels, amount)

    def _begin(self, labels: Labels, amount: int) -> None:
        if len(self._series) >= SERIES_LIMIT:
            self.overflowed += 1
            labels = (OVERFLOW,) * self._labels
        self._series[labels] = self._series.get(labels, 0) + amount

    def values(self) -> Mapping[Labels, int]:
        """All series as they are now. May be called in any thread."""
        return self._series.copy()


class HistogramValue(msgspec.Struct, frozen=True):
    """One series of a histogram: how many values lay in each bucket, the last one's open above."""

    buckets: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.buckets)


class Histogram:
    """How often a value lay between which bounds, per labels.

    A value belongs into the first bucket whose bound is not below it. `bounds` rise.
    """

    __slots__ = ("_labels", "_series", "bounds", "overflowed")

    def __init__(self, bounds: Sequence[float], labels: int = 0) -> None:
        assert list(bounds) == sorted(set(bounds)), "bounds rise"
        self.bounds = tuple(bounds)
        self._labels = labels
        # Buckets, one more than there are bounds, and then the sum of all values.
        self._series: dict[Labels, list[float]] = {} if labels else {(): self._empty()}
        self.overflowed = 0

    def record(self, value: float, labels: Labels = ()) -> None:
        """Takes a value in. As many labels as the meter has."""
        try:
            row = self._series[labels]
        except KeyError:
            row = self._begin(labels)
        row[bisect_left(self.bounds, value)] += 1
        row[-1] += value

    def _begin(self, labels: Labels) -> list[float]:
        if len(self._series) >= SERIES_LIMIT:
            self.overflowed += 1
            labels = (OVERFLOW,) * self._labels
        return self._series.setdefault(labels, self._empty())

    def _empty(self) -> list[float]:
        return [0] * (len(self.bounds) + 1) + [0.0]

    def values(self) -> Mapping[Labels, HistogramValue]:
        """All series as they are now. May be called in any thread."""
        values = {}
        for labels, live in self._series.copy().items():
            *buckets, total = live.copy()
            values[labels] = HistogramValue(tuple(map(int, buckets)), total)
        return values
