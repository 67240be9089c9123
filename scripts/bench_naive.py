"""`make bench`: what a durable saga costs, beside the same three calls made naively.

Three ways to do the same work, in alternation, on one machine:

    naive       loops that make three unary grpc.aio calls one after another; nothing is durable,
                nothing is retried, a crash loses everything
    unary       the SDK's client, a runtime with real syncs, a participant that has only the three
                unary verbs
    streaming   the same with a participant that has Exchange, too, as every one of the SDK has

Each way is measured at several concurrencies and stands with its best: what is compared are ways,
not how well they like a number of loops. Then one at a time, for the latency when nobody else is
there; then at a fixed rate of arrivals (open loop), half of what the way, or the naive one, could
do. A run in which an effect was lost or doubled fails; see `bench_rig.py`.

Quote ratios: machines are noisy, and the ways alternate within one run because of that.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from scripts.bench_interrupt import bench_folder
from scripts.bench_loads import Load, NothingMeasured
from scripts.bench_processes import STEPS, process, sink_command, write_figures
from scripts.bench_rig import (
    Rig,
    Setting,
    conditions,
    cpu_of,
    percentiles,
    rate,
    ratios_of,
    sync_us,
)
from scripts.bench_targets import Verdict, at_least, at_most, print_verdicts

WAYS: Final = ("naive", "unary", "streaming")
LEVELS: Final = (100, 300, 1000)
TRACES_RATIO: Final = 0.01
SHARE: Final = 0.5
"""Of a way's capacity, in the open loop: queues of a loop that is half idle are short."""

WARM_S: Final = 1.0
PROCESSES: Final = ("load", "participant", "runtime", "all")


@dataclass(frozen=True)
class Plan:
    """How much is measured. `ways` may leave some out, but not both of amends."""

    rounds: int = 4
    seconds: float = 4.0
    levels: tuple[int, ...] = LEVELS
    ways: tuple[str, ...] = WAYS
    plant: str = ""
    profile: Path | None = None


def run(plan: Plan, output: Path) -> int:
    """Measures, prints a table, writes `output`. Answers the exit code."""
    print(
        f"amends bench: {', '.join(plan.ways)}; {plan.rounds} rounds of {plan.seconds:g} s each, "
        f"{', '.join(map(str, plan.levels))} at once",
        flush=True,
    )
    try:
        with bench_folder() as folder:
            figures = measure(folder, plan)
    except NothingMeasured as nothing:
        print(f"\nNOTHING MEASURED: {nothing}; the run fails")
        return 1
    write_figures(output, figures)
    _print_tables(figures)
    print_verdicts(verdicts(figures))
    for fault in figures["faults"]:
        print(f"WRONG: {fault}")
    print(f"\n{'NOT EXACT: the run fails' if figures['faults'] else 'exact'}; written to {output}")
    return 1 if figures["faults"] else 0


# -- measuring -------------------------------------------------------------------------------------


def measure(folder: Path, plan: Plan) -> dict[str, Any]:
    """All figures; see `run`. `faults` in them are lost or doubled effects, in words.

    Raises NothingMeasured.
    """
    under = conditions(
        folder,
        steps=len(STEPS),
        rounds=plan.rounds,
        seconds_per_load=plan.seconds,
        traces_ratio=TRACES_RATIO,
        metrics="no",
        open_loop_share=SHARE,
    )
    with process(folder, "sink", sink_command()) as sink, contextlib.ExitStack() as stack:
        rigs = {
            way: stack.enter_context(Rig(folder, _setting(way, sink["address"], plan)))
            for way in plan.ways
            if way != "naive"
        }
        # The naive loop calls the very participant that one of the others has.
        of_way = {way: rigs.get(way, next(iter(rigs.values()))) for way in plan.ways}
        course = _Course(of_way, plan)
        course.warm_up()
        closed = course.closed()
        best = {way: best_level(levels) for way, levels in closed.items()}
        capacity = {way: median_rate(closed[way][best[way]]) for way in plan.ways}
        alone = course.one_at_a_time()
        opened = course.open_loops(capacity)
        transports = {way: rig.transport() for way, rig in rigs.items()}
        memory = {way: rig.memory() >> 20 for way, rig in rigs.items()}
    under["fdatasync_us_after"] = sync_us(folder)
    return {
        "benchmark": "naive",
        "conditions": under,
        "ways": {
            way: {
                "transport": transports.get(way, "unary"),
                "best": best[way],
                "closed": {
                    level: _load_figures(loads) for level, loads in sorted(closed[way].items())
                },
                "one_at_a_time_ms": percentiles(_latencies(alone[way])),
                "one_at_a_time_cpu_us": cpu_of(alone[way]),
                "open": opened[way],
            }
            for way in plan.ways
        },
        "ratios": {
            way: ratios_of(closed[way][best[way]], closed["naive"][best["naive"]])
            for way in plan.ways
            if way != "naive" and "naive" in plan.ways
        },
        "disk_bytes_per_saga": {
            way: round(rig.disk_bytes / ended)
            for way, rig in rigs.items()
            if (ended := rig.ended.total())
        },
        "memory_mib": memory,
        "faults": [fault for rig in rigs.values() for fault in rig.faults],
    }


def _setting(name: str, collector: str, plan: Plan) -> Setting:
    return Setting(
        name,
        unary=name == "unary",
        plant=plan.plant,
        collector=collector,
        traces_ratio=TRACES_RATIO,
        profile=plan.profile if name == "streaming" else None,
    )


class _Course:
    """The loads in their order."""

    def __init__(self, rigs: Mapping[str, Rig], plan: Plan) -> None:
        self._rigs = rigs
        self._plan = plan

    def warm_up(self) -> None:
        """Connections, imports and caches are warm before anything is timed."""
        for way in self._rigs if self._plan.seconds > WARM_S else ():
            self._load(way, WARM_S, self._plan.levels[-1])

    def closed(self) -> dict[str, dict[int, list[Load]]]:
        """By way and concurrency: the rounds, in which the ways take turns at going first."""
        done: dict[str, dict[int, list[Load]]] = {
            way: {level: [] for level in self._plan.levels} for way in self._rigs
        }
        for number in range(self._plan.rounds):
            for level in self._plan.levels:
                rates = {}
                for way in self._turns(number):
                    load = self._load(way, self._plan.seconds, level)
                    done[way][level].append(load)
                    rates[way] = rate(load)
                told = "  ".join(f"{way} {rates[way]:8.0f}" for way in self._rigs)
                print(f"  round {number + 1}  {level:5} at once  {told}  sagas/s", flush=True)
        return done

    def one_at_a_time(self) -> dict[str, list[Load]]:
        """By way: loads of one loop."""
        done: dict[str, list[Load]] = {way: [] for way in self._rigs}
        for number in range(min(2, self._plan.rounds)):
            for way in self._turns(number):
                done[way].append(self._load(way, self._plan.seconds / 2, 1))
        for way, loads in done.items():
            print(f"  one at a time  {way:10} {percentiles(_latencies(loads))} ms", flush=True)
        return done

    def open_loops(self, capacity: Mapping[str, float]) -> dict[str, list[dict[str, Any]]]:
        """By way: latencies at half of its capacity, and at half of the naive loop's."""
        done: dict[str, list[dict[str, Any]]] = {way: [] for way in self._rigs}
        for way in self._rigs:
            rates = {round(SHARE * capacity[one], 1) for one in ("naive", way) if one in capacity}
            for per_s in sorted(rates):
                load = self._load(way, self._plan.seconds, 0, rate=per_s)
                figures = {
                    "arrivals_per_s": per_s,
                    "sagas": load["sagas"],
                    "latency_ms": percentiles(load["latencies_ms"]),
                    "cpu_us": cpu_of([load]),
                }
                done[way].append(figures)
                print(
                    f"  open loop  {way:10} {per_s:8.0f} sagas/s  {figures['latency_ms']} ms",
                    flush=True,
                )
        return done

    def _load(self, way: str, seconds: float, level: int, rate: float = 0.0) -> Load:
        kind = "naive" if way == "naive" else "amends"
        return self._rigs[way].load(kind, seconds=seconds, concurrency=level, rate=rate)

    def _turns(self, number: int) -> list[str]:
        ways = list(self._rigs)
        return ways[::-1] if number % 2 else ways


# -- figures ---------------------------------------------------------------------------------------


def median_rate(loads: Sequence[Load]) -> float:
    """Sagas per second, the median of the rounds."""
    return statistics.median(map(rate, loads))


def best_level(levels: Mapping[int, Sequence[Load]]) -> int:
    """The concurrency at which a way does most."""
    return max(levels, key=lambda level: median_rate(levels[level]))


def verdicts(figures: Mapping[str, Any]) -> list[Verdict]:
    """How the figures stand to the targets; none without the naive loop."""
    ways, found = figures["ways"], []
    if "naive" not in ways:
        return []
    for way, bound in (("streaming", 8.0), ("unary", 0.85)):
        if way in ways:
            best = ways[way]["closed"][ways[way]["best"]]
            figure = f"{best['sagas_per_s']:.0f} sagas/s over {ways[way]['transport']}"
            target = f"at least {bound:g} x naive"
            ratio = figures["ratios"][way]["median"]
            found.append(at_least(f"{way} participants", target, figure, ratio, bound))
    for way in ("streaming", "unary"):
        if way in ways:
            p50 = ways[way]["one_at_a_time_ms"]["p50"]
            ratio = p50 / ways["naive"]["one_at_a_time_ms"]["p50"]
            part = f"one at a time, {way}"
            found.append(at_most(part, "p50 at most 1.7 x naive", f"{p50} ms", ratio, 1.7))
    return found


def _load_figures(loads: Sequence[Load]) -> dict[str, Any]:
    return {
        "sagas_per_s": round(median_rate(loads), 1),
        "sagas_per_s_by_round": [round(rate(load), 1) for load in loads],
        "sagas": sum(load["sagas"] for load in loads),
        "latency_ms": percentiles(_latencies(loads)),
        "cpu_us": cpu_of(loads),
    }


def _latencies(loads: Sequence[Load]) -> list[float]:
    return [ms for load in loads for ms in load["latencies_ms"]]


# -- tables ----------------------------------------------------------------------------------------


def _print_tables(figures: Mapping[str, Any]) -> None:
    ways = figures["ways"]
    print(f"\n{'':32}{''.join(f'{way:>28}' for way in ways)}")

    def row(name: str, texts: Sequence[str]) -> None:
        print(f"{name:32}{''.join(f'{text:>28}' for text in texts)}")

    naive_best = ways["naive"]["closed"][ways["naive"]["best"]] if "naive" in ways else None
    row("transport", [one["transport"] for one in ways.values()])
    for level in next(iter(ways.values()))["closed"]:
        row(
            f"sagas/s, {level} at once (x naive)",
            [
                _against(one["closed"][level]["sagas_per_s"], naive_best, "sagas_per_s")
                for one in ways.values()
            ],
        )
    bests = [one["closed"][one["best"]] for one in ways.values()]
    row("best at", [str(one["best"]) for one in ways.values()])
    row("  latency ms p50 / p95 / p99", [_shares(one["latency_ms"]) for one in bests])
    for name in PROCESSES:
        row(f"  CPU µs a saga: {name}", [str(one["cpu_us"].get(name, 0)) for one in bests])
    row("one at a time ms p50/p95/p99", [_shares(one["one_at_a_time_ms"]) for one in ways.values()])
    _print_open_loops(ways)
    under = figures["conditions"]
    print(
        f"\nfdatasync of 4 KiB: {under['fdatasync_us']} µs before it, "
        f"{under['fdatasync_us_after']} µs after"
    )
    print(f"disk per saga, bytes: {_listed(figures['disk_bytes_per_saga'])}")
    print(f"memory of the runtimes at the end, MiB: {_listed(figures['memory_mib'])}")


def _print_open_loops(ways: Mapping[str, Any]) -> None:
    heads = ("arrivals/s", "sagas", "p50 ms", "p95 ms", "p99 ms", "CPU µs a saga")
    print(f"\n{'open loop':12}{''.join(f'{head:>15}' for head in heads)}")
    for way, one in ways.items():
        for each in one["open"]:
            texts = (
                f"{each['arrivals_per_s']:.0f}",
                str(each["sagas"]),
                *(f"{each['latency_ms'][share]:g}" for share in ("p50", "p95", "p99")),
                str(each["cpu_us"].get("all", 0)),
            )
            print(f"{way:12}{''.join(f'{text:>15}' for text in texts)}")


def _against(value: float, base: Mapping[str, Any] | None, key: str) -> str:
    return f"{value:.0f}" if base is None else f"{value:.0f} ({value / base[key]:.2f})"


def _shares(latency_ms: Mapping[str, float]) -> str:
    return " / ".join(f"{ms:g}" for ms in latency_ms.values())


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
