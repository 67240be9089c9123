"""Asks a participant over real gRPC, as a runtime would."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from amends.outcomes import Call, Verb
from amends.v1 import participant_pb2 as pb
from amends.v1 import participant_pb2_grpc, types_pb2
from amends.wire import call_from_wire

CHANNEL_OPTIONS = [("grpc.enable_retries", 0)]

DEADLINE_S = 30.0
"""Bounds a broken test; no test waits for it."""

WIRE_VERBS = {
    Verb.PREPARE: types_pb2.VERB_PREPARE,
    Verb.EXECUTE: types_pb2.VERB_EXECUTE,
    Verb.COMPENSATE: types_pb2.VERB_COMPENSATE,
}


def json_payload(value: object) -> types_pb2.Payload:
    """Make a JSON payload of the contract."""
    return types_pb2.Payload(data=json.dumps(value).encode(), content_type="application/json")


def call_message(
    verb: Verb = Verb.EXECUTE,
    *,
    action: str = "charge",
    saga_id: str = "order-1",
    step: str = "pay",
    round: int = 1,  # noqa: A002  # the contract's word
    attempt: int = 1,
    store_id: str = "store",
    amount: int = 5,
    results: Mapping[str, object] | None = None,
    executed: bool = False,
    own_result: object = None,
    turn: types_pb2.Turn | None = None,
    poll: bool = False,
    oldest_open_at_ms: int = 0,
    participant: str = "",
) -> pb.Call:
    """Make one attempt, as the runtime sends it; an older one names no participant."""
    call = pb.Call(
        idempotency_key=f"{store_id}/{saga_id}/{step}/{verb}/{round}",
        store_id=store_id,
        saga_id=saga_id,
        definition="order",
        step=step,
        action=action,
        verb=WIRE_VERBS[verb],
        round=round,
        attempt=attempt,
        epoch=1,
        input=json_payload({"amount": amount}),
        results=[
            pb.StepResult(step=name, result=json_payload(value))
            for name, value in (results or {}).items()
        ],
        poll=poll,
        oldest_open_at_ms=oldest_open_at_ms,
        participant=participant,
    )
    if verb is Verb.COMPENSATE:
        call.compensation.executed = executed
        if own_result is not None:
            call.compensation.result.CopyFrom(json_payload(own_result))
        if turn is not None:
            call.compensation.turn.CopyFrom(turn)
    return call


def call_of(verb: Verb = Verb.EXECUTE, **changes: object) -> Call:
    """Make the same attempt as a handler sees it."""
    return call_from_wire(call_message(verb, **changes))  # type: ignore[arg-type]


class Asker:
    """A runtime's end of the wire."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.stub = participant_pb2_grpc.ParticipantServiceStub(channel)

    async def ask(self, call: pb.Call) -> pb.Outcome:
        """Send an attempt by the method of its verb, and give its outcome."""
        match call.verb:
            case types_pb2.VERB_PREPARE:
                prepare = pb.PrepareRequest(call=call)
                return (await self.stub.Prepare(prepare, timeout=DEADLINE_S)).outcome
            case types_pb2.VERB_EXECUTE:
                execute = pb.ExecuteRequest(call=call)
                return (await self.stub.Execute(execute, timeout=DEADLINE_S)).outcome
            case types_pb2.VERB_COMPENSATE:
                compensate = pb.CompensateRequest(call=call)
                return (await self.stub.Compensate(compensate, timeout=DEADLINE_S)).outcome
            case verb:
                raise AssertionError(f"no method for verb {verb}")

    async def say(self, call: pb.Call) -> str:
        """Ask, and give the outcome in a word or two: ``done``, ``rejected fenced``, …."""
        return words(await self.ask(call))

    async def status(self, call: pb.Call) -> tuple[grpc.StatusCode, str]:
        """Ask, and give the error status that is expected instead of an outcome."""
        try:
            outcome = await self.ask(call)
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        raise AssertionError(f"expected an error status, and got {words(outcome)}")


def health_of(asker: Asker) -> Any:
    """Give the stub of the participant's health service, whose types are unknown."""
    return health_pb2_grpc.HealthStub(asker.channel)


def words(outcome: pb.Outcome) -> str:
    """Say an outcome in a word or two."""
    kind = outcome.WhichOneof("outcome")
    match kind:
        case "rejected":
            return f"rejected {outcome.rejected.reason}"
        case "broken":
            return f"broken {outcome.broken.reason}"
        case _:
            return str(kind)


@asynccontextmanager
async def asking(address: str) -> AsyncIterator[Asker]:
    """Connect to a participant."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        yield Asker(channel)
