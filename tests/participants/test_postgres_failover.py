"""Servers whose place another has taken, or is to take: what they say, and who is asked then."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from amends import Broken, Call, PostgresBarrier, Verb
from amends.barrier.postgres import Driver
from amends.v1 import types_pb2
from shop.postgres import PostgresServer
from tests.participants.asking import call_message
from tests.participants.postgres_ledger import KINDS, Kind, PostgresLedger
from tests.participants.standbys import server_of_ones_own, set_standbys, who_waits
from tests.postgres import Postgres


def dsn_of_both(first_port: int, server: PostgresServer) -> str:
    """Name two hosts, of which that is wanted which takes writes."""
    one = f"127.0.0.1:{server.port}"
    both = server.dsn.replace(one, f"127.0.0.1:{first_port},{one}")
    return f"{both}?target_session_attrs=read-write"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_that_is_cut_off_does_not_say_that_nothing_is_there(kind: Kind) -> None:
    """Its standby may have taken over, and what was written since is there: it waits for that."""
    async with server_of_ones_own() as database:
        ledger = PostgresLedger(database, kind)

        @ledger.execute("look", compensatable=False)
        def look(call: Call, write: Callable[[str], None]) -> Broken:
            return Broken("odd")

        commit = call_message(Verb.EXECUTE, saga_id="commit")
        roll_back = call_message(Verb.COMPENSATE, saga_id="roll-back", executed=True)
        for call in (commit, roll_back):
            call.mode = types_pb2.MODE_TWO_PHASE_COMMIT
        asked = {
            "broken vote_lost": [commit, roll_back],
            "broken barrier_lost": [call_message(Verb.COMPENSATE, saga_id="undo", executed=True)],
            "broken odd": [call_message(Verb.EXECUTE, saga_id="look", action="look")],
        }
        async with ledger.served() as asker:
            await set_standbys(database, "nobody")
            answers = {
                asyncio.ensure_future(asker.say(call)): answer
                for answer, calls in asked.items()
                for call in calls
            }
            while len(who_waits(database)) < len(answers):
                assert not [waiting.result() for waiting in answers if waiting.done()]
                await asyncio.sleep(0.01)
            await set_standbys(database, "")
            for waiting, answer in answers.items():
                assert await waiting == answer


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_server_that_was_fenced_off_is_left(driver: Driver) -> None:
    """It lives on and takes no writes: a call that failed there is not made there once more."""

    async def insert(connection: Any) -> bool:
        await connection.execute("INSERT INTO notes VALUES (1)")
        return True

    note: Any = insert  # of its two types of `work` mypy takes the other

    with PostgresServer() as old, PostgresServer.standby_of(old) as new:
        new.start()
        barrier = PostgresBarrier(
            dsn_of_both(old.port, new),
            driver=driver,
            schema="CREATE TABLE IF NOT EXISTS notes (n INT)",
        )
        async with barrier:
            assert await barrier.write(note)
            with psycopg.connect(old.dsn, autocommit=True) as connection:
                lag = "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn >= %s"
                [(at,)] = connection.execute("SELECT pg_current_wal_lsn()").fetchall()
                while connection.execute(lag, (at,)).fetchall() != [(1,)]:  # noqa: ASYNC110  # of a server
                    await asyncio.sleep(0.01)
                connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
                connection.execute("SELECT pg_reload_conf()")
                show = "SHOW default_transaction_read_only"
                while connection.execute(show).fetchall() != [("on",)]:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            new.promote()
            try:
                assert await barrier.write(note)
            except Exception:  # noqa: BLE001  # whatever the driver says of a read-only transaction
                assert await barrier.write(note)
        with psycopg.connect(new.dsn) as connection:
            assert connection.execute("SELECT count(*) FROM notes").fetchall() == [(2,)]


async def test_a_silent_host_does_not_take_the_time_of_the_next(postgres: Postgres) -> None:
    """It accepts and says nothing, as a frozen machine does; who answered is asked first then."""
    both_are_here = asyncio.Barrier(2)

    async def meet(_: Any) -> bool:
        await both_are_here.wait()
        return True

    meeting: Any = meet
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        barrier = PostgresBarrier(dsn_of_both(silent.getsockname()[1], postgres.server))
        async with barrier:
            asked, _ = silent.accept()
            asked.close()
            # The second needs another connection.
            await asyncio.gather(barrier.write(meeting), barrier.write(meeting))
            with pytest.raises(BlockingIOError):
                silent.accept()
