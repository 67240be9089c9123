"""SagaService: start sagas, ask for them, wait for them, watch them, cancel them.

A handler checks its request, asks the supervisor or the store, and translates the answer. No saga
runs in a handler: one whose client leaves is cancelled, and what it asked for happens all the same.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import uuid
from collections.abc import AsyncIterable, Callable
from typing import Final

from amends.v1 import saga_pb2, saga_pb2_grpc
from amends_runtime import wire
from amends_runtime.actors.definitions import Definitions
from amends_runtime.actors.saga_actor import ended
from amends_runtime.actors.supervisor import SagaView, StartRequest, Supervisor
from amends_runtime.api.awaiting import AwaitedSagas
from amends_runtime.api.by_hand import stuck_steps, waits_for
from amends_runtime.api.deciding import Decisions
from amends_runtime.api.door import Context, Door, answering, error_for, not_available, streaming
from amends_runtime.api.paging import fitting, question, token_for
from amends_runtime.api.resuming import check_position
from amends_runtime.api.status import ShuttingDown, error_to_proto
from amends_runtime.api.tracing import SagaTraces, TracePage
from amends_runtime.api.validation import MAX_AUTHOR_BYTES, MAX_REASON_BYTES, Checks
from amends_runtime.api.watching import Watchers
from amends_runtime.core.records import SagaState
from amends_runtime.core.saga import Answer, Saga, StepStatus
from amends_runtime.core.tracing import known_traceparent
from amends_runtime.errors import NotFound, Unavailable, WrongState
from amends_runtime.ports import Clock, Insights, LoadedSaga, StoreIdentity, Tombstone

__all__ = ["SagaService"]

MAX_WAIT_MS: Final = 60_000
"""How long a reply is held. Proxies drop calls that are silent for longer; callers ask again."""
MAX_CANCEL_WAIT_MS: Final = 10_000
"""How long CancelSaga waits for the pivot's outcome: one attempt's default time-out."""
MAX_STARTS: Final = 1000
"""Starts of one request: two commits' worth. With more, the first would wait for the last."""
MAX_PAGE: Final = 1000
"""Items of a page."""
DEFAULT_SAGAS_PAGE: Final = 100
"""What a person looks through; a program asks for more."""


class SagaService(saga_pb2_grpc.SagaServiceServicer):
    """Sagas, from the outside. `max_payload_bytes` is the limit of one input."""

    def __init__(
        self,
        *,
        supervisor: Supervisor,
        definitions: Definitions,
        insights: Insights,
        clock: Clock,
        door: Door,
        identity: StoreIdentity,
        traces: SagaTraces,
        max_payload_bytes: int = wire.MAX_PAYLOAD_BYTES,
    ) -> None:
        self.door = door
        self._supervisor = supervisor
        self._definitions = definitions
        self._insights = insights
        self._clock = clock
        self._max_payload_bytes = max_payload_bytes
        self._identity = identity
        self._traces = traces
        self._watchers = Watchers(insights, definitions, identity)
        self._decisions = Decisions(supervisor, insights, identity)

    # -- starting ------------------------------------------------------------------------------

    @answering
    async def StartSaga(
        self, request: saga_pb2.StartSagaRequest, context: Context
    ) -> saga_pb2.StartSagaResponse:
        checks = Checks()
        wait_ms = checks.wait_ms("wait_ms", request.wait_ms, MAX_WAIT_MS)
        start = self._start(checks, request, _traceparent(context))
        if self.door.closing:
            raise ShuttingDown
        view, existed = await self._supervisor.start_saga(start)
        if wait_ms and not view.saga.ended:
            with contextlib.suppress(Unavailable):  # it is started, durably: that is an answer
                view = await self._wait(view.saga.saga_id, wait_ms, context)
        return saga_pb2.StartSagaResponse(
            saga=wire.saga_to_proto(view), existed=existed, ended=view.saga.ended
        )

    def _start(
        self, checks: Checks, request: saga_pb2.StartSagaRequest, of_call: str
    ) -> StartRequest:
        """Raises InvalidRequest. `of_call` is the trace context of the call's metadata."""
        saga_id = checks.new_saga_id("saga_id", request.saga_id)
        name = checks.definition_name("definition", request.definition)
        definition_hash = checks.content_hash("definition_hash", request.definition_hash)
        input_ = checks.payload("input", request.input, self._max_payload_bytes)
        labels = checks.labels("labels", request.labels)
        deadline_ms = checks.duration_ms("deadline_ms", request.deadline_ms)
        traceparent = checks.traceparent("traceparent", request.traceparent)
        checks.passed()
        return StartRequest(
            saga_id=saga_id or _new_saga_id(self._clock.now_ms()),
            definition_name=name,
            definition_hash=definition_hash,
            content_hash=wire.start_content_hash(
                name, definition_hash, input_, labels, deadline_ms
            ),
            input=input_,
            labels=labels,
            deadline_ms=deadline_ms,
            traceparent=traceparent or of_call,
        )

    @answering
    async def StartSagas(
        self, request: saga_pb2.StartSagasRequest, context: Context
    ) -> saga_pb2.StartSagasResponse:
        checks = Checks()
        if len(request.starts) > MAX_STARTS:
            checks.refuse(
                "starts",
                f"{len(request.starts)} of them, and {MAX_STARTS} are the most: send more requests",
            )
        checks.passed()
        if self.door.closing:
            raise ShuttingDown
        response = saga_pb2.StartSagasResponse()
        # What the commit queue has no room for is not even looked at.
        room = self._supervisor.room_for_starts()
        of_call = _traceparent(context)
        starts: list[StartRequest] = []
        results: list[saga_pb2.StartSagasResult] = []
        for number, item in enumerate(request.starts[:room]):
            result = response.results.add()
            try:
                start = self._start(Checks("starts", number), item, of_call)
            except Exception as error:  # noqa: BLE001  # one item's error is that item's answer
                result.error.CopyFrom(error_for(error, "StartSagas", item.saga_id))
            else:
                starts.append(start)
                results.append(result)
        refused = len(request.starts) - room
        if refused > 0:
            result = saga_pb2.StartSagasResult(
                error=error_to_proto(self._supervisor.refuse_starts(refused))
            )
            response.results.extend(itertools.repeat(result, refused))
        outcomes = await self._supervisor.start_sagas(starts)
        for start, result, outcome in zip(starts, results, outcomes, strict=True):
            if isinstance(outcome, Exception):
                result.error.CopyFrom(error_for(outcome, "StartSagas", start.saga_id))
                continue
            view, existed = outcome
            wire.put_saga(result.started.saga, view)
            result.started.existed = existed
            result.started.ended = view.saga.ended
        return response

    # -- asking --------------------------------------------------------------------------------

    @answering
    async def GetSaga(
        self, request: saga_pb2.GetSagaRequest, context: Context
    ) -> saga_pb2.GetSagaResponse:
        checks = Checks()
        saga_id = checks.saga_id("saga_id", request.saga_id)
        checks.passed()
        return saga_pb2.GetSagaResponse(
            saga=wire.saga_to_proto(await self._supervisor.view(saga_id))
        )

    @answering
    async def ListSagas(
        self, request: saga_pb2.ListSagasRequest, context: Context
    ) -> saga_pb2.ListSagasResponse:
        checks = Checks()
        where = checks.filter("filter", request.filter)
        count = checks.page_size("page_size", request.page_size, DEFAULT_SAGAS_PAGE, MAX_PAGE)
        asked = question("sagas", where)
        before_no = checks.page_token("page_token", asked, request.page_token)
        checks.passed()
        # One more than is shown: whether there is a next page.
        found = await self._insights.list_sagas(where, count + 1, before_no)
        page = fitting(map(wire.summary_to_proto, found), count)
        more = len(page) < len(found)
        return saga_pb2.ListSagasResponse(
            sagas=page,
            next_page_token=token_for(asked, found[len(page) - 1].saga_no) if more else "",
        )

    @answering
    async def GetHistory(
        self, request: saga_pb2.GetHistoryRequest, context: Context
    ) -> saga_pb2.GetHistoryResponse:
        checks = Checks()
        saga_id = checks.saga_id("saga_id", request.saga_id)
        count = checks.page_size("page_size", request.page_size, MAX_PAGE, MAX_PAGE)
        asked = question("history", saga_id)
        begin = checks.page_token("page_token", asked, request.page_token) or 0
        checks.passed()
        loaded = await self._loaded(saga_id)
        plan = self._definitions.plan(loaded.definition_hash)
        records = [(turn, record) for turn in loaded.turns for record in turn.records]
        page = fitting(
            (
                wire.record_to_proto(plan, turn.seq, turn.version, record)
                for turn, record in itertools.islice(records, begin, None)
            ),
            count,
        )
        end = begin + len(page)  # a history only grows, so a position in it stays what it is
        return saga_pb2.GetHistoryResponse(
            records=page, next_page_token=token_for(asked, end) if end < len(records) else ""
        )

    @answering
    async def GetTrace(
        self, request: saga_pb2.GetTraceRequest, context: Context
    ) -> saga_pb2.GetTraceResponse:
        wanted = TracePage.of(request)
        loaded = await self._loaded(wanted.saga_id)
        plan = self._definitions.plan(loaded.definition_hash)
        return await self._traces.page(wanted, plan, loaded)

    async def _loaded(self, saga_id: str) -> LoadedSaga:
        loaded = (await self._insights.load([saga_id])).get(saga_id)
        if not isinstance(loaded, LoadedSaga):
            raise _no_history(saga_id, loaded)
        return loaded

    # -- waiting -------------------------------------------------------------------------------

    @answering
    async def WaitSaga(
        self, request: saga_pb2.WaitSagaRequest, context: Context
    ) -> saga_pb2.WaitSagaResponse:
        checks = Checks()
        saga_id = checks.saga_id("saga_id", request.saga_id)
        timeout_ms = checks.wait_ms("timeout_ms", request.timeout_ms, MAX_WAIT_MS) or MAX_WAIT_MS
        checks.passed()
        view = await self._wait(saga_id, timeout_ms, context)
        return saga_pb2.WaitSagaResponse(saga=wire.saga_to_proto(view), ended=view.saga.ended)

    @streaming
    async def AwaitSagas(
        self, requests: AsyncIterable[saga_pb2.AwaitSagasRequest], context: Context
    ) -> None:
        with self.door.holding():
            await AwaitedSagas(self._supervisor, context).run()

    async def _wait(
        self,
        saga_id: str,
        timeout_ms: int,
        context: Context,
        until: Callable[[Saga], bool] = ended,
    ) -> SagaView:
        """Waits within the caller's own deadline, so that there is time left for the answer."""
        timeout_s = timeout_ms / 1000
        remaining_s = context.time_remaining()
        if remaining_s is not None:
            margin_s = min(1.0, remaining_s / 10)
            timeout_s = min(timeout_s, remaining_s - margin_s)
        with self.door.holding():
            return await self._supervisor.wait(saga_id, max(0.0, timeout_s), until)

    @answering
    async def GetDecision(
        self, request: saga_pb2.GetDecisionRequest, context: Context
    ) -> saga_pb2.GetDecisionResponse:
        checks = Checks()
        saga_id = checks.saga_id("saga_id", request.saga_id)
        round_ = checks.round("round", request.round)
        store_id = checks.of_prepare("store_id", request.store_id)
        incarnation = checks.of_prepare("incarnation", request.incarnation)
        checks.passed()
        decision = await self._decisions.find(
            saga_id, round_, store_id=store_id, incarnation=incarnation
        )
        return saga_pb2.GetDecisionResponse(decision=wire.decision_to_proto(decision))

    # -- turning back --------------------------------------------------------------------------

    @answering
    async def CancelSaga(
        self, request: saga_pb2.CancelSagaRequest, context: Context
    ) -> saga_pb2.CancelSagaResponse:
        checks = Checks()
        saga_id = checks.saga_id("saga_id", request.saga_id)
        author = checks.text("author", request.author, MAX_AUTHOR_BYTES)
        reason = checks.text("reason", request.reason, MAX_REASON_BYTES)
        if not reason.strip():
            checks.refuse("reason", "it is missing: say why, it lands in the saga's history")
        checks.passed()
        view, answer = await self._supervisor.cancel_saga(saga_id, author, reason)
        if answer is Answer.WAITS_FOR_PIVOT:
            view, answer = await self._await_pivot(view, context)
        disposition = _DISPOSITIONS.get(answer)
        if disposition is None:
            raise _not_cancelled(view, answer)
        return saga_pb2.CancelSagaResponse(saga=wire.saga_to_proto(view), disposition=disposition)

    async def _await_pivot(self, view: SagaView, context: Context) -> tuple[SagaView, Answer]:
        """Holds the reply for the pivot's outcome, which is what decides about the request."""
        pivot = view.plan.pivot
        assert pivot is not None, "only a pivot is waited for"

        def decided(saga: Saga) -> bool:
            # A stuck pivot waits for an operator, and so would the caller.
            return (
                saga.ended
                or saga.turn is not None
                or saga.steps[pivot].status is not StepStatus.EXECUTING
            )

        try:
            view = await self._wait(view.saga.saga_id, MAX_CANCEL_WAIT_MS, context, decided)
        except Unavailable:
            return view, Answer.WAITS_FOR_PIVOT  # the request is recorded: that is the answer
        if view.saga.state is SagaState.ABANDONED:
            return view, Answer.ENDED  # an operator was faster than the pivot
        if view.saga.turn is not None:
            return view, Answer.TURNED_BACK
        if view.saga.steps[pivot].status is StepStatus.EXECUTED:
            return view, Answer.PAST_NO_RETURN
        return view, Answer.WAITS_FOR_PIVOT

    # -- watching ------------------------------------------------------------------------------

    @streaming
    async def WatchSagas(self, request: saga_pb2.WatchSagasRequest, context: Context) -> None:
        checks = Checks()
        where = checks.filter("filter", request.filter)
        position = checks.resume_token("resume_token", request.resume_token, self._identity)
        checks.passed()
        seq = self._insights.head_seq
        if position is not None:
            seq = check_position(self._identity, position, seq)
        with self._watchers.another(), self.door.holding():
            await self._watchers.watch(where, seq, context)

    # -- what comes later ----------------------------------------------------------------------

    SignalSaga = not_available(
        "signals are not available in this version: definitions with signal waits are refused, too,"
        " so no saga waits for one"
    )


_DISPOSITIONS: Final = {
    Answer.TURNED_BACK: saga_pb2.CANCEL_DISPOSITION_TURNED_BACK,
    Answer.ALREADY_TURNED_BACK: saga_pb2.CANCEL_DISPOSITION_ALREADY_TURNED_BACK,
    Answer.WAITS_FOR_PIVOT: saga_pb2.CANCEL_DISPOSITION_WAITS_FOR_PIVOT,
}


def _not_cancelled(view: SagaView, answer: Answer) -> WrongState:
    saga = view.saga
    metadata = {"saga_id": saga.saga_id, "state": saga.state.name}
    if answer is Answer.COMPLETED:
        return WrongState(
            "SAGA_COMPLETED",
            f"saga {saga.saga_id!r} has completed and nothing of it is undone:"
            " to reverse what it did, start a saga that does the opposite",
            metadata,
        )
    if saga.state is SagaState.MIXED:
        return WrongState(
            "SAGA_MIXED",
            f"saga {saga.saga_id!r} has ended MIXED, and nothing of it is told to anybody any more:"
            " its history says which participant broke its vote, and that is put right there",
            metadata,
        )
    if answer is Answer.ENDED:
        return WrongState(
            "SAGA_ABANDONED",
            f"saga {saga.saga_id!r} was abandoned by an operator and stays as it is: its history"
            " says by whom and why",
            metadata,
        )
    stuck = list(stuck_steps(view))
    if saga.round:
        waited_for = ", ".join(waits_for(view))
        return WrongState(
            "PAST_NO_RETURN",
            f"saga {saga.saga_id!r} has decided COMMIT, which nobody takes back: it waits for"
            f" {waited_for} to acknowledge it, and says it again and again until then; to reverse"
            " what it does, start a saga that does the opposite once it has completed",
            {**metadata, "decision": "COMMIT", "waits_for": waited_for, "stuck": ", ".join(stuck)},
        )
    if stuck:
        return WrongState(
            "PAST_NO_RETURN",
            f"saga {saga.saga_id!r} is past its point of no return, where nothing turns it back,"
            f" and it is stuck at {', '.join(stuck)}, where it does not go on by itself: mend what"
            f" stops it and try again with amends retry {saga.saga_id} --reason WHY, or end it as"
            f" it is with amends abandon {saga.saga_id} --reason WHY",
            {**metadata, "stuck": ", ".join(stuck)},
        )
    return WrongState(
        "PAST_NO_RETURN",
        f"saga {saga.saga_id!r} is past its point of no return: it goes forward and its remaining"
        " steps are tried until they succeed; to reverse what it does, start a saga that does the"
        " opposite once it has completed",
        metadata,
    )


def _no_history(saga_id: str, found: Tombstone | None) -> NotFound:
    if found is None:
        return NotFound(
            "UNKNOWN_SAGA",
            f"there is no saga {saga_id!r} here",
            {"saga_id": saga_id},
        )
    return NotFound(
        "SAGA_PURGED",
        f"saga {saga_id!r} ended {found.state.name} and its history was purged",
        {"saga_id": saga_id, "state": found.state.name},
    )


def _traceparent(context: Context) -> str:
    """The caller's W3C trace context; anything else under that name is left alone, as W3C asks."""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent" and isinstance(value, str) and (known := known_traceparent(value)):
            return known
    return ""


def _new_saga_id(now_ms: int) -> str:
    """A UUIDv7 (RFC 9562): 48 bits of time, so that ids sort by age, and 74 of chance."""
    bits = now_ms << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62 | secrets.randbits(62)
    return str(uuid.UUID(int=bits))
