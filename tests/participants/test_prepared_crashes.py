"""Real processes killed with SIGKILL: a vote is there or not, never half, and is always told."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest

import amends
from amends import Decision, PreparedTransactions, Verb
from amends.v1 import participant_pb2 as pb
from shop.postgres import PostgresServer
from tests.participants.asking import Asker, asking
from tests.participants.branch import Branch, message
from tests.participants.processes import Program, program
from tests.postgres import Postgres, opened_database

P, E, C = Verb.PREPARE, Verb.EXECUTE, Verb.COMPENSATE


@pytest.fixture
def bank(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Postgres:
    """Give a database with one account of 100 cents, for the programs."""
    postgres.execute("CREATE TABLE accounts (account text, cents bigint)")
    postgres.execute("INSERT INTO accounts VALUES ('ann', 100)")
    monkeypatch.setenv("BANK", postgres.dsn)
    return postgres


@asynccontextmanager
async def branch(where: str) -> AsyncIterator[tuple[Program, Asker]]:
    """Run a branch that stops somewhere, and connect to it."""
    async with (
        program("branch.py", "asyncpg", where) as running,
        asking(await running.line()) as asker,
    ):
        yield running, asker


async def kill_in(where: str, call: pb.Call) -> None:
    """Ask, kill the branch where it stops, and see that the caller knows nothing."""
    async with branch(where) as (running, asker):
        asked = asyncio.ensure_future(asker.status(call))
        assert await running.line() == "here"
        await running.kill()
        code, _ = await asked
        assert code is grpc.StatusCode.UNAVAILABLE


async def say(asker: Asker, call: pb.Call) -> str:
    """Ask until it is decided: PostgreSQL may take a moment to see that a client is gone."""
    while (said := await asker.say(call)) == "in_progress":
        pass
    return said


def cents(bank: Postgres) -> int:
    """Give what is committed."""
    [(amount,)] = bank.execute("SELECT cents FROM accounts")
    return int(amount)


def listed(bank: Postgres) -> int:
    """Count what is prepared."""
    [(count,)] = bank.execute(
        "SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()"
    )
    return int(count)


@pytest.mark.parametrize(("decision", "left"), [(E, 95), (C, 100)], ids=["commit", "abort"])
async def test_killed_after_the_vote_and_before_the_reply(
    bank: Postgres, decision: Verb, left: int
) -> None:
    """The vote stands without its process; another one says so again, and ends it either way."""
    await kill_in("prepared", message(P))
    assert (listed(bank), cents(bank)) == (1, 100)
    async with branch("nowhere") as (_, asker):
        assert await say(asker, message(P, attempt=2)) == "done"
        assert await say(asker, message(decision, executed=True)) == "done"
    assert (listed(bank), cents(bank)) == (0, left)


async def test_killed_before_the_vote(bank: Postgres) -> None:
    """Nothing stays, and the next attempt votes anew."""
    await kill_in("working", message(P))
    assert listed(bank) == 0
    async with branch("nowhere") as (_, asker):
        assert await say(asker, message(P, attempt=2)) == "done"
        assert await say(asker, message(E)) == "done"
    assert (listed(bank), cents(bank)) == (0, 95)


async def test_killed_between_the_two_transactions_of_an_abort(bank: Postgres) -> None:
    """Rolled back and not fenced: the repeat fences, whatever a late vote did meanwhile."""
    async with branch("nowhere") as (_, asker):
        assert await say(asker, message(P)) == "done"
    await kill_in("between", message(C, executed=True))
    assert listed(bank) == 0
    async with branch("nowhere") as (_, asker):
        assert await say(asker, message(P, attempt=2)) == "done"  # it comes before the fence
        assert await say(asker, message(C, executed=True, attempt=2)) == "done"
        assert await say(asker, message(P, attempt=3)) == "rejected fenced"
    assert (listed(bank), cents(bank)) == (0, 100)


@pytest.mark.parametrize(("decision", "left"), [(E, 95), (C, 100)], ids=["commit", "abort"])
async def test_killed_after_the_decision_and_before_the_reply(
    bank: Postgres, decision: Verb, left: int
) -> None:
    """It is done, and the repeat says so."""
    async with branch("nowhere") as (_, asker):
        assert await say(asker, message(P)) == "done"
    await kill_in("finished", message(decision))
    assert (listed(bank), cents(bank)) == (0, left)
    async with branch("nowhere") as (_, asker):
        assert await say(asker, message(decision, attempt=2)) == "done"
    assert cents(bank) == left


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """Give a server that may be killed."""
    with PostgresServer(settings={"max_prepared_transactions": "1"}) as server:
        yield server


@pytest.mark.parametrize("verb", [E, C], ids=["commit", "abort"])
async def test_postgresql_killed_while_a_vote_is_prepared(
    own_server: PostgresServer, verb: Verb
) -> None:
    """The vote and its locks are there again with the server: told, held, and ended as decided."""
    with opened_database(own_server) as database:
        branch = Branch(database)
        async with branch.barrier:
            assert (await branch.ask(P)).__class__.__name__ == "Done"
            own_server.kill()
            await asyncio.to_thread(own_server.start)
            database.reconnect()
            assert len(branch.listed) == 1
            outcomes = [await asked(branch, P, attempt=2), await asked(branch, E, step="other")]
            assert outcomes == ["Done", "Broken"]
            assert await asked(branch, P, saga_id="transfer-2") == "Rejected"
            assert await asked(branch, verb) == "Done"
        assert (branch.listed, branch.cents) == ([], 95 if verb is E else 100)


async def test_a_full_list_is_a_lock(own_server: PostgresServer) -> None:
    """The server has one place: the second vote is LOCKED, and in a new round it finds room."""
    with opened_database(own_server) as database:
        branch = Branch(database)
        async with branch.barrier:
            assert await asked(branch, P) == "Done"
            outcome = await branch.ask(P, saga_id="ben")
            assert outcome.reason == "LOCKED"  # type: ignore[union-attr]
            assert "max_prepared_transactions" in outcome.message  # type: ignore[union-attr]
            (one,) = await branch.barrier.in_doubt(0)
            assert await branch.barrier.resolve(one, Decision.ABORT)
            assert await asked(branch, P, saga_id="ben", round=2) == "Done"
            assert await asked(branch, C, saga_id="ben", round=2) == "Done"


async def asked(branch: Branch, verb: Verb, **changes: object) -> str:
    """Ask the barrier until it knows: its connections have ended with the server."""
    while True:
        try:
            outcome = await branch.ask(verb, **changes)
        except amends.BarrierError:
            continue  # lost with the old server; the next one is new
        if not isinstance(outcome, amends.InProgress):
            return type(outcome).__name__


async def test_a_server_that_takes_none_is_refused() -> None:
    """At the start, with the setting, a value, and that a reload is not enough."""
    with PostgresServer(settings={"max_prepared_transactions": "0"}) as server:
        barrier = PreparedTransactions(server.dsn)
        with pytest.raises(amends.BarrierError) as caught:
            await barrier.open()
    for words in ("max_prepared_transactions = 100", "restart the server", "127.0.0.1"):
        assert words in str(caught.value)
    assert "amends:" not in str(caught.value)  # neither user nor password
