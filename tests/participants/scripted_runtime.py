"""A server that answers a client's calls as a test says: real gRPC, real statuses on the wire.

For what a real runtime does only at unlucky moments: to be silent, to die between a request and its
answer, to be overloaded once. What a client sees of a running runtime is tested with the real one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc.aio
from google.protobuf import any_pb2
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from amends.v1 import operator_pb2, saga_pb2

Request = TypeVar("Request", bound=Message)

METHODS = {
    f"/{service.full_name}/{method.name}": method
    for service in (
        saga_pb2.DESCRIPTOR.services_by_name["SagaService"],
        operator_pb2.DESCRIPTOR.services_by_name["OperatorService"],
    )
    for method in service.methods
}


@dataclass(frozen=True)
class Refusal:
    """An error status, with what the runtime attaches to it."""

    code: grpc.StatusCode
    message: str = "no"
    reason: str = ""
    domain: str = "amends"
    metadata: tuple[tuple[str, str], ...] = ()
    violations: tuple[tuple[str, str], ...] = ()
    retry_after_ms: int | None = None
    raw_details: bytes | None = None
    """Sent as they are in place of all that."""

    def trailers(self) -> tuple[tuple[str, bytes], ...]:
        """Give the trailing metadata."""
        if self.raw_details is not None:
            return (("grpc-status-details-bin", self.raw_details),)
        details: list[Message] = []
        if self.reason:
            info = error_details_pb2.ErrorInfo(reason=self.reason, domain=self.domain)
            info.metadata.update(self.metadata)
            details.append(info)
        if self.violations:
            kind = error_details_pb2.BadRequest.FieldViolation
            found = [kind(field=field, description=text) for field, text in self.violations]
            details.append(error_details_pb2.BadRequest(field_violations=found))
        if self.retry_after_ms is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(self.retry_after_ms)
            details.append(retry)
        if not details:
            return ()
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return (("grpc-status-details-bin", status.SerializeToString()),)


Answer = Message | bytes | Refusal | Callable[[Any], Awaitable[Message]]
"""A reply, bytes that may be none, an error, or a function of the request that gives the reply when
it likes, or raises `Hangup`."""

Conversation = Callable[["Talk"], Awaitable[None]]
"""What the runtime says on a stream and hears there, until it returns or raises `Hangup`."""


class Hangup(Exception):
    """The runtime ends a stream, or answers a call, with an error."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal


class Left(Exception):
    """The client has said its last on a stream: so ends what is said to it."""


class Talk:
    """The runtime's side of one stream in both directions."""

    def __init__(self, runtime: ScriptedRuntime, method: str, context: Any) -> None:
        self._runtime = runtime
        self._method = method
        self._context = context

    async def hear(self) -> Any:
        """Give the client's next message, which counts as a call of the method; or raise `Left`."""
        message = await self._context.read()
        if not isinstance(message, Message):
            raise Left
        self._runtime.asked.append((self._method, message))
        return message

    async def say(self, message: Message | bytes) -> None:
        """Send a message, or bytes that may be none."""
        await self._context.write(message)


class ScriptedRuntime(grpc.GenericRpcHandler):
    """Answers each method's calls with the answers it was given, the last of them for ever."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.address = ""
        self._credentials = credentials
        self.asked: list[tuple[str, Message]] = []
        """Each call so far: the method's name and the request."""
        self._answers: dict[str, list[Answer]] = {}
        self._conversations: dict[str, list[Conversation]] = {}
        self.streams = 0
        """Streams in both directions that were opened so far."""
        self._server: grpc.aio.Server | None = None

    def answer(self, method: str, *answers: Answer) -> None:
        """Give the answers to the next calls of a method."""
        assert any(path.endswith(f"/{method}") for path in METHODS), method
        self._answers[method] = list(answers)

    def converse(self, method: str, *conversations: Conversation) -> None:
        """Give what happens on the next streams of a method, the last one for ever."""
        self._conversations[method] = list(conversations)

    def requests(self, kind: type[Request]) -> list[Request]:
        """Give the requests of one kind, in order."""
        return [request for _, request in self.asked if isinstance(request, kind)]

    async def start(self) -> None:
        """Listen; at the second start where it listened before."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers([self])
        listen = self.address or "127.0.0.1:0"
        if self._credentials is None:
            port = self._server.add_insecure_port(listen)
        else:
            port = self._server.add_secure_port(listen, self._credentials)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def die(self) -> None:
        """Stop at once, as a killed process does: what is under way gets no answer."""
        assert self._server is not None
        await self._server.stop(grace=None)

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Find the handler of a method; there is none for methods without answers."""
        method = METHODS.get(handler_call_details.method)
        if method is not None and method.name in self._conversations:
            return self._stream(method)
        if method is None or method.name not in self._answers:
            return None

        async def handle(request: Message, context: Any) -> Message | bytes:
            self.asked.append((method.name, request))
            answers = self._answers[method.name]
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            match answer:
                case Refusal():
                    await context.abort(answer.code, answer.message, answer.trailers())
                    raise AssertionError("abort raises")
                case Message() | bytes():
                    return answer
                case _:
                    try:
                        return await answer(request)
                    except Hangup as hangup:
                        refusal = hangup.refusal
                        await context.abort(refusal.code, refusal.message, refusal.trailers())
                        raise AssertionError("abort raises") from None

        return grpc.unary_unary_rpc_method_handler(
            handle,
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=_serialize,
        )

    def _stream(self, method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(_: Any, context: Any) -> None:
            self.streams += 1
            conversations = self._conversations[method.name]
            converse = conversations.pop(0) if len(conversations) > 1 else conversations[0]
            try:
                await converse(Talk(self, method.name, context))
            except Left:
                return
            except Hangup as hangup:
                refusal = hangup.refusal
                await context.abort(refusal.code, refusal.message, refusal.trailers())

        return grpc.stream_stream_rpc_method_handler(
            handle,
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=_serialize,
        )


def _serialize(reply: Message | bytes) -> bytes:
    return reply if isinstance(reply, bytes) else reply.SerializeToString()


@asynccontextmanager
async def scripted_runtime() -> AsyncIterator[ScriptedRuntime]:
    """Run one for the length of the block."""
    runtime = ScriptedRuntime()
    await runtime.start()
    try:
        yield runtime
    finally:
        await runtime.die()


def names(calls: Sequence[tuple[str, Message]]) -> list[str]:
    """Give the methods of calls."""
    return [method for method, _ in calls]
