"""The bank's auditor finds nothing in honest books, and all that is planted in broken ones."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import amends
from shop.audit_transfers import JOURNAL_NAME, audit_transfers, entry_of, main
from shop.bank import EAST, FEES, OPENINGS_CENTS, WEST, WITH_FEE, Transfer
from shop.bank_witnesses import Books, Held, Movement
from shop.journal import Journal
from shop.processes import Processes
from shop.switches import write_switches
from shop.transfer import TRANSFERS, transfer_east_west
from tests.postgres import Postgres
from tests.shop.branches import COMMIT, PREPARE, STEPS, Bank, transfer

Bankful = dict[str, Books]

ENDS = {
    "done": "COMPLETED",
    "with-fee": "COMPLETED",
    "undone": "COMPENSATED",
}


def moved(definition: str, saga_id: str, wanted: Transfer) -> list[Movement]:
    """Give the movements of a transfer that completed."""
    steps = next(each for each in TRANSFERS if each.name == definition).steps
    return [
        Movement(
            step.participant, 0, 0, 0, saga_id, step.name, step.name, "k", *wanted.moves(step.name)
        )
        for step in steps
    ]


def books_with(movements: list[Movement], held: dict[str, list[Held]] | None = None) -> Bankful:
    """Make honest books with these movements."""
    books = {}
    for branch, openings in OPENINGS_CENTS.items():
        balances = dict(openings)
        ours = [each for each in movements if each.branch == branch]
        for each in ours:
            balances[each.account] += each.amount_cents
        books[branch] = Books(openings, balances, ours, (held or {}).get(branch, []))
    return books


HONEST = [
    *moved("transfer_east_west", "done", transfer(fee_cents=0)),
    *moved(WITH_FEE, "with-fee", transfer()),
]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Give the journal of two completed transfers, a compensated one, and one that was refused."""
    path = tmp_path / JOURNAL_NAME
    with Journal(path) as journal:
        for saga_id, end in ENDS.items():
            definition = WITH_FEE if saga_id == "with-fee" else "transfer_east_west"
            wanted = transfer() if definition == WITH_FEE else transfer(fee_cents=0)
            journal.starting(saga_id, entry_of(definition, wanted))
            journal.acknowledged(saga_id)
            journal.ended(saga_id, end)
        journal.starting("refused", entry_of("transfer_east_west", transfer(fee_cents=0)))
        journal.refused("refused")
    return path


def findings(books: Bankful, journal: Path, **more: set[str]) -> set[tuple[str, str]]:
    """Audit, and give what was found as (rule, saga or branch)."""
    report = audit_transfers(books, journal, **more)
    return {(violation.rule, violation.where) for violation in report.violations}


def test_honest_books_are_clean(journal: Path) -> None:
    """And what was seen is counted."""
    report = audit_transfers(books_with(HONEST), journal)
    assert report.is_clean
    assert (report.transfers, report.acknowledged, report.unknown_starts) == (4, 3, 0)
    assert (report.completed, report.compensated, report.mixed) == (2, 1, 0)
    assert report.movements == {EAST: 2, WEST: 2, FEES: 1}
    assert report.total_cents == report.opening_cents
    assert json.loads(json.dumps(report.to_json()))["violations"] == []
    assert "2 completed, 1 compensated, 0 mixed" in report.lines()[0]


def without(action: str, saga_id: str) -> list[Movement]:
    """Give the honest movements without one."""
    return [each for each in HONEST if (each.action, each.saga_id) != (action, saga_id)]


def otherwise(**changes: object) -> list[Movement]:
    """Give the honest movements with one of them changed."""
    return [dataclasses.replace(HONEST[0], **changes), *HONEST[1:]]  # type: ignore[arg-type]


MOVED: dict[str, tuple[list[Movement], set[tuple[str, str]]]] = {
    "completed, and half of it": (without("credit", "done"), {("missing", "done")}),
    "completed, and nothing of it": (
        [each for each in HONEST if each.saga_id != "done"],
        {("missing", "done")},
    ),
    "without its fee": (without("collect", "with-fee"), {("missing", "with-fee")}),
    "twice": ([*HONEST, HONEST[0]], {("twice", "done")}),
    "twice as a whole": ([*HONEST, *HONEST[:2]], {("twice", "done")}),
    "compensated, and there is a debit": (
        [*HONEST, dataclasses.replace(HONEST[0], saga_id="undone")],
        {("not-undone", "undone")},
    ),
    "compensated, and all of it is there": (
        [*HONEST, *(dataclasses.replace(each, saga_id="undone") for each in HONEST[:2])],
        {("not-undone", "undone")},
    ),
    "another amount": (
        otherwise(amount_cents=-701),
        {("otherwise", "done"), ("missing", "done")},
    ),
    "another account": (
        otherwise(account="east-02"),
        {("otherwise", "done"), ("missing", "done")},
    ),
    "at another branch": (
        otherwise(branch=WEST, account="west-02"),
        {("otherwise", "done"), ("missing", "done")},
    ),
    "nobody started it": (
        [*HONEST, *moved("transfer_east_west", "foreign", transfer(fee_cents=0))],
        {("nobody-started", "foreign")},
    ),
    "refused, and moved": (
        [*HONEST, *moved("transfer_east_west", "refused", transfer(fee_cents=0))],
        {("refused", "refused")},
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_a_planted_movement_is_seen(name: str, journal: Path) -> None:
    """By its rule, and where it is; where money came or went, also in the sum."""
    movements, expected = MOVED[name]
    if sum(each.amount_cents for each in movements):
        expected = expected | {("money", "bank")}
    assert findings(books_with(movements), journal) == expected


def test_what_is_still_held_is_seen(journal: Path) -> None:
    """At each branch, also a prepared transaction that is none of ours."""
    held = {
        EAST: [Held("undone", "a debit"), Held("", "somebody's")],
        WEST: [Held("undone", "a credit")],
        FEES: [Held("gone", "a fee")],
    }
    assert findings(books_with(HONEST, held), journal) == {
        ("held", "undone"),
        ("held", EAST),
        ("held", "gone"),
    }
    assert findings(books_with(HONEST, held), journal, may_be_open={"undone", "gone"}) == {
        ("held", EAST)
    }


def test_balances_that_the_movements_do_not_explain_are_seen(journal: Path) -> None:
    """Changed, below zero, gone, or new; what hides in the sum is seen at its branch."""

    def tampered(branch: str, change: Callable[[dict[str, int]], object]) -> Bankful:
        books = books_with(HONEST)
        balances = dict(books[branch].balances)
        change(balances)
        return books | {branch: dataclasses.replace(books[branch], balances=balances)}

    def moves_on(balances: dict[str, int]) -> None:
        balances["east-05"] -= 1
        balances["east-06"] += 1

    both = {("books", WEST), ("money", "bank")}
    assert findings(tampered(WEST, lambda b: b.update({"west-03": 1})), journal) == both
    assert findings(tampered(WEST, lambda b: b.pop("west-03")), journal) == both
    assert findings(tampered(WEST, lambda b: b.update({"new": 1})), journal) == both
    assert findings(tampered(EAST, moves_on), journal) == {("books", EAST)}
    below = tampered(EAST, lambda b: b.update({"east-empty": -5}))
    assert ("below-zero", EAST) in findings(below, journal)


def test_what_a_client_was_told_is_seen(journal: Path) -> None:
    """No end, two ends, an end that cannot be, one of what was refused, a half of what is open."""
    with Journal(journal) as more:
        for saga_id in ("no-end", "two-ends", "stuck", "unknown"):
            more.starting(saga_id, entry_of("transfer_east_west", transfer(fee_cents=0)))
            if saga_id != "unknown":
                more.acknowledged(saga_id)
        more.ended("two-ends", "COMPENSATED")
        more.ended("two-ends", "COMPLETED")
        more.ended("stuck", "STUCK")
        more.ended("refused", "COMPLETED")
    half = dataclasses.replace(HONEST[0], saga_id="unknown")
    expected = {
        ("no-end", "no-end"),
        ("two-ends", "two-ends"),
        ("wrong-end", "stuck"),
        ("refused", "refused"),
        ("missing", "refused"),
        ("half-done", "unknown"),
        ("money", "bank"),
    }
    assert findings(books_with([*HONEST, half]), journal) == expected
    excepted = {"no-end", "unknown"}
    assert findings(books_with([*HONEST, half]), journal, may_be_open=excepted) == expected - {
        ("no-end", "no-end"),
        ("half-done", "unknown"),
        ("money", "bank"),
    }


def test_an_unknown_start_may_be_all_or_nothing(journal: Path) -> None:
    """Who never learned whether it was started may find it completed."""
    with Journal(journal) as more:
        more.starting("unknown", entry_of("transfer_east_west", transfer(fee_cents=0)))
    whole = [*HONEST, *(dataclasses.replace(each, saga_id="unknown") for each in HONEST[:2])]
    assert findings(books_with(HONEST), journal) == set()
    assert findings(books_with(whole), journal) == set()
    assert audit_transfers(books_with(whole), journal).unknown_starts == 1


def test_mixed_is_right_only_where_a_vote_was_broken(journal: Path) -> None:
    """Then a part has moved, the sum says so, and the rest of the money is where it was."""
    with Journal(journal) as more:
        more.starting("broken", entry_of("transfer_east_west", transfer(fee_cents=0)))
        more.acknowledged("broken")
        more.ended("broken", "MIXED")
    half = [*HONEST, dataclasses.replace(HONEST[0], saga_id="broken")]
    assert findings(books_with(half), journal, may_be_mixed={"broken"}) == set()
    assert findings(books_with(half), journal) == {("mixed", "broken")}
    report = audit_transfers(books_with(half), journal, may_be_mixed={"broken"})
    assert report.total_cents == report.opening_cents - 700
    for movements in (HONEST, [*half, dataclasses.replace(HONEST[1], saga_id="broken")]):
        found = findings(books_with(movements), journal, may_be_mixed={"broken"})
        assert found == {("not-mixed", "broken")}


def test_a_journal_of_something_else_is_seen(journal: Path) -> None:
    """What is no transfer can have moved nothing."""
    with Journal(journal) as more:
        more.starting("order", {"customer": "customer-01"})
    strange = dataclasses.replace(HONEST[0], saga_id="order")
    assert findings(books_with([*HONEST, strange]), journal) == {
        ("otherwise", "order"),
        ("money", "bank"),
    }


async def test_it_reads_the_branches_own_databases(tmp_path: Path, postgres: Postgres) -> None:
    """What has moved, and what is prepared, reserved and pending, by its saga."""
    with Journal(tmp_path / JOURNAL_NAME) as journal:
        for saga_id in ("done", "held"):
            journal.starting(saga_id, entry_of(WITH_FEE, transfer()))
            journal.acknowledged(saga_id)
            journal.ended(saga_id, "COMPLETED")
    async with Bank(tmp_path, postgres.dsn) as bank:
        await bank.complete("done")
        for branch, action in STEPS:
            assert await bank.say(branch, PREPARE, action, saga_id="held") == "done"
    report = audit_transfers(bank.books(), tmp_path / JOURNAL_NAME)
    rules = [(each.rule, each.where) for each in report.violations]
    assert rules == [("held", "held")] * 3 + [("missing", "held")] * 3
    async with Bank(tmp_path, postgres.dsn) as bank:
        for branch, action in STEPS:
            assert await bank.say(branch, COMMIT, action, saga_id="held") == "done"
    assert audit_transfers(bank.books(), tmp_path / JOURNAL_NAME).is_clean


async def test_a_bank_of_processes_is_audited_when_it_is_stopped(
    reachable_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A transfer completes, of another a vote is broken; the command starts PostgreSQL by itself.

    The second ends MIXED, the fault's log explains it, and without that log it is a violation.
    """
    folder = reachable_folder
    async with Processes(folder) as processes:
        branches = await processes.start_branches()
        runtime = await processes.start_runtime({each.name: each.address for each in branches})
        with Journal(folder / JOURNAL_NAME) as journal:
            async with amends.Client(runtime.address) as client:
                await client.register(transfer_east_west)
                wanted = transfer(fee_cents=0)
                for saga_id, end in (("whole", "COMPLETED"), ("broken", "MIXED")):
                    journal.starting(saga_id, entry_of("transfer_east_west", wanted))
                    started = await client.start(
                        "transfer_east_west", wanted.to_json(), saga_id=saga_id
                    )
                    journal.acknowledged(saga_id)
                    saga = await started.result(timeout_s=60)
                    journal.ended(saga_id, saga.state)
                    assert saga.state == end
                    write_switches(processes.switches, {EAST: {"commit_debit": {"break_vote": 1}}})
        running = [sys.executable, "-m", "shop.audit_transfers", str(folder)]
        said = subprocess.run(running, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stdout + said.stderr
        assert "1 completed, 0 compensated, 1 mixed" in said.stdout
    assert main([str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["total_cents"] == report["opening_cents"] + 700
    (folder / f"{EAST}.faults.jsonl").unlink()
    assert main([str(folder)]) == 1
    assert "VIOLATION broken: it ended MIXED" in capsys.readouterr().out


def test_a_folder_without_a_bank_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is started, and nothing made there."""
    assert main([str(tmp_path)]) == 2
    assert f"cannot audit {tmp_path}: there is no PostgreSQL" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
