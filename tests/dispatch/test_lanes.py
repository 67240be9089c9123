"""Lanes: what waits, what leaves first, and what an open breaker does to it.

The transport here is a script: it records what was sent and answers when the test says so. Calls
over a real wire are in `test_unary.py` and in the acceptance tests.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
import structlog.testing

from amends_runtime.clock import SystemClock
from amends_runtime.core.breaker import BreakerPolicy, BreakerState
from amends_runtime.core.messages import (
    Answered,
    Done,
    InProgress,
    NotSent,
    Outcome,
    Rejected,
    Unknown,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Verb
from amends_runtime.dispatch.lanes import Lane
from amends_runtime.ports import Call, Clock, ParticipantAddress, Reply
from amends_runtime.telemetry.observers import Observers
from amends_runtime.testing.virtual_time import VirtualClock, VirtualLoop

DAY_S = 86_400.0
"""Of virtual time."""


class ScriptedTransport:
    """Records calls in the order in which they were sent; each waits until the test answers it."""

    name = "scripted"

    def __init__(self) -> None:
        self.sent: list[Call] = []
        self.closed = False
        self._replies: dict[tuple[str, int, bool], asyncio.Future[Reply]] = {}
        self._news = anyio.Event()

    async def call(self, call: Call) -> Reply:
        self.sent.append(call)
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[_key(call)] = reply
        self._news.set()
        return await reply

    async def close(self) -> None:
        """Nothing is open; that it was called is what a test sees."""
        self.closed = True
        self._news.set()

    async def wait_closed(self) -> None:
        while not self.closed:
            self._news = anyio.Event()
            await self._news.wait()

    def answer(
        self, call: Call, outcome: Outcome, *, healthy: bool | None = True, away: bool = False
    ) -> None:
        status = outcome.reason if isinstance(outcome, Unknown) else "OK"
        self._replies.pop(_key(call)).set_result(Reply(outcome, status, healthy, away))

    async def wait_sent(self, count: int) -> None:
        while len(self.sent) < count:
            self._news = anyio.Event()
            await self._news.wait()

    def names(self) -> list[str]:
        return [call.saga_id for call in self.sent]


class Sagas:
    """Takes what the lane delivers."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Answered | NotSent]] = []
        self._news = anyio.Event()

    def deliver(self, saga_id: str, message: Answered | NotSent) -> None:
        self.told.append((saga_id, message))
        self._news.set()

    async def wait_told(self, count: int) -> None:
        while len(self.told) < count:
            self._news = anyio.Event()
            await self._news.wait()


def _key(call: Call) -> tuple[str, int, bool]:
    return call.saga_id, call.attempt, call.poll


def a_call(
    saga_id: str, *, verb: Verb = Verb.EXECUTE, attempt: int = 1, two_phase: bool = False
) -> Call:
    """One attempt of the step `charge` of a saga."""
    return Call(
        saga_id=saga_id,
        definition_name="order",
        step=0,
        step_name="charge",
        participant="payments",
        action="charge",
        verb=verb,
        round=1,
        attempt=attempt,
        timeout_ms=10_000,
        input=Payload(),
        two_phase=two_phase,
    )


def a_vote(saga_id: str, attempt: int = 1) -> Call:
    """A Prepare."""
    return a_call(saga_id, verb=Verb.PREPARE, attempt=attempt, two_phase=True)


@asynccontextmanager
async def a_lane(
    limit: int = 256,
    policy: BreakerPolicy | None = None,
    *,
    connected: bool = True,
    clock: Clock | None = None,
    patience_s: float = 20,
) -> AsyncIterator[tuple[Lane, ScriptedTransport, Sagas]]:
    """A lane, the transport it sends by, and the sagas it answers to."""
    transport, sagas = ScriptedTransport(), Sagas()
    async with anyio.create_task_group() as tasks:
        lane = Lane(
            ParticipantAddress("payments", "127.0.0.1:1"),
            transport if connected else None,
            limit=limit,
            policy=policy or BreakerPolicy(),
            clock=clock or SystemClock(),
            deliver=sagas.deliver,
            observer=Observers([]),
            tasks=tasks,
        )
        with anyio.fail_after(patience_s):
            yield lane, transport, sagas
        await lane.close()
        tasks.cancel_scope.cancel()


async def test_a_call_is_sent_and_its_answer_delivered_with_the_attempt_it_belongs_to() -> None:
    """What comes back names step, verb, round and attempt, so that the saga can tell an echo."""
    async with a_lane() as (lane, transport, sagas):
        lane.submit(a_call("s1", attempt=3), started_at_ms=1)
        await transport.wait_sent(1)
        transport.answer(transport.sent[0], Rejected("no"))
        await sagas.wait_told(1)
        saga_id, told = sagas.told[0]
        assert saga_id == "s1"
        assert isinstance(told, Answered)
        assert (told.step, told.verb, told.round, told.attempt) == (0, Verb.EXECUTE, 1, 3)
        assert told.outcome == Rejected("no")
        assert 0 < told.sent_at_ms <= told.answered_at_ms


async def test_no_more_than_the_limit_is_on_the_wire_and_compensations_keep_a_share() -> None:
    """Of eight places seven may be forward calls'; the eighth is a compensation's."""
    async with a_lane(limit=8) as (lane, transport, _):
        for number in range(10):
            lane.submit(a_call(f"forward-{number}"), started_at_ms=number)
        await transport.wait_sent(7)
        assert lane.status().in_flight == 7
        assert lane.status().waiting == 3
        lane.submit(a_call("undo", verb=Verb.COMPENSATE), started_at_ms=99)
        await transport.wait_sent(8)
        assert transport.names()[-1] == "undo"
        assert lane.status().in_flight == 8


async def test_what_waits_leaves_compensations_first_and_then_by_the_age_of_its_saga() -> None:
    """Rather 200 sagas finished than 1,000 half done."""
    async with a_lane(limit=1) as (lane, transport, sagas):
        lane.submit(a_call("first"), started_at_ms=50)
        await transport.wait_sent(1)
        lane.submit(a_call("young"), started_at_ms=30)
        lane.submit(a_call("old"), started_at_ms=10)
        lane.submit(a_call("undo-young", verb=Verb.COMPENSATE), started_at_ms=40)
        lane.submit(a_call("undo-old", verb=Verb.COMPENSATE), started_at_ms=20)
        for done in range(4):
            transport.answer(transport.sent[done], Done())
            await sagas.wait_told(done + 1)
            await transport.wait_sent(done + 2)
        assert transport.names() == ["first", "undo-old", "undo-young", "old", "young"]


def test_failures_running_open_the_breaker_and_what_comes_waits_unsent() -> None:
    """An open breaker decides nothing: the call just waits, and leaves as the probe."""
    policy = BreakerPolicy(failures_to_open=3, open_ms=50, max_open_ms=50)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        async with a_lane(policy=policy, clock=VirtualClock(loop)) as (lane, transport, sagas):
            for number in range(3):
                lane.submit(a_call(f"s{number}"), started_at_ms=number)
            await transport.wait_sent(3)
            for call in list(transport.sent):
                transport.answer(call, Unknown("UNAVAILABLE"), healthy=False)
            await sagas.wait_told(3)
            assert lane.status().breaker.state is BreakerState.OPEN
            lane.submit(a_call("younger"), started_at_ms=20)
            lane.submit(a_call("elder"), started_at_ms=10)
            assert lane.status().waiting == 2
            await transport.wait_sent(4)  # after open_ms, without anybody asking
            assert transport.names()[3:] == ["elder"]
            assert lane.status().breaker.state is BreakerState.HALF_OPEN
            assert lane.status().waiting == 1
            transport.answer(transport.sent[3], Done())
            await transport.wait_sent(5)
            assert transport.names()[4] == "younger"
            assert lane.status().breaker.state is BreakerState.CLOSED

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


def test_an_outage_is_two_lines_of_the_log_and_its_probes_are_details() -> None:
    """A warning when the breaker opens, an info when it closes: not two warnings a probe."""
    policy = BreakerPolicy(failures_to_open=1, open_ms=50, max_open_ms=50)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        async with a_lane(policy=policy, clock=VirtualClock(loop)) as (lane, transport, sagas):
            for attempt in (1, 2, 3):  # the second is a probe that fails, the third one that helps
                lane.submit(a_call("s1", attempt=attempt), started_at_ms=1)
                await transport.wait_sent(attempt)
                failed = attempt < 3
                outcome = Unknown("UNAVAILABLE") if failed else Done()
                transport.answer(transport.sent[-1], outcome, healthy=not failed)
                await sagas.wait_told(attempt)

    with (
        structlog.testing.capture_logs() as entries,
        asyncio.Runner(loop_factory=VirtualLoop) as runner,
    ):
        runner.run(main())
    changes = [each for each in entries if each["event"] == "breaker_changed"]
    assert [(each["log_level"], each["state"]) for each in changes] == [
        ("warning", "OPEN"),
        ("debug", "HALF_OPEN"),
        ("debug", "OPEN"),
        ("debug", "HALF_OPEN"),
        ("info", "CLOSED"),
    ]


def test_a_probe_is_told_as_one_only_if_nobody_is_there() -> None:
    """Who is there and answers with an error is tried like any other, and given up at last."""
    policy = BreakerPolicy(failures_to_open=1, open_ms=50, max_open_ms=50)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        async with a_lane(policy=policy, clock=VirtualClock(loop)) as (lane, transport, sagas):
            for number, away in enumerate([True, False, True]):
                lane.submit(a_call(f"s{number}"), started_at_ms=number)
                await transport.wait_sent(number + 1)
                call = transport.sent[number]
                transport.answer(call, Unknown("UNAVAILABLE"), healthy=False, away=away)
                await sagas.wait_told(number + 1)
            told = [message for _, message in sagas.told]
            # The first one opened the breaker: it was no probe, though nobody was there.
            assert [getattr(message, "probe", None) for message in told] == [False, False, True]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


async def test_a_refusal_is_a_healthy_answer_and_a_handler_that_raises_says_nothing() -> None:
    """Neither a business refusal nor one action's bug closes the way for the others."""
    async with a_lane(policy=BreakerPolicy(failures_to_open=1)) as (lane, transport, sagas):
        cases: list[tuple[Outcome, bool | None]] = [
            (Rejected("no"), True),
            (Unknown("UNKNOWN"), None),
        ]
        for number, (outcome, healthy) in enumerate(cases):
            lane.submit(a_call(f"s{number}"), started_at_ms=0)
            await transport.wait_sent(number + 1)
            transport.answer(transport.sent[number], outcome, healthy=healthy)
            await sagas.wait_told(number + 1)
        assert lane.status().breaker.state is BreakerState.CLOSED


async def test_a_probe_that_says_nothing_lets_the_next_one_through() -> None:
    """A half-open breaker never stays shut because its probe ended without a verdict."""
    policy = BreakerPolicy(failures_to_open=1, open_ms=1, max_open_ms=1)
    async with a_lane(policy=policy) as (lane, transport, sagas):
        lane.submit(a_call("s0"), started_at_ms=0)
        await transport.wait_sent(1)
        transport.answer(transport.sent[0], Unknown("UNAVAILABLE"), healthy=False)
        await sagas.wait_told(1)
        lane.submit(a_call("probe"), started_at_ms=1)
        lane.submit(a_call("next"), started_at_ms=2)
        await transport.wait_sent(2)
        transport.answer(transport.sent[1], Unknown("UNKNOWN"), healthy=None)
        await transport.wait_sent(3)
        assert transport.names()[2] == "next"


async def test_a_probe_that_an_operator_asks_for_leaves_at_once() -> None:
    """He has mended what was broken: what waits need not wait for the breaker's own time."""
    policy = BreakerPolicy(failures_to_open=1, open_ms=3_600_000, max_open_ms=3_600_000)
    async with a_lane(policy=policy) as (lane, transport, sagas):
        lane.probe_now()  # nothing is wrong, and nothing happens
        lane.submit(a_call("s0"), started_at_ms=0)
        await transport.wait_sent(1)
        transport.answer(transport.sent[0], Unknown("UNAVAILABLE"), healthy=False)
        await sagas.wait_told(1)
        for number in (1, 2):
            lane.submit(a_call(f"s{number}"), started_at_ms=number)
        assert lane.status().breaker.state is BreakerState.OPEN
        lane.probe_now()
        await transport.wait_sent(2)
        lane.probe_now()  # one is under way
        transport.answer(transport.sent[1], Unknown("UNAVAILABLE"), healthy=False)
        await sagas.wait_told(2)
        assert lane.status().breaker.state is BreakerState.OPEN
        assert transport.names() == ["s0", "s1"]
        lane.probe_now()
        await transport.wait_sent(3)
        transport.answer(transport.sent[2], Done())
        await sagas.wait_told(3)
        assert transport.names() == ["s0", "s1", "s2"]
        assert lane.status().breaker.state is BreakerState.CLOSED


async def test_a_probe_that_is_asked_for_waits_for_what_comes() -> None:
    """Where nothing waits the next call is it, also if it comes much later."""
    policy = BreakerPolicy(failures_to_open=1, open_ms=3_600_000, max_open_ms=3_600_000)
    async with a_lane(policy=policy) as (lane, transport, sagas):
        lane.submit(a_call("s0"), started_at_ms=0)
        await transport.wait_sent(1)
        transport.answer(transport.sent[0], Unknown("UNAVAILABLE"), healthy=False)
        await sagas.wait_told(1)
        lane.probe_now()
        assert lane.status().breaker.state is BreakerState.OPEN
        lane.submit(a_call("s1"), started_at_ms=1)
        await transport.wait_sent(2)


async def test_withdrawing_answers_not_sent_only_for_what_never_left() -> None:
    """NotSent means that there is nothing to undo, so it must be true."""
    async with a_lane(limit=1) as (lane, transport, sagas):
        lane.submit(a_call("out"), started_at_ms=0)
        await transport.wait_sent(1)
        lane.submit(a_call("waiting"), started_at_ms=1)
        lane.withdraw("out", 0, Verb.EXECUTE, 1)
        lane.withdraw("waiting", 0, Verb.EXECUTE, 1)
        assert sagas.told == [("waiting", NotSent(step=0, verb=Verb.EXECUTE, round=1, attempt=1))]
        transport.answer(transport.sent[0], Done())
        await sagas.wait_told(2)
        lane.submit(a_call("later"), started_at_ms=2)
        await transport.wait_sent(2)
        assert transport.names() == ["out", "later"]


async def test_a_poll_asks_the_same_attempt_again_and_keeps_when_it_was_first_sent() -> None:
    """Polls count nothing but themselves."""
    async with a_lane() as (lane, transport, sagas):
        lane.submit(a_call("s"), started_at_ms=0)
        await transport.wait_sent(1)
        transport.answer(transport.sent[0], InProgress(1))
        await sagas.wait_told(1)
        first = sagas.told[0][1]
        assert isinstance(first, Answered)
        again = msgspec.structs.replace(a_call("s"), poll=True)
        lane.poll(again, 0, at_ms=0, sent_at_ms=first.sent_at_ms, polls=1)
        await transport.wait_sent(2)
        assert (transport.sent[1].attempt, transport.sent[1].poll) == (1, True)
        transport.answer(transport.sent[1], Done())
        await sagas.wait_told(2)
        second = sagas.told[1][1]
        assert isinstance(second, Answered)
        assert (second.attempt, second.polls) == (1, 1)
        assert second.sent_at_ms == first.sent_at_ms


async def test_withdrawing_a_poll_brings_it_forward_to_the_attempts_own_deadline() -> None:
    """A saga that turns back does not wait a day for a poll that was planned before."""
    async with a_lane() as (lane, transport, sagas):
        day_ms = 24 * 3600 * 1000
        now_ms = SystemClock().now_ms()
        lane.poll(a_call("s"), 0, at_ms=now_ms + day_ms, sent_at_ms=now_ms - 60_000, polls=1)
        assert transport.sent == []
        lane.withdraw("s", 0, Verb.EXECUTE, 1)
        await transport.wait_sent(1)
        assert sagas.told == []  # it was sent once: NotSent would be a lie


@pytest.mark.parametrize("due", ["queued", "planned"])
def test_a_withdrawn_poll_that_cannot_be_sent_is_unknown_at_the_attempts_deadline(due: str) -> None:
    """Nobody is there to be asked: the saga that turns back waits no longer than for an answer."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        clock = VirtualClock(loop)
        async with a_lane(connected=False, clock=clock, patience_s=DAY_S) as made:
            lane, transport, sagas = made
            call, sent_at_ms = a_call("s"), clock.now_ms()
            deadline_at_ms = sent_at_ms + call.timeout_ms
            at_ms = sent_at_ms + (1_000 if due == "queued" else 3_600_000)
            lane.poll(call, 0, at_ms=at_ms, sent_at_ms=sent_at_ms, polls=3)
            await anyio.sleep(2)
            assert lane.status().waiting == (due == "queued")
            lane.withdraw("s", 0, Verb.EXECUTE, 1)
            lane.withdraw("s", 0, Verb.EXECUTE, 1)  # by the deadline and by an operator
            await anyio.sleep((deadline_at_ms - clock.now_ms()) / 1000)
            assert sagas.told == []
            await sagas.wait_told(1)
            assert clock.now_ms() <= deadline_at_ms + 1_000
            [(saga_id, told)] = sagas.told
            assert saga_id == "s"
            assert isinstance(told, Answered)
            assert isinstance(told.outcome, Unknown)
            assert (told.outcome.reason, told.polls) == ("IN_PROGRESS", 3)
            assert (told.sent_at_ms, told.attempt) == (sent_at_ms, 1)
            lane.move(ELSEWHERE, transport)  # it is back, too late
            await anyio.sleep(7_200)
            assert transport.sent == []
            assert len(sagas.told) == 1

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


def test_a_withdrawn_poll_that_is_on_the_wire_gets_its_answer() -> None:
    """Its deadline is gRPC's to keep, and its answer is the participant's."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        clock = VirtualClock(loop)
        async with a_lane(clock=clock, patience_s=DAY_S) as (lane, transport, sagas):
            now_ms = clock.now_ms()
            lane.poll(a_call("s"), 0, at_ms=now_ms + 1_000, sent_at_ms=now_ms, polls=1)
            lane.withdraw("s", 0, Verb.EXECUTE, 1)
            await transport.wait_sent(1)
            await anyio.sleep(60)
            assert sagas.told == []
            transport.answer(transport.sent[0], Done())
            await sagas.wait_told(1)
            told = sagas.told[0][1]
            assert isinstance(told, Answered)
            assert told.outcome == Done()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


@pytest.mark.parametrize("due", ["queued", "planned"])
def test_a_forgotten_poll_never_leaves(due: str) -> None:
    """Its saga was abandoned: nothing of it takes effect when the participant is back."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        clock = VirtualClock(loop)
        async with a_lane(connected=False, clock=clock, patience_s=DAY_S) as made:
            lane, transport, sagas = made
            now_ms = clock.now_ms()
            at_ms = now_ms + (1_000 if due == "queued" else 3_600_000)
            lane.poll(a_call("s"), 0, at_ms=at_ms, sent_at_ms=now_ms, polls=1)
            await anyio.sleep(2)
            lane.withdraw("s", 0, Verb.EXECUTE, 1)
            lane.forget("s", steps=1)
            assert lane.status().waiting == 0
            lane.move(ELSEWHERE, transport)
            await anyio.sleep(7_200)
            assert transport.sent == []
            assert sagas.told == []

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


async def test_forgotten_calls_never_leave_and_a_new_attempt_takes_the_place_of_the_old() -> None:
    """After a failed commit the saga asks anew; what it had waiting must not leave besides."""
    async with a_lane(limit=1) as (lane, transport, sagas):
        lane.submit(a_call("out"), started_at_ms=0)
        await transport.wait_sent(1)
        lane.submit(a_call("dropped"), started_at_ms=1)
        lane.submit(a_call("replaced", attempt=1), started_at_ms=2)
        lane.submit(a_call("replaced", attempt=2), started_at_ms=2)
        lane.forget("dropped", steps=1)
        transport.answer(transport.sent[0], Done())
        await transport.wait_sent(2)
        transport.answer(transport.sent[1], Done())
        await sagas.wait_told(2)
        assert [(c.saga_id, c.attempt) for c in transport.sent] == [("out", 1), ("replaced", 2)]
        assert lane.status().waiting == 0


class KeptCall(Call, frozen=True, kw_only=True, weakref=True):
    """One of which it can be seen whether anybody still has it."""


def kept(call: Call) -> tuple[KeptCall, weakref.ref[KeptCall]]:
    """The same call, and what tells whether it is still there."""
    again = KeptCall(**{name: getattr(call, name) for name in call.__struct_fields__})
    return again, weakref.ref(again)


@pytest.mark.parametrize("verb", [Verb.EXECUTE, Verb.COMPENSATE])
@pytest.mark.parametrize("how", ["withdrawn", "forgotten", "replaced"])
async def test_a_lane_keeps_no_more_of_what_left_its_queue_than_of_what_waits(
    how: str, verb: Verb
) -> None:
    """Also behind the oldest call, which waits for as long as its participant is away."""
    async with a_lane(connected=False) as (lane, _, _sagas):
        for number in range(10):
            lane.submit(a_call(f"waits-{number}", verb=verb), started_at_ms=number)
        watched = []
        for number in range(500):
            saga_id = "comes" if how == "replaced" else f"comes-{number}"
            call, watch = kept(a_call(saga_id, verb=verb, attempt=number + 1))
            watched.append(watch)
            lane.submit(call, started_at_ms=1_000 + number)
            if how == "withdrawn":
                lane.withdraw(saga_id, 0, verb, number + 1)
            elif how == "forgotten":
                lane.forget(saga_id, steps=1)
            del call
        waiting = lane.status().waiting
        assert waiting == (11 if how == "replaced" else 10)
        assert sum(watch() is not None for watch in watched) <= waiting


async def test_calls_for_a_participant_that_is_not_registered_wait_visibly() -> None:
    """Nothing is lost and nothing is compensated because a name is missing from a file."""
    async with a_lane(connected=False) as (lane, transport, _):
        lane.submit(a_call("s"), started_at_ms=0)
        assert lane.status().waiting == 1
        assert transport.sent == []


async def test_a_lane_that_stops_sending_still_delivers_what_is_on_the_wire() -> None:
    """A shutdown takes in replies and sends nothing new."""
    async with a_lane() as (lane, transport, sagas):
        lane.submit(a_call("out"), started_at_ms=0)
        await transport.wait_sent(1)
        lane.stop_sending()
        lane.submit(a_call("kept"), started_at_ms=0)
        transport.answer(transport.sent[0], Done())
        await sagas.wait_told(1)
        assert transport.names() == ["out"]
        assert lane.in_flight == 0


# -- moving ----------------------------------------------------------------------------------------

ELSEWHERE = ParticipantAddress("payments", "127.0.0.1:2", by_operator=True)


async def test_a_moved_lane_keeps_its_queue_and_the_answers_of_what_is_on_the_wire() -> None:
    """Each call goes one way; the old one is closed after its last answer, and not before."""
    async with a_lane(limit=2) as (lane, old, sagas):
        lane.submit(a_call("out-1", verb=Verb.COMPENSATE), started_at_ms=0)
        lane.submit(a_call("out-2", verb=Verb.COMPENSATE), started_at_ms=1)
        lane.submit(a_call("waits"), started_at_ms=2)
        await old.wait_sent(2)
        new = ScriptedTransport()
        lane.move(ELSEWHERE, new)
        await new.wait_sent(1)  # calls on the old way do not count for the new one's limit
        assert new.names() == ["waits"]
        status = lane.status()
        assert (status.address, status.by_operator) == ("127.0.0.1:2", True)
        assert (status.in_flight, status.waiting) == (3, 0)
        old.answer(old.sent[1], Done())
        await sagas.wait_told(1)
        assert not old.closed
        old.answer(old.sent[0], Rejected("no"))
        await sagas.wait_told(2)
        await old.wait_closed()
        assert not new.closed
        new.answer(new.sent[0], Done())
        await sagas.wait_told(3)
        assert sorted(saga_id for saga_id, _ in sagas.told) == ["out-1", "out-2", "waits"]
        assert lane.in_flight == 0
    assert new.closed


async def test_an_idle_lane_closes_its_old_way_at_once() -> None:
    """There is no last answer to wait for."""
    async with a_lane() as (lane, old, _):
        new = ScriptedTransport()
        lane.move(ELSEWHERE, new)
        await old.wait_closed()
        lane.submit(a_call("s"), started_at_ms=0)
        await new.wait_sent(1)


async def test_a_moved_lane_begins_with_a_new_breaker() -> None:
    """What waited for the old place's breaker leaves, and late failures there count nowhere."""
    policy = BreakerPolicy(failures_to_open=2, open_ms=3_600_000, max_open_ms=3_600_000)
    async with a_lane(policy=policy) as (lane, old, sagas):
        for number in range(5):
            lane.submit(a_call(f"s{number}"), started_at_ms=number)
        await old.wait_sent(5)
        for call in old.sent[:2]:
            old.answer(call, Unknown("UNAVAILABLE", "gone"), healthy=False)
        await sagas.wait_told(2)
        lane.submit(a_call("waits"), started_at_ms=9)
        assert lane.status().breaker.state is BreakerState.OPEN
        new = ScriptedTransport()
        lane.move(ELSEWHERE, new)
        await new.wait_sent(1)
        status = lane.status()
        assert status.breaker.state is BreakerState.CLOSED
        assert status.breaker.failures == 0
        assert status.last_error == ""
        for call in old.sent[2:]:
            old.answer(call, Unknown("UNAVAILABLE", "gone"), healthy=False)
        await sagas.wait_told(5)
        assert lane.status().breaker.failures == 0
        assert lane.status().last_error == ""


async def test_a_poll_follows_the_participant() -> None:
    """The attempt's key is the same wherever it is asked."""
    async with a_lane() as (lane, old, _):
        call = msgspec.structs.replace(a_call("s"), poll=True)
        lane.poll(call, 0, SystemClock().now_ms() + 20, 1, 1)
        new = ScriptedTransport()
        lane.move(ELSEWHERE, new)
        await new.wait_sent(1)
        assert old.sent == []


async def test_a_lane_that_leads_nowhere_keeps_its_calls_for_the_next_place() -> None:
    """Removed: what is on the wire is answered, what comes waits; and leaves when it is back."""
    async with a_lane() as (lane, old, sagas):
        lane.submit(a_call("out"), started_at_ms=0)
        await old.wait_sent(1)
        lane.move(ParticipantAddress("payments", ""), None)
        lane.submit(a_call("waits"), started_at_ms=1)
        assert not lane.is_gone
        assert lane.status().waiting == 1
        assert lane.status().transport == ""
        old.answer(old.sent[0], Done())
        await sagas.wait_told(1)
        await old.wait_closed()
        new = ScriptedTransport()
        lane.move(ELSEWHERE, new)
        await new.wait_sent(1)
        assert new.names() == ["waits"]


async def test_of_a_removed_lane_without_calls_nothing_is_left_to_see() -> None:
    """It is listed for as long as something waits for it."""
    async with a_lane() as (lane, _, _sagas):
        assert not lane.is_gone
        lane.move(ParticipantAddress("payments", ""), None)
        assert lane.is_gone


# -- votes -----------------------------------------------------------------------------------------

ONE_FAILS = BreakerPolicy(failures_to_open=1, open_ms=1_000, max_open_ms=1_000)


@asynccontextmanager
async def an_open_lane() -> AsyncIterator[tuple[Lane, ScriptedTransport, Sagas]]:
    """In virtual time: its breaker has just opened, because the saga `first` was not answered."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    async with a_lane(policy=ONE_FAILS, clock=VirtualClock(loop), patience_s=DAY_S) as made:
        lane, transport, sagas = made
        lane.submit(a_vote("first"), started_at_ms=0)
        await transport.wait_sent(1)
        transport.answer(transport.sent[0], Unknown("UNAVAILABLE"), healthy=False)
        await sagas.wait_told(1)
        assert lane.status().breaker.state is BreakerState.OPEN
        yield made


def refused(sagas: Sagas) -> list[tuple[str, str]]:
    """Which sagas' votes were not asked for, and why."""
    return [(saga_id, told.reason) for saga_id, told in sagas.told if isinstance(told, NotSent)]


def test_a_vote_does_not_wait_for_an_open_breaker_and_everything_else_does() -> None:
    """Whoever has voted yes already holds what it prepared until all others have voted."""

    async def main() -> None:
        async with an_open_lane() as (lane, transport, sagas):
            lane.submit(a_vote("vote"), started_at_ms=1)
            lane.submit(a_call("step"), started_at_ms=2)
            lane.submit(a_call("commit", two_phase=True), started_at_ms=3)
            lane.submit(a_call("undo", verb=Verb.COMPENSATE, two_phase=True), started_at_ms=4)
            assert refused(sagas) == [("vote", "BREAKER_OPEN")]
            told = sagas.told[-1][1]
            assert (told.step, told.verb, told.round, told.attempt) == (0, Verb.PREPARE, 1, 1)
            assert lane.status().waiting == 3
            assert not lane.holds("vote", 0, Verb.PREPARE)
            await transport.wait_sent(2)  # what waits is the probe, by the usual order
            assert transport.names()[1:] == ["commit"]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


def test_a_vote_is_the_probe_when_one_is_due_and_others_are_refused_meanwhile() -> None:
    """Else a participant that is only asked for votes would stay shut out for ever."""

    async def main() -> None:
        async with an_open_lane() as (lane, transport, sagas):
            await anyio.sleep(0.9)
            lane.submit(a_vote("early"), started_at_ms=1)
            await anyio.sleep(3_600)  # nothing waits, and nobody probes
            assert transport.names() == ["first"]
            lane.submit(a_vote("probe"), started_at_ms=2)
            lane.submit(a_vote("beside"), started_at_ms=3)
            await transport.wait_sent(2)
            assert transport.names() == ["first", "probe"]
            assert refused(sagas) == [("early", "BREAKER_OPEN"), ("beside", "BREAKER_OPEN")]
            transport.answer(transport.sent[1], Done())
            await sagas.wait_told(4)
            lane.submit(a_vote("later"), started_at_ms=4)
            await transport.wait_sent(3)
            assert lane.status().breaker.state is BreakerState.CLOSED

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


def test_queued_votes_are_refused_when_the_breaker_opens() -> None:
    """They waited for room, which they may; now they would wait for a participant."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        async with a_lane(limit=1, policy=ONE_FAILS, clock=VirtualClock(loop)) as made:
            lane, transport, sagas = made
            lane.submit(a_vote("on the wire"), started_at_ms=0)
            for number in range(3):
                lane.submit(a_vote(f"vote-{number}"), started_at_ms=number)
            lane.submit(a_call("step"), started_at_ms=9)
            await transport.wait_sent(1)
            assert refused(sagas) == []
            transport.answer(transport.sent[0], Unknown("UNAVAILABLE"), healthy=False)
            await sagas.wait_told(4)
            assert sorted(refused(sagas)) == [(f"vote-{n}", "BREAKER_OPEN") for n in range(3)]
            assert lane.status().waiting == 1
            await transport.wait_sent(2)
            assert transport.names() == ["on the wire", "step"]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


def test_a_lane_keeps_nothing_of_the_votes_that_it_refuses() -> None:
    """Neither of one that comes while older calls wait for the participant, nor of a queued one."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        async with a_lane(limit=1, policy=ONE_FAILS, clock=VirtualClock(loop)) as made:
            lane, transport, sagas = made
            lane.submit(a_call("on the wire"), started_at_ms=0)
            lane.submit(a_call("waits"), started_at_ms=1)
            await transport.wait_sent(1)
            watched = []
            for number in range(500):
                if number == 250:
                    transport.answer(transport.sent[0], Unknown("UNAVAILABLE"), healthy=False)
                    await sagas.wait_told(251)
                vote, watch = kept(a_vote(f"vote-{number}"))
                watched.append(watch)
                lane.submit(vote, started_at_ms=1_000 + number)
                del vote
            assert len(refused(sagas)) == 500
            assert lane.status().waiting == 1
            assert [watch for watch in watched if watch() is not None] == []

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


_looks: list[str] = []


class WatchedCall(Call, frozen=True, kw_only=True):
    """One that notes in `_looks` whenever anybody looks at it."""

    def __getattribute__(self, name: str) -> Any:
        _looks.append(name)
        return super().__getattribute__(name)


def test_refusing_a_vote_looks_at_nothing_else_that_waits() -> None:
    """Its cost is the same however many calls wait for the participant."""

    async def main() -> None:
        async with an_open_lane() as (lane, _transport, sagas):
            for number in range(200):
                fields = {name: getattr(a_call("s"), name) for name in Call.__struct_fields__}
                call = WatchedCall(**fields | {"saga_id": f"waits-{number}"})
                lane.submit(call, started_at_ms=number)
            assert _looks
            _looks.clear()
            for number in range(100):
                lane.submit(a_vote(f"vote-{number}"), started_at_ms=1_000 + number)
            assert len(refused(sagas)) == 100
            assert _looks == []

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


async def test_nobody_waits_for_the_vote_of_a_participant_that_is_not_registered() -> None:
    """Nor of one that is taken away while its votes wait for room."""
    async with a_lane(connected=False) as (lane, _, sagas):
        lane.submit(a_vote("s"), started_at_ms=0)
        assert refused(sagas) == [("s", "NO_PARTICIPANT")]
    async with a_lane(limit=1) as (lane, transport, sagas):
        lane.submit(a_vote("out"), started_at_ms=0)
        lane.submit(a_vote("queued"), started_at_ms=1)
        lane.submit(a_call("commit", two_phase=True), started_at_ms=2)
        await transport.wait_sent(1)
        lane.move(ParticipantAddress("payments", ""), None)
        assert refused(sagas) == [("queued", "NO_PARTICIPANT")]
        assert lane.status().waiting == 1


def test_a_vote_in_progress_that_cannot_be_asked_is_unknown_and_not_unsent() -> None:
    """It was sent: it may have been cast, and only Compensate makes sure of it."""

    async def main() -> None:
        async with an_open_lane() as (lane, transport, sagas):
            lane.poll(a_vote("s", attempt=2), 0, at_ms=2, sent_at_ms=1, polls=1)
            await sagas.wait_told(2)
            saga_id, told = sagas.told[1]
            assert saga_id == "s"
            assert isinstance(told, Answered)
            assert isinstance(told.outcome, Unknown)
            assert (told.outcome.reason, told.attempt) == ("BREAKER_OPEN", 2)
            assert not told.probe
            assert lane.status().waiting == 0
            assert transport.names() == ["first"]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


async def test_a_lane_that_stops_sending_refuses_no_vote() -> None:
    """A shutdown decides nothing: the next runtime asks again."""
    async with a_lane(connected=False) as (lane, _, sagas):
        lane.stop_sending()
        lane.submit(a_vote("s"), started_at_ms=0)
        assert sagas.told == []
        assert lane.status().waiting == 1


async def test_votes_and_steps_that_wait_for_room_leave_by_the_age_of_their_sagas() -> None:
    """Neither overtakes the other for what it is."""
    async with a_lane(limit=1) as (lane, transport, sagas):
        lane.submit(a_call("first"), started_at_ms=0)
        lane.submit(a_vote("vote-4"), started_at_ms=4)
        lane.submit(a_call("step-3"), started_at_ms=3)
        lane.submit(a_vote("vote-2"), started_at_ms=2)
        lane.submit(a_call("step-1"), started_at_ms=1)
        for done in range(5):
            await transport.wait_sent(done + 1)
            transport.answer(transport.sent[done], Done())
            await sagas.wait_told(done + 1)
        assert transport.names() == ["first", "step-1", "vote-2", "step-3", "vote-4"]


async def test_commits_of_a_two_phase_commit_leave_with_the_compensations() -> None:
    """They end a holding, too: before votes and steps of older sagas, and by a share of places."""
    async with a_lane(limit=8) as (lane, transport, sagas):
        for number in range(9):
            lane.submit(a_vote(f"vote-{number}"), started_at_ms=number)
        await transport.wait_sent(7)
        lane.submit(a_call("commit", two_phase=True), started_at_ms=99)
        await transport.wait_sent(8)
        assert transport.names()[7:] == ["commit"]
        lane.submit(a_call("step"), started_at_ms=0)
        lane.submit(a_call("commit-2", two_phase=True), started_at_ms=98)
        transport.answer(transport.sent[0], Done())
        await transport.wait_sent(9)
        assert transport.names()[8:] == ["commit-2"]
        assert refused(sagas) == []
