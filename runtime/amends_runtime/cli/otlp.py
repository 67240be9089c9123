"""Traces as OTLP: their JSON form on standard output, or their bytes to a collector.

The bytes of a trace are what the runtime made; they are taken apart only to bring many spans into
messages that a collector takes. OTLP's JSON is that of Protocol Buffers with two differences: ids
are hex digits, and enums are numbers.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Iterator
from typing import Any, Final

import anyio.to_thread
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from amends.sagas import Trace
from amends_runtime.cli.documents import print_document, print_each
from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.core.addresses import check_collector
from amends_runtime.errors import ConfigurationError
from amends_runtime.telemetry.collector import Refused, way_to
from amends_runtime.telemetry.otel_variables import (
    Destination,
    Protocol,
    Variables,
    find_destination,
)

__all__ = ["destination", "print_traces", "send", "traces_data"]

PORTS: Final = {"grpc": 4317, "http/protobuf": 4318}
MESSAGE_SPANS: Final = 512  # as many as OpenTelemetry's exporters send at once
MESSAGE_BYTES: Final = 2 * 1024 * 1024  # collectors take 4 MiB over gRPC by default
MAX_SHOWN: Final = 200  # characters of what a collector said


def traces_data(trace: Trace) -> TracesData:
    """The message whose bytes a trace carries."""
    return TracesData.FromString(trace.traces_data)


# -- JSON ------------------------------------------------------------------------------------------


def print_traces(traces: Iterable[Trace], output: str) -> None:
    """Prints one document for all of them, or with ``jsonl`` one each."""
    if output == "jsonl":
        for trace in traces:
            print_each(_document(traces_data(trace)))
        return
    together = TracesData()
    for trace in traces:
        together.MergeFromString(trace.traces_data)
    print_document(_document(together), "json" if output == "json" else "jsonl")


def _document(message: TracesData) -> dict[str, Any]:
    document: dict[str, Any] = json_format.MessageToDict(message, use_integers_for_enums=True)
    document.setdefault("resourceSpans", [])
    for of_resource in document["resourceSpans"]:
        for of_scope in of_resource.get("scopeSpans", []):
            for span in of_scope.get("spans", []):
                for holder in (span, *span.get("links", [])):
                    for key in ("traceId", "spanId", "parentSpanId"):
                        if key in holder:
                            holder[key] = base64.b64decode(holder[key]).hex()
    return document


# -- where to --------------------------------------------------------------------------------------


def destination(to: str, protocol: Protocol | None) -> Destination:
    """The collector that ``--to`` names, reached as OpenTelemetry's variables say.

    Ends the command if it cannot be one, or if a variable says nonsense.
    """
    try:
        check_collector(to)
    except ValueError as wrong:
        raise Exit(ExitCode.USAGE, f"--to: {wrong}") from None
    # Not the variables that say whether and where a runtime exports: here somebody asks by hand.
    names = (name for name in os.environ if name.startswith("OTEL_EXPORTER_OTLP_"))
    variables = Variables(
        {name: os.environ[name] for name in names if not name.endswith("_ENDPOINT")}
    )
    found = find_destination(variables, "traces", endpoint=to, protocol=protocol)
    try:
        variables.check()
    except ConfigurationError as wrong:
        raise Exit(
            ExitCode.USAGE,
            *(line.replace("the OTLP endpoint:", "--to:") for line in str(wrong).splitlines()),
        ) from None
    assert found is not None, "an endpoint is given, and nothing is wrong with it"
    return found


# -- sending ---------------------------------------------------------------------------------------


async def send(where: Destination, traces: Iterable[Trace]) -> None:
    """Sends all spans, in messages that a collector takes. Ends the command if one is refused."""
    way = way_to(where)
    try:
        for body in _messages(traces):
            # Who interrupts it does not wait for a call by gRPC: closing breaks that off.
            answer = await anyio.to_thread.run_sync(way.send, body, abandon_on_cancel=True)
            if isinstance(answer, Refused):
                raise _refused(where, answer.why)
            if answer.rejected:
                raise _refused(where, f"it refused {answer.rejected} spans: {answer.why}")
    finally:
        way.close()


def _messages(traces: Iterable[Trace]) -> Iterator[bytes]:
    message, spans, room = ExportTraceServiceRequest(), 0, MESSAGE_BYTES
    for trace in traces:
        for of_resource in traces_data(trace).resource_spans:
            for of_scope in of_resource.scope_spans:
                target = None
                for span in of_scope.spans:
                    size = span.ByteSize()
                    if spans and (spans >= MESSAGE_SPANS or size > room):
                        yield message.SerializeToString()
                        message, spans, room = ExportTraceServiceRequest(), 0, MESSAGE_BYTES
                        target = None
                    if target is None:
                        outer = message.resource_spans.add(
                            resource=of_resource.resource, schema_url=of_resource.schema_url
                        )
                        target = outer.scope_spans.add(
                            scope=of_scope.scope, schema_url=of_scope.schema_url
                        )
                    target.spans.append(span)
                    spans, room = spans + 1, room - size
    if spans:
        yield message.SerializeToString()


def _refused(where: Destination, what: str) -> Exit:
    what = what.strip().rstrip(".")
    what = what if len(what) <= MAX_SHOWN else what[: MAX_SHOWN - 1] + "…"
    other = "http/protobuf" if where.protocol == "grpc" else "grpc"
    return Exit(
        ExitCode.UNAVAILABLE,
        f"the collector at {where} does not take the traces ({what}); is it there, and does "
        f"it speak {where.protocol}? --protocol {other} is the other way, at port {PORTS[other]}",
    )
