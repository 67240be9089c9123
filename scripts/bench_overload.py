"""The overload: twice as many starts as can be done, for as long as it takes to see what happens.

Starts arrive at a steady rate, whatever becomes of those before them, each with so much patience.
Goodput is how many sagas ended in each second while they arrived, without the first second, in
which nothing was full yet. It is measured at rising rates, up to what closed loops of the same
client reach; the best of it is the peak, which stands for the capacity. Then starts arrive at twice
the peak. The client shares the machine with the runtime, and has twice the work then: nothing is
taken off for that.

Whatever is not started must be refused with an error that says so: any other error of a start fails
the load. Those that were started all end, each effect exactly once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import amends
from scripts.bench_loads import Load
from scripts.bench_rig import Rig, Setting, cpu_of, percentiles, rate
from scripts.bench_targets import Verdict, at_least, at_most, bounded

TIMES: Final = 2.0
PATIENCE_S: Final = 5.0
GOODPUT: Final = 0.9
FLAT: Final = 1.1
"""Memory in the last quarter to that in the second: what one batch more or less may make."""

CLOSED: Final = 1000
RISING: Final = (0.7, 0.85, 1.0)
"""Rates at which the peak is looked for, to that of closed loops."""
TRIES: Final = 2
"""How often it is tried again. A machine that others use, too, may have shown less than its peak:
where nothing had to be refused, there was no overload, and what was reached is the peak."""
IN_DOUBT: Final = amends.StartUnknown.__name__


def overload(
    folder: Path, seconds: float, window_s: float, plant: str = ""
) -> tuple[dict[str, Any], list[Verdict], list[str]]:
    """Figures, verdicts, and what is wrong; see the top of this file."""
    with Rig(folder, Setting("overload", plant=plant)) as rig:
        rig.load(seconds=seconds / 2, concurrency=CLOSED)
        closed = rate(rig.load(seconds=seconds, concurrency=CLOSED))
        rising = [_goodput_of(rig, seconds, share * closed) for share in RISING]
        peak = max(rising)
        idle_mib = rig.memory() >> 20
        arrivals_per_s, done, seen = _overload(rig, window_s, peak)
        for _ in range(TRIES):
            if done["refused"]:
                break
            peak = max(peak, goodput(done["ended_by_s"], window_s))
            arrivals_per_s, done, seen = _overload(rig, window_s, peak)
    memory_mib = [size >> 20 for size in seen]
    figures = {
        "closed_per_s": round(closed, 1),
        "rising_per_s": [round(found, 1) for found in rising],
        "peak_per_s": round(peak, 1),
        "arrivals_per_s": round(arrivals_per_s, 1),
        "arrivals": round(arrivals_per_s * window_s),
        "goodput_per_s": round(goodput(done["ended_by_s"], window_s), 1),
        "sagas": done["sagas"],
        "refused": done["refused"],
        "seconds": round(done["seconds"], 1),
        "latency_ms": percentiles(done["latencies_ms"]),
        "cpu_us": cpu_of([done]),
        "memory_mib_idle": idle_mib,
        "memory_mib": memory_mib,
        "memory_growth": growth(memory_mib),
    }
    print(f"  {done['sagas']} ended, refused {done['refused']}", flush=True)
    return figures, verdicts(figures), [*rig.faults, *_unaccounted(figures, done)]


def _overload(rig: Rig, window_s: float, peak: float) -> tuple[float, Load, list[int]]:
    """How many arrive each second, what it came to, and the runtime's memory meanwhile."""
    arrivals_per_s = TIMES * peak
    print(f"  peak {peak:.0f} sagas/s; now {arrivals_per_s:.0f} arrive a second", flush=True)
    with rig.memory_watched() as seen:
        done = _arriving(rig, window_s, arrivals_per_s)
    return arrivals_per_s, done, seen


def _goodput_of(rig: Rig, seconds: float, arrivals_per_s: float) -> float:
    done = _arriving(rig, seconds, arrivals_per_s)
    return goodput(done["ended_by_s"], seconds)


def _arriving(rig: Rig, seconds: float, arrivals_per_s: float) -> Load:
    return rig.load(seconds=seconds, rate=arrivals_per_s, patience=PATIENCE_S, may_refuse=True)


def goodput(ended_by_s: Sequence[int], window_s: float) -> float:
    """Sagas that ended in each second while starts arrived, without the first second."""
    whole = math.floor(window_s)
    if whole < 2:
        return ended_by_s[-1] / max(len(ended_by_s), 1)
    return (ended_by_s[whole - 1] - ended_by_s[0]) / (whole - 1)


def growth(memory_mib: Sequence[int]) -> float:
    """How much more memory there is in the last quarter of a time than in its second."""
    quarter = len(memory_mib) // 4
    if not quarter:
        return 1.0
    early = statistics.median(memory_mib[quarter : 2 * quarter])
    return round(statistics.median(memory_mib[-quarter:]) / early, 3)


def verdicts(figures: dict[str, Any]) -> list[Verdict]:
    """How the figures stand to the targets."""
    part = "overload at twice the capacity"
    refused = ", ".join(f"{name} {count}" for name, count in figures["refused"].items())
    return [
        at_least(
            part,
            "goodput at least 0.9 x the peak",
            f"{figures['goodput_per_s']} sagas/s",
            figures["goodput_per_s"] / figures["peak_per_s"],
            GOODPUT,
        ),
        at_most(
            part,
            "memory flat",
            f"{max(figures['memory_mib'], default=0)} MiB",
            figures["memory_growth"],
            FLAT,
        ),
        # Another kind of error would have ended the load. A start that may or may not have happened
        # is no refusal.
        bounded(
            part,
            "refusals typed, none in doubt",
            refused or "none refused",
            is_met=IN_DOUBT not in figures["refused"],
        ),
    ]


def _unaccounted(figures: dict[str, Any], done: Load) -> list[str]:
    told = done["sagas"] + sum(done["refused"].values())
    if told == figures["arrivals"]:
        return []
    return [f"overload: {told} starts have an answer of {figures['arrivals']}"]
