"""The most dangerous moments of a two-phase commit, with real processes and kill -9.

Each test brings a transfer exactly there: calls are held, or branches kill themselves, at a named
point, and the history says how far the runtime is. What must hold in the end is looked up in the
two databases: all of it or none, all money there, nothing prepared and nothing held. All of it over
streams, and in `make test MODE=long` again by the unary verbs, by which the soak calls the west.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Final

import grpc.aio
import pytest
from hypothesis import settings

import amends
from amends import RecordKind, SagaState
from amends.v1 import participant_pb2, participant_pb2_grpc, types_pb2
from shop.processes import Process
from tests.acceptance.branches import Branches, open_branches
from tests.acceptance.world import PATIENCE_S, until
from tests.network.proxy import Direction, Open, Stalled

BOTH_HELD: Final = {"debit execute before": ["hold"], "credit execute before": ["hold"]}
"""Decided, and told to both, and nobody has begun to commit."""


@pytest.fixture(
    scope="module",
    params=["exchange", "unary"] if settings().max_examples > 100 else ["exchange"],
)
async def bank(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Branches]:
    """Both branches and a runtime that calls them in one way or the other."""
    unary = ("east", "west") if request.param == "unary" else ()
    async with open_branches(tmp_path_factory.mktemp("bank"), unary=unary) as branches:
        yield branches
        await branches.ends(await branches.start(), SagaState.COMPLETED)  # both are called by now
        ways = {each.name: each.transport for each in await branches.client.participants()}
        assert ways == dict.fromkeys(("east", "west"), request.param)


# -- the runtime -----------------------------------------------------------------------------------


async def test_the_runtime_is_killed_after_the_votes_and_before_the_decision(
    bank: Branches,
) -> None:
    """Both have voted yes and one of the votes was never heard: asked again, and committed."""
    saga = await bank.start(at={"credit prepare after": ["hold"]})
    await bank.reached(saga, "credit prepare after")
    await bank.recorded(saga, RecordKind.STEP_PREPARED, "debit")
    assert (bank.prepared, bank.held) == (1, 1)

    await bank.restart(bank.runtime)

    await bank.ends(saga, SagaState.COMPLETED)
    assert len(await bank.records(saga, RecordKind.ATTEMPT_LOST, "credit")) == 1
    (decision,) = await bank.records(saga, RecordKind.DECISION_MADE)
    (prepared,) = await bank.records(saga, RecordKind.STEP_PREPARED, "credit")
    assert decision.version >= prepared.version


async def test_the_runtime_is_killed_after_the_decision_and_before_any_execute(
    bank: Branches,
) -> None:
    """The decision is durable, so the next runtime carries it out, whoever hears it first."""
    saga = await bank.start(at=BOTH_HELD)
    for point in BOTH_HELD:
        await bank.reached(saga, point)
    assert bank.moved(saga) == ([], [])
    assert (bank.prepared, bank.held) == (1, 1)

    await bank.restart(bank.runtime)

    await bank.ends(saga, SagaState.COMPLETED)
    for point in BOTH_HELD:  # what the dead runtime has sent arrives last, and does nothing
        bank.let_go(saga, point)


async def test_the_runtime_is_killed_between_two_acknowledgements(bank: Branches) -> None:
    """One branch has committed, the other is told again until it has, too."""
    saga = await bank.start(at={"credit execute before": ["hold"]})
    await bank.reached(saga, "credit execute before")
    await bank.recorded(saga, RecordKind.STEP_EXECUTED, "debit")
    assert bank.moved(saga) == ([-5], [])

    await bank.restart(bank.runtime)

    await bank.ends(saga, SagaState.COMPLETED)


async def test_the_runtime_is_killed_after_the_last_commit_and_before_the_end(
    bank: Branches,
) -> None:
    """Both have committed and one acknowledgement was never heard: asked again, moved once."""
    saga = await bank.start(at={"credit execute after": ["hold"]})
    await bank.reached(saga, "credit execute after")
    await bank.recorded(saga, RecordKind.STEP_EXECUTED, "debit")
    assert bank.moved(saga) == ([-5], [5])
    assert await bank.records(saga, RecordKind.SAGA_ENDED) == []

    await bank.restart(bank.runtime)

    await bank.ends(saga, SagaState.COMPLETED)


async def test_the_runtime_is_killed_after_abort_and_before_compensate(bank: Branches) -> None:
    """The decision is durable, so the next runtime rolls back what was prepared."""
    saga = await bank.start(payee="nobody", at={"debit compensate before": ["hold"]})
    await bank.reached(saga, "debit compensate before")
    await bank.recorded(saga, RecordKind.DECISION_MADE)
    assert (bank.prepared, bank.held) == (1, 0)

    await bank.restart(bank.runtime)

    ended = await bank.ends(saga, SagaState.COMPENSATED)
    assert ended.turn is not None
    assert (ended.turn.cause, ended.turn.step) == (amends.Cause.REJECTED, "credit")


async def test_the_runtime_is_killed_again_in_its_recovery(bank: Branches) -> None:
    """What the recovery has sent anew is held up as well when it is killed: it goes on after."""
    point = "credit execute before"
    saga = await bank.start(at={point: ["hold", "hold"]})
    await bank.reached(saga, point)

    bank.runtime.kill()
    bank.runtime.start_nowait()
    await bank.reached(saga, point, 2)
    await bank.restart(bank.runtime)

    await bank.ends(saga, SagaState.COMPLETED)
    assert len(await bank.records(saga, RecordKind.ATTEMPT_LOST, "credit")) == 2


# -- the participants ------------------------------------------------------------------------------


async def test_a_participant_is_killed_after_prepare_transaction_and_before_its_reply(
    bank: Branches,
) -> None:
    """PostgreSQL has the vote, so it stands: asked again, the branch finds it and says yes."""
    saga = await bank.start(at={"debit prepare after": ["die"]})
    await _died(bank.east)
    assert bank.prepared == 1

    await bank.east.start()

    await bank.ends(saga, SagaState.COMPLETED)
    assert await bank.records(saga, RecordKind.ATTEMPT_FAILED, "debit")


async def test_a_participant_is_killed_after_commit_prepared_and_before_its_reply(
    bank: Branches,
) -> None:
    """It is committed, and nobody knows: told again, it says that it has."""
    saga = await bank.start(at={"debit execute after": ["die"]})
    await _died(bank.east)
    assert bank.moved(saga)[0] == [-5]
    assert bank.prepared == 0

    await bank.east.start()

    await bank.ends(saga, SagaState.COMPLETED)


async def test_a_participant_is_killed_after_a_roll_back_and_before_its_reply(
    bank: Branches,
) -> None:
    """It is rolled back and fenced: told again, it says so, and nothing is left."""
    saga = await bank.start(payee="nobody", at={"debit compensate after": ["die"]})
    await _died(bank.east)
    assert bank.prepared == 0

    await bank.east.start()

    await bank.ends(saga, SagaState.COMPENSATED)


async def test_a_participant_is_killed_while_its_reservation_is_held(bank: Branches) -> None:
    """Its hold is in its database and outlives it; it confirms what its former life promised."""
    saga = await bank.start("back", at={"credit prepare before": ["hold"]})
    await bank.reached(saga, "credit prepare before")
    await bank.recorded(saga, RecordKind.STEP_PREPARED, "debit")
    assert bank.held == 1

    await bank.restart(bank.west)
    assert bank.held == 1
    bank.let_go(saga, "credit prepare before")

    await bank.ends(saga, SagaState.COMPLETED)


async def test_postgresql_is_killed_while_a_vote_is_prepared(bank: Branches) -> None:
    """The prepared transaction is there again when it comes up, and is committed."""
    saga = await bank.start(at={"credit prepare before": ["hold"]})
    await bank.reached(saga, "credit prepare before")
    await bank.recorded(saga, RecordKind.STEP_PREPARED, "debit")

    await bank.restart_postgres()
    assert bank.prepared == 1
    bank.let_go(saga, "credit prepare before")

    await bank.ends(saga, SagaState.COMPLETED)


async def test_postgresql_is_killed_when_it_is_to_roll_back(bank: Branches) -> None:
    """What was prepared is there again when it comes up, and is rolled back."""
    saga = await bank.start(payee="nobody", at={"debit compensate before": ["hold"]})
    await bank.reached(saga, "debit compensate before")

    await bank.restart_postgres()
    assert bank.prepared == 1
    bank.let_go(saga, "debit compensate before")

    await bank.ends(saga, SagaState.COMPENSATED)


@pytest.mark.parametrize(
    "at",
    [{"credit prepare after": ["hold"]}, BOTH_HELD],
    ids=["undecided", "decided"],
)
async def test_everybody_is_killed_while_in_doubt(
    bank: Branches, at: Mapping[str, list[str]]
) -> None:
    """Runtime, both branches and PostgreSQL at once: what is on disk is enough to end it."""
    saga = await bank.start(at=at)
    for point in at:
        await bank.reached(saga, point)
    await bank.recorded(saga, RecordKind.STEP_PREPARED, "debit")

    bank.runtime.kill()
    bank.east.kill()
    bank.west.kill()
    await bank.restart_postgres()
    assert (bank.prepared, bank.held) == (1, 1)
    await bank.restart(bank.east, bank.west, bank.runtime)

    await bank.ends(saga, SagaState.COMPLETED)


# -- the network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["credit prepare after", "credit execute after"])
async def test_a_reply_is_lost_with_its_connection(bank: Branches, point: str) -> None:
    """A yes, or an acknowledgement, that nobody hears: asked again, and answered from the row."""
    saga = await bank.start(at={point: ["hold"]})
    await bank.reached(saga, point)
    bank.proxy.gates[Direction.TO_CLIENT] = Stalled()
    passed = [each.passed[Direction.TO_CLIENT] for each in bank.proxy.connections]
    bank.let_go(saga, point)

    def has_answered() -> bool:
        return any(
            len(each.came[Direction.TO_CLIENT]) > before
            for each, before in zip(bank.proxy.connections, passed, strict=False)
        )

    await until(has_answered, "the reply to come as far as the proxy")
    bank.proxy.cut_all()
    bank.proxy.gates[Direction.TO_CLIENT] = Open()

    await bank.ends(saga, SagaState.COMPLETED)
    failed = await bank.records(saga, RecordKind.ATTEMPT_FAILED, "credit")
    assert [record.verb for record in failed][:1] == [amends.Verb(point.split()[1])]


async def test_a_vote_that_is_asked_for_after_an_abort(bank: Branches) -> None:
    """The branch was down and never heard of it: what a late Prepare holds, Compensate lets go.

    And the Prepare that comes after that holds nothing any more.
    """
    bank.west.kill()
    saga = await bank.start()
    await bank.recorded(saga, RecordKind.ATTEMPT_FAILED, "credit")
    cancelled = await saga.cancel(author="ann", reason="it takes too long")
    assert cancelled.disposition is amends.CancelDisposition.TURNED_BACK
    store = await bank.client.runtime()
    bank.runtime.kill()
    await bank.west.start()

    late = _late_prepare(saga.saga_id, store)
    assert (await _send(bank.west, late)).WhichOneof("outcome") == "done"
    assert bank.held == 1
    await bank.runtime.start()

    ended = await bank.ends(saga, SagaState.COMPENSATED)
    assert ended.turn is not None
    assert ended.turn.cause is amends.Cause.CANCELLED
    again = await _send(bank.west, late)
    assert again.WhichOneof("outcome") == "rejected"
    assert again.rejected.reason == "fenced"
    bank.settled()


# ---------------------------------------------------------------------------------------------


async def _died(process: Process) -> None:
    """Wait until a branch has killed itself."""
    assert await process.wait_ended(timeout_s=PATIENCE_S) == -9


def _late_prepare(saga_id: str, store: amends.RuntimeInfo) -> participant_pb2.Call:
    """The Prepare that the runtime has sent, as a network delivers it that was in no hurry."""
    return participant_pb2.Call(
        idempotency_key=f"{store.store_id}/{saga_id}/credit/PREPARE/1",
        store_id=store.store_id,
        incarnation=store.incarnation,
        saga_id=saga_id,
        definition="out",
        step="credit",
        action="credit",
        participant="west",
        verb=types_pb2.VERB_PREPARE,
        mode=types_pb2.MODE_TWO_PHASE_COMMIT,
        round=1,
        attempt=1,
        input=types_pb2.Payload(
            data=b'{"from": "acc-1", "to": "acc-2", "cents": 5}', content_type="application/json"
        ),
    )


async def _send(branch: Process, call: participant_pb2.Call) -> participant_pb2.Outcome:
    async with grpc.aio.insecure_channel(branch.address) as channel:
        stub = participant_pb2_grpc.ParticipantServiceStub(channel)
        request = participant_pb2.PrepareRequest(call=call)
        response = await stub.Prepare(request, timeout=PATIENCE_S, wait_for_ready=True)
    outcome: participant_pb2.Outcome = response.outcome
    return outcome
