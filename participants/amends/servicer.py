"""The gRPC service: each verb by itself, and the stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any, NoReturn, TypeAlias

import grpc.aio

from amends.admission import DEFAULT_MAX_CONCURRENT, Admission
from amends.answering import Answering, NoOutcome, tell
from amends.barrier import Barrier
from amends.exchange import Exchange
from amends.handler import Handler
from amends.outcomes import Outcome, Verb
from amends.tracing import CallTracer
from amends.v1 import participant_pb2, participant_pb2_grpc

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Request: TypeAlias = (
    participant_pb2.PrepareRequest
    | participant_pb2.ExecuteRequest
    | participant_pb2.CompensateRequest
)


class ParticipantServicer(participant_pb2_grpc.ParticipantServiceServicer):
    """Serves the three unary verbs of one participant, and the stream of the same calls.

    What a call is answered with stands in `answering.py`, and is the same for both.
    """

    def __init__(
        self,
        name: str,
        handlers: Mapping[tuple[str, Verb], Handler],
        barrier: Barrier,
        *,
        aliases: Collection[str] = (),
        max_concurrent: int = DEFAULT_MAX_CONCURRENT,
    ) -> None:
        self._answering = Answering(
            name, handlers, barrier, aliases=aliases, max_concurrent=max_concurrent
        )
        self._tracer = CallTracer(name)
        self._streams: set[Exchange] = set()

    @property
    def admission(self) -> Admission:
        """The calls under way, and those that wait."""
        return self._answering.admission

    def begin_draining(self) -> None:
        """Take no new calls and no new streams; those under way are still answered."""
        self.admission.is_draining = True
        for stream in self._streams:
            stream.begin_draining()

    async def Prepare(
        self, request: participant_pb2.PrepareRequest, context: Context
    ) -> participant_pb2.PrepareResponse:
        """Vote."""
        response = participant_pb2.PrepareResponse()
        await self._answer(Verb.PREPARE, request, response.outcome, context)
        return response

    async def Execute(
        self, request: participant_pb2.ExecuteRequest, context: Context
    ) -> participant_pb2.ExecuteResponse:
        """Do the action."""
        response = participant_pb2.ExecuteResponse()
        await self._answer(Verb.EXECUTE, request, response.outcome, context)
        return response

    async def Compensate(
        self, request: participant_pb2.CompensateRequest, context: Context
    ) -> participant_pb2.CompensateResponse:
        """Undo the action."""
        response = participant_pb2.CompensateResponse()
        await self._answer(Verb.COMPENSATE, request, response.outcome, context)
        return response

    # grpc.aio takes a coroutine, too; the generated types know iterators only.
    async def Exchange(  # type: ignore[override]
        self, request_iterator: AsyncIterator[participant_pb2.ExchangeRequest], context: Context
    ) -> None:
        """Answer calls in batches."""
        stream = Exchange(self._answering, self._tracer, context)
        self._streams.add(stream)
        try:
            refusal = await stream.serve()
        finally:
            self._streams.discard(stream)
        try:
            if refusal is not None:
                await _abort(context, refusal)
        finally:
            if stream.interrupt is not None:
                # Only now that the status is sent: it stops the event loop.
                raise stream.interrupt

    async def _answer(
        self,
        verb: Verb,
        request: Request,
        answer: participant_pb2.Outcome,
        context: Context,
    ) -> None:
        self._tracer.look()
        with self._tracer.span(verb, request.call) as span:
            outcome = await self._outcome(verb, request, answer)
            tell(span, outcome)
        if isinstance(outcome, NoOutcome):
            await _abort(context, outcome)

    async def _outcome(
        self, verb: Verb, request: Request, answer: participant_pb2.Outcome
    ) -> Outcome | NoOutcome:
        message = request.call if request.HasField("call") else None
        call = self._answering.admit(message, verb)
        if isinstance(call, NoOutcome):
            return call
        await self.admission.wait_entered()
        try:
            outcome = await self._answering.ask(call)
        finally:
            self.admission.leave()
        if isinstance(outcome, NoOutcome):
            return outcome
        return self._answering.put(outcome, answer) or outcome


async def _abort(context: Context, why: NoOutcome) -> NoReturn:
    await context.abort(why.code, why.message)
    raise AssertionError("abort raises")
