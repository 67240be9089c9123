"""A server whose commits wait for a standby that is not there, as after a network was cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg

from shop.postgres import PostgresServer
from tests.postgres import Postgres, opened_database

WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


def who_waits(database: Postgres) -> list[int]:
    """Give the server's processes that wait for standbys."""
    return [pid for (pid,) in database.execute(WAITING)]


@asynccontextmanager
async def server_of_ones_own() -> AsyncIterator[Postgres]:
    """Give a database whose server can be set up otherwise; what the test writes is local."""
    with PostgresServer() as server, opened_database(server) as database:
        database.execute("SET synchronous_commit = local")
        yield database


async def set_standbys(database: Postgres, names: str) -> None:
    """Say which standbys a commit waits for, and see to it that commits do."""
    set_names = f"ALTER SYSTEM SET synchronous_standby_names = '{names}'"
    database.connection.execute(set_names.encode())
    database.execute("SELECT pg_reload_conf()")
    show = "SHOW synchronous_standby_names"
    while database.execute(show) != [(names,)]:  # noqa: ASYNC110  # the server sets no event
        await asyncio.sleep(0.01)
    # That was one process of the server's; commits ask what another one has made of it.
    while names and not await _a_commit_waits(database):
        pass


async def waits_for_standbys(database: Postgres, call: asyncio.Future[Any]) -> bool:
    """Wait until a COMMIT waits for its standbys; False if the call is over before."""
    while not call.done():
        if who_waits(database):
            return True
        await asyncio.sleep(0.01)
    return False


async def cut_off(database: Postgres, call: asyncio.Future[Any]) -> BaseException | None:
    """End what waits for standbys, as a restart of the server does; give how the call ends then.

    What has been committed is seen by everybody, and is on no standby.
    """
    assert await waits_for_standbys(database, call), call
    database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    )
    await asyncio.wait([call])
    return call.exception()


async def _a_commit_waits(database: Postgres) -> bool:
    async with await psycopg.AsyncConnection.connect(database.dsn, autocommit=True) as connection:
        message = connection.execute("SELECT pg_logical_emit_message(true, 'test', '')")
        commit = asyncio.ensure_future(message)
        waits = await waits_for_standbys(database, commit)
        if waits:
            database.execute(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            )
        await commit
        return waits
