"""The recovery: a runtime with very many sagas in flight is killed, and comes back.

1. A load runs for a while: its calls in each tenth of a second are the participant's steady rate.
   The peak is that of a whole second: what a single tenth saw, then and later, is told beside it,
   and is as much the machine's scheduler as anybody's pace.
2. Sagas are started whose second step waits at the participant's gate, until all of them have a
   call on the wire or in the lane.
3. The runtime is killed by SIGKILL. When the participant has noticed, its gate is opened, and the
   runtime is started again on its database.
4. Timed from the start of the process, by the participant's own clock: the first call, and the
   first call of the last saga, after which all are under way. Meanwhile somebody asks the runtime
   how things stand, and how long the longest answer took is told.
5. All sagas end, each effect exactly once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from scripts.bench_processes import STEPS
from scripts.bench_rig import Rig, Setting
from scripts.bench_targets import Verdict, at_most, bounded

FIRST_CALL_S: Final = 1.0
ALL_UNDER_WAY_S: Final = 10.0
PEAK: Final = 2.0

TENTHS: Final = 10
STARTS_AT_ONCE: Final = 1000
LOOK_EVERY_S: Final = 0.25  # each look is two connections, which cost what is measured some CPU
GIVE_UP_S: Final = 600.0


def recover(
    folder: Path, sagas: int, seconds: float, concurrency: int, plant: str = ""
) -> tuple[dict[str, Any], list[Verdict], list[str]]:
    """Figures, verdicts, and what is wrong; see the top of this file."""
    limits = {"AMENDS_LIMITS__LIVE_SAGAS": str(max(100_000, 2 * sagas))}
    setting = Setting(
        "recovery",
        definitions=("bench", "held"),
        paced=True,
        plant=plant,
        environment=limits,
    )
    with Rig(folder, setting) as rig:
        rig.load(seconds=seconds / 2, concurrency=concurrency)
        rig.ask(pace="anew")
        rig.load(seconds=seconds, concurrency=concurrency)
        calls = rig.ask()["pace"]["calls"]
        steady = steady_rate(calls)
        print(f"  steady: {steady * 10:.0f} calls/s", flush=True)
        rig.load("start", concurrency=STARTS_AT_ONCE, definition="held", count=sagas)
        _wait("all calls in flight", lambda: rig.in_flight() == sagas)
        full_mib = rig.memory() >> 20
        print(f"  {sagas} sagas in flight; the runtime has {full_mib} MiB", flush=True)
        rig.kill_runtime()
        _wait("the participant to notice", lambda: not rig.ask()["held"])
        rig.ask(gate="open", pace="anew")
        figures = _come_back(rig, sagas, steady)
    figures |= {
        "sagas": sagas,
        "full_mib": full_mib,
        "steady_calls_per_s": round(steady * 10),
        "steady_most_in_a_tenth": max(calls),
    }
    return figures, verdicts(figures), rig.faults


def _come_back(rig: Rig, sagas: int, steady: float) -> dict[str, Any]:
    began_s = time.monotonic()
    rig.start_runtime()
    ready_s = time.monotonic() - began_s
    answers_s: list[float] = []

    def all_under_way() -> bool:
        asked_s = time.monotonic()
        rig.transport()
        answers_s.append(time.monotonic() - asked_s)
        return bool(rig.ask()["pace"]["sagas"] == sagas)

    _wait("all to be under way", all_under_way)
    whole = " ".join("1" * len(STEPS))
    _wait("all to end", lambda: rig.ask(report=True)["done"]["held"].get(whole) == sagas)
    ended_s = time.monotonic() - began_s
    pace = rig.ask()["pace"]
    peak = peak_rate(pace["calls"])
    figures = {
        "ready_s": round(ready_s, 3),
        "first_call_s": round(pace["first_at_s"] - began_s, 3),
        "all_under_way_s": round(pace["last_new_at_s"] - began_s, 3),
        "all_ended_s": round(ended_s, 3),
        "longest_answer_s": round(max(answers_s), 3),
        "peak_calls_per_s": round(peak * 10),
        "peak_to_steady": round(peak / steady, 2),
        "most_in_a_tenth": max(pace["calls"]),
        "recovered_mib": rig.memory() >> 20,
    }
    print(f"  {figures}", flush=True)
    return figures


def steady_rate(calls: Sequence[int]) -> float:
    """Calls in a tenth of a second while a load runs: the median, without its two ends."""
    return statistics.median(calls[1:-1] or calls)


def peak_rate(calls: Sequence[int]) -> float:
    """Calls in a tenth of a second, of the whole second that had most."""
    size = min(len(calls), TENTHS)
    return max(sum(calls[at : at + size]) / size for at in range(len(calls) - size + 1))


def verdicts(figures: dict[str, Any]) -> list[Verdict]:
    """How the figures stand to the targets."""
    first, under_way = figures["first_call_s"], figures["all_under_way_s"]
    part = f"kill -9 with {figures['sagas']} in flight"
    return [
        bounded(part, "first call within 1 s", f"{first} s", is_met=first <= FIRST_CALL_S),
        bounded(
            part, "all under way within 10 s", f"{under_way} s", is_met=under_way <= ALL_UNDER_WAY_S
        ),
        at_most(
            part,
            "peak at most 2 x steady",
            f"{figures['peak_calls_per_s']} calls/s",
            figures["peak_to_steady"],
            PEAK,
        ),
    ]


def _wait(what: str, is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + GIVE_UP_S
    while not is_so():
        if time.monotonic() > give_up_at:
            raise SystemExit(f"waited {GIVE_UP_S:g} s for {what}: is amends at fault?")
        time.sleep(LOOK_EVERY_S)
