"""A participant for the benchmarks, which knows of every saga how often each step took effect.

`bench_participant.py READY_FILE` is a process of its own, made with the SDK as anybody's would be.
Its actions:

    one, two, three, step    an effect, and 200 bytes as the result
    refuse                   is rejected
    held                     waits until the gate is open, then as the first ones
    later                    asks to be asked again in an hour
    report                   answers the count of all effects

Besides its port it has another one, for the benchmark itself: what is asked there takes no place
from calls. `lost` and `doubled` are faults to be planted: a benchmark must notice them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc
import grpc.aio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

import amends
import amends.server
from amends.servicer import ParticipantServicer
from scripts.bench_processes import PAYLOAD, STEPS, announce

ASK: Final = "/amends.bench.Participant/Ask"
PLANTS: Final = ("lost", "doubled")
PLANTED_AT: Final = 20
"""Which effect is lost or doubled: one that the shortest run still reaches."""

MOST_STEPS: Final = 27
COUNT_BITS: Final = 8
LATER_S: Final = 3600.0
BUCKETS_PER_S: Final = 10

UNIT: Final = {
    **{name: 1 << COUNT_BITS * place for place, name in enumerate(STEPS)},
    **{f"s{place}": 1 << COUNT_BITS * place for place in range(MOST_STEPS)},
}
"""What one effect of a step adds to its saga's count: each step has eight bits of the number.

One number a saga instead of a number a step keeps a million sagas in 150 MB.
"""

Counts = dict[str, dict[str, int]]


class Ledger:
    """Effects, and effects that were undone: one number for each saga, by its definition."""

    def __init__(self, plant: str = "") -> None:
        self._done: Counts = defaultdict(lambda: defaultdict(int))
        self._undone: Counts = defaultdict(lambda: defaultdict(int))
        self._plant_in = PLANTED_AT if plant else 0
        self._plant = plant

    def do(self, call: amends.Call) -> None:
        """Counts an effect."""
        times = 1
        if self._plant_in:
            self._plant_in -= 1
            if not self._plant_in:
                times = 0 if self._plant == "lost" else 2
        self._done[call.definition][call.saga_id] += times * UNIT[call.step]

    def undo(self, call: amends.Call) -> None:
        """Counts one that is undone."""
        self._undone[call.definition][call.saga_id] += UNIT[call.step]

    def report(self) -> dict[str, dict[str, dict[str, int]]]:
        """For each definition how many sagas have which effects, done and undone.

        The effects are written as the counts of the steps in their order: `1 1 1`.
        """
        return {
            "done": {name: _patterns(sagas) for name, sagas in self._done.items()},
            "undone": {name: _patterns(sagas) for name, sagas in self._undone.items()},
        }


def _patterns(sagas: Mapping[str, int]) -> dict[str, int]:
    return {_written(number): count for number, count in Counter(sagas.values()).items()}


def _written(number: int) -> str:
    counts = []
    while number:
        counts.append(str(number & (1 << COUNT_BITS) - 1))
        number >>= COUNT_BITS
    return " ".join(counts)


def totals(report: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, int]:
    """All effects of a report, those of a step of a saga (keys), and how many of these are wrong.

    `doubled` are the keys that have more than one effect, `undone` the effects that were undone.
    """

    def counts(kind: str) -> list[tuple[int, int]]:
        return [
            (int(count), sagas)
            for patterns in report[kind].values()
            for pattern, sagas in patterns.items()
            for count in pattern.split()
        ]

    done = counts("done")
    return {
        "effects": sum(count * sagas for count, sagas in done),
        "keys": sum(sagas for count, sagas in done if count),
        "doubled": sum(sagas for count, sagas in done if count > 1),
        "undone": sum(count * sagas for count, sagas in counts("undone")),
    }


class Pace:
    """When calls come: so many in each tenth of a second, and the first one of each saga."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forgets what it has seen."""
        self._calls: Counter[int] = Counter()
        self._seen: set[str] = set()
        self._first_at_s = self._last_new_at_s = 0.0

    def note(self, call: amends.Call) -> None:
        """Notes a call."""
        now_s = time.monotonic()
        self._calls[int(now_s * BUCKETS_PER_S)] += 1
        if call.saga_id not in self._seen:
            self._seen.add(call.saga_id)
            self._last_new_at_s = now_s
            self._first_at_s = self._first_at_s or now_s

    def report(self) -> dict[str, Any]:
        """What was noted; instants are those of the machine's monotonic clock."""
        first, last = min(self._calls, default=0), max(self._calls, default=-1)
        return {
            "calls": [self._calls[bucket] for bucket in range(first, last + 1)],
            "sagas": len(self._seen),
            "first_at_s": self._first_at_s,
            "last_new_at_s": self._last_new_at_s,
        }


class UnaryOnly(ParticipantServicer):
    """A participant that has the three verbs and nothing else, as one in any language may be."""

    async def Exchange(  # type: ignore[override]  # as in the SDK  # noqa: N802  # gRPC's name
        self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]
    ) -> NoReturn:
        """Refuses."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this participant has no Exchange")
        raise AssertionError("abort raises")


class Worker:
    """The participant: its ledger, its gate, and its pace if that is asked for."""

    def __init__(self, plant: str = "", *, paced: bool = False) -> None:
        self.ledger = Ledger(plant)
        self.pace = Pace() if paced else None
        self.gate = asyncio.Event()
        self.held = 0
        self.put_off = 0

    def participant(self) -> amends.Participant:
        """All actions."""
        bench = amends.Participant("bench", barrier=None)
        ledger = self.ledger

        async def act(call: amends.Call) -> bytes:
            ledger.do(call)
            return PAYLOAD

        async def act_paced(call: amends.Call) -> bytes:
            assert self.pace is not None
            self.pace.note(call)
            return await act(call)

        async def held(call: amends.Call) -> bytes:
            self.held += 1
            try:
                await self.gate.wait()
            finally:
                self.held -= 1
            return await (act if self.pace is None else act_paced)(call)

        async def undo(call: amends.Call) -> None:
            ledger.undo(call)

        async def refuse(_: amends.Call) -> bytes:
            raise amends.Rejected("refused", "this is what it is for")

        async def later(_: amends.Call) -> amends.InProgress:
            self.put_off += 1
            return amends.InProgress(after_s=LATER_S)

        async def report(_: amends.Call) -> dict[str, int]:
            return totals(ledger.report())

        plain = act if self.pace is None else act_paced
        for action in (*STEPS, "step"):
            bench.execute(action)(plain)
        handlers: dict[str, Callable[[amends.Call], Awaitable[object]]] = {
            "held": held,
            "refuse": refuse,
            "later": later,
        }
        for action, handler in handlers.items():
            bench.execute(action)(handler)
        for action in (*STEPS, "step", *handlers):
            bench.compensate(action)(undo)
        bench.execute("report", compensatable=False)(report)
        return bench

    async def answer(self, request: bytes, _context: object) -> bytes:
        """Does what the benchmark asks, and says how things stand."""
        asked = json.loads(request)
        if asked.get("gate") == "open":
            self.gate.set()
        elif asked.get("gate") == "closed":
            self.gate.clear()
        if self.pace is not None and asked.get("pace") == "anew":
            self.pace.begin()
        told: dict[str, Any] = {"held": self.held, "put_off": self.put_off}
        if asked.get("report"):
            told |= self.ledger.report()
        if self.pace is not None:
            told["pace"] = self.pace.report()
        return json.dumps(told).encode()


async def ask(worker: Mapping[str, Any], **asked: object) -> dict[str, Any]:
    """Asks a benchmark's participant: `gate` open or closed, `pace` anew, `report` True.

    Answers how many calls are `held` and were `put_off`, what was `done` and `undone`, and its
    `pace`.
    """
    async with grpc.aio.insecure_channel(worker["asked_at"]) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(ASK)
        answer = await call(json.dumps(asked).encode(), timeout=30)
    told: dict[str, Any] = json.loads(answer)
    return told


async def serve(ready_file: Path, worker: Worker) -> None:
    """Serves the participant, and the benchmark's own port, until it is ended."""
    own = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    service, method = ASK.removeprefix("/").split("/")
    # Without (de)serialisers a handler is given the bytes, and gives bytes.
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        method: grpc.unary_unary_rpc_method_handler(worker.answer)
    }
    own.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    asked_at = f"127.0.0.1:{own.add_insecure_port('127.0.0.1:0')}"
    await own.start()
    async with amends.serve(worker.participant(), listen="127.0.0.1:0") as server:
        announce(ready_file, server.address, asked_at=asked_at)
        await server.wait_closed()


def set_up_tracing(otlp: str, service: str) -> None:
    """Sets up OpenTelemetry as an author would, with a queue that no load of ours fills."""
    from opentelemetry import trace  # noqa: PLC0415  # only who traces has these in memory
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415  # as above
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415  # as above
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415  # as above
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415  # as above

    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    exporter = OTLPSpanExporter(endpoint=f"http://{otlp}", insecure=True)
    provider.add_span_processor(
        BatchSpanProcessor(exporter, max_queue_size=2**18, schedule_delay_millis=500)
    )
    trace.set_tracer_provider(provider)


def main() -> None:
    """Serves as its arguments say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--otlp", default="", help="the address of a collector for its own spans")
    parser.add_argument("--service", default="", help="what it is called in them")
    parser.add_argument("--unary", action="store_true", help="only the three verbs")
    parser.add_argument("--paced", action="store_true", help="note when calls come")
    parser.add_argument("--plant", choices=PLANTS, default="", help="a fault to be noticed")
    parser.add_argument("ready_file", type=Path)
    options = parser.parse_args()
    if options.otlp:
        set_up_tracing(options.otlp, options.service)
    if options.unary:
        # The SDK gives every participant the stream, and has no switch that only we would need.
        setattr(amends.server, ParticipantServicer.__name__, UnaryOnly)

    async def serving() -> None:
        await serve(options.ready_file, Worker(options.plant, paced=options.paced))

    asyncio.run(serving())


if __name__ == "__main__":
    main()
