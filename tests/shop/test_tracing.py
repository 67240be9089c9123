"""The shop's services send their spans to a collector, and end without one that is gone."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import pytest

from amends.v1 import participant_pb2, participant_pb2_grpc, types_pb2
from shop.processes import Process, Processes
from tests.participants.asking import CHANNEL_OPTIONS, json_payload
from tests.participants.processes import ended_well
from tests.participants.tracing import ATTEMPT, BLOCKED, TRACE, TRACEPARENT
from tests.shop.calls import order_input
from tests.telemetry.otlp_receiver import Behaviour, Receiver, receiving

EXECUTE = "amends.v1.ParticipantService/Execute"
BOUND_S = 60.0


def exporting(receiver: Receiver, protocol: str = "grpc") -> dict[str, str]:
    """Name a collector by the standard's variables."""
    by_protocol = {"grpc": f"http://{receiver.grpc_address}", "http/protobuf": receiver.http_url}
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": by_protocol[protocol],
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_SERVICE_NAME": "somebody-else",
        "no_proxy": "127.0.0.1",
    }


async def ask(process: Process, action: str, **order: object) -> str:
    """Execute an action as the runtime would, in a trace; give the kind of outcome."""
    call = participant_pb2.Call(
        idempotency_key=f"store/saga-1/{action}/execute/1",
        store_id="store",
        saga_id="saga-1",
        definition="order",
        step=action,
        action=action,
        verb=types_pb2.VERB_EXECUTE,
        round=1,
        attempt=1,
        input=json_payload(order_input(**order)),
        traceparent=TRACEPARENT,
    )
    placed = {"order_id": "order-1", "amount_cents": 500}
    call.results.add(step="place", result=json_payload(placed))
    async with grpc.aio.insecure_channel(process.address, options=CHANNEL_OPTIONS) as channel:
        stub = participant_pb2_grpc.ParticipantServiceStub(channel)
        reply = await stub.Execute(participant_pb2.ExecuteRequest(call=call), timeout=BOUND_S)
    return str(reply.outcome.WhichOneof("outcome"))


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_spans_are_sent_before_the_end(protocol: str, tmp_path: Path) -> None:
    """Each service under its own name; below the attempt the call, below that the service's own."""
    async with receiving() as receiver:
        environment = exporting(receiver, protocol)
        async with Processes(tmp_path, environment=environment) as processes:
            payments, inventory = await processes.start_services(["payments", "inventory"])
            assert await ask(payments, "charge") == "done"
            assert await ask(inventory, "reserve") == "done"
            assert [await payments.stop(), await inventory.stop()] == [0, 0]
    spans = receiver.spans()
    assert {span.trace_id for span in spans} == {TRACE}
    assert sorted((span.service, span.name) for span in spans) == [
        ("inventory", EXECUTE),
        ("inventory", "take from the shelf"),
        ("payments", EXECUTE),
        ("payments", "authorise card"),
    ]
    calls = {span.service: span for span in spans if span.name == EXECUTE}
    assert {span.parent_id for span in calls.values()} == {ATTEMPT}
    for span in spans:
        if span.name != EXECUTE:
            assert span.parent_id == calls[span.service].span_id


async def test_a_declined_card_is_told_by_its_reason(tmp_path: Path) -> None:
    """No span of it is an error, and none has the message or anything of the order."""
    async with (
        receiving() as receiver,
        Processes(tmp_path, environment=exporting(receiver)) as processes,
    ):
        [payments] = await processes.start_services(["payments"])
        assert await ask(payments, "charge", card="declined") == "rejected"
        assert await payments.stop() == 0
    own, call = receiver.spans()
    assert (own.name, call.name) == ("authorise card", EXECUTE)
    assert call.attributes["amends.reason"] == "card_declined"
    for span in (own, call):
        assert span.proto.status.code == span.proto.status.STATUS_CODE_UNSET
        assert not span.proto.events
    assert b"Harbour Road" not in receiver.received.raw
    assert b"the bank" not in receiver.received.raw


async def test_a_collector_that_hangs_holds_up_nothing(tmp_path: Path) -> None:
    """The service answers, and ends by itself without its last spans."""
    async with receiving() as receiver:
        receiver.behave(Behaviour.HANG)
        async with Processes(tmp_path, environment=exporting(receiver)) as processes:
            [payments] = await processes.start_services(["payments"])
            assert await ask(payments, "charge") == "done"
            assert await payments.stop() == 0
        assert receiver.arrived == 1
    assert receiver.spans() == []
    assert "the collector does not take the last spans" in payments.log.read_text()


async def test_a_collector_that_is_gone_holds_up_nothing(tmp_path: Path) -> None:
    """Nor does a port at which nobody listens."""
    async with receiving() as receiver:
        environment = exporting(receiver)
    async with Processes(tmp_path, environment=environment) as processes:
        [payments] = await processes.start_services(["payments"])
        assert await ask(payments, "charge") == "done"
        assert await payments.stop() == 0


WITHOUT = """
import logging, os, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
from shop.tracing import exported, span
with exported("payments"), span("authorise card"):
    print("served")
"""


async def test_a_shop_without_opentelemetry_serves(tmp_path: Path) -> None:
    """And says what is missing, where a collector is named."""
    said = await ended_well(BLOCKED + WITHOUT, tmp_path)
    assert said.splitlines() == [
        "a collector is named, and nothing is traced: opentelemetry is missing",
        "served",
    ]


async def test_tracing_can_be_switched_off(tmp_path: Path) -> None:
    """By the standard's own variable, whatever else the environment says."""
    async with receiving() as receiver:
        environment = exporting(receiver) | {"OTEL_SDK_DISABLED": "true"}
        async with Processes(tmp_path, environment=environment) as processes:
            [payments] = await processes.start_services(["payments"])
            assert await ask(payments, "charge") == "done"
            assert await payments.stop() == 0
        assert receiver.arrived == 0
