"""GetDecision: what a participant in doubt is told, and what it is never told.

The runtime, its file, both participants and their barriers are real. Whoever asks does so with what
the call of Prepare brought, as a resolver would.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import amends
from amends.v1 import operator_pb2, operator_pb2_grpc, saga_pb2, saga_pb2_grpc, types_pb2
from amends_runtime.core.records import CommitDecision, SagaState
from amends_runtime.engine import Engine, run_engine
from tests.api.bank import TRANSFER, Bank, no_funds, open_bank
from tests.api.refusals import refused
from tests.api.stubs import Operator, Sagas
from tests.storage.sqlite_file import execute

PENDING = types_pb2.COMMIT_DECISION_PENDING
COMMIT = types_pb2.COMMIT_DECISION_COMMIT
ABORT = types_pb2.COMMIT_DECISION_ABORT
UNKNOWN = types_pb2.COMMIT_DECISION_UNKNOWN
NO_TWO_PHASE = types_pb2.COMMIT_DECISION_UNSPECIFIED

BY = operator_pb2.Audit(author="ada", reason="last night's backup, looked at", request_id="r-1")


class Runtime:
    """A running runtime, and all that a test asks of it."""

    def __init__(self, engine: Engine, client: amends.Client, channel: grpc.aio.Channel) -> None:
        self.engine = engine
        self.client = client
        self.sagas: Sagas = saga_pb2_grpc.SagaServiceStub(channel)
        self.operator: Operator = operator_pb2_grpc.OperatorServiceStub(channel)

    async def decision(self, vote: amends.Call, **other: Any) -> int:
        """What a participant is told that asks about its vote, but for what is `other` in it."""
        asked = {
            "saga_id": vote.saga_id,
            "round": vote.round,
            "store_id": vote.store_id,
            "incarnation": vote.incarnation,
        }
        request = saga_pb2.GetDecisionRequest(**{**asked, **other})
        return (await self.sagas.GetDecision(request)).decision

    async def transfer(self, saga_id: str, cents: int = 30) -> amends.Saga:
        """Starts a transfer and waits for its end."""
        await self.client.register(TRANSFER)
        started = await self.client.start("transfer", str(cents).encode(), saga_id=saga_id)
        return await started.result()

    async def confirm(self, incarnation: str) -> bool:
        """Says that the restored store is the truth."""
        request = operator_pb2.ConfirmRestoreRequest(incarnation=incarnation, audit=BY)
        return (await self.operator.ConfirmRestore(request)).confirmed

    async def facts(self) -> operator_pb2.GetRuntimeResponse:
        """What the runtime says it is."""
        return await self.operator.GetRuntime(operator_pb2.GetRuntimeRequest())


@asynccontextmanager
async def a_runtime(bank: Bank) -> AsyncIterator[Runtime]:
    """A runtime over the bank's file."""
    async with (
        run_engine(bank.config) as engine,
        amends.Client(engine.address) as client,
        grpc.aio.insecure_channel(engine.address) as channel,
    ):
        yield Runtime(engine, client, channel)
        bank.let_go()  # so that the way down need not wait for replies


@pytest.fixture
async def bank(tmp_path: Path) -> AsyncIterator[Bank]:
    """Two branches, each with a database of its own."""
    async with open_bank(tmp_path) as bank:
        yield bank


# -- by what was decided ---------------------------------------------------------------------------


async def test_while_votes_are_collected_it_is_pending(bank: Bank) -> None:
    """A participant asks about a vote that still hangs; and then it is COMMIT."""
    hanging = bank.west.hang(amends.Verb.PREPARE)
    async with a_runtime(bank) as runtime:
        await runtime.client.register(TRANSFER)
        started = await runtime.client.start("transfer", b"30", saga_id="t-1")
        await hanging.begun.wait()
        assert bank.west.vote.two_phase
        assert await runtime.decision(bank.west.vote) == PENDING
        hanging.let_go.set()
        await started.result()
        assert await runtime.decision(bank.west.vote) == COMMIT
        assert await runtime.decision(bank.east.vote) == COMMIT


async def test_a_decision_is_told_before_all_have_acknowledged_it(bank: Bank) -> None:
    """Here while one of them still commits: it need not wait for the runtime's own call."""
    hanging = bank.west.hang(amends.Verb.EXECUTE)
    async with a_runtime(bank) as runtime:
        await runtime.client.register(TRANSFER)
        await runtime.client.start("transfer", b"30", saga_id="t-1")
        await hanging.begun.wait()
        assert await runtime.decision(bank.west.vote) == COMMIT


async def test_what_was_refused_is_aborted(bank: Bank) -> None:
    """One no is a no for all, whoever asks, now and after a restart."""
    bank.west.says[amends.Verb.PREPARE] = no_funds
    async with a_runtime(bank) as runtime:
        saga = await runtime.transfer("t-1")
        assert saga.state is amends.SagaState.COMPENSATED
        assert await runtime.decision(bank.east.vote) == ABORT
        assert await runtime.decision(bank.west.vote) == ABORT
    async with a_runtime(bank) as runtime:
        assert await runtime.decision(bank.east.vote) == ABORT


async def test_a_decision_lasts_over_a_restart(bank: Bank) -> None:
    """Of a saga that is only in the store."""
    async with a_runtime(bank) as runtime:
        await runtime.transfer("t-1")
    async with a_runtime(bank) as runtime:
        assert await runtime.decision(bank.east.vote) == COMMIT


async def test_an_unknown_saga_is_aborted(bank: Bank) -> None:
    """What is not recorded was not committed, and never will be under that key."""
    async with a_runtime(bank) as runtime:
        await runtime.transfer("t-1")
        assert await runtime.decision(bank.east.vote, saga_id="t-2") == ABORT


async def test_each_round_has_its_own_decision(bank: Bank) -> None:
    """The first was LOCKED and so aborted; the second is committed; a third cannot come."""
    locked = iter([True, False])

    async def votes(call: amends.Call) -> None:
        if next(locked):
            raise amends.Rejected("LOCKED")

    bank.west.says[amends.Verb.PREPARE] = votes
    transfer = amends.Definition(
        "transfer", mode=amends.Mode.TWO_PHASE_COMMIT, locked_retries=3, steps=TRANSFER.steps
    )
    async with a_runtime(bank) as runtime:
        await runtime.client.register(transfer)
        started = await runtime.client.start("transfer", b"30", saga_id="t-1")
        saga = await started.result()
        assert (saga.state, saga.round) == (amends.SagaState.COMPLETED, 2)
        found = [await runtime.decision(bank.east.vote, round=number) for number in (1, 2, 3)]
    assert found == [ABORT, COMMIT, ABORT]
    assert bank.balances == (70, 130)


async def test_a_saga_that_is_no_two_phase_commit_has_none(bank: Bank) -> None:
    """It says so, and is neither committed nor aborted."""
    saga = amends.Definition("plain").step("debit", "east", "debit")
    hanging = bank.east.hang(amends.Verb.EXECUTE)
    async with a_runtime(bank) as runtime:
        await runtime.client.register(saga)
        await runtime.client.start("plain", b"30", saga_id="p-1")
        await hanging.begun.wait()
        [call] = bank.east.calls
        assert not call.two_phase
        assert await runtime.decision(call) == NO_TWO_PHASE


# -- by whom it is asked ---------------------------------------------------------------------------


async def test_another_stores_votes_are_unknown(bank: Bank) -> None:
    """Neither committed nor aborted by a runtime that has nothing to do with them."""
    async with a_runtime(bank) as runtime:
        await runtime.transfer("t-1")
        for saga_id in ("t-1", "t-2"):
            vote = bank.east.vote
            told = await runtime.decision(vote, saga_id=saga_id, store_id="another")
            assert told == UNKNOWN


async def test_an_empty_store_at_the_same_address_must_not_guess(bank: Bank) -> None:
    """It has never heard of anything, and that is no reason to abort it."""
    async with a_runtime(bank) as runtime:
        await runtime.transfer("t-1")
    for file in bank.database.parent.glob("amends.db*"):
        file.unlink()
    async with a_runtime(bank) as runtime:
        assert not (await runtime.facts()).restored
        assert await runtime.decision(bank.east.vote) == UNKNOWN


async def test_a_restored_store_must_not_guess_until_somebody_confirms_it(
    bank: Bank, tmp_path: Path
) -> None:
    """Committed after the backup, a transfer is one that the restored store has never seen.

    Its participants stay in doubt, and are not told to roll back what others have committed; once
    an operator has said that this store is the truth, they are told what it knows.
    """
    backup = tmp_path / "backup.db"
    async with a_runtime(bank) as runtime:
        await runtime.transfer("kept")
    shutil.copy(bank.database, backup)
    async with a_runtime(bank) as runtime:
        await runtime.transfer("lost")
        vote = bank.east.vote
        assert await runtime.decision(vote, saga_id="kept") == COMMIT
        assert await runtime.decision(vote, saga_id="lost") == COMMIT
    shutil.copy(backup, bank.database)
    async with a_runtime(bank) as runtime:
        facts = await runtime.facts()
        assert facts.restored
        assert facts.store_id == vote.store_id
        assert facts.incarnation != vote.incarnation
        for saga_id in ("kept", "lost", "never"):
            assert await runtime.decision(vote, saga_id=saga_id) == UNKNOWN
        for saga_id in ("lost", "never"):  # nor whoever asks under the new incarnation
            asked = {"saga_id": saga_id, "incarnation": facts.incarnation}
            assert await runtime.decision(vote, **asked) == UNKNOWN
        asked = {"saga_id": "kept", "incarnation": facts.incarnation}
        assert await runtime.decision(vote, **asked) == COMMIT, "it has ended, which lasts"
        await runtime.transfer("new")
        new = bank.east.calls[-1]
        assert new.incarnation == facts.incarnation
        assert await runtime.decision(new) == COMMIT, "its own votes it has all seen"
        assert await runtime.confirm(facts.incarnation)
        assert await runtime.decision(vote, saga_id="kept") == COMMIT
        assert await runtime.decision(vote, saga_id="lost") == ABORT
        asked = {"saga_id": "lost", "incarnation": facts.incarnation}
        assert await runtime.decision(vote, **asked) == ABORT
        assert await runtime.decision(vote, saga_id="kept", incarnation="another") == UNKNOWN
    async with a_runtime(bank) as runtime:
        assert not (await runtime.facts()).restored
        assert await runtime.decision(vote, saga_id="kept") == COMMIT
        assert await runtime.decision(vote, saga_id="lost") == ABORT


async def test_what_is_held_back_is_unknown_whatever_incarnation_asks(
    bank: Bank, tmp_path: Path
) -> None:
    """The backup has its first round aborted; lost with the rest may be a second, committed.

    A transfer of the restored store itself is answered from the first vote on, and after restarts.
    """

    async def locked(call: amends.Call) -> None:
        raise amends.Rejected("LOCKED")

    transfer = amends.Definition(
        "transfer", mode=amends.Mode.TWO_PHASE_COMMIT, locked_retries=3, steps=TRANSFER.steps
    )
    backup = tmp_path / "backup.db"
    bank.west.says[amends.Verb.PREPARE] = locked
    rolling_back = bank.east.hang(amends.Verb.COMPENSATE)
    async with a_runtime(bank) as runtime:
        await runtime.client.register(transfer)
        await runtime.client.start("transfer", b"30", saga_id="old", deadline_s=3_600)
        await rolling_back.begun.wait()
        assert await runtime.decision(bank.east.vote) == ABORT
        with (
            closing(sqlite3.connect(bank.database)) as source,
            closing(sqlite3.connect(backup)) as copy,
        ):
            source.backup(copy)
    shutil.copy(backup, bank.database)
    for suffix in ("-wal", "-shm", ".lock"):
        bank.database.with_name(bank.database.name + suffix).unlink(missing_ok=True)
    bank.west.says.clear()
    bank.east.says.clear()
    voting = bank.west.hang(amends.Verb.PREPARE)
    async with a_runtime(bank) as runtime:
        here = (await runtime.facts()).incarnation
        old = bank.east.vote
        for round_ in (1, 2):
            assert await runtime.decision(old, round=round_, incarnation=here) == UNKNOWN
            assert await runtime.decision(old, round=round_) == UNKNOWN
        await runtime.client.start("transfer", b"10", saga_id="new", deadline_s=3_600)
        await voting.begun.wait()
        new = bank.west.calls[-1]
        assert new.incarnation == here
        assert await runtime.decision(new) == PENDING
        voting.let_go.set()
        await runtime.client.wait("new", timeout_s=60)
        assert await runtime.decision(new) == COMMIT
    async with a_runtime(bank) as runtime:
        assert (await runtime.facts()).restored
        assert await runtime.decision(new) == COMMIT
        assert await runtime.decision(old, incarnation=here) == UNKNOWN
        assert await runtime.confirm(here)
        assert await runtime.decision(old) == ABORT


async def test_a_tombstone_of_a_restored_store_answers(bank: Bank) -> None:
    """What was purged had ended, and an end lasts; what is not even there says nothing."""
    async with a_runtime(bank) as runtime:
        await runtime.transfer("t-1")
    execute(
        bank.database,
        "INSERT INTO tombstones VALUES (?, ?, ?, ?, ?, ?)",
        *("gone", "c" * 64, SagaState.COMPLETED, 1, CommitDecision.COMMIT, 2),
    )
    bank.database.with_name(bank.database.name + ".lock").unlink()
    async with a_runtime(bank) as runtime:
        facts = await runtime.facts()
        assert facts.restored
        asked = {"incarnation": facts.incarnation, "saga_id": "gone"}
        found = [await runtime.decision(bank.east.vote, **asked, round=n) for n in (1, 2, 3)]
        assert found == [ABORT, COMMIT, ABORT]


async def test_another_incarnation_is_another_copys(bank: Bank) -> None:
    """A store that was never restored knows of no other; somebody else has opened a copy of it."""
    async with a_runtime(bank) as runtime:
        await runtime.transfer("t-1")
        for saga_id in ("t-1", "t-2"):
            vote = bank.east.vote
            told = await runtime.decision(vote, saga_id=saga_id, incarnation="another")
            assert told == UNKNOWN


# -- confirming a restore --------------------------------------------------------------------------


async def restore(bank: Bank) -> None:
    """As if the file had come from a backup: what was open here last is not known."""
    async with a_runtime(bank) as runtime:
        await runtime.client.register(TRANSFER)
    bank.database.with_name(bank.database.name + ".lock").unlink()


async def test_a_confirmation_is_one_act_with_its_author(bank: Bank) -> None:
    """Asked for again after a lost answer it says that it is done; who and why is written down."""
    await restore(bank)
    async with a_runtime(bank) as runtime:
        incarnation = (await runtime.facts()).incarnation
        assert await runtime.confirm(incarnation)
        assert await runtime.confirm(incarnation), "the same request"
        other = operator_pb2.Audit(author="bob", reason="me too", request_id="r-2")
        request = operator_pb2.ConfirmRestoreRequest(incarnation=incarnation, audit=other)
        assert not (await runtime.operator.ConfirmRestore(request)).confirmed
        [entry] = await runtime.engine.store.audit(9)
    assert (entry.verb, entry.subject) == ("confirm_restore", incarnation)
    words = entry.words
    assert (words.author, words.reason, words.request_id) == (BY.author, BY.reason, BY.request_id)


async def test_what_was_not_restored_is_not_confirmed(bank: Bank) -> None:
    """There is nothing to confirm, which is no error; nothing is written down."""
    async with a_runtime(bank) as runtime:
        facts = await runtime.facts()
        assert not facts.restored
        assert not await runtime.confirm(facts.incarnation)
        assert await runtime.engine.store.audit(9) == []


async def test_what_is_confirmed_is_what_was_looked_at(bank: Bank) -> None:
    """Another incarnation than the one that is here was restored since, and is refused."""
    await restore(bank)
    async with a_runtime(bank) as runtime:
        here = (await runtime.facts()).incarnation
        request = operator_pb2.ConfirmRestoreRequest(incarnation="i-0", audit=BY)
        refusal = await refused(runtime.operator.ConfirmRestore(request))
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "OTHER_INCARNATION",
        )
        assert refusal.metadata["incarnation"] == here
        assert (await runtime.facts()).restored
        request = operator_pb2.ConfirmRestoreRequest()
        refusal = await refused(runtime.operator.ConfirmRestore(request))
        assert set(refusal.violations) == {"incarnation", "audit.author", "audit.reason"}


# -- what is no longer there, or cannot be read ----------------------------------------------------


@pytest.mark.parametrize(
    ("decision", "told"),
    [
        (CommitDecision.COMMIT, [ABORT, COMMIT, ABORT]),
        (CommitDecision.ABORT, [ABORT, ABORT, ABORT]),
        (None, [NO_TWO_PHASE] * 3),
    ],
)
async def test_a_tombstone_answers_for_a_purged_saga(
    bank: Bank, decision: CommitDecision | None, told: list[int]
) -> None:
    """As the saga would have; its last round was the second."""
    async with a_runtime(bank) as runtime:
        await runtime.transfer("t-1")
    execute(
        bank.database,
        "INSERT INTO tombstones VALUES (?, ?, ?, ?, ?, ?)",
        *("gone", "c" * 64, SagaState.COMPLETED, 1),
        *((decision or 0), 2 if decision else 0),
    )
    async with a_runtime(bank) as runtime:
        vote = bank.east.vote
        found = [await runtime.decision(vote, saga_id="gone", round=n) for n in (1, 2, 3)]
    assert found == told


async def test_a_history_that_cannot_be_read_is_no_abort(bank: Bank) -> None:
    """It may have been committed: whoever asks is told of the error, and keeps what it holds."""
    async with a_runtime(bank) as runtime:
        await runtime.transfer("t-1")
    execute(bank.database, "DROP TRIGGER history_is_append_only")
    execute(bank.database, "UPDATE history SET records = x'c1' WHERE version = 3")
    async with a_runtime(bank) as runtime:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await runtime.decision(bank.east.vote)
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_question_must_be_whole(bank: Bank) -> None:
    """Everything that is wrong is said at once; a question without round is none."""
    async with a_runtime(bank) as runtime:
        refusal = await refused(runtime.sagas.GetDecision(saga_pb2.GetDecisionRequest()))
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
        assert set(refusal.violations) == {"saga_id", "round", "store_id", "incarnation"}
        request = saga_pb2.GetDecisionRequest(
            saga_id="a b", round=-1, store_id="s" * 129, incarnation="i" * 129
        )
        refusal = await refused(runtime.sagas.GetDecision(request))
        assert set(refusal.violations) == {"saga_id", "round", "store_id", "incarnation"}


# -- through the SDK -------------------------------------------------------------------------------


async def test_the_client_asks_the_same(bank: Bank) -> None:
    """What a resolver uses."""
    async with a_runtime(bank) as runtime:
        await runtime.transfer("t-1")
        vote = bank.east.vote
        told = await runtime.client.get_decision(
            "t-1", 1, store_id=vote.store_id, incarnation=vote.incarnation
        )
        assert told is amends.Decision.COMMIT
