"""The supervisor: which sagas are in memory, and how messages find them.

How to think about it. A saga is in one of four places: live, as an actor in `_actors`; on its way
in, as an arrival that keeps its messages (`arrivals`); parked, with what memory has to keep of it
(`parking`); or only in the store. A message for a saga that is not live makes it arrive.

What becomes of it then is told in `entering`; how it decides and becomes durable in `turns`; how
its effects leave in `performing`; when it leaves memory itself in `leaving`; what may be started at
all in `admission`. Here these are put together, and what people, lanes, timers and recovery have
for a saga finds its way to wherever it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import structlog

from amends_runtime.actors import refusals
from amends_runtime.actors.admission import Admission
from amends_runtime.actors.arrivals import Arrivals
from amends_runtime.actors.definitions import Definitions
from amends_runtime.actors.entering import Entering
from amends_runtime.actors.held_back import HeldBack
from amends_runtime.actors.horizon import MAX_NEAR, Horizon
from amends_runtime.actors.leaving import Leaving
from amends_runtime.actors.limits import Limits
from amends_runtime.actors.mailbox import Envelope
from amends_runtime.actors.parking import Parking
from amends_runtime.actors.performing import Outbox, Performing
from amends_runtime.actors.recovery import RECOVERY_PAGE, Recovering, Recovery
from amends_runtime.actors.saga_actor import SagaActor, ended
from amends_runtime.actors.survey import SLICE, Survey, Tally, will_wake
from amends_runtime.actors.timers import Timers
from amends_runtime.actors.turns import Turns
from amends_runtime.actors.view import SagaView, Told
from amends_runtime.core import saga as core
from amends_runtime.core.definition import Plan
from amends_runtime.core.messages import (
    AbandonSaga,
    Answered,
    CancelSaga,
    NotSent,
    RetrySaga,
    StartSaga,
    Wake,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import SagaState
from amends_runtime.core.saga import Answer, Saga
from amends_runtime.core.tracing import Tracing
from amends_runtime.errors import (
    AmendsError,
    Overloaded,
    StoreError,
    Unavailable,
    UnreadableSaga,
)
from amends_runtime.ports import (
    Clock,
    Observer,
    OperatorWords,
    RestingSaga,
    Store,
    Tombstone,
)

__all__ = ["Counts", "Limits", "Outbox", "SagaView", "StartRequest", "Supervisor"]

_log = structlog.get_logger(__name__)

STORE_RETRY_S = 0.05  # a reopened store is back after a checkpoint


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

    `parked` counts sagas that rest outside memory, `kept` those of them of which memory has an
    entry. `without_wake_up` counts sagas that nothing would wake: 0, or there is a bug.
    """

    live: int
    parked: int
    kept: int
    arriving: int
    backlog: int
    timers: int
    unreadable: int
    without_wake_up: int


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
        self._tracing = tracing
        self._definitions = definitions
        self._clock = clock
        self._outbox = outbox
        self._actors: dict[str, SagaActor] = {}
        self._parking = Parking()
        self._held_back = HeldBack(store)
        self._timers = Timers(clock, self._wake, self._timers_wait_for)
        self._horizon = Horizon(
            store, clock, self._comes_near, lambda: self._parking.near < MAX_NEAR
        )
        self._leaving = Leaving(
            self._actors,
            parking=self._parking,
            timers=self._timers,
            horizon=self._horizon,
            clock=clock,
            limits=limits,
        )
        self._performing = Performing(
            outbox,
            timers=self._timers,
            leaving=self._leaving,
            clock=clock,
            park_after_ms=limits.park_after_ms,
            tracing=tracing,
        )
        self._turns = Turns(
            store,
            clock=clock,
            observer=observer,
            batch_limit=limits.commit_batch,
            tracing=tracing,
            perform=self._performing.perform,
            dropped=self._read_again,
        )
        self._recovery = Recovering(
            store,
            clock,
            name=self._recover,
            waiting=lambda: self._arrivals.waiting_at_leisure,
            two_phase=definitions.two_phase,
        )
        self._entering = Entering(
            self._actors,
            store,
            definitions,
            parking=self._parking,
            held_back=self._held_back,
            leaving=self._leaving,
            timers=self._timers,
            turns=self._turns,
            recovery=self._recovery,
            clock=clock,
            observer=observer,
            limits=limits,
        )
        self._arrivals = Arrivals(
            store,
            room=self._entering.room,
            arrived=self._entering.arrived,
            unreadable=self._entering.cannot_be_read,
        )
        self._admission = Admission(
            limits.commit_queue, lambda: self._turns.backlog + self._arrivals.waiting
        )
        self._has_begun = anyio.Event()
        self.accepting = True

    # -- what the API asks of it ---------------------------------------------------------------

    async def start_saga(self, request: StartRequest) -> tuple[SagaView, bool]:
        """Starts a saga durably, or finds it. The answer's second part: it existed before.

        Raises NotFound (definition), AlreadyExists (other content), Overloaded (nothing was done),
        Unavailable (stopping, or the store failed: the outcome is unknown, the same id can be
        asked again).
        """
        try:
            begun = self._begin_start(request)
            try:
                return _started(await begun)
            finally:
                self._admission.ends(len(request.input.data))
        except Overloaded as refusal:
            self._admission.note(refusal)
            raise

    async def start_sagas(
        self, requests: Sequence[StartRequest]
    ) -> list[tuple[SagaView, bool] | Exception]:
        """Starts many, which share commits; each has the answer that `start_saga` gives or raises.

        A task for each would cost more than all else that is done here for it.
        """
        begun: list[asyncio.Future[Told] | Exception] = []
        taken_bytes = 0
        try:
            for request in requests:
                try:
                    begun.append(self._begin_start(request))
                except Exception as error:  # noqa: BLE001  # one item's error is that item's answer
                    begun.append(self._noted(error))
                else:
                    taken_bytes += len(request.input.data)
            outcomes: list[tuple[SagaView, bool] | Exception] = []
            for one in begun:
                if isinstance(one, Exception):
                    outcomes.append(one)
                    continue
                try:
                    outcomes.append(_started(await one))
                except Exception as error:  # noqa: BLE001  # as above
                    outcomes.append(self._noted(error))
            return outcomes
        finally:
            self._admission.ends(taken_bytes)
            for one in begun:  # the caller may have left: nobody hears of their errors
                if isinstance(one, asyncio.Future) and not one.cancel() and not one.cancelled():
                    one.exception()

    def _begin_start(self, request: StartRequest) -> asyncio.Future[Told]:
        self._check_accepting()
        self._admission.check(len(request.input.data))
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
        begun = self._post(request.saga_id, message, plan)
        self._admission.begins(len(request.input.data))
        return begun

    def _noted(self, error: Exception) -> Exception:
        if isinstance(error, Overloaded):
            self._admission.note(error)
        if isinstance(error, AmendsError):
            # Its frames hold the list that holds it: all inputs would wait for the collector.
            error.with_traceback(None)
        return error

    def room_for_starts(self) -> int:
        """How many starts the commit queue takes now; those beyond it are `refuse_starts`'s."""
        return self._admission.room

    def refuse_starts(self, count: int) -> Overloaded:
        """The refusal of so many starts for which the commit queue has no room, counted."""
        return self._admission.refuse(count)

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

        A two-phase commit is not ended by it, it is aborted (ABORTED), or has been decided
        (DECIDED). Else the answer is ABANDONED, ALREADY_ABANDONED, NOT_STUCK or ENDED, and durable.
        Raises NotFound, Overloaded, Unavailable.
        """
        self._check_accepting()
        # A saga whose deciding fails is shown as stuck, and cannot become so by itself.
        force = self._revive(saga_id) or force
        message = AbandonSaga(author=author, reason=reason, force=force, request_id=request_id)
        return _answered(await self._ask(saga_id, message))

    async def confirm_restore(self, words: OperatorWords) -> bool:
        """Takes a restored store for the truth: what was held back goes on. False: it is believed.

        The same request once more changes nothing and answers True. Raises StoreError: it may have
        happened, and can be asked for again.
        """
        try:
            return await self._store.confirm_restore(words)
        finally:  # a failed write may have been written, and the store has been read since
            self._held_back.note_confirmed()

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
                waiter = actor.add_waiter(until)
                return await self._wait_for(saga_id, waiter, give_up_at - loop.time())
            view = await self._read(saga_id)
            if view.saga.ended or until(view.saga):
                return view
            if loop.time() >= give_up_at:
                return view
            if saga_id in self._held_back:
                waiter = self._held_back.add_waiter(saga_id, until)
                return await self._wait_for(saga_id, waiter, give_up_at - loop.time())
            await self._ask(saga_id, Wake())  # brings it in, where it can be waited for

    # -- waiting for many, without a task for each -------------------------------------------

    def waiter_for(self, saga_id: str) -> asyncio.Future[SagaView | None] | None:
        """A future of a saga's end that is live, or held back; None: `bring_in` it first.

        Whoever no longer waits gives it back to `forget_waiter`.
        """
        actor = self._actors.get(saga_id)
        if actor is None:
            held_back = saga_id in self._held_back
            return self._held_back.add_waiter(saga_id, ended) if held_back else None
        if actor.saga is None or not actor.saga.ended:
            return actor.add_waiter(ended)
        waiter: asyncio.Future[SagaView | None] = asyncio.get_running_loop().create_future()
        waiter.set_result(actor.view())
        return waiter

    def forget_waiter(self, saga_id: str, waiter: asyncio.Future[Any]) -> None:
        """Takes back a future of `waiter_for` or `bring_in`, which is cancelled."""
        waiter.cancel()
        self._remove_waiter(saga_id, waiter)

    def bring_in(self, saga_id: str) -> asyncio.Future[Told]:
        """A future of how a saga stands when it has been read.

        One that has not ended is live then, or held back: `waiter_for` has a future of its end.
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
                    tally.add(actor, will_wake=will_wake(actor, self._outbox.holds))
            held_s += self._clock.monotonic_s() - began_s
            await anyio.lowlevel.checkpoint()
        parked = self._parking.by_state
        return Survey(
            active={state: count + parked.get(state, 0) for state, count in tally.active.items()},
            parked=parked,
            stuck=tally.stuck + parked.get(SagaState.STUCK, 0),
            in_doubt=tally.in_doubt + self._parking.in_doubt,
            branches_in_doubt=tally.branches.count + self._parking.branches.count,
            oldest_in_doubt_s=self._oldest_in_doubt_s(tally),
            without_wake_up=len(self._entering.unreadable) + tally.sleepless,
            unreadable=len(self._entering.unreadable),
            quarantined=tally.quarantined,
            backlog=self._turns.backlog
            + self._arrivals.waiting
            + self._arrivals.waiting_at_leisure,
            messages=tally.messages,
            fullest=tally.fullest,
            held_s=held_s,
        )

    def _oldest_in_doubt_s(self, tally: Tally) -> float:
        since = (tally.branches.oldest_ms, self._parking.branches.oldest_ms)
        known = [since_ms for since_ms in since if since_ms]
        return max(0, self._clock.now_ms() - min(known)) / 1000 if known else 0.0

    @property
    def recovery(self) -> Recovery:
        """How far recovery is."""
        return self._recovery.now()

    @property
    def refused(self) -> dict[str, int]:
        """How many requests were refused because a limit is reached, by the error's reason."""
        return self._admission.refused

    def counts(self) -> Counts:
        """What is in memory, counted at one go: for tests, and for the end of a runtime."""
        return Counts(
            live=len(self._actors),
            parked=sum(self._parking.by_state.values()),
            kept=len(self._parking),
            arriving=len(self._arrivals),
            backlog=self._turns.backlog,
            timers=len(self._timers),
            unreadable=len(self._entering.unreadable),
            without_wake_up=len(self._entering.unreadable)
            + sum(not will_wake(actor, self._outbox.holds) for actor in self._actors.values()),
        )

    # -- what lanes and timers tell it ---------------------------------------------------------

    def deliver(self, saga_id: str, message: Answered | NotSent) -> None:
        """News of a call.

        For a saga that is not live it is an echo: what matters is asked again.
        """
        self._post_live(saga_id, message)

    def _wake(self, saga_id: str, due_at_ms: int) -> None:
        actor = self._actors.get(saga_id)
        if actor is not None and actor.polls:
            self._performing.ask_again(actor, due_at_ms)
        parked = self._parking.find(saga_id)
        if parked is not None:
            arrival = self._arrivals.of(saga_id, at_leisure=True, compensates=parked.compensates)
            arrival.envelopes.append(Envelope(Wake(due_at_ms)))
        else:
            self._post_live(saga_id, Wake(due_at_ms))

    def _timers_wait_for(self) -> int:
        """How many turns and arrivals the timers let pass before they wake more sagas.

        Without room for arrivals they do not wait for them: a live saga that makes room may need
        its own timer for that.
        """
        has_room = not self._leaving.is_full
        return self._turns.backlog + (self._arrivals.waiting_at_leisure if has_room else 0)

    def _comes_near(self, near: RestingSaga, within_ms: int) -> None:
        """The horizon has come to a parked saga's instant."""
        saga_id = near.saga_id
        if saga_id in self._actors or saga_id in self._held_back:
            return
        arrival = self._arrivals.find(saga_id)
        if arrival is not None:
            # Whoever asked for it may be told that it cannot be read now, and leave. The horizon
            # has seen its instant, and does not look at it again.
            arrival.needed = True
            return
        is_two_phase = self._definitions.plan(near.definition_hash).two_phase is not None
        compensates = is_two_phase or near.state is SagaState.COMPENSATING
        parked = self._parking.bring_near(saga_id, compensates=compensates)
        if parked is not None:
            parked.timers.append(self._timers.set(saga_id, near.wake_at_ms, within_ms))

    def _post_live(self, saga_id: str, message: Answered | NotSent | Wake) -> None:
        actor = self._actors.get(saga_id)
        if actor is not None:
            actor.mailbox.put_nowait(Envelope(message))
            self._turns.ready(actor)
            return
        arrival = self._arrivals.find(saga_id)
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
        """See `arrivals`. What rests is counted first, so that each that comes can be told."""
        while not self._has_begun.is_set():
            try:
                resting = await self._store.count_resting()
            except StoreError as error:
                _log.warning("loader_waits_for_the_store", error=str(error))
                await anyio.sleep(STORE_RETRY_S)
            else:
                self._parking.begin(resting.by_state)
                self._horizon.begin(resting.updated_at_ms)
                self._has_begun.set()
        await self._arrivals.run()

    async def run_recovery(self) -> None:
        """Brings in what had not ended when the store was opened; see `recovery`.

        What is held back comes when the store is confirmed, oldest first, and page by page, too.
        """
        await self._recovery.run()
        await self._held_back.wait_confirmed()
        saga_ids = self._held_back.saga_ids
        _log.info("held_back_go_on", sagas=len(saga_ids))
        for start in range(0, len(saga_ids), RECOVERY_PAGE):
            for saga_id in saga_ids[start : start + RECOVERY_PAGE]:
                if saga_id in self._held_back:  # else somebody's message has brought it in
                    self._arrivals.of(saga_id, at_leisure=True, compensates=True)
            await self._recovery.wait_for_most()

    async def run_parking(self) -> None:
        """Lets sagas at rest leave and come back; see `horizon`."""
        await self._has_begun.wait()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._horizon.run)
            tasks.start_soon(self._leaving.run)

    # -- the end -------------------------------------------------------------------------------

    def stop_accepting(self) -> None:
        """No new requests; everybody who waits for a saga is told to ask another time."""
        self.accepting = False
        error = refusals.stopping()
        for actor in self._actors.values():
            actor.fail_waiters(error)
        for parked in self._parking.entries():
            parked.fail_waiters(error)
        self._held_back.fail_waiters(error)

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
            self._admission.note(refusal)
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
                raise refusals.quarantined(saga_id)
            actor.mailbox.put_nowait(envelope)
            self._turns.ready(actor)
        elif saga_id in self._entering.unreadable:
            raise refusals.unreadable(saga_id, self._entering.unreadable[saga_id])
        else:
            self._arrivals.of(saga_id).envelopes.append(envelope)
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

    def _recover(self, saga_id: str, compensates: bool) -> bool:  # noqa: FBT001  # by which line it comes
        """Recovery names a saga; whether it is awaited from now on."""
        is_here = saga_id in self._actors or saga_id in self._held_back
        if is_here or self._parking.find(saga_id) is not None:
            return False  # it has come in meanwhile
        arrival = self._arrivals.of(saga_id, at_leisure=True, compensates=compensates)
        named_before, arrival.recovering = arrival.recovering, True
        return not named_before

    def _read_again(self, actors: Sequence[SagaActor], error: Exception) -> None:
        """These actors' state is not to be believed: forget it, and let each arrive anew."""
        for actor in actors:
            self._leaving.leave(actor)
            self._performing.forget_calls(actor)
            arrival = self._arrivals.of(actor.saga_id, predecessor=actor)
            arrival.envelopes += actor.mailbox.drain()
            if actor.saga is None:
                actor.fail_waiters(error)

    # -- small parts ---------------------------------------------------------------------------

    async def _read(self, saga_id: str) -> SagaView:
        if saga_id in self._entering.unreadable:
            raise refusals.unreadable(saga_id, self._entering.unreadable[saga_id])
        try:
            found = (await self._store.load([saga_id])).get(saga_id)
        except UnreadableSaga as error:
            raise refusals.unreadable(saga_id, str(error)) from error
        if found is None:
            raise refusals.not_found(saga_id)
        if isinstance(found, Tombstone):
            raise refusals.purged(found)
        plan = self._definitions.plan(found.definition_hash)
        saga = core.fold(plan, (record for turn in found.turns for record in turn.records))
        assert saga is not None, "a stored saga has at least its start"
        return SagaView(plan, saga, found.version)

    async def _wait_for(
        self, saga_id: str, waiter: asyncio.Future[SagaView | None], timeout_s: float
    ) -> SagaView:
        # Half of what `asyncio.wait` with a time-out costs: 8 µs against 15.
        timer = asyncio.get_running_loop().call_later(max(0.0, timeout_s), _end_wait, waiter)
        try:
            view = await waiter
        finally:
            timer.cancel()
            self._remove_waiter(saga_id, waiter)
        return view if view is not None else await self.view(saga_id)

    def _remove_waiter(self, saga_id: str, waiter: asyncio.Future[Any]) -> None:
        """The other side has left, wherever the saga is by now."""
        actor, parked = self._actors.get(saga_id), self._parking.find(saga_id)
        if actor is not None:
            actor.remove_waiter(waiter)
        self._held_back.remove_waiter(saga_id, waiter)
        arrival = self._arrivals.find(saga_id)
        if parked is not None:
            parked.remove_waiter(waiter)
            if arrival is None:
                self._parking.drop_idle(saga_id)
        if arrival is not None and arrival.predecessor is not None:
            arrival.predecessor.remove_waiter(waiter)

    def _check_accepting(self) -> None:
        if not self.accepting:
            raise refusals.stopping()


def _started(told: Told) -> tuple[SagaView, bool]:
    if told.answer is Answer.OTHER_CONTENT:
        raise refusals.other_content(told.view)
    return told.view, told.answer is Answer.EXISTED


def _answered(told: Told) -> tuple[SagaView, Answer]:
    assert told.answer is not None, "a request is always answered"
    return told.view, told.answer


def _step_number(view: SagaView, name: str) -> int:
    number = view.plan.number_of.get(name)
    if number is None:
        raise refusals.no_such_step(view, name)
    return number


def _end_wait(waiter: asyncio.Future[SagaView | None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
