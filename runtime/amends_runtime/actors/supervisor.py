"""The supervisor: which sagas are in memory, and how messages find them.

How to think about it. A saga is in one of three places: live, as an actor in `_actors`; on its way
in, as an `_Arrival` that keeps its messages; or only in the store. Every message for a saga that
is not live makes an arrival, and arrivals are read from the store together, so a thousand starts
cost one query. Because an id is in `_arrivals` from the question to the answer, no two actors of
one saga can come to be in this process; between processes the store's compare-and-set sees to it.

A saga that has not ended is told RuntimeRestarted before anything else when it comes in: whatever
it had in flight is gone. One that has ended answers its messages and leaves.
"""

from __future__ import annotations

import asyncio
import difflib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import structlog

from amends_runtime.actors.definitions import Definitions
from amends_runtime.actors.mailbox import Envelope
from amends_runtime.actors.recovery import Recovering, Recovery
from amends_runtime.actors.saga_actor import SagaActor, Turn, call_for, ended
from amends_runtime.actors.survey import SLICE, Survey, Tally
from amends_runtime.actors.timers import Timers
from amends_runtime.actors.turns import Turns
from amends_runtime.actors.view import SagaView, Told
from amends_runtime.core import saga as core
from amends_runtime.core.definition import Plan
from amends_runtime.core.effects import CallParticipant, PollParticipant, WakeAt, WithdrawCall
from amends_runtime.core.messages import (
    AbandonSaga,
    Answered,
    CancelSaga,
    NotSent,
    RetrySaga,
    RuntimeRestarted,
    StartSaga,
    Wake,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Verb
from amends_runtime.core.saga import Answer, Saga, StepStatus
from amends_runtime.core.tracing import Tracing
from amends_runtime.errors import (
    AlreadyExists,
    NotFound,
    Overloaded,
    Refusal,
    StoreError,
    Unavailable,
    UnreadableSaga,
    WrongState,
)
from amends_runtime.ports import Call, Clock, LoadedSaga, Observer, Store, Tombstone

__all__ = ["Counts", "Limits", "Outbox", "SagaView", "StartRequest", "Supervisor"]

_log = structlog.get_logger(__name__)

LOAD_TOGETHER = 128  # histories in memory at once: at 3 MiB of payloads each, below 400 MiB
RECOVERY_PAGE = 500  # sagas named by recovery before the turns they cause are waited for
STARTING_BYTES = 64 * 1024 * 1024  # inputs of starts that are not durable yet
STORE_RETRY_S = 0.05  # a reopened store is back after a checkpoint
RECOVERY_PAUSE_S = 0.01  # about one commit: new work gets its turns in between


class Limits(msgspec.Struct, frozen=True):
    """Bounds of what is held in memory."""

    live_sagas: int = 100_000  # about 5 KB each
    mailbox: int = 1_024  # far more than a sane client sends to one saga
    commit_batch: int = 512  # transitions in one commit: beyond it the sync is no longer what costs
    commit_queue: int = 10_000  # about a second of work; more only makes everybody wait longer


class StartRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A validated start. `content_hash` covers all that makes a repeated start the same start."""

    saga_id: str
    definition_name: str
    definition_hash: str = ""
    content_hash: str
    input: Payload
    labels: dict[str, str] = {}
    deadline_ms: int = 0
    traceparent: str = ""


class Counts(msgspec.Struct, frozen=True):
    """What is in memory; `unreadable` counts sagas whose history is damaged.

    `without_wake_up` counts sagas that nothing would wake: 0, or there is a bug.
    """

    live: int
    arriving: int
    backlog: int
    timers: int
    unreadable: int
    without_wake_up: int


class Outbox:
    """Where calls go.

    The lanes, as the supervisor needs them. Made of functions so that no layer is skipped.
    """

    __slots__ = ("forget", "holds", "poll", "submit", "withdraw")

    def __init__(
        self,
        submit: Callable[[Call, int], None],
        poll: Callable[[Call, int, PollParticipant], None],
        withdraw: Callable[[str, str, WithdrawCall], None],
        forget: Callable[[str, str, int], None],
        holds: Callable[[str, str, int, Verb], bool],
    ) -> None:
        self.submit = submit
        self.poll = poll
        self.withdraw = withdraw
        self.forget = forget
        self.holds = holds


class _Arrival:
    """A saga on its way into memory, with the messages that wait for it.

    One that is `needed` was live before, or had not ended when the store was opened: it goes on
    arriving until it is here, whatever the store says meanwhile. Any other one is only asked for.
    """

    __slots__ = ("envelopes", "needed", "predecessor", "recovering")

    def __init__(self, predecessor: SagaActor | None = None, *, needed: bool = False) -> None:
        self.envelopes: list[Envelope] = []
        self.predecessor = predecessor
        self.needed = needed or predecessor is not None
        self.recovering = False  # recovery has named it, and counts it when it is here


class Supervisor:
    """Owns the live sagas.

    Its methods are safe to cancel: what they asked for happens all the same.
    """

    def __init__(
        self,
        store: Store,
        definitions: Definitions,
        *,
        clock: Clock,
        observer: Observer,
        limits: Limits,
        outbox: Outbox,
        tracing: Tracing,
    ) -> None:
        self._store = store
        self._observer = observer
        self._tracing = tracing
        self._definitions = definitions
        self._clock = clock
        self._limits = limits
        self._outbox = outbox
        self._actors: dict[str, SagaActor] = {}
        self._arrivals: dict[str, _Arrival] = {}
        self._to_load: deque[str] = deque()
        self._something_to_load = anyio.Event()
        self._unreadable: dict[str, str] = {}
        self._starting_bytes = 0
        self._refused: dict[str, int] = {}
        self._recovery = Recovering(clock)
        self._turns = Turns(
            store,
            clock=clock,
            observer=observer,
            batch_limit=limits.commit_batch,
            tracing=tracing,
            perform=self._perform,
            dropped=self._read_again,
        )
        self._timers = Timers(clock, self._wake, lambda: self._turns.backlog)
        self.accepting = True

    # -- what the API asks of it ---------------------------------------------------------------

    async def start_saga(self, request: StartRequest) -> tuple[SagaView, bool]:
        """Starts a saga durably, or finds it. The answer's second part: it existed before.

        Raises NotFound (definition), AlreadyExists (other content), Overloaded (nothing was done),
        Unavailable (stopping, or the store failed: the outcome is unknown, the same id can be
        asked again).
        """
        self._check_accepting()
        try:
            self._check_admission(len(request.input.data))
        except Overloaded as refusal:
            self._note_refusal(refusal)
            raise
        registered = self._definitions.find(request.definition_name, request.definition_hash)
        plan = self._definitions.plan(registered.content_hash)
        deadline_ms = request.deadline_ms or plan.definition.deadline_ms
        message = StartSaga(
            saga_id=request.saga_id,
            content_hash=request.content_hash,
            input=request.input,
            deadline_at_ms=self._clock.now_ms() + deadline_ms if deadline_ms else 0,
            labels=request.labels,
            traceparent=request.traceparent,
        )
        self._starting_bytes += len(request.input.data)
        try:
            told = await self._ask(request.saga_id, message, plan)
        finally:
            self._starting_bytes -= len(request.input.data)
        if told.answer is Answer.OTHER_CONTENT:
            raise AlreadyExists(
                "SAGA_EXISTS_WITH_OTHER_CONTENT",
                f"saga {request.saga_id!r} exists with another definition, input or options and"
                f" goes on unchanged: use another id, or the very same request",
                {"saga_id": request.saga_id, "state": told.view.saga.state.name},
            )
        return told.view, told.answer is Answer.EXISTED

    async def cancel_saga(self, saga_id: str, author: str, reason: str) -> tuple[SagaView, Answer]:
        """Asks a saga to turn back.

        What it answered is durable. Raises NotFound, Overloaded, Unavailable.
        """
        self._check_accepting()
        return _answered(await self._ask(saga_id, CancelSaga(author=author, reason=reason)))

    async def retry_saga(
        self,
        saga_id: str,
        step_name: str | None,
        author: str,
        reason: str,
        *,
        request_id: str = "",
    ) -> tuple[SagaView, Answer]:
        """Tries a step now that is stuck or waits, or all; a quarantined saga is read anew first.

        A repeat of the last one, by its `request_id`, does nothing. The answer is RETRIED,
        NOTHING_STUCK or ENDED, and durable. Raises NotFound (saga, step), Overloaded, Unavailable.
        """
        self._check_accepting()
        view = await self.view(saga_id)
        step = None if step_name is None else _step_number(view, step_name)
        revived = self._revive(saga_id)
        message = RetrySaga(
            step=step, author=author, reason=reason, revived=revived, request_id=request_id
        )
        return _answered(await self._ask(saga_id, message))

    async def abandon_saga(
        self,
        saga_id: str,
        author: str,
        reason: str,
        *,
        force: bool = False,
        request_id: str = "",
    ) -> tuple[SagaView, Answer]:
        """Ends a stuck saga as it is, by `force` any that has not ended.

        The answer is ABANDONED, ALREADY_ABANDONED, NOT_STUCK or ENDED, and durable. Raises
        NotFound, Overloaded, Unavailable.
        """
        self._check_accepting()
        # A saga whose deciding fails is shown as stuck, and cannot become so by itself.
        force = self._revive(saga_id) or force
        message = AbandonSaga(author=author, reason=reason, force=force, request_id=request_id)
        return _answered(await self._ask(saga_id, message))

    async def view(self, saga_id: str) -> SagaView:
        """The saga as it is durable. Raises NotFound."""
        actor = self._actors.get(saga_id)
        if actor is not None and actor.saga is not None:
            return actor.view()
        return await self._read(saga_id)

    async def wait(
        self, saga_id: str, timeout_s: float, until: Callable[[Saga], bool] = ended
    ) -> SagaView:
        """The saga once `until` holds or it has ended, or as it is after `timeout_s`.

        Raises NotFound; Unavailable when the runtime stops or loses its store meanwhile.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + timeout_s
        while True:
            self._check_accepting()
            actor = self._actors.get(saga_id)
            if actor is not None:
                if actor.saga is not None and (actor.saga.ended or until(actor.saga)):
                    return actor.view()
                return await self._wait_for(actor, until, give_up_at - loop.time())
            view = await self._read(saga_id)
            if view.saga.ended or until(view.saga):
                return view
            if loop.time() >= give_up_at:
                return view
            await self._ask(saga_id, Wake())  # brings it in, where it can be waited for

    # -- waiting for many, without a task for each -------------------------------------------

    def waiter_for(self, saga_id: str) -> asyncio.Future[SagaView | None] | None:
        """A future of a live saga's end; None for one that is not live: `bring_in` it first.

        Whoever no longer waits gives it back to `forget_waiter`.
        """
        actor = self._actors.get(saga_id)
        if actor is None:
            return None
        if actor.saga is None or not actor.saga.ended:
            return actor.add_waiter(ended)
        waiter: asyncio.Future[SagaView | None] = asyncio.get_running_loop().create_future()
        waiter.set_result(actor.view())
        return waiter

    def forget_waiter(self, saga_id: str, waiter: asyncio.Future[Any]) -> None:
        """Takes back a future of `waiter_for` or `bring_in`, which is cancelled."""
        waiter.cancel()
        actor, arrival = self._actors.get(saga_id), self._arrivals.get(saga_id)
        if actor is not None:
            actor.remove_waiter(waiter)
        if arrival is not None and arrival.predecessor is not None:
            arrival.predecessor.remove_waiter(waiter)

    def bring_in(self, saga_id: str) -> asyncio.Future[Told]:
        """A future of how a saga stands when it has been read; one that has not ended is live then.

        Many at once are read together. Raises what `wait` raises, at once or through the future.
        """
        self._check_accepting()
        return self._post(saga_id, Wake())

    async def survey(self) -> Survey:
        """What is in memory, counted in slices between which the loop goes on; see `survey`."""
        tally, actors, held_s = Tally(), list(self._actors.values()), 0.0
        for start in range(0, len(actors), SLICE):
            began_s = self._clock.monotonic_s()
            for actor in actors[start : start + SLICE]:
                if self._actors.get(actor.saga_id) is actor:
                    tally.add(actor, will_wake=self._will_wake(actor))
            held_s += self._clock.monotonic_s() - began_s
            await anyio.lowlevel.checkpoint()
        return Survey(
            active=tally.active,
            stuck=tally.stuck,
            in_doubt=tally.in_doubt,
            without_wake_up=len(self._unreadable) + tally.sleepless,
            unreadable=len(self._unreadable),
            quarantined=tally.quarantined,
            backlog=self._turns.backlog + len(self._to_load),
            messages=tally.messages,
            fullest=tally.fullest,
            held_s=held_s,
        )

    @property
    def recovery(self) -> Recovery:
        """How far recovery is."""
        return self._recovery.now()

    @property
    def refused(self) -> dict[str, int]:
        """How many requests were refused because a limit is reached, by the error's reason."""
        return dict(self._refused)

    def counts(self) -> Counts:
        """What is in memory, counted at one go: for tests, and for the end of a runtime."""
        return Counts(
            live=len(self._actors),
            arriving=len(self._arrivals),
            backlog=self._turns.backlog,
            timers=len(self._timers),
            unreadable=len(self._unreadable),
            without_wake_up=len(self._unreadable)
            + sum(not self._will_wake(actor) for actor in self._actors.values()),
        )

    # -- what lanes and timers tell it ---------------------------------------------------------

    def deliver(self, saga_id: str, message: Answered | NotSent) -> None:
        """News of a call.

        For a saga that is not live it is an echo: what matters is asked again.
        """
        self._post_live(saga_id, message)

    def _wake(self, saga_id: str, due_at_ms: int) -> None:
        self._post_live(saga_id, Wake(due_at_ms))

    def _post_live(self, saga_id: str, message: Answered | NotSent | Wake) -> None:
        actor = self._actors.get(saga_id)
        if actor is not None:
            actor.mailbox.put_nowait(Envelope(message))
            self._turns.ready(actor)
            return
        arrival = self._arrivals.get(saga_id)
        if arrival is not None:
            arrival.envelopes.append(Envelope(message))

    # -- its tasks -----------------------------------------------------------------------------

    async def run_decider(self) -> None:
        """See `turns`."""
        await self._turns.run_decider()

    async def run_committer(self) -> None:
        """See `turns`."""
        await self._turns.run_committer()

    async def run_timers(self) -> None:
        """See `timers`."""
        await self._timers.run()

    async def run_loader(self) -> None:
        """Reads arrivals from the store, many at a time, for as long as the runtime lives.

        A store that cannot be read for a moment, as while it is reopened after a failed commit,
        holds arrivals up and loses none of them.
        """
        while True:
            while not self._to_load:
                self._something_to_load = anyio.Event()
                await self._something_to_load.wait()
            ids = [self._to_load.popleft() for _ in range(min(LOAD_TOGETHER, len(self._to_load)))]
            try:
                found = await self._store.load(ids)
            except UnreadableSaga:
                await self._load_one_by_one(ids)
            except StoreError as error:
                self._load_later(ids, error)
                await anyio.sleep(STORE_RETRY_S)
            else:
                for saga_id in ids:
                    self._arrived(saga_id, found.get(saga_id))

    async def run_recovery(self) -> None:
        """Brings in every saga that had not ended when the store was opened.

        Recovery only names them; the loader reads each as it is by then, so that what a page said
        is never taken for what a saga is. Page by page, each page's turns before the next page, so
        that neither memory nor participants are flooded. One that cannot be read holds up no other.
        """
        boundary = self._store.next_saga_no()
        after_no, recovered = 0, 0
        self._recovery.begin()
        while True:
            try:
                page = await self._store.open_sagas(after_no, RECOVERY_PAGE)
            except StoreError as error:
                _log.warning("recovery_waits_for_the_store", error=str(error))
                await anyio.sleep(STORE_RETRY_S)
                continue
            for named in page:
                after_no = named.saga_no
                if named.saga_no < boundary and named.saga_id not in self._actors:
                    arrival = self._arrival(named.saga_id)
                    arrival.needed = True
                    if not arrival.recovering:
                        arrival.recovering = True
                        self._recovery.named()
                    recovered += 1
            if len(page) < RECOVERY_PAGE or after_no >= boundary:
                self._recovery.all_named()
                _log.info("recovered", sagas=recovered)
                return
            _log.info("recovering", sagas=recovered)
            while self._turns.backlog + len(self._to_load) > RECOVERY_PAGE:  # noqa: ASYNC110  # a pace
                await anyio.sleep(RECOVERY_PAUSE_S)

    # -- the end -------------------------------------------------------------------------------

    def stop_accepting(self) -> None:
        """No new requests; everybody who waits for a saga is told to ask another time."""
        self.accepting = False
        error = _stopping()
        for actor in self._actors.values():
            actor.fail_waiters(error)

    async def wait_idle(self) -> None:
        """Until every message that has come in is decided and durable."""
        await self._turns.wait_idle()

    # -- finding the actor ---------------------------------------------------------------------

    async def _ask(
        self,
        saga_id: str,
        message: StartSaga | CancelSaga | RetrySaga | AbandonSaga | Wake,
        plan: Plan | None = None,
    ) -> Told:
        try:
            return await self._post(saga_id, message, plan)
        except Overloaded as refusal:
            self._note_refusal(refusal)
            raise

    def _post(
        self,
        saga_id: str,
        message: StartSaga | CancelSaga | RetrySaga | AbandonSaga | Wake,
        plan: Plan | None = None,
    ) -> asyncio.Future[Told]:
        """Gives a message to a saga wherever it is; the future is told what came of it."""
        sender: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        envelope = Envelope(message, sender, plan)
        actor = self._actors.get(saga_id)
        if actor is not None:
            if actor.quarantined:
                raise Unavailable(
                    f"saga {saga_id!r} is quarantined after repeated internal errors, which the"
                    f" log shows: nothing is lost; amends retry {saga_id} tries it again"
                )
            actor.mailbox.put_nowait(envelope)
            self._turns.ready(actor)
        elif saga_id in self._unreadable:
            raise _unreadable(saga_id, self._unreadable[saga_id])
        else:
            self._arrival(saga_id).envelopes.append(envelope)
        return sender

    def _revive(self, saga_id: str) -> bool:
        """A quarantined saga is forgotten and arrives anew; whether there was one."""
        actor = self._actors.get(saga_id)
        if actor is None or not actor.quarantined:
            return False
        trace_id = self._tracing.trace_id(saga_id, actor.traceparent)
        _log.warning("quarantine_lifted", saga_id=saga_id, trace_id=trace_id)
        actor.dropped = True
        self._read_again([actor], Unavailable("this saga is read again; ask again"))
        return True

    def _arrival(self, saga_id: str, predecessor: SagaActor | None = None) -> _Arrival:
        arrival = self._arrivals.get(saga_id)
        if arrival is None:
            arrival = self._arrivals[saga_id] = _Arrival(predecessor)
            self._to_load.append(saga_id)
            self._something_to_load.set()
        return arrival

    def _arrived(self, saga_id: str, found: LoadedSaga | Tombstone | None) -> None:
        arrival = self._taken(saga_id)
        try:
            if isinstance(found, LoadedSaga):
                self._bring_in(found, arrival)
            elif isinstance(found, Tombstone):
                _fail(arrival, _purged(found))
            else:
                self._bring_in_new(saga_id, arrival)
        except Exception as error:  # noqa: BLE001  # one saga must not hold up the others
            self._cannot_be_read(saga_id, arrival, error)

    def _taken(self, saga_id: str) -> _Arrival:
        """The arrival of a saga that is here now, or never will be."""
        arrival = self._arrivals.pop(saga_id)
        if arrival.recovering:
            self._recovery.arrived()
        return arrival

    def _cannot_be_read(self, saga_id: str, arrival: _Arrival, error: Exception) -> None:
        """Leaves a damaged saga to people.

        It stays in the store as it is, and whoever asks is told.
        """
        _log.error(
            "saga_cannot_be_read",
            saga_id=saga_id,
            error=f"{type(error).__name__}: {error}" if isinstance(error, StoreError) else "",
            exc_info=not isinstance(error, StoreError),
            hint="its history is damaged; all other sagas go on; restore it from a backup",
        )
        self._unreadable[saga_id] = str(error) if isinstance(error, StoreError) else "see the log"
        _fail(arrival, _unreadable(saga_id, self._unreadable[saga_id]))

    def _bring_in(self, loaded: LoadedSaga, arrival: _Arrival) -> None:
        plan = self._definitions.plan(loaded.definition_hash)
        saga = core.fold(plan, (record for turn in loaded.turns for record in turn.records))
        assert saga is not None, "a stored saga has at least its start"
        actor = SagaActor(loaded.saga_id, loaded.saga_no, plan, self._limits.mailbox)
        actor.restore(saga, loaded.version)
        if arrival.predecessor is not None:
            self._tell_of_unknown_turn(arrival.predecessor, loaded, saga)
        # To be abandoned must not depend on whether the saga can go on.
        first = [one for one in arrival.envelopes if isinstance(one.message, AbandonSaga)]
        rest = [one for one in arrival.envelopes if not isinstance(one.message, AbandonSaga)]
        if not saga.ended:
            first.append(Envelope(RuntimeRestarted()))
        self._make_live(actor, arrival, [*first, *rest])
        if saga.ended and not actor.mailbox:
            self._leave(actor)

    def _tell_of_unknown_turn(self, before: SagaActor, loaded: LoadedSaga, saga: Saga) -> None:
        """A commit that was believed to have failed was written: observers hear of it now."""
        records = [
            record
            for turn in loaded.turns
            if turn.version > before.version
            for record in turn.records
        ]
        if records:
            self._observer.turn_committed(before.plan, before.saga, saga, records)

    def _bring_in_new(self, saga_id: str, arrival: _Arrival) -> None:
        """Nobody knows this id.

        Its first start makes it, whatever came before that had nothing to speak to.
        """
        envelopes = deque(arrival.envelopes)
        while envelopes and not isinstance(envelopes[0].message, StartSaga):
            envelopes.popleft().fail(_not_found(saga_id))
        if not envelopes:
            _fail(arrival, _not_found(saga_id))
            return
        plan = envelopes[0].plan
        assert plan is not None, "a start brings its plan"
        refused = self._why_not_start(plan)
        if refused is not None:
            for envelope in envelopes:
                is_start = isinstance(envelope.message, StartSaga)
                envelope.fail(refused if is_start else _not_found(saga_id))
            return
        actor = SagaActor(saga_id, self._store.next_saga_no(), plan, self._limits.mailbox)
        self._make_live(actor, arrival, envelopes)

    def _make_live(
        self, actor: SagaActor, arrival: _Arrival, envelopes: Sequence[Envelope] | deque[Envelope]
    ) -> None:
        if arrival.predecessor is not None:
            arrival.predecessor.waiters_to(actor)
        self._actors[actor.saga_id] = actor
        for envelope in envelopes:
            try:
                actor.mailbox.put_nowait(envelope)
            except Overloaded as full:
                envelope.fail(full)
        self._turns.ready(actor)

    def _load_later(self, ids: list[str], error: StoreError) -> None:
        """The store cannot be read now. Who asks is told; what is needed goes on arriving."""
        _log.warning("load_waits_for_the_store", error=str(error), sagas=len(ids))
        failure = Unavailable(f"the store cannot be read now ({error}); ask again")
        for saga_id in ids:
            arrival = self._arrivals[saga_id]
            kept = [envelope for envelope in arrival.envelopes if envelope.sender is None]
            for envelope in arrival.envelopes:
                envelope.fail(failure)
            arrival.envelopes = kept
            if arrival.needed:
                self._to_load.append(saga_id)
            else:
                del self._arrivals[saga_id]

    async def _load_one_by_one(self, ids: list[str]) -> None:
        """One of these is damaged; which, is told by reading each alone."""
        for number, saga_id in enumerate(ids):
            try:
                found = await self._store.load([saga_id])
            except UnreadableSaga as error:
                self._cannot_be_read(saga_id, self._taken(saga_id), error)
            except StoreError as error:
                self._load_later(ids[number:], error)
                return
            else:
                self._arrived(saga_id, found.get(saga_id))

    # -- after a turn --------------------------------------------------------------------------

    def _perform(self, turn: Turn) -> None:
        """The turn is durable: its effects leave."""
        actor, saga = turn.actor, turn.decision.saga
        for effect in turn.decision.effects:
            if isinstance(effect, CallParticipant):
                call = call_for(actor.plan, saga, effect, self._tracing)
                self._outbox.submit(call, saga.started_at_ms)
            elif isinstance(effect, WakeAt):
                is_deadline = effect.at_ms == saga.deadline_at_ms
                within_ms = None if is_deadline else actor.plan.longest_wait_ms
                actor.timers.append(self._timers.set(actor.saga_id, effect.at_ms, within_ms))
            elif isinstance(effect, PollParticipant):
                call = call_for(actor.plan, saga, effect, self._tracing)
                self._outbox.poll(call, saga.started_at_ms, effect)
                if saga.phase is core.Phase.BACKWARD and effect.verb is Verb.EXECUTE:
                    # It was on the wire when the saga turned back, and could not be withdrawn then.
                    key = (effect.step, effect.verb, effect.round, effect.attempt)
                    self._outbox.withdraw(call.participant, actor.saga_id, WithdrawCall(*key))
            else:
                participant = actor.plan.steps[effect.step].participant
                self._outbox.withdraw(participant, actor.saga_id, effect)
        if saga.abandoned and saga.ended:
            # Nobody asks for it any more, not even a poll that waits for its time.
            self._forget_calls(actor)
        if saga.ended and not actor.mailbox:
            self._leave(actor)

    def _leave(self, actor: SagaActor) -> None:
        """The saga has ended: it is a row now."""
        if self._actors.get(actor.saga_id) is actor:
            del self._actors[actor.saga_id]
        self._timers.forget(actor.timers)

    def _forget_calls(self, actor: SagaActor) -> None:
        """What it asked for and has not left yet is not to leave any more."""
        for participant in {step.participant for step in actor.plan.steps}:
            self._outbox.forget(participant, actor.saga_id, len(actor.plan.steps))

    def _read_again(self, actors: Sequence[SagaActor], error: Exception) -> None:
        """These actors' state is not to be believed: forget it, and let each arrive anew."""
        for actor in actors:
            self._leave(actor)
            self._forget_calls(actor)
            arrival = self._arrival(actor.saga_id, predecessor=actor)
            arrival.envelopes += actor.mailbox.drain()
            if actor.saga is None:
                actor.fail_waiters(error)

    # -- small parts ---------------------------------------------------------------------------

    async def _read(self, saga_id: str) -> SagaView:
        if saga_id in self._unreadable:
            raise _unreadable(saga_id, self._unreadable[saga_id])
        try:
            found = (await self._store.load([saga_id])).get(saga_id)
        except UnreadableSaga as error:
            raise _unreadable(saga_id, str(error)) from error
        if found is None:
            raise _not_found(saga_id)
        if isinstance(found, Tombstone):
            raise _purged(found)
        plan = self._definitions.plan(found.definition_hash)
        saga = core.fold(plan, (record for turn in found.turns for record in turn.records))
        assert saga is not None, "a stored saga has at least its start"
        return SagaView(plan, saga, found.version)

    async def _wait_for(
        self, actor: SagaActor, until: Callable[[Saga], bool], timeout_s: float
    ) -> SagaView:
        waiter = actor.add_waiter(until)
        # Half of what `asyncio.wait` with a time-out costs: 8 µs against 15.
        timer = asyncio.get_running_loop().call_later(max(0.0, timeout_s), _end_wait, waiter)
        try:
            view = await waiter
        finally:
            timer.cancel()
            actor.remove_waiter(waiter)
        return view if view is not None else await self.view(actor.saga_id)

    def _note_refusal(self, refusal: Overloaded) -> None:
        self._refused[refusal.reason] = self._refused.get(refusal.reason, 0) + 1

    def _check_accepting(self) -> None:
        if not self.accepting:
            raise _stopping()

    def _check_admission(self, input_bytes: int) -> None:
        """Bounds what waits to become durable.

        Asked of every start, for nobody knows yet whether it is a repeated one.
        """
        if self._turns.backlog + len(self._to_load) >= self._limits.commit_queue:
            raise Overloaded(
                "COMMIT_QUEUE",
                "more turns wait to be written than the limit of"
                f" {self._limits.commit_queue} ([limits] commit_queue): nothing was started; try"
                " again shortly",
                retry_after_ms=200,
                metadata={"limit": str(self._limits.commit_queue)},
            )
        if self._starting_bytes and self._starting_bytes + input_bytes > STARTING_BYTES:
            raise Overloaded(
                "STARTING_BYTES",
                f"the inputs of starts that wait to be written are {self._starting_bytes} bytes,"
                f" and {STARTING_BYTES} are the most: nothing was started; try again shortly",
                retry_after_ms=200,
                metadata={"limit": str(STARTING_BYTES)},
            )

    def _why_not_start(self, plan: Plan) -> Refusal | None:
        """Why a saga that does not exist yet is not to be started now, if it is not."""
        missing = self._definitions.unregistered(plan)
        if missing:
            return _cannot_run(plan, missing)
        if len(self._actors) >= self._limits.live_sagas:
            return Overloaded(
                "LIVE_SAGAS",
                f"{len(self._actors)} sagas are under way, and {self._limits.live_sagas} is the"
                " limit ([limits] live_sagas): nothing was started; try again in a second",
                retry_after_ms=1_000,
                metadata={"limit": str(self._limits.live_sagas)},
            )
        return None

    def _will_wake(self, actor: SagaActor) -> bool:
        """Rule 8: what has not ended always has something that wakes it, or is visibly stuck."""
        saga = actor.saga
        if actor.quarantined:
            return False  # an operator could, and there is a bug
        if saga is None or saga.ended or actor.busy or actor.mailbox:
            return True
        if saga.deadline_at_ms and saga.phase is core.Phase.FORWARD and not saga.past_no_return:
            return True
        return any(
            step.retry_at_ms
            or step.status is StepStatus.STUCK
            or (
                step.open
                and self._outbox.holds(
                    actor.plan.steps[number].participant, actor.saga_id, number, step.verb
                )
            )
            for number, step in enumerate(saga.steps)
        )


def _answered(told: Told) -> tuple[SagaView, Answer]:
    assert told.answer is not None, "a request is always answered"
    return told.view, told.answer


def _step_number(view: SagaView, name: str) -> int:
    number = view.plan.number_of.get(name)
    if number is not None:
        return number
    near = difflib.get_close_matches(name, view.plan.number_of, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"its steps: {', '.join(view.plan.number_of)}"
    raise NotFound(
        "UNKNOWN_STEP",
        f"saga {view.saga.saga_id!r} has no step {name[:64]!r}; {hint}",
        {"saga_id": view.saga.saga_id, "step": name[:64]},
    )


def _end_wait(waiter: asyncio.Future[SagaView | None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _fail(arrival: _Arrival, error: Exception) -> None:
    for envelope in arrival.envelopes:
        envelope.fail(error)
    if arrival.predecessor is not None:
        arrival.predecessor.fail_waiters(error)


def _not_found(saga_id: str) -> NotFound:
    return NotFound(
        "UNKNOWN_SAGA",
        f"there is no saga {saga_id!r} here: is the id right?",
        {"saga_id": saga_id},
    )


def _unreadable(saga_id: str, why: str) -> WrongState:
    return WrongState(
        "SAGA_UNREADABLE",
        f"saga {saga_id!r} cannot go on: {why}; all other sagas do",
        {"saga_id": saga_id},
    )


def _cannot_run(plan: Plan, missing: list[str]) -> WrongState:
    name = plan.definition.name
    return WrongState(
        "PARTICIPANT_NOT_REGISTERED",
        f"definition {name!r} calls participants that this runtime does not know:"
        f" {', '.join(missing)}; nothing was started: add them, with"
        f" `amends participants add {missing[0]}=ADDRESS` or in its configuration",
        {"definition": name, "participants": ", ".join(missing)},
    )


def _purged(tombstone: Tombstone) -> NotFound:
    return NotFound(
        "SAGA_PURGED",
        f"saga {tombstone.saga_id!r} ended {tombstone.state.name} and its history was purged;"
        f" its id is not used again",
        {"saga_id": tombstone.saga_id, "state": tombstone.state.name},
    )


def _stopping() -> Unavailable:
    return Unavailable("this runtime is stopping; ask again when it is back, with the same id")
