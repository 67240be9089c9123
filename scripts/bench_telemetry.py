"""`make bench ARGS=--telemetry`: what traces and metrics cost the runtime.

Runtimes that differ in their telemetry alone do the same work (three steps, 100 sagas at once, real
processes, real syncs). Each is compared with one that has none, in pairs of loads right after one
another, of which the other comes first every second time:

    again             no telemetry either: what it differs by is noise
    metrics           the endpoint for Prometheus, read once a second
    traces-1          traces of 1 % of the sagas, over gRPC
    traces-100        traces of every saga
    both              traces of every saga and metrics
    participants      traces of every saga, and the participant sends its own spans, too
    hanging           traces of every saga, to a collector that takes them and never answers

The last two only if `--ways` names them: the first measures more than the runtime, and the second
is no way to run one.

The collector is a process of its own that keeps what it gets and answers (`bench_sink.py`). After
each load all of its spans must have come to it before the next one begins: what a load leaves to be
sent is neither forgotten nor measured as part of another, and how long that took is told. The CPU
of a load is that of the runtime's process until then, told by the kernel, by thread.

The run fails if a span is missing or doubled without the runtime having counted it as dropped, if
the metrics count other ends than there were, or if an effect at the participant is not there once.
Ratios are compared with the targets of the project, which does not fail the run: a machine may be
busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families

import amends
from amends_runtime.core.tracing import Tracing
from scripts.bench_interrupt import bench_folder
from scripts.bench_loads import Load, NothingMeasured, run_load
from scripts.bench_processes import (
    CONCURRENCY,
    STEPS,
    count_ended,
    cpu_seconds,
    effects_at,
    memory_bytes,
    participant_command,
    process,
    register,
    runtime_command,
    saga_id_of,
    sink_command,
    thread_cpu_seconds,
    write_figures,
)
from scripts.bench_rig import conditions, cpu_of, percentiles, rate
from scripts.bench_sink import read_sink

WARM_S: Final = 1.0
SCRAPE_EVERY_S: Final = 1.0
LOOK_EVERY_S: Final = 0.05
GIVE_UP_S: Final = 30.0
"""On spans that have not come after a load; then some are lost, and the run fails."""

QUIET: Final = 0.1
"""What two equal runtimes differ by on a machine with nothing else to do, and then some."""

OUR_THREADS: Final = ("runtime: amends-traces", "runtime: metrics ")

CALL: Final = "amends.v1.ParticipantService/Execute"
MAY_COME: Final = frozenset({"queued: bench"})
"""A call that waited 100 ms for a busy loop has a span for it, which no load can foresee."""


@dataclass(frozen=True)
class Way:
    """A runtime's telemetry. `ratio` is the share of sagas that are traced, or None for none."""

    key: str
    says: str
    ratio: float | None = None
    metrics: bool = False
    participants: bool = False
    hangs: bool = False
    target: str = ""


WITHOUT: Final = Way("without", "no telemetry")
WAYS: Final = (
    Way("again", "no telemetry, again"),
    Way("metrics", "metrics, read each second", metrics=True, target="noise"),
    Way("traces-1", "traces of 1 %", ratio=0.01, target="noise"),
    Way("traces-100", "traces of every saga", ratio=1.0, target="0.7"),
    Way("both", "traces and metrics", ratio=1.0, metrics=True, target="0.7"),
    Way("participants", "participants' spans, too", ratio=1.0, participants=True),
    Way("hanging", "the collector hangs", ratio=1.0, hangs=True, target="noise"),
)
AT_LEAST: Final = 0.7


class SpansMissing(Exception):
    """Spans of a load have not come, or others have: its arguments say which."""


def chosen(keys: Sequence[str]) -> list[Way]:
    """The ways of these keys; none: the usual ones."""
    if "all" in keys:
        return list(WAYS)
    return [
        way for way in WAYS if (way.key in keys if keys else not (way.participants or way.hangs))
    ]


# -- a runtime of one way --------------------------------------------------------------------------


@dataclass
class Side:
    """A runtime that runs, its participant, and what its loads have done so far."""

    way: Way
    runtime: Mapping[str, Any]
    worker: Mapping[str, Any]
    sink_address: str
    tracing: Tracing
    concurrency: int = CONCURRENCY
    sagas: int = 0
    traced: int = 0

    def load(self, tag: str, seconds: float) -> Load:
        """Runs one load, waits for its spans, and answers its figures. Raises SpansMissing."""
        tag = f"{self.way.key}-{tag}-{os.getpid()}"
        before = self._cpu()
        with self._scraped():
            result = run_load("amends", self.runtime["address"], tag, seconds, self.concurrency)
        self.sagas += result["total"]
        self.traced += self._count_traced(tag, result["total"])
        ended = time.monotonic()
        self._wait_spans()
        result["drained_s"] = time.monotonic() - ended
        after = self._cpu()
        used = {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}
        used["load"] = result["cpu_s"]
        result["cpu_us"] = {name: s * 1e6 / result["total"] for name, s in used.items()}
        return result

    def _cpu(self) -> dict[str, float]:
        pid = self.runtime["pid"]
        threads = {f"runtime: {name}": s for name, s in thread_cpu_seconds(pid).items()}
        return {
            **threads,
            "runtime": cpu_seconds(pid),
            "participant": cpu_seconds(self.worker["pid"]),
            "sink": float(self._received()["cpu_s"]),
        }

    # -- spans -----------------------------------------------------------------------------------

    def _count_traced(self, tag: str, sagas: int) -> int:
        if self.way.ratio is None:
            return 0
        ids = (saga_id_of(tag, number) for number in range(1, sagas + 1))
        return sum(self.tracing.is_sampled(self.tracing.trace_id(one, ""), "") for one in ids)

    def _received(self) -> dict[str, Any]:
        return asyncio.run(read_sink(self.sink_address))

    def _wait_spans(self) -> None:
        give_up_at = time.monotonic() + GIVE_UP_S
        while faults := self.span_faults():
            if time.monotonic() > give_up_at:
                raise SpansMissing(*faults)
            time.sleep(LOOK_EVERY_S)

    def span_faults(self) -> list[str]:
        """What is wrong with the spans that have come so far, in words."""
        if self.way.hangs:
            return []  # nobody knows what became of them
        told = self._received()

        def compare(service: str, expected: Mapping[str, int], dropped: int = 0) -> list[str]:
            names, distinct = told["spans"].get(service, {}), told["distinct"].get(service, 0)
            return compare_spans(service, expected, names, distinct=distinct, dropped=dropped)

        own = runtime_spans(self.traced)
        # Whether some were dropped is asked only if some are missing: it costs a scrape.
        faults = compare(self.way.key, own) and compare(self.way.key, own, self.dropped())
        if self.way.participants:
            service = participant_service(self.way)
            faults = [*faults, *compare(service, participant_spans(self.traced))]
        return faults

    # -- metrics ---------------------------------------------------------------------------------

    def dropped(self) -> int:
        """Spans that the runtime has counted as dropped or failed, if it has metrics."""
        return sum(
            round(value)
            for labels, value in self._samples("amends_telemetry_spans_total")
            if labels["result"] != "exported"
        )

    def metric_faults(self) -> list[str]:
        """What is wrong with the ends that the runtime's metrics have counted, in words."""
        if not self.way.metrics:
            return []
        ends = {
            labels["outcome"]: round(value)
            for labels, value in self._samples("amends_saga_ends_total")
            if value
        }
        wrong = sum(ends.values()) != self.sagas or len(ends) != 1
        return [f"{self.way.key}: metrics count {ends} of {self.sagas} ends"] if wrong else []

    def _samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        if not self.way.metrics:
            return []
        return [
            (sample.labels, sample.value)
            for family in text_string_to_metric_families(self._scrape())
            for sample in family.samples
            if sample.name == name
        ]

    def _scrape(self) -> str:
        address = self.runtime["metrics"]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            return str(answer.read(), "utf-8")

    @contextlib.contextmanager
    def _scraped(self) -> Iterator[None]:
        """Reads the metrics once a second for the length of the block, as Prometheus would."""
        if not self.way.metrics:
            yield
            return
        is_over = threading.Event()

        def scrape() -> None:
            while not is_over.wait(SCRAPE_EVERY_S):
                self._scrape()

        scraper = threading.Thread(target=scrape)
        scraper.start()
        try:
            yield
        finally:
            is_over.set()
            scraper.join()


def participant_service(way: Way) -> str:
    """What the participant of a way is called in traces."""
    return f"{way.key} participant"


def runtime_spans(traced: int) -> dict[str, int]:
    """The spans that so many sagas have in the runtime, by name."""
    return {
        "saga bench": traced,
        **{f"step {step}": traced for step in STEPS},
        CALL: traced * len(STEPS),
    }


def participant_spans(traced: int) -> dict[str, int]:
    """The spans that they have at the participant."""
    return {CALL: traced * len(STEPS)}


def compare_spans(
    service: str,
    expected: Mapping[str, int],
    received: Mapping[str, int],
    *,
    distinct: int,
    dropped: int,
) -> list[str]:
    """What is wrong with the spans that a service has sent, in words; nothing, if nothing is.

    `received` counts by name, `distinct` those of an id of their own, `dropped` those that the
    service says it has not sent: with some of them, only the sum can be checked.
    """
    total = sum(received.values())
    faults = [] if distinct == total else [f"{service}: {total - distinct} spans came twice"]
    extra = sum(count for name, count in received.items() if name in MAY_COME)
    if dropped:
        if total + dropped < sum(expected.values()):
            faults.append(
                f"{service}: {total} spans and {dropped} dropped of {sum(expected.values())}"
            )
    elif total - extra != sum(expected.values()) or any(
        received.get(name, 0) != count for name, count in expected.items()
    ):
        faults.append(f"{service}: {dict(received)} instead of {dict(expected)}")
    return faults


# -- the run ---------------------------------------------------------------------------------------


def run(
    ways: Sequence[Way], rounds: int, seconds: float, output: Path, profile: Path | None
) -> int:
    """Runs all pairs and writes `output`. Answers the exit code.

    `profile` is where a cProfile of the loop's thread with `traces-100` goes.
    """
    print(
        f"amends bench: what telemetry costs; {len(ways)} x {rounds} pairs of {seconds:g} s",
        flush=True,
    )
    with bench_folder() as folder:
        try:
            figures = measure(folder, ways, rounds, seconds, profile=profile)
        except SpansMissing as missing:
            print(*(f"WRONG: {fault}" for fault in missing.args), *_logs(folder), sep="\n")
            return 1
        except NothingMeasured as nothing:
            print(f"\nNOTHING MEASURED: {nothing}; the run fails", *_logs(folder), sep="\n")
            return 1
        logs = _logs(folder)
    write_figures(output, figures)
    _print_table(ways, figures, output)
    for line in logs:
        print(line)
    return 1 if figures["faults"] else 0


def measure(
    folder: Path,
    ways: Sequence[Way],
    rounds: int,
    seconds: float,
    *,
    concurrency: int = CONCURRENCY,
    profile: Path | None = None,
) -> dict[str, Any]:
    """Answers all figures, what is wrong in `faults`. Raises SpansMissing."""
    measured_under = conditions(
        folder, concurrency=concurrency, rounds=rounds, seconds_per_load=seconds
    )
    with _sides([WITHOUT, *ways], folder, seconds, concurrency, profile) as sides:
        pairs = _measure(sides, ways, rounds, seconds)
        received = asyncio.run(read_sink(sides["without"].sink_address))
        faults = _faults(list(sides.values()))
        memory_mib = {key: memory_bytes(side.runtime["pid"]) >> 20 for key, side in sides.items()}
        dropped = sum(side.dropped() for side in sides.values())
    for key, side in sides.items():  # each runtime has ended, which moved its log into its database
        ended = count_ended(folder / f"{key}.db")
        if ended != side.sagas:
            faults.append(f"{key}: the store has {ended} ended sagas of {side.sagas}")
    return {
        "benchmark": "telemetry",
        "conditions": measured_under,
        "ways": {way.key: figures_of(pairs[way.key]) for way in ways},
        "spans": received["spans"],
        "span_bytes": received["bytes"],
        "dropped": dropped,
        "memory_mib": memory_mib,
        "faults": faults,
    }


@contextlib.contextmanager
def _sides(
    ways: Sequence[Way], folder: Path, seconds: float, concurrency: int, profile: Path | None
) -> Iterator[dict[str, Side]]:
    """A runtime for each way, warm, with participants and the collector; loads last `seconds`."""
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(process(folder, "sink", sink_command()))
        otlp = {False: sink["address"]}
        if any(way.hangs for way in ways):
            hung = stack.enter_context(process(folder, "hung sink", sink_command("--hangs")))
            otlp[True] = hung["address"]
        plain = stack.enter_context(process(folder, "participant", participant_command()))
        sides = {}
        for way in ways:
            worker = plain
            if way.participants:
                name = participant_service(way)
                command = participant_command(sink["address"], name)
                worker = stack.enter_context(process(folder, name, command))
            runtime = stack.enter_context(
                process(
                    folder,
                    way.key,
                    runtime_command(
                        folder / f"{way.key}.db",
                        worker["address"],
                        profile if way.key == "traces-100" else None,
                        *([] if way.ratio is None else ["--otlp", otlp[way.hangs]]),
                        *(["--metrics-listen", "127.0.0.1:0"] if way.metrics else []),
                    ),
                    {
                        "AMENDS_TELEMETRY__SERVICE_NAME": way.key,
                        "AMENDS_TELEMETRY__TRACES_RATIO": str(way.ratio or 0.0),
                    },
                )
            )
            store_id = asyncio.run(_prepared(runtime["address"]))
            tracing = Tracing(store_id, way.ratio or 0.0)
            sides[way.key] = Side(way, runtime, worker, sink["address"], tracing, concurrency)
        # Connections, imports and caches are warm before anything is timed.
        for side in sides.values() if seconds > WARM_S else ():
            side.load("warm", WARM_S)
        yield sides


async def _prepared(address: str) -> str:
    """Registers the saga there. Answers the store's id."""
    await register(address)
    async with amends.Client(address) as client:
        return (await client.runtime()).store_id


def _measure(
    sides: Mapping[str, Side], ways: Sequence[Way], rounds: int, seconds: float
) -> dict[str, list[tuple[Load, Load]]]:
    """All pairs of each way: the load without telemetry, and the one with."""
    pairs: dict[str, list[tuple[Load, Load]]] = {way.key: [] for way in ways}
    for number in range(rounds):
        for way in ways:
            order = ["without", way.key]
            if number % 2:
                order.reverse()
            done = {key: sides[key].load(f"{way.key}-{number}", seconds) for key in order}
            without, with_it = done["without"], done[way.key]
            pairs[way.key].append((without, with_it))
            print(
                f"  pair {number + 1}  {way.says:26} {rate(with_it):6.0f} of {rate(without):6.0f}"
                f" sagas/s, {rate(with_it) / rate(without):.2f}",
                flush=True,
            )
    return pairs


def _faults(sides: Sequence[Side]) -> list[str]:
    faults = [fault for side in sides for fault in (*side.span_faults(), *side.metric_faults())]
    expected: Counter[str] = Counter()
    for side in sides:
        expected[side.worker["address"]] += side.sagas * len(STEPS)
    for address, count in expected.items():
        told = asyncio.run(effects_at(address))
        if told != {"effects": count, "keys": count, "doubled": 0, "undone": 0}:
            faults.append(f"effects: {told} instead of {count}")
    return faults


def _logs(folder: Path) -> list[str]:
    """What the processes have written: nothing, if all went as it should."""
    return [
        f"{log.stem}: {line}"
        for log in sorted(folder.glob("*.log"))
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
    ]


# -- figures ---------------------------------------------------------------------------------------


def figures_of(pairs: Sequence[tuple[Load, Load]]) -> dict[str, Any]:
    """What a way's pairs come to. CPU is in microseconds for each saga, by medians of the pairs."""
    ratios = [rate(with_it) / rate(without) for without, with_it in pairs]
    sides = {"without": [one for one, _ in pairs], "with": [one for _, one in pairs]}
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_by_pair": [round(ratio, 3) for ratio in ratios],
        **{
            f"{side}_{name}": value
            for side, loads in sides.items()
            for name, value in {
                "sagas_per_s": round(statistics.median(map(rate, loads)), 1),
                "sagas": sum(load["sagas"] for load in loads),
                "latency_ms": percentiles([ms for load in loads for ms in load["latencies_ms"]]),
                "cpu_us": cpu_of(loads),
            }.items()
        },
        "runtime_cpu_us_more": _cpu_more(pairs, "runtime"),
        "loop_cpu_us_more": _cpu_more(pairs, "runtime: loop"),
        "drained_s_at_most": round(max(load["drained_s"] for load in sides["with"]), 2),
    }


def _cpu_more(pairs: Sequence[tuple[Load, Load]], name: str) -> int:
    more: list[float] = [
        with_it["cpu_us"][name] - without["cpu_us"][name] for without, with_it in pairs
    ]
    return round(statistics.median(more))


def noise_of(again: Mapping[str, Any]) -> float:
    """How far the ratio of two equal runtimes was from 1 at most."""
    return max(abs(1 - float(ratio)) for ratio in again["ratio_by_pair"])


def verdict(way: Way, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """How a way's ratio stands to its target."""
    ratio = figures[way.key]["ratio"]
    if way.target == "0.7":
        return f"at least {AT_LEAST}: {'met' if ratio >= AT_LEAST else 'MISSED'}"
    if way.target == "noise" and "again" in figures:
        is_within = 1 - ratio <= noise_of(figures["again"])
        return f"no measurable loss: {'within the noise' if is_within else 'MISSED'}"
    return ""


def _print_table(ways: Sequence[Way], figures: Mapping[str, Any], output: Path) -> None:
    found = figures["ways"]
    print(
        f"\n{'against no telemetry':28}{'ratio':>6}{'of pairs':>14}{'sagas/s':>9}"
        f"{'CPU µs a saga':>15}{'loop':>7}{'sending':>9}{'sent after':>12}"
    )
    for way in ways:
        one = found[way.key]
        used = one["with_cpu_us"]
        between = f"{min(one['ratio_by_pair']):.2f} - {max(one['ratio_by_pair']):.2f}"
        cpu = f"{used.get('runtime', 0)} ({one['runtime_cpu_us_more']:+})"
        print(
            f"{way.says:28}{one['ratio']:>6.2f}{between:>14}{one['with_sagas_per_s']:>9.0f}"
            f"{cpu:>15}{one['loop_cpu_us_more']:>+7}{sending(used):>9}"
            f"{one['drained_s_at_most']:>10} s  {verdict(way, found)}"
        )
    if "again" in found:
        noise = noise_of(found["again"])
        hint = "" if noise <= QUIET else ", too much to see what little costs: is the machine busy?"
        print(f"\nnoise: two equal runtimes differ by up to {noise:.0%}{hint}")
    spans = sum(sum(names.values()) for names in figures["spans"].values())
    if spans:
        collector = max(one["with_cpu_us"].get("sink", 0) for one in found.values())
        print(
            f"spans received: {spans}, {figures['span_bytes'] // spans} bytes each; dropped, as "
            f"the runtime counts: {figures['dropped']}; "
            f"the collector's CPU: {collector} µs a saga"
        )
    memory = ", ".join(f"{key} {mib}" for key, mib in figures["memory_mib"].items())
    print(f"memory of the runtimes at the end, MiB: {memory}")
    for fault in figures["faults"]:
        print(f"WRONG: {fault}")
    print(f"{'THE RUN FAILS' if figures['faults'] else 'exact'}; written to {output}")


def sending(cpu_us: Mapping[str, int]) -> int:
    """The CPU of the runtime's own threads, which make and send spans and serve metrics.

    gRPC's threads, of which some send spans, are in the whole process's alone.
    """
    return sum(us for name, us in cpu_us.items() if name.startswith(OUR_THREADS))
