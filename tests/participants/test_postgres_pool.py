"""The connections of one participant: no more than it was given, and none whose server is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from amends.barrier.postgres import Connecting, Driver
from amends.barrier.postgres_pool import Pool, PoolBusy
from tests.postgres import Postgres

DRIVERS: tuple[Driver, ...] = ("asyncpg", "psycopg")


@asynccontextmanager
async def pool_of(
    dsn: str, driver: Driver = "psycopg", *, max_connections: int = 2, kept: int = 0
) -> AsyncIterator[Pool]:
    """Make a pool, and close it."""
    connecting = Connecting(dsn, driver, max_connections)
    pool = Pool(connecting.sessions, max_connections=max_connections, name="it", kept=kept)
    try:
        yield pool
    finally:
        await pool.aclose()
        connecting.aclose()


async def test_there_are_never_more_connections_than_places(postgres: Postgres) -> None:
    """Two calls at once want another kind than the one that lies idle: it makes room in time."""
    async with pool_of(postgres.dsn) as pool:
        pool.give_back(await pool.take(is_async=False))
        sessions = await asyncio.gather(*(pool.take(is_async=True) for _ in range(2)))
        own = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'amends'"
        assert postgres.execute(own) == [(2,)]
        assert pool.in_use == 2
        for session in sessions:
            pool.give_back(session)
        assert pool.in_use == 0


async def test_a_connection_that_cannot_be_opened_takes_no_room() -> None:
    """Its place is free again, and nothing is counted."""
    async with pool_of("host=127.0.0.1 port=1", max_connections=1) as pool:
        for _ in range(2):
            with pytest.raises(Exception, match="cannot be reached"):
                await pool.take(timeout_s=0.01)
            assert pool.in_use == 0


async def test_kept_places_are_not_for_those_who_leave_them(postgres: Postgres) -> None:
    """Whoever leaves one to others waits while it is the last; others have it."""
    async with pool_of(postgres.dsn, kept=1) as pool:
        one = await pool.take(leaves_kept=True)
        for _ in range(2):
            with pytest.raises(PoolBusy):
                await pool.take(leaves_kept=True, timeout_s=0.01)
        other = await pool.take(timeout_s=0.01)
        pool.give_back(one)
        one = await pool.take(leaves_kept=True, timeout_s=0.01)
        pool.give_back(one)
        one = await pool.take(timeout_s=0.01)
        with pytest.raises(PoolBusy):
            await pool.take(leaves_kept=True, timeout_s=0.01)
        for session in (one, other):
            pool.give_back(session)


class Network:
    """Between a pool and its server: connections that were opened before `fail` go dumb."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._dumb: set[asyncio.StreamWriter] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    def fail(self) -> None:
        """Pass no more bytes on for those who are connected, and tell nobody."""
        self._dumb |= self._writers

    def end(self) -> None:
        """Tell those who are connected after all."""
        for writer in self._writers:
            writer.close()

    async def serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        """Relay one connection."""
        server, to_server = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers |= {to_client, to_server}
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pass_on(client, to_server))
            tasks.create_task(self._pass_on(server, to_client))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                if writer not in self._dumb:
                    writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()


@pytest.fixture
def probed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each connection asked before it is lent, and not for long."""
    monkeypatch.setattr("amends.barrier.postgres_pool.PROBE_AFTER_S", 0.0)
    monkeypatch.setattr("amends.barrier.postgres_pool.PROBE_TIMEOUT_S", 0.05)


@pytest.mark.usefixtures("probed_at_once")
@pytest.mark.parametrize(
    ("driver", "is_async"), [("asyncpg", True), ("psycopg", True), ("psycopg", False)]
)
async def test_connections_to_a_server_that_is_gone_are_dropped(
    postgres: Postgres, driver: Driver, *, is_async: bool
) -> None:
    """It went without a word: the first that is asked does not answer, and none of them is lent."""
    network = Network(postgres.server.port)
    server = await asyncio.start_server(network.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, pool_of(postgres.dsn_by(port), driver, max_connections=3) as pool:
        old = [await pool.take(is_async=is_async) for _ in range(2)]
        for session in old:
            pool.give_back(session)
        network.fail()
        new = await pool.take(is_async=is_async)
        assert new not in old
        assert await new.rows("SELECT 1") == [(1,)]
        pool.give_back(new)
        network.end()
