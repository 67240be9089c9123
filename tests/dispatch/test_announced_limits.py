"""A lane whose participant announces how many calls it takes at once."""

from __future__ import annotations

from collections.abc import Callable

import anyio
from anyio.abc import TaskGroup

from amends_runtime.clock import SystemClock
from amends_runtime.core.breaker import BreakerPolicy
from amends_runtime.core.messages import Answered, Done, NotSent, Unknown
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Verb
from amends_runtime.dispatch.lanes import DEFAULT_LIMIT, Lane
from amends_runtime.ports import Call, ParticipantAddress, Reply
from amends_runtime.telemetry.observers import Observers


class Announcing:
    """A transport to a participant that announces its limit when the test says so."""

    name = "announcing"

    def __init__(self) -> None:
        self.limit: int | None = None
        self.room = 10_000
        self.sent: list[tuple[Call, Callable[[Reply | None], None]]] = []

    def open(self, tasks: TaskGroup, room_changed: Callable[[], None]) -> None:
        """Nothing is connected."""
        self._room_changed = room_changed

    def make_room(self, room: int) -> None:
        """Say how many more calls it takes."""
        self.room = room
        self._room_changed()

    def announce(self, limit: int | None) -> None:
        """Say how many calls there may be at once."""
        self.limit = limit
        self._room_changed()

    def send(self, call: Call, answer: Callable[[Reply | None], None]) -> None:
        """Keep it."""
        self.sent.append((call, answer))

    def names(self) -> list[str]:
        """The sagas whose calls were sent, in their order."""
        return [call.saga_id for call, _ in self.sent]

    async def close(self) -> None:
        """Nothing is open."""


def a_call(saga_id: str, verb: Verb = Verb.EXECUTE) -> Call:
    """One attempt of a step of a saga."""
    return Call(
        saga_id=saga_id,
        definition_name="order",
        step=0,
        step_name="charge",
        participant="payments",
        action="charge",
        verb=verb,
        round=1,
        attempt=1,
        timeout_ms=10_000,
        input=Payload(),
    )


def a_lane(
    transport: Announcing,
    tasks: TaskGroup,
    limit: int | None = None,
    told: list[tuple[str, Answered | NotSent]] | None = None,
) -> Lane:
    """A lane, and what it tells sagas."""

    def deliver(saga_id: str, message: Answered | NotSent) -> None:
        if told is not None:
            told.append((saga_id, message))

    return Lane(
        ParticipantAddress("payments", "127.0.0.1:1"),
        transport,
        limit=limit,
        policy=BreakerPolicy(),
        clock=SystemClock(),
        deliver=deliver,
        observer=Observers([]),
        tasks=tasks,
    )


async def test_what_a_participant_announces_is_the_limit_and_compensations_keep_a_share() -> None:
    """Until it does, the usual one; more places let more calls leave, at once."""
    async with anyio.create_task_group() as tasks:
        transport = Announcing()
        lane = a_lane(transport, tasks)
        assert lane.status().limit == DEFAULT_LIMIT
        transport.announce(2)
        assert lane.status().limit == 2
        for saga_id in ("a", "b", "c"):
            lane.submit(a_call(saga_id), started_at_ms=1)
        assert transport.names() == ["a"]
        lane.submit(a_call("d", Verb.COMPENSATE), started_at_ms=9)
        assert transport.names() == ["a", "d"]
        transport.announce(3)
        assert transport.names() == ["a", "d", "b"]
        _, answer = transport.sent[0]
        answer(Reply(Done(), "OK", healthy=True))
        assert transport.names() == ["a", "d", "b", "c"]
        await lane.close()


async def test_the_operators_limit_and_the_participants_the_smaller_one_counts() -> None:
    """Whoever of both takes less."""
    async with anyio.create_task_group() as tasks:
        transport = Announcing()
        lane = a_lane(transport, tasks, limit=5)
        limits = []
        for announced in (None, 2, 100):
            transport.announce(announced)
            limits.append(lane.status().limit)
        assert limits == [5, 2, 5]
        await lane.close()


async def test_what_the_transport_has_no_room_for_waits_in_the_lane() -> None:
    """There no time of it runs, and it can still be withdrawn."""
    async with anyio.create_task_group() as tasks:
        transport = Announcing()
        told: list[tuple[str, Answered | NotSent]] = []
        lane = a_lane(transport, tasks, told=told)
        transport.make_room(0)
        lane.submit(a_call("a"), started_at_ms=1)
        lane.submit(a_call("b"), started_at_ms=2)
        assert (transport.names(), lane.status().waiting) == ([], 2)
        lane.withdraw("b", 0, Verb.EXECUTE, 1)
        assert [(saga_id, type(message)) for saga_id, message in told] == [("b", NotSent)]
        transport.make_room(1)
        assert transport.names() == ["a"]
        await lane.close()


async def test_a_call_that_is_given_back_was_never_sent() -> None:
    """It waits again, tells its saga nothing, and leaves with a new time; or is withdrawn."""
    async with anyio.create_task_group() as tasks:
        transport = Announcing()
        told: list[tuple[str, Answered | NotSent]] = []
        lane = a_lane(transport, tasks, told=told)
        lane.submit(a_call("a"), started_at_ms=1)
        lane.submit(a_call("b"), started_at_ms=2)
        transport.room = 0
        lane.withdraw("b", 0, Verb.EXECUTE, 1)
        assert told == [], "it may have been sent"
        for _, answer in transport.sent[:2]:
            answer(None)
        assert [(saga_id, type(message)) for saga_id, message in told] == [("b", NotSent)]
        assert (lane.in_flight, lane.status().waiting) == (0, 1)
        transport.make_room(1)
        assert transport.names() == ["a", "b", "a"]
        _, answer = transport.sent[2]
        answer(Reply(Done(), "OK", healthy=True))
        saga_id, message = told[-1]
        assert saga_id == "a"
        assert isinstance(message, Answered)
        assert message.outcome == Done()
        await lane.close()


async def test_a_probe_that_is_given_back_leaves_its_place_to_another() -> None:
    """The breaker has heard nothing, so the next call probes."""
    async with anyio.create_task_group() as tasks:
        transport = Announcing()
        lane = a_lane(transport, tasks)
        lane._policy = BreakerPolicy(failures_to_open=1, open_ms=0)
        lane.submit(a_call("a"), started_at_ms=1)
        _, answer = transport.sent[0]
        answer(Reply(Unknown("UNAVAILABLE"), "UNAVAILABLE", healthy=False))
        lane.submit(a_call("b"), started_at_ms=2)
        assert transport.names() == ["a", "b"]
        transport.room = 0
        _, answer = transport.sent[1]
        answer(None)
        transport.make_room(1)
        assert transport.names() == ["a", "b", "b"]
        await lane.close()
