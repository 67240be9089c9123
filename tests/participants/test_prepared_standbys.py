"""Votes of a server that has standbys: nothing is answered that a failover could take back."""

import asyncio
from typing import TypeAlias

import pytest

from amends import BarrierError, Decision, Verb
from amends.errors import CommitUnknown
from shop.postgres import PostgresServer
from tests.participants.branch import KINDS, Branch, Kind, said
from tests.participants.standbys import (
    cut_off,
    server_of_ones_own,
    set_standbys,
    waits_for_standbys,
    who_waits,
)
from tests.postgres import opened_database

P, E, C = Verb.PREPARE, Verb.EXECUTE, Verb.COMPENSATE


@pytest.mark.parametrize("kind", KINDS)
async def test_a_roll_back_that_no_standby_has_is_not_acknowledged(kind: Kind) -> None:
    """The roll back and the row of the abort were both cut off: a failover brings the vote back."""
    async with server_of_ones_own() as database:
        branch = Branch(database, kind)
        async with branch.barrier:
            assert said(await branch.ask(P)) == "Done"
            await set_standbys(database, "nobody")
            for _ in ("ROLLBACK PREPARED", "the COMMIT of the row"):
                call = asyncio.ensure_future(branch.ask(C, executed=True))
                assert isinstance(await cut_off(database, call), BarrierError)
            assert (branch.listed, branch.rows) == ([], [("transfer-1", "aborted")])
            again = asyncio.ensure_future(branch.ask(C, executed=True))
            assert await waits_for_standbys(database, again), again.result()
            await set_standbys(database, "")
            assert said(await again) == "Done"


TOO_MUCH, ENOUGH = 500, 5

Asked: TypeAlias = tuple[Verb, int]

FOUND: dict[str, tuple[Asked, Asked, str]] = {
    "no": ((P, TOO_MUCH), (P, TOO_MUCH), "Rejected insufficient"),
    "no to another": ((P, TOO_MUCH), (P, ENOUGH), "Broken request_changed"),
    "no, commit": ((P, TOO_MUCH), (E, TOO_MUCH), "Broken vote_lost"),
    "no, roll back": ((P, TOO_MUCH), (C, TOO_MUCH), "Done"),
    "aborted, vote": ((C, ENOUGH), (P, ENOUGH), "Rejected fenced"),
    "aborted, commit": ((C, ENOUGH), (E, ENOUGH), "Rejected fenced"),
    "lost, vote": ((E, ENOUGH), (P, ENOUGH), "Rejected fenced"),
    "lost, commit": ((E, ENOUGH), (E, ENOUGH), "Broken vote_lost"),
    "lost, roll back": ((E, ENOUGH), (C, ENOUGH), "Done"),
}
"""What is written and cut off, what is asked then, and what is answered when it is safe."""


async def test_a_row_that_is_found_is_as_safe_as_one_that_is_given() -> None:
    """Whatever it says, nobody is answered from it before the standbys have it."""
    async with server_of_ones_own() as database:
        branch = Branch(database)
        async with branch.barrier:
            await set_standbys(database, "nobody")
            calls = {}
            for case, ((verb, amount), (then, other), _) in FOUND.items():
                first = asyncio.ensure_future(branch.ask(verb, saga_id=case, amount=amount))
                assert isinstance(await cut_off(database, first), CommitUnknown), case
                assert case in dict(branch.rows)
                call = asyncio.ensure_future(branch.ask(then, saga_id=case, amount=other))
                assert await waits_for_standbys(database, call), (case, call.result())
                assert isinstance(await cut_off(database, call), CommitUnknown), case
                calls[case] = then, other
            await set_standbys(database, "")
            for case, (verb, amount) in calls.items():
                answer = await branch.ask(verb, saga_id=case, amount=amount)
                assert said(answer) == FOUND[case][-1], case


async def test_what_is_settled_is_so_on_the_standbys_too() -> None:
    """The roll back of the runtime was cut off; the resolver finds it gone, and waits."""
    async with server_of_ones_own() as database:
        branch = Branch(database)
        async with branch.barrier:
            assert said(await branch.ask(P)) == "Done"
            [vote] = await branch.barrier.in_doubt()
            await set_standbys(database, "nobody")
            call = asyncio.ensure_future(branch.ask(C, executed=True))
            assert isinstance(await cut_off(database, call), CommitUnknown)
            settling = asyncio.ensure_future(branch.barrier.resolve(vote, Decision.ABORT))
            assert await waits_for_standbys(database, settling), settling.result()
            await set_standbys(database, "")
            assert await settling


@pytest.mark.parametrize("kind", ["asyncpg", "psycopg"])  # a thread is cancelled by nobody
def test_the_end_of_the_event_loop_ends_no_wait_for_standbys(kind: Kind) -> None:
    """All tasks are cancelled then, and nobody asks the server to go on without its standbys."""

    async def leave_two_calls_alone(branch: Branch) -> None:
        await branch.barrier.open()
        assert said(await branch.ask(P)) == "Done"
        await set_standbys(branch.postgres, "nobody")
        calls = [
            asyncio.ensure_future(branch.ask(E)),
            asyncio.ensure_future(branch.ask(P, saga_id="ben-1")),
        ]
        while len(who_waits(branch.postgres)) < len(calls):  # noqa: ASYNC110  # of a server
            await asyncio.sleep(0.01)

    with PostgresServer() as server, opened_database(server) as database:
        database.execute("SET synchronous_commit = local")
        branch = Branch(database, kind)
        asyncio.run(leave_two_calls_alone(branch))
        assert len(who_waits(database)) == 2, "who was told to stop has gone on"
        assert branch.cents == 100
