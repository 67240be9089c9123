"""A lane whose participant announces how many calls it takes at once."""

from __future__ import annotations

from collections.abc import Callable

import anyio
from anyio.abc import TaskGroup

from amends_runtime.clock import SystemClock
from amends_runtime.core.breaker import BreakerPolicy
from amends_runtime.core.messages import Answered, Done, NotSent
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
        self.sent: list[tuple[Call, Callable[[Reply], None]]] = []

    def open(self, tasks: TaskGroup, limit_changed: Callable[[], None]) -> None:
        """Nothing is connected."""
        self._limit_changed = limit_changed

    def announce(self, limit: int | None) -> None:
        """Say how many calls there may be at once."""
        self.limit = limit
        self._limit_changed()

    def send(self, call: Call, answer: Callable[[Reply], None]) -> None:
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


def a_lane(transport: Announcing, tasks: TaskGroup, limit: int | None = None) -> Lane:
    """A lane that tells nobody."""

    def deliver(saga_id: str, message: Answered | NotSent) -> None:
        """Nobody listens."""

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
