"""Odd participants: gRPC without the SDK, and partly below the contract's messages.

One answers nonsense; one lets calls arrive late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias

import anyio
import grpc
import grpc.aio

from amends.v1 import participant_pb2 as pb
from amends.v1 import participant_pb2_grpc, types_pb2

MIB: Final = 1024 * 1024

Context: TypeAlias = grpc.aio.ServicerContext[Any, bytes]
Behaviour: TypeAlias = Callable[[pb.Call, Context], Awaitable[bytes]]

CHUNK: Final = b"payload-that-nobody-may-show "


async def no_outcome(_: pb.Call, __: Context) -> bytes:
    """Say OK, and nothing of what became of it."""
    return pb.ExecuteResponse(outcome=pb.Outcome()).SerializeToString()


async def garbage(_: pb.Call, __: Context) -> bytes:
    """Say OK with bytes that are no message at all."""
    return b"\xff" * 64


async def large(_: pb.Call, __: Context) -> bytes:
    """Answer with a result beyond the limit of a payload."""
    return _done(CHUNK * (MIB // len(CHUNK) + 1))


async def huge(_: pb.Call, __: Context) -> bytes:
    """Answer with a result that gRPC itself does not take in."""
    return _done(CHUNK * (6 * MIB // len(CHUNK)))


async def heuristic(_: pb.Call, __: Context) -> bytes:
    """Answer with an outcome that has a meaning only in two-phase commit."""
    outcome = pb.Outcome(heuristic=pb.Heuristic(committed=True, reason="alone"))
    return pb.ExecuteResponse(outcome=outcome).SerializeToString()


async def raising(_: pb.Call, __: Context) -> bytes:
    """Fail in the handler."""
    raise RuntimeError("a bug in the participant")


async def silent(_: pb.Call, __: Context) -> bytes:
    """Never answer."""
    await anyio.sleep_forever()
    raise AssertionError("nobody wakes it")


async def unauthenticated(_: pb.Call, context: Context) -> bytes:
    """Refuse the caller."""
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
    raise AssertionError("abort raises")


async def wordy(_: pb.Call, __: Context) -> bytes:
    """Refuse at length, with what would drive a terminal."""
    rejected = pb.Rejected(reason="\x1b[31mred\n" * 20_000, message="\x07beep\r" * 100_000)
    return pb.ExecuteResponse(outcome=pb.Outcome(rejected=rejected)).SerializeToString()


async def shaky(call: pb.Call, context: Context) -> bytes:
    """Fail twice, then refuse."""
    if call.attempt < 3:
        await context.abort(grpc.StatusCode.INTERNAL, "not now")
    rejected = pb.Outcome(rejected=pb.Rejected(reason="not_ever"))
    return pb.ExecuteResponse(outcome=rejected).SerializeToString()


async def well(_: pb.Call, __: Context) -> bytes:
    """Do as one should."""
    return _done(b"{}")


BEHAVIOURS: Final[dict[str, Behaviour]] = {
    behaviour.__name__: behaviour
    for behaviour in (
        no_outcome,
        garbage,
        large,
        huge,
        heuristic,
        raising,
        silent,
        unauthenticated,
        wordy,
        shaky,
        well,
    )
}
"""By their names, which are actions."""

CONTRACT: Final[str] = pb.DESCRIPTOR.services_by_name["ParticipantService"].full_name
"""The gRPC service of participants."""

POLLS: Final = 3


class OddParticipant:
    """What it does is the action's name; to undo it is always Done, or always Rejected."""

    def __init__(self) -> None:
        self.calls: list[pb.Call] = []
        """All that it was asked."""
        self._asked: Counter[str] = Counter()

    async def execute(self, request: pb.ExecuteRequest, context: Context) -> bytes:
        """Answer as the action says."""
        call = request.call
        self.calls.append(call)
        if call.action == "patient":
            self._asked[call.idempotency_key] += 1
            if self._asked[call.idempotency_key] <= POLLS:
                waits = pb.Outcome(in_progress=pb.InProgress(poll_after_ms=10))
                return pb.ExecuteResponse(outcome=waits).SerializeToString()
        return await BEHAVIOURS.get(call.action, well)(call, context)

    async def compensate(self, request: pb.CompensateRequest, _: Context) -> bytes:
        """Undo it; the action ``stubborn`` refuses to, which a participant must not."""
        self.calls.append(request.call)
        if request.call.action == "stubborn":
            outcome = pb.Outcome(rejected=pb.Rejected(reason="no_refunds"))
        else:
            outcome = pb.Outcome(done=pb.Done())
        return pb.CompensateResponse(outcome=outcome).SerializeToString()


def _done(data: bytes) -> bytes:
    result = types_pb2.Payload(data=data, content_type="text/plain")
    return pb.ExecuteResponse(outcome=pb.Outcome(done=pb.Done(result=result))).SerializeToString()


class LateParticipant:
    """Stands before another participant and lets each Execute through only after its Compensate.

    As a network may: the connection breaks, and what was sent arrives after all.
    """

    def __init__(self, behind: str) -> None:
        self.outcomes: list[pb.Outcome] = []
        """What the participant behind said to the calls that came late."""
        self._behind = behind
        self._held: list[pb.ExecuteRequest] = []

    async def execute(self, request: pb.ExecuteRequest, context: Context) -> bytes:
        """Keep the call, and tell the runtime that the connection broke."""
        request.call.participant = ""  # whom it is for has another name
        self._held.append(request)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
        raise AssertionError("abort raises")

    async def compensate(self, request: pb.CompensateRequest, _: Context) -> bytes:
        """Let it through, and then everything that was kept."""
        async with grpc.aio.insecure_channel(self._behind) as channel:
            stub = participant_pb2_grpc.ParticipantServiceStub(channel)
            request.call.participant = ""
            answer = await stub.Compensate(request)
            while self._held:
                self.outcomes.append((await stub.Execute(self._held.pop(0))).outcome)
        return answer.SerializeToString()


@asynccontextmanager
async def serving(
    participant: OddParticipant | LateParticipant, *services: str
) -> AsyncIterator[str]:
    """Serve it, and give its address; `services` are the gRPC services that it pretends to be."""
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Execute": grpc.unary_unary_rpc_method_handler(
            participant.execute,
            request_deserializer=pb.ExecuteRequest.FromString,
            response_serializer=bytes,
        ),
        "Compensate": grpc.unary_unary_rpc_method_handler(
            participant.compensate,
            request_deserializer=pb.CompensateRequest.FromString,
            response_serializer=bytes,
        ),
    }
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    for service in services:
        handler = grpc.method_handlers_generic_handler(service, methods)
        server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
