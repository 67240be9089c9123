"""A collector that costs nearly nothing: it takes spans, answers, and counts when it is asked.

What the benchmark measures is the runtime that sends. So nothing is parsed while a load runs; what
has arrived is kept as it came, and `Report` reads it, counts it and lets it go. The CPU that this
process has used besides that is told with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

from scripts.bench_processes import announce

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
REPORT = "/amends.bench.Sink/Report"


class Sink:
    """What has arrived, by the names of the services that sent it."""

    def __init__(self) -> None:
        self._unread: list[bytes] = []
        self._bytes = 0
        self._names: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._ids: defaultdict[str, set[bytes]] = defaultdict(set)
        self._counting_s = 0.0

    def take(self, request: bytes) -> bytes:
        """Keeps an export, and answers that all of it was taken (an empty message)."""
        self._unread.append(request)
        self._bytes += len(request)
        return b""

    def report(self) -> dict[str, Any]:
        """Per service: spans by name, and how many have an id that no other had. CPU and bytes."""
        began = time.process_time()
        while self._unread:
            self._count(ExportTraceServiceRequest.FromString(self._unread.pop()))
        self._counting_s += time.process_time() - began
        return {
            "spans": self._names,
            "distinct": {service: len(ids) for service, ids in self._ids.items()},
            "bytes": self._bytes,
            "cpu_s": time.process_time() - self._counting_s,
        }

    def _count(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            service = next(
                one.value.string_value
                for one in resource.resource.attributes
                if one.key == "service.name"
            )
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self._names[service][span.name] += 1
                    self._ids[service].add(span.trace_id + span.span_id)


async def sink(ready_file: Path, *, hangs: bool = False) -> None:
    """Serves until the process is ended. One that `hangs` takes exports and never answers."""
    kept = Sink()

    async def export(request: bytes, _: object) -> bytes:
        if hangs:
            await asyncio.Event().wait()
        return kept.take(request)

    async def report(_: bytes, __: object) -> bytes:
        return json.dumps(kept.report()).encode()

    server = grpc.aio.server(
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
    )
    # Without (de)serialisers a handler is given the bytes, and gives bytes.
    for path, handler in ((EXPORT, export), (REPORT, report)):
        service, method = path[1:].split("/")
        server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    service, {method: grpc.unary_unary_rpc_method_handler(handler)}
                )
            ]
        )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    announce(ready_file, f"127.0.0.1:{port}")
    await server.wait_for_termination()


async def read_sink(address: str) -> dict[str, Any]:
    """Asks the sink there for its report."""
    async with grpc.aio.insecure_channel(address) as channel:
        ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(REPORT)
        answer = await ask(b"", timeout=60)
    told: dict[str, Any] = json.loads(answer)
    return told


def main() -> None:
    """Serves as its arguments say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hangs", action="store_true", help="take exports and never answer")
    parser.add_argument("ready_file", type=Path)
    options = parser.parse_args()
    asyncio.run(sink(options.ready_file, hangs=options.hangs))


if __name__ == "__main__":
    main()
