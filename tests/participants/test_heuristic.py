"""A participant that has decided alone says so: in phase 2 alone, and the same for ever."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from amends import Call, Done, Heuristic, InvalidOutcome, Participant, SqliteBarrier, serve
from amends.barrier.sqlite import AsyncTransaction, Transaction
from amends.outcomes import Outcome, Rejected
from amends.v1 import participant_pb2 as pb
from amends.wire import outcome_from_wire, outcome_to_wire
from tests.participants.asking import Asker, asking
from tests.participants.bank import COMPENSATE, EXECUTE, PREPARE, look_at, vote_call

SCHEMA = "CREATE TABLE IF NOT EXISTS lines (line TEXT)"


class Bank:
    """A participant whose votes somebody else decides; it counts what it is asked."""

    def __init__(self, path: Path) -> None:
        self.participant = Participant("bank", barrier=SqliteBarrier(path, schema=SCHEMA))
        self.says: Outcome = Heuristic(False, "expired", "the other bank gave it back")
        self.ran: list[str] = []
        for action in ("debit", "async_debit"):
            self.participant.prepare(action)(self.vote)
        self.participant.execute("debit")(self.end)
        self.participant.compensate("debit")(self.end)
        self.participant.execute("async_debit")(self.end_async)
        self.participant.compensate("async_debit")(self.end_async)

    def vote(self, call: Call, tx: Transaction) -> None:
        """Say yes; or report, which nobody may here."""
        if call.json()["cents"] == 0:
            raise Heuristic(True, "too_early")

    def end(self, call: Call, tx: Transaction) -> Outcome:
        """Write a line, and say what is to be said."""
        self.ran.append(call.verb.value)
        tx.execute("INSERT INTO lines VALUES (?)", (call.verb.value,))
        return self.says

    async def end_async(self, call: Call, tx: AsyncTransaction) -> None:
        """Do the same, and raise."""
        self.ran.append(call.verb.value)
        await tx.execute("INSERT INTO lines VALUES (?)", (call.verb.value,))
        assert isinstance(self.says, Heuristic)
        raise self.says

    @asynccontextmanager
    async def served(self) -> AsyncIterator[Asker]:
        """Serve it, and connect."""
        async with serve(self.participant) as server, asking(server.address) as asker:
            yield asker


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """Give one."""
    return Bank(tmp_path / "bank.db")


@pytest.mark.parametrize("action", ["debit", "async_debit"])
@pytest.mark.parametrize("verb", [EXECUTE, COMPENSATE], ids=str)
async def test_a_report_arrives_and_stays(
    bank: Bank, tmp_path: Path, caplog: pytest.LogCaptureFixture, verb: str, action: str
) -> None:
    """Returned or raised; asked again it is the same, nothing runs, and nothing was written."""
    expected = pb.Heuristic(
        committed=False, reason="expired", message="the other bank gave it back"
    )
    async with bank.served() as asker:
        assert await asker.say(vote_call(PREPARE, action)) == "done"
        asked = vote_call(COMPENSATE if verb == "compensate" else EXECUTE, action, executed=True)
        for _ in range(3):
            assert (await asker.ask(asked)).heuristic == expected
            bank.says = Heuristic(True, "another_mind")
    assert bank.ran == [verb]
    assert look_at(tmp_path / "bank.db")("SELECT * FROM lines") == []
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 3
    assert "rolled back alone: expired" in errors[0].getMessage()


@pytest.mark.parametrize(
    "call",
    [vote_call(PREPARE, cents=0), vote_call(EXECUTE), vote_call(COMPENSATE)],
    ids=["a vote", "a saga's Execute", "a saga's Compensate"],
)
async def test_elsewhere_it_is_no_answer(bank: Bank, call: pb.Call) -> None:
    """Who has not voted cannot have broken a vote: the outcome is unknown, and the fault named."""
    if call.verb != vote_call(PREPARE).verb:
        call.ClearField("mode")
    async with bank.served() as asker:
        before = vote_call(EXECUTE)
        before.ClearField("mode")
        if call.HasField("compensation"):
            bank.says = Done()
            assert await asker.say(before) == "done"
            bank.says = Heuristic(False, "expired")
        code, details = await asker.status(call)
    assert code is grpc.StatusCode.UNKNOWN
    assert "two-phase commit" in details


def test_what_it_is_made_of() -> None:
    """Which way, a reason for programs, a message for people; it can be copied and sent."""
    report = Heuristic(True, "by_hand", "x" * 5000)
    assert len(report.message) == 4096
    for twin in (copy.copy(report), pickle.loads(pickle.dumps(report))):  # noqa: S301  # ours
        assert (twin.committed, twin.reason, twin.message) == (True, "by_hand", report.message)
    for outcome in (report, Heuristic(False, "expired")):
        message = outcome_to_wire(outcome)
        again = outcome_from_wire(message)
        assert isinstance(again, Heuristic)
        assert outcome_to_wire(again) == message
        assert message.WhichOneof("outcome") == "heuristic"
    with pytest.raises(InvalidOutcome, match="True if the participant committed"):
        Heuristic("yes", "by_hand")  # type: ignore[arg-type]
    with pytest.raises(InvalidOutcome, match="reason"):
        Heuristic(True, "")
    assert not isinstance(report, Rejected)
