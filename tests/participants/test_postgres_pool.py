"""The connections of one participant: no more than it was given, and none whose server is gone."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from amends.barrier import postgres_pool
from amends.barrier.postgres import Connecting, Driver
from amends.barrier.postgres_pool import Pool, PoolBusy
from amends.barrier.postgres_port import ConnectionLost
from amends.barrier.postgres_sockets import OPTIONS
from amends.errors import BarrierError, CommitUnknown
from amends.outcomes import Done, Verb
from tests.participants.branch import KINDS, Branch, Kind
from tests.postgres import Postgres

kinds_of_session = pytest.mark.parametrize(
    ("driver", "is_async"), [("asyncpg", True), ("psycopg", True), ("psycopg", False)]
)


@asynccontextmanager
async def pool_of(
    database: str | Callable[[], Any],
    driver: Driver = "psycopg",
    *,
    max_connections: int = 2,
    kept: int = 0,
) -> AsyncIterator[Pool]:
    """Make a pool, and close it."""
    connecting = Connecting(database, driver, max_connections)
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


class Door:
    """A function that connects when it may: a thread waits in it, and cannot be stopped."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.has_come = threading.Event()
        self.is_open = threading.Event()
        self.opened: list[psycopg.Connection[Any]] = []
        self.count = 0

    def connect(self) -> psycopg.Connection[Any]:
        """Connect when the door is open."""
        self.has_come.set()
        self.is_open.wait()
        self.count += 1
        self.opened.append(psycopg.connect(self._dsn))
        return self.opened[-1]


async def left_while_it_connects(pool: Pool, door: Door, *, leaves_kept: bool = False) -> None:
    """Take a connection, and leave while a thread connects."""
    taking = asyncio.create_task(pool.take(is_async=False, leaves_kept=leaves_kept))
    await asyncio.to_thread(door.has_come.wait)
    taking.cancel()
    await asyncio.wait([taking])
    assert taking.cancelled()


@pytest.mark.parametrize("leaves_kept", [False, True])
async def test_who_leaves_while_a_thread_connects_keeps_the_place(
    postgres: Postgres, *, leaves_kept: bool
) -> None:
    """The thread has it, till it has ended; and what it has opened is the next one's."""
    door = Door(postgres.dsn)
    async with pool_of(door.connect, max_connections=2, kept=1) as pool:
        other = await pool_filled(pool, door) if not leaves_kept else None
        await left_while_it_connects(pool, door, leaves_kept=leaves_kept)
        with pytest.raises(PoolBusy):
            await pool.take(is_async=False, timeout_s=0.01, leaves_kept=leaves_kept)
        count = door.count
        door.is_open.set()
        session = await pool.take(is_async=False, leaves_kept=leaves_kept)
        assert door.count == count + 1
        assert await session.rows("SELECT 1") == [(1,)]
        for one in (session, other):
            if one is not None:
                pool.give_back(one)
        assert pool.in_use == 0


async def pool_filled(pool: Pool, door: Door) -> Any:
    """Take one of two places."""
    door.is_open.set()
    session = await pool.take(is_async=False)
    door.is_open.clear()
    door.has_come.clear()
    return session


async def test_a_place_is_free_when_nobody_waits_and_it_cannot_be_opened() -> None:
    """The thread ends with an error that nobody hears: nothing is counted."""
    door = Door("host=127.0.0.1 port=1")
    async with pool_of(door.connect, max_connections=1) as pool:
        await left_while_it_connects(pool, door)
        assert pool.in_use == 1
        door.is_open.set()
        with pytest.raises(BarrierError, match="cannot be reached"):
            await pool.take(is_async=False)
        assert (door.count, pool.in_use) == (2, 0)


async def test_closing_waits_for_no_thread_that_connects(postgres: Postgres) -> None:
    """It may hang for ever, in a function of the author's; what it opens is closed."""
    door = Door(postgres.dsn)
    try:
        async with pool_of(door.connect) as pool:
            await left_while_it_connects(pool, door)
    finally:
        door.is_open.set()
    for thread in threading.enumerate():
        if thread.name.startswith("amends postgres"):
            await asyncio.to_thread(thread.join)
    for _ in range(3):  # its end is told to the event loop, and then to whoever waits for it
        await asyncio.sleep(0)
    assert [connection.closed for connection in door.opened] == [True]


@kinds_of_session
async def test_the_system_ends_connections_in_silence(
    postgres: Postgres, driver: Driver, *, is_async: bool
) -> None:
    """It asks the other machine whether it is there, and does not wait for long."""
    async with pool_of(postgres.dsn, driver) as pool, pool.lent(is_async=is_async) as session:
        own = session.connection
        with socket.socket(fileno=_descriptor(own)) as connected:
            try:
                assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                for name, value in OPTIONS.items():
                    option = getattr(socket, name)
                    assert connected.getsockopt(socket.IPPROTO_TCP, option) == value
            finally:
                connected.detach()


async def test_what_a_dsn_says_of_its_network_stays(postgres: Postgres) -> None:
    """It is the author's."""
    dsn = f"{postgres.dsn}?tcp_user_timeout=4000"
    async with pool_of(dsn) as pool, pool.lent() as session:
        assert session.connection.info.get_parameters()["tcp_user_timeout"] == "4000"
        assert session.connection.info.get_parameters()["keepalives_idle"] == "5"


def _descriptor(connection: Any) -> int:
    if isinstance(connection, psycopg.Connection | psycopg.AsyncConnection):
        return connection.pgconn.socket
    return int(connection._transport.get_extra_info("socket").fileno())


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


@asynccontextmanager
async def network_before(postgres: Postgres) -> AsyncIterator[tuple[Network, str]]:
    """Put a network before a server, and say by which DSN it goes through it."""
    network = Network(postgres.server.port)
    server = await asyncio.start_server(network.serve, "127.0.0.1", 0)
    async with server:
        yield network, postgres.dsn_by(server.sockets[0].getsockname()[1])
        network.end()


@pytest.mark.usefixtures("probed_at_once")
@kinds_of_session
async def test_connections_to_a_server_that_is_gone_are_dropped(
    postgres: Postgres, driver: Driver, *, is_async: bool
) -> None:
    """It went without a word: the first that is asked does not answer, and none of them is lent."""
    async with (
        network_before(postgres) as (network, dsn),
        pool_of(dsn, driver, max_connections=3) as pool,
    ):
        old = [await pool.take(is_async=is_async) for _ in range(2)]
        for session in old:
            pool.give_back(session)
        network.fail()
        new = await pool.take(is_async=is_async)
        assert new not in old
        assert await new.rows("SELECT 1") == [(1,)]
        pool.give_back(new)
        assert pool.in_use == 0


@kinds_of_session
async def test_a_connection_whose_call_failed_is_asked_before_it_is_used_again(
    postgres: Postgres, driver: Driver, monkeypatch: pytest.MonkeyPatch, *, is_async: bool
) -> None:
    """Another server may have taken its server's place, which takes no writes any more."""
    monkeypatch.setattr(postgres_pool, "PROBE_AFTER_S", 3600.0)
    async with pool_of(postgres.dsn, driver) as pool:
        session = await pool.take(is_async=is_async)
        await session.run("SET default_transaction_read_only = on")
        pool.give_back(session)
        again = await pool.take(is_async=is_async)
        pool.give_back(again, has_failed=True)
        new = await pool.take(is_async=is_async)
        pool.give_back(new, has_failed=True)
        kept = await pool.take(is_async=is_async)
        pool.give_back(kept)
        assert again is session is not new is kept


@kinds_of_session
async def test_a_statement_without_an_answer_gives_its_connection_up(
    postgres: Postgres, driver: Driver, *, is_async: bool
) -> None:
    """Nobody waits for a server that is gone, and all that lay idle is gone with it."""
    async with network_before(postgres) as (network, dsn), pool_of(dsn, driver) as pool:
        idle, session = [await pool.take(is_async=is_async) for _ in range(2)]
        pool.give_back(idle)
        await session.begin()
        network.fail()
        with pytest.raises(ConnectionLost):
            await session.rows("SELECT 1", within_s=0.05)
        assert not session.is_usable
        pool.give_back(session)
        new = await pool.take(is_async=is_async)
        assert new not in {idle, session}
        assert await new.rows("SELECT 1") == [(1,)]
        pool.give_back(new)
        assert pool.in_use == 0


@kinds_of_session
async def test_a_commit_without_an_answer_is_unknown(
    postgres: Postgres, driver: Driver, monkeypatch: pytest.MonkeyPatch, *, is_async: bool
) -> None:
    """It may have happened all the same."""
    monkeypatch.setattr(f"amends.barrier.postgres_{driver}.COMMIT_TIMEOUT_S", 0.05)
    async with network_before(postgres) as (network, dsn), pool_of(dsn, driver) as pool:
        session = await pool.take(is_async=is_async)
        await session.begin()
        network.fail()
        with pytest.raises(CommitUnknown):
            await pool.uncancelled(session.commit(), session)
        assert pool.in_use == 0


@kinds_of_session
async def test_who_leaves_in_silence_keeps_nothing(
    postgres: Postgres, driver: Driver, monkeypatch: pytest.MonkeyPatch, *, is_async: bool
) -> None:
    """What he has left in the middle cannot be mended: after a while its place is free."""
    monkeypatch.setattr("amends.barrier.postgres_pool.MEND_TIMEOUT_S", 0.05)
    async with network_before(postgres) as (network, dsn), pool_of(dsn, driver) as pool:
        session = await pool.take(is_async=is_async)
        await session.begin()
        network.fail()
        asking = asyncio.create_task(session.rows("SELECT 1", within_s=0.05))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        pool.give_back(session, was_cut=True)
        both = [await pool.take(is_async=is_async) for _ in range(2)]
        for new in both:
            pool.give_back(new)
        assert pool.in_use == 0


@pytest.mark.usefixtures("probed_at_once")
@pytest.mark.parametrize("kind", KINDS)
async def test_phase_2_goes_on_after_a_failover_without_a_word(
    postgres: Postgres, kind: Kind
) -> None:
    """What a vote has prepared is committed by another connection than those that are gone."""
    async with network_before(postgres) as (network, dsn):
        branch = Branch(postgres, kind, dsn=dsn)
        async with branch.barrier:
            votes = [branch.ask(Verb.PREPARE, saga_id=name) for name in ("t-1", "ben-2")]
            assert await asyncio.gather(*votes) == [Done(), Done()]
            network.fail()
            for name in ("t-1", "ben-2"):
                assert await branch.ask(Verb.EXECUTE, saga_id=name) == Done()
        assert branch.rows == [("ben-2", "yes"), ("t-1", "yes")]
