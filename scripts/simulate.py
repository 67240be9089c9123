"""`make simulate`: many seeded schedules of a hostile world, in virtual time.

Each schedule is some sagas over the real core, actors, lanes and barrier, in a world that delays,
loses, repeats and reorders messages, kills and pauses runtimes, breaks the store and sets the
clock; `tests/simulation/world.py` says how. A schedule follows from its seed alone, so that

    make simulate SEED=1234

repeats schedule 1234 exactly and shows its whole trace.

Standard error has the progress. Standard output has the findings, a table of how often each fault
fired, the verdict, and as its last line one JSON object. Exit code: 0 when no rule was broken and,
from 2,000 schedules on, every fault has fired; 1 otherwise; 2 for arguments that cannot be; 130
when interrupted, after saying what was done so far.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Final

sys.path.insert(0, str(Path(__file__).parent.parent))  # `tests` is a folder and no package

from tests.simulation.faults import Fault
from tests.simulation.minimise import Less, minimise, run_less
from tests.simulation.report import Totals

MANY: Final = 2_000
"""From so many schedules on each fault must have fired: the rarest does in one of a hundred."""

MOST_FINDINGS: Final = 5
"""After so many there is nothing more to learn from going on."""

CHUNK: Final = 25
"""Schedules between two looks at progress and interruption: less than half a second."""

PROGRESS_S: Final = 3.0


class _Interrupt:
    """Remembers that Ctrl-C was pressed: a schedule is never left in the middle."""

    def __init__(self) -> None:
        self.is_pressed = False
        signal.signal(signal.SIGINT, self._press)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.is_pressed = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; give the exit code."""
    parser = argparse.ArgumentParser(
        description="Simulate many schedules of a hostile world, or repeat one."
    )
    parser.add_argument("--seeds", type=_positive, default=MANY, help="how many schedules")
    parser.add_argument("--first-seed", type=int, help="the first of them; default: by chance")
    parser.add_argument("--seed", type=int, help="repeat this one schedule and show its trace")
    parser.add_argument("--jobs", type=_positive, default=1, help="processes to spread them over")
    parser.add_argument("--minimise", type=int, metavar="SEED", help="shrink a failing schedule")
    parser.add_argument("--off", type=_faults, default=frozenset(), help="FAULT,… never strike")
    parser.add_argument("--without-sagas", type=_numbers, default=frozenset(), help="0,2,…")
    parser.add_argument("--without-incidents", type=_numbers, default=frozenset(), help="0,2,…")
    parser.add_argument("--trace", action="store_true", help="show the whole trace of a finding")
    given = parser.parse_args(arguments)
    if given.minimise is not None:
        return _minimise(given.minimise)
    if given.seed is not None:
        return _repeat(given.seed, Less(given.off, given.without_sagas, given.without_incidents))
    first = secrets.randbelow(10**9) if given.first_seed is None else given.first_seed
    return _simulate(first, given.seeds, given.jobs, whole_trace=given.trace)


# -- one schedule ----------------------------------------------------------------------------------


def _repeat(seed: int, less: Less) -> int:
    course = run_less(seed, less)
    print("\n".join(course.trace.lines()))
    for violation in course.violations:
        print(f"RULE   {violation.rule}\nBROKEN {violation.what}")
    totals = Totals()
    totals.add(seed, course)
    print(f"seed {seed}: {'a rule is broken' if course.violations else 'no rule is broken'}")
    print(json.dumps({"seed": seed, **totals.to_json()}))
    return 1 if course.violations else 0


def _minimise(seed: int) -> int:
    found = minimise(seed, lambda line: print(line, file=sys.stderr))
    if found is None:
        print(f"seed {seed} breaks no rule")
        print(json.dumps({"seed": seed, "violations": 0}))
        return 0
    less, course = found
    print("\n".join(course.trace.lines()))
    for violation in course.violations:
        print(f"RULE   {violation.rule}\nBROKEN {violation.what}")
    print(f'to repeat it: make simulate SEED={seed} ARGS="{less.arguments()}"')
    print(json.dumps({"seed": seed, "violations": 1, "arguments": less.arguments()}))
    return 1


# -- many ------------------------------------------------------------------------------------------


def _simulate(first: int, count: int, jobs: int, *, whole_trace: bool) -> int:
    interrupt = _Interrupt()
    began_s, told_s, cpu_began_s = time.monotonic(), time.monotonic(), _cpu_s()
    totals = Totals()
    print(f"seeds {first} to {first + count - 1}", file=sys.stderr)
    for part in _parts(first, count, jobs):
        totals.merge(part)
        now_s = time.monotonic()
        if now_s - told_s >= PROGRESS_S:
            told_s = now_s
            _tell(totals, count, now_s - began_s)
        if interrupt.is_pressed or len(totals.findings) >= MOST_FINDINGS:
            break
    seconds, cpu_s = time.monotonic() - began_s, _cpu_s() - cpu_began_s
    _show_findings(totals, whole_trace=whole_trace)
    print("\n".join(totals.table()))
    missing = totals.never_fired() if totals.schedules >= MANY else []
    rate = totals.schedules / seconds
    print(
        f"\n{totals.schedules:,} schedules in {seconds:.1f} s: {rate:.1f} a second;"
        f" {cpu_s:.1f} s of CPU"
    )
    verdict = _verdict(totals, missing, interrupted=interrupt.is_pressed)
    print(verdict)
    print(
        json.dumps(
            {
                **totals.to_json(),
                "first_seed": first,
                "seconds": round(seconds, 1),
                "cpu_s": round(cpu_s, 1),
                "schedules_per_s": round(rate, 1),
                "jobs": jobs,
                "verdict": verdict,
            }
        )
    )
    if interrupt.is_pressed:
        return 130
    return 1 if totals.findings or missing else 0


def _parts(first: int, count: int, jobs: int) -> Iterator[Totals]:
    """The sums of one chunk after another."""
    starts = range(first, first + count, CHUNK)
    sizes = [min(CHUNK, first + count - start) for start in starts]
    if jobs == 1:
        yield from map(_chunk, starts, sizes)
        return
    with ProcessPoolExecutor(jobs, initializer=_ignore_interrupts) as pool:
        futures: list[Future[Totals]] = [
            pool.submit(_chunk, start, size) for start, size in zip(starts, sizes, strict=True)
        ]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _chunk(first: int, count: int) -> Totals:
    totals = Totals()
    for seed in range(first, first + count):
        totals.add(seed, run_less(seed, Less()))
    gc.collect()  # a world is a web of cycles; swept up together they cost less
    return totals


def _ignore_interrupts() -> None:
    """Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# -- what people read ------------------------------------------------------------------------------


def _cpu_s() -> float:
    """What this process and its children that have ended have used."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _tell(totals: Totals, count: int, seconds: float) -> None:
    sagas = sum(totals.ends.values())
    print(
        f"{totals.schedules:,} of {count:,} schedules, {sagas:,} sagas,"
        f" {sum(totals.fired.values()):,} faults, {len(totals.findings)} findings,"
        f" {totals.schedules / seconds:.0f} a second",
        file=sys.stderr,
        flush=True,
    )


def _show_findings(totals: Totals, *, whole_trace: bool) -> None:
    for finding in totals.findings:
        print("\n".join(finding.lines()))
        if whole_trace:
            print("  all of it:")
            print("\n".join(run_less(finding.seed, Less()).trace.lines()))
        print(f"  to shrink it: make simulate ARGS='--minimise {finding.seed}'\n")


def _verdict(totals: Totals, missing: Sequence[str], *, interrupted: bool) -> str:
    parts = []
    if interrupted:
        parts.append("interrupted")
    if totals.findings:
        seeds = ", ".join(str(finding.seed) for finding in totals.findings)
        parts.append(f"{len(totals.findings)} schedules broke a rule: seeds {seeds}")
    else:
        parts.append("no rule was broken")
    if missing:
        parts.append(f"these faults never fired: {', '.join(missing)}")
    elif totals.schedules >= MANY:
        parts.append("every fault fired")
    else:
        parts.append(f"too few schedules to require that every fault fires (from {MANY:,} on)")
    return "; ".join(parts)


# -- arguments -------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _numbers(text: str) -> frozenset[int]:
    return frozenset(int(part) for part in text.split(",") if part)


def _faults(text: str) -> frozenset[Fault]:
    try:
        return frozenset(Fault[name] for name in text.split(",") if name)
    except KeyError as unknown:
        names = ", ".join(fault.name for fault in Fault)
        raise argparse.ArgumentTypeError(f"no fault {unknown}; there are {names}") from None


if __name__ == "__main__":
    sys.exit(main())
