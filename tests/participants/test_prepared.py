"""Votes that are prepared transactions of a real PostgreSQL, asked in every order."""

import asyncio
import contextlib
import logging
import threading
from typing import Any, LiteralString

import asyncpg
import grpc
import psycopg
import pytest
from psycopg import sql

from amends import (
    BarrierError,
    Call,
    Decision,
    Done,
    HandlerFailed,
    Heuristic,
    InProgress,
    Participant,
    PreparedTransactions,
    Rejected,
    Verb,
)
from amends.barrier.prepared_votes import Bounds
from amends.errors import CommitUnknown, VoteNotSettled
from tests.participants.branch import (
    INCARNATION,
    KINDS,
    SCHEMA,
    STORE,
    Branch,
    Kind,
    call_of,
    message,
    said,
)
from tests.participants.cutting import relay
from tests.postgres import Postgres

P, E, C = Verb.PREPARE, Verb.EXECUTE, Verb.COMPENSATE

drivers = pytest.mark.parametrize("kind", KINDS)
async_drivers = pytest.mark.parametrize("kind", ["asyncpg", "psycopg"])


def finish(postgres: Postgres, word: LiteralString, gid: str) -> None:
    """Do by hand what the barrier does."""
    statement = sql.SQL("{} PREPARED {}").format(sql.SQL(word), sql.Literal(gid))
    postgres.connection.execute(statement)


@drivers
async def test_a_vote_is_prepared_and_committed(postgres: Postgres, kind: Kind) -> None:
    """Prepare holds it, unseen; Execute commits it; each may be repeated, and nothing is left."""
    branch = Branch(postgres, kind)
    async with branch.served() as asker:
        assert [await asker.say(message(P)) for _ in range(3)] == ["done"] * 3
        assert (branch.cents, branch.rows, len(branch.listed)) == (100, [], 1)
        assert [await asker.say(message(E)) for _ in range(2)] == ["done"] * 2
        assert await asker.say(message(P, attempt=4)) == "done"
    assert (branch.cents, branch.rows, branch.listed) == (95, [("transfer-1", "yes")], [])
    assert branch.ran == 1


@drivers
@pytest.mark.parametrize("executed", [True, False])
async def test_a_vote_is_rolled_back(postgres: Postgres, kind: Kind, *, executed: bool) -> None:
    """Compensate takes it back, also repeated; what comes late is refused."""
    branch = Branch(postgres, kind)
    async with branch.served() as asker:
        assert await asker.say(message(P)) == "done"
        undo = message(C, executed=executed)
        assert [await asker.say(undo) for _ in range(2)] == ["done"] * 2
        assert await asker.say(message(P, attempt=2)) == "rejected fenced"
        assert await asker.say(message(E)) == "rejected fenced"
    assert (branch.cents, branch.rows, branch.listed) == (100, [("transfer-1", "aborted")], [])


@drivers
async def test_a_no_is_remembered(postgres: Postgres, kind: Kind) -> None:
    """The same round gets the same no, and it holds nothing; there is nothing to roll back."""
    branch = Branch(postgres, kind)
    async with branch.served() as asker:
        first = await asker.ask(message(P, amount=500))
        assert first.rejected.reason == "insufficient"
        assert await asker.ask(message(P, amount=500, attempt=2)) == first
        assert await asker.say(message(C)) == "done"
        assert await asker.say(message(E)) == "broken vote_lost"
        assert await asker.say(message(P, amount=500, attempt=3)) == "rejected insufficient"
    assert (branch.ran, branch.listed) == (1, [])


async def test_a_late_vote_after_the_abort_says_no(postgres: Postgres) -> None:
    """Compensate of what never came is Done, and forbids that it comes."""
    branch = Branch(postgres)
    async with branch.barrier:
        assert said(await branch.ask(C)) == "Done"
        assert said(await branch.ask(P)) == "Rejected fenced"
    assert (branch.ran, branch.listed) == (0, [])


async def test_an_absent_vote_is_never_committed(postgres: Postgres) -> None:
    """Execute finds no trace of a yes: Broken, each time; and no late vote may come after that."""
    branch = Branch(postgres)
    async with branch.barrier:
        for _ in range(2):
            assert said(await branch.ask(E)) == "Broken vote_lost"
            assert said(await branch.ask(P)) == "Rejected fenced"
        assert said(await branch.ask(C)) == "Done"
    assert branch.ran == 0


async def test_a_vote_that_was_rolled_back_by_hand_is_lost(postgres: Postgres) -> None:
    """Execute says so; Compensate has nothing to do, whatever the runtime has recorded."""
    branch = Branch(postgres)
    async with branch.barrier:
        for saga_id in ("commits", "ben-aborts"):
            assert said(await branch.ask(P, saga_id=saga_id)) == "Done"
        for gid in branch.listed:
            finish(postgres, "ROLLBACK", gid)
        assert said(await branch.ask(E, saga_id="commits")) == "Broken vote_lost"
        assert said(await branch.ask(C, saga_id="ben-aborts", executed=True)) == "Done"


async def test_a_vote_that_was_committed_by_hand_is_told(postgres: Postgres) -> None:
    """Compensate cannot undo it: the branch has decided alone. Execute finds it as it should be."""
    branch = Branch(postgres)
    async with branch.barrier:
        await branch.ask(P)
        finish(postgres, "COMMIT", branch.listed[0])
        for _ in range(2):
            outcome = await branch.ask(C, executed=True)
            assert isinstance(outcome, Heuristic)
            assert (outcome.committed, outcome.reason) == (True, "committed")
        assert said(await branch.ask(C, two_phase=False)) == "Broken committed"
        assert said(await branch.ask(E)) == "Done"
    assert branch.cents == 95


@pytest.mark.parametrize("verb", [P, E])
async def test_a_call_of_a_saga_is_refused(postgres: Postgres, verb: Verb) -> None:
    """There is no effect without a vote: its definition's mode is wrong."""
    branch = Branch(postgres)
    async with branch.barrier:
        outcome = await branch.ask(verb, two_phase=False)
        assert isinstance(outcome, Rejected)
        assert outcome.reason == "two_phase_only"
        assert "TWO_PHASE_COMMIT" in outcome.message
        assert said(await branch.ask(C, two_phase=False)) == "Done"
        assert branch.ran == 0


async def test_an_action_that_nobody_prepares_is_unknown(postgres: Postgres) -> None:
    """UNIMPLEMENTED for each verb; but what was no vote is rolled back, and fenced."""
    branch = Branch(postgres)
    async with branch.served() as asker:
        for verb in Verb:
            call = message(verb, action="credit", executed=verb is C)
            code, details = await asker.status(call)
            assert code is grpc.StatusCode.UNIMPLEMENTED
            assert details.endswith("it has: prepare debit")
        assert await asker.say(message(C, action="credit")) == "done"
        assert await asker.say(message(P)) == "rejected fenced"


@pytest.mark.parametrize("is_finished", [False, True])
async def test_another_request_under_the_same_key_is_broken(
    postgres: Postgres, *, is_finished: bool
) -> None:
    """Also while the vote's row cannot be read: its name has the beginning of the hash."""
    branch = Branch(postgres)
    async with branch.barrier:
        await branch.ask(P)
        if is_finished:
            await branch.ask(E)
        assert said(await branch.ask(P, amount=6)) == "Broken request_changed"
        assert said(await branch.ask(P)) == "Done"


async def test_lives_do_not_meet(postgres: Postgres) -> None:
    """Another saga, step, round or store is another vote; another incarnation is the same."""
    branch = Branch(postgres)
    others: list[dict[str, Any]] = [{"saga_id": "transfer-10"}, {"step": "fee"}, {"round": 2}]
    others += [{"store_id": "another"}, {"saga_id": "transfer-1|debit"}]
    async with branch.barrier:
        await branch.ask(P, amount=0)
        for other in others:
            assert said(await branch.ask(C, **other)) == "Done"
        assert len(branch.listed) == 1
        restored = {"incarnation": "restored"}
        assert said(await branch.ask(P, amount=0, **restored)) == "Done"
        assert said(await branch.ask(E, **restored)) == "Done"
    assert (branch.ran, branch.listed) == (1, [])


async def test_an_id_that_does_not_fit_is_refused(postgres: Postgres) -> None:
    """PostgreSQL has 199 bytes for it. The same no each time; nothing else is harmed by it."""
    branch = Branch(postgres)
    async with branch.barrier:
        saga_id = "t" * 128 + "/child"
        for _ in range(2):
            assert said(await branch.ask(P, saga_id=saga_id)) == "Rejected global_id_too_long"
        assert said(await branch.ask(C, saga_id=saga_id)) == "Done"
        assert said(await branch.ask(E, saga_id=saga_id)) == "Rejected fenced"
    assert branch.ran == 0


# ------------------------------------------------------------------------------ at the same time


class Gate:
    """Holds a handler where it stands."""

    def __init__(self) -> None:
        self.reached, self.open = asyncio.Event(), asyncio.Event()

    async def __call__(self, call: Call, connection: Any) -> None:
        self.reached.set()
        await self.open.wait()


@async_drivers
async def test_while_a_vote_is_taken_everybody_is_asked_to_wait(
    postgres: Postgres, kind: Kind
) -> None:
    """A duplicate, a Compensate and an Execute; from this process and from another."""
    gate = Gate()
    branch, other = Branch(postgres, kind, before=gate), Branch(postgres, kind)
    async with branch.barrier, other.barrier:
        vote = asyncio.ensure_future(branch.ask(P))
        await gate.reached.wait()
        for somewhere in (branch, other):
            for verb in Verb:
                assert said(await somewhere.ask(verb)) == "InProgress"
        gate.open.set()
        assert said(await vote) == "Done"
        assert said(await other.ask(P)) == "Done"
        assert said(await other.ask(C)) == "Done"
    assert (branch.ran, other.ran, branch.listed) == (1, 0, [])


@async_drivers
async def test_a_cancelled_vote_leaves_nothing(postgres: Postgres, kind: Kind) -> None:
    """The caller leaves while the handler runs: rolled back, and asked again it runs again."""
    gate = Gate()
    branch = Branch(postgres, kind, before=gate)
    async with branch.barrier:
        vote = asyncio.ensure_future(branch.ask(P))
        await gate.reached.wait()
        vote.cancel()
        with pytest.raises(asyncio.CancelledError):
            await vote
        gate.open.set()
        while isinstance(outcome := await branch.ask(P, attempt=2), InProgress):
            pass  # the pool is rolling the first one back
        assert said(outcome) == "Done"
    assert (branch.ran, len(branch.listed)) == (2, 1)


@drivers
async def test_who_would_have_to_wait_votes_no(postgres: Postgres, kind: Kind) -> None:
    """The account is held by another vote: LOCKED, quickly, and the same in this round for ever."""
    branch = Branch(postgres, kind, {"lock_timeout_s": 0.01})
    async with branch.barrier:
        await branch.ask(P)
        for _ in range(2):
            assert said(await branch.ask(P, saga_id="transfer-2")) == "Rejected LOCKED"
        assert said(await branch.ask(E)) == "Done"
        assert said(await branch.ask(C, saga_id="transfer-2")) == "Done"
        again = {"saga_id": "transfer-2", "round": 2}
        assert said(await branch.ask(P, **again)) == "Done"
        assert said(await branch.ask(E, **again)) == "Done"
    assert (branch.cents, branch.listed) == (90, [])


@pytest.mark.parametrize("sqlstate", ["40P01", "40001", "55P03"])
@pytest.mark.parametrize("is_deferred", [False, True])
async def test_conflicts_are_locks(postgres: Postgres, sqlstate: str, *, is_deferred: bool) -> None:
    """Deadlocks and serialization failures too, of a statement and of PREPARE TRANSACTION."""

    async def fail(call: Call, connection: Any) -> Any:
        table = "late" if is_deferred else "now"
        await connection.execute(f"INSERT INTO {table} VALUES ('{sqlstate}')")  # noqa: S608  # ours
        return Done()

    branch = Branch(postgres, before=fail)
    async with branch.barrier:
        make_failing_tables(postgres)
        assert said(await branch.ask(P)) == "Rejected LOCKED"
        assert said(await branch.ask(P)) == "Rejected LOCKED"
    assert (branch.ran, branch.listed) == (1, [])


def make_failing_tables(postgres: Postgres) -> None:
    """Make tables into which nothing can be written: one says so at once, one at the end."""
    postgres.execute(
        """
        CREATE TABLE now (sqlstate text);
        CREATE TABLE late (sqlstate text);
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE 'secret 4711' USING ERRCODE = NEW.sqlstate; END $$;
        CREATE TRIGGER now BEFORE INSERT ON now FOR EACH ROW EXECUTE FUNCTION fail();
        CREATE CONSTRAINT TRIGGER late AFTER INSERT ON late
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail();
        """
    )


# ------------------------------------------------------------------------ what handlers do wrong


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("CREATE TEMPORARY TABLE t (n int)", "temporary objects"),
        ("NOTIFY somebody", "LISTEN, UNLISTEN, or NOTIFY"),
        ("LISTEN somebody", "LISTEN, UNLISTEN, or NOTIFY"),
        ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "WITH HOLD"),
        ("INSERT INTO late VALUES ('23505')", "SQLSTATE 23505"),
    ],
)
async def test_what_cannot_be_prepared_is_no_outcome(
    postgres: Postgres, statement: str, words: str
) -> None:
    """The author's mistake is told by name; nothing stays, and a payload is not quoted."""

    async def do_it(call: Call, connection: Any) -> None:
        await connection.execute(statement)

    branch = Branch(postgres, before=do_it)
    async with branch.barrier:
        make_failing_tables(postgres)
        with pytest.raises(HandlerFailed) as caught:
            await branch.ask(P)
        assert words in str(caught.value)
        assert "4711" not in str(caught.value)
        assert (branch.listed, branch.rows) == ([], [])
        branch.before = None
        assert said(await branch.ask(P)) == "Done"


async def test_who_refuses_after_such_a_statement_has_refused(postgres: Postgres) -> None:
    """Nothing is prepared then, so nothing is wrong."""

    async def refuse(call: Call, connection: Any) -> None:
        await connection.execute("NOTIFY somebody")
        raise Rejected("closed")

    branch = Branch(postgres, before=refuse)
    async with branch.barrier:
        assert said(await branch.ask(P)) == "Rejected closed"


@async_drivers
async def test_a_vote_carries_no_result(postgres: Postgres, kind: Kind) -> None:
    """What a handler returns would be lost: it is told, and nothing is prepared."""

    async def answer(call: Call, connection: Any) -> dict[str, int]:
        return {"held": 5}

    branch = Branch(postgres, kind, before=answer)
    async with branch.barrier:
        with pytest.raises(HandlerFailed, match="returned a result, and a vote carries none"):
            await branch.ask(P)
    assert branch.listed == []


@async_drivers
async def test_a_statement_that_failed_cannot_become_a_yes(postgres: Postgres, kind: Kind) -> None:
    """PostgreSQL would roll back, and say so in one word only: it is told instead."""

    async def swallow(call: Call, connection: Any) -> object:
        with contextlib.suppress(asyncpg.PostgresError, psycopg.Error):
            await connection.execute("SELECT 1 / 0")
        return Done()

    branch = Branch(postgres, kind, before=swallow)
    async with branch.barrier:
        with pytest.raises(HandlerFailed, match="voted yes after a statement"):
            await branch.ask(P)
    assert (branch.listed, branch.rows) == ([], [])


@async_drivers
async def test_a_statement_may_fail_in_a_savepoint(postgres: Postgres, kind: Kind) -> None:
    """The driver's own nested transactions work inside a vote."""

    async def try_first(call: Call, connection: Any) -> None:
        with contextlib.suppress(asyncpg.PostgresError, psycopg.Error):
            async with connection.transaction():
                await connection.execute("SELECT 1 / 0")

    branch = Branch(postgres, kind, before=try_first)
    async with branch.barrier:
        assert said(await branch.ask(P)) == "Done"
        assert said(await branch.ask(E)) == "Done"
    assert branch.cents == 95


@async_drivers
@pytest.mark.parametrize(
    ("last", "kept"),
    [
        ("COMMIT", ["eve"]),
        ("COMMIT; BEGIN", ["eve"]),
        ("ROLLBACK", []),
        ("ROLLBACK; BEGIN", []),
        ("ROLLBACK; INSERT INTO accounts VALUES ('kim', 1)", ["kim"]),
    ],
)
@pytest.mark.parametrize("then", ["yes", "no", "raise"])
async def test_a_handler_that_ends_its_transaction_is_found_out(
    postgres: Postgres, kind: Kind, last: str, kept: list[str], then: str
) -> None:
    """Whatever it says: half of it may be there, and is no vote. Told to every verb, each time."""

    async def end(call: Call, connection: Any) -> object:
        await connection.execute("INSERT INTO accounts VALUES ('eve', 1)")
        for word in last.split("; "):
            await connection.execute(word)
        if then == "no":
            raise Rejected("no")
        if then == "raise":
            raise ValueError(then)
        return Done()

    branch = Branch(postgres, kind, before=end)
    async with branch.barrier:
        for verb in (P, P, E, C, P):
            assert said(await branch.ask(verb)) == "Broken transaction_ended"
    assert branch.ran == 1
    assert (branch.rows, branch.listed) == ([("transfer-1", "voting")], [])
    others = postgres.execute("SELECT account FROM accounts WHERE account NOT IN ('ann', 'ben')")
    assert [account for (account,) in others] == kept


@async_drivers
async def test_what_was_decided_when_a_handler_ended_its_transaction_stays(
    postgres: Postgres, kind: Kind
) -> None:
    """It had let go of its vote, and a rollback came in between: that is what is there now."""
    branch = Branch(postgres, kind)

    async def end(call: Call, connection: Any) -> None:
        await connection.execute("ROLLBACK")
        assert said(await branch.ask(C)) == "Done"

    branch.before = end
    async with branch.barrier:
        assert said(await branch.ask(P)) == "Broken transaction_ended"
        assert said(await branch.ask(P)) == "Rejected fenced"
        assert said(await branch.ask(C)) == "Done"
    assert (branch.ran, branch.rows) == (1, [("transfer-1", "aborted")])


async def test_a_vote_whose_row_was_taken_away_is_no_yes(postgres: Postgres) -> None:
    """Committed without it nobody could tell that it was: the handler has failed, nothing stays."""

    async def delete(call: Call, connection: Any) -> None:
        await connection.execute("DELETE FROM amends_votes")

    branch = Branch(postgres, before=delete)
    async with branch.barrier:
        with pytest.raises(HandlerFailed, match="has changed amends_votes"):
            await branch.ask(P)
    assert (branch.listed, branch.rows) == ([], [])


async def test_a_handler_that_holds_on_for_too_long_has_failed(postgres: Postgres) -> None:
    """It is cancelled and its transaction rolled back."""
    branch = Branch(postgres, options={"max_hold_s": 1.0}, before=Gate())
    async with branch.barrier:
        with pytest.raises(HandlerFailed, match=r"held its transaction for more than 1 s"):
            await branch.ask(P)
    assert branch.listed == []


# -------------------------------------------------------------------------------- lost replies


@drivers
async def test_a_lost_reply_of_the_vote(postgres: Postgres, kind: Kind) -> None:
    """Nobody knows whether it is prepared; asked again, it is, and the handler ran once."""
    async with relay(postgres.server.port) as cutter:
        branch = Branch(behind(postgres, cutter.port), kind)
        async with branch.barrier:
            cutter.cut("PREPARE TRANSACTION")
            with pytest.raises(CommitUnknown):
                await branch.ask(P)
            assert said(await branch.ask(P, attempt=2)) == "Done"
            assert said(await branch.ask(E)) == "Done"
    assert (cutter.cuts, branch.ran, branch.cents) == (1, 1, 95)


@drivers
@pytest.mark.parametrize(("verb", "cents"), [(E, 95), (C, 100)])
async def test_a_lost_reply_of_the_decision(
    postgres: Postgres, kind: Kind, verb: Verb, cents: int
) -> None:
    """The repeat finds what the lost one did, and says so."""
    async with relay(postgres.server.port) as cutter:
        branch = Branch(behind(postgres, cutter.port), kind)
        async with branch.barrier:
            await branch.ask(P)
            cutter.cut("COMMIT PREPARED" if verb is E else "ROLLBACK PREPARED")
            with pytest.raises(BarrierError):
                await branch.ask(verb)
            assert said(await branch.ask(verb, attempt=2)) == "Done"
    assert (cutter.cuts, branch.cents, branch.listed) == (1, cents, [])


async def test_a_late_vote_between_the_two_transactions_of_an_abort(postgres: Postgres) -> None:
    """Rolled back, its fence's reply lost or not there: the vote may come again, and is undone."""
    branch = Branch(postgres)
    async with branch.barrier:
        await branch.ask(P)
        finish(postgres, "ROLLBACK", branch.listed[0])
        assert said(await branch.ask(P, attempt=2)) == "Done"  # late, before the fence
        assert said(await branch.ask(C)) == "Done"
        assert said(await branch.ask(P, attempt=3)) == "Rejected fenced"
    assert (branch.cents, branch.listed) == (100, [])


def behind(postgres: Postgres, port: int) -> Postgres:
    """Give the same database, reached by another port; it is looked at by its own."""
    by_port = postgres.dsn_by(port)

    class Behind(Postgres):
        @property
        def dsn(self) -> str:
            return by_port

    return Behind(postgres.server, postgres.connection)


# ----------------------------------------------------------------------------- opening, purging


@async_drivers
async def test_no_connection_left_means_wait(postgres: Postgres, kind: Kind) -> None:
    """Votes leave one connection to what lets them go on; who finds none is asked to wait."""
    gate = Gate()
    options = {"max_connections": 2, "busy_timeout_s": 0.01}
    branch = Branch(postgres, kind, options, before=gate)
    async with branch.barrier:
        vote = asyncio.ensure_future(branch.ask(P))
        await gate.reached.wait()
        assert said(await branch.ask(P, saga_id="transfer-2")) == "InProgress"
        assert said(await branch.ask(C, saga_id="transfer-2")) == "Done"
        gate.open.set()
        assert said(await vote) == "Done"


async def test_a_vote_that_hangs_never_takes_the_connection_that_is_kept(
    postgres: Postgres,
) -> None:
    """Its caller has left and its thread goes on: it keeps its place until that ends."""
    is_open, reached = threading.Event(), asyncio.Queue[str]()
    loop = asyncio.get_running_loop()
    options: dict[str, Any] = {"max_connections": 2, "busy_timeout_s": 0.01}
    barrier = PreparedTransactions(postgres.dsn, driver="psycopg", schema=SCHEMA, **options)
    bank = Participant("bank", barrier=barrier)

    @bank.prepare("debit")
    def debit(call: Call, connection: psycopg.Connection[Any]) -> None:
        if call.saga_id.startswith("hangs"):
            loop.call_soon_threadsafe(reached.put_nowait, call.saga_id)
            assert is_open.wait(60)

    handler = bank.handlers()["debit", P]
    async with barrier:
        try:
            assert said(await barrier.run(call_of(P, saga_id="good"), handler)) == "Done"
            vote = asyncio.ensure_future(barrier.run(call_of(P, saga_id="hangs"), handler))
            await reached.get()
            vote.cancel()
            await asyncio.wait([vote])
            assert said(await barrier.run(call_of(P, saga_id="hangs-2"), handler)) == "InProgress"
            assert said(await barrier.run(call_of(E, saga_id="good"), None)) == "Done"
        finally:
            is_open.set()
        while said(await barrier.run(call_of(P, saga_id="next"), handler)) == "InProgress":
            pass  # until the thread has ended
        assert said(await barrier.run(call_of(C, saga_id="next"), None)) == "Done"


def test_one_connection_is_too_few(postgres: Postgres) -> None:
    """A vote that waits for a lock would keep it from being let go."""
    with pytest.raises(ValueError, match="there must be 2"):
        PreparedTransactions(postgres.dsn, max_connections=1)


async def test_it_must_be_open(postgres: Postgres) -> None:
    """Before and after, nothing is answered."""
    branch = Branch(postgres)
    for _ in range(2):
        with pytest.raises(BarrierError, match="is not open"):
            await branch.ask(P)
        async with branch.barrier, branch.barrier:
            assert said(await branch.ask(C)) == "Done"
            assert "secret" not in repr(branch.barrier)


async def test_it_opens_while_what_is_in_doubt_holds_its_tables(
    postgres: Postgres, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it could never let go: a schema that must wait for its own votes is put off."""
    branch = Branch(postgres)
    async with branch.barrier:
        await branch.ask(P)
    monkeypatch.setattr(
        "amends.barrier.prepared.SCHEMA_BOUNDS",
        Bounds(lock_s=0.01),
    )
    index = "CREATE INDEX IF NOT EXISTS by_cents ON accounts (cents)"
    again = Branch(postgres, options={"schema": index})
    with caplog.at_level(logging.WARNING, logger="amends"):
        async with again.barrier:
            assert said(await again.ask(E)) == "Done"
    assert "the schema was not run" in caplog.text
    async with again.barrier:
        assert postgres.execute("SELECT 1 FROM pg_indexes WHERE indexname = 'by_cents'") == [(1,)]


async def test_a_wrong_schema_is_refused(postgres: Postgres) -> None:
    """At the start, with the server's words."""
    with pytest.raises(BarrierError, match=r"cannot be used for prepared.*syntax error"):
        await Branch(postgres, options={"schema": "CREATE"}).barrier.open()


async def test_tables_of_another_version_are_refused(postgres: Postgres) -> None:
    """Nothing is written into them."""
    postgres.execute("CREATE TABLE amends_votes (n int)")
    postgres.execute("CREATE TABLE amends_votes_stores (n int)")
    with pytest.raises(BarrierError, match="made by another version; upgrade the SDK"):
        await Branch(postgres).barrier.open()


async def test_old_votes_are_purged(postgres: Postgres) -> None:
    """By age, and not before the runtime says that their sagas have ended; never what is held."""
    branch = Branch(postgres)
    later = 2**42
    async with branch.barrier:
        await branch.ask(P, saga_id="ben-held")
        await branch.ask(P, saga_id="over")
        await branch.ask(E, saga_id="over")
        assert await branch.barrier.purge(0) == 0  # its store has never said
        await branch.ask(E, saga_id="over", oldest_open_at_ms=later)
        await branch.ask(E, saga_id="over", oldest_open_at_ms=later + 1)
        postgres.execute("UPDATE amends_votes SET written_at_ms = written_at_ms - 1000")
        assert await branch.barrier.purge(60_000) == 0
        assert await branch.barrier.purge(500) == 1
        with pytest.raises(ValueError, match="negative"):
            await branch.barrier.purge(-1)
        assert len(branch.listed) == 1


# ------------------------------------------------------------------------------ what is in doubt


@async_drivers
async def test_what_is_in_doubt_is_listed(postgres: Postgres, kind: Kind) -> None:
    """By its name, with what it holds and since when; page by page; nobody else's."""
    postgres.execute("CREATE TABLE other (n int)")
    for name in ("somebody else''s", "amends1|theirs"):
        postgres.connection.execute("BEGIN; INSERT INTO other VALUES (1)")
        postgres.connection.execute(f"PREPARE TRANSACTION '{name}'".encode())
    branch = Branch(postgres, kind)
    async with branch.barrier:
        await branch.ask(P)
        await branch.ask(P, saga_id="ben", round=3)
        found = await branch.barrier.in_doubt(0)
        assert [(d.saga_id, d.round) for d in found] == [("ben", 3), ("transfer-1", 1)]
        assert {(d.store_id, d.incarnation, d.step, d.what) for d in found} == {
            (STORE, INCARNATION, "debit", "locks in accounts")
        }
        [(now_ms,)] = postgres.execute("SELECT (extract(epoch FROM now()) * 1000)::bigint")
        assert all(0 <= now_ms - d.since_ms < 3_600_000 for d in found)
        assert await branch.barrier.in_doubt(0, limit=1) == found[:1]
        assert await branch.barrier.in_doubt(0, after=found[0].name) == found[1:]
        assert await branch.barrier.in_doubt(3600) == []


@pytest.mark.parametrize(
    ("decision", "cents", "later"), [(Decision.COMMIT, 95, E), (Decision.ABORT, 100, C)]
)
async def test_what_is_in_doubt_is_resolved(
    postgres: Postgres, decision: Decision, cents: int, later: Verb
) -> None:
    """Once and again; what the runtime sends after that is answered Done."""
    branch = Branch(postgres)
    async with branch.barrier:
        await branch.ask(P)
        (one,) = await branch.barrier.in_doubt(0)
        assert [await branch.barrier.resolve(one, decision) for _ in range(2)] == [True, True]
        assert said(await branch.ask(later, executed=True)) == "Done"
        assert await branch.barrier.in_doubt(0) == []
        assert await branch.barrier.resolve(one, decision)
        with pytest.raises(ValueError, match="no decision that can be carried out"):
            await branch.barrier.resolve(one, Decision.PENDING)
    assert branch.cents == cents


async def test_the_runtime_was_faster_than_the_resolver(postgres: Postgres) -> None:
    """Settled is settled; a contrary decision changes nothing and is told."""
    branch = Branch(postgres)
    async with branch.barrier:
        await branch.ask(P)
        (one,) = await branch.barrier.in_doubt(0)
        await branch.ask(E)
        assert await branch.barrier.resolve(one, Decision.COMMIT)
        with pytest.raises(VoteNotSettled, match="was to be rolled back, and was committed"):
            await branch.barrier.resolve(one, Decision.ABORT)
    assert branch.cents == 95


async def test_a_lost_vote_is_not_settled(postgres: Postgres) -> None:
    """Rolled back by hand, and COMMIT was decided: told each time, and nothing is written."""
    branch = Branch(postgres)
    async with branch.barrier:
        await branch.ask(P)
        (one,) = await branch.barrier.in_doubt(0)
        finish(postgres, "ROLLBACK", one.name)
        for _ in range(2):
            with pytest.raises(VoteNotSettled, match="was to be committed, and is gone"):
                await branch.barrier.resolve(one, Decision.COMMIT)
        assert branch.rows == []
        assert await branch.barrier.resolve(one, Decision.ABORT)
        assert branch.rows == []


async def test_who_is_in_another_schema_has_votes_of_its_own(postgres: Postgres) -> None:
    """Two participants in one database: neither sees, nor settles, what the other has prepared."""

    def branch_in(schema: str) -> Branch:
        postgres.connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))

        async def connect() -> Any:
            return await asyncpg.connect(
                postgres.dsn, server_settings={"search_path": f'"{schema}"'}
            )

        branch = Branch(postgres)
        branch.barrier = PreparedTransactions(connect, schema=SCHEMA)
        return branch

    here, there = branch_in("here"), branch_in("There's")
    async with here.barrier, there.barrier:
        await here.ask(P, saga_id="ours")
        await there.ask(P, saga_id="theirs")
        for branch, saga_id in ((here, "ours"), (there, "theirs")):
            (one,) = await branch.barrier.in_doubt(0)
            assert one.saga_id == saga_id
            assert await branch.barrier.resolve(one, Decision.COMMIT)
            assert await branch.barrier.in_doubt(0) == []


async def test_only_the_role_that_prepared_it_may_end_it(postgres: Postgres) -> None:
    """Told with what to do; nothing has changed, and the right role goes on."""
    branch = Branch(postgres)
    async with branch.barrier:
        await branch.ask(P)
        postgres.execute("DROP ROLE IF EXISTS clerk")
        postgres.execute("CREATE ROLE clerk LOGIN PASSWORD 'clerk'")
        postgres.execute("GRANT USAGE ON SCHEMA public TO clerk")
        postgres.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO clerk")
        _, at = postgres.dsn.rsplit("@", 1)
        clerk = PreparedTransactions(f"postgresql://clerk:clerk@{at}")
        async with clerk:
            (one,) = await clerk.in_doubt(0)
            assert one.what == "locks in accounts; prepared by role amends"
            with pytest.raises(BarrierError, match="another role has prepared it"):
                await clerk.resolve(one, Decision.COMMIT)
        assert said(await branch.ask(E)) == "Done"
    postgres.execute("DROP OWNED BY clerk")
    postgres.execute("DROP ROLE clerk")


async def test_a_name_that_another_database_uses_is_told(postgres: Postgres) -> None:
    """Names are the whole server's: two databases answer for one step."""
    postgres.execute("DROP DATABASE IF EXISTS elsewhere WITH (FORCE)")
    postgres.execute("CREATE DATABASE elsewhere")
    there = Branch(Postgres(postgres.server, postgres.connection, "elsewhere"))
    here = Branch(postgres)
    async with here.barrier, there.barrier:
        await there.ask(P)
        assert said(await here.ask(P)) == "Broken global_id_in_use"
        assert said(await here.ask(E)) == "Broken vote_lost"
        assert said(await there.ask(C)) == "Done"
    postgres.execute("DROP DATABASE elsewhere WITH (FORCE)")
