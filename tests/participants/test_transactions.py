"""What handlers may do with the transaction, and what happens when a commit fails."""

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from amends import (
    AsyncTransaction,
    BarrierError,
    Call,
    Participant,
    Rejected,
    Rows,
    SqliteBarrier,
    Transaction,
    TransactionMisused,
    Verb,
    serve,
)
from tests.participants.asking import asking, call_message
from tests.participants.ledger import SCHEMA, Ledger, read_rows, write_entry

EXECUTE, COMPENSATE = Verb.EXECUTE, Verb.COMPENSATE

FORBIDDEN = [
    "COMMIT",
    "/* sly */ commit",
    "ROLLBACK",
    "BEGIN",
    "RELEASE amends_effect",
    "ROLLBACK TO amends_effect",
    "DELETE FROM amends_barrier",
    "UPDATE amends_barrier SET state = 'done'",
    "DROP TABLE amends_barrier",
    "ALTER TABLE amends_barrier RENAME TO gone",
]


@pytest.mark.parametrize("statement", FORBIDDEN)
async def test_statements_that_would_break_the_barrier_are_refused(
    ledger: Ledger, statement: str
) -> None:
    """Nothing of such a handler is kept, and the barrier goes on."""

    @ledger.participant.execute("sly", compensatable=False)
    def sly(call: Call, tx: Transaction) -> None:
        write_entry(tx, call, "sly")
        tx.execute(statement)

    async with ledger.served() as asker:
        code, details = await asker.status(call_message(EXECUTE, action="sly"))
        assert code is grpc.StatusCode.UNKNOWN
        assert "TransactionMisused" in details
        assert ledger.entries() == []
        assert await asker.say(call_message(EXECUTE)) == "done"
    assert read_rows(ledger.path) == [("execute", "done")]


async def test_both_transactions_read_and_write_alike(ledger: Ledger) -> None:
    """The same methods, with and without await; savepoints of the author's own are fine."""
    entries = [("x", "one", 1), ("x", "two", 2)]

    @ledger.participant.execute("sync", compensatable=False)
    def sync(call: Call, tx: Transaction) -> list[object]:
        written = tx.executemany("INSERT INTO ledger VALUES (?, ?, ?)", entries)
        tx.execute("SAVEPOINT mine")
        tx.execute("DELETE FROM ledger")
        tx.execute("ROLLBACK TO mine")
        found = tx.execute("SELECT entry FROM ledger WHERE amount > :least", {"least": 0})
        first, rest = found.fetchone(), list(found)
        insert = "INSERT INTO ledger VALUES ('x', 'three', 3) RETURNING amount"
        returned = tx.execute(insert)
        return [written.rowcount, first, rest, returned.fetchall(), returned.fetchone()]

    @ledger.participant.execute("async", compensatable=False)
    async def async_(call: Call, tx: AsyncTransaction) -> list[object]:
        await tx.execute("DELETE FROM ledger")
        written = await tx.executemany("INSERT INTO ledger VALUES (?, ?, ?)", iter(entries))
        await tx.execute("SAVEPOINT mine")
        await tx.execute("DELETE FROM ledger")
        await tx.execute("ROLLBACK TO mine")
        found = await tx.execute("SELECT entry FROM ledger WHERE amount > :least", {"least": 0})
        first, rest = found.fetchone(), list(found)
        insert = "INSERT INTO ledger VALUES ('x', 'three', 3) RETURNING amount"
        returned = await tx.execute(insert)
        return [written.rowcount, first, rest, returned.fetchall(), returned.fetchone()]

    async with ledger.served() as asker:
        answers = [
            await asker.ask(call_message(EXECUTE, action=action, saga_id=action))
            for action in ("sync", "async")
        ]
    assert answers[0].done.result == answers[1].done.result
    assert answers[0].done.result.data == b'[2,["one"],[["two"]],[[3]],null]'


async def test_a_transaction_ends_with_its_handler(ledger: Ledger) -> None:
    """Used later, it is refused instead of joining another call's transaction."""
    kept: list[Transaction] = []
    kept_async: list[AsyncTransaction] = []

    @ledger.participant.execute("keep", compensatable=False)
    def keep(call: Call, tx: Transaction) -> None:
        kept.append(tx)

    @ledger.participant.execute("keep-async", compensatable=False)
    async def keep_async(call: Call, tx: AsyncTransaction) -> None:
        kept_async.append(tx)

    async with ledger.served() as asker:
        await asker.ask(call_message(EXECUTE, action="keep", saga_id="a"))
        await asker.ask(call_message(EXECUTE, action="keep-async", saga_id="b"))
        with pytest.raises(TransactionMisused):
            kept[0].execute("SELECT 1")
        with pytest.raises(TransactionMisused):
            await kept_async[0].execute("SELECT 1")


async def test_a_cancelled_statement_dooms_its_transaction(ledger: Ledger) -> None:
    """Nobody knows whether it ran, so a handler that goes on regardless is rolled back."""

    @ledger.participant.execute("impatient", compensatable=False)
    async def impatient(call: Call, tx: AsyncTransaction) -> None:
        await tx.execute("INSERT INTO ledger VALUES (?, 'impatient', 5)", (call.saga_id,))
        statement = asyncio.ensure_future(tx.execute("SELECT 1"))
        await asyncio.sleep(0)
        statement.cancel()
        await asyncio.wait([statement])

    async with ledger.served() as asker:
        code, details = await asker.status(call_message(EXECUTE, action="impatient"))
        assert code is grpc.StatusCode.UNKNOWN
        assert "nobody knows whether it ran" in details
        assert await asker.say(call_message(EXECUTE)) == "done"
    assert ledger.entries() == [("charge", 5)]


async def test_a_statement_without_await_is_no_effect_and_no_done(ledger: Ledger) -> None:
    """It never ran, so Done would be a lie: the error says what to write, and nothing is kept."""

    @ledger.participant.execute("forgetful", compensatable=False)
    async def forgetful(call: Call, tx: AsyncTransaction) -> str:
        await tx.execute("INSERT INTO ledger VALUES (?, 'fee', 1)", (call.saga_id,))
        tx.execute("INSERT INTO ledger VALUES (?, 'forgetful', 5)", (call.saga_id,))  # type: ignore[unused-coroutine]
        return "charged"

    under_way: list[asyncio.Future[Rows]] = []

    @ledger.participant.execute("hasty", compensatable=False)
    async def hasty(call: Call, tx: AsyncTransaction) -> str:
        statement = tx.executemany("INSERT INTO ledger VALUES ('order-1', ?, 5)", "h")
        under_way.append(asyncio.ensure_future(statement))
        await asyncio.sleep(0)  # the statement is under way, and nobody will hear how it ends
        return "charged"

    async with ledger.served() as asker:
        with pytest.warns(RuntimeWarning, match="never awaited"):
            code, details = await asker.status(call_message(EXECUTE, action="forgetful"))
        assert code is grpc.StatusCode.UNKNOWN
        assert "put await before each tx.execute" in details
        code, details = await asker.status(call_message(EXECUTE, action="hasty"))
        assert code is grpc.StatusCode.UNKNOWN
        assert "put await before each tx.execute" in details
        assert await asker.say(call_message(EXECUTE)) == "done"
    assert ledger.entries() == [("charge", 5)]


async def test_a_refusal_needs_no_statement_to_have_ended(ledger: Ledger) -> None:
    """Nothing is kept anyway: what the handler says stands."""

    @ledger.participant.execute("refuse", compensatable=False)
    async def refuse(call: Call, tx: AsyncTransaction) -> None:
        tx.execute("INSERT INTO ledger VALUES (?, 'refuse', 5)", (call.saga_id,)).close()
        raise Rejected("card_declined")

    async with ledger.served() as asker:
        assert await asker.say(call_message(EXECUTE, action="refuse")) == "rejected card_declined"
    assert ledger.entries() == []


async def test_statements_that_are_gathered_have_all_ended(ledger: Ledger) -> None:
    """Made first and awaited later, in any order, is awaited."""

    @ledger.participant.execute("gather", compensatable=False)
    async def gather(call: Call, tx: AsyncTransaction) -> None:
        insert = "INSERT INTO ledger VALUES (?, 'gather', ?)"
        await asyncio.gather(*(tx.execute(insert, (call.saga_id, n)) for n in range(3)))

    async with ledger.served() as asker:
        assert await asker.say(call_message(EXECUTE, action="gather")) == "done"
    assert ledger.entries() == [("gather", 0), ("gather", 1), ("gather", 2)]


class PanicException(BaseException):
    """What extensions written in Rust raise when they panic; no `Exception`, on purpose."""


@pytest.mark.parametrize(
    "kind", [SystemExit, KeyboardInterrupt, PanicException, GeneratorExit, asyncio.CancelledError]
)
@pytest.mark.parametrize("has_barrier", [True, False], ids=["barrier", "no barrier"])
@pytest.mark.parametrize("is_async", [True, False], ids=["async def", "def"])
async def test_a_handler_cannot_end_the_participant(
    ledger: Ledger, kind: type[BaseException], *, has_barrier: bool, is_async: bool
) -> None:
    """What would end a program fails the handler alone: outcome unknown, and the next call runs."""
    participant = Participant("payments", barrier=ledger.barrier if has_barrier else None)

    def leave(call: Call) -> None:
        if call.attempt == 1:
            raise kind

    async def leave_async(call: Call) -> None:
        leave(call)

    participant.execute("leave", compensatable=False)(leave_async if is_async else leave)
    async with serve(participant) as server, asking(server.address) as asker:
        code, details = await asker.status(call_message(EXECUTE, action="leave"))
        assert code is grpc.StatusCode.UNKNOWN
        assert f"raised {kind.__name__}" in details
        assert await asker.say(call_message(EXECUTE, action="leave", attempt=2)) == "done"


async def test_nothing_is_written_after_sqlite_rolled_back_by_itself(ledger: Ledger) -> None:
    """A handler that swallows such an error must not write effects without the barrier's row."""

    @ledger.participant.execute("stubborn", compensatable=False)
    def stubborn(call: Call, tx: Transaction) -> None:
        write_entry(tx, call, "first")
        try:
            tx.execute("INSERT OR ROLLBACK INTO ledger (rowid) VALUES (1), (1)")
        except sqlite3.IntegrityError:
            write_entry(tx, call, "second")

    async with ledger.served() as asker:
        code, details = await asker.status(call_message(EXECUTE, action="stubborn"))
        assert code is grpc.StatusCode.UNKNOWN
        assert "SQLite ended the transaction" in details
    assert ledger.entries() == []
    assert read_rows(ledger.path) == []


def with_foreign_keys(path: Path) -> Callable[[], sqlite3.Connection]:
    """Make a connection factory with a row factory and foreign keys of the author's own."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path)
        connection.row_factory = sqlite3.Row
        connection.text_factory = bytes
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    return connect


async def test_a_commit_that_fails_is_unknown_and_the_database_is_opened_anew(
    tmp_path: Path, *, share_commits: bool
) -> None:
    """A deferred constraint makes COMMIT itself fail: an error, and the next attempt runs."""
    path = tmp_path / "payments.db"
    schema = f"""
        {SCHEMA};
        CREATE TABLE IF NOT EXISTS accounts (name TEXT PRIMARY KEY);
        CREATE TABLE IF NOT EXISTS payments (
            account TEXT REFERENCES accounts DEFERRABLE INITIALLY DEFERRED)
    """
    barrier = SqliteBarrier(with_foreign_keys(path), schema=schema, share_commits=share_commits)
    participant = Participant("payments", barrier=barrier)

    @participant.execute("pay", compensatable=False)
    def pay(call: Call, tx: Transaction) -> None:
        write_entry(tx, call, "pay")
        tx.execute("INSERT INTO payments VALUES ('nobody')")
        if call.attempt > 1:
            tx.execute("INSERT INTO accounts VALUES ('nobody')")

    async with serve(participant) as server, asking(server.address) as asker:
        code, details = await asker.status(call_message(EXECUTE, action="pay"))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "COMMIT" in details
        assert await asker.say(call_message(EXECUTE, action="pay", attempt=2)) == "done"
        assert await asker.say(call_message(EXECUTE, action="pay", attempt=3)) == "done"
    assert read_rows(path) == [("execute", "done")]


class CommitsAndSaysItFailed(sqlite3.Connection):
    """What a disk can do: the COMMIT is on it, and its sync reports an error."""

    failures_left = 1

    def execute(self, sql: str, *arguments: object) -> sqlite3.Cursor:
        cursor = super().execute(sql, *arguments)  # type: ignore[arg-type]
        if sql.startswith("COMMIT") and type(self).failures_left > 0:
            type(self).failures_left -= 1
            raise sqlite3.OperationalError("disk I/O error")
        return cursor


async def test_a_commit_that_happened_although_it_failed_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, share_commits: bool
) -> None:
    """The caller hears an error; when it asks again, the stored reply answers and nothing runs."""
    path = tmp_path / "payments.db"
    monkeypatch.setattr(CommitsAndSaysItFailed, "failures_left", 1)

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path, factory=CommitsAndSaysItFailed)

    ledger = Ledger(path)
    ledger.barrier = SqliteBarrier(connect, schema=SCHEMA, share_commits=share_commits)
    ledger.participant.barrier = ledger.barrier
    async with ledger.served() as asker:
        code, _ = await asker.status(call_message(EXECUTE))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert CommitsAndSaysItFailed.failures_left == 0
        assert await asker.say(call_message(EXECUTE, attempt=2)) == "done"
    assert ledger.ran == ["execute"]
    assert ledger.entries() == [("charge", 5)]


async def test_a_write_of_ones_own_shares_the_connection(ledger: Ledger) -> None:
    """`write` commits what returns and keeps nothing of what raises."""
    async with ledger.barrier as barrier:
        await barrier.write(lambda tx: tx.execute("INSERT INTO ledger VALUES ('order-1', 'a', 1)"))

        def fail(tx: Transaction) -> None:
            tx.execute("INSERT INTO ledger VALUES ('order-1', 'b', 1)")
            raise LookupError

        with pytest.raises(LookupError):
            await barrier.write(fail)
        with pytest.raises(TransactionMisused):
            await barrier.write(lambda tx: tx.execute("COMMIT"))
    assert ledger.entries() == [("a", 1)]


async def test_a_write_cannot_change_what_a_store_has_said(ledger: Ledger) -> None:
    """It decides about the barrier's rows, and is guarded like them."""
    async with ledger.barrier as barrier:
        with pytest.raises(TransactionMisused):
            await barrier.write(lambda tx: tx.execute("DELETE FROM amends_barrier_stores"))


UNUSABLE = {
    "a folder": lambda folder: folder,
    "a missing folder": lambda folder: folder / "missing" / "payments.db",
    "no database": lambda folder: write_text(folder / "notes.txt", "not a database " * 100),
    "a foreign amends_barrier": lambda folder: make_table(folder / "other.db"),
}


def write_text(path: Path, text: str) -> Path:
    """Write a file that is no database."""
    path.write_text(text)
    return path


def make_table(path: Path) -> Path:
    """Make a database with a table of the same name that is not ours."""
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE amends_barrier (something TEXT)")
    connection.close()
    return path


@pytest.mark.parametrize("make", UNUSABLE.values(), ids=UNUSABLE.keys())
async def test_a_database_that_cannot_be_used_is_one_line(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    """The path and the reason, when the barrier is opened."""
    path = make(tmp_path)
    with pytest.raises(BarrierError) as caught:
        await SqliteBarrier(path).open()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """With the next step, in place of SQLite's "unable to open database file"."""
    folder = tmp_path / "missing"
    with pytest.raises(BarrierError, match=f"there is no folder {folder}; make it") as caught:
        await SqliteBarrier(folder / "payments.db").open()
    assert f"mkdir -p {folder}" in str(caught.value)


async def test_a_schema_that_fails_is_told(tmp_path: Path) -> None:
    """The author's SQL error comes with the database's name."""
    with pytest.raises(BarrierError, match="syntax error"):
        await SqliteBarrier(tmp_path / "a.db", schema="CREATE TABEL x (y)").open()


async def test_a_connection_in_memory_is_refused() -> None:
    """It would forget everything with the process."""
    with pytest.raises(ValueError, match="forgets"):
        SqliteBarrier(":memory:")
    with pytest.raises(BarrierError, match="journal mode is 'memory'"):
        await SqliteBarrier(lambda: sqlite3.connect(":memory:")).open()
