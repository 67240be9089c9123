"""What a vote waits for, and who waits for a vote that somebody else is ending."""

import asyncio

import pytest

from amends import Decision, Verb
from tests.participants.branch import Branch, said
from tests.participants.standbys import server_of_ones_own, set_standbys, waits_for_standbys

P = Verb.PREPARE


@pytest.mark.parametrize(
    ("verb", "decision"), [(Verb.EXECUTE, Decision.COMMIT), (Verb.COMPENSATE, Decision.ABORT)]
)
async def test_what_somebody_is_ending_is_not_settled_yet(verb: Verb, decision: Decision) -> None:
    """It waits for its standbys: the resolver comes again, and the runtime is told to ask again."""
    async with server_of_ones_own() as database:
        branch = Branch(database)
        async with branch.barrier:
            assert said(await branch.ask(P)) == "Done"
            [vote] = await branch.barrier.in_doubt(0)
            await set_standbys(database, "nobody")
            ending = asyncio.ensure_future(branch.ask(verb, executed=True))
            try:
                assert await waits_for_standbys(database, ending), ending.result()
                async with asyncio.timeout(30):  # who takes it for gone waits for standbys, too
                    assert not await branch.barrier.resolve(vote, decision)
                assert said(await branch.ask(verb, executed=True)) == "InProgress"
            finally:
                await set_standbys(database, "")
            assert said(await ending) == "Done"
            assert await branch.barrier.resolve(vote, decision)


async def test_a_vote_waits_for_standbys_whatever_its_database_says() -> None:
    """Its defaults may be laxer: a yes that is told is not lost in a failover."""
    async with server_of_ones_own() as database:
        branch = Branch(database)
        database.execute("ALTER DATABASE tests SET synchronous_commit = off")
        async with branch.barrier:
            first = await branch.ask(P, saga_id="first", amount=500)  # on the same connection
            assert said(first) == "Rejected insufficient"
            database.execute("ALTER DATABASE tests RESET synchronous_commit")
            await set_standbys(database, "nobody")
            vote = asyncio.ensure_future(branch.ask(P))
            try:
                assert await waits_for_standbys(database, vote), vote.result()
            finally:
                await set_standbys(database, "")
            assert said(await vote) == "Done"
