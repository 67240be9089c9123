"""`amends trace`: a saga's trace as a tree, as OTLP JSON, and sent to a real collector."""

import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import anyio.to_thread
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import Span, TracesData

from amends.sagas import Trace
from amends_runtime.cli.app import run
from amends_runtime.cli.options import Common
from amends_runtime.cli.trace_views import duration, print_trace
from tests.telemetry.otlp_receiver import Behaviour, receiving

CALLER = f"00-{'a' * 32}-{'b' * 16}-01"


@pytest.fixture(autouse=True)
def asking(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of this process ask the runtime of the tests, and no collector of the machine's."""
    for name in [name for name in os.environ if name.startswith(("AMENDS_", "OTEL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AMENDS_TARGET", target)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def turned(capsys: pytest.CaptureFixture[str]) -> str:
    """A saga that was turned back."""
    run(["start", "turning", "--id", "turned", "--wait"])
    capsys.readouterr()
    return "turned"


def spans_in(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The spans of an OTLP document."""
    return [
        span
        for of_resource in document["resourceSpans"]
        for of_scope in of_resource["scopeSpans"]
        for span in of_scope["spans"]
    ]


def a_trace(data: TracesData) -> Trace:
    """A trace with these spans, as a client has it."""
    of_scope = data.resource_spans[0].scope_spans[0]
    return Trace(
        trace_id="a" * 32,
        sampled=True,
        traces_data=data.SerializeToString(),
        spans=len(of_scope.spans),
        open_spans=0,
    )


# -- show ------------------------------------------------------------------------------------------


def test_show_draws_the_tree(capsys: pytest.CaptureFixture[str], turned: str) -> None:
    """What happened when, how long it took, and how it ended."""
    assert run(["trace", "show", turned]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    head, _, tree = out.partition("\n\n")
    assert re.fullmatch(r"trace +[0-9a-f]{32}\nsampled +yes", head)
    columns, *rows = tree.splitlines()
    assert columns.split() == ["AT", "TOOK", "SPAN"]
    assert all(re.match(r"\+\d+(\.\d+)? (s|ms|µs) ", row) for row in rows)
    assert [row[columns.index("SPAN") :] for row in rows] == [
        "saga turning: COMPENSATED: refused at check",
        "│  · turned back (cause=rejected, reason=refused, step=check)",
        "├─ step charge: done",
        "│  └─ Execute payments, attempt 1: done",
        "├─ step check: refused",
        "│  └─ Execute payments, attempt 1: rejected",
        "└─ compensate charge: done",
        "   └─ Compensate payments, attempt 1: done",
    ]


def test_show_marks_what_has_not_ended(capsys: pytest.CaptureFixture[str]) -> None:
    """A saga that goes on has a tree as far as it has come."""
    assert run(["start", "waiting", "--id", "goes-on"]) == 0
    capsys.readouterr()
    assert run(["trace", "show", "goes-on"]) == 0
    assert "saga waiting: has not ended" in capsys.readouterr().out


def test_a_call_without_an_answer_is_not_said_to_be_on_the_wire(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its participant's breaker may hold it, which the history does not know of."""
    data = TracesData()
    scope = data.resource_spans.add().scope_spans.add()
    span = scope.spans.add(span_id=bytes(8), name="…/Execute", kind=Span.SPAN_KIND_CLIENT)
    for key, value in (("service.peer.name", "shop"), ("amends.attempt", 7)):
        is_text = isinstance(value, str)
        attribute = span.attributes.add(key=key).value
        setattr(attribute, "string_value" if is_text else "int_value", value)
    span.attributes.add(key="amends.open").value.bool_value = True
    print_trace(a_trace(data), Common())
    *_, row = capsys.readouterr().out.splitlines()
    told = "not answered yet: on the wire, in progress, or held (amends breakers)"
    assert row.split(maxsplit=2) == ["+0", "s", f"Execute shop, attempt 7: {told}"]


def test_show_keeps_the_tree_in_its_column(capsys: pytest.CaptureFixture[str]) -> None:
    """However late things happened, and however long they took."""
    data = TracesData()
    scope = data.resource_spans.add().scope_spans.add()
    for number, at_s in enumerate((0, 99, 101, 3_600)):
        scope.spans.add(
            span_id=bytes([number + 1] * 8),
            parent_span_id=b"" if number == 0 else bytes([1] * 8),
            name=f"span {number}",
            start_time_unix_nano=1 + at_s * 10**9,
            end_time_unix_nano=1 + (at_s + 121) * 10**9,
        )
    print_trace(a_trace(data), Common())
    _, _, tree = capsys.readouterr().out.partition("\n\n")
    header, root, *rows = tree.splitlines()
    at = header.index("SPAN")
    assert root[at:] == "span 0"
    assert [row[at:] for row in rows] == ["├─ span 1", "├─ span 2", "└─ span 3"]


def test_show_gives_programs_the_spans(capsys: pytest.CaptureFixture[str], turned: str) -> None:
    """One document, or a span a line, with ids in hex and instants in nanoseconds."""
    assert run(["trace", "show", turned, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sampled"] is True
    root, *rest = found["spans"]
    assert (root["name"], root["parent_span_id"], root["kind"]) == (
        "saga turning",
        None,
        "INTERNAL",
    )
    assert root["error"] == "COMPENSATED: refused at check"
    assert root["attributes"]["amends.saga_id"] == turned
    assert [event["name"] for event in root["events"]] == ["turned back"]
    [undo] = [span for span in rest if span["name"] == "compensate charge"]
    [charge] = [span for span in rest if span["name"] == "step charge"]
    assert [link["span_id"] for link in undo["links"]] == [charge["span_id"]]
    assert all(0 < span["start_ns"] <= span["end_ns"] for span in found["spans"])
    assert run(["trace", "show", turned, "-o", "jsonl"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{**span, "trace_id": found["trace_id"]} for span in found["spans"]] == lines


@pytest.mark.parametrize(
    ("ns", "shown"),
    [
        (0, "0 s"),
        (1_500, "2 µs"),
        (12_340_000, "12.3 ms"),
        (1_234_000_000, "1.234 s"),
        (599_999_900_000, "600.000 s"),
        (754_000_000_000, "12 min 34 s"),
        (7_500_000_000_000, "2 h 05 min"),
    ],
)
def test_durations_are_said_as_a_person_would(ns: int, shown: str) -> None:
    """In the unit of their size."""
    assert duration(ns) == shown


# -- export, printed -------------------------------------------------------------------------------


def test_export_prints_otlp_json_on_one_line(
    capsys: pytest.CaptureFixture[str], turned: str
) -> None:
    """Ids are hex digits, enums numbers, 64-bit numbers texts: what collectors read."""
    assert run(["trace", "export", turned]) == 0
    out, err = capsys.readouterr()
    [line] = out.splitlines()
    spans = spans_in(json.loads(line))
    assert err == f"amends: saga {turned}: trace {spans[0]['traceId']}, {len(spans)} spans\n"
    ids = {span["spanId"] for span in spans}
    for span in spans:
        assert re.fullmatch(r"[0-9a-f]{32}", span["traceId"])
        assert re.fullmatch(r"[0-9a-f]{16}", span["spanId"])
        assert span.get("parentSpanId") in {None, *ids}
        assert isinstance(span["kind"], int)
        assert isinstance(span["startTimeUnixNano"], str)
        assert {link["spanId"] for link in span.get("links", [])} <= ids
    assert spans[0]["status"]["code"] == 2


def test_export_takes_several_sagas(capsys: pytest.CaptureFixture[str], turned: str) -> None:
    """In one document, in one of many lines, or in one each; a saga named twice comes once."""
    assert run(["start", "order", "--id", "done", "--wait"]) == 0
    capsys.readouterr()
    ids = [turned, "done", turned]
    assert run(["trace", "export", *ids]) == 0
    out, err = capsys.readouterr()
    together = json.loads(out)
    assert len({span["traceId"] for span in spans_in(together)}) == 2
    assert err.count("\n") == 2
    assert run(["trace", "export", *ids, "-o", "json"]) == 0
    pretty = capsys.readouterr().out
    assert pretty.count("\n") > 10
    assert json.loads(pretty) == together
    assert run(["trace", "export", *ids, "-o", "jsonl"]) == 0
    each = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [spans_in(document) for document in each] == [
        [span for span in spans_in(together) if span["traceId"] == trace_id]
        for trace_id in dict.fromkeys(span["traceId"] for span in spans_in(together))
    ]


def test_export_leaves_out_what_has_not_ended(capsys: pytest.CaptureFixture[str]) -> None:
    """It says so, and how to have it."""
    assert run(["start", "waiting", "--id", "open"]) == 0
    capsys.readouterr()
    assert run(["trace", "export", "open"]) == 0
    out, err = capsys.readouterr()
    assert not [span for span in spans_in(json.loads(out)) if span["name"] == "saga waiting"]
    assert re.search(r"; \d more have not ended \(--include-open\)$", err.strip())
    assert run(["trace", "export", "open", "--include-open"]) == 0
    out, err = capsys.readouterr()
    [root] = [span for span in spans_in(json.loads(out)) if span["name"] == "saga waiting"]
    assert {"key": "amends.open", "value": {"boolValue": True}} in root["attributes"]
    assert "have not ended" not in err


async def test_ids_that_are_unknown_hold_up_no_other(
    capsys: pytest.CaptureFixture[str], turned: str
) -> None:
    """What is known is printed or sent, what is not is named, each, and the exit code says so."""
    ids = ["typo", turned, "slip"]
    assert await anyio.to_thread.run_sync(run, ["trace", "export", *ids]) == 3
    out, err = capsys.readouterr()
    assert len(spans_in(json.loads(out))) == 7
    about, *unknown = err.splitlines()
    assert about.startswith(f"amends: saga {turned}: trace ")
    assert [re.findall(r"there is no saga '(\w+)'", line) for line in unknown] == [
        ["typo"],
        ["slip"],
    ]
    async with receiving() as receiver:
        command = ["trace", "export", *ids, "--to", receiver.grpc_address]
        assert await anyio.to_thread.run_sync(run, command) == 3
        assert len(receiver.spans()) == 7
    assert capsys.readouterr().err.count("there is no saga") == 2
    command = ["trace", "export", *ids, "--to", "127.0.0.1:1"]
    assert await anyio.to_thread.run_sync(run, command) == 5
    refused, *unknown = capsys.readouterr().err.splitlines()
    assert "does not take the traces" in refused
    assert len(unknown) == 2


# -- export, sent ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_export_sends_to_a_collector(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    turned: str,
    protocol: str,
) -> None:
    """Over either protocol, with the headers of the environment; sent again it is the same."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20x,tenant=shop")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")  # --to counts
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    async with receiving() as receiver:
        to = receiver.grpc_address if protocol == "grpc" else receiver.http_url
        command = ["trace", "export", turned, "--to", to, "--protocol", protocol]
        assert await anyio.to_thread.run_sync(run, command) == 0
        out, err = capsys.readouterr()
        assert out == ""
        assert f"sent to http://127.0.0.1:{to.rpartition(':')[2]}" in err
        first = receiver.spans()
        assert {span.service for span in first} == {"amends"}
        assert [span.name for span in first][:2] == ["saga turning", "step charge"]
        assert await anyio.to_thread.run_sync(run, command) == 0
        assert receiver.spans()[len(first) :] == first
        assert len(receiver.received.requests) == 2
        for request in receiver.received.requests:
            assert request.transport == ("grpc" if protocol == "grpc" else "http")
            assert request.headers["authorization"] == "Bearer x"
            assert request.headers["tenant"] == "shop"


async def test_export_breaks_many_spans_into_messages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, turned: str
) -> None:
    """None is larger than a collector takes, and together they are all."""
    monkeypatch.setattr("amends_runtime.cli.otlp.MESSAGE_SPANS", 3)
    async with receiving() as receiver:
        command = ["trace", "export", turned, "--to", receiver.grpc_address]
        assert await anyio.to_thread.run_sync(run, command) == 0
        assert " 7 spans" in capsys.readouterr().err
        assert len(receiver.received.requests) == 3
        assert len({span.span_id for span in receiver.spans()}) == 7


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_a_collector_that_refuses_is_exit_code_5(
    capsys: pytest.CaptureFixture[str], turned: str, protocol: str
) -> None:
    """In one line that says who, and what it said."""
    async with receiving() as receiver:
        receiver.behave(Behaviour.REFUSE)
        to = receiver.grpc_address if protocol == "grpc" else receiver.http_url
        command = ["trace", "export", turned, "--to", to, "--protocol", protocol]
        assert await anyio.to_thread.run_sync(run, command) == 5
    [line] = capsys.readouterr().err.splitlines()
    assert "does not take the traces" in line
    assert ("UNAVAILABLE" if protocol == "grpc" else "HTTP 503") in line


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_that_is_not_there_is_exit_code_5(
    capsys: pytest.CaptureFixture[str], turned: str, protocol: str
) -> None:
    """And the other protocol is named, because ports are easily mixed up."""
    command = ["trace", "export", turned, "--to", "127.0.0.1:1", "--protocol", protocol]
    assert run(command) == 5
    [line] = capsys.readouterr().err.splitlines()
    assert "Connection refused" in line
    assert f"--protocol {'http/protobuf' if protocol == 'grpc' else 'grpc'}" in line


class _Answer(BaseHTTPRequestHandler):
    """An HTTP server that answers each POST with what a test wants."""

    status: ClassVar[int] = 200
    body: ClassVar[bytes] = b""
    headers_out: ClassVar[dict[str, str]] = {}

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        for name, value in {**self.headers_out, "Content-Length": str(len(self.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silent."""


@pytest.fixture
def web() -> Iterator[tuple[str, type[_Answer]]]:
    """An HTTP server's address, and what it answers, to be set."""

    class Answer(_Answer):
        pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", Answer
        server.shutdown()
        thread.join()


def test_spans_that_a_collector_drops_are_said(
    capsys: pytest.CaptureFixture[str], turned: str, web: tuple[str, type[_Answer]]
) -> None:
    """OTLP's partial success is no success."""
    to, answer = web
    partial = ExportTraceServiceResponse()
    partial.partial_success.rejected_spans = 2
    partial.partial_success.error_message = "too old"
    answer.body = partial.SerializeToString()
    assert run(["trace", "export", turned, "--to", to, "--protocol", "http/protobuf"]) == 5
    assert "it refused 2 spans: too old" in capsys.readouterr().err


def test_what_is_no_collector_is_not_taken_for_one(
    capsys: pytest.CaptureFixture[str], turned: str, web: tuple[str, type[_Answer]]
) -> None:
    """A web page is no answer, and a redirection would lose the spans on its way."""
    to, answer = web
    command = ["trace", "export", turned, "--to", to, "--protocol", "http/protobuf"]
    answer.body = b"<html>welcome</html>"
    assert run(command) == 5
    assert "its answer is not OTLP" in capsys.readouterr().err
    answer.status, answer.headers_out = 302, {"Location": f"{to}/elsewhere"}
    assert run(command) == 5
    assert "HTTP 302" in capsys.readouterr().err


# -- what is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        ("show nope", 3, "there is no saga 'nope'"),
        ("export nope", 3, "there is no saga 'nope'"),
        ("export", 2, "ID"),
        ("export x --to nowhere:port", 2, "--to: has a port that cannot be: 'port'"),
        ("export x --to ftp://127.0.0.1:1", 2, "--to: must be host:port or a URL"),
        ("export x --to 127.0.0.1", 2, '--to: has no port: write "127.0.0.1:4317"'),
        ("export x --to http://127.0.0.1:1/v1/traces", 2, "--to: gRPC knows no path"),
        ("export x --to http://u:p@127.0.0.1:1", 2, "OTEL_EXPORTER_OTLP_HEADERS"),
        ("export x --protocol http/json", 2, "--protocol"),
    ],
)
def test_what_cannot_be_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: str, code: int, what: str
) -> None:
    """Bad addresses are found before anything is asked for."""
    assert run(["trace", *arguments.split()]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert what in err
    assert err.count("\n") == 1


def test_an_empty_place_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """And not taken for a host without a name, at port 80."""
    assert run(["trace", "export", "x", "--to", " "]) == 2
    assert "--to: must be host:port or a URL" in capsys.readouterr().err


def test_variables_that_cannot_be_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All at once, and never by their value, which may be a secret."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "hunter2")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(tmp_path / "absent.pem"))
    assert run(["trace", "export", "x", "--to", "https://127.0.0.1:1"]) == 2
    err = capsys.readouterr().err
    assert "OTEL_EXPORTER_OTLP_HEADERS: must be" in err
    assert "OTEL_EXPORTER_OTLP_CERTIFICATE: " in err
    assert "hunter2" not in err


def test_a_runtime_that_is_not_there_is_exit_code_5(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with every other command."""
    monkeypatch.setenv("AMENDS_TARGET", "127.0.0.1:1")
    assert run(["trace", "show", "x"]) == 5
    assert "127.0.0.1:1" in capsys.readouterr().err
