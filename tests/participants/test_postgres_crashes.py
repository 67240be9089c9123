"""PostgreSQL and what may be cut, killed or restarted beside it: the effect is there once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest

from amends import BarrierError, Done, Verb
from amends.barrier.postgres_pool import Pool
from amends.v1 import participant_pb2 as pb
from shop.postgres import PostgresServer
from tests.participants.asking import Asker, asking, call_message, call_of, words
from tests.participants.cut_commits import Cut, CuttingProxy
from tests.participants.postgres_ledger import KINDS, Kind, PostgresLedger
from tests.participants.processes import Program, program
from tests.postgres import Postgres, opened_database

EXECUTE, COMPENSATE = Verb.EXECUTE, Verb.COMPENSATE

each_kind = pytest.mark.parametrize("kind", KINDS)


@asynccontextmanager
async def participant(
    database: Postgres, kind: Kind, where: str
) -> AsyncIterator[tuple[Program, Asker]]:
    """Run a participant that stops somewhere, and connect to it."""
    async with (
        program("payments_postgres.py", database.dsn, kind, where) as running,
        asking(await running.line()) as asker,
    ):
        yield running, asker


async def decided(asker: Asker, call: pb.Call) -> pb.Outcome:
    """Ask until nobody is in the way, as the runtime does."""
    while words(outcome := await asker.ask(call)) == "in_progress":  # noqa: ASYNC110  # by the rules
        await asyncio.sleep(outcome.in_progress.poll_after_ms / 1000)
    return outcome


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("asyncpg", "before-commit"),
        ("asyncpg", "before-reply"),
        ("psycopg", "before-reply"),
        ("psycopg in threads", "before-commit"),
    ],
)
async def test_a_participant_killed_and_asked_again_has_one_effect(
    postgres: Postgres, kind: Kind, where: str
) -> None:
    """Before the commit nothing stays and it runs again; after it the stored reply answers."""
    ledger = PostgresLedger(postgres, kind)
    async with ledger.served() as asker:
        async with participant(postgres, kind, where) as (running, there):
            asked = asyncio.ensure_future(there.status(call_message(EXECUTE)))
            assert await running.line() == "here"
            await running.kill()
            assert (await asked)[0] is grpc.StatusCode.UNAVAILABLE
        committed = where == "before-reply"
        assert ledger.entries() == ([("charge", 5)] if committed else [])
        first = await decided(asker, call_message(EXECUTE, attempt=2))
        assert first.done.result.data == b'{"charged":5}'
        assert await asker.ask(call_message(EXECUTE, attempt=3)) == first
    assert ledger.entries() == [("charge", 5)]
    assert ledger.ran == ([] if committed else ["execute"])


async def test_two_processes_on_one_life(postgres: Postgres) -> None:
    """While one works on it the other says in progress; other lives go on; its reply is theirs."""
    ledger = PostgresLedger(postgres, "asyncpg")
    async with (
        ledger.served() as ours,
        participant(postgres, "psycopg", "before-commit") as (there, theirs),
    ):
        asked = theirs.stub.Execute(pb.ExecuteRequest(call=call_message(EXECUTE)))
        assert await there.line() == "here"
        assert await ours.say(call_message(EXECUTE)) == "in_progress"
        assert await ours.say(call_message(COMPENSATE)) == "in_progress"
        assert await ours.say(call_message(EXECUTE, saga_id="another")) == "done"
        await there.say("go on")
        first = (await asked).outcome
        assert words(first) == "done"
        assert await ours.ask(call_message(EXECUTE, attempt=2)) == first
    assert ledger.entries() == [("charge", 5)]
    assert ledger.ran == ["execute"]


@each_kind
@pytest.mark.parametrize("cut", Cut, ids=lambda cut: cut.name.lower())
async def test_a_connection_cut_at_the_commit_is_unknown(
    postgres: Postgres, kind: Kind, cut: Cut
) -> None:
    """The caller hears an error, whether it was committed or not; the repeat finds out which."""
    async with CuttingProxy(postgres.server.port, cut) as proxy:
        ledger = PostgresLedger(postgres, kind, port=proxy.port)
        async with ledger.served() as asker:
            proxy.arm()
            code, details = await asker.status(call_message(EXECUTE))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "COMMIT in PostgreSQL was not answered" in details
            assert words(await decided(asker, call_message(EXECUTE, attempt=2))) == "done"
    assert ledger.entries() == [("charge", 5)]
    ran_once = cut is Cut.AFTER_COMMIT
    assert ledger.ran == ["execute"] if ran_once else ["execute", "execute"]


@pytest.fixture(scope="module")
def doomed_server() -> Iterator[PostgresServer]:
    """Give a server that tests may kill."""
    with PostgresServer() as server:
        yield server


async def test_a_server_killed_under_load_doubles_nothing(doomed_server: PostgresServer) -> None:
    """Its processes are killed twice while calls of every kind run: each has one effect."""
    sagas = 15
    answered = 0
    progress = asyncio.Condition()
    with opened_database(doomed_server) as database:
        ledgers = [PostgresLedger(database, kind) for kind in KINDS]

        async def ask_until_done(ledger: PostgresLedger, saga_id: str) -> None:
            nonlocal answered
            handler = ledger.participant.handlers()["charge", EXECUTE]
            attempt = 0
            outcome: object = None
            while not isinstance(outcome, Done):
                attempt += 1
                try:
                    outcome = await ledger.barrier.run(
                        call_of(EXECUTE, saga_id=saga_id, attempt=attempt), handler
                    )
                except Exception:  # noqa: BLE001  # unknown: asked again, as the runtime does
                    await asyncio.sleep(0.1)
            async with progress:
                answered += 1
                progress.notify_all()

        async def kill_at(count: int) -> None:
            async with progress:
                await progress.wait_for(lambda: answered >= count)
            await asyncio.to_thread(doomed_server.kill)
            await asyncio.to_thread(doomed_server.start)

        async def kill_twice() -> None:
            await kill_at(sagas // 2)
            await kill_at(sagas + sagas // 2)

        async with AsyncExitStack() as stack:
            for ledger in ledgers:
                await stack.enter_async_context(ledger.barrier)
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            tasks.create_task(kill_twice())
            for number in range(sagas):
                for ledger in ledgers:
                    tasks.create_task(ask_until_done(ledger, f"{ledger.kind}-{number}"))
        database.reconnect()
        rows = database.execute("SELECT saga_id, count(*) FROM ledger GROUP BY saga_id")
        assert sorted(rows) == sorted(
            (f"{kind}-{number}", 1) for kind in KINDS for number in range(sagas)
        )


async def test_a_server_that_comes_back_is_found_again(doomed_server: PostgresServer) -> None:
    """While it is away calls are unknown; one restart costs one error at most, not one each."""
    with opened_database(doomed_server) as database:
        ledgers = [PostgresLedger(database, kind) for kind in KINDS]
        async with AsyncExitStack() as stack:
            askers = [await stack.enter_async_context(ledger.served()) for ledger in ledgers]
            calls = [call_message(EXECUTE, saga_id=ledger.kind) for ledger in ledgers]
            for asker, call in zip(askers, calls, strict=True):
                assert await asker.say(call) == "done"
            doomed_server.kill()
            for asker, call in zip(askers, calls, strict=True):
                code, _ = await asker.status(call)
                assert code is grpc.StatusCode.UNAVAILABLE
            doomed_server.start()
            for asker, call in zip(askers, calls, strict=True):
                assert await asker.say(call) == "done"
        database.reconnect()
        for ledger in ledgers:
            assert ledger.entries(ledger.kind) == [("charge", 5)]


async def test_a_standby_is_refused(doomed_server: PostgresServer) -> None:
    """It takes no writes; the message says how to find the primary."""
    with opened_database(doomed_server) as database:
        doomed_server.stop()
        signal = doomed_server.data / "standby.signal"
        signal.touch()
        try:
            doomed_server.start()
            ledger = PostgresLedger(database, "asyncpg")
            with pytest.raises(BarrierError, match="is a standby") as caught:
                await ledger.barrier.open()
            assert "target_session_attrs=read-write" in str(caught.value)
        finally:
            doomed_server.stop()
            signal.unlink()
            doomed_server.start()
        database.reconnect()


async def test_no_connection_is_left_behind(postgres: Postgres) -> None:
    """A barrier that is closed has none, whatever has become of its calls."""
    for kind in KINDS:
        ledger = PostgresLedger(postgres, kind)
        async with ledger.served() as asker:
            await asyncio.gather(
                *(asker.say(call_message(EXECUTE, saga_id=str(n))) for n in range(8))
            )
            opened = ledger.barrier._open
            assert opened is not None
            assert isinstance(opened.pool, Pool)
            assert opened.pool.in_use == 0
    left = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    # A backend takes a moment to see that its client said farewell.
    while postgres.execute(left) != [(0,)]:  # noqa: ASYNC110  # the server sets no event
        await asyncio.sleep(0.01)
