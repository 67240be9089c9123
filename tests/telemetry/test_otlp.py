"""Spans on the wire: every part of one arrives, by both protocols, as the destination says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from opentelemetry.proto.trace.v1 import trace_pb2

from amends_runtime.telemetry.collector import Refused, SpanExport
from amends_runtime.telemetry.encoding import sender_attributes
from amends_runtime.telemetry.otel_variables import Destination, Protocol
from amends_runtime.telemetry.otlp import resource
from amends_runtime.telemetry.spans import Span, SpanEvent, SpanKind, SpanLink
from tests.certificates import LOOPBACK, Authority
from tests.telemetry.otlp_receiver import Behaviour, Receiver, plain, receiving

PROTOCOLS: tuple[Protocol, ...] = ("grpc", "http/protobuf")

TRACE, ROOT, CHILD, OTHER = "0a" * 16, "0b" * 8, "0c" * 8, "0d" * 8
SPANS = [
    Span(
        trace_id=TRACE,
        span_id=ROOT,
        parent_id="",
        name="saga order",
        kind=SpanKind.INTERNAL,
        start_ns=1_000_000_001,
        end_ns=2_000_000_002,
        attributes={"amends.saga_id": "s-1", "amends.attempt": 3, "amends.probe": True},
        events=(SpanEvent("turned back", 1_500_000_000, {"amends.reason": "no"}),),
        error="COMPENSATED: no",
    ),
    Span(
        trace_id=TRACE,
        span_id=CHILD,
        parent_id=ROOT,
        name="amends.v1.ParticipantService/Execute",
        kind=SpanKind.CLIENT,
        start_ns=1_000_000_002,
        end_ns=1_000_000_003,
        attributes={},
        links=(SpanLink(TRACE, OTHER, {"amends.link": "undoes"}),),
    ),
]
SENDER = sender_attributes(
    "store-1", {"service.name": "billing", "deployment.environment.name": "test"}
)


def to(receiver: Receiver, protocol: Protocol, **how: Any) -> Destination:
    """The receiver as a destination."""
    scheme = receiver.http_url.partition(":")[0]
    endpoint = f"{scheme}://{receiver.grpc_address}"
    if protocol != "grpc":
        endpoint = f"{receiver.http_url}/v1/traces"
    return Destination(signal="traces", protocol=protocol, endpoint=endpoint, **how)


async def send(destination: Destination) -> str | None:
    """Send the spans from a thread, as the runtime does; why that failed, or None."""

    def export() -> str | None:
        way = SpanExport(destination, SENDER)
        try:
            answer = way.send(SPANS)
            return answer.why if isinstance(answer, Refused) else None
        finally:
            way.close()

    return await anyio.to_thread.run_sync(export)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_every_part_of_a_span_arrives(protocol: Protocol) -> None:
    """Ids, times to the nanosecond, attributes of each type, events, links, kinds, status."""
    async with receiving() as receiver:
        assert await send(to(receiver, protocol)) is None
        root, child = receiver.spans(TRACE)
    assert (root.span_id, root.parent_id, root.name) == (ROOT, "", "saga order")
    assert (child.span_id, child.parent_id) == (CHILD, ROOT)
    assert root.proto.start_time_unix_nano == 1_000_000_001
    assert root.proto.end_time_unix_nano == 2_000_000_002
    assert root.attributes == SPANS[0].attributes
    assert root.proto.kind == trace_pb2.Span.SPAN_KIND_INTERNAL
    assert child.proto.kind == trace_pb2.Span.SPAN_KIND_CLIENT
    assert root.proto.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert root.proto.status.message == "COMPENSATED: no"
    assert child.proto.status.code == trace_pb2.Status.STATUS_CODE_UNSET
    [event] = root.proto.events
    assert (event.name, event.time_unix_nano) == ("turned back", 1_500_000_000)
    assert plain(event.attributes) == {"amends.reason": "no"}
    [link] = child.proto.links
    assert (link.trace_id.hex(), link.span_id.hex()) == (TRACE, OTHER)
    assert plain(link.attributes) == {"amends.link": "undoes"}
    assert root.scope == "amends"


async def test_the_sender_is_the_store_and_stays_the_same() -> None:
    """So that spans which are sent once more after a restart are equal to the first."""
    attributes = SENDER
    assert attributes == dict(resource("store-1", attributes_of_the_test()).attributes)
    assert attributes["service.instance.id"] == "store-1"
    assert attributes["service.name"] == "billing"
    assert attributes["deployment.environment.name"] == "test"
    assert {"service.version", "telemetry.sdk.name", "telemetry.sdk.version"} < set(attributes)


def attributes_of_the_test() -> dict[str, str]:
    """What `SENDER` was made with."""
    return {"service.name": "billing", "deployment.environment.name": "test"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_headers_and_compression_are_used(protocol: Protocol) -> None:
    """Both are what collectors behind a gateway ask for."""
    async with receiving() as receiver:
        assert await send(to(receiver, protocol, headers={"x-key": "k"}, gzip=True)) is None
        [request] = receiver.received.requests
    assert request.headers["x-key"] == "k"
    if protocol != "grpc":  # gRPC's own headers are not shown to a server
        assert request.headers["content-encoding"] == "gzip"
        assert request.headers["content-type"] == "application/x-protobuf"


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_tls_trusts_the_authority_that_it_was_given(
    protocol: Protocol, tmp_path: Path
) -> None:
    """And no other: a collector that cannot be trusted gets nothing."""
    authority = Authority(tmp_path)
    issued = authority.issue("collector", names=LOOPBACK)
    async with receiving(tls=(issued.key, issued.cert)) as receiver:
        trusted = to(receiver, protocol, certificate=str(tmp_path / "ca.pem"), timeout_s=5.0)
        assert await send(trusted) is None
        assert len(receiver.spans()) == 2
        other = tmp_path / "other"
        other.mkdir()
        Authority(other)
        untrusted = to(receiver, protocol, certificate=str(other / "ca.pem"), timeout_s=1.0)
        assert await send(untrusted) is not None
        assert len(receiver.spans()) == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_collector_that_refuses_is_told_of_by_the_answer_alone(
    protocol: Protocol, caplog: pytest.LogCaptureFixture
) -> None:
    """The library's own log lines do not appear: who sends says it once."""
    async with receiving() as receiver:
        receiver.behave(Behaviour.REFUSE)
        why = await send(to(receiver, protocol, timeout_s=0.5))
        assert why
        assert receiver.spans() == []
    assert [record for record in caplog.records if "opentelemetry" in record.name] == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_the_librarys_own_reading_of_variables_does_not_count(
    protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would fail on one of these, and send elsewhere by the other; afterwards both are there."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "ten")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-other=1")
    async with receiving() as receiver:
        assert await send(to(receiver, protocol)) is None
        [request] = receiver.received.requests
    assert "x-other" not in request.headers
    assert os.environ["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT"] == "ten"


SERVES = """
import sys
import anyio
from amends_runtime.config import Config, Server
from amends_runtime.engine import run_engine

async def main():
    server = Server(listen="127.0.0.1:0", database=sys.argv[1])
    async with run_engine(Config(server=server)) as engine:
        assert engine.traces_to == ""

anyio.run(main)
exporters = [name for name in sys.modules if name.startswith("opentelemetry.exporter")]
assert not exporters, exporters
"""


def test_a_runtime_that_sends_nowhere_imports_no_exporter(tmp_path: Path) -> None:
    """They take time to import, and memory."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run(
        [sys.executable, "-c", SERVES, str(tmp_path / "amends.db")], check=True, env=environment
    )


def test_a_wrong_variable_is_said_before_anything_is_opened(tmp_path: Path) -> None:
    """One line that names it, exit code 2, no database."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("OTEL_")}
    ended = subprocess.run(
        [sys.executable, "-m", "amends_runtime", "serve", "--listen=127.0.0.1:0"],
        env={**environment, "OTEL_EXPORTER_OTLP_ENDPOINT": "ftp://collector"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert line.startswith("amends: OTEL_EXPORTER_OTLP_ENDPOINT: must be host:port, or a URL")
    assert list(tmp_path.iterdir()) == []
