"""What the handlers of the way in cost by themselves: see `bench_client.py`, which runs this.

The services and the supervisor are the real ones; what lies below, a saga's mailbox and the store,
answers at once. Requests come as bytes and answers leave as bytes, as on the wire.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import msgspec

from amends.v1 import saga_pb2, types_pb2
from amends_runtime.actors.definitions import Definitions
from amends_runtime.actors.supervisor import Limits, Outbox, Supervisor
from amends_runtime.actors.view import SagaView, Told
from amends_runtime.api.awaiting import AwaitedSagas
from amends_runtime.api.door import Door
from amends_runtime.api.service import SagaService
from amends_runtime.api.tracing import SagaTraces
from amends_runtime.clock import SystemClock
from amends_runtime.core.saga import Answer
from amends_runtime.core.tracing import Tracing
from amends_runtime.ports import RegisteredDefinition
from scripts.bench_parts import PLAN, turns_of
from scripts.bench_processes import PAYLOAD


class WayIn:
    """Requests of `batch` items each, again and again."""

    def __init__(self, batch: int) -> None:
        turns = turns_of("s")
        started, ended = turns[0].saga, turns[-1].saga
        self._view = SagaView(PLAN, msgspec.structs.replace(started, definition_hash="f" * 64), 1)
        self._end = SagaView(PLAN, msgspec.structs.replace(ended, definition_hash="f" * 64), 4)
        ids = [f"01890000-0000-7000-8000-{number:012}" for number in range(batch)]
        payload = types_pb2.Payload(data=PAYLOAD, content_type="application/octet-stream")
        self._start_bytes = saga_pb2.StartSagasRequest(
            starts=[
                saga_pb2.StartSagaRequest(saga_id=one, definition="bench", input=payload)
                for one in ids
            ]
        ).SerializeToString()
        self._await_bytes = saga_pb2.AwaitSagasRequest(add=ids).SerializeToString()
        self._supervisor = self._made(Limits())
        self._service = self._served(self._supervisor)
        self._full = self._served(self._made(Limits(commit_queue=0)))

    async def starts(self) -> None:
        """All are started."""
        await self._start(self._service)

    async def refusals(self) -> None:
        """All are refused, for there is no room in the commit queue."""
        await self._start(self._full)

    async def ends(self) -> None:
        """All have ended a moment after they are waited for."""
        waiters: list[asyncio.Future[SagaView | None]] = []

        def waiter_for(_: str) -> asyncio.Future[SagaView | None]:
            waiters.append(asyncio.get_running_loop().create_future())
            return waiters[-1]

        stream = _Stream(self._await_bytes, lambda: _end_all(waiters, self._end))
        self._supervisor.waiter_for = waiter_for  # type: ignore[assignment]  # in place of an actor
        # It has of gRPC's context what is used.
        await AwaitedSagas(self._supervisor, stream).run()  # type: ignore[arg-type]

    async def _start(self, service: SagaService) -> None:
        request = saga_pb2.StartSagasRequest.FromString(self._start_bytes)
        response = await service.StartSagas(request, _Context())  # type: ignore[arg-type]  # as above
        response.SerializeToString()

    def _served(self, supervisor: Supervisor) -> SagaService:
        nothing: Any = None
        return SagaService(
            supervisor=supervisor,
            definitions=nothing,
            insights=nothing,
            clock=SystemClock(),
            door=Door(),
            identity=nothing,
            traces=SagaTraces(Tracing("store"), {}),
        )

    def _made(self, limits: Limits) -> Supervisor:
        nothing: Any = None
        definitions = Definitions(nothing, nothing, frozenset)
        registered = RegisteredDefinition(PLAN.definition, "f" * 64, 1, 0, 1)
        definitions._add(registered)  # noqa: SLF001  # without a store
        supervisor = Supervisor(
            nothing,
            definitions,
            clock=SystemClock(),
            observer=nothing,
            limits=limits,
            outbox=Outbox(nothing, nothing, nothing, nothing, nothing),
            tracing=Tracing("store"),
        )

        def post(*_: object) -> asyncio.Future[Told]:
            told: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
            told.set_result(Told(Answer.STARTED, self._view))
            return told

        supervisor._post = post  # type: ignore[assignment]  # noqa: SLF001  # in place of a mailbox
        return supervisor


class _Context:
    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("user-agent", "grpc-python-asyncio/1.0"),)


class _Stream:
    """A client that adds all ids at once, and is told their ends."""

    def __init__(self, request: bytes, said: Any) -> None:
        self._requests = [request]
        self._said = said

    async def read(self) -> object:
        """The one request; when it has been taken in, all end, and there is no further one."""
        if self._requests:
            return saga_pb2.AwaitSagasRequest.FromString(self._requests.pop())
        self._said()
        return grpc.aio.EOF

    async def write(self, message: saga_pb2.AwaitSagasResponse) -> None:
        """Takes some ends."""
        message.SerializeToString()


def _end_all(waiters: list[asyncio.Future[SagaView | None]], end: SagaView) -> None:
    for waiter in waiters:
        waiter.set_result(end)
