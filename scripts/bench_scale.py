"""`make bench-scale`: sizes, and bad days. Each part has targets; all are in the table at the end.

    steps           sagas of 1, 3, 9 and 27 steps: is a further step as cheap as the one before it?
    compensation    every saga is refused at its last step, beside sagas that succeed
    unary           participants that have only the three unary verbs, beside the naive loop
    traced          every saga traced, beside none
    footprint       disk for each finished saga, and memory under load
    parked          very many sagas that wait for a time far away (`bench_parked.py`)
    recovery        kill -9 with very many in flight (`bench_recovery.py`)
    two-phase       two-phase commits, beside sagas of as many steps (`bench_two_phase.py`)
    overload        twice as many starts as can be done (`bench_overload.py`)

`--only` names some of them. Real processes, real syncs; a run in which an effect was lost or
doubled, or a saga is not accounted for, fails, and so does one in which a load did nothing. A
target that is missed does not: it is in the table.

Exit code: 0, or 1 if the run fails; 2 usage; 130 interrupted, by SIGINT or SIGTERM, and then no
process and no folder is left behind; the parts that were over have their figures in `--output`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

from scripts import bench_naive, bench_telemetry
from scripts.bench_interrupt import bench_folder, interruptible
from scripts.bench_loads import Load, NothingMeasured
from scripts.bench_options import (
    MOST_AT_ONCE,
    MOST_ROUNDS,
    MOST_SAGAS,
    add_output,
    seconds,
    whole,
)
from scripts.bench_overload import overload
from scripts.bench_parked import MILLION, park
from scripts.bench_participant import PLANTS
from scripts.bench_processes import STEPS, write_figures
from scripts.bench_recovery import recover
from scripts.bench_rig import Rig, Setting, conditions, cpu_of, percentiles, rate, ratios_of
from scripts.bench_targets import Verdict, at_least, at_most, bounded, print_verdicts
from scripts.bench_two_phase import two_phase

SIZES: Final = (1, 3, 9, 27)
FLAT: Final = 1.2
COMPENSATION: Final = 0.6
TRACED: Final = 0.7
DISK_BYTES: Final = 2048
LEAST_WINDOW_S: Final = 2.0
"""Of the overload: its first second is left out, and its last quarter compared with its second."""


@dataclass(frozen=True)
class Scale:
    """How much is done; `window_s` is how long the overload lasts."""

    rounds: int = 3
    seconds: float = 4.0
    concurrency: int = 300
    window_s: float = 20.0
    parked: int = 100_000
    recovering: int = 100_000
    plant: str = ""


Found = tuple[dict[str, Any], list[Verdict], list[str]]
"""Figures of a part, its verdicts, and what is wrong, in words."""


# -- the parts -------------------------------------------------------------------------------------


def steps(folder: Path, scale: Scale) -> Found:
    """The cost of a step, by the number of steps."""
    names = [f"steps-{size}" for size in SIZES]
    with Rig(folder, Setting("steps", definitions=tuple(names), plant=scale.plant)) as rig:
        loads = _alternate(rig, names, scale)
    cpu_us = {
        size: min(load["cpu_us"]["all"] for load in loads[name])
        for size, name in zip(SIZES, names, strict=True)
    }
    further = further_steps(cpu_us)
    figures = {
        "sagas_per_s": {size: _median_rate(loads[f"steps-{size}"]) for size in SIZES},
        "cpu_us_per_saga": {size: round(us) for size, us in cpu_us.items()},
        "cpu_us_per_step": {size: round(us / size, 1) for size, us in cpu_us.items()},
        "cpu_us_per_further_step": further,
    }
    least, most = min(further.values()), max(further.values())
    found = at_most(
        "a further step of 1, 3, 9, 27",
        "flat within 20 %",
        ", ".join(f"{span}: {us:.0f} µs" for span, us in further.items()),
        most / least if least > 0 else float("inf"),
        FLAT,
    )
    return figures, [found], rig.faults


def further_steps(cpu_us: Mapping[int, float]) -> dict[str, float]:
    """What one step more costs, between each size and the next: the start and the end left out."""
    sizes = sorted(cpu_us)
    return {
        f"{a} to {b}": round((cpu_us[b] - cpu_us[a]) / (b - a), 1)
        for a, b in itertools.pairwise(sizes)
    }


def compensation(folder: Path, scale: Scale) -> Found:
    """Sagas that are refused at their last step, beside those that succeed."""
    names = ["bench", "refused"]
    with Rig(folder, Setting("compensation", definitions=tuple(names), plant=scale.plant)) as rig:
        loads = _alternate(rig, names, scale)
    ratios = ratios_of(loads["refused"], loads["bench"])
    rates = {name: _median_rate(loads[name]) for name in names}
    figures = {
        "sagas_per_s": rates,
        "cpu_us": {name: cpu_of(loads[name]) for name in names},
        "ratio": ratios,
    }
    found = at_least(
        "refused at the last step",
        "at least 0.6 x the successful",
        f"{rates['refused']} sagas/s",
        ratios["median"],
        COMPENSATION,
    )
    return figures, [found], rig.faults


def unary(folder: Path, scale: Scale) -> Found:
    """Participants with the unary verbs alone, beside the naive loop, each at its best."""
    plan = bench_naive.Plan(
        rounds=scale.rounds,
        seconds=scale.seconds,
        levels=(100, scale.concurrency),
        ways=("naive", "unary"),
        plant=scale.plant,
    )
    figures = bench_naive.measure(folder, plan)
    return figures, bench_naive.verdicts(figures), figures["faults"]


def traced(folder: Path, scale: Scale) -> Found:
    """Every saga traced, beside none; what two equal runtimes differ by is measured, too."""
    ways = bench_telemetry.chosen(["again", "traces-100"])
    try:
        figures = bench_telemetry.measure(
            folder, ways, scale.rounds, scale.seconds, concurrency=scale.concurrency
        )
    except bench_telemetry.SpansMissing as missing:
        return {}, [], [str(fault) for fault in missing.args]
    one = figures["ways"]["traces-100"]
    found = at_least(
        "every saga traced",
        "at least 0.7 x without",
        f"{one['with_sagas_per_s']} sagas/s",
        one["ratio"],
        TRACED,
    )
    return figures, [found], figures["faults"]


def footprint(folder: Path, scale: Scale) -> Found:
    """Disk for each finished saga, and what memory does while a load runs."""
    with Rig(folder, Setting("footprint", plant=scale.plant)) as rig:
        idle_mib = rig.memory() >> 20
        with rig.memory_watched() as seen:
            loads = [
                rig.load(seconds=scale.seconds, concurrency=scale.concurrency)
                for _ in range(scale.rounds)
            ]
        after_mib = rig.memory() >> 20
    per_saga = round(rig.disk_bytes / max(1, rig.ended.total()))
    figures = {
        "sagas": rig.ended.total(),
        "sagas_per_s": _median_rate(loads),
        "latency_ms": percentiles([ms for load in loads for ms in load["latencies_ms"]]),
        "disk_bytes_per_saga": per_saga,
        "memory_mib_idle": idle_mib,
        "memory_mib_most": max(seen, default=0) >> 20,
        "memory_mib_after": after_mib,
    }
    is_met = per_saga <= DISK_BYTES
    found = bounded("disk", "at most 2 KB a saga", f"{per_saga} bytes", is_met=is_met)
    return figures, [found], rig.faults


def parked(folder: Path, scale: Scale) -> Found:
    """Very many that wait."""
    return park(
        folder,
        scale.parked,
        rounds=scale.rounds,
        seconds=scale.seconds,
        concurrency=scale.concurrency,
        plant=scale.plant,
    )


def recovery(folder: Path, scale: Scale) -> Found:
    """A kill, with very many in flight."""
    return recover(folder, scale.recovering, scale.seconds, scale.concurrency, scale.plant)


def two_phase_commits(folder: Path, scale: Scale) -> Found:
    """Two-phase commits, beside sagas of as many steps."""
    return two_phase(folder, scale.rounds, scale.seconds, scale.concurrency, scale.plant)


def overloaded(folder: Path, scale: Scale) -> Found:
    """Twice as many starts as can be done."""
    return overload(folder, scale.seconds, scale.window_s, scale.plant)


PARTS: Final[Mapping[str, Callable[[Path, Scale], Found]]] = {
    "steps": steps,
    "compensation": compensation,
    "unary": unary,
    "traced": traced,
    "footprint": footprint,
    "parked": parked,
    "recovery": recovery,
    "two-phase": two_phase_commits,
    "overload": overloaded,
}


def _alternate(rig: Rig, names: Sequence[str], scale: Scale) -> dict[str, list[Load]]:
    """Loads of these definitions, which take turns at going first; a short one of each before."""
    done: dict[str, list[Load]] = {name: [] for name in names}
    for number in range(-1, scale.rounds):
        for name in names if number % 2 else reversed(names):
            seconds = scale.seconds if number >= 0 else min(1.0, scale.seconds)
            load = rig.load(seconds=seconds, concurrency=scale.concurrency, definition=name)
            if number >= 0:
                done[name].append(load)
                print(f"  round {number + 1}  {name:10} {rate(load):8.0f} sagas/s", flush=True)
    return done


def _median_rate(loads: Sequence[Load]) -> float:
    return round(statistics.median(map(rate, loads)), 1)


# -- the run ---------------------------------------------------------------------------------------


def run(names: Sequence[str], scale: Scale, output: Path) -> int:
    """Runs these parts, or all, and writes `output`. Answers the exit code."""
    figures: dict[str, Any] = {}
    table: list[Verdict] = []
    faults: list[str] = []
    under: dict[str, Any] = {}
    for name in names or PARTS:
        print(f"\n{name}: {PARTS[name].__doc__}", flush=True)
        began_s = time.monotonic()
        # A folder of its own, so that nobody's database lies beside another's.
        with bench_folder() as folder:
            under = under or conditions(folder, steps=len(STEPS), **vars(scale))
            try:
                found, verdicts, wrong = PARTS[name](folder, scale)
            except NothingMeasured as nothing:
                found, verdicts, wrong = {}, [], [f"{name}: nothing was measured: {nothing}"]
        figures[name] = {**found, "took_s": round(time.monotonic() - began_s, 1)}
        table.extend(verdicts)
        faults.extend(wrong)
        for fault in wrong:
            print(f"  WRONG: {fault}", flush=True)
        # After each part, so that what was measured is there if a later one is ended.
        written = {
            "benchmark": "scale",
            "conditions": under,
            "parts": figures,
            "verdicts": [one._asdict() for one in table],
            "faults": faults,
        }
        write_figures(output, written)
    print_verdicts(table)
    print(f"\n{'NOT EXACT: the run fails' if faults else 'exact'}; written to {output}")
    return 1 if faults else 0


def _parser() -> argparse.ArgumentParser:
    usual = Scale()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(PARTS),
        default=[],
        metavar="PART",
        help=f"only these of {', '.join(PARTS)}; default all",
    )
    parser.add_argument(
        "--rounds",
        type=whole(1, MOST_ROUNDS),
        default=usual.rounds,
        help="how often what is compared takes turns, the median counts; default %(default)s",
    )
    parser.add_argument(
        "--seconds", type=seconds(), default=usual.seconds, help="of each load; default %(default)g"
    )
    parser.add_argument(
        "--concurrency",
        type=whole(1, MOST_AT_ONCE),
        default=usual.concurrency,
        help="sagas at once in each closed loop; default %(default)s",
    )
    parser.add_argument(
        "--window",
        type=seconds(LEAST_WINDOW_S),
        default=usual.window_s,
        help="seconds that the overload lasts; default %(default)g",
    )
    parked = parser.add_mutually_exclusive_group()
    parked.add_argument(
        "--parked",
        type=whole(1, MOST_SAGAS),
        default=usual.parked,
        help="sagas that are parked; default %(default)s",
    )
    parked.add_argument("--million", action="store_true", help="park a million sagas")
    parser.add_argument(
        "--recovering",
        type=whole(1, MOST_SAGAS // 2),  # twice as many is the limit that the runtime is given
        default=usual.recovering,
        help="sagas in flight at the kill; default %(default)s",
    )
    parser.add_argument(
        "--plant",
        choices=PLANTS,
        default="",
        help="a fault of the participant, which the run must find; default: none",
    )
    add_output(parser, Path("build/bench-scale.json"))
    return parser


def main() -> int:
    """The command line."""
    options = _parser().parse_args()
    scale = Scale(
        rounds=options.rounds,
        seconds=options.seconds,
        concurrency=options.concurrency,
        window_s=options.window,
        parked=MILLION if options.million else options.parked,
        recovering=options.recovering,
        plant=options.plant,
    )
    return interruptible(lambda: run(options.only, scale, options.output))


if __name__ == "__main__":
    raise SystemExit(main())
