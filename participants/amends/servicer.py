"""The gRPC service: from a request to a handler's outcome, or to an error that decides nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

import grpc
import grpc.aio

from amends.barrier import Barrier
from amends.errors import AmendsError, BarrierError, HandlerFailed, NotCompensatable
from amends.handler import Handler
from amends.outcomes import Broken, Call, Outcome, Verb
from amends.tracing import CallTracer
from amends.v1 import participant_pb2, participant_pb2_grpc
from amends.wire import call_from_wire, faults_in_call, outcome_to_wire

logger = logging.getLogger(__name__)

DEFAULT_MAX_CONCURRENT: Final = 256
"""Handlers at once; the runtime keeps as many calls live per participant."""

MAX_QUEUED: Final = 4096
"""Calls that wait for a place, each within its own deadline: 16 runtimes with full lanes."""

MAX_SHOWN: Final = 48
"""Characters of a name that is not ours; a real one has no more."""

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class Admission:
    """Who may come in: so many handlers at once, so many calls waiting, none while draining.

    gRPC's own `maximum_concurrent_rpcs` has been ignored in several releases.
    """

    def __init__(self, max_concurrent: int) -> None:
        self._max_concurrent = max_concurrent
        self._places = asyncio.Semaphore(max_concurrent)
        self._inside = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.is_draining = False

    @property
    def inside(self) -> int:
        """How many calls are under way or wait for a place."""
        return self._inside

    def is_full(self) -> bool:
        """Tell whether one more call would wait behind too many."""
        return self._inside >= self._max_concurrent + MAX_QUEUED

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place and hold it; the call's own deadline bounds the wait."""
        self._inside += 1
        self._is_idle.clear()
        try:
            async with self._places:
                yield
        finally:
            self._inside -= 1
            if self._inside == 0:
                self._is_idle.set()

    async def wait_idle(self) -> None:
        """Wait until no call is inside."""
        await self._is_idle.wait()


@dataclass(frozen=True, slots=True)
class NoOutcome:
    """The gRPC error that stands for an unknown outcome."""

    code: grpc.StatusCode
    message: str
    kind: str = ""
    """Type of the exception behind it, if there is one."""


class ParticipantServicer(participant_pb2_grpc.ParticipantServiceServicer):
    """Serves the three unary verbs of one participant.

    Only an outcome in a gRPC ``OK`` decides anything; every error status leaves the outcome open
    and the runtime asks again. Logs and errors name ids, never payloads; only
    the tracebacks of failed handlers, logged at DEBUG, may quote one.
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
        self.admission = Admission(max_concurrent)
        self._name = name
        self._aliases = sorted(aliases)
        # An older runtime does not say whom it calls.
        self._answers_to = frozenset(("", name, *aliases))
        self._handlers = handlers
        self._barrier = barrier
        self._tracer = CallTracer(name)

    async def Prepare(
        self, request: participant_pb2.PrepareRequest, context: Context
    ) -> participant_pb2.PrepareResponse:
        """Vote."""
        outcome = await self._answer(Verb.PREPARE, request, context)
        return participant_pb2.PrepareResponse(outcome=outcome)

    async def Execute(
        self, request: participant_pb2.ExecuteRequest, context: Context
    ) -> participant_pb2.ExecuteResponse:
        """Do the action."""
        outcome = await self._answer(Verb.EXECUTE, request, context)
        return participant_pb2.ExecuteResponse(outcome=outcome)

    async def Compensate(
        self, request: participant_pb2.CompensateRequest, context: Context
    ) -> participant_pb2.CompensateResponse:
        """Undo the action."""
        outcome = await self._answer(Verb.COMPENSATE, request, context)
        return participant_pb2.CompensateResponse(outcome=outcome)

    # grpc.aio takes a coroutine, too; the generated types know iterators only.
    async def Exchange(  # type: ignore[override]
        self, request_iterator: AsyncIterator[participant_pb2.ExchangeRequest], context: Context
    ) -> NoReturn:
        """Refuse: a runtime then uses the unary verbs."""
        await _abort(
            context, grpc.StatusCode.UNIMPLEMENTED, "Exchange is not served; use the unary verbs"
        )

    async def _answer(
        self,
        verb: Verb,
        request: participant_pb2.PrepareRequest
        | participant_pb2.ExecuteRequest
        | participant_pb2.CompensateRequest,
        context: Context,
    ) -> participant_pb2.Outcome:
        with self._tracer.span(verb, request.call) as span:
            outcome = await self._admit(verb, request)
            if isinstance(outcome, NoOutcome):
                span.failed(outcome.code.name, outcome.kind)
            else:
                span.decided(outcome)
        if isinstance(outcome, NoOutcome):
            await _abort(context, outcome.code, outcome.message)
        return outcome_to_wire(outcome)

    async def _admit(
        self,
        verb: Verb,
        request: participant_pb2.PrepareRequest
        | participant_pb2.ExecuteRequest
        | participant_pb2.CompensateRequest,
    ) -> Outcome | NoOutcome:
        """Refuse what cannot be answered; else wait for a place and give the answer."""
        if self.admission.is_draining:
            return NoOutcome(
                grpc.StatusCode.UNAVAILABLE,
                f"participant {self._name} is shutting down and takes no new calls",
            )
        if self.admission.is_full():
            return NoOutcome(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"participant {self._name} has {self.admission.inside} calls under way or waiting; "
                "nothing was done",
            )
        if not request.HasField("call"):
            return NoOutcome(grpc.StatusCode.INVALID_ARGUMENT, "call is missing")
        faults = faults_in_call(request.call, verb)
        if faults:
            return NoOutcome(grpc.StatusCode.INVALID_ARGUMENT, "; ".join(faults))
        call = call_from_wire(request.call)
        if request.call.participant not in self._answers_to:
            stranger = self._not_for_us(request.call.participant)
            logger.error("%s: refused: %s", _ids(call), stranger)
            return NoOutcome(grpc.StatusCode.UNIMPLEMENTED, stranger)
        async with self.admission.place():
            return await self._ask(call)

    async def _ask(self, call: Call) -> Outcome | NoOutcome:
        handler = self._handlers.get((call.action, call.verb))
        # An action without a compensation still has a barrier, which knows whether there is
        # anything to undo.
        is_known = handler is not None or (
            call.verb is Verb.COMPENSATE and (call.action, Verb.EXECUTE) in self._handlers
        )
        if not is_known:
            return NoOutcome(grpc.StatusCode.UNIMPLEMENTED, self._unknown(call))
        try:
            outcome = await self._barrier.run(call, handler)
        except asyncio.CancelledError:
            logger.info("%s: the caller left or its deadline passed", _ids(call))
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, the outcome is unknown
            return self._explain(call, error)
        if isinstance(outcome, Broken):
            logger.error("%s: broken: %s", _ids(call), outcome)
        return outcome

    def _explain(self, call: Call, error: Exception) -> NoOutcome:
        """Log why there is no outcome, and give the status that says so."""
        kind = type(error).__name__
        # At DEBUG alone: the message of an author's exception may quote a payload.
        logger.debug("%s: the traceback of what follows", _ids(call), exc_info=error)
        match error:
            case HandlerFailed():
                logger.error("%s: outcome unknown: %s [at %s]", _ids(call), error, error.where)
                message = f"{error}; see the log of participant {self._name}"
                # What gRPC makes of a handler that raises, in every language. It says nothing about
                # the endpoint, so it opens no breaker: one action's fault is not its neighbours'.
                return NoOutcome(grpc.StatusCode.UNKNOWN, message, error.cause_type or kind)
            case NotCompensatable():
                logger.error("%s: %s", _ids(call), error)
                return NoOutcome(grpc.StatusCode.UNIMPLEMENTED, str(error), kind)
            case BarrierError():
                logger.error("%s: outcome unknown: %s", _ids(call), error)
                return NoOutcome(grpc.StatusCode.UNAVAILABLE, str(error), kind)
            case AmendsError():
                logger.error("%s: outcome unknown: %s", _ids(call), error)
                return NoOutcome(grpc.StatusCode.UNKNOWN, str(error), kind)
            case _:
                # A fault of our own. Its message may quote anything, so only its type is told.
                logger.critical("%s: outcome unknown: the SDK failed: %s", _ids(call), kind)
                return NoOutcome(grpc.StatusCode.INTERNAL, f"the SDK failed: {kind}", kind)

    def _not_for_us(self, participant: str) -> str:
        name = repr(self._name)
        also = f" (or {', '.join(map(repr, self._aliases))})" if self._aliases else ""
        wanted = repr(participant[:MAX_SHOWN])
        return (
            f"this is participant {name}{also}, and the call is for {wanted}: is the address of "
            f"{wanted} right? (amends participants add {wanted[1:-1]}=HOST:PORT) If it is, {name} "
            f"needs the alias {wanted}"
        )

    def _unknown(self, call: Call) -> str:
        verbs = ", ".join(f"{verb} {action}" for action, verb in sorted(self._handlers))
        return (
            f"participant {self._name} has no {call.verb} for action {call.action!r}; it has: "
            f"{verbs}"
        )


async def _abort(context: Context, code: grpc.StatusCode, message: str) -> NoReturn:
    await context.abort(code, message)
    raise AssertionError("abort raises")


def _ids(call: Call) -> str:
    return (
        f"{call.verb} {call.action} saga={call.saga_id} step={call.step} round={call.round} "
        f"attempt={call.attempt}"
    )
