"""The client: start sagas, ask for them, wait for them, cancel them; register definitions.

::

    async with amends.Client("127.0.0.1:7233") as client:
        await client.register(order)
        started = await client.start("order", {"sku": "A"})
        saga = await started.result()
        print(saga.state)

Every call survives a restart of the runtime: it is asked again, as it is, until its time is over.
A start has its id before anything is sent, so that it never happens twice.

Starts and waits of many tasks share requests: ten thousand tasks that each start a saga and wait
for it, as above, cost some ten requests and one stream. How, is told in `starting` and `awaiting`.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Final, Self, TypeVar

import anyio
import grpc

from amends.arguments import (
    checked_labels,
    checked_round,
    checked_seconds,
    checked_text,
    checked_traceparent,
    checked_whole,
)
from amends.awaiting import Waits
from amends.connection import Connection, closed_error
from amends.deadlines import Deadlines
from amends.definition import Definition
from amends.errors import (
    AlreadyExists,
    ApiError,
    StartUnknown,
    WaitTimeout,
)
from amends.ids import new_saga_id
from amends.in_doubt import Decision
from amends.payload import EMPTY, encode
from amends.room import MAX_REQUESTS
from amends.saga_wire import (
    abandoned_from_wire,
    breaker_from_wire,
    cancelled_from_wire,
    decision_from_wire,
    diff_from_wire,
    participant_from_wire,
    record_from_wire,
    registered_from_wire,
    runtime_from_wire,
    saga_from_wire,
    state_to_wire,
    trace_from_wire,
    watched_from_wire,
    with_input,
)
from amends.sagas import (
    Abandoned,
    BreakerInfo,
    CancelResult,
    DefinitionDiff,
    ParticipantInfo,
    Record,
    RegisteredDefinition,
    RuntimeInfo,
    Saga,
    SagaState,
    Trace,
    WatchEvent,
)
from amends.starting import Starts
from amends.tls import ClientTls
from amends.tracing import current_traceparent
from amends.v1 import operator_pb2, operator_pb2_grpc, saga_pb2, saga_pb2_grpc, types_pb2

Request = TypeVar("Request")
Response = TypeVar("Response")

DEFAULT_TIMEOUT_S: Final = 10.0
"""A commit takes milliseconds; this leaves room for a runtime that restarts meanwhile."""
MAX_WAITING_STARTS: Final = 10_000
"""A second or two of what a runtime takes: in a longer queue starts only lose their time."""
MAX_PORT: Final = 65_535
PAGE_SIZE: Final = 100
"""Sagas per page: a page is some 50 KB, and the first ones come soon."""


class Client:
    """A connection to a runtime.

    Use it with ``async with``, in one event loop (in another one its methods raise `RuntimeError`);
    make one per process and share it, since all of its calls go over one connection. Any number of
    tasks may call it at once, and each that starts a saga or waits for one does so by itself: what
    they share, they share unseen.

    `target` is ``host:port``, or ``unix:path``; with `tls` the connection is encrypted, and the
    files are read when the block is entered, which raises `InvalidTls`. `timeout_s` bounds each
    call, together with all of its attempts. With `retry_unavailable` False a runtime that cannot be
    reached is reported at once, instead of being asked again until then; for a person who waits at
    a terminal. `max_waiting_starts` bounds the starts that are not sent yet: one more of them is
    refused at once with `Overloaded`.

    Every method raises `ApiError`, in the kinds that `amends.errors` draws: `Unavailable` and
    `DeadlineExceeded` for the runtime's part, the others for the request's. Arguments that cannot
    be sent are a `TypeError` or a `ValueError`; a duration is at most ten years.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: ClientTls | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry_unavailable: bool = True,
        max_waiting_starts: int = MAX_WAITING_STARTS,
    ) -> None:
        _check_target(target)
        checked_seconds("timeout_s", timeout_s)
        self.target = target
        """Where the runtime is."""
        self._tls = tls
        self._timeout_s = timeout_s
        self._retry_unavailable = retry_unavailable
        self._max_waiting_starts = checked_whole("max_waiting_starts", max_waiting_starts)
        self._open: _Wire | None = None

    async def __aenter__(self) -> Self:
        if self._open is not None:
            raise RuntimeError("this client is open already: use one `async with` per client")
        self._open = _Wire(
            self.target,
            self._tls,
            retry_unavailable=self._retry_unavailable,
            max_waiting_starts=self._max_waiting_starts,
        )
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._open is not None:
            wire = self._wire()
            self._open = None
            await wire.close()

    # -- sagas -------------------------------------------------------------------------------------

    async def start(
        self,
        definition: str,
        input: object = None,  # noqa: A002  # the word that the contract and the handlers use
        *,
        saga_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        deadline_s: float | None = None,
        definition_hash: str | None = None,
        traceparent: str | None = None,
        wait_s: float | None = None,
        timeout_s: float | None = None,
    ) -> StartedSaga:
        """Start a saga; return once its start is durable.

        `input` is handed to every step: a JSON value, bytes, or a `Payload`. `saga_id` is your own
        id, by which a repeated start is the same start; without one it is a new UUIDv7. `labels`
        are for `list`. `deadline_s`, from now, overrides the definition's. `definition_hash` names
        a version; by default it is the latest. With `wait_s` the answer is held until the saga has
        ended, at most so long; look at `StartedSaga.saga` for where it stands then.

        `traceparent` is the W3C trace context of the span whose trace the saga joins (or is linked
        to, if the runtime's configuration says so): by default that of OpenTelemetry's current
        span, if there is one. With ``""``, or a text that is none, the saga's trace is its own. It
        is no part of what makes a repeated start the same start.

        The start is asked again under the same id for `timeout_s` (by default the client's), and
        never happens twice. A caller who is cancelled meanwhile knows nothing of it, unless it gave
        its own `saga_id`. Starts of many tasks at once share requests, each with its own time
        and its own answer; one waits at most for the request before it to be answered.

        Raises `AlreadyExists` if the id is taken by a saga of other content; `NotFound` if there is
        no such definition; `StartUnknown` if the time is over and the saga may have been started;
        `Unavailable` if it has certainly not been; `PayloadError` for an input that cannot be sent.
        """
        if saga_id is None:
            saga_id = new_saga_id()
        elif not checked_text("saga_id", saga_id):
            raise ValueError("saga_id is empty: leave it out, and one is made for you")
        timeout_s = (
            self._timeout_s if timeout_s is None else checked_seconds("timeout_s", timeout_s)
        )
        hold_s = 0.0 if wait_s is None else checked_seconds("wait_s", wait_s, least=0.0)
        payload = EMPTY if input is None else encode(input)
        request = saga_pb2.StartSagaRequest(
            saga_id=saga_id, definition=checked_text("definition", definition)
        )
        # Field by field: to set one to nothing costs as much as to set it.
        request.input.data = payload.data
        request.input.content_type = payload.content_type
        if definition_hash:
            request.definition_hash = checked_text("definition_hash", definition_hash)
        if labels is not None:
            request.labels.update(checked_labels(labels))
        if deadline_s is not None:
            request.deadline_ms = _to_ms(checked_seconds("deadline_s", deadline_s))
        # Now, since a batch leaves in another task, whose current span is nobody's.
        if (
            known := current_traceparent()
            if traceparent is None
            else checked_traceparent(traceparent)
        ):
            request.traceparent = known

        wait_until = time.monotonic() + hold_s
        wire = self._wire()
        try:
            started = await wire.starts.start(request, timeout_s, hold_s)
        except ApiError as error:
            if error.in_doubt and not isinstance(error, AlreadyExists):
                raise StartUnknown(saga_id, _start_unknown(saga_id, error)) from error
            raise
        # The runtime's answer to many starts leaves the input out; it is the one that was sent.
        saga, is_whole = with_input(started.saga, payload), started.is_whole
        if not is_whole and (started.unheld is not None or time.monotonic() < wait_until):
            saga, is_whole = await _wait_longer(wire.waits, saga, wait_until, started.unheld)
        return StartedSaga(self, saga, existed=started.existed, is_whole=is_whole)

    def handle(self, saga_id: str) -> SagaHandle:
        """Give a handle to a saga by its id, without asking the runtime."""
        return SagaHandle(self, checked_text("saga_id", saga_id))

    async def get(self, saga_id: str, *, timeout_s: float | None = None) -> Saga:
        """Give a saga as it stands. Raises `NotFound`."""
        stub = self._wire().sagas
        request = saga_pb2.GetSagaRequest(saga_id=checked_text("saga_id", saga_id))
        return saga_from_wire((await self._call(stub.GetSaga, request, timeout_s)).saga)

    async def list(
        self,
        *,
        state: SagaState | Iterable[SagaState] | None = None,
        definition: str | None = None,
        labels: Mapping[str, str] | None = None,
        started_from_ms: int | None = None,
        started_before_ms: int | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[Saga]:
        """Give sagas, newest first, without steps and payloads; use it with ``async for``.

        All conditions that are given must hold: one of the states; the definition's name; each of
        the labels with its value; started at or after, and before, these instants. `limit` is how
        many at most; by default all. Pages are asked for as they are needed.
        """
        stub = self._wire().sagas
        saga_filter = _saga_filter(state, definition, labels, started_from_ms, started_before_ms)
        left = math.inf if limit is None else checked_whole("limit", limit)
        page_token = ""
        while left > 0:
            request = saga_pb2.ListSagasRequest(
                filter=saga_filter, page_size=int(min(left, PAGE_SIZE)), page_token=page_token
            )
            page = await self._call(stub.ListSagas, request)
            for message in page.sagas:
                yield saga_from_wire(message)
            left -= len(page.sagas)
            page_token = page.next_page_token
            if not page_token:
                return

    async def wait(self, saga_id: str, *, timeout_s: float | None = None) -> Saga:
        """Wait until a saga has ended, in whatever way, and return it.

        With `timeout_s` None for ever, through restarts of the runtime. A stuck saga has not ended.
        Raises `WaitTimeout` if it has not ended by then, `NotFound` if there is no such saga, and
        `Unavailable` or `DeadlineExceeded` if the runtime did not answer at all.
        """
        until = (
            math.inf
            if timeout_s is None
            else time.monotonic() + checked_seconds("timeout_s", timeout_s, least=0.0)
        )
        return await self._wire().waits.wait(checked_text("saga_id", saga_id), until)

    async def history(self, saga_id: str) -> AsyncIterator[Record]:
        """Give a saga's records, oldest first; use it with ``async for``.

        Pages are asked for as they are needed. Raises `NotFound`.
        """
        stub = self._wire().sagas
        saga_id = checked_text("saga_id", saga_id)
        page_token = ""
        while True:
            request = saga_pb2.GetHistoryRequest(saga_id=saga_id, page_token=page_token)
            page = await self._call(stub.GetHistory, request)
            for message in page.records:
                yield record_from_wire(message)
            page_token = page.next_page_token
            if not page_token:
                return

    async def trace(
        self, saga_id: str, *, include_open: bool = False, timeout_s: float | None = None
    ) -> Trace:
        """Give a saga's trace, made anew from its history. Raises `NotFound`.

        With `include_open` also spans that have not ended: they end at the last record, and are
        marked by the attribute ``amends.open``. A long trace comes in pages, each with `timeout_s`.
        """
        stub = self._wire().sagas
        request = saga_pb2.GetTraceRequest(
            saga_id=checked_text("saga_id", saga_id), include_open=include_open
        )
        pages = [await self._call(stub.GetTrace, request, timeout_s)]
        while pages[-1].next_page_token:
            request.page_token = pages[-1].next_page_token
            pages.append(await self._call(stub.GetTrace, request, timeout_s))
        return trace_from_wire(pages)

    async def cancel(
        self, saga_id: str, *, reason: str, author: str, timeout_s: float | None = None
    ) -> CancelResult:
        """Turn a saga back if it still can be; return once the request is durable.

        `author` and `reason` land in the saga's history. Raises `WrongState` if it is past the
        point of no return or has ended, and `NotFound`.
        """
        stub = self._wire().sagas
        request = saga_pb2.CancelSagaRequest(
            saga_id=checked_text("saga_id", saga_id),
            author=checked_text("author", author),
            reason=checked_text("reason", reason),
        )
        return cancelled_from_wire(await self._call(stub.CancelSaga, request, timeout_s))

    async def get_decision(
        self,
        saga_id: str,
        round: int,  # noqa: A002  # the contract's word
        *,
        store_id: str,
        incarnation: str,
        timeout_s: float | None = None,
    ) -> Decision:
        """Ask whether one round of a two-phase commit is to be committed or rolled back.

        For a participant that has voted yes and was not told: all four arguments are those of the
        call of Prepare. Only `Decision.COMMIT` and `Decision.ABORT` may be carried out; after any
        other answer, and after an error, what is prepared stays prepared. `InDoubtResolver` does
        all of that.
        """
        stub = self._wire().sagas
        request = saga_pb2.GetDecisionRequest(
            saga_id=checked_text("saga_id", saga_id),
            round=checked_round(round),
            store_id=checked_text("store_id", store_id),
            incarnation=checked_text("incarnation", incarnation),
        )
        return decision_from_wire(await self._call(stub.GetDecision, request, timeout_s))

    async def watch(
        self,
        *,
        state: SagaState | Iterable[SagaState] | None = None,
        definition: str | None = None,
        labels: Mapping[str, str] | None = None,
        started_from_ms: int | None = None,
        started_before_ms: int | None = None,
        resume_token: str | None = None,
    ) -> AsyncIterator[WatchEvent]:
        """Give the records of matching sagas as they are committed; use it with ``async for``.

        The conditions are those of `list`, with `state` for the saga's state after the turn: what
        was stuck for a moment is found by ``STUCK``. The first event is a notice without saga: from
        then on, everything that is committed is told, in that order, once. With `resume_token`,
        from an event before, it goes on after that event instead.

        It has no end: through restarts of the runtime it goes on from where it was. Who reads
        slowly misses nothing, and sees `WatchEvent.lagged` when far behind. Raises `InvalidRequest`
        for a token of another store; `WrongState` for one that the store cannot go on from, since
        it was restored from a backup: look at the lists, and begin anew; `Overloaded` if too many
        watch; `Unavailable` if the runtime cannot be reached at the beginning.
        """
        wire = self._wire()
        request = saga_pb2.WatchSagasRequest(
            filter=_saga_filter(state, definition, labels, started_from_ms, started_before_ms),
            resume_token=checked_text("resume_token", resume_token or ""),
        )
        responses = wire.connection.follow(wire.sagas.WatchSagas, lambda: request, self._timeout_s)
        async with aclosing(responses):
            async for response in responses:
                request.resume_token = response.resume_token
                yield watched_from_wire(response)

    # -- by an operator's hand -----------------------------------------------------------------

    async def retry(
        self,
        saga_id: str,
        *,
        step: str | None = None,
        author: str,
        reason: str,
        timeout_s: float | None = None,
    ) -> Saga:
        """Try a step now that is stuck or waits for its next attempt, once that is durable.

        Without `step`, all such steps. In a new round, with a new key, where a refusal ended the
        last one. `author` and `reason` land in the saga's history. Raises `WrongState` if there is
        no such step to try, or the saga has ended; `NotFound` if there is no such saga, or no step
        of that name in it.
        """
        stub = self._wire().operator
        request = operator_pb2.RetrySagaRequest(
            saga_id=checked_text("saga_id", saga_id),
            step=checked_text("step", step or ""),
            audit=_audit(author, reason),
        )
        return saga_from_wire((await self._call(stub.RetrySaga, request, timeout_s)).saga)

    async def abandon(
        self,
        saga_id: str,
        *,
        author: str,
        reason: str,
        force: bool = False,
        timeout_s: float | None = None,
    ) -> Abandoned:
        """End a stuck saga as it is, and name the steps whose effects nobody undoes now.

        With `force` also one that is not stuck: calls on the wire may still take effect. `author`
        and `reason` land in the saga's history. One that was abandoned before is answered as such.
        Raises `WrongState` if it is not stuck, or has ended in another way, and `NotFound`.
        """
        stub = self._wire().operator
        request = operator_pb2.AbandonSagaRequest(
            saga_id=checked_text("saga_id", saga_id), audit=_audit(author, reason), force=force
        )
        return abandoned_from_wire(await self._call(stub.AbandonSaga, request, timeout_s))

    # -- definitions, participants, the runtime ----------------------------------------------------

    async def register(
        self, definition: Definition, *, timeout_s: float | None = None
    ) -> RegisteredDefinition:
        """Register a definition; return once it is durable.

        The same content again does nothing; other content under the same name is a new version.
        Raises `InvalidDefinition` before anything is sent, and `InvalidRequest` with everything
        that the runtime finds wrong.
        """
        stub = self._wire().operator
        request = operator_pb2.RegisterDefinitionRequest(definition=_to_proto(definition))
        reply = await self._call(stub.RegisterDefinition, request, timeout_s)
        return registered_from_wire(reply.registered, existed=reply.existed)

    async def diff(
        self, definition: Definition, *, timeout_s: float | None = None
    ) -> DefinitionDiff:
        """Say how a definition differs from the latest registered one of its name.

        Nothing is registered. Raises `InvalidDefinition` before anything is sent; what only the
        runtime can judge stands in `DefinitionDiff.violations`.
        """
        stub = self._wire().operator
        request = operator_pb2.DiffDefinitionRequest(definition=_to_proto(definition))
        return diff_from_wire(await self._call(stub.DiffDefinition, request, timeout_s))

    async def definition(
        self, name: str, *, content_hash: str | None = None
    ) -> RegisteredDefinition:
        """Give a registered definition; by default its latest version. Raises `NotFound`."""
        stub = self._wire().operator
        request = operator_pb2.GetDefinitionRequest(
            name=checked_text("name", name),
            content_hash=checked_text("content_hash", content_hash or ""),
        )
        return registered_from_wire((await self._call(stub.GetDefinition, request)).registered)

    async def definitions(self, *, all_versions: bool = False) -> tuple[RegisteredDefinition, ...]:
        """Give all definitions by name, with `all_versions` also the older ones."""
        stub = self._wire().operator
        request = operator_pb2.ListDefinitionsRequest(all_versions=all_versions)
        reply = await self._call(stub.ListDefinitions, request)
        return tuple(registered_from_wire(message) for message in reply.definitions)

    async def participants(self) -> tuple[ParticipantInfo, ...]:
        """Give all participants by name, each with its lane and breaker."""
        stub = self._wire().operator
        reply = await self._call(stub.ListParticipants, operator_pb2.ListParticipantsRequest())
        return tuple(participant_from_wire(message) for message in reply.participants)

    async def put_participant(
        self, name: str, address: str, *, author: str, reason: str, timeout_s: float | None = None
    ) -> ParticipantInfo:
        """Add a participant, or point one elsewhere; return once that is durable.

        It survives a restart, also against another address in the configuration. Calls that wait
        go to the new address; those on the wire get their answer from the old one. If
        nothing answers there yet, `last_error` says so; it is registered all the same. Raises
        `InvalidRequest` for a name or an address that cannot be.
        """
        stub = self._wire().operator
        request = operator_pb2.PutParticipantRequest(
            name=checked_text("name", name),
            address=checked_text("address", address),
            audit=_audit(author, reason),
        )
        reply = await self._call(stub.PutParticipant, request, timeout_s)
        return participant_from_wire(reply.participant)

    async def remove_participant(
        self, name: str, *, author: str, reason: str, timeout_s: float | None = None
    ) -> None:
        """Take back what an operator registered: the participant is where the configuration says.

        One that the configuration does not name is gone, and calls to it wait until it is there
        again. Raises `WrongState` if it is only configured, `NotFound` if nobody registered it.
        """
        stub = self._wire().operator
        request = operator_pb2.RemoveParticipantRequest(
            name=checked_text("name", name), audit=_audit(author, reason)
        )
        await self._call(stub.RemoveParticipant, request, timeout_s)

    async def breakers(self) -> tuple[BreakerInfo, ...]:
        """Give all breakers by participant."""
        stub = self._wire().operator
        reply = await self._call(stub.ListBreakers, operator_pb2.ListBreakersRequest())
        return tuple(breaker_from_wire(message) for message in reply.breakers)

    async def runtime(self) -> RuntimeInfo:
        """Say what this runtime is: versions, store, epoch, counts."""
        stub = self._wire().operator
        return runtime_from_wire(
            await self._call(stub.GetRuntime, operator_pb2.GetRuntimeRequest())
        )

    async def confirm_restore(
        self, incarnation: str, *, author: str, reason: str, timeout_s: float | None = None
    ) -> bool:
        """Say that a store which was restored from a backup is to be believed as it is.

        From then on participants that were prepared before the restore are told what it knows of
        their decisions: of a saga that it does not know, `Decision.ABORT`. `incarnation` is its
        own, as `runtime` gives it: what is confirmed is then what was looked at. Returns False if
        there was nothing to confirm. Raises `WrongState` if it has another incarnation by now.
        """
        stub = self._wire().operator
        request = operator_pb2.ConfirmRestoreRequest(
            incarnation=checked_text("incarnation", incarnation), audit=_audit(author, reason)
        )
        return (await self._call(stub.ConfirmRestore, request, timeout_s)).confirmed

    # -- the wire ----------------------------------------------------------------------------------

    def _wire(self) -> _Wire:
        if self._open is None:
            raise RuntimeError(
                "this client is not open: call it inside `async with amends.Client(...) as client`"
            )
        if asyncio.get_running_loop() is not self._open.loop:
            # gRPC's channel would wait there for ever, or fail with words about futures.
            raise RuntimeError(
                "this client belongs to another event loop: call it in the loop in which its "
                "`async with` was entered, or open another client in this one"
            )
        return self._open

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout_s: float | None = None,
    ) -> Response:
        timeout_s = (
            self._timeout_s if timeout_s is None else checked_seconds("timeout_s", timeout_s)
        )
        return await self._wire().connection.call(method, lambda _: request, timeout_s)


class SagaHandle:
    """One saga of a client's, by its id."""

    def __init__(self, client: Client, saga_id: str) -> None:
        self.saga_id = saga_id
        """The saga's id."""
        self._client = client

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.saga_id}>"

    async def get(self) -> Saga:
        """Give the saga as it stands; see `Client.get`."""
        return await self._client.get(self.saga_id)

    async def result(self, *, timeout_s: float | None = None) -> Saga:
        """Wait until the saga has ended, in whatever way, and return it; see `Client.wait`."""
        return await self._client.wait(self.saga_id, timeout_s=timeout_s)

    def history(self) -> AsyncIterator[Record]:
        """Give its records, oldest first; see `Client.history`."""
        return self._client.history(self.saga_id)

    async def trace(self, *, include_open: bool = False) -> Trace:
        """Give its trace, made anew from its history; see `Client.trace`."""
        return await self._client.trace(self.saga_id, include_open=include_open)

    async def cancel(self, *, reason: str, author: str) -> CancelResult:
        """Turn the saga back if it still can be; see `Client.cancel`."""
        return await self._client.cancel(self.saga_id, reason=reason, author=author)

    async def retry(self, *, step: str | None = None, author: str, reason: str) -> Saga:
        """Try a step now that is stuck or waits, or all such; see `Client.retry`."""
        return await self._client.retry(self.saga_id, step=step, author=author, reason=reason)

    async def abandon(self, *, author: str, reason: str, force: bool = False) -> Abandoned:
        """End the saga as it is if it is stuck, or by force; see `Client.abandon`."""
        return await self._client.abandon(self.saga_id, author=author, reason=reason, force=force)


class StartedSaga(SagaHandle):
    """A saga that was started, and how it stood then."""

    def __init__(
        self, client: Client, saga: Saga, *, existed: bool, is_whole: bool = False
    ) -> None:
        super().__init__(client, saga.saga_id)
        self._is_whole = is_whole
        self.saga = saga
        """As it stood when the start was answered; with `wait_s`, when the wait was over.

        A start that was answered together with others shows it as lists do, without its steps:
        `get` and `result` have all of it.
        """
        self.existed = existed
        """It was there before: by an earlier start, or by an earlier attempt of this one."""

    async def result(self, *, timeout_s: float | None = None) -> Saga:
        """Wait until the saga has ended, in whatever way, and return it; see `Client.wait`."""
        if self._is_whole:
            return self.saga  # an end is final: there is nothing to ask
        return await super().result(timeout_s=timeout_s)


class _Wire:
    """What an open client has: its connection, and the task that serves all of its callers.

    That task is awaited by `close`, in whatever task the client is closed. If it fails, which is a
    bug, everybody who waits is told, and `close` raises what it failed of.
    """

    def __init__(
        self,
        target: str,
        tls: ClientTls | None,
        *,
        retry_unavailable: bool,
        max_waiting_starts: int,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.connection = Connection(target, tls=tls, retry_unavailable=retry_unavailable)
        self.sagas = saga_pb2_grpc.SagaServiceStub(self.connection.channel)
        self.operator = operator_pb2_grpc.OperatorServiceStub(self.connection.channel)
        deadlines = Deadlines()
        self.waits = Waits(
            self.connection, self.sagas, deadlines, retry_unavailable=retry_unavailable
        )
        self.starts = Starts(
            self.connection, self.sagas, self.waits, deadlines, max_waiting=max_waiting_starts
        )
        self._task = asyncio.create_task(self._serve(), name=f"amends client of {target}")

    async def _serve(self) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(MAX_REQUESTS):
                    tasks.start_soon(self.starts.run)
                tasks.start_soon(self.waits.run)
        except asyncio.CancelledError:  # by `close`, or by a loop that ends all of its tasks
            self._tell_all(lambda in_doubt: closed_error(in_doubt=in_doubt))
            raise
        except Exception as bug:
            why = f"a bug in amends ended the client's own task: {bug!r}"
            self._tell_all(lambda _: RuntimeError(why))
            raise

    def _tell_all(self, error_for: Callable[[bool], Exception]) -> None:
        """End all starts and waits with an error, which is made of whether they are in doubt."""
        self.starts.end(error_for)
        self.waits.end(error_for)

    async def close(self) -> None:
        """End what is under way with `Unavailable`, and everything else in silence."""
        with anyio.CancelScope(shield=True):  # or a cancelled block would leave the channel open
            self._tell_all(lambda in_doubt: closed_error(in_doubt=in_doubt))
            await self.waits.hang_up()
            await self.connection.close()
            self._task.cancel()
            await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()


async def _wait_longer(
    waits: Waits, saga: Saga, until: float, unheld: Exception | None
) -> tuple[Saga, bool]:
    """Wait for a saga that has been started, and say whether it has ended.

    `unheld` is why it is not waited for already, if it was. Whatever happens, it has started.
    """
    try:
        if unheld is None:
            return await waits.wait(saga.saga_id, until), True
        return await waits.go_on(saga.saga_id, until, unheld), True
    except WaitTimeout as timeout:
        return timeout.saga, False
    except ApiError:
        return saga, False


def _start_unknown(saga_id: str, error: ApiError) -> str:
    return (
        f"saga {saga_id} may or may not have been started: {error}. Start it again with the same "
        f"saga_id and content, which never starts it twice, or ask with client.get({saga_id!r})"
    )


def _saga_filter(
    state: SagaState | Iterable[SagaState] | None,
    definition: str | None,
    labels: Mapping[str, str] | None,
    started_from_ms: int | None,
    started_before_ms: int | None,
) -> saga_pb2.SagaFilter:
    states = [state] if isinstance(state, str) else state or ()
    return saga_pb2.SagaFilter(
        states=[state_to_wire(SagaState(one)) for one in states],
        definition=checked_text("definition", definition or ""),
        started_from_ms=checked_whole("started_from_ms", started_from_ms or 0),
        started_before_ms=checked_whole("started_before_ms", started_before_ms or 0),
        labels=checked_labels(labels),
    )


def _audit(author: str, reason: str) -> operator_pb2.Audit:
    """Say who and why; of one call, however often it is asked: a repeat does nothing."""
    return operator_pb2.Audit(
        author=checked_text("author", author),
        reason=checked_text("reason", reason),
        request_id=uuid.uuid4().hex,
    )


def _to_proto(definition: object) -> types_pb2.Definition:
    if not isinstance(definition, Definition):
        raise TypeError(
            f"definition must be an amends.Definition, not {type(definition).__name__}: "
            'build one with amends.Definition("name").step(…)'
        )
    return definition.to_proto()


def _check_target(target: str) -> None:
    """Refuse what gRPC would take for something else, such as 443 for a port that is not given."""
    if re.fullmatch(r"unix:.+", checked_text("target", target)):
        return
    match = re.fullmatch(r"(?:\[[^\[\]\s/]+\]|[^:\[\]\s/]+):([0-9]{1,5})", target)
    if match is None or not 1 <= int(match[1]) <= MAX_PORT:
        raise ValueError(
            f"target must be host:port or unix:path, like '127.0.0.1:7233', not {target!r}"
        )


def _to_ms(seconds: float) -> int:
    return max(math.ceil(seconds * 1000), 0)
