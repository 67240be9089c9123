"""PostgreSQL fails over to a real standby while transfers are under way.

What was answered is on the standby, where commits wait for it: all or none of each transfer. Where
they do not, a vote can be lost with the server that has it, and that shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import amends
from amends import RecordKind, SagaState
from shop.postgres import PostgresServer
from tests.acceptance.branches import Branches, open_branches
from tests.acceptance.world import PATIENCE_S, until

WAITS = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


@contextmanager
def two_servers(waits_for: str) -> Iterator[tuple[PostgresServer, PostgresServer]]:
    """A server and its standby; `waits_for` names the standbys that its commits wait for."""
    with (
        PostgresServer(settings={"synchronous_standby_names": waits_for}) as primary,
        PostgresServer.standby_of(primary) as standby,
    ):
        yield primary, standby


async def fail_over(bank: Branches, standby: PostgresServer) -> None:
    """The server dies, and its standby takes over."""
    await asyncio.to_thread(bank.postgres.kill)
    await asyncio.to_thread(standby.start)  # unless it runs
    await asyncio.to_thread(standby.promote)
    bank.postgres = standby


async def test_a_failover_to_a_synchronous_standby_loses_nothing(tmp_path: Path) -> None:
    """Transfers at every stage: what is prepared is still, what was acknowledged stays."""
    with two_servers("*") as (primary, standby):
        async with open_branches(tmp_path, postgres=primary, standby=standby) as bank:
            halts = {
                "voted": "debit prepare after",
                "decided": "debit execute before",
                "told": "debit execute after",
                "committing": "debit execute before",
            }
            sagas = {}
            for number, (name, halt) in enumerate(halts.items(), 1):
                account = f"acc-{number}"
                at = {halt: ["hold"] * (1 if name != "committing" else 2)}
                sagas[name] = await bank.start(payer=account, payee=account, at=at)
            refused = sagas["refused"] = await bank.start(
                payer="acc-9",
                payee="nobody",
                at={"credit prepare before": ["hold"], "debit compensate before": ["hold"]},
            )
            await bank.recorded(refused, RecordKind.STEP_PREPARED, "debit")
            bank.let_go(refused, "credit prepare before")
            halts["refused"] = "debit compensate before"
            for name, halt in halts.items():
                await bank.reached(sagas[name], halt)
            assert bank.prepared == 4, "all but the one that has been told"

            standby.kill()
            bank.let_go(sagas["committing"], halts["committing"])

            async def a_commit_waits() -> bool:
                return bank.in_east(WAITS) == [(1,)]

            await until(a_commit_waits, "a COMMIT PREPARED to wait for the standby")
            await fail_over(bank, standby)
            assert bank.prepared == 4, "nobody was told of the commit, so it is not there"
            for name, halt in halts.items():
                bank.let_go(sagas[name], halt, times=1 if name != "committing" else 2)

            for name, saga in sagas.items():
                ended = await saga.result(timeout_s=PATIENCE_S)
                is_done = name != "refused"
                assert ended.state is (SagaState.COMPLETED if is_done else SagaState.COMPENSATED)
                assert bank.moved(saga) == (([-5], [5]) if is_done else ([], [])), name
            bank.settled()


async def test_a_failover_to_a_standby_that_nothing_waits_for_may_lose_a_vote(
    tmp_path: Path,
) -> None:
    """The decision stands, the other has committed: MIXED, with the step that broke its vote."""
    with two_servers("") as (primary, standby):
        async with open_branches(tmp_path, postgres=primary, standby=standby) as bank:
            standby.kill()
            saga = await bank.start(at={"debit execute before": ["hold"]})
            await bank.reached(saga, "debit execute before")
            assert bank.prepared == 1
            await fail_over(bank, standby)
            bank.let_go(saga, "debit execute before")

            ended = await saga.result(timeout_s=PATIENCE_S)
            assert (ended.state, ended.decision) == (SagaState.MIXED, amends.Decision.COMMIT)
            broken = ended.step("debit")
            assert broken.state is amends.StepState.BROKEN
            assert broken.last_error is not None
            assert broken.last_error.reason == "vote_lost"
            assert bank.moved(saga) == ([], [5])
            assert (bank.prepared, bank.held) == (0, 0)
