"""Who waits for whom in a two-phase commit, and who may say what: with real processes.

Two transfers that hold what the other needs; a branch whose breaker is open; and runtimes on an
empty or a restored store, which are asked by branches that are in doubt.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

import amends
from amends import BreakerState, RecordKind, SagaState
from shop.processes import Process
from tests.acceptance.branches import Branches, open_branches, transfer_of
from tests.acceptance.world import until

UNDECIDED: Final = {"credit prepare after": ["hold"]}
"""Both have voted yes, and the runtime has heard one of them."""

SHY: Final = """
[breaker]
failures_to_open = 1
open_s = 0.3
max_open_s = 0.3
"""


@pytest.fixture(scope="module")
async def asking(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Branches]:
    """Branches that ask the runtime about what they are in doubt of."""
    folder = tmp_path_factory.mktemp("asking")
    async with open_branches(folder, settings=SHY, asking=True) as branches:
        yield branches


# -- locks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [False, True], ids=["fail-fast", "ordered"])
async def test_two_transfers_in_opposite_order_get_out_of_each_others_way(
    asking: Branches, *, ordered: bool
) -> None:
    """Each has locked the account that the other needs: LOCKED, who hears it lets go, tries again.

    One of them at least. The other may find that it has been let by already.
    """
    name = "inside-ordered" if ordered else "inside"
    within = transfer_of(name, "east", "east", ordered=ordered, locked_retries=50)
    await asking.client.register(within)
    at = {"credit prepare before": ["hold"]}
    there = await asking.start(name, payer="acc-1", payee="acc-2", at=at)
    back = await asking.start(name, payer="acc-2", payee="acc-1", at=at)
    for saga in (there, back):
        await asking.reached(saga, "credit prepare before")
        await asking.recorded(saga, RecordKind.STEP_PREPARED, "debit")
    assert asking.prepared == 2

    for saga in (there, back):
        asking.let_go(saga, "credit prepare before")

    rounds = []
    for saga in (there, back):
        ended = await saga.result()
        assert ended.state is SagaState.COMPLETED
        assert sorted(map(str, asking.moved(saga)[0])) == ["-5", "5"]
        refused = await asking.records(saga, RecordKind.STEP_REJECTED)
        why = [one.failure.reason for one in refused if one.failure is not None]
        assert set(why) <= {"LOCKED"}
        assert (ended.round > 1) == bool(why)
        rounds.append(ended.round)
    assert max(rounds) > 1
    asking.settled()


async def test_a_vote_is_not_asked_of_a_branch_whose_breaker_is_open(asking: Branches) -> None:
    """The other has voted and is let go at once: it does not hold anything for who is away."""
    asking.west.kill()
    sagas = [await asking.start()]
    await _breaker_is(asking, BreakerState.OPEN)

    async def is_refused_unasked() -> bool:
        sagas.append(await asking.start())
        turned = await _turn(asking, sagas[-1])
        assert (turned.cause, turned.step) == (amends.Cause.GAVE_UP, "credit")
        assert turned.failure is not None
        return turned.failure.reason == "BREAKER_OPEN"

    # Now and then a probe is due, and then the vote may be what is sent.
    await until(is_refused_unasked, "a vote not to be asked for")
    await asking.west.start()

    for saga in sagas:
        await asking.ends(saga, SagaState.COMPENSATED)
    await _breaker_is(asking, BreakerState.CLOSED)


# -- stores ----------------------------------------------------------------------------------------


async def test_an_empty_store_under_prepared_branches(asking: Branches) -> None:
    """It knows nothing of them and says so: they keep what they hold, and their own store ends it.

    Whoever answered "never heard of it, so roll back" would be another runtime's liar.
    """
    saga = await _in_doubt(asking, UNDECIDED)
    asking.runtime.kill()
    aside = asking.folder / "aside"
    _move_store(asking.folder, aside)
    await asking.runtime.start()
    for branch in (asking.east, asking.west):
        await _orphan_told(branch, saga)
    assert (asking.prepared, asking.held) == (1, 1)
    assert await asking.runtime.stop() == 0

    _move_store(asking.folder, asking.folder / "empty")
    _move_store(aside, asking.folder)
    await asking.runtime.start()

    await asking.ends(saga, SagaState.COMPLETED)


async def test_a_restored_store_under_prepared_branches(asking: Branches) -> None:
    """It may have forgotten a decision, and must not guess; once it is confirmed, it is believed.

    The backup is older than the transfer: then nobody has committed, and all roll back.
    """
    assert await asking.runtime.stop() == 0
    backup = asking.folder / "backup.db"
    shutil.copy(asking.folder / "amends.db", backup)
    await asking.runtime.start()
    saga = await _in_doubt(asking, UNDECIDED)
    asking.runtime.kill()
    for suffix in ("", "-wal", "-shm"):
        (asking.folder / f"amends.db{suffix}").unlink(missing_ok=True)
    shutil.copy(backup, asking.folder / "amends.db")

    await asking.runtime.start()
    for branch in (asking.east, asking.west):
        await _orphan_told(branch, saga)
    store = await asking.client.runtime()
    assert store.restored
    assert (asking.prepared, asking.held) == (1, 1)
    await asking.client.confirm_restore(
        store.incarnation, author="ada", reason="nothing newer is left"
    )
    for branch in (asking.east, asking.west):  # who has asked once is not in a hurry any more
        await asking.restart(branch)

    await until(lambda: (asking.prepared, asking.held) == (0, 0), "both to have rolled back")
    assert asking.moved(saga) == ([], [])
    asking.settled()


# -- the parts -------------------------------------------------------------------------------------


async def _in_doubt(bank: Branches, at: dict[str, list[str]]) -> amends.StartedSaga:
    """Start a transfer and bring it to where both branches are in doubt."""
    saga = await bank.start(at=at)
    for point in at:
        await bank.reached(saga, point)
    await bank.recorded(saga, RecordKind.STEP_PREPARED, "debit")
    return saga


async def _turn(bank: Branches, saga: amends.SagaHandle) -> amends.Turn:
    """Wait until a transfer was decided to be rolled back, and give why."""
    await bank.recorded(saga, RecordKind.DECISION_MADE)
    turn = (await saga.get()).turn
    assert turn is not None
    return turn


async def _orphan_told(branch: Process, saga: amends.SagaHandle) -> None:
    """Wait until a branch has said that nobody will decide for it."""
    await until(
        lambda: saga.saga_id in branch.log.read_text(encoding="utf-8"),
        f"{branch.name} to name {saga.saga_id}",
    )


async def _breaker_is(bank: Branches, state: BreakerState) -> None:
    async def is_so() -> bool:
        (breaker,) = [b for b in await bank.client.breakers() if b.participant == "west"]
        return breaker.state is state

    await until(is_so, f"the breaker of west to be {state}")


def _move_store(source: Path, target: Path) -> None:
    """Move the runtime's database with all that belongs to it."""
    target.mkdir(exist_ok=True)
    for file in source.glob("amends.db*"):
        file.replace(target / file.name)
