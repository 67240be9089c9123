"""Real processes killed with SIGKILL: the effect is there once, whatever died when."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from amends import Verb
from amends.v1 import participant_pb2 as pb
from tests.participants.asking import Asker, asking, call_message, words
from tests.participants.ledger import Ledger, read_ledger, read_rows
from tests.participants.processes import Program, program

EXECUTE, COMPENSATE = Verb.EXECUTE, Verb.COMPENSATE


@asynccontextmanager
async def participant(database: Path, where: str) -> AsyncIterator[tuple[Program, Asker]]:
    """Run a participant that stops somewhere, and connect to it."""
    async with (
        program("payments.py", database, where) as running,
        asking(await running.line()) as asker,
    ):
        yield running, asker


async def kill_in(database: Path, where: str, call: pb.Call) -> None:
    """Ask, kill the participant where it stops, and see that the caller knows nothing."""
    async with participant(database, where) as (running, asker):
        asked = asyncio.ensure_future(asker.status(call))
        assert await running.line() == "here"
        await running.kill()
        code, _ = await asked
        assert code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("where", ["before-commit", "before-reply"])
async def test_execute_killed_and_asked_again_has_one_effect(tmp_path: Path, where: str) -> None:
    """Before the commit nothing stays and it runs again; after it the stored reply answers."""
    database = tmp_path / "payments.db"
    await kill_in(database, where, call_message(EXECUTE))
    committed = [("charge", 5)] if where == "before-reply" else []
    assert read_ledger(database) == committed

    async with participant(database, "nowhere") as (_, asker):
        done = await asker.ask(call_message(EXECUTE, attempt=2))
        again = await asker.ask(call_message(EXECUTE, attempt=3))
    assert done.done.result.data == b'{"charged":5}'
    assert again == done
    assert read_ledger(database) == [("charge", 5)]


@pytest.mark.parametrize("where", ["before-commit", "before-reply"])
async def test_compensate_killed_and_asked_again_undoes_once(tmp_path: Path, where: str) -> None:
    """The same for the way back."""
    database = tmp_path / "payments.db"
    async with participant(database, "nowhere") as (_, asker):
        await asker.ask(call_message(EXECUTE))
    undo = call_message(COMPENSATE, executed=True, own_result={"charged": 5})
    await kill_in(database, where, undo)
    async with participant(database, "nowhere") as (_, asker):
        assert await asker.say(undo) == "done"
        assert await asker.say(call_message(EXECUTE, attempt=2)) == "rejected fenced"
    assert read_ledger(database) == [("charge", 5), ("refund", 5)]


async def test_a_step_killed_and_then_compensated_never_runs(tmp_path: Path) -> None:
    """Killed before its commit, fenced by Compensate, refused when it comes late."""
    database = tmp_path / "payments.db"
    await kill_in(database, "before-commit", call_message(EXECUTE))
    async with participant(database, "nowhere") as (_, asker):
        assert await asker.say(call_message(COMPENSATE)) == "done"
        assert await asker.say(call_message(EXECUTE, attempt=2)) == "rejected fenced"
    assert read_ledger(database) == []


async def test_two_processes_on_one_database(tmp_path: Path) -> None:
    """While one holds the transaction the other says in progress; what dies with it is gone."""
    database = tmp_path / "payments.db"
    here = Ledger(database, busy_timeout_s=0.05)
    async with (
        here.served() as ours,
        participant(database, "before-commit") as (there, theirs),
    ):
        asked = theirs.stub.Execute(pb.ExecuteRequest(call=call_message(EXECUTE)))
        assert await there.line() == "here"
        assert await ours.say(call_message(COMPENSATE)) == "in_progress"
        assert await ours.say(call_message(EXECUTE, saga_id="another")) == "in_progress"
        await there.kill()
        assert await asked.code() is grpc.StatusCode.UNAVAILABLE
        assert await ours.say(call_message(COMPENSATE, poll=True)) == "done"
        assert await ours.say(call_message(EXECUTE, attempt=2)) == "rejected fenced"
    assert here.ran == []
    assert here.entries() == []


async def test_another_process_commits_first(tmp_path: Path) -> None:
    """What one process did the other answers from the row."""
    database = tmp_path / "payments.db"
    here = Ledger(database, busy_timeout_s=0.05)
    async with (
        here.served() as ours,
        participant(database, "before-commit") as (there, theirs),
    ):
        asked = theirs.stub.Execute(pb.ExecuteRequest(call=call_message(EXECUTE)))
        assert await there.line() == "here"
        assert await ours.say(call_message(EXECUTE)) == "in_progress"
        await there.say("go on")
        first = (await asked).outcome
        assert await ours.ask(call_message(EXECUTE, attempt=2)) == first
    assert here.ran == []
    assert words(first) == "done"
    assert here.entries() == [("charge", 5)]


async def test_a_commit_that_the_disk_refuses_is_asked_again(tmp_path: Path) -> None:
    """No file may grow during the commit: an error status; with room again it runs, once."""
    database = tmp_path / "payments.db"
    async with participant(database, "disk-full") as (_, asker):
        code, details = await asker.status(call_message(EXECUTE))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "COMMIT" in details
        assert await asker.say(call_message(EXECUTE, attempt=2)) == "done"
        assert await asker.say(call_message(EXECUTE, attempt=3)) == "done"
    assert read_ledger(database) == [("charge", 5)]
    assert read_rows(database) == [("execute", "done")]
