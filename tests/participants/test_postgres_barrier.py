"""What is PostgreSQL's own in its barrier: misuse of the transaction, locks, time-outs, opening."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from traceback import format_exception
from typing import Any

import asyncpg
import grpc
import psycopg
import pytest

from amends import (
    BarrierError,
    Call,
    Done,
    InProgress,
    InvalidParticipant,
    Participant,
    PostgresBarrier,
    PreparedTransactions,
    Rejected,
    TransactionMisused,
    Verb,
)
from amends.barrier import postgres_rows
from amends.barrier.postgres import Driver, name_of
from tests.participants.asking import call_message, call_of
from tests.participants.gate import Gate
from tests.participants.postgres_ledger import KINDS, Kind, PostgresLedger
from tests.participants.standbys import (
    cut_off,
    server_of_ones_own,
    set_standbys,
    waits_for_standbys,
)
from tests.postgres import Postgres

EXECUTE = Verb.EXECUTE
DRIVERS: list[Driver] = ["asyncpg", "psycopg"]


@pytest.fixture(params=KINDS)
def ledger(request: pytest.FixtureRequest, postgres: Postgres) -> PostgresLedger:
    """Give the ledger with each kind of connection."""
    return PostgresLedger(postgres, request.param)


def agree(call: Call) -> None:
    """Say Done."""


def sending(
    ledger: PostgresLedger,
    *statements: str,
    swallows: bool = False,
    then: Callable[[Call], object] = agree,
) -> None:
    """Register the action ``send``, whose handler sends statements with the driver's connection."""

    async def send_async(call: Call, connection: Any) -> object:
        for statement in statements:
            try:
                await connection.execute(statement)
            except (asyncpg.PostgresError, psycopg.Error):
                if not swallows:
                    raise
        return then(call)

    def send(call: Call, connection: psycopg.Connection) -> object:
        for statement in statements:
            try:
                connection.execute(statement)
            except psycopg.Error:
                if not swallows:
                    raise
        return then(call)

    handler: Any = send if ledger.kind == "psycopg in threads" else send_async
    ledger.participant.execute("send", compensatable=False)(handler)


INSERT = "INSERT INTO ledger (saga_id, entry, amount) VALUES ('order-1', 'send', 5)"
SEND = call_message(EXECUTE, action="send")


def refuse(call: Call) -> None:
    """Refuse."""
    raise Rejected("card_declined")


def fail(call: Call) -> None:
    """Fail."""
    raise LookupError


# ------------------------------------------------------------------- what handlers do with it


@pytest.mark.parametrize(
    ("ending", "then"),
    [
        ("COMMIT", agree),
        ("COMMIT", refuse),
        ("COMMIT", fail),
        ("COMMIT; BEGIN", agree),
        ("COMMIT; BEGIN", refuse),
        ("COMMIT; BEGIN", fail),
        ("ROLLBACK", agree),
        ("ROLLBACK AND CHAIN", agree),
    ],
)
async def test_a_handler_that_ends_its_transaction_is_found_out(
    postgres: Postgres, ending: str, then: Callable[[Call], object]
) -> None:
    """Whatever it says: the step is broken, so that nobody repeats what may be committed."""
    ledger = PostgresLedger(postgres, "asyncpg")
    sending(ledger, INSERT, ending, then=then)
    async with ledger.served() as asker:
        assert await asker.say(SEND) == "broken transaction_ended"
        assert await asker.say(call_message(EXECUTE, saga_id="next")) == "done"
    assert ledger.rows() == []


@pytest.mark.parametrize("kind", ["psycopg", "psycopg in threads"])
async def test_the_same_over_psycopg(postgres: Postgres, kind: Kind) -> None:
    """Its own account of transactions is right again for the next call."""
    ledger = PostgresLedger(postgres, kind, max_connections=1)
    sending(ledger, INSERT, "COMMIT; BEGIN")
    async with ledger.served() as asker:
        assert await asker.say(SEND) == "broken transaction_ended"
        assert await asker.say(call_message(EXECUTE, saga_id="next")) == "done"
    assert ledger.rows() == []


@pytest.mark.parametrize("method", ["commit", "rollback"])
async def test_psycopgs_own_commit_is_refused(postgres: Postgres, method: str) -> None:
    """Before anything is committed: what so many write at the end of a function does no harm."""
    ledger = PostgresLedger(postgres, "psycopg in threads")

    @ledger.participant.execute("send", compensatable=False)
    def send(call: Call, connection: psycopg.Connection) -> None:
        connection.execute(INSERT)
        getattr(connection, method)()

    async with ledger.served() as asker:
        code, details = await asker.status(SEND)
        assert code is grpc.StatusCode.UNKNOWN
        assert "ProgrammingError" in details
        assert await asker.say(call_message(EXECUTE)) == "done"
    assert ledger.entries() == [("charge", 5)]


async def test_nothing_is_kept_of_a_transaction_that_failed(ledger: PostgresLedger) -> None:
    """A handler that swallows an error is told; a refusal after one is a refusal."""
    sending(ledger, INSERT, "SELECT 1/0", swallows=True)
    async with ledger.served() as asker:
        code, details = await asker.status(SEND)
        assert code is grpc.StatusCode.UNKNOWN
        assert "a statement of the handler failed, and it went on regardless" in details
        assert ledger.rows() == []
    refusing = ledger.reborn()
    sending(refusing, INSERT, "SELECT 1/0", swallows=True, then=refuse)
    async with refusing.served() as asker:
        assert await asker.say(SEND) == "rejected card_declined"
    assert ledger.entries() == []
    assert ledger.rows() == [("execute", "rejected")]


@pytest.mark.parametrize(
    "statement", ["RELEASE amends_effect", "SAVEPOINT x; RELEASE amends_effect"]
)
async def test_our_savepoint_is_not_theirs(ledger: PostgresLedger, statement: str) -> None:
    """Without it a refusal could not be told from an effect: nothing of such a handler is kept."""
    sending(ledger, INSERT, statement)
    async with ledger.served() as asker:
        code, details = await asker.status(SEND)
        assert code is grpc.StatusCode.UNKNOWN
        assert "the savepoint amends_effect" in details
        assert await asker.say(call_message(EXECUTE, saga_id="next")) == "done"
    assert ledger.entries() == []
    assert ledger.rows() == []


async def test_transactions_of_their_own_nest(ledger: PostgresLedger) -> None:
    """With each driver's ``transaction()``: what fails in it is undone, and the rest is kept."""

    async def nest(call: Call, connection: Any) -> None:
        await connection.execute(INSERT)
        try:
            async with connection.transaction():
                await connection.execute(INSERT)
                await connection.execute("SELECT 1/0")
        except (asyncpg.DivisionByZeroError, psycopg.errors.DivisionByZero):
            pass

    def nest_in_thread(call: Call, connection: psycopg.Connection) -> None:
        connection.execute(INSERT)
        try:
            with connection.transaction():
                connection.execute(INSERT)
                connection.execute("SELECT 1/0")
        except psycopg.errors.DivisionByZero:
            pass

    handler: Any = nest_in_thread if ledger.kind == "psycopg in threads" else nest
    ledger.participant.execute("nest", compensatable=False)(handler)
    async with ledger.served() as asker:
        call = call_message(EXECUTE, action="nest")
        assert await asker.say(call) == "done"
    assert ledger.entries() == [("send", 5)]


async def test_the_database_cannot_weaken_the_transaction(postgres: Postgres) -> None:
    """Its defaults may be laxer or stricter: READ COMMITTED, synced, and no time-out for COMMIT."""
    postgres.execute("CREATE TABLE seen (name text, value text)")
    postgres.execute(
        "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO seen "
        "SELECT s, current_setting(s) FROM unnest(array['transaction_isolation', "
        "'synchronous_commit', 'statement_timeout']) s; RETURN NULL; END $$"
    )
    postgres.execute("ALTER DATABASE tests SET synchronous_commit = off")
    postgres.execute("ALTER DATABASE tests SET default_transaction_isolation = 'serializable'")
    ledger = PostgresLedger(postgres, "psycopg")
    async with ledger.served() as asker:
        postgres.execute(
            "CREATE CONSTRAINT TRIGGER see AFTER INSERT ON ledger DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION see()"
        )
        assert await asker.say(call_message(EXECUTE)) == "done"
    assert dict(postgres.execute("SELECT name, value FROM seen")) == {
        "transaction_isolation": "read committed",
        "synchronous_commit": "on",
        "statement_timeout": "0",
    }


async def test_a_refused_commit_keeps_nothing_and_quotes_nothing(ledger: PostgresLedger) -> None:
    """A deferred constraint strikes at COMMIT: an error, and the next attempt runs anew."""
    async with ledger.served() as asker:
        ledger.database.execute(
            "ALTER TABLE ledger ADD CONSTRAINT once UNIQUE (saga_id) DEFERRABLE INITIALLY DEFERRED"
        )
        ledger.database.execute("INSERT INTO ledger (saga_id) VALUES ('order-1')")
        code, details = await asker.status(call_message(EXECUTE))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "PostgreSQL refused COMMIT, which changed nothing: UniqueViolation" in details
        assert "order-1" not in details
        ledger.database.execute("DELETE FROM ledger")
        assert await asker.say(call_message(EXECUTE, attempt=2)) == "done"
    assert ledger.entries() == [("charge", 5)]


# --------------------------------------------------------------------- who is in whose way


async def test_who_waits_for_a_lock_for_long_is_asked_again(ledger: PostgresLedger) -> None:
    """Another transaction holds a row: nothing is kept, and asking again costs no retry."""
    ledger = PostgresLedger(ledger.database, ledger.kind, busy_timeout_s=0.05)
    sending(ledger, INSERT, "UPDATE ledger SET amount = 7 WHERE saga_id = 'account'")
    async with ledger.served() as asker:
        ledger.database.execute("INSERT INTO ledger (saga_id, amount) VALUES ('account', 1)")
        with psycopg.connect(ledger.database.dsn) as other:
            other.execute("SELECT FROM ledger WHERE saga_id = 'account' FOR UPDATE")
            assert await asker.say(SEND) == "in_progress"
            assert ledger.rows() == []
        assert await asker.say(SEND) == "done"
    assert ledger.entries() == [("send", 5)]


async def test_lives_go_on_side_by_side_and_one_life_does_not(postgres: Postgres) -> None:
    """While one waits another commits; of one life the second is told to ask again."""
    ledger = PostgresLedger(postgres, "asyncpg")
    gate = Gate()

    @ledger.participant.execute("wait", compensatable=False)
    async def wait(call: Call, connection: asyncpg.Connection[Any]) -> None:
        await connection.execute(INSERT)
        await gate.pass_in_loop()

    elsewhere = ledger.reborn()
    async with ledger.served() as asker, elsewhere.served() as other:
        waiting = asyncio.ensure_future(asker.say(call_message(EXECUTE, action="wait")))
        await gate.reached.wait()
        for one in (asker, other):
            assert await one.say(call_message(EXECUTE)) == "in_progress"
            assert await one.say(call_message(Verb.COMPENSATE)) == "in_progress"
        assert await asker.say(call_message(EXECUTE, saga_id="another")) == "done"
        assert await other.say(call_message(EXECUTE, saga_id="a third")) == "done"
        gate.open()
        assert await waiting == "done"
    assert ledger.entries() == [("send", 5)]


async def test_who_finds_no_connection_is_asked_again(postgres: Postgres) -> None:
    """All are lent for longer than a call waits: it has not run."""
    ledger = PostgresLedger(postgres, "asyncpg", max_connections=1, busy_timeout_s=0.05)
    gate = Gate()

    @ledger.participant.execute("wait", compensatable=False)
    async def wait(call: Call) -> None:
        await gate.pass_in_loop()

    async with ledger.served() as asker:
        waiting = asyncio.ensure_future(asker.say(call_message(EXECUTE, action="wait")))
        await gate.reached.wait()
        assert await asker.say(call_message(EXECUTE, saga_id="another")) == "in_progress"
        gate.open()
        assert await waiting == "done"
        assert await asker.say(call_message(EXECUTE, saga_id="another")) == "done"
    assert ledger.ran == ["execute"]


@pytest.mark.parametrize("kind", ["asyncpg", "psycopg"])
async def test_a_cancelled_call_is_rolled_back(postgres: Postgres, kind: Kind) -> None:
    """In the handler, with a statement under way; its connection serves the next call."""
    ledger = PostgresLedger(postgres, kind, max_connections=1)
    sending(ledger, INSERT, "SELECT pg_sleep(60)")
    handlers = ledger.participant.handlers()
    async with ledger.barrier as barrier:
        call = call_of(EXECUTE, action="send")
        running = asyncio.ensure_future(barrier.run(call, handlers["send", EXECUTE]))
        under_way = (
            "SELECT 1 FROM pg_stat_activity "
            "WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'"
        )
        while not postgres.execute(under_way):  # noqa: ASYNC110  # the server sets no event
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        outcome = await barrier.run(call_of(EXECUTE), handlers["charge", EXECUTE])
    assert isinstance(outcome, Done)
    assert ledger.entries() == [("charge", 5)]


async def test_a_call_cancelled_anywhere_has_its_effect_once_or_not_at_all(
    ledger: PostgresLedger,
) -> None:
    """After every number of steps of the event loop; no connection is lost for it."""
    ledger = PostgresLedger(ledger.database, ledger.kind, max_connections=2)
    handler = ledger.participant.handlers()["charge", EXECUTE]
    async with ledger.barrier as barrier:
        for steps in range(0, 60, 3):
            call = call_of(EXECUTE, saga_id=f"saga-{steps}")
            running = asyncio.ensure_future(barrier.run(call, handler))
            for _ in range(steps):
                await asyncio.sleep(0)
            running.cancel()
            await asyncio.wait([running])
        for steps in range(0, 60, 3):
            call = call_of(EXECUTE, saga_id=f"saga-{steps}")
            outcome = await barrier.run(call, handler)
            while isinstance(outcome, InProgress):  # as the runtime asks
                await asyncio.sleep(outcome.after_s)
                outcome = await barrier.run(call, handler)
            assert isinstance(outcome, Done)
            assert ledger.entries(f"saga-{steps}") == [("charge", 5)]


async def test_a_handler_that_takes_too_long_loses_its_transaction(postgres: Postgres) -> None:
    """One that awaits is cancelled, and one in a thread ends with an error of the server's."""
    kinds: list[Kind] = ["asyncpg", "psycopg in threads"]
    for kind in kinds:
        ledger = PostgresLedger(postgres, kind, max_hold_s=1.0)
        sending(ledger, INSERT, "SELECT pg_sleep(60)")
        async with ledger.served() as asker:
            code, details = await asker.status(SEND)
            assert code is grpc.StatusCode.UNKNOWN
            assert "held its transaction for more than 1 s" in details or "Canceled" in details
        assert ledger.entries() == []


async def test_a_write_of_ones_own(ledger: PostgresLedger) -> None:
    """`write` commits what returns and keeps nothing of what raises or ends its transaction."""

    def writer(*statements: str, error: type[Exception] | None = None) -> Any:
        async def write_async(connection: Any) -> str:
            for statement in statements:
                await connection.execute(statement)
            if error is not None:
                raise error
            return "written"

        def write(connection: psycopg.Connection) -> str:
            for statement in statements:
                connection.execute(statement)
            if error is not None:
                raise error
            return "written"

        return write if ledger.kind == "psycopg in threads" else write_async

    async with ledger.barrier as barrier:
        assert await barrier.write(writer(INSERT)) == "written"
        with pytest.raises(LookupError):
            await barrier.write(writer(INSERT, error=LookupError))
        with pytest.raises(TransactionMisused, match="ended its transaction"):
            await barrier.write(writer("ROLLBACK"))
        assert await barrier.write(writer(INSERT)) == "written"
    assert ledger.entries() == [("send", 5)] * 2


async def test_a_write_waits_for_a_connection_as_long_as_a_call(postgres: Postgres) -> None:
    """All are lent: nothing is written, and whoever asked knows it soon."""
    ledger = PostgresLedger(postgres, "asyncpg", max_connections=1, busy_timeout_s=0.05)
    gate = Gate()

    async def wait(connection: asyncpg.Connection[Any]) -> None:
        await gate.pass_in_loop()

    async def insert(connection: asyncpg.Connection[Any]) -> None:
        await connection.execute(INSERT)

    async with ledger.barrier as barrier:
        write: Any = barrier.write
        waiting = asyncio.ensure_future(write(wait))
        await gate.reached.wait()
        second = asyncio.ensure_future(write(insert))
        await asyncio.wait([second], timeout=5)  # or a failure would hang
        gate.open()
        await waiting
        with pytest.raises(BarrierError, match="in use"):
            await second
        await write(insert)
    assert ledger.entries() == [("send", 5)]


# ------------------------------------------------------------------------- what standbys have


@pytest.mark.parametrize("kind", KINDS)
async def test_what_no_standby_has_is_not_answered(kind: Kind) -> None:
    """A row that is seen may be lost in a failover: who answers from it waits for the standbys."""
    asked = {
        "replayed": (EXECUTE, EXECUTE, "done"),
        "fenced": (Verb.COMPENSATE, EXECUTE, "rejected fenced"),
    }
    async with server_of_ones_own() as database:
        ledger = PostgresLedger(database, kind)
        async with ledger.served() as asker:
            for saga_id, (first, then, answer) in asked.items():
                await set_standbys(database, "nobody")
                call = asyncio.ensure_future(asker.status(call_message(first, saga_id=saga_id)))
                await cut_off(database, call)
                assert call.result()[0] is grpc.StatusCode.UNAVAILABLE
                states = database.execute(
                    "SELECT 1 FROM amends_barrier WHERE saga_id = %s", saga_id
                )
                assert states
                again = asyncio.ensure_future(asker.say(call_message(then, saga_id=saga_id)))
                assert await waits_for_standbys(database, again), again.result()
                await set_standbys(database, "")
                assert await again == answer
                assert await asker.say(call_message(then, saga_id=saga_id)) == answer


# --------------------------------------------------------------------------------- opening


@pytest.mark.parametrize("driver", DRIVERS)
async def test_many_processes_may_open_an_empty_database_at_once(
    postgres: Postgres, driver: Driver
) -> None:
    """CREATE TABLE IF NOT EXISTS of two sessions would fail in one; here they take turns."""
    barriers = [
        PostgresBarrier(
            postgres.dsn, driver=driver, schema="CREATE TABLE IF NOT EXISTS mine (n int)"
        )
        for _ in range(6)
    ]
    await asyncio.gather(*(barrier.open() for barrier in barriers))
    await asyncio.gather(*(barrier.aclose() for barrier in barriers))
    assert postgres.execute("SELECT count(*) FROM mine") == [(0,)]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_opening_lets_others_by_while_it_waits_for_a_table(
    postgres: Postgres, driver: Driver
) -> None:
    """Who waits for a table for long holds up all that come after: so it asks again and again."""
    postgres.execute("CREATE TABLE mine (n int)")
    schema = "CREATE INDEX IF NOT EXISTS mine_by_n ON mine (n)"
    barrier = PostgresBarrier(postgres.dsn, driver=driver, schema=schema)
    with psycopg.connect(postgres.dsn) as at_work:
        at_work.execute("INSERT INTO mine VALUES (1)")
        opening = asyncio.ensure_future(barrier.open())
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        while not postgres.execute(waiting):  # noqa: ASYNC110  # the server sets no event
            await asyncio.sleep(0.001)
        # Bounded, so that a failure is one and does not hang.
        postgres.execute("SET lock_timeout = '10s'")
        try:
            await asyncio.to_thread(postgres.execute, "INSERT INTO mine VALUES (2)")
        finally:
            postgres.execute("RESET lock_timeout")
        assert not opening.done()
    await opening
    await barrier.aclose()
    assert postgres.execute("SELECT to_regclass('mine_by_n') IS NOT NULL") == [(True,)]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_opening_gives_up_on_a_table_that_is_never_free(
    postgres: Postgres, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that says so, instead of a process that never comes up; the next may open."""
    monkeypatch.setattr(postgres_rows, "OPENING_ATTEMPTS", 2)
    monkeypatch.setattr(postgres_rows, "OPENING_PAUSE_S", 0.0)
    postgres.execute("CREATE TABLE mine (n int)")
    schema = "CREATE INDEX IF NOT EXISTS mine_by_n ON mine (n)"
    barrier = PostgresBarrier(postgres.dsn, driver=driver, schema=schema)
    with psycopg.connect(postgres.dsn) as at_work:
        at_work.execute("INSERT INTO mine VALUES (1)")
        with pytest.raises(BarrierError, match="lock timeout"):
            await barrier.open()
    async with barrier:
        pass


@pytest.mark.parametrize("driver", DRIVERS)
async def test_the_tables_lie_where_the_search_path_says(
    postgres: Postgres, driver: Driver
) -> None:
    """And are found there, even if a handler leaves its session with another path."""
    postgres.execute("CREATE SCHEMA shop")
    postgres.execute("ALTER DATABASE tests SET search_path = shop")
    kind: Kind = driver
    ledger = PostgresLedger(postgres, kind, max_connections=1)
    sending(ledger, "SET search_path = public")
    async with ledger.served() as asker:
        assert await asker.say(SEND) == "done"
        assert await asker.say(SEND) == "done"
    assert postgres.execute("SELECT count(*) FROM shop.amends_barrier") == [(1,)]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_what_cannot_be_opened_is_one_line_without_a_password(
    postgres: Postgres, driver: Driver
) -> None:
    """Where and why; the DSN's password is nobody's business."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        wrong = {
            "away": re.sub(r":\d+/", f":{nobody.getsockname()[1]}/", postgres.dsn),
            "password": re.sub(r":[^:@]*@", ":wrong-secret@", postgres.dsn),
            "database": postgres.server.dsn_of("nowhere"),
        }
        for dsn in wrong.values():
            with pytest.raises(BarrierError, match="cannot be used as a barrier") as caught:
                await PostgresBarrier(dsn, driver=driver).open()
            said = str(caught.value)
            assert "PostgreSQL at 127.0.0.1:" in said
            assert "\n" not in said
            assert "secret" not in said
            assert dsn.split(":")[2].partition("@")[0] not in said


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    "dsn",
    [
        *(f"postgresql://bank:hunter{sign}2secret@127.0.0.1:1/db" for sign in "@:/#?%[&=, '"),
        "postgresql://bank:hunter@2secret/x@127.0.0.1:1/db",
        "postgresql://bank:hunter@127.0.0.1:1/db?password=2secret",
        "postgresql://127.0.0.1:1/db?password=2secret",
        "postgresql://127.0.0.1:1/db?sslrootcert=/hunter/2secret&sslmode=verify-full",
        "postgresql://127.0.0.1:1/db?hunter=2secret",
        "host=127.0.0.1 port=1 password=hunter 2secret",
        "hunter 2secret",
    ],
)
async def test_no_part_of_a_password_is_told(
    driver: Driver, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """However it is misspelled, neither we nor a driver's words or traceback show a piece of it."""
    caplog.set_level(logging.DEBUG)
    barrier = PostgresBarrier(dsn, driver=driver)
    with pytest.raises(BarrierError) as caught:
        await barrier.open()
    logging.getLogger("amends").error("it cannot be opened", exc_info=caught.value)
    traceback = "".join(format_exception(caught.value))
    for said in (repr(barrier), str(caught.value), traceback, *causes(caught.value), caplog.text):
        # As fragments, too: a driver may have cut it anywhere.
        assert "hunter" not in said
        assert "2secret" not in said


def causes(error: BaseException | None) -> list[str]:
    """Give all that lies behind an error, also where a traceback would not show it."""
    found: list[str] = []
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            found.append(f"{one!r} {one}")
            waiting += [one.__cause__, one.__context__]
    return found


@pytest.mark.parametrize("driver", DRIVERS)
async def test_the_servers_words_show_no_part_of_a_password(
    postgres: Postgres, driver: Driver
) -> None:
    """It quotes the database's name: a piece of a DSN that was read in another way."""
    port = postgres.server.port
    user = postgres.dsn.partition("//")[2].partition(":")[0]
    password = postgres.dsn.partition("@")[0].rpartition(":")[2]
    # Somebody whose name is a host's, and whose password begins with digits and a slash.
    dsn = f"postgresql://127.0.0.1:{port}/2secret@127.0.0.1:{port}/db?user={user}"
    barrier = PostgresBarrier(f"{dsn}&password={password}", driver=driver)
    with pytest.raises(BarrierError, match="does not exist") as caught:
        await barrier.open()
    for said in (str(caught.value), *causes(caught.value)):
        assert "2secret" not in said


@pytest.mark.parametrize(
    ("dsn", "named"),
    [
        ("postgresql://bank:pw@db.example:5432/books", "PostgreSQL at db.example:5432/books"),
        ("postgres://db-1,db-2:5433/books?sslmode=require", "PostgreSQL at db-1,db-2:5433/books"),
        ("postgresql://[::1]:5432/books", "PostgreSQL at [::1]:5432/books"),
        ("postgresql:///books", "PostgreSQL at its default/books"),
        ("postgresql://bank:1/2@db.example/books", "the PostgreSQL database of the DSN"),
        ("postgresql://bank:1#2@db.example/books", "the PostgreSQL database of the DSN"),
        ("dbname=books password=pw", "the PostgreSQL database of the DSN"),
    ],
)
def test_a_database_is_named_where_there_is_no_doubt(dsn: str, named: str) -> None:
    """For errors and logs: where it is, and nothing that could belong to a password."""
    assert name_of(dsn) == named


@pytest.mark.parametrize("driver", DRIVERS)
async def test_why_nobody_answers_is_told(driver: Driver) -> None:
    """In words of ours: a driver's may quote the DSN."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        barrier = PostgresBarrier(f"postgresql://bank:pw@127.0.0.1:{port}/books", driver=driver)
        with pytest.raises(BarrierError, match="Connection refused"):
            await barrier.open()


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    "dsn",
    [
        "postgres//bank:hunter2@127.0.0.1/books",
        "mysql://bank:hunter2@127.0.0.1/books",
        "postgresql://bank:hunter2@127.0.0.1:99999999/books",
        "postgresql://bank:hunter2@127.0.0.1:books/books",
        "postgresql://bank:hunter2@127.0.0.1:1/books?sslmode=perhaps",
    ],
)
async def test_who_cannot_be_read_is_told_what_to_write(driver: Driver, dsn: str) -> None:
    """Whatever is wrong with a DSN, and whatever the driver makes of it."""
    with pytest.raises(BarrierError) as caught:
        await PostgresBarrier(dsn, driver=driver).open()
    assert "Write postgresql://user:password@host:5432/database" in str(caught.value)
    assert not any("hunter" in said for said in causes(caught.value))


async def test_asyncpg_is_told_that_it_knows_no_other_form() -> None:
    """What psycopg would read."""
    with pytest.raises(BarrierError, match=r"cannot be read\. Write postgresql://"):
        await PostgresBarrier("host=127.0.0.1 password=hunter2 dbname=books").open()


@pytest.mark.parametrize("make", [PostgresBarrier, PreparedTransactions])
@pytest.mark.parametrize("dsn", ["", "  "])
def test_an_empty_dsn_is_refused(
    make: type[PostgresBarrier | PreparedTransactions], dsn: str
) -> None:
    """A variable that is not set would lead to whatever server is there by default."""
    with pytest.raises(ValueError, match="is the variable set"):
        make(dsn)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_server_without_tls_is_told(postgres: Postgres, driver: Driver) -> None:
    """In the same words with each driver."""
    barrier = PostgresBarrier(f"{postgres.dsn}?sslmode=require", driver=driver)
    with pytest.raises(BarrierError, match=r"the server refused TLS\. Switch it on there"):
        await barrier.open()


async def test_a_connection_function_s_own_errors_are_not_the_dsn_s() -> None:
    """There is none."""

    async def connect() -> None:
        raise ValueError("hunter2")

    with pytest.raises(BarrierError, match=r"ValueError$"):
        await PostgresBarrier(connect).open()


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_schema_that_fails_and_a_foreign_table_are_told(
    postgres: Postgres, driver: Driver
) -> None:
    """The author's SQL error comes with the database's name; nothing is half made."""
    with pytest.raises(BarrierError, match=r"a statement of your `schema`: .*syntax error"):
        await PostgresBarrier(postgres.dsn, driver=driver, schema="CREATE TABEL x (y)").open()
    assert postgres.execute("SELECT to_regclass('amends_barrier')") == [(None,)]
    postgres.execute("CREATE TABLE amends_barrier (something text)")
    with pytest.raises(BarrierError, match="made by another version"):
        await PostgresBarrier(postgres.dsn, driver=driver).open()


async def test_connections_of_the_authors_own(postgres: Postgres) -> None:
    """A function instead of a DSN; what it sets up is there in the handler."""

    async def by_asyncpg() -> Any:
        return await asyncpg.connect(postgres.dsn, server_settings={"application_name": "mine"})

    async def by_psycopg() -> Any:
        return await psycopg.AsyncConnection.connect(
            postgres.dsn, application_name="mine", row_factory=psycopg.rows.dict_row
        )

    def in_threads() -> Any:
        return psycopg.connect(
            postgres.dsn, application_name="mine", row_factory=psycopg.rows.dict_row
        )

    for kind, connect in zip(KINDS, (by_asyncpg, by_psycopg, in_threads), strict=True):
        ledger = PostgresLedger(postgres, kind)
        ledger.barrier = PostgresBarrier(
            connect, driver="asyncpg" if kind == "asyncpg" else "psycopg", schema=""
        )
        ledger.participant.barrier = ledger.barrier
        postgres.execute("CREATE TABLE IF NOT EXISTS ledger (saga_id text)")
        sending(ledger, "INSERT INTO ledger VALUES (current_setting('application_name'))")
        async with ledger.served() as asker:
            call = call_message(EXECUTE, action="send", saga_id=kind)
            assert await asker.say(call) == "done"
            assert await asker.say(call) == "done"
    assert postgres.execute("SELECT saga_id FROM ledger") == [("mine",)] * 3


def test_a_def_handler_cannot_have_asyncpgs_connection() -> None:
    """It could not await: told before anything is served, with file and line."""
    participant = Participant("payments", barrier=PostgresBarrier("postgresql://127.0.0.1/x"))

    @participant.execute("charge", compensatable=False)
    def charge(call: Call, connection: asyncpg.Connection[Any]) -> None: ...

    with pytest.raises(InvalidParticipant) as caught:
        participant.handlers()
    [problem] = caught.value.problems
    line = inspect.getsourcelines(charge)[1]
    assert f"{__file__}:{line}: execute 'charge' is def and takes a transaction" in problem
    assert "async def" in problem


@pytest.mark.parametrize(("driver", "extra"), [("asyncpg", "postgres"), ("psycopg", "psycopg")])
def test_a_driver_that_is_missing_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, driver: Driver, extra: str
) -> None:
    """Instead of an ImportError from deep inside."""
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(BarrierError, match=re.escape(f"pip install 'amends[{extra}]'")):
        PostgresBarrier("postgresql://127.0.0.1/x", driver=driver)


def test_a_barrier_that_makes_no_sense_is_refused() -> None:
    """At once, and not with the first call."""
    with pytest.raises(ValueError, match="there are 'asyncpg' and 'psycopg'"):
        PostgresBarrier("postgresql://127.0.0.1/x", driver="pg8000")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a call needs one"):
        PostgresBarrier("postgresql://127.0.0.1/x", max_connections=0)


def test_the_sdk_is_imported_without_a_driver() -> None:
    """Whoever does not use PostgreSQL needs none."""
    code = "import sys, amends; print([m for m in ('asyncpg', 'psycopg') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "[]"
