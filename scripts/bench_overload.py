"""The overload: twice as many starts as can be done, for as long as it takes to see what happens.

The capacity is what closed loops of the same client reach, at their best. Then starts arrive twice
as fast, whatever becomes of those before them, each with so much patience. Goodput is how many
sagas ended while they arrived, without the first second, in which nothing was full yet. The client
shares the machine with the runtime, and has twice the work: nothing is taken off for that.

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

LEVELS: Final = (300, 1000)
IN_DOUBT: Final = amends.StartUnknown.__name__


def overload(
    folder: Path, seconds: float, window_s: float, plant: str = ""
) -> tuple[dict[str, Any], list[Verdict], list[str]]:
    """Figures, verdicts, and what is wrong; see the top of this file."""
    with Rig(folder, Setting("overload", plant=plant)) as rig:
        rig.load(seconds=seconds / 2, concurrency=LEVELS[-1])
        loads = [rig.load(seconds=seconds, concurrency=level) for level in LEVELS for _ in range(2)]
        peak = max(map(rate, loads))
        print(f"  peak {peak:.0f} sagas/s; now {TIMES * peak:.0f} arrive each second", flush=True)
        idle_mib = rig.memory() >> 20
        with rig.memory_watched() as seen:
            done = rig.load(
                seconds=window_s, rate=TIMES * peak, patience=PATIENCE_S, may_refuse=True
            )
    memory_mib = [size >> 20 for size in seen]
    figures = {
        "peak_per_s": round(peak, 1),
        "arrivals_per_s": round(TIMES * peak, 1),
        "arrivals": round(TIMES * peak * window_s),
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
