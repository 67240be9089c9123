"""Traces as OTLP: their JSON form on standard output, or their bytes to a collector.

The bytes of a trace are what the runtime made; they are taken apart only to bring many spans into
messages that a collector takes. OTLP's JSON is that of Protocol Buffers with two differences: ids
are hex digits, and enums are numbers.
"""

from __future__ import annotations

import base64
import os
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from typing import Any, Final, TypeAlias

import anyio.to_thread
import grpc
import grpc.aio
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from amends.sagas import Trace
from amends_runtime.cli.documents import print_document, print_each
from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.errors import ConfigurationError
from amends_runtime.telemetry.otel_variables import (
    Destination,
    Protocol,
    Variables,
    find_destination,
)
from amends_runtime.telemetry.otlp import grpc_credentials

__all__ = ["destination", "print_traces", "send", "traces_data"]

EXPORT: Final = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
PORTS: Final = {"grpc": 4317, "http/protobuf": 4318}
Export: TypeAlias = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
MESSAGE_SPANS: Final = 512  # as many as OpenTelemetry's exporters send at once
MESSAGE_BYTES: Final = 2 * 1024 * 1024  # collectors take 4 MiB over gRPC by default
MAX_ANSWER_BYTES: Final = 64 * 1024
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
            *(
                line.replace("the OTLP endpoint:", f"--to {to}:")
                for line in str(wrong).splitlines()
            ),
        ) from None
    assert found is not None, "an endpoint is given, and nothing is wrong with it"
    if "@" in urllib.parse.urlsplit(found.endpoint).netloc:
        raise Exit(
            ExitCode.USAGE,
            "--to: takes no user or password: give them in OTEL_EXPORTER_OTLP_HEADERS",
        )
    return found


# -- sending ---------------------------------------------------------------------------------------


async def send(where: Destination, traces: Iterable[Trace]) -> None:
    """Sends all spans, in messages that a collector takes. Ends the command if one is refused."""
    messages = _messages(traces)
    if where.protocol == "grpc":
        await _send_grpc(where, messages)
        return
    for body in messages:
        await anyio.to_thread.run_sync(_post, where, body)


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


async def _send_grpc(where: Destination, messages: Iterator[bytes]) -> None:
    target = urllib.parse.urlsplit(where.endpoint).netloc
    credentials = grpc_credentials(where)
    channel = (
        grpc.aio.insecure_channel(target)
        if credentials is None
        else grpc.aio.secure_channel(target, credentials)
    )
    headers = list(where.headers.items())
    async with channel:
        export: Export = channel.unary_unary(EXPORT)  # bytes out, bytes in
        for body in messages:
            try:
                answer = await export(body, metadata=headers, timeout=where.timeout_s)
            except grpc.aio.AioRpcError as error:
                raise _refused(where, f"{error.code().name}: {error.details()}") from None
            _check_answer(where, answer)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A POST that is redirected would arrive as a GET without its spans."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


def _post(where: Destination, body: bytes) -> None:
    request = urllib.request.Request(  # noqa: S310  # a destination is http or https
        where.endpoint,
        data=body,
        headers={**where.headers, "Content-Type": "application/x-protobuf"},
        method="POST",
    )
    try:
        with _opener(where).open(request, timeout=where.timeout_s) as response:
            answer = response.read(MAX_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        error.close()
        raise _refused(where, f"HTTP {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        why = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise _refused(where, why) from None
    _check_answer(where, answer)


def _opener(where: Destination) -> urllib.request.OpenerDirector:
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if where.is_secure:
        context = ssl.create_default_context(cafile=where.certificate or None)
        if where.client_certificate:
            context.load_cert_chain(where.client_certificate, where.client_key)
        handlers.append(urllib.request.HTTPSHandler(context=context))
    return urllib.request.build_opener(*handlers)


def _check_answer(where: Destination, answer: bytes) -> None:
    try:
        partial = ExportTraceServiceResponse.FromString(answer).partial_success
    except DecodeError:
        raise _refused(where, "its answer is not OTLP") from None
    if partial.rejected_spans:
        what = f"it refused {partial.rejected_spans} spans: {partial.error_message}"
        raise _refused(where, what)


def _refused(where: Destination, what: str) -> Exit:
    what = what.strip().rstrip(".")
    what = what if len(what) <= MAX_SHOWN else what[: MAX_SHOWN - 1] + "…"
    other = "http/protobuf" if where.protocol == "grpc" else "grpc"
    return Exit(
        ExitCode.UNAVAILABLE,
        f"the collector at {where} does not take the traces ({what}); is it there, and does "
        f"it speak {where.protocol}? --protocol {other} is the other way, at port {PORTS[other]}",
    )
