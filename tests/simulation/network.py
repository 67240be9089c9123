"""The network between runtimes and participants: late, lossy, repetitive, and out of order.

A call and its reply pass through the real wire on both sides: what arrives is the contract's own
message. The network believes nothing and keeps a copy of all that was ever sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

import grpc
from anyio.abc import TaskGroup

from amends.v1 import participant_pb2, types_pb2
from amends_runtime import wire
from amends_runtime.core.breaker import BreakerState
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    HeuristicReported,
    Record,
    SagaEnded,
    StepCompensated,
    StepExecuted,
    StepPrepared,
    StepRejected,
    Verb,
    VoteRefused,
)
from amends_runtime.dispatch.exchange import ExchangeTransport
from amends_runtime.dispatch.one_by_one import OneByOne
from amends_runtime.dispatch.status import reply_of
from amends_runtime.ports import Call, ParticipantAddress, Reply
from tests.simulation import vote_rules
from tests.simulation.faults import Fault
from tests.simulation.participants import Answer, Participant
from tests.simulation.streams import Channel

if TYPE_CHECKING:
    from amends_runtime.dispatch.unary import UnaryTransport
    from tests.simulation.runtime import Process
    from tests.simulation.world import World

__all__ = ["Network", "Way", "configured", "way_to"]

LATENCY_S = (0.0002, 0.008)
DELAY_S = (0.01, 0.3)  # long enough to overtake, often longer than a deadline
LATE_S = (0.0, 2.0)  # after the deadline
LATE_COPY_S = (0.2, 5.0)  # often after the saga's end


class Way:
    """A runtime process's way to one participant, as its lane has it: a stream, or call by call.

    What the lane hands over is on the disk, and asked for still; what it is answered with it is
    told once, in time, and not while it is still handing over.
    """

    def __init__(
        self, process: Process, participant: Participant, inner: ExchangeTransport | OneByOne
    ) -> None:
        self._process = process
        self._participant = participant
        self._inner = inner
        self._world = process.world
        self._open: dict[tuple[str, str, int, int, int], float] = {}

    @property
    def name(self) -> str:
        """As the transport calls itself now."""
        return self._inner.name

    @property
    def limit(self) -> int | None:
        """What the participant announced."""
        return self._inner.limit

    @property
    def room(self) -> int:
        """How many more it takes."""
        return self._inner.room

    def open(self, tasks: TaskGroup, room_changed: Callable[[], None]) -> None:
        """Its tasks are the process's."""
        self._inner.open(tasks, room_changed)

    async def close(self) -> None:
        """Close the connection."""
        await self._inner.close()

    def send(self, call: Call, answer: Callable[[Reply | None], None]) -> None:
        """Send one attempt, and hold the transport to its contract."""
        process, world = self._process, self._world
        if process.is_dead:
            return
        self._check_attempt(call)
        if call.two_phase:
            vote_rules.check_told(world, call.saga_id, call.verb, call.round)
        attempt = (call.saga_id, call.step_name, call.verb.value, call.round, call.attempt)
        self._open[attempt] = late_at_s = world.now_s() + call.timeout_ms / 1000 + 1e-6
        lane = process.engine.lanes.of(call.participant)
        is_probe = lane._breaker.state is BreakerState.HALF_OPEN
        is_handed_over = False

        def take(reply: Reply | None) -> None:
            if process.is_dead:
                return
            if not is_handed_over or self._open.pop(attempt, None) is None:
                world.violation("a call is answered once, and not while it is sent", str(attempt))
            # Who was paused notices late; the loop of a paused process is held.
            if world.now_s() > late_at_s and not world.faults.fired[Fault.PAUSE]:
                world.violation("a call is answered before its time is over", str(attempt))
            if reply is None:
                answer(None)
                return
            if world.faults.strikes(Fault.CRASH_AFTER_REPLY, _where(call)):
                process.die()
                return
            self._note_probe(call, is_probe=is_probe, reply=reply)
            answer(reply)

        self._inner.send(call, take)
        is_handed_over = True

    def check_open(self, message: participant_pb2.Call) -> None:
        """What leaves on a stream was handed over, and its lane has no answer to it yet."""
        verb = Verb[types_pb2.Verb.Name(message.verb).removeprefix("VERB_")].value
        attempt = (message.saga_id, message.step, verb, message.round, message.attempt)
        if attempt not in self._open:
            self._world.violation("no call leaves after it was answered", str(attempt))

    def _note_probe(self, call: Call, *, is_probe: bool, reply: Reply) -> None:
        lane = self._process.engine.lanes.of(call.participant)
        is_there = lane._route is not None and lane._route.transport is self
        attempt = (call.saga_id, call.step, call.verb, call.round, call.attempt)
        if is_probe and is_there and reply.away:
            self._world.facts.probes.add(attempt)
        else:
            self._world.facts.probes.discard(attempt)

    def _check_attempt(self, call: Call) -> None:
        """What leaves is on the disk, and asked for still.

        An attempt that was settled, lost or abandoned with its saga is nobody's: only what was on
        the wire by then may arrive.
        """
        disk, store = self._world.disk, self._process.store
        saga_no = disk.saga_nos.get(call.saga_id, 0)
        wanted = (call.step, call.verb, call.round, call.attempt)
        over: Record | None = None
        for turn in reversed(disk.history.get(saga_no, [])):
            for record in reversed(turn.records):
                if isinstance(record, SagaEnded):
                    over = record if store.knows(saga_no, turn.version) else over
                elif not isinstance(record, _OF_AN_ATTEMPT) or wanted != (
                    record.step,
                    record.verb,
                    record.round,
                    record.attempt,
                ):
                    continue
                elif not isinstance(record, AttemptStarted):
                    over = record if store.knows(saga_no, turn.version) else over
                elif over is not None:
                    self._world.violation(
                        "no call leaves for an attempt, or a saga, that is over",
                        f"{call.saga_id}: {call.step_name} {call.verb.name} attempt {call.attempt},"
                        f" after {over}",
                    )
                    return
                else:
                    return
        self._world.violation(
            "persist before send: no call leaves before its attempt is on the disk",
            f"{call.saga_id}: {call.step_name} {call.verb.name} attempt {call.attempt}",
        )


class Unary:
    """What the unary transport is to a runtime: a caller, and the channel of its streams."""

    name = "unary"

    def __init__(self, process: Process, participant: Participant) -> None:
        self._process = process
        self._participant = participant
        self._world = process.world
        self.channel = Channel(process, participant)

    async def call(self, call: Call) -> Reply:
        """Send one attempt and wait for its end, as the unary transport does."""
        process, faults = self._process, self._world.faults
        if not process.is_dead and faults.strikes(Fault.CRASH_BEFORE_CALL, _where(call)):
            process.die()
        await process.wait_if_dead()
        self._world.trace.add("{} calls {}", process.name, _where(call))
        message = wire.call_to_proto(
            call,
            process.store.identity,
            process.clock.now_ms() + call.timeout_ms,
            process.oldest_open_ms(),
        )
        answer = await self._world.network.exchange(
            self._participant, message, call.timeout_ms / 1000
        )
        await process.wait_if_dead()
        if isinstance(answer, grpc.StatusCode):
            return reply_of(answer, "simulated", away=self.is_away())
        outcome = wire.outcome_from_proto(answer, call.verb, two_phase=call.two_phase)
        return Reply(outcome, "OK", healthy=True)

    def is_away(self) -> bool:
        """Whether nobody is there."""
        return self._participant.is_down

    def explain(self, details: str) -> str:
        """Nothing to add."""
        return details

    async def close(self) -> None:
        """Nothing is open between calls."""


def way_to(process: Process, participant: Participant, oldest_open_ms: Callable[[], int]) -> Way:
    """Make a process's way to a participant: over streams if it has them."""
    unary = Unary(process, participant)
    if participant.name not in process.world.schedule.streams:
        return Way(process, participant, OneByOne(unary))
    transport = ExchangeTransport(
        participant.name,
        cast("UnaryTransport", unary),
        process.store.identity,
        max_result_bytes=wire.MAX_PAYLOAD_BYTES,
        oldest_open_ms=oldest_open_ms,
    )
    unary.channel.way = way = Way(process, participant, transport)
    return way


def _where(call: Call) -> str:
    return f"{call.saga_id}/{call.step_name}/{call.verb.name}/{call.attempt}"


_OF_AN_ATTEMPT = (
    AttemptStarted
    | StepExecuted
    | StepRejected
    | StepCompensated
    | AttemptFailed
    | AttemptLost
    | AttemptWithdrawn
    | StepPrepared
    | VoteRefused
    | HeuristicReported
)


class _Flight:
    """A call on its way, or two copies of it."""

    __slots__ = ("message", "number", "participant", "settle", "where")

    def __init__(
        self,
        number: int,
        participant: Participant,
        message: participant_pb2.Call,
        settle: Callable[[Answer], None],
    ) -> None:
        self.number = number
        self.participant = participant
        self.message = message
        self.settle = settle
        self.where = message.idempotency_key


class Network:
    """Carries calls."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.sent: list[tuple[Participant, participant_pb2.Call]] = []
        self.under_way = 0  # messages that have yet to arrive
        self._newest: dict[str, int] = {}  # by participant: the latest sent that has arrived

    async def exchange(
        self, participant: Participant, message: participant_pb2.Call, timeout_s: float
    ) -> Answer:
        """Send a call; give what came back of it, at the latest after `timeout_s`."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        # The caller's own timer: a caller that is paused notices its deadline when it goes on.
        deadline = loop.call_later(timeout_s, _settle, answer, _DEADLINE)
        try:
            self.hand_over(participant, message, timeout_s, partial(_settle, answer))
            return await answer
        finally:
            deadline.cancel()

    def hand_over(
        self,
        participant: Participant,
        message: participant_pb2.Call,
        timeout_s: float,
        settle: Callable[[Answer], None],
    ) -> None:
        """Send a call; `settle` is told of what came back of it, if anything did."""
        flight = _Flight(len(self.sent), participant, message, settle)
        self.sent.append((participant, message))
        self._send(flight, timeout_s)

    def _send(self, flight: _Flight, timeout_s: float) -> None:
        faults = self._world.faults
        if faults.strikes(Fault.REFUSE, flight.where):
            self._world.later(faults.between(*LATENCY_S), flight.settle, _UNAVAILABLE)
            return
        if faults.strikes(Fault.DUPLICATE, flight.where):
            self._arrive_after(faults.between(*DELAY_S), flight, is_copy=True)
        if faults.strikes(Fault.LATE_COPY, flight.where):
            self._arrive_after(faults.between(*LATE_COPY_S), flight, is_copy=True)
        if faults.strikes(Fault.LOSE_REQUEST, flight.where):
            return
        delay_s = faults.between(*LATENCY_S)
        if faults.strikes(Fault.DELAY, flight.where):
            delay_s += faults.between(*DELAY_S)
        if faults.strikes(Fault.LATE, flight.where):
            delay_s += timeout_s + faults.between(*LATE_S)
        self._arrive_after(delay_s, flight, is_copy=False)

    def _arrive_after(self, delay_s: float, flight: _Flight, *, is_copy: bool) -> None:
        self.under_way += 1
        self._world.later(delay_s, self._arrive, flight, is_copy)

    def _arrive(self, flight: _Flight, is_copy: bool) -> None:  # noqa: FBT001  # a callback
        self.under_way -= 1
        name = flight.participant.name
        newest = self._newest.get(name, -1)
        if flight.number < newest:
            self._world.faults.count(Fault.REORDER, flight.where)
        self._newest[name] = max(newest, flight.number)
        if is_copy:
            flight.participant.receive(flight.message, _drop)
        else:
            flight.participant.receive(flight.message, lambda answer: self._answer(flight, answer))

    def _answer(self, flight: _Flight, answer: Answer) -> None:
        faults = self._world.faults
        if faults.strikes(Fault.LOSE_REPLY, flight.where):
            return
        if not isinstance(answer, grpc.StatusCode):
            if faults.strikes(Fault.CUT_REPLY, flight.where):
                answer = faults.pick(_CUT)
            elif faults.strikes(Fault.EMPTY_REPLY, flight.where):
                self._world.facts.misread.add(_step_of(flight.message))
                answer = participant_pb2.Outcome()
            elif flight.message.verb == _COMPENSATE and faults.strikes(
                Fault.REJECT_COMPENSATION, flight.where
            ):
                answer = participant_pb2.Outcome(
                    rejected=participant_pb2.Rejected(reason="against_the_contract")
                )
        delay_s = faults.between(*LATENCY_S)
        if faults.strikes(Fault.DELAY, flight.where):
            delay_s += faults.between(*DELAY_S)
        self._world.later(delay_s, flight.settle, answer)


_DEADLINE = grpc.StatusCode.DEADLINE_EXCEEDED
_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
_CUT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
)
_COMPENSATE = types_pb2.VERB_COMPENSATE


def _step_of(message: participant_pb2.Call) -> tuple[str, str]:
    return message.saga_id, message.step


def _settle(future: asyncio.Future[Answer], answer: Answer) -> None:
    if not future.done():
        future.set_result(answer)


def _drop(answer: Answer) -> None:
    """Nobody waits for the reply to a copy."""


def configured(name: str) -> ParticipantAddress:
    """Where the configuration has a participant; every address leads to it."""
    return ParticipantAddress(name, f"simulated:{name}")
