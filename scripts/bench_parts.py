"""`make bench ARGS=--parts`: what the parts of telemetry cost, each by itself, in one process.

`--telemetry` measures whole runtimes and says what is left of their throughput; this says where the
time goes, and what the same would cost by OpenTelemetry's own means. The work is a saga of three
steps: its turns as the observers are told of them, its seven spans. CPU time of this thread, the
median of `ROUNDS` rounds in which all parts take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

import anyio
import msgspec
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from amends_runtime.core.definition import Definition, Plan, Step
from amends_runtime.core.effects import CallParticipant
from amends_runtime.core.messages import Answered, Done, Message, StartSaga
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Record, SagaStarted
from amends_runtime.core.saga import Saga, decide
from amends_runtime.core.tracing import Tracing
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from amends_runtime.telemetry.collector import Answer, Taken
from amends_runtime.telemetry.encoding import Frame, sender_attributes
from amends_runtime.telemetry.meters import Counter, Histogram
from amends_runtime.telemetry.metrics import ATTEMPT_DURATION, Metrics
from amends_runtime.telemetry.projection import project
from amends_runtime.telemetry.spans import Span
from amends_runtime.telemetry.traces import Traces
from scripts.bench_processes import write_figures
from tests.telemetry.by_library import encoded_by_library

ROUNDS: Final = 7
SAGAS: Final = 1_000  # as many in each round: some tenth of a second for the dearest part
RECORDS: Final = 20_000
LABELS: Final = ("payments", "execute", "done")
AT_MS: Final = 1_800_000_000_000


class Turn(NamedTuple):
    """What an observer is told of a turn."""

    before: Saga | None
    saga: Saga
    records: tuple[Record, ...]


class Part(NamedTuple):
    """Something to measure: `work` does it `times` times."""

    name: str
    unit: str
    times: int
    work: Callable[[], object]


Measured = Sequence[tuple[Part, list[float]]]
"""What each part took, in µs, for each round."""


def measured(parts: Sequence[Part], rounds: int) -> Measured:
    """Lets all parts take turns, so many times."""
    found: Measured = [(part, []) for part in parts]
    for _ in range(rounds):
        for part, times_us in found:
            began_s = time.thread_time()
            part.work()
            times_us.append((time.thread_time() - began_s) / part.times * 1e6)
    return found


def print_parts(found: Measured) -> list[dict[str, Any]]:
    """Prints a table, and answers it for a file. An indented part belongs to the one above it."""
    print(f"{'':34}{'median':>10}{'least':>10}{'most':>10}")
    rows = []
    above = ""
    for part, times_us in found:
        figures = (statistics.median(times_us), min(times_us), max(times_us))
        print(f"{part.name:34}{''.join(f'{one:>10.2f}' for one in figures)}  {part.unit}")
        is_below = part.name.startswith(" ")
        above = above if is_below else part.name
        name = f"{above}: {part.name.strip()}" if is_below else part.name
        rows.append({"part": name, "unit": part.unit, "us": [round(one, 3) for one in times_us]})
    return rows


class Nowhere:
    """A collector that takes everything at once."""

    def send(self, spans: Sequence[Span]) -> Answer:
        """Takes them."""
        return Taken()

    def close(self) -> None:
        """Nothing is held."""


PLAN: Final = Plan(
    Definition(
        name="bench",
        steps=tuple(Step(name=name, participant="payments", action="act") for name in "abc"),
    )
)


def turns_of(saga_id: str) -> list[Turn]:
    """The turns of a saga of three steps that completes, as the core decides them."""
    turns: list[Turn] = []
    saga: Saga | None = None
    message: Message = StartSaga(saga_id=saga_id, content_hash="c", input=Payload(b"x" * 200))
    now_ms = AT_MS
    while True:
        decision = decide(PLAN, saga, message, now_ms, 1)
        turns.append(Turn(saga, decision.saga, decision.records))
        saga = decision.saga
        if saga.ended:
            return turns
        (effect,) = decision.effects
        assert isinstance(effect, CallParticipant), "each turn but the last asks for one call"
        now_ms += 2
        message = Answered(
            step=effect.step,
            verb=effect.verb,
            round=effect.round,
            attempt=effect.attempt,
            sent_at_ms=now_ms - 1,
            answered_at_ms=now_ms,
            status="OK",
            polls=0,
            outcome=Done(Payload(b"y" * 200)),
        )


def renamed(turns: Sequence[Turn], saga_id: str) -> list[Turn]:
    """The same turns of another saga."""
    replace = msgspec.structs.replace
    return [
        Turn(
            before and replace(before, saga_id=saga_id),
            replace(saga, saga_id=saga_id),
            tuple(
                replace(one, saga_id=saga_id) if isinstance(one, SagaStarted) else one
                for one in records
            ),
        )
        for before, saga, records in turns
    ]


def parts() -> list[Part]:
    """Everything that is measured."""
    pattern = turns_of("bench")
    sagas = [renamed(pattern, f"bench-{number}") for number in range(SAGAS)]
    histories = [[record for turn in saga for record in turn.records] for saga in sagas]
    tracing = Tracing("store")
    spans = [project(tracing, PLAN, history) for history in histories]
    sender = sender_attributes("store", {})
    frame = Frame(sender)

    def told(observer: Metrics | Traces) -> None:
        for saga in sagas:
            for before, after, records in saga:
                observer.turn_committed(PLAN, before, after, records)

    def traced(ratio: float) -> Callable[[], object]:
        store = MemoryStore(MemoryDisk())
        traces = Traces(Tracing("store", ratio=ratio), store, Nowhere(), where="nowhere")
        return lambda: told(traces)

    def repeated(one: Callable[[], object]) -> Callable[[], object]:
        def work() -> None:
            for _ in range(RECORDS):
                one()

        return work

    metrics = Metrics()
    counter, histogram = Counter(len(LABELS)), Histogram(ATTEMPT_DURATION.bounds, len(LABELS))
    meter = MeterProvider([InMemoryMetricReader()]).get_meter("bench")
    theirs, theirs_too = meter.create_counter("count"), meter.create_histogram("duration")
    attributes = dict(zip(ATTEMPT_DURATION.labels, LABELS, strict=True))
    per_saga, per_record = ("µs a saga", SAGAS), ("µs a record", RECORDS)
    return [
        Part("a counter", *per_record, repeated(lambda: counter.add(LABELS))),
        Part("  OpenTelemetry's", *per_record, repeated(lambda: theirs.add(1, attributes))),
        Part("a histogram", *per_record, repeated(lambda: histogram.record(0.01, LABELS))),
        Part("  OpenTelemetry's", *per_record, repeated(lambda: theirs_too.record(1, attributes))),
        Part("metrics, told of all turns", *per_saga, lambda: told(metrics)),
        Part("traces, no saga sampled", *per_saga, traced(0.0)),
        Part("traces, 1 % sampled", *per_saga, traced(0.01)),
        Part("traces, all sampled (loop)", *per_saga, traced(1.0)),
        Part(
            "spans of a history",
            *per_saga,
            lambda: [project(tracing, PLAN, history) for history in histories],
        ),
        Part("  encoded", *per_saga, lambda: [frame.encode(each) for each in spans]),
        Part(
            "  encoded by OpenTelemetry",
            *per_saga,
            lambda: [encoded_by_library(each, sender).SerializeToString() for each in spans],
        ),
    ]


async def measure(rounds: int = ROUNDS) -> Measured:
    """Measures all parts; an observer is made where a loop runs, hence async."""
    return measured(parts(), rounds)


def run(output: Path, rounds: int = ROUNDS) -> int:
    """Measures, prints a table, writes `output`."""
    print(f"what the parts of telemetry cost; CPU of one thread, {rounds} rounds\n")
    rows = print_parts(anyio.run(measure, rounds))
    versions = {name: version(name) for name in ("amends", "opentelemetry-sdk")}
    write_figures(output, {"parts": rows, "rounds": rounds, "versions": versions})
    print(f"\nwritten to {output}")
    return 0
