"""What the bank's branches hold, move and refuse, behind their barriers, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import psycopg
import pytest

import amends
from shop.bank import (
    BRANCHES,
    EAST,
    FEES,
    FEES_ACCOUNT,
    OPENING_CENTS,
    WEST,
    Transfer,
    account,
    empty_account,
    read_transfer,
)
from shop.faults import FaultLog, FaultyBarrier, broken_votes
from shop.switches import SwitchBoard, write_switches
from shop.transfer import TRANSFERS
from tests.postgres import Postgres
from tests.shop.branches import COMMIT, PREPARE, ROLL_BACK, STEPS, Bank, transfer, vote_call


@pytest.fixture
async def bank(tmp_path: Path, postgres: Postgres) -> AsyncIterator[Bank]:
    """Give a bank that has just opened."""
    async with Bank(tmp_path, postgres.dsn) as bank:
        yield bank


def balances(bank: Bank) -> dict[str, int]:
    """Give the balances that are not as they were at the opening."""
    return {
        name: books.balances[name]
        for books in bank.books().values()
        for name in books.balances
        if books.balances[name] != books.openings[name]
    }


AFTER = {
    account(EAST, 1): OPENING_CENTS - 730,
    account(WEST, 1): OPENING_CENTS + 700,
    FEES_ACCOUNT: 30,
}


async def test_votes_hold_and_move_nothing_and_the_commit_moves(bank: Bank) -> None:
    """Each branch in its own way: nobody sees a movement before the commit, and then all do."""
    for branch, action in STEPS:
        assert await bank.say(branch, PREPARE, action) == "done"
    assert bank.held() == {EAST: 1, WEST: 1, FEES: 1}
    assert balances(bank) == {}
    for branch, action in STEPS:
        assert await bank.say(branch, COMMIT, action) == "done"
        assert await bank.say(branch, COMMIT, action) == "done", "repeated, and with no effect"
    assert bank.held() == {}
    assert balances(bank) == AFTER
    moved = [each for books in bank.books().values() for each in books.movements]
    assert [(each.action, each.account, each.amount_cents) for each in moved] == [
        ("debit", account(EAST, 1), -730),
        ("credit", account(WEST, 1), 700),
        ("collect", FEES_ACCOUNT, 30),
    ]


async def test_rolled_back_votes_leave_nothing(bank: Bank) -> None:
    """And a vote that comes late is refused."""
    for branch, action in STEPS:
        assert await bank.say(branch, PREPARE, action) == "done"
        assert await bank.say(branch, ROLL_BACK, action) == "done"
        assert await bank.say(branch, PREPARE, action) == "fenced"
    assert bank.held() == {}
    assert balances(bank) == {}
    assert not any(books.movements for books in bank.books().values())


async def test_the_other_direction(bank: Bank) -> None:
    """The west gives, the east takes."""
    wanted = transfer(payer=account(WEST, 2), payee=account(EAST, 2), fee_cents=0)
    for verb in (PREPARE, COMMIT):
        assert await bank.say(WEST, verb, "debit", wanted=wanted) == "done"
        assert await bank.say(EAST, verb, "credit", wanted=wanted) == "done"
    assert balances(bank) == {
        account(WEST, 2): OPENING_CENTS - 700,
        account(EAST, 2): OPENING_CENTS + 700,
    }


@pytest.mark.parametrize(
    ("branch", "action", "changes", "reason"),
    [
        (EAST, "debit", {"payer": "nobody"}, "unknown_account"),
        (EAST, "credit", {"payee": "nobody"}, "unknown_account"),
        (EAST, "debit", {"payer": empty_account(EAST)}, "insufficient_funds"),
        (WEST, "debit", {"payer": "nobody"}, "unknown_key"),
        (WEST, "credit", {"payee": "nobody"}, "unknown_key"),
        (WEST, "debit", {"payer": empty_account(WEST)}, "insufficient"),
        (FEES, "collect", {"fee_cents": 0}, "no_fee"),
        (EAST, "debit", {"cents": 0}, "invalid_transfer"),
        (WEST, "credit", {"cents": -1}, "invalid_transfer"),
        (FEES, "collect", {"payee": ""}, "invalid_transfer"),
    ],
)
async def test_what_is_refused(
    bank: Bank, branch: str, action: str, changes: dict[str, object], reason: str
) -> None:
    """The vote is no, and nothing is held."""
    assert await bank.say(branch, PREPARE, action, wanted=transfer(**changes)) == reason
    assert bank.held() == {}
    assert balances(bank) == {}


@pytest.mark.parametrize("branch", [EAST, WEST])
async def test_a_fee_that_nobody_would_collect_is_refused(bank: Bank, branch: str) -> None:
    """The payer would pay it to nobody."""
    wanted = transfer(payer=account(branch, 1))
    call = vote_call(PREPARE, "debit", wanted=wanted, definition="transfer_east_west")
    outcome = await bank.ask(branch, call)
    assert isinstance(outcome, amends.Rejected)
    assert outcome.reason == "invalid_transfer"


async def test_who_meets_a_prepared_transfer_is_told_so_quickly(bank: Bank) -> None:
    """In the east the row is locked; in the west only what is held is not available."""
    assert await bank.say(EAST, PREPARE, "debit", saga_id="first") == "done"
    assert await bank.say(EAST, PREPARE, "debit", saga_id="second") == "LOCKED"
    west = transfer(payer=account(WEST, 1), cents=OPENING_CENTS - 10, fee_cents=0)
    assert await bank.say(WEST, PREPARE, "debit", saga_id="first", wanted=west) == "done"
    few = transfer(payer=account(WEST, 1), cents=10, fee_cents=0)
    assert await bank.say(WEST, PREPARE, "debit", saga_id="second", wanted=few) == "done"
    assert await bank.say(WEST, PREPARE, "debit", saga_id="third", wanted=few) == "insufficient"


async def test_every_branch_can_be_asked_what_is_in_doubt(bank: Bank) -> None:
    """And carries a decision out, so that what the runtime sends later is answered done."""
    for decision, verb in (
        (amends.Decision.COMMIT, COMMIT),
        (amends.Decision.ABORT, ROLL_BACK),
    ):
        saga_id = f"to-{decision.lower()}"
        for branch, action in STEPS:
            assert await bank.say(branch, PREPARE, action, saga_id=saga_id) == "done"
            source = bank.branches[branch].in_doubt
            assert await source.in_doubt(older_than_s=3600) == []
            (vote,) = await source.in_doubt(older_than_s=0)
            assert (vote.saga_id, vote.step, vote.round) == (saga_id, action, 1)
            assert await source.in_doubt(older_than_s=0, after=vote.name) == []
            assert await source.resolve(vote, decision)
            assert await source.resolve(vote, decision), "a second time, as good as once"
            assert await bank.say(branch, verb, action, saga_id=saga_id) == "done"
            with pytest.raises(ValueError, match="PENDING"):
                await source.resolve(vote, amends.Decision.PENDING)
    assert bank.held() == {}
    assert balances(bank) == AFTER


@pytest.mark.parametrize("verb", [COMMIT, ROLL_BACK])
async def test_a_switch_breaks_a_vote(bank: Bank, tmp_path: Path, verb: amends.Verb) -> None:
    """The branch has done the contrary, says so when it is asked, and says so again."""
    word = "commit" if verb is COMMIT else "roll_back"
    path = tmp_path / "switches.json"
    write_switches(path, {name: {f"{word}_{action}": {"break_vote": 1}} for name, action in STEPS})
    for branch, action in STEPS:
        assert await bank.say(branch, PREPARE, action) == "done"
        board = SwitchBoard(path, branch, complain=pytest.fail)
        board.load()
        inner = bank.branches[branch].participant.barrier
        with FaultLog(tmp_path / f"{branch}.faults", branch) as log:
            faulty = FaultyBarrier(inner, board, log, handlers=bank.handlers(branch))
            for attempt in (1, 2):
                call = vote_call(verb, action, attempt=attempt)
                outcome = await bank.ask(branch, call, barrier=faulty)
                if verb is COMMIT:
                    assert isinstance(outcome, amends.Rejected)
                else:
                    assert isinstance(outcome, amends.Heuristic)
                    assert outcome.committed
        assert broken_votes([tmp_path / f"{branch}.faults"]) == {"saga-1"}
    assert bank.held() == {}
    assert balances(bank) == ({} if verb is COMMIT else AFTER)


async def test_a_switch_declines_a_vote(bank: Bank, tmp_path: Path) -> None:
    """For a business reason, in every branch; the handler of the east is async."""
    path = tmp_path / "switches.json"
    write_switches(path, {name: {f"prepare_{action}": {"decline": 1}} for name, action in STEPS})
    reasons = []
    for branch, action in STEPS:
        board = SwitchBoard(path, branch, complain=pytest.fail)
        board.load()
        with FaultLog(tmp_path / "faults", branch) as log:
            faulty = FaultyBarrier(bank.branches[branch].participant.barrier, board, log)
            outcome = await bank.ask(branch, vote_call(PREPARE, action), barrier=faulty)
        assert isinstance(outcome, amends.Rejected)
        reasons.append(outcome.reason)
    assert reasons == ["account_frozen", "account_frozen", "closed_for_business"]


async def test_a_branch_opens_again_while_it_is_prepared(
    bank: Bank, tmp_path: Path, postgres: Postgres
) -> None:
    """Its tables and accounts stay as they are, and it waits for nobody's lock."""
    for branch, action in STEPS:
        assert await bank.say(branch, PREPARE, action) == "done"
    async with Bank(tmp_path, postgres.dsn) as again:
        assert again.held() == {EAST: 1, WEST: 1, FEES: 1}
        for branch, action in STEPS:
            assert await again.say(branch, COMMIT, action) == "done"
    assert balances(bank) == AFTER


@pytest.mark.usefixtures("bank")
async def test_the_books_cannot_be_corrected(postgres: Postgres) -> None:
    """A list that can be corrected proves nothing."""
    with pytest.raises(psycopg.Error, match="append-only"):
        postgres.execute("UPDATE movements SET amount_cents = 0")
    with pytest.raises(psycopg.Error, match="append-only"):
        postgres.execute("TRUNCATE movements")


def test_what_a_transfer_is() -> None:
    """It is read as it is written, and every fault is named."""
    for wanted in (transfer(), transfer(fee_cents=0)):
        assert read_transfer(wanted.to_json()) == wanted
    with pytest.raises(amends.Rejected) as refused:
        read_transfer({"from": "", "cents": True, "fee_cents": -1})
    for name in ("from", "to", "cents", "fee_cents"):
        assert name in refused.value.message
    with pytest.raises(amends.Rejected, match="not a JSON object"):
        read_transfer(None)


def test_the_definitions_name_what_the_branches_do() -> None:
    """Every step is an action of its branch, and what a transfer moves adds up to nothing."""
    for definition in TRANSFERS:
        steps = {step.name: step for step in definition.to_proto().steps}
        assert all(step.call.participant in BRANCHES for step in steps.values())
        wanted = Transfer("a", "b", 500, 7 if "collect" in steps else 0)
        assert sum(wanted.moves(name)[1] for name in steps) == 0
