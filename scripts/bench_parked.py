"""Parked sagas: what each keeps in memory, and what very many of them do to those that live.

Sagas are started whose first step is told to ask again in an hour. When the runtime has come to
rest, what its memory has grown by is theirs. Then it and a runtime without any are given the same
loads, in alternation.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, Final

from scripts.bench_loads import Load
from scripts.bench_processes import cpu_seconds
from scripts.bench_rig import Rig, Setting, rate, ratios_of
from scripts.bench_targets import Verdict, at_least, bounded

BYTES_PER_SAGA: Final = 1024
BYTES_OF_A_MILLION: Final = 1_000_000_000
MILLION: Final = 1_000_000
LIVE: Final = 0.8

STARTS_AT_ONCE: Final = 1000
REST_S: Final = 1.0
REST_SHARE: Final = 0.05
"""Of one core: a runtime at rest still looks at its clock."""
GIVE_UP_S: Final = 1800.0


def park(
    folder: Path, sagas: int, *, rounds: int, seconds: float, concurrency: int, plant: str = ""
) -> tuple[dict[str, Any], list[Verdict], list[str]]:
    """Figures, verdicts, and what is wrong; see the top of this file."""
    setting = Setting(f"parked-{sagas}", definitions=("bench", "later"), plant=plant)
    with Rig(folder, setting) as rig, Rig(folder, Setting("without-parked")) as other:
        for one in (rig, other):  # what a first load allocates stays, and is nobody's
            one.load(seconds=seconds, concurrency=concurrency)
        _wait_rest(rig, 0)
        empty = rig.memory()
        began_s = time.monotonic()
        rig.load("start", concurrency=STARTS_AT_ONCE, definition="later", count=sagas)
        _wait_rest(rig, sagas)
        parked_s = time.monotonic() - began_s
        full = rig.memory()
        print(f"  {sagas} parked in {parked_s:.0f} s: {full >> 20} MiB", flush=True)
        loads: dict[Rig, list[Load]] = {rig: [], other: []}
        for number in range(rounds):
            for one in (rig, other) if number % 2 else (other, rig):
                loads[one].append(one.load(seconds=seconds, concurrency=concurrency))
    ratios = ratios_of(loads[rig], loads[other])
    figures = {
        "sagas": sagas,
        "parked_s": round(parked_s, 1),
        "memory_bytes_empty": empty,
        "memory_bytes": full,
        "bytes_per_saga": round((full - empty) / sagas),
        "live_sagas_per_s": round(statistics.median(map(rate, loads[rig])), 1),
        "live_sagas_per_s_without": round(statistics.median(map(rate, loads[other])), 1),
        "live_ratio": ratios["median"],
        "live_ratio_by_round": ratios["by_round"],
    }
    return figures, verdicts(figures), [*rig.faults, *other.faults]


def _wait_rest(rig: Rig, put_off: int) -> None:
    """Waits until the participant has put off so many calls, and the runtime does nothing more."""
    give_up_at = time.monotonic() + GIVE_UP_S
    pid = rig.runtime["pid"]
    while time.monotonic() < give_up_at:
        before_s = cpu_seconds(pid)
        time.sleep(REST_S)
        used_s = cpu_seconds(pid) - before_s
        if used_s < REST_SHARE * REST_S and rig.ask()["put_off"] >= put_off:
            return
    raise SystemExit(
        f"waited {GIVE_UP_S:g} s for {put_off} sagas to be parked: is amends at fault?"
    )


def verdicts(figures: dict[str, Any]) -> list[Verdict]:
    """How the figures stand to the targets."""
    part, size = f"{figures['sagas']} parked", figures["bytes_per_saga"]
    found = [
        bounded(part, "at most 1 KB each", f"{size} bytes", is_met=size <= BYTES_PER_SAGA),
        at_least(
            part,
            "the live ones at least 0.8 x",
            f"{figures['live_sagas_per_s']} sagas/s",
            figures["live_ratio"],
            LIVE,
        ),
    ]
    if figures["sagas"] >= MILLION:
        whole = figures["memory_bytes"]
        found.append(
            bounded(part, "under 1 GB", f"{whole >> 20} MiB", is_met=whole < BYTES_OF_A_MILLION)
        )
    return found
