"""A real receiver of OTLP, over gRPC and over HTTP, that keeps what it gets and can misbehave.

Inside a test:

    async with receiving() as receiver:  # both ports are free ones
        ...  # send to receiver.grpc_address or receiver.http_url
        await receiver.wait_until(lambda: len(receiver.received.spans(trace_id)) == 5)
        receiver.behave(Behaviour.HANG)  # takes calls and never answers
        await receiver.stop()  # connections are refused from here on
        await receiver.start()  # back on the same ports

As a program of its own, for a test that kills it, or that a collector's CPU must not touch:

    python tests/telemetry/otlp_receiver.py --ready-file PATH --keep FILE [--behave hang]

writes {"pid", "grpc", "http"} to PATH when it listens and each request to FILE before answering it,
which `read_kept(FILE)` reads; it ends when its standard input does.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import enum
import gzip
import json
import os
import ssl
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import CancelledError as FutureCancelled
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
import grpc.aio
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span

SERVICES: Final = {
    "/opentelemetry.proto.collector.trace.v1.TraceService/Export": "traces",
    "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export": "metrics",
}
PATIENCE_S: Final = 60.0
"""Bounds a broken test; no test waits for it."""

PATHS: Final = {"/v1/traces": "traces", "/v1/metrics": "metrics"}
ANSWERS: Final = {
    "traces": ExportTraceServiceResponse().SerializeToString(),
    "metrics": ExportMetricsServiceResponse().SerializeToString(),
}


class Behaviour(enum.Enum):
    """What happens to a request that has arrived."""

    ANSWER = "answer"
    SLOW = "slow"
    """Kept, and answered after `Receiver.delay_s`."""
    HANG = "hang"
    """Not kept, and not answered before the behaviour changes or the receiver stops."""
    REFUSE = "refuse"
    """Not kept: UNAVAILABLE, or 503."""


# -- what was received -----------------------------------------------------------------------------


class Request(NamedTuple):
    """One request: `signal` is traces or metrics, `transport` grpc or http, names in lower case."""

    signal: str
    transport: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class ReceivedSpan:
    """A span, and whose it is. Ids are lower-case hex digits."""

    proto: Span
    resource: Mapping[str, Any]
    scope: str

    @property
    def service(self) -> str:
        """The name of the service that sent it, or empty."""
        return str(self.resource.get("service.name", ""))

    @property
    def name(self) -> str:
        """What the span is called."""
        return self.proto.name

    @property
    def trace_id(self) -> str:
        """Its trace."""
        return self.proto.trace_id.hex()

    @property
    def span_id(self) -> str:
        """Its id."""
        return self.proto.span_id.hex()

    @property
    def parent_id(self) -> str:
        """Its parent's id, empty for a root."""
        return self.proto.parent_span_id.hex()

    @property
    def attributes(self) -> dict[str, Any]:
        """Its attributes as plain values."""
        return plain(self.proto.attributes)


@dataclass(frozen=True)
class ReceivedMetric:
    """A metric, and whose it is."""

    proto: Metric
    resource: Mapping[str, Any]
    scope: str


@dataclass
class Received:
    """All requests that were answered well, in the order in which they came."""

    requests: list[Request] = field(default_factory=list)
    _spans: list[ReceivedSpan] = field(default_factory=list)
    _metrics: list[ReceivedMetric] = field(default_factory=list)

    def add(self, request: Request) -> None:
        """Keep a request. Raises DecodeError for one that is none."""
        if request.signal == "traces":
            for traces in ExportTraceServiceRequest.FromString(request.body).resource_spans:
                resource = plain(traces.resource.attributes)
                self._spans += (
                    ReceivedSpan(span, resource, scoped.scope.name)
                    for scoped in traces.scope_spans
                    for span in scoped.spans
                )
        else:
            for metrics in ExportMetricsServiceRequest.FromString(request.body).resource_metrics:
                resource = plain(metrics.resource.attributes)
                self._metrics += (
                    ReceivedMetric(metric, resource, measured.scope.name)
                    for measured in metrics.scope_metrics
                    for metric in measured.metrics
                )
        self.requests.append(request)

    def spans(self, trace_id: str | None = None) -> list[ReceivedSpan]:
        """All spans, or those of a trace; one that was sent twice is here twice."""
        if trace_id is None:
            return list(self._spans)
        wanted = bytes.fromhex(trace_id)  # the proto's own form: thousands are looked through
        return [span for span in self._spans if span.proto.trace_id == wanted]

    def metrics(self, name: str | None = None) -> list[ReceivedMetric]:
        """All metrics, or those of a name; one for each time that it was sent."""
        return [metric for metric in self._metrics if name in {None, metric.proto.name}]

    def trace_ids(self) -> list[str]:
        """Each trace once, in the order of their first spans."""
        return list(dict.fromkeys(span.trace_id for span in self._spans))

    @property
    def raw(self) -> bytes:
        """Every byte of every request, for searching."""
        return b"".join(request.body for request in self.requests)


def plain(attributes: object) -> dict[str, Any]:
    """Give a protobuf list of attributes as a dict of Python values."""
    found: list[KeyValue] = list(attributes)  # type: ignore[call-overload]
    return {one.key: _value(one.value) for one in found}


def _value(value: AnyValue) -> object:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    if kind == "kvlist_value":
        return plain(value.kvlist_value.values)
    return getattr(value, kind)


# -- the receiver ----------------------------------------------------------------------------------


class Receiver:
    """A receiver. Everything but HTTP's own threads runs on the loop that has started it.

    `tls` is a private key and a certificate, PEM; with it both ports speak TLS alone.
    """

    def __init__(
        self,
        *,
        grpc_port: int = 0,
        http_port: int = 0,
        tls: tuple[Path, Path] | None = None,
        keep: Path | None = None,
    ) -> None:
        self.received = Received()
        self.arrived = 0
        """How many requests have arrived, whatever became of them."""
        self.delay_s = 0.2
        self._behaviour = Behaviour.ANSWER
        self._ports = [grpc_port, http_port]
        self._tls = tls
        self._keep = keep
        self._changed = asyncio.Event()
        self._grpc: grpc.aio.Server | None = None
        self._http: _HttpServer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._held: set[asyncio.Task[bytes | None]] = set()

    @property
    def grpc_address(self) -> str:
        """Give host:port for OTLP over gRPC."""
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def http_url(self) -> str:
        """Give the base URL for OTLP over HTTP, without a signal's path."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._ports[1]}"

    def behave(self, behaviour: Behaviour) -> None:
        """Treat all requests like this from now on, those that hang now too."""
        self._behaviour = behaviour
        self._tell()

    def spans(self, trace_id: str | None = None) -> list[ReceivedSpan]:
        """All spans so far, or those of a trace."""
        return self.received.spans(trace_id)

    async def wait_until(self, predicate: Callable[[], bool]) -> None:
        """Wait until it holds; looked at whenever a request arrives, is kept, or hangs no more.

        Raises AssertionError with what there is after `PATIENCE_S`.
        """
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not predicate():
                    await self._changed.wait()
        except TimeoutError:
            names = [span.name for span in self.spans()]
            raise AssertionError(
                f"waited {PATIENCE_S:g} s; {self.arrived} requests arrived; kept spans: {names}"
            ) from None

    # -- coming and going ------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen; on the same ports as before, if there was a before."""
        self._loop = asyncio.get_running_loop()
        self._grpc = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        self._grpc.add_generic_rpc_handlers((_AnyExport(self),))
        address = f"127.0.0.1:{self._ports[0]}"
        if self._tls is None:
            self._ports[0] = self._grpc.add_insecure_port(address)
        else:
            key, certificate = self._tls
            self._ports[0] = self._grpc.add_secure_port(
                address,
                grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())]),
            )
        await self._grpc.start()
        self._http = _HttpServer(("127.0.0.1", self._ports[1]), self)
        if self._tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._tls[1], self._tls[0])
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self._ports[1] = int(self._http.server_address[1])
        threading.Thread(target=self._http.serve_forever, name="otlp-receiver", daemon=True).start()

    async def stop(self) -> None:
        """Listen no more. Requests that are under way break off."""
        for task in self._held:
            task.cancel()
        if self._http is not None:
            server, self._http = self._http, None
            await asyncio.to_thread(server.end)
        if self._grpc is not None:
            await self._grpc.stop(None)
            self._grpc = None

    # -- one request -----------------------------------------------------------------------------

    async def take(self, request: Request) -> bytes | None:
        """Treat a request as the behaviour says; None: it is refused."""
        self.arrived += 1
        self._tell()
        task = asyncio.current_task()
        assert task is not None
        self._held.add(task)
        try:
            while self._behaviour is Behaviour.HANG:
                await self._changed.wait()
            if self._behaviour is Behaviour.REFUSE:
                return None
            if self._behaviour is Behaviour.SLOW:
                await asyncio.sleep(self.delay_s)
        finally:
            self._held.discard(task)
        self.received.add(request)
        if self._keep is not None:
            _write_kept(self._keep, request)
        self._tell()
        return ANSWERS[request.signal]

    def take_from_thread(self, request: Request) -> bytes | None:
        """`take` for HTTP's threads. Raises concurrent.futures.CancelledError at a stop."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(self.take(request), self._loop).result()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class _AnyExport(grpc.GenericRpcHandler):
    """Export of every signal, with the bytes as they came over the wire."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """Give the handler of a method, if it is one that OTLP has."""
        signal = SERVICES.get(handler_call_details.method)
        if signal is None:
            return None

        async def export(body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            headers = {
                key: value if isinstance(value, str) else value.decode("latin-1")
                for key, value in context.invocation_metadata() or ()
            }
            answer = await self._receiver.take(Request(signal, "grpc", headers, body))
            if answer is None:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "refused")
            return answer

        return grpc.unary_unary_rpc_method_handler(export)


class _HttpServer(ThreadingHTTPServer):
    """OTLP over HTTP, a thread for each connection."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], receiver: Receiver) -> None:
        self.receiver = receiver
        self._connections: set[Any] = set()
        super().__init__(address, _HttpHandler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection, so that a stop ends it as a process's death would."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection that has ended by itself."""
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a sender that is gone is what tests are about."""

    def end(self) -> None:
        """Close the port and all connections."""
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            super().shutdown_request(connection)


class _HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps the connection, as senders expect

    def do_POST(self) -> None:
        """Take an Export."""
        assert isinstance(self.server, _HttpServer)
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        signal = PATHS.get(self.path)
        if signal is None:
            self._answer(404, b"")
            return
        headers = {key.lower(): value for key, value in self.headers.items()}
        encoding = headers.get("content-encoding")
        if encoding == "gzip":
            body = gzip.decompress(body)
        elif encoding == "deflate":
            body = zlib.decompress(body)
        try:
            answer = self.server.receiver.take_from_thread(Request(signal, "http", headers, body))
        except FutureCancelled:
            self.close_connection = True
            return
        self._answer(503 if answer is None else 200, answer or b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@asynccontextmanager
async def receiving(
    *, grpc_port: int = 0, http_port: int = 0, tls: tuple[Path, Path] | None = None
) -> AsyncIterator[Receiver]:
    """Run a receiver for the length of the block."""
    receiver = Receiver(grpc_port=grpc_port, http_port=http_port, tls=tls)
    await receiver.start()
    try:
        yield receiver
    finally:
        await receiver.stop()


# -- as a program ----------------------------------------------------------------------------------


def _write_kept(file: Path, request: Request) -> None:
    line = {
        "signal": request.signal,
        "transport": request.transport,
        "headers": dict(request.headers),
        "body": base64.b64encode(request.body).decode(),
    }
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")


def read_kept(file: Path) -> Received:
    """Read what a receiver in a process of its own has kept; empty if it has not kept anything."""
    received = Received()
    with contextlib.suppress(FileNotFoundError):
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):  # the last one may be being written
                kept = json.loads(line)
                received.add(
                    Request(
                        kept["signal"],
                        kept["transport"],
                        kept["headers"],
                        base64.b64decode(kept["body"]),
                    )
                )
    return received


async def _serve(arguments: argparse.Namespace) -> None:
    receiver = Receiver(
        grpc_port=arguments.grpc_port, http_port=arguments.http_port, keep=arguments.keep
    )
    receiver.behave(Behaviour(arguments.behave))
    await receiver.start()
    ready: Path = arguments.ready_file
    written = ready.with_suffix(".part")
    written.write_text(
        json.dumps({"pid": os.getpid(), "grpc": receiver.grpc_address, "http": receiver.http_url}),
        encoding="utf-8",
    )
    written.replace(ready)
    await asyncio.to_thread(sys.stdin.read)
    await receiver.stop()


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description="keep what is sent by OTLP")
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--keep", type=Path, help="the file of what was received, a line each")
    parser.add_argument("--grpc-port", type=int, default=0)
    parser.add_argument("--http-port", type=int, default=0)
    parser.add_argument("--behave", choices=[one.value for one in Behaviour], default="answer")
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
