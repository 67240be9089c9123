"""The client: start sagas, ask for them, wait for them, cancel them; register definitions.

::

    async with amends.Client("127.0.0.1:7233") as client:
        await client.register(order)
        started = await client.start("order", {"sku": "A"})
        saga = await started.result()
        print(saga.state)

Every call survives a restart of the runtime: it is asked again, as it is, until its time is over.
A start has its id before anything is sent, so that it never happens twice.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Final, Self, TypeVar

import anyio
import grpc

from amends.arguments import checked_labels, checked_seconds, checked_text, checked_whole
from amends.connection import Connection
from amends.definition import Definition
from amends.errors import (
    AlreadyExists,
    ApiError,
    DeadlineExceeded,
    StartUnknown,
    Unavailable,
    WaitTimeout,
)
from amends.ids import new_saga_id
from amends.payload import EMPTY, encode, to_wire
from amends.saga_wire import (
    breaker_from_wire,
    cancelled_from_wire,
    diff_from_wire,
    participant_from_wire,
    record_from_wire,
    registered_from_wire,
    runtime_from_wire,
    saga_from_wire,
    state_to_wire,
)
from amends.sagas import (
    BreakerInfo,
    CancelResult,
    DefinitionDiff,
    ParticipantInfo,
    Record,
    RegisteredDefinition,
    RuntimeInfo,
    Saga,
    SagaState,
)
from amends.v1 import operator_pb2, operator_pb2_grpc, saga_pb2, saga_pb2_grpc, types_pb2

Request = TypeVar("Request")
Response = TypeVar("Response")

DEFAULT_TIMEOUT_S: Final = 10.0
"""A commit takes milliseconds; this leaves room for a runtime that restarts meanwhile."""
MAX_PORT: Final = 65_535
MAX_WAIT_S: Final = 60.0
"""The runtime holds no reply longer than this; longer waits ask again."""
REPLY_GRACE_S: Final = 2.0
"""How long a reply that is due at the end of a wait may take to arrive."""
MAX_PAUSE_S: Final = 0.2
"""Between two waits for the same saga; nothing is missed in it, since a wait looks first."""
PAGE_SIZE: Final = 100
"""Sagas per page: a page is some 50 KB, and the first ones come soon."""


class Client:
    """A connection to a runtime.

    Use it with ``async with``, in one event loop; make one per process and share it, since all of
    its calls go over one connection. Any number of tasks may call it at once.

    `target` is ``host:port``, or ``unix:path``. `timeout_s` bounds each call, together with all of
    its attempts. With `retry_unavailable` False a runtime that cannot be reached is reported at
    once, instead of being asked again until then; for a person who waits at a terminal.

    Every method raises `ApiError`, in the kinds that `amends.errors` draws: `Unavailable` and
    `DeadlineExceeded` for the runtime's part, the others for the request's. Arguments that cannot
    be sent are a `TypeError` or a `ValueError`; a duration is at most ten years.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry_unavailable: bool = True,
    ) -> None:
        _check_target(target)
        checked_seconds("timeout_s", timeout_s)
        self.target = target
        """Where the runtime is."""
        self._timeout_s = timeout_s
        self._retry_unavailable = retry_unavailable
        self._open: _Wire | None = None

    async def __aenter__(self) -> Self:
        if self._open is not None:
            raise RuntimeError("this client is open already: use one `async with` per client")
        self._open = _Wire(Connection(self.target, retry_unavailable=self._retry_unavailable))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        wire, self._open = self._open, None
        if wire is not None:
            await wire.connection.close()

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
        wait_s: float | None = None,
        timeout_s: float | None = None,
    ) -> StartedSaga:
        """Start a saga; return once its start is durable.

        `input` is handed to every step: a JSON value, bytes, or a `Payload`. `saga_id` is your own
        id, by which a repeated start is the same start; without one it is a new UUIDv7. `labels`
        are for `list`. `deadline_s`, from now, overrides the definition's. `definition_hash` names
        a version; by default it is the latest. With `wait_s` the answer is held until the saga has
        ended, at most so long; look at `StartedSaga.saga` for where it stands then.

        The start is asked again under the same id for `timeout_s` (by default the client's), and
        never happens twice. A caller who is cancelled meanwhile knows nothing of it, unless it gave
        its own `saga_id`.

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
        request = saga_pb2.StartSagaRequest(
            saga_id=saga_id,
            definition=checked_text("definition", definition),
            definition_hash=checked_text("definition_hash", definition_hash or ""),
            input=to_wire(EMPTY if input is None else encode(input)),
            labels=checked_labels(labels),
            deadline_ms=0
            if deadline_s is None
            else _to_ms(checked_seconds("deadline_s", deadline_s)),
        )

        def ask(left_s: float) -> saga_pb2.StartSagaRequest:
            # What is left beyond the call's own time is the runtime's to hold the reply.
            request.wait_ms = _to_ms(min(left_s - timeout_s, hold_s, MAX_WAIT_S)) if hold_s else 0
            return request

        wait_until = time.monotonic() + hold_s
        wire = self._wire()
        try:
            reply = await wire.connection.call(
                wire.sagas.StartSaga,
                ask,
                timeout_s + min(hold_s, MAX_WAIT_S),
                unsent_s=timeout_s,
            )
        except ApiError as error:
            if error.in_doubt and not isinstance(error, AlreadyExists):
                raise StartUnknown(saga_id, _start_unknown(saga_id, error)) from error
            raise
        saga = saga_from_wire(reply.saga)
        if not reply.ended and time.monotonic() < wait_until:
            saga = await self._wait_longer(saga, wait_until)
        return StartedSaga(self, saga, existed=reply.existed)

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
        states = [state] if isinstance(state, str) else state or ()
        saga_filter = saga_pb2.SagaFilter(
            states=[state_to_wire(SagaState(one)) for one in states],
            definition=checked_text("definition", definition or ""),
            started_from_ms=checked_whole("started_from_ms", started_from_ms or 0),
            started_before_ms=checked_whole("started_before_ms", started_before_ms or 0),
            labels=checked_labels(labels),
        )
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
        return await self._wait(saga_id, until)

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

    # -- the wire ----------------------------------------------------------------------------------

    def _wire(self) -> _Wire:
        if self._open is None:
            raise RuntimeError(
                "this client is not open: call it inside `async with amends.Client(...) as client`"
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

    async def _wait(self, saga_id: str, until: float) -> Saga:
        """Wait until the monotonic instant `until`; for what it raises see `wait`."""
        request = saga_pb2.WaitSagaRequest(saga_id=checked_text("saga_id", saga_id))

        def ask(left_s: float) -> saga_pb2.WaitSagaRequest:
            request.timeout_ms = _to_ms(left_s)  # never 0, which would mean the runtime's default
            return request

        wire = self._wire()
        seen: Saga | None = None
        while True:
            left_s = max(until - time.monotonic(), 0.0)
            try:
                reply = await wire.connection.call(
                    wire.sagas.WaitSaga, ask, min(left_s, MAX_WAIT_S), grace_s=REPLY_GRACE_S
                )
            except (Unavailable, DeadlineExceeded) as error:
                if wire.connection.closed or not self._retry_unavailable:
                    raise
                if time.monotonic() < until:
                    continue  # the call has asked again, with waits between, for as long as it had
                if seen is None:
                    raise
                raise WaitTimeout(seen, f"{_not_ended(seen)} Then: {error}") from error
            seen = saga_from_wire(reply.saga)
            if reply.ended:
                return seen
            if time.monotonic() >= until:
                raise WaitTimeout(seen, _not_ended(seen))
            # A runtime that stops answers early; without a pause it would be asked in a circle.
            await anyio.sleep(random.uniform(0, MAX_PAUSE_S))  # noqa: S311  # guards no secret

    async def _wait_longer(self, saga: Saga, until: float) -> Saga:
        """Wait for a saga that has been started; whatever happens, it has been."""
        try:
            return await self._wait(saga.saga_id, until)
        except WaitTimeout as timeout:
            return timeout.saga
        except ApiError:
            return saga


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

    async def cancel(self, *, reason: str, author: str) -> CancelResult:
        """Turn the saga back if it still can be; see `Client.cancel`."""
        return await self._client.cancel(self.saga_id, reason=reason, author=author)


class StartedSaga(SagaHandle):
    """A saga that was started, and how it stood then."""

    def __init__(self, client: Client, saga: Saga, *, existed: bool) -> None:
        super().__init__(client, saga.saga_id)
        self.saga = saga
        """As it stood when the start was answered; with `wait_s`, when the wait was over."""
        self.existed = existed
        """It was there before: by an earlier start, or by an earlier attempt of this one."""

    async def result(self, *, timeout_s: float | None = None) -> Saga:
        """Wait until the saga has ended, in whatever way, and return it; see `Client.wait`."""
        if self.saga.ended:
            return self.saga  # an end is final: there is nothing to ask
        return await super().result(timeout_s=timeout_s)


class _Wire:
    """What an open client has."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.sagas = saga_pb2_grpc.SagaServiceStub(connection.channel)
        self.operator = operator_pb2_grpc.OperatorServiceStub(connection.channel)


def _start_unknown(saga_id: str, error: ApiError) -> str:
    return (
        f"saga {saga_id} may or may not have been started: {error}. Start it again with the same "
        f"saga_id and content, which never starts it twice, or ask with client.get({saga_id!r})"
    )


def _not_ended(saga: Saga) -> str:
    return f"saga {saga.saga_id} has not ended in time: it is {saga.state}, and goes on."


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
