"""The network between runtimes and participants: late, lossy, repetitive, and out of order.

A call and its reply pass through the real wire on both sides: what arrives is the contract's own
message. The network believes nothing and keeps a copy of all that was ever sent.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from amends.v1 import participant_pb2, types_pb2
from amends_runtime import wire
from amends_runtime.core.breaker import BreakerState
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    Record,
    SagaEnded,
    StepCompensated,
    StepExecuted,
    StepRejected,
)
from amends_runtime.dispatch.status import reply_of
from amends_runtime.ports import Call, ParticipantAddress, Reply
from tests.simulation.faults import Fault
from tests.simulation.participants import Answer, Participant

if TYPE_CHECKING:
    from tests.simulation.runtime import Process
    from tests.simulation.world import World

__all__ = ["Network", "Transport", "configured"]

LATENCY_S = (0.0002, 0.008)
DELAY_S = (0.01, 0.3)  # long enough to overtake, often longer than a deadline
LATE_S = (0.0, 2.0)  # after the deadline
LATE_COPY_S = (0.2, 5.0)  # often after the saga's end


class Transport:
    """A runtime process's way to one participant."""

    name = "simulated"

    def __init__(self, process: Process, participant: Participant) -> None:
        self._process = process
        self._participant = participant
        self._world = process.world

    async def call(self, call: Call) -> Reply:
        """Send one attempt and wait for its end, as the unary transport does."""
        process, faults = self._process, self._world.faults
        where = f"{call.saga_id}/{call.step_name}/{call.verb.name}/{call.attempt}"
        if not process.is_dead and faults.strikes(Fault.CRASH_BEFORE_CALL, where):
            process.die()
        await process.wait_if_dead()
        self._world.trace.add("{} calls {}", process.name, where)
        self._check_attempt(call)
        lane = process.engine.lanes.of(call.participant)
        is_probe = lane._breaker.state is BreakerState.HALF_OPEN
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
        if faults.strikes(Fault.CRASH_AFTER_REPLY, where):
            process.die()
            await process.wait_if_dead()
        if isinstance(answer, grpc.StatusCode):
            reply = reply_of(answer, "simulated", away=self._participant.is_down)
        else:
            reply = Reply(wire.outcome_from_proto(answer, call.verb), "OK", healthy=True)
        is_there = lane._route is not None and lane._route.transport is self
        attempt = (call.saga_id, call.step, call.verb, call.round, call.attempt)
        if is_probe and is_there and reply.away:
            self._world.facts.probes.add(attempt)
        else:
            self._world.facts.probes.discard(attempt)
        return reply

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

    async def close(self) -> None:
        """Nothing is open between calls."""


_OF_AN_ATTEMPT = (
    AttemptStarted
    | StepExecuted
    | StepRejected
    | StepCompensated
    | AttemptFailed
    | AttemptLost
    | AttemptWithdrawn
)


class _Flight:
    """A call on its way, or two copies of it."""

    __slots__ = ("answer", "message", "number", "participant", "where")

    def __init__(
        self,
        number: int,
        participant: Participant,
        message: participant_pb2.Call,
        answer: asyncio.Future[Answer],
    ) -> None:
        self.number = number
        self.participant = participant
        self.message = message
        self.answer = answer
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
        flight = _Flight(len(self.sent), participant, message, loop.create_future())
        self.sent.append((participant, message))
        # The caller's own timer: a caller that is paused notices its deadline when it goes on.
        deadline = loop.call_later(timeout_s, _settle, flight.answer, _DEADLINE)
        try:
            self._send(flight, timeout_s)
            return await flight.answer
        finally:
            deadline.cancel()

    def _send(self, flight: _Flight, timeout_s: float) -> None:
        faults = self._world.faults
        if faults.strikes(Fault.REFUSE, flight.where):
            self._world.later(faults.between(*LATENCY_S), _settle, flight.answer, _UNAVAILABLE)
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
        self._world.later(delay_s, _settle, flight.answer, answer)


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
