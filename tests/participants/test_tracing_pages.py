"""What the pages say of tracing, as it stands there."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import amends
from amends.v1 import saga_pb2, types_pb2
from tests.participants.asking import asking, call_message, json_payload
from tests.participants.processes import program
from tests.participants.scripted_runtime import scripted_runtime
from tests.participants.tracing import ATTEMPT, TRACE, TRACEPARENT, Spans, ids, provided
from tests.telemetry.otlp_receiver import receiving

DOCS = Path(__file__).parents[2] / "docs"
ADDRESS = 'listen="127.0.0.1:7001"'
ANY_ADDRESS = 'listen="127.0.0.1:0", on_ready=lambda server: print(server.address, flush=True)'


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """Give what the process's spans are, in a provider of the test's own."""
    with provided(monkeypatch) as spans:
        yield spans


async def test_the_participant_of_its_page_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call is below the attempt, its own span below the call, and both arrive at its end."""
    text = (DOCS / "participants.md").read_text()
    (code,) = re.findall(r"```python\n(# traced.py\n.*?)```", text, re.DOTALL)
    assert ADDRESS in code
    path = tmp_path / "traced.py"
    path.write_text(code.replace(ADDRESS, ANY_ADDRESS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    async with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{receiver.grpc_address}")
        async with program(str(path)) as running, asking(await running.line()) as asker:
            call = call_message()
            call.traceparent = TRACEPARENT
            call.input.CopyFrom(json_payload({"cents": 4200}))
            assert (await asker.ask(call)).done.result.data == b'{"charged":4200}'
            running.signal(signal.SIGTERM)
            assert await running.wait() == 0
    by_name = {span.name: span for span in receiver.spans()}
    execute = by_name["amends.v1.ParticipantService/Execute"]
    own = by_name["check limit"]
    assert {(span.service, span.trace_id) for span in (execute, own)} == {("payments", TRACE)}
    assert execute.parent_id == ATTEMPT
    assert own.parent_id == execute.span_id


async def test_the_client_of_its_page_joins_its_trace(spans: Spans) -> None:
    """By the current span, and by what a message's headers say."""
    text = (DOCS / "clients.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    names: dict[str, Any] = {}
    exec(compile(code, "docs/clients.md", "exec"), names)  # noqa: S102  # it is our own page
    async with scripted_runtime() as runtime, amends.Client(runtime.address) as client:
        started = saga_pb2.StartSagaResponse(saga=types_pb2.Saga(saga_id="order-1"))
        runtime.answer("StartSaga", started)
        await names["check_out"](client, {"cup": 3})
        await names["from_a_queue"](client, {"traceparent": TRACEPARENT}, b"{}")
        await names["from_a_queue"](client, {}, b"{}")
        requests = runtime.requests(saga_pb2.StartSagaRequest)
    current, given, none = (request.traceparent for request in requests)
    assert current.startswith("00-{}-{}-".format(*ids(spans.one)))
    assert (given, none) == (TRACEPARENT, "")
