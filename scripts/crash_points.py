"""`make crash-points`: somebody dies at every point of every scenario, and again in recovery.

See `tests/simulation/crash_points.py` for what a point and a scenario are: the runtime dies, and in
a two-phase commit its participants do, too. All single deaths and,
unless `--singles`, all pairs are run; none is sampled. It runs in virtual time, in this process or
in as many as `--jobs` says.

Reports go to standard error while it runs; then a table and, as the last line, one JSON object on
standard output. Exit codes: 0 every run ended right; 1 one did not: its whole course is printed; 2
usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.simulation.crash_points import (  # noqa: E402  # the path comes first
    KINDS_OF_COMMITS,
    SCENARIOS,
    Enumeration,
    Failure,
    Scenario,
    enumerate_deaths,
)


def main() -> int:
    """Run it as the arguments say; give the exit code."""
    parser = argparse.ArgumentParser(description="Die at every point, and again in recovery.")
    parser.add_argument("--list", action="store_true", help="name the scenarios and end")
    parser.add_argument("--only", metavar="TEXT", default="", help="scenarios whose name has it")
    parser.add_argument("--singles", action="store_true", help="one death per run, no pairs")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    arguments = parser.parse_args()
    scenarios = [scenario for scenario in SCENARIOS if arguments.only in scenario.name]
    if not scenarios:
        parser.error(f"no scenario has {arguments.only!r} in its name; --list names them")
    if arguments.list:
        print("\n".join(scenario.name for scenario in scenarios))
        return 0
    began_s = time.monotonic()
    try:
        found = _run(scenarios, pairs=not arguments.singles, jobs=arguments.jobs)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return _report(found, time.monotonic() - began_s, pairs=not arguments.singles)


def _run(scenarios: Sequence[Scenario], *, pairs: bool, jobs: int) -> list[Enumeration]:
    work = partial(_enumerate, pairs=pairs)
    numbers = [SCENARIOS.index(scenario) for scenario in scenarios]
    if jobs <= 1:
        return [_told(work(number)) for number in numbers]
    # Spawned, because a process that has imported gRPC must not be forked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            return [_told(one) for one in pool.map(work, numbers)]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _enumerate(number: int, *, pairs: bool) -> Enumeration:
    return enumerate_deaths(SCENARIOS[number], pairs=pairs)


def _told(found: Enumeration) -> Enumeration:
    verdict = f"{len(found.failures)} FAILED" if found.failures else "all ended right"
    print(
        f"{found.scenario}: {found.singles} deaths, {found.pairs} pairs: {verdict}",
        file=sys.stderr,
        flush=True,
    )
    return found


def _report(found: Sequence[Enumeration], took_s: float, *, pairs: bool) -> int:
    """Print the table, the first failure with its course, and the JSON line; give the exit code."""
    print(
        f"{'scenario':58} {'commits':>8} {'prepares':>9} {'executes':>9} {'compensates':>12}"
        f" {'deaths':>7} {'pairs':>7}  ends"
    )
    for one in found:
        ends = ", ".join(f"{count} {end}" for end, count in sorted(one.ends.items()))
        print(
            f"{one.scenario:58} {one.points['before a commit']:8} {one.prepares:9}"
            f" {one.executes:9} {one.compensations:12} {one.singles:7} {one.pairs:7}  {ends}"
        )
    kinds: Counter[str] = Counter()
    for one in found:
        kinds.update(one.points)
    failures = [failure for one in found for failure in one.failures]
    missing = [kind for kind in KINDS_OF_COMMITS.values() if not kinds[kind]]
    uncounted = [
        one.scenario
        for one in found
        if one.singles != sum(one.points.values())
        or one.pairs != (one.recovery_points if pairs else 0)
    ]
    runs = sum(one.ends.total() for one in found)
    if failures:
        _print_failure(failures[0])
    print(
        f"\n{len(found)} scenarios, {runs} runs in {took_s:.0f} s: {sum(o.singles for o in found)}"
        f" deaths, {sum(o.pairs for o in found)} pairs; {len(failures)} did not end right"
    )
    summary: dict[str, Any] = {
        "scenarios": len(found),
        "points": dict(kinds),
        "prepares": sum(one.prepares for one in found),
        "executes": sum(one.executes for one in found),
        "compensations": sum(one.compensations for one in found),
        "deaths": sum(one.singles for one in found),
        "pairs": sum(one.pairs for one in found),
        "runs": runs,
        "failures": len(failures),
        "kinds_without_a_point": missing,
        "not_all_enumerated": uncounted,
        "seconds": round(took_s, 1),
    }
    print(json.dumps(summary))
    return 1 if failures or missing or uncounted else 0


def _print_failure(failure: Failure) -> None:
    print(f"\nthe first run that did not end right: {failure}\n")
    print("\n".join(failure.trace))


if __name__ == "__main__":
    sys.exit(main())
