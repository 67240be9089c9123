"""Lanes: one per participant, between the sagas that want to call it and the wire.

How to think about it. A saga hands its attempt to a lane once the attempt's record is durable, and
from then on the lane owes it exactly one answer: Answered, for what was sent, or NotSent, for what
was withdrawn first. In between the call waits, for as long as it takes, and nothing is compensated
because of that:

1. What ends a holding before forward calls: compensations, and the commits of a two-phase commit,
   whose participants keep what others need until they are told. Older sagas before younger ones:
   rather 200 sagas finished than 1,000 half done.
2. At most `limit` calls on the wire, of which forward calls may hold all but a share, so that slow
   forward calls never shut out the compensations. The limit is the operator's, or what the
   participant announces, or the smaller one of both; else `DEFAULT_LIMIT`.
3. While the breaker is open nothing leaves. Its probes are the first in the queue. One that finds
   nobody there is told as such: the lane paces it, and it uses up no retry. One that is answered
   with an error counts as any other attempt, so that a call that always fails does not probe for
   ever. Who has mended the participant need not wait for the next: `probe_now`.
4. A poll waits for its time and then queues like a call. It belongs to an attempt that was sent, so
   withdrawing it only brings it forward to the attempt's own deadline.
5. A participant that is not registered (any more) has a lane without a transport: calls wait there,
   visibly, until somebody registers it.
6. A lane that is moved elsewhere keeps its queue and its limit, and begins with a new breaker: what
   was known of the old place says nothing about the new one. Calls on the wire get their answer by
   the way they went, whose connection is closed after the last of them; they count for the old
   place's limit, and no more for any breaker.
7. A vote waits only for room, never for a participant: as long as it is outstanding, others hold
   what they have prepared. So a Prepare that finds no transport, or a breaker that is not closed,
   is answered NotSent with the reason, and so are those in the queue when it comes to that. It may
   be the probe, where one is due and nothing is before it: a participant that is only called for
   votes would never be probed otherwise. Who comes while a probe is under way is refused: nobody
   is asked to hold anything before it is known that they can be told. A poll of a vote was sent, so
   it cannot be answered so: it is Unknown.

A lane has no tasks: calls leave as they come in, or when another's end, a timer or a transport that
takes more makes room. The queue's bound is that of the live sagas: each has at most `MAX_PARALLEL`
calls open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
import structlog
from anyio.abc import TaskGroup

from amends_runtime.core import breaker as breakers
from amends_runtime.core.breaker import Breaker, BreakerPolicy, BreakerState
from amends_runtime.core.messages import (
    BREAKER_OPEN,
    NO_PARTICIPANT,
    Answered,
    NotSent,
    Unknown,
)
from amends_runtime.core.records import Verb
from amends_runtime.dispatch.one_by_one import OneByOne
from amends_runtime.dispatch.queue import Queue
from amends_runtime.ports import (
    Call,
    Caller,
    Clock,
    Observer,
    ParticipantAddress,
    Reply,
    Transport,
)

__all__ = ["Deliver", "Lane", "LaneStatus", "Lanes"]

_log = structlog.get_logger(__name__)

Deliver = Callable[[str, Answered | NotSent], None]
"""Hands a saga (by id) what became of its call. Must not block."""

DEFAULT_LIMIT = 256  # keeps one HTTP/2 connection busy without burying a small service
POLL_GRACE_S = 0.1  # a last poll that can be sent is on the wire by then
COMPENSATION_SHARE = 8  # one in so many places is never given to a forward call


class LaneStatus(msgspec.Struct, frozen=True):
    """A lane as an operator sees it."""

    name: str
    address: str
    by_operator: bool
    breaker: Breaker
    in_flight: int
    waiting: int
    limit: int
    transport: str
    last_error: str


class _Route:
    """A way to the participant, and how many calls are on it, the forward calls among them."""

    __slots__ = ("calls", "forward_calls", "transport")

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.calls = 0
        self.forward_calls = 0


class _Entry:
    """One attempt in a lane. `sent_at_ms` is 0 until it was first sent, and `route` unset."""

    __slots__ = (
        "asked_at_us",
        "began_s",
        "call",
        "generation",
        "gone",
        "held_ms",
        "is_withdrawn",
        "key",
        "lane",
        "order",
        "poll_timer",
        "polls",
        "probe",
        "queued",
        "route",
        "sent_at_ms",
        "sent_us",
    )

    def __init__(self, lane: Lane, call: Call, order: tuple[int, int, int]) -> None:
        self.lane = lane
        self.call = call
        self.order = order
        self.key = (call.saga_id, call.step, call.verb)
        self.generation = 0  # the breaker's, when it let the call through
        self.route: _Route | None = None
        self.probe = False  # it is on the wire to see whether the participant is back
        self.sent_at_ms = 0
        self.sent_us = 0
        self.held_ms = 0  # once it was sent; until then the lane's count when it came in
        self.polls = 0
        self.queued = False
        self.gone = False
        self.is_withdrawn = False  # its saga does not want it to be sent any more
        self.poll_timer: asyncio.TimerHandle | None = None
        self.asked_at_us = 0  # when it was sent last, by the wall clock and
        self.began_s = 0.0  # by the monotonic one

    def answer(self, reply: Reply | None) -> None:
        """What its transport calls when it has ended, or with None when it gives it back."""
        if reply is None:
            self.lane._given_back(self)  # noqa: SLF001  # the two are one
        else:
            self.lane._answered(self, reply)  # noqa: SLF001

    def __lt__(self, other: _Entry) -> bool:
        return self.order < other.order


class Lane:
    """The calls of one participant. Everything but `close` is synchronous.

    `limit` is the operator's; None: it is for the participant to say.
    """

    def __init__(
        self,
        address: ParticipantAddress,
        transport: Transport | Caller | None,
        *,
        limit: int | None,
        policy: BreakerPolicy,
        clock: Clock,
        deliver: Deliver,
        observer: Observer,
        tasks: TaskGroup,
    ) -> None:
        self.address = address
        self._tasks = tasks
        self._configured_limit = limit
        self._limit = self._forward_limit = 0  # `_note_limit` gives them
        self._route = self._route_by(transport)
        self._retired: list[_Route] = []  # left, with calls on them that still get their answers
        self._policy = policy
        self._clock = clock
        self._deliver = deliver
        self._observer = observer
        self._breaker = Breaker()
        self._endings: Queue[_Entry] = Queue()  # of `_place` 0
        self._steps: Queue[_Entry] = Queue()  # of `_place` 1, but for the votes, which have a
        self._votes: Queue[_Entry] = Queue()  # queue of their own to be refused by; see rule 7
        self._waiting = 0  # in all three
        self._entries: dict[tuple[str, int, Verb], _Entry] = {}
        self._sequence = 0
        self._probe_timer: asyncio.TimerHandle | None = None
        self._last_error = ""
        self._last_reason = ""
        self._stopped = False
        self._not_closed_ms = 0  # how long the breaker was not closed, before it closed last
        self._not_closed_since_ms: int | None = None
        self._note_limit()

    # -- what a saga asks of it ----------------------------------------------------------------

    def submit(self, call: Call, started_at_ms: int) -> None:
        """Takes an attempt in. `started_at_ms`, the saga's, is its place among its equals."""
        entry = self._take_in(call, started_at_ms)
        entry.held_ms = self._held_ms()
        if self._waiting == 0 and self._breaker.state is BreakerState.CLOSED:
            route = self._route
            if route is not None and not self._stopped and self._has_room(route, entry.order[0]):
                self._send(entry, route)  # nobody is before it, and nothing holds it
                return
        self._enqueue(entry)
        self._pump()

    def poll(
        self,
        call: Call,
        started_at_ms: int,
        at_ms: int,
        sent_at_ms: int,
        polls: int,
        *,
        held_ms: int = 0,
        sent_us: int = 0,
    ) -> None:
        """Asks an attempt that is in progress again, at `at_ms`.

        It was first sent at `sent_at_ms` and `sent_us`; the breaker had held it for `held_ms`.
        """
        entry = self._take_in(call, started_at_ms)
        entry.sent_at_ms, entry.sent_us = sent_at_ms, sent_us
        entry.held_ms = held_ms
        entry.polls = polls
        self._poll_at(entry, at_ms)

    def withdraw(self, saga_id: str, step: int, verb: Verb, attempt: int) -> None:
        """Takes an attempt out that was never sent, and answers NotSent; see rule 4 for a poll."""
        entry = self._entries.get((saga_id, step, verb))
        if entry is None or entry.call.attempt != attempt:
            return
        entry.is_withdrawn = True
        if entry.sent_at_ms == 0 and entry.queued:
            self._remove(entry)
            self._deliver(saga_id, _not_sent(entry.call))
        elif entry.poll_timer is not None or entry.queued:
            # A poll that cannot be sent, because nobody is there, tells no more than its deadline.
            left_s = max(0, entry.sent_at_ms + entry.call.timeout_ms - self._clock.now_ms()) / 1000
            asyncio.get_running_loop().call_later(left_s + POLL_GRACE_S, self._give_poll_up, entry)
        if entry.poll_timer is not None:
            deadline_at_ms = entry.sent_at_ms + entry.call.timeout_ms
            remaining_s = entry.poll_timer.when() - asyncio.get_running_loop().time()
            planned_at_ms = self._clock.now_ms() + int(remaining_s * 1000)
            self._poll_at(entry, min(planned_at_ms, deadline_at_ms))

    def holds(self, saga_id: str, step: int, verb: Verb) -> bool:
        """Whether an attempt of this step waits here or is on the wire."""
        return (saga_id, step, verb) in self._entries

    def forget(self, saga_id: str, steps: int) -> None:
        """Drops all calls of a saga that never left.

        Its state in memory is gone and it will ask anew.
        """
        for step in range(steps):
            for verb in Verb:
                entry = self._entries.get((saga_id, step, verb))
                if entry is not None:
                    self._remove(entry)

    # -- what an operator sees -----------------------------------------------------------------

    def status(self) -> LaneStatus:
        """A snapshot."""
        return LaneStatus(
            name=self.address.name,
            address=self.address.address,
            by_operator=self.address.by_operator,
            breaker=self._shown_breaker(),
            in_flight=self.in_flight,
            waiting=self._waiting,
            limit=self._limit,
            transport=self._route.transport.name if self._route is not None else "",
            last_error=self._last_error,
        )

    @property
    def in_flight(self) -> int:
        """Calls on the wire, by whatever way."""
        routes = self._retired if self._route is None else [self._route, *self._retired]
        return sum(route.calls for route in routes)

    @property
    def is_gone(self) -> bool:
        """Nobody has registered the participant (any more), and no call waits for it."""
        return not self.address.address and not self._entries and not self.in_flight

    def move(self, address: ParticipantAddress, transport: Transport | Caller | None) -> None:
        """Points the lane elsewhere, or with None nowhere; see rules 5 and 6."""
        old, self._route = self._route, self._route_by(transport)
        self._note_limit()
        self.address = address
        self._last_error = ""
        self._last_reason = ""
        if self._probe_timer is not None:
            self._probe_timer.cancel()
            self._probe_timer = None
        self._set_breaker(
            Breaker(since_ms=self._elapsed_ms(), generation=self._breaker.generation + 1)
        )
        if old is not None and old.calls:
            self._retired.append(old)
        elif old is not None:
            self._tasks.start_soon(old.transport.close, name=f"close {address.name}")
        self._pump()

    def probe_now(self) -> None:
        """Somebody says that the participant is back: an open breaker is probed at once.

        By what waits, else by the next call that comes. Where it finds nobody there, the breaker's
        waits begin anew with the shortest: the connection may notice a moment later.
        """
        self._set_breaker(breakers.due(self._breaker, self._elapsed_ms()))
        if self._probe_timer is not None:
            self._probe_timer.cancel()
            self._probe_timer = None
        self._pump()

    def stop_sending(self) -> None:
        """Nothing leaves any more; what is on the wire still gets its answer."""
        self._stopped = True

    async def close(self) -> None:
        """Closes the transports."""
        if self._probe_timer is not None:
            self._probe_timer.cancel()
        for entry in self._entries.values():
            if entry.poll_timer is not None:
                entry.poll_timer.cancel()
        for route in [*self._retired, *([self._route] if self._route is not None else [])]:
            await route.transport.close()

    def _route_by(self, transport: Transport | Caller | None) -> _Route | None:
        if transport is None:
            return None
        if isinstance(transport, Caller):
            transport = OneByOne(transport)
        transport.open(self._tasks, self._room_changed)
        return _Route(transport)

    def _note_limit(self) -> None:
        announced = None if self._route is None else self._route.transport.limit
        limits = [limit for limit in (self._configured_limit, announced) if limit is not None]
        self._limit = max(1, min(limits, default=DEFAULT_LIMIT))
        self._forward_limit = max(1, self._limit - max(1, self._limit // COMPENSATION_SHARE))

    def _room_changed(self) -> None:
        self._note_limit()
        self._pump()

    # -- the queue -----------------------------------------------------------------------------

    def _take_in(self, call: Call, started_at_ms: int) -> _Entry:
        self._sequence += 1
        entry = _Entry(self, call, (_place(call), started_at_ms, self._sequence))
        replaced = self._entries.get(entry.key)
        if replaced is not None:
            self._remove(replaced)  # its attempt was recorded as lost; this one follows it
        self._entries[entry.key] = entry
        return entry

    def _enqueue(self, entry: _Entry) -> None:
        self._waiting += 1
        self._queue_of(entry).push(entry)

    def _queue_of(self, entry: _Entry) -> Queue[_Entry]:
        if entry.order[0] == 0:
            return self._endings
        return self._votes if entry.call.verb is _PREPARE else self._steps

    def _remove(self, entry: _Entry) -> None:
        """Forgets an entry wherever it is."""
        entry.gone = True
        if entry.queued:
            self._waiting -= 1
            self._queue_of(entry).remove(entry)
        if entry.poll_timer is not None:
            entry.poll_timer.cancel()
            entry.poll_timer = None
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]

    def _next(self) -> _Entry | None:
        """The call that should leave now, or None when none may."""
        route = self._route
        if route is None or self._stopped:
            return None
        for kind in (0, 1):
            queue = self._foremost(kind)
            if queue is None or not self._has_room(route, kind):
                continue
            elapsed_ms = self._elapsed_ms()
            if not breakers.admits(self._breaker, self._policy, elapsed_ms):
                self._wake_for_probe(elapsed_ms)
                return None
            entry = queue.pop()
            self._waiting -= 1
            self._set_breaker(breakers.sent(self._breaker, elapsed_ms))
            return entry
        return None

    def _foremost(self, kind: int) -> Queue[_Entry] | None:
        """Whose first call is the next of `kind`, a `_place`, or None when none of it waits."""
        if kind == 0:
            return self._endings if self._endings.first() is not None else None
        step, vote = self._steps.first(), self._votes.first()
        if vote is None:
            return self._steps if step is not None else None
        return self._votes if step is None or vote < step else self._steps

    def _has_room(self, route: _Route, kind: int) -> bool:
        """See rule 2."""
        return (
            route.calls < self._limit
            and (kind == 0 or route.forward_calls < self._forward_limit)
            and route.transport.room > 0
        )

    def _pump(self) -> None:
        """Lets all calls leave that may, and answers the votes that are not to wait."""
        while self._waiting and (entry := self._next()) is not None:
            assert self._route is not None, "nothing leaves a lane without transport"
            self._send(entry, self._route)
        if self._waiting and self._votes:
            self._refuse_votes()

    def _refuse_votes(self) -> None:
        """See rule 7. A lane that stops sending refuses nothing: the next runtime asks again."""
        if self._stopped:
            return
        if self._route is None:
            reason, why = NO_PARTICIPANT, "the participant is not registered any more"
        elif self._breaker.state is not BreakerState.CLOSED:
            reason, why = BREAKER_OPEN, "the participant's calls have been failing since"
        else:
            return
        votes = self._votes.clear()
        self._waiting -= len(votes)
        for entry in votes:
            self._remove(entry)
            if entry.sent_at_ms:
                self._end_poll(entry, Unknown(reason, f"it was in progress, and {why}"))
            else:
                self._deliver(entry.call.saga_id, _not_sent(entry.call, reason))

    def _send(self, entry: _Entry, route: _Route) -> None:
        route.calls += 1
        route.forward_calls += entry.order[0]
        entry.route = route
        entry.generation = self._breaker.generation
        entry.probe = self._breaker.state is BreakerState.HALF_OPEN
        entry.asked_at_us, entry.began_s = self._clock.now_us(), self._clock.monotonic_s()
        if not entry.sent_at_ms:
            entry.sent_at_ms, entry.sent_us = divmod(entry.asked_at_us, 1000)
            entry.held_ms = self._held_ms() - entry.held_ms
        route.transport.send(entry.call, entry.answer)

    def _answered(self, entry: _Entry, reply: Reply) -> None:
        call, route = entry.call, entry.route
        assert route is not None, "it was sent by one"
        # How long it took is monotonic: a wall clock that is set meanwhile must not use up the
        # time that a step has for its retries.
        took_us = round((self._clock.monotonic_s() - entry.began_s) * 1_000_000)
        answered_at_ms, answered_us = divmod(entry.asked_at_us + took_us, 1000)
        route.calls -= 1
        route.forward_calls -= entry.order[0]
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        is_current = route is self._route
        if is_current:
            if isinstance(reply.outcome, Unknown):
                self._last_error = f"{reply.outcome.reason}: {reply.outcome.message}"
                self._last_reason = reply.outcome.reason
            self._settle_breaker(healthy=reply.healthy, generation=entry.generation)
        self._deliver(
            call.saga_id,
            Answered(
                step=call.step,
                verb=call.verb,
                round=call.round,
                attempt=call.attempt,
                sent_at_ms=entry.sent_at_ms,
                answered_at_ms=answered_at_ms,
                status=reply.status,
                polls=entry.polls,
                outcome=reply.outcome,
                probe=entry.probe and is_current and reply.away,
                held_ms=entry.held_ms,
                sent_us=entry.sent_us,
                answered_us=answered_us,
            ),
        )
        self._close_if_left(route)
        self._pump()

    def _given_back(self, entry: _Entry) -> None:
        """It was with the transport and never left; it waits here again."""
        call, route = entry.call, entry.route
        assert route is not None, "it was sent by one"
        route.calls -= 1
        route.forward_calls -= entry.order[0]
        entry.route = None
        if route is self._route:
            self._settle_breaker(healthy=None, generation=entry.generation)
        if self._entries.get(entry.key) is entry:
            if not call.poll:
                entry.sent_at_ms = entry.sent_us = 0
                entry.held_ms = self._held_ms() - entry.held_ms
            self._enqueue(entry)
            if entry.is_withdrawn:
                self.withdraw(call.saga_id, call.step, call.verb, call.attempt)
        self._close_if_left(route)
        self._pump()

    def _close_if_left(self, route: _Route) -> None:
        """A retired way is closed after the last call on it."""
        if route is not self._route and not route.calls and route in self._retired:
            self._retired.remove(route)
            self._tasks.start_soon(route.transport.close, name=f"close {self.address.name}")

    # -- breaker and timers --------------------------------------------------------------------

    def _settle_breaker(self, *, healthy: bool | None, generation: int) -> None:
        breaker = self._breaker
        if healthy and breaker.state is BreakerState.CLOSED and not breaker.failures:
            return  # nearly always
        elapsed_ms = self._elapsed_ms()
        if healthy is None:
            self._set_breaker(breakers.unsettled(self._breaker, generation))
        elif healthy:
            self._set_breaker(breakers.succeeded(self._breaker, generation, elapsed_ms))
        else:
            self._set_breaker(breakers.failed(self._breaker, self._policy, generation, elapsed_ms))
        if self._breaker.state is BreakerState.OPEN:
            self._wake_for_probe(elapsed_ms)

    def _set_breaker(self, breaker: Breaker) -> None:
        if breaker is self._breaker:
            return
        before = self._breaker.state
        changed = breaker.state is not before
        if changed and before is BreakerState.CLOSED:
            self._not_closed_since_ms = self._elapsed_ms()
        elif changed and breaker.state is BreakerState.CLOSED:
            self._not_closed_ms, self._not_closed_since_ms = self._held_ms(), None
        self._breaker = breaker
        if changed:
            self._log_change(before)
            self._observer.breaker_changed(self.address.name, before, breaker.state)

    def _log_change(self, before: BreakerState) -> None:
        """An outage is two lines, its begin and its end; the probes in between are details."""
        breaker = self._breaker
        shown = {"participant": self.address.name, "state": breaker.state.name}
        if breaker.state is BreakerState.CLOSED:
            _log.info("breaker_changed", **shown, waiting=self._waiting)
            return
        log = _log.warning if before is BreakerState.CLOSED else _log.debug
        log(
            "breaker_changed",
            **shown,
            failures=breaker.failures,
            waiting=self._waiting,
            # Not the message, which may quote a payload: who may see it asks for it.
            reason=self._last_reason,
            hint="amends participants shows the last error",
        )

    def _held_ms(self) -> int:
        """How long the breaker has not been closed, in all: two readings tell how long it held."""
        since_ms = self._not_closed_since_ms
        return self._not_closed_ms + (0 if since_ms is None else self._elapsed_ms() - since_ms)

    def _wake_for_probe(self, elapsed_ms: int) -> None:
        if self._breaker.state is not BreakerState.OPEN or self._probe_timer is not None:
            return
        delay_s = max(0, self._breaker.probe_at_ms - elapsed_ms) / 1000
        self._probe_timer = asyncio.get_running_loop().call_later(delay_s, self._probe)

    def _elapsed_ms(self) -> int:
        """The breaker's time, which never jumps; `status` shows it as instants."""
        return round(self._clock.monotonic_s() * 1000)

    def _shown_breaker(self) -> Breaker:
        offset_ms = self._clock.now_ms() - self._elapsed_ms()
        since_ms, probe_at_ms = self._breaker.since_ms, self._breaker.probe_at_ms
        return msgspec.structs.replace(
            self._breaker,
            since_ms=since_ms + offset_ms if since_ms else 0,
            probe_at_ms=probe_at_ms + offset_ms if probe_at_ms else 0,
        )

    def _probe(self) -> None:
        self._probe_timer = None
        self._pump()

    def _poll_at(self, entry: _Entry, at_ms: int) -> None:
        if entry.poll_timer is not None:
            entry.poll_timer.cancel()
        delay_s = max(0, at_ms - self._clock.now_ms()) / 1000
        entry.poll_timer = asyncio.get_running_loop().call_later(delay_s, self._poll_now, entry)

    def _give_poll_up(self, entry: _Entry) -> None:
        """It was withdrawn, and its attempt's time is over: what is not on the wire is unknown."""
        if entry.gone or not (entry.queued or entry.poll_timer is not None):
            return
        self._remove(entry)
        why = "it was in progress when it was asked last, and could not be asked again"
        self._end_poll(entry, Unknown("IN_PROGRESS", why))

    def _end_poll(self, entry: _Entry, outcome: Unknown) -> None:
        """Answers an attempt in progress that is not asked again."""
        call = entry.call
        self._deliver(
            call.saga_id,
            Answered(
                step=call.step,
                verb=call.verb,
                round=call.round,
                attempt=call.attempt,
                sent_at_ms=entry.sent_at_ms,
                answered_at_ms=self._clock.now_ms(),
                status="OK",
                polls=entry.polls,
                outcome=outcome,
                held_ms=entry.held_ms,
                sent_us=entry.sent_us,
            ),
        )

    def _poll_now(self, entry: _Entry) -> None:
        entry.poll_timer = None
        if not entry.gone:
            self._enqueue(entry)
            self._pump()


_PREPARE: Final = Verb.PREPARE  # bound once: an enumeration's member costs more to look up
_COMPENSATE: Final = Verb.COMPENSATE


def _place(call: Call) -> int:
    """A call's place in the order: 0 for what ends a holding, 1 for all else; see rule 1."""
    if call.verb is _COMPENSATE:
        return 0
    return 0 if call.two_phase and call.verb is not _PREPARE else 1


def _not_sent(call: Call, reason: str = "") -> NotSent:
    return NotSent(
        step=call.step, verb=call.verb, round=call.round, attempt=call.attempt, reason=reason
    )


class Lanes:
    """All lanes, by participant."""

    def __init__(
        self,
        policy: BreakerPolicy,
        clock: Clock,
        observer: Observer,
        connect: Callable[[ParticipantAddress], Transport | Caller | None],
        limits: Mapping[str, int],
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._observer = observer
        self._connect = connect
        self._limits = limits
        self._lanes: dict[str, Lane] = {}
        self._stopped = False
        self._tasks: TaskGroup | None = None
        self._deliver: Deliver | None = None

    def open(self, tasks: TaskGroup, deliver: Deliver, addresses: list[ParticipantAddress]) -> None:
        """Makes a lane for each registered participant; what runs for them lives in `tasks`."""
        self._tasks = tasks
        self._deliver = deliver
        for address in addresses:
            self._lanes[address.name] = self._lane(address, self._connect(address))

    def put(self, address: ParticipantAddress) -> None:
        """The participant is there from now on; see rule 6.

        Where it has been already, only who says so changes.
        """
        lane = self._lanes.get(address.name)
        if lane is None:
            self._lanes[address.name] = self._lane(address, self._connect(address))
        elif (lane.address.address, lane.address.tls) == (address.address, address.tls):
            lane.address = address
        else:
            lane.move(address, self._connect(address))

    def remove(self, participant: str) -> None:
        """The participant is not registered any more; see rule 5."""
        if participant in self._lanes:
            self._lanes[participant].move(ParticipantAddress(participant, ""), None)

    def names(self) -> list[str]:
        """The registered participants."""
        return [name for name, lane in self._lanes.items() if lane.address.address]

    def of(self, participant: str) -> Lane:
        """The participant's lane.

        One without transport for a participant that is not registered.
        """
        lane = self._lanes.get(participant)
        if lane is None:
            _log.error(
                "participant_not_registered",
                participant=participant,
                hint=f"its calls wait for it: amends participants add {participant}=ADDRESS",
            )
            lane = self._lanes[participant] = self._lane(ParticipantAddress(participant, ""), None)
        return lane

    def status(self) -> list[LaneStatus]:
        """All lanes, by name, but those of which nothing is left: not registered, and no calls."""
        return [lane.status() for _, lane in sorted(self._lanes.items()) if not lane.is_gone]

    def stop_sending(self) -> None:
        """Nothing leaves any more; what is on the wire still gets its answer."""
        self._stopped = True
        for lane in self._lanes.values():
            lane.stop_sending()

    @property
    def in_flight(self) -> int:
        """Calls on the wire, of all participants."""
        return sum(lane.in_flight for lane in self._lanes.values())

    async def close(self) -> None:
        """Closes every transport."""
        for lane in self._lanes.values():
            await lane.close()

    def _lane(self, address: ParticipantAddress, transport: Transport | Caller | None) -> Lane:
        assert self._tasks is not None, "open() comes first"
        assert self._deliver is not None, "open() comes first"
        lane = Lane(
            address=address,
            transport=transport,
            limit=self._limits.get(address.name),
            policy=self._policy,
            clock=self._clock,
            deliver=self._deliver,
            observer=self._observer,
            tasks=self._tasks,
        )
        if self._stopped:
            lane.stop_sending()
        return lane
