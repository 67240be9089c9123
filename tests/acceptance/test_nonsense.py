"""Participants that do not keep to the contract: it is written down and shown, and others go on."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

import amends
from amends import Cause, RecordKind, SagaState, StepState
from amends.v1 import participant_pb2 as pb
from amends.v1 import types_pb2
from tests.acceptance import odd
from tests.acceptance.world import PATIENCE_S, World, opened, until

SHORT = amends.Retry(first_s=0.01, max_s=0.02, give_up_after_s=0.03)
QUICK = amends.Retry(first_s=0.01, max_s=0.02)

# A lane of its own for each: what one does must not open another's breaker.
ODD = [*odd.BEHAVIOURS, "stubborn", "patient"]


@pytest.fixture(scope="module")
def participant() -> odd.OddParticipant:
    """The one that stands behind all odd names."""
    return odd.OddParticipant()


@pytest.fixture(scope="module")
async def shared(
    tmp_path_factory: pytest.TempPathFactory, participant: odd.OddParticipant
) -> AsyncIterator[World]:
    """The shop, a runtime, and odd participants."""
    async with (
        odd.serving(participant, odd.CONTRACT) as address,
        odd.serving(participant, "another.Service") as stranger,
    ):
        addresses = {f"odd-{name}".replace("_", "-"): address for name in ODD}
        addresses["odd-stranger"] = stranger
        folder = tmp_path_factory.mktemp("world")
        async with opened(folder, participants=addresses) as world:
            yield world


@pytest.fixture(autouse=True)
async def others_go_on(world: World) -> AsyncIterator[None]:
    """Whatever a test does: the same runtime lives on, and an ordinary order completes."""
    before = (await world.client.runtime()).epoch
    yield
    assert world.runtime.is_running
    assert (await world.end(await world.start())).completed
    assert (await world.client.runtime()).epoch == before


async def start_odd(
    world: World, name: str, *, timeout_s: float = 10, retry: amends.Retry = SHORT
) -> amends.StartedSaga:
    """Start an order whose second step is an odd participant's."""
    definition = f"odd-{name}".replace("_", "-")
    await world.client.register(
        amends.Definition(definition)
        .step("place", "orders", "place")
        .step("odd", definition, name, timeout_s=timeout_s, retry=retry, compensation_retry=SHORT)
    )
    return await world.start(definition)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_outcome", "NO_OUTCOME"),
        ("garbage", "UNREADABLE_REPLY"),
        ("large", "RESULT_TOO_LARGE"),
        ("huge", "REPLY_TOO_LARGE"),
        ("heuristic", "HEURISTIC_IN_SAGA_MODE"),
        ("raising", "UNKNOWN"),
        ("unauthenticated", "UNAUTHENTICATED"),
    ],
)
async def test_a_reply_that_says_nothing(world: World, name: str, reason: str) -> None:
    """Nobody knows whether it ran: it is retried, given up, and undone like one that did."""
    started = await start_odd(world, name)

    ended = await world.end(started)

    assert ended.state is SagaState.COMPENSATED
    assert ended.turn is not None
    assert (ended.turn.cause, ended.turn.step) == (Cause.GAVE_UP, "odd")
    assert ended.step("odd").state is StepState.COMPENSATED
    failed = await world.records(started.saga_id, RecordKind.ATTEMPT_FAILED, "odd")
    assert {str(record.failure and record.failure.reason) for record in failed} == {reason}
    assert world.effects(started.saga_id) == ["place", "cancel"]
    assert odd.CHUNK not in world.runtime.log.read_bytes()


async def test_attempts_are_known_by_their_key(
    world: World, participant: odd.OddParticipant
) -> None:
    """All attempts of a step carry one key and numbers of their own; undoing it has another key.

    The last attempt is a refusal, but those before may have run: the step is undone all the same.
    """
    started = await start_odd(world, "shaky", retry=QUICK)
    other = await start_odd(world, "shaky", retry=QUICK)
    for saga in (started, other):
        assert (await world.end(saga)).state is SagaState.COMPENSATED

    def asked(saga: amends.SagaHandle, verb: int) -> list[pb.Call]:
        calls = [call for call in participant.calls if call.saga_id == saga.saga_id]
        return [call for call in calls if call.verb == verb]

    executes = asked(started, types_pb2.VERB_EXECUTE)
    (undoing,) = asked(started, types_pb2.VERB_COMPENSATE)
    others = asked(other, types_pb2.VERB_EXECUTE)
    assert [call.attempt for call in executes] == [1, 2, 3]
    assert len({call.idempotency_key for call in executes}) == 1
    assert len({call.traceparent for call in executes}) == 3
    assert len({call.idempotency_key for call in (executes[0], undoing, others[0])}) == 3
    assert not undoing.compensation.executed
    assert undoing.compensation.turn.cause == types_pb2.TURN_CAUSE_REJECTED


async def test_a_participant_that_never_answers(world: World) -> None:
    """Each attempt ends with its own time-out."""
    started = await start_odd(world, "silent", timeout_s=0.1)

    ended = await world.end(started)

    assert ended.state is SagaState.COMPENSATED
    failed = await world.records(started.saga_id, RecordKind.ATTEMPT_FAILED, "odd")
    assert failed[0].timing is not None
    assert failed[0].timing.status == "DEADLINE_EXCEEDED"


async def test_a_participant_that_is_none(world: World) -> None:
    """A server without the service can neither do nor undo: the step is stuck, and says why."""
    started = await start_odd(world, "stranger")
    world.may_be_stuck.add(started.saga_id)

    await wait_stuck(started)

    step = (await started.get()).step("odd")
    assert step.state is StepState.STUCK
    assert step.last_error is not None
    assert "UNIMPLEMENTED" in str(step.last_error)
    # It may have run, for all that anybody knows, so what came before it is not undone yet.
    assert world.effects(started.saga_id) == ["place"]


async def test_a_compensation_that_is_refused(world: World) -> None:
    """A participant must not refuse to undo: it counts as failed, and in the end it is stuck."""
    definition = (
        amends.Definition("odd-stubborn")
        .step("odd", "odd-stubborn", "stubborn", compensation_retry=SHORT)
        .step("charge", "payments", "charge")
    )
    await world.client.register(definition)
    world.switch(payments={"charge": {"decline": {"next": 1}}})
    started = await world.start("odd-stubborn")
    world.may_be_stuck.add(started.saga_id)

    await wait_stuck(started)

    step = (await started.get()).step("odd")
    assert step.state is StepState.STUCK
    failed = await world.records(started.saga_id, RecordKind.ATTEMPT_FAILED, "odd")
    assert {str(record.failure and record.failure.reason) for record in failed} == {
        "COMPENSATION_REJECTED"
    }
    assert all("no_refunds" in str(record.failure) for record in failed)
    assert world.effects(started.saga_id) == []


async def test_a_refusal_of_many_words(world: World) -> None:
    """A refusal it is; its words are cut, and cannot drive a terminal."""
    started = await start_odd(world, "wordy")

    ended = await world.end(started)

    assert ended.state is SagaState.COMPENSATED
    assert ended.turn is not None
    assert ended.turn.cause is Cause.REJECTED
    assert ended.turn.failure is not None
    words = str(ended.turn.failure)
    assert "red" in words
    assert len(words) < 2_000
    assert not set(words) & {"\x1b", "\x07", "\r"}


async def test_a_participant_that_takes_its_time(world: World) -> None:
    """InProgress is asked again, as often as it says so, and is still one attempt."""
    await world.client.register(
        amends.Definition("odd-patient").step("odd", "odd-patient", "patient")
    )
    started = await world.client.start("odd-patient")

    ended = await started.result(timeout_s=PATIENCE_S)

    assert ended.completed
    (executed,) = await world.records(started.saga_id, RecordKind.STEP_EXECUTED, "odd")
    assert executed.attempt == 1
    assert executed.timing is not None
    assert executed.timing.polls == odd.POLLS


async def wait_stuck(saga: amends.SagaHandle) -> None:
    """Wait until a saga is seen to be stuck."""

    async def is_stuck() -> bool:
        return (await saga.get()).state is SagaState.STUCK

    await until(is_stuck, f"{saga.saga_id} to be stuck")
