"""What a collector's answers mean for whoever sends: taken, refused for now, refused for good."""

from __future__ import annotations

import contextlib
import gzip
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from time import time
from typing import Any, Final
from wsgiref.handlers import format_date_time

import anyio
import anyio.to_thread
import grpc
import grpc.aio
import msgspec
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

from amends_runtime.telemetry.collector import EXPORT, MAX_REASON, Answer, Refused, Taken, way_to
from amends_runtime.telemetry.otel_variables import Destination, Protocol, Signal
from tests.telemetry.otlp_receiver import receiving

PATIENCE_S: Final = 60.0  # bounds a test that hangs; nothing is measured by it
SOME_REJECTED = ExportTraceServiceResponse(
    partial_success=ExportTracePartialSuccess(rejected_spans=3, error_message="too old")
).SerializeToString()
WARNING = ExportTraceServiceResponse(
    partial_success=ExportTracePartialSuccess(error_message="do not send so much")
).SerializeToString()


async def send(to: Destination, *bodies: bytes) -> list[Answer]:
    """Send these from a thread, one after the other on one way."""

    def work() -> list[Answer]:
        way = way_to(to)
        try:
            return [way.send(body) for body in bodies]
        finally:
            way.close()

    return await anyio.to_thread.run_sync(work)


# -- gRPC ------------------------------------------------------------------------------------------


class Says:
    """What a collector answers by gRPC: bytes, or a status and what comes with it."""

    def __init__(
        self, answer: bytes | grpc.StatusCode, details: bytes = b"", words: str = "as planned"
    ) -> None:
        self.answer = answer
        self.details = details
        self.words = words
        self.user_agent = ""


class _Export(grpc.GenericRpcHandler):
    def __init__(self, says: Says, signal: Signal) -> None:
        self._says = says
        self._method = EXPORT[signal]

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        if handler_call_details.method != self._method:
            return None

        async def export(body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            metadata = dict(context.invocation_metadata() or ())
            self._says.user_agent = str(metadata["user-agent"])
            if isinstance(self._says.answer, bytes):
                return self._says.answer
            if self._says.details:
                context.set_trailing_metadata((("grpc-status-details-bin", self._says.details),))
            return await context.abort(self._says.answer, self._says.words)

        return grpc.unary_unary_rpc_method_handler(export)


@asynccontextmanager
async def grpc_collector(says: Says, signal: Signal = "traces") -> AsyncIterator[Destination]:
    """One that says this."""
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    server.add_generic_rpc_handlers((_Export(says, signal),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield Destination(signal=signal, protocol="grpc", endpoint=f"http://127.0.0.1:{port}")
    await server.stop(None)


def retry_info(seconds: int, nanos: int = 0) -> bytes:
    """What a collector says that wants to be left alone for so long, after something else."""
    other, info = AnyMessage(), AnyMessage()
    other.Pack(error_details_pb2.DebugInfo(detail="busy"))
    delay = Duration(seconds=seconds, nanos=nanos)
    info.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(details=[other, info]).SerializeToString()


@pytest.mark.parametrize(
    ("status", "may_pass"),
    [
        (grpc.StatusCode.UNAVAILABLE, True),
        (grpc.StatusCode.ABORTED, True),
        (grpc.StatusCode.CANCELLED, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, True),
        (grpc.StatusCode.OUT_OF_RANGE, True),
        (grpc.StatusCode.DATA_LOSS, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, False),  # it does not say that it will recover
        (grpc.StatusCode.INVALID_ARGUMENT, False),
        (grpc.StatusCode.UNIMPLEMENTED, False),
        (grpc.StatusCode.UNAUTHENTICATED, False),
        (grpc.StatusCode.PERMISSION_DENIED, False),
        (grpc.StatusCode.INTERNAL, False),
        (grpc.StatusCode.UNKNOWN, False),
    ],
)
async def test_a_status_of_grpc_may_pass_or_not(status: grpc.StatusCode, may_pass: bool) -> None:  # noqa: FBT001  # drawn
    """As OTLP's table has it."""
    says = Says(status)
    async with grpc_collector(says) as to:
        [answer] = await send(to, b"")
    of_content = status.name in {"RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"}
    assert answer == Refused(f"{status.name}: as planned", may_pass, of_content=of_content)
    assert says.user_agent.startswith("amends/")


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        (retry_info(7, 500_000_000), (True, 7.5)),
        (retry_info(0), (True, 0.0)),
        (b"\xff\xff", (False, 0.0)),
        (status_pb2.Status(message="no").SerializeToString(), (False, 0.0)),
    ],
)
async def test_a_collector_that_is_full_says_when(
    details: bytes, expected: tuple[bool, float]
) -> None:
    """And only then is it worth another try: one that does not, finds the message too large."""
    async with grpc_collector(Says(grpc.StatusCode.RESOURCE_EXHAUSTED, details)) as to:
        [answer] = await send(to, b"")
    assert isinstance(answer, Refused)
    assert (answer.may_pass, answer.after_s) == expected


# -- HTTP ------------------------------------------------------------------------------------------


class Web:
    """What a collector answers by HTTP, and what has come."""

    def __init__(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.status = status
        self.body = body
        self.headers = {name.replace("_", "-"): text for name, text in headers.items()}
        self.connections = 0
        self.got: list[tuple[dict[str, str], bytes]] = []


@contextmanager
def web_collector(web: Web) -> Iterator[Destination]:
    """One that answers this."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            web.connections += 1

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            web.got.append(({key.lower(): text for key, text in self.headers.items()}, body))
            self.send_response(web.status)
            for name, text in {**web.headers, "Content-Length": str(len(web.body))}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(web.body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
        yield Destination(signal="traces", protocol="http/protobuf", endpoint=url)
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "may_pass"),
    [(429, True), (502, True), (503, True), (504, True)]
    + [(status, False) for status in (301, 307, 400, 401, 404, 413, 500, 501)],
)
async def test_a_status_of_http_may_pass_or_not(status: int, may_pass: bool) -> None:  # noqa: FBT001  # drawn
    """As OTLP's table has it; whoever is sent elsewhere is not followed, without the spans."""
    with web_collector(Web(status, b"<html>", Location="/elsewhere")) as to:
        [answer] = await send(to, b"")
    assert isinstance(answer, Refused)
    assert answer.why.startswith(f"HTTP {status} ")
    assert (answer.may_pass, answer.after_s) == (may_pass, 0.0)
    assert answer.of_content is (status in {400, 413})


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        ("7", 7, 7),
        (format_date_time(time() + 3_600), 3_000, 3_600),
        (format_date_time(time() - 3_600), 0, 0),
        ("soon", 0, 0),
        ("-1", 0, 0),
    ],
    ids=["seconds", "date", "past", "word", "negative"],
)
async def test_a_collector_may_say_when(said: str, least: float, most: float) -> None:
    """In seconds, or as a date; what is neither says nothing."""
    with web_collector(Web(503, Retry_After=said)) as to:
        [answer] = await send(to, b"")
    assert isinstance(answer, Refused)
    assert least <= answer.after_s <= most


async def test_one_connection_carries_many_messages() -> None:
    """With an answer that is empty, or is not."""
    for body in (b"", WARNING):
        web = Web(200, body)
        with web_collector(web) as to:
            answers = await send(to, b"first", b"second", b"third")
        assert [isinstance(answer, Taken) for answer in answers] == [True] * 3
        assert [body for _, body in web.got] == [b"first", b"second", b"third"]
        assert web.connections == 1


async def test_what_is_sent_says_what_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The headers are those of OTLP and the destination's, whatever else this machine knows."""
    netrc = tmp_path_factory.mktemp("home") / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n", encoding="utf-8")
    monkeypatch.setenv("NETRC", str(netrc))
    web = Web(200)
    with web_collector(web) as plain:
        headers = {"authorization": "Bearer x"}
        to = msgspec.structs.replace(plain, headers=headers, gzip=True)
        await send(to, b"spans " * 100)
    [(got, body)] = web.got
    assert got["authorization"] == "Bearer x"
    assert got["content-type"] == "application/x-protobuf"
    assert got["content-encoding"] == "gzip"
    assert got["user-agent"].startswith("amends/")
    assert gzip.decompress(body) == b"spans " * 100


class Peer:
    """Somebody at a port who says these bytes again and again after a request, until it is cut."""

    def __init__(self, head: bytes, again: bytes, every_s: float) -> None:
        self._said = (head, again)
        self._every_s = every_s
        self.asked = Event()
        self.ended = Event()

    def speak(self, connection: socket.socket) -> None:
        """Until the other side has had enough."""
        head, again = self._said
        with connection, contextlib.suppress(OSError):
            connection.sendall(head)
            while not self.ended.wait(self._every_s):
                connection.sendall(again)
        self.ended.set()


@contextmanager
def peer(peer: Peer, **how: Any) -> Iterator[Destination]:
    """Where to find it; in the end it must have been cut off."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            peer.asked.set()
            peer.speak(connection)

        thread = Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/traces"
        yield Destination(signal="traces", protocol="http/protobuf", endpoint=url, **how)
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "its connection has not been ended"


OK: Final = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("said", "where"),
    [
        ((OK + b"Content-Length: 100000\r\n\r\n", b"x"), "http"),
        ((OK + b"\r\n", b"x"), "http"),
        ((OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"), "http"),
        ((OK + b"X-Header: ", b"x"), "http"),
        ((b"", b"H"), "http"),
        ((b"\x16\x03\x03\x40\x00", b"\x02"), "https"),
    ],
    ids=["body", "no length", "chunks", "header", "status", "handshake"],
)
async def test_who_answers_a_byte_at_a_time_has_no_longer_than_others(
    said: tuple[bytes, bytes], where: str
) -> None:
    """The time-out is one of the whole exchange; no byte that comes in between prolongs it."""
    slow = Peer(*said, every_s=0.02)
    with peer(slow, timeout_s=0.3) as plain:
        endpoint = plain.endpoint.replace("http", where, 1)
        [answer] = await send(msgspec.structs.replace(plain, endpoint=endpoint), b"")
    assert answer == Refused("no whole answer within 0.3 s")


@pytest.mark.parametrize("head", [b"\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
async def test_an_answer_without_end_is_read_for_a_few_bytes(head: bytes) -> None:
    """And then the connection ends: it would fill the memory."""
    again = b"x" * 4096 if head == b"\r\n" else b"1000\r\n" + b"x" * 4096 + b"\r\n"
    with peer(Peer(OK + head, again, every_s=0.0)) as to:
        [answer] = await send(to, b"")
    assert answer == Refused("its answer is too long to be OTLP", may_pass=False)


async def test_a_way_that_is_closed_breaks_off_what_is_sent() -> None:
    """By HTTP, too: nobody waits for an answer at the end of a process."""
    silent = Peer(b"", b"", every_s=PATIENCE_S)
    with peer(silent, timeout_s=PATIENCE_S) as to:
        way = way_to(to)
        answers: list[Answer] = []
        async with anyio.create_task_group() as tasks:

            async def sent() -> None:
                answers.append(await anyio.to_thread.run_sync(way.send, b""))
                silent.ended.set()

            tasks.start_soon(sent)
            await anyio.to_thread.run_sync(silent.asked.wait)
            way.close()
    assert isinstance(answers[0], Refused)


# -- both ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", Taken()),
        (SOME_REJECTED, Taken(3, "too old")),
        (WARNING, Taken(0, "do not send so much")),
        (b"<html>welcome</html>", Refused("its answer is not OTLP", may_pass=False)),
    ],
    ids=["all", "some", "warned", "nonsense"],
)
async def test_a_success_may_be_a_part_of_one(body: bytes, expected: Answer) -> None:
    """By both ways alike."""
    async with grpc_collector(Says(body)) as to:
        assert await send(to, b"") == [expected]
    with web_collector(Web(200, body)) as to:
        assert await send(to, b"") == [expected]


async def test_a_port_of_the_other_protocol_is_told_as_one() -> None:
    """In words: what it has answered are bytes, and a status of gRPC's own."""
    async with receiving() as receiver:
        grpc_url = f"http://{receiver.grpc_address}/v1/traces"
        [by_http] = await send(
            Destination(signal="traces", protocol="http/protobuf", endpoint=grpc_url), b""
        )
        [by_grpc] = await send(
            Destination(signal="traces", protocol="grpc", endpoint=receiver.http_url), b""
        )
    assert by_http.why == "its answer is not HTTP/1, as of a port for gRPC"
    assert by_grpc.why == "UNAVAILABLE: its answer is not HTTP/2, which gRPC is"


async def test_a_long_reason_keeps_its_cause() -> None:
    """Which stands at its end; and it is one line of text, whatever was said."""
    words = "it is the fault of somebody else, " * 20 + "\x1b[2J: Connection refused"
    async with grpc_collector(Says(grpc.StatusCode.UNAVAILABLE, words=words)) as to:
        [answer] = await send(to, b"")
    assert answer.why.startswith("UNAVAILABLE: it is the fault")
    assert answer.why.endswith("[2J: Connection refused")
    assert answer.why.isprintable()
    assert len(answer.why) == MAX_REASON


async def test_nobody_there_may_pass() -> None:
    """Said as the system says it, not as libraries do."""
    async with receiving() as receiver:
        endpoints = (f"http://{receiver.grpc_address}", f"{receiver.http_url}/v1/traces")
    by_grpc = Destination(signal="traces", protocol="grpc", endpoint=endpoints[0])
    by_http = Destination(signal="traces", protocol="http/protobuf", endpoint=endpoints[1])
    [answer] = await send(by_grpc, b"")
    assert isinstance(answer, Refused)
    assert answer.may_pass
    assert "Connection refused" in answer.why
    assert await send(by_http, b"") == [Refused("Connection refused")]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_a_header_that_cannot_be_sent_is_not_shown(protocol: Protocol) -> None:
    """It may be a secret, and why nothing was sent stands in the log."""
    headers = {"authorization": " Bearer hunter2\n"}
    async with receiving() as receiver:
        by_grpc = protocol == "grpc"
        endpoint = f"http://{receiver.grpc_address}" if by_grpc else receiver.http_url
        [answer] = await send(
            Destination(signal="traces", protocol=protocol, endpoint=endpoint, headers=headers), b""
        )
        assert receiver.arrived == 0
    assert isinstance(answer, Refused)
    assert answer.why
    assert "hunter2" not in answer.why


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_who_closes_a_way_sends_no_more(protocol: str) -> None:
    """What is sent afterwards is an answer, too, and no error."""
    async with receiving() as receiver:
        to = (
            Destination(
                signal="traces", protocol="grpc", endpoint=f"http://{receiver.grpc_address}"
            )
            if protocol == "grpc"
            else Destination(
                signal="traces",
                protocol="http/protobuf",
                endpoint=f"{receiver.http_url}/v1/traces",
            )
        )
        way = way_to(to)
        assert await anyio.to_thread.run_sync(way.send, b"") == Taken()
        way.close()
        way.close()
        answer = await anyio.to_thread.run_sync(way.send, b"")
        assert isinstance(answer, Refused)


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_what_a_collector_quotes_of_a_secret_is_not_shown(protocol: Protocol) -> None:
    """Whatever it says: of a header, or of a part of it, and of a password in the URL."""
    headers = {"authorization": "Bearer hunter2-hunter2", "x-tenant": "7"}
    said = "no hunter2-hunter2, no tell me:twice, no 7 " + "x" * 1_000
    body = ExportTraceServiceResponse(
        partial_success=ExportTracePartialSuccess(rejected_spans=1, error_message=said)
    ).SerializeToString()
    if protocol == "grpc":
        async with grpc_collector(Says(body)) as to:
            [answer] = await send(msgspec.structs.replace(to, headers=headers), b"")
        shown = "no ***, no tell me:twice, no 7 xxx"
    else:
        with web_collector(Web(200, body)) as to:
            url = to.endpoint.replace("://", "://tell%20me:twice@")
            secret = msgspec.structs.replace(to, headers=headers, endpoint=url)
            [answer] = await send(secret, b"")
        shown = "no ***, no ***:***, no 7 xxx"
    assert isinstance(answer, Taken)
    assert answer.why.startswith(shown)
    assert len(answer.why) == MAX_REASON


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_metrics_may_be_taken_in_part_too(protocol: Protocol) -> None:
    """Their answer has its own type; the call is their own method's."""
    body = ExportMetricsServiceResponse(
        partial_success=ExportMetricsPartialSuccess(rejected_data_points=2, error_message="old")
    ).SerializeToString()
    if protocol == "grpc":
        async with grpc_collector(Says(body), "metrics") as to:
            assert await send(to, b"") == [Taken(2, "old")]
    else:
        with web_collector(Web(200, body)) as to:
            of_metrics = msgspec.structs.replace(to, signal="metrics")
            assert await send(of_metrics, b"") == [Taken(2, "old")]
