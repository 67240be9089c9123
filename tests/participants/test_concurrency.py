"""Calls that meet: duplicates under way, callers that leave, handlers that hang, foreign locks."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import grpc
import grpc.aio
import pytest

from amends import (
    AsyncTransaction,
    Call,
    Done,
    InProgress,
    Participant,
    SqliteBarrier,
    Transaction,
    Verb,
    serve,
)
from amends.handler import Handler
from amends.outcomes import Outcome
from amends.v1 import participant_pb2 as pb
from tests.participants.asking import Asker, asking, call_message, call_of, words
from tests.participants.gate import Gate
from tests.participants.ledger import PATIENCE_S, SCHEMA, Ledger, read_rows, write_entry

EXECUTE, COMPENSATE, PREPARE = Verb.EXECUTE, Verb.COMPENSATE, Verb.PREPARE


def gated(ledger: Ledger, gate: Gate, *, in_loop: bool) -> None:
    """Give the ledger's participant an action ``slow`` that waits at the gate after its effect."""

    def slow(call: Call, tx: Transaction) -> None:
        ledger.ran.append("slow")
        write_entry(tx, call, "slow")
        gate.pass_in_thread()

    async def slow_async(call: Call, tx: AsyncTransaction) -> None:
        ledger.ran.append("slow")
        await tx.execute("INSERT INTO ledger VALUES (?, 'slow', 5)", (call.saga_id,))
        await gate.pass_in_loop()

    def undo(call: Call, tx: Transaction) -> None:
        ledger.ran.append("undo")
        write_entry(tx, call, "undo")

    ledger.participant.execute("slow")(slow_async if in_loop else slow)
    ledger.participant.compensate("slow")(undo)


KINDS = pytest.mark.parametrize("in_loop", [False, True], ids=["def", "async def"])


@KINDS
async def test_calls_of_a_step_that_runs_are_in_progress(ledger: Ledger, *, in_loop: bool) -> None:
    """A duplicate, a Prepare and a Compensate that meet a running Execute are to ask again."""
    gate = Gate()
    gated(ledger, gate, in_loop=in_loop)
    async with ledger.served() as asker:
        first = asyncio.ensure_future(asker.ask(call_message(EXECUTE, action="slow")))
        await gate.reached.wait()
        for verb in (EXECUTE, COMPENSATE, PREPARE):
            action = "charge" if verb is PREPARE else "slow"
            outcome = await asker.ask(call_message(verb, action=action, attempt=2))
            assert words(outcome) == "in_progress"
            assert outcome.in_progress.poll_after_ms >= 1
        gate.open()
        assert words(await first) == "done"
        poll = call_message(EXECUTE, action="slow", attempt=2, poll=True)
        assert await asker.say(poll) == "done"
    assert ledger.ran == ["slow"]
    assert ledger.entries() == [("slow", 5)]


async def test_many_duplicates_at_once_have_one_effect(ledger: Ledger) -> None:
    """However they fall, each says done or in progress, and the handler runs once."""
    async with ledger.served() as asker:
        calls = [call_message(EXECUTE, attempt=number) for number in range(1, 51)]
        said = await asyncio.gather(*map(asker.say, calls))
        assert set(said) <= {"done", "in_progress"}
        assert "done" in said
        assert await asker.say(call_message(EXECUTE, attempt=51)) == "done"
    assert ledger.entries() == [("charge", 5)]


async def test_many_steps_at_once_have_their_effects(ledger: Ledger) -> None:
    """Concurrent calls of different sagas queue for the writer and all come through."""
    async with ledger.served() as asker:
        calls = [call_message(EXECUTE, saga_id=f"order-{number}") for number in range(100)]
        assert set(await asyncio.gather(*map(asker.say, calls))) == {"done"}
    assert all(ledger.entries(f"order-{number}") == [("charge", 5)] for number in range(100))


async def test_an_async_handler_whose_caller_leaves_is_rolled_back(ledger: Ledger) -> None:
    """Its transaction ends with it, the writer is free, and the next attempt runs anew."""
    gate = Gate()
    gated(ledger, gate, in_loop=True)
    async with ledger.served() as asker:
        request = pb.ExecuteRequest(call=call_message(EXECUTE, action="slow"))
        left = asker.stub.Execute(request)
        await gate.reached.wait()
        left.cancel()
        gate.open()
        # Queued behind the rollback: it is answered only if the writer is free.
        assert await asker.say(call_message(EXECUTE, saga_id="another")) == "done"
        outcome = await ask_until_decided(asker, call_message(EXECUTE, action="slow", attempt=2))
    assert outcome == "done"
    assert ledger.entries() == [("slow", 5)]


async def test_a_call_whose_deadline_passes_is_rolled_back(ledger: Ledger) -> None:
    """The handler is cancelled at the deadline; the caller knows nothing, and nothing is kept."""
    gate = Gate()
    gated(ledger, gate, in_loop=True)
    async with ledger.served() as asker:
        request = pb.ExecuteRequest(call=call_message(EXECUTE, action="slow"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asker.stub.Execute(request, timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await asker.say(call_message(EXECUTE, saga_id="another")) == "done"
        assert ledger.entries() == []


async def test_a_def_handler_whose_caller_leaves_is_committed(ledger: Ledger) -> None:
    """A thread cannot be cancelled, so its work is kept and the next attempt gets the reply."""
    gate = Gate()
    gated(ledger, gate, in_loop=False)
    async with ledger.served() as asker:
        request = pb.ExecuteRequest(call=call_message(EXECUTE, action="slow"))
        left = asker.stub.Execute(request)
        await gate.reached.wait()
        left.cancel()
        assert await asker.say(call_message(EXECUTE, action="slow", attempt=2)) == "in_progress"
        gate.open()
        assert await asker.say(call_message(EXECUTE, saga_id="another")) == "done"
        assert await asker.say(call_message(EXECUTE, action="slow", attempt=3)) == "done"
    assert ledger.ran == ["slow", "execute"]
    assert ledger.entries() == [("slow", 5)]


async def test_a_queued_call_whose_caller_leaves_never_runs(ledger: Ledger) -> None:
    """It waits behind a slow one; when its turn comes nobody waits for it."""
    gate = Gate()
    gated(ledger, gate, in_loop=False)
    handlers = ledger.participant.handlers()
    async with ledger.barrier as barrier:
        slow = asyncio.ensure_future(barrier.run(call_of(action="slow"), handlers["slow", EXECUTE]))
        await gate.reached.wait()
        queued = asyncio.ensure_future(
            barrier.run(call_of(saga_id="queued"), handlers["charge", EXECUTE])
        )
        await asyncio.sleep(0)  # now it has queued its call
        queued.cancel()
        await asyncio.wait([queued])
        gate.open()
        await slow
        await barrier.write(count_entries)  # behind the call that left
        undo = call_of(COMPENSATE, saga_id="queued")
        assert isinstance(await barrier.run(undo, handlers["charge", COMPENSATE]), Done)
    assert ledger.ran == ["slow"]


@pytest.mark.parametrize("queued_in_loop", [False, True], ids=["queued def", "queued async def"])
@KINDS
async def test_a_call_whose_turn_does_not_come_is_in_progress(
    tmp_path: Path, *, in_loop: bool, queued_in_loop: bool, share_commits: bool
) -> None:
    """A slow neighbour costs it a poll and no failure: it never ran, has no row, and then runs."""
    ledger = Ledger(tmp_path / "payments.db", busy_timeout_s=0.05, share_commits=share_commits)
    gate = Gate()
    gated(ledger, gate, in_loop=in_loop)

    @ledger.participant.execute("quick", compensatable=False)
    async def quick(call: Call, tx: AsyncTransaction) -> None:
        ledger.ran.append("execute")
        await tx.execute("INSERT INTO ledger VALUES (?, 'charge', 5)", (call.saga_id,))

    action = "quick" if queued_in_loop else "charge"
    async with ledger.served() as asker:
        slow = asyncio.ensure_future(ask_until_decided(asker, call_message(EXECUTE, action="slow")))
        await gate.reached.wait()
        neighbours = [
            call_message(EXECUTE, action=action, saga_id=f"neighbour-{n}") for n in range(5)
        ]
        assert set(await asyncio.gather(*map(asker.say, neighbours))) == {"in_progress"}
        undo = call_message(COMPENSATE, saga_id="another")
        assert await asker.say(undo) == "in_progress"
        assert ledger.ran == ["slow"]
        gate.open()
        # Its own time was over before its neighbours', and it had begun: it is not withdrawn.
        assert await slow == "done"
        assert read_rows(ledger.path, "neighbour-0") == []
        for neighbour in neighbours:
            assert await ask_until_decided(asker, neighbour) == "done"
        assert await ask_until_decided(asker, undo) == "done"
    assert ledger.ran == ["slow"] + ["execute"] * 5
    assert ledger.entries("neighbour-0") == [("charge", 5)]


@KINDS
async def test_a_call_has_begun_or_is_withdrawn_and_never_both(
    tmp_path: Path, *, in_loop: bool, share_commits: bool
) -> None:
    """However a turn and the end of the wait for it meet: in progress did not run, done did."""
    ledger = Ledger(tmp_path / "payments.db", busy_timeout_s=0.01, share_commits=share_commits)

    def quick(call: Call, tx: Transaction) -> None:
        ledger.ran.append(call.saga_id)

    async def quick_async(call: Call, tx: AsyncTransaction) -> None:
        ledger.ran.append(call.saga_id)

    ledger.participant.execute("quick", compensatable=False)(quick_async if in_loop else quick)
    handler = ledger.participant.handlers()["quick", EXECUTE]
    calls = [call_of(action="quick", saga_id=f"order-{number}") for number in range(300)]
    async with ledger.barrier as barrier:
        outcomes = await asyncio.gather(*(barrier.run(call, handler) for call in calls))
        by_saga = {call.saga_id: outcome for call, outcome in zip(calls, outcomes, strict=True)}
        done = [saga_id for saga_id, outcome in by_saga.items() if isinstance(outcome, Done)]
        assert sorted(ledger.ran) == sorted(done)
        withdrawn = [call for call in calls if isinstance(by_saga[call.saga_id], InProgress)]
        assert len(done) + len(withdrawn) == len(calls)
    async with SqliteBarrier(ledger.path, busy_timeout_s=PATIENCE_S) as patient:
        for call in withdrawn:
            assert isinstance(await patient.run(call, handler), Done)
    assert sorted(ledger.ran) == sorted(by_saga)


async def test_calls_that_are_withdrawn_leave_nothing_in_the_queue(
    tmp_path: Path, *, share_commits: bool
) -> None:
    """A handler that hangs for hours is asked around for hours: the queue must not grow."""
    ledger = Ledger(tmp_path / "payments.db", busy_timeout_s=0.05, share_commits=share_commits)
    gate = Gate()
    gated(ledger, gate, in_loop=False)
    handlers = ledger.participant.handlers()
    async with ledger.barrier as barrier:
        slow = asyncio.ensure_future(
            run_until_decided(barrier, call_of(action="slow"), handlers["slow", EXECUTE])
        )
        await gate.reached.wait()
        for number in range(3):
            call = call_of(saga_id=f"order-{number}")
            assert isinstance(await barrier.run(call, handlers["charge", EXECUTE]), InProgress)
        left = asyncio.ensure_future(barrier.run(call_of(saga_id="l"), handlers["charge", EXECUTE]))
        await asyncio.sleep(0)  # now it has queued its call
        left.cancel()
        await asyncio.wait([left])
        assert barrier._opened().queued == 0
        gate.open()
        await slow


async def test_an_async_handler_that_hangs_is_cancelled(
    tmp_path: Path, *, share_commits: bool
) -> None:
    """After `max_hold_s` it is rolled back although its caller still waits; the writer is free."""
    path = tmp_path / "payments.db"
    barrier = SqliteBarrier(path, schema=SCHEMA, max_hold_s=0.1, share_commits=share_commits)
    participant = Participant("payments", barrier=barrier)
    was_cancelled = asyncio.Event()

    @participant.execute("hang", compensatable=False)
    async def hang(call: Call, tx: AsyncTransaction) -> None:
        await tx.execute("INSERT INTO ledger VALUES (?, 'hang', 5)", (call.saga_id,))
        try:
            await asyncio.Event().wait()
        finally:
            was_cancelled.set()

    async with serve(participant) as server, asking(server.address) as asker:
        code, details = await asker.status(call_message(EXECUTE, action="hang"))
        assert code is grpc.StatusCode.UNKNOWN
        assert "for more than 0.1 s" in details
        assert was_cancelled.is_set()
        assert await barrier.write(count_entries) == 0


async def test_a_statement_that_never_ends_is_interrupted(
    tmp_path: Path, *, share_commits: bool
) -> None:
    """SQLite itself is stopped after `max_hold_s`; the handler gets its error."""
    barrier = SqliteBarrier(
        tmp_path / "payments.db", schema=SCHEMA, max_hold_s=0.1, share_commits=share_commits
    )
    participant = Participant("payments", barrier=barrier)

    @participant.execute("endless", compensatable=False)
    def endless(call: Call, tx: Transaction) -> None:
        write_entry(tx, call, "endless")
        tx.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT sum(i) FROM n"
        )

    async with serve(participant) as server, asking(server.address) as asker:
        code, details = await asker.status(call_message(EXECUTE, action="endless"))
        assert code is grpc.StatusCode.UNKNOWN
        assert "OperationalError" in details
        assert await barrier.write(count_entries) == 0


async def test_a_foreign_lock_is_in_progress(tmp_path: Path, *, share_commits: bool) -> None:
    """Somebody else writes into the database: all calls are to ask again, and then go through."""
    ledger = Ledger(tmp_path / "payments.db", busy_timeout_s=0.05, share_commits=share_commits)
    async with ledger.served() as asker:
        with closing(sqlite3.connect(ledger.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            calls = [call_message(EXECUTE, saga_id=f"order-{number}") for number in range(20)]
            said = await asyncio.gather(*map(asker.say, calls))
            assert set(said) == {"in_progress"}
            assert await asker.say(call_message(COMPENSATE)) == "in_progress"
            other.execute("ROLLBACK")
        said = await asyncio.gather(*(ask_until_decided(asker, call) for call in calls))
        assert set(said) == {"done"}
    assert ledger.ran == ["execute"] * 20


async def test_handlers_beyond_the_limit_wait_their_turn(tmp_path: Path) -> None:
    """With two places the third call waits until one is free; none is refused."""
    participant = Participant("payments", barrier=None)
    gate = Gate()
    inside = 0
    most = 0
    entered = asyncio.Semaphore(0)

    @participant.execute("wait", compensatable=False)
    async def wait(call: Call) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        entered.release()
        await gate.pass_in_loop()
        inside -= 1

    async with serve(participant, max_concurrent=2) as server, asking(server.address) as asker:
        calls = [call_message(EXECUTE, action="wait", saga_id=f"order-{n}") for n in range(5)]
        asked = asyncio.gather(*map(asker.say, calls))
        for _ in range(2):
            await entered.acquire()
        gate.open()
        assert set(await asked) == {"done"}
    assert most == 2


def count_entries(tx: Transaction) -> int:
    """Count all effects."""
    (count,) = tx.execute("SELECT count(*) FROM ledger").fetchone()
    assert isinstance(count, int)
    return count


async def ask_until_decided(asker: Asker, call: pb.Call) -> str:
    """Ask again after the time that each `InProgress` names, as a runtime does."""
    while True:
        outcome = await asker.ask(call)
        if not outcome.HasField("in_progress"):
            return words(outcome)
        await asyncio.sleep(outcome.in_progress.poll_after_ms / 1000)


async def run_until_decided(barrier: SqliteBarrier, call: Call, handler: Handler) -> Outcome:
    """Give a call to the barrier until its turn comes in time."""
    while True:
        outcome = await barrier.run(call, handler)
        if not isinstance(outcome, InProgress):
            return outcome


async def test_one_wait_for_a_foreign_lock_answers_all_that_wait(
    tmp_path: Path, *, share_commits: bool
) -> None:
    """Calls queued behind the first are not held up for a busy time-out each."""
    begins = 0

    class Connection(sqlite3.Connection):
        """Finds a lock at once, so that no call is withdrawn meanwhile, and counts."""

        def execute(self, sql: str, *arguments: object) -> sqlite3.Cursor:
            nonlocal begins
            begins += sql.startswith("BEGIN")
            if sql.startswith("PRAGMA busy_timeout"):
                sql = "PRAGMA busy_timeout = 0"
            return super().execute(sql, *arguments)  # type: ignore[arg-type]

    path = tmp_path / "payments.db"
    ledger = Ledger(path)
    barrier = SqliteBarrier(
        lambda: sqlite3.connect(path, factory=Connection),
        schema=SCHEMA,
        busy_timeout_s=PATIENCE_S,
        share_commits=share_commits,
    )
    handler = ledger.participant.handlers()["charge", EXECUTE]
    gate = Gate()

    async with barrier:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            blocking = asyncio.ensure_future(barrier._in_thread(lambda _: gate.pass_in_thread()))
            await gate.reached.wait()
            asked = asyncio.gather(
                *(barrier.run(call_of(saga_id=f"order-{n}"), handler) for n in range(20))
            )
            await asyncio.sleep(0)  # now each of them has queued its call
            gate.open()
            await blocking
            outcomes = await asked
    assert all(isinstance(outcome, InProgress) for outcome in outcomes)
    assert begins == 1


async def test_too_many_waiting_calls_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """One runs, one waits, and the third is told that nothing was done."""
    monkeypatch.setattr("amends.admission.MAX_QUEUED", 1)
    participant = Participant("payments", barrier=None)
    gate = Gate()

    @participant.execute("wait", compensatable=False)
    async def wait(call: Call) -> None:
        await gate.pass_in_loop()

    async with serve(participant, max_concurrent=1) as server, asking(server.address) as asker:
        calls = [call_message(EXECUTE, action="wait", saga_id=f"order-{n}") for n in range(3)]
        asked = [asyncio.ensure_future(asker.ask(call)) for call in calls]
        turned_away, others = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        gate.open()
        assert {words(await other) for other in others} == {"done"}
    (error,) = [one.exception() for one in turned_away]
    assert isinstance(error, grpc.aio.AioRpcError)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "nothing was done" in (error.details() or "")
