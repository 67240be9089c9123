"""The auditor of the bank: compares what clients were told of transfers with where the money is.

How to think about it. As `audit` does for the shop, it reads two kinds of witnesses and nothing
else: the branches' books, and the journal of the client. It never reads the runtime's tables: what
the runtime believes is what is on trial. Run it after the drain, when everything that was started
should have ended; the participants may be stopped.

What must hold:

1. Every acknowledged transfer has one end, and it is COMPLETED or COMPENSATED; MIXED only where a
   branch was made to break its vote. (Transfers that a permanent fault was planted for may be
   excepted by name.)
2. COMPLETED: each of its movements is there exactly once, at its branch, as the transfer asked.
3. COMPENSATED: none is there.
4. MIXED: some are there, once, as the transfer asked, and some are not: otherwise nothing is mixed.
5. A transfer that nobody started, or that was definitely refused, has no movements. One whose start
   or end is unknown has all or none.
6. Nothing is held: no transaction is prepared, nothing reserved, nothing pending.
7. Openings plus movements are balances, for each account; nothing is below zero.
8. The money in all branches together is what it was at the opening, but for what MIXED transfers
   have taken or given too much.

``python -m shop.audit_transfers FOLDER`` audits what a demo has left behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sqlite3
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg

import amends
from shop.audit import SHOWN_VIOLATIONS, Violation
from shop.bank import BRANCHES, Transfer, read_transfer
from shop.bank_witnesses import POSTGRES_FOLDER, Books, Movement, read_bank
from shop.faults import broken_votes
from shop.journal import Entry, read_journal
from shop.postgres import USER, PostgresFailed, PostgresServer
from shop.transfer import TRANSFERS

JOURNAL_NAME: Final = "transfers.jsonl"
"""The client's journal of transfers in a demo's folder."""

STEPS: Final = {
    definition.name: {step.name: step.participant for step in definition.steps}
    for definition in TRANSFERS
}
"""The branch of each action of a transfer, by the definition's name; steps are named by actions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """What the auditor found."""

    transfers: int
    """In the journal."""
    acknowledged: int
    completed: int
    compensated: int
    mixed: int
    unknown_starts: int
    """Neither acknowledged nor refused, and no end told."""
    movements: Mapping[str, int]
    """How many there are at each branch."""
    opening_cents: int
    """In all branches together, when they opened."""
    total_cents: int
    """In all branches together, now."""
    violations: tuple[Violation, ...]

    @property
    def is_clean(self) -> bool:
        """Whether everything holds."""
        return not self.violations

    def to_json(self) -> dict[str, Any]:
        """Give everything as values that JSON has; violations as lines."""
        return dataclasses.asdict(self) | {"violations": [str(each) for each in self.violations]}

    def lines(self) -> list[str]:
        """Say it for people: the counts, and the first violations."""
        counted = ", ".join(f"{count} at {branch}" for branch, count in self.movements.items())
        ended = self.completed + self.compensated + self.mixed
        found = [
            (
                f"{self.transfers} transfers: {self.completed} completed, "
                f"{self.compensated} compensated, {self.mixed} mixed; "
                f"{self.unknown_starts} starts without an answer, "
                f"{self.transfers - ended - self.unknown_starts} refused or not ended"
            ),
            f"movements: {counted}",
            f"money in all: {self.total_cents} cents, at the opening {self.opening_cents}",
        ]
        found += [f"VIOLATION {each}" for each in self.violations[:SHOWN_VIOLATIONS]]
        if len(self.violations) > SHOWN_VIOLATIONS:
            found.append(f"and {len(self.violations) - SHOWN_VIOLATIONS} more violations")
        return found


def entry_of(definition: str, transfer: Transfer) -> dict[str, object]:
    """Give what a journal is told of a transfer: `Journal.starting`'s second argument."""
    return {"definition": definition, "input": transfer.to_json()}


def audit_transfers(
    books: Mapping[str, Books],
    journal: Path,
    *,
    may_be_mixed: Collection[str] = (),
    may_be_open: Collection[str] = (),
) -> TransferReport:
    """Compare the branches' books with a client's journal.

    `may_be_mixed` names the transfers of which a branch was made to break its vote (see
    `faults.broken_votes`), `may_be_open` those for which a permanent fault was planted: they need
    no end, may hold something, and may have moved a part of the money. Raises `ValueError` for a
    journal that contradicts itself, and `OSError`.
    """
    entries = read_journal(journal)
    of_saga: defaultdict[str, list[Movement]] = defaultdict(list)
    for branch in books.values():
        for movement in branch.movements:
            of_saga[movement.saga_id].append(movement)
    violations: list[Violation] = []
    for saga_id in of_saga.keys() | entries.keys():
        entry, movements = entries.get(saga_id), of_saga.get(saga_id, [])
        if entry is None:
            names = ", ".join(each.action for each in movements)
            violations.append(
                Violation("nobody-started", saga_id, f"has moved ({names}), and nobody started it")
            )
            continue
        is_open = saga_id in may_be_open
        if not is_open:
            violations += _end_violations(saga_id, entry, may_be_mixed)
        violations += _movement_violations(saga_id, entry, movements, is_open=is_open)
    violations += _held_violations(books, may_be_open)
    violations += _balance_violations(books)
    violations += _money_violations(books, entries, of_saga, may_be_open)
    ended = Counter(entry.ends[0] for entry in entries.values() if entry.ends)
    return TransferReport(
        transfers=len(entries),
        acknowledged=sum(1 for entry in entries.values() if entry.acknowledged_at_ms),
        completed=ended["COMPLETED"],
        compensated=ended["COMPENSATED"],
        mixed=ended["MIXED"],
        unknown_starts=sum(
            1
            for entry in entries.values()
            if not (entry.acknowledged_at_ms or entry.is_refused or entry.ends)
        ),
        movements={branch: len(each.movements) for branch, each in books.items()},
        opening_cents=sum(each.opening_cents for each in books.values()),
        total_cents=sum(each.total_cents for each in books.values()),
        violations=tuple(sorted(violations, key=lambda each: (each.where, each.rule))),
    )


# -- one transfer ----------------------------------------------------------------------------------


def _end_violations(
    saga_id: str, entry: Entry, may_be_mixed: Collection[str]
) -> Iterator[Violation]:
    """Rule 1."""
    ends = list(dict.fromkeys(entry.ends))
    if entry.acknowledged_at_ms and not ends:
        yield Violation("no-end", saga_id, "it was acknowledged and has no end")
    if len(ends) > 1:
        yield Violation("two-ends", saga_id, f"the client was told two ends: {' and '.join(ends)}")
    for end in ends:
        if end == "MIXED" and saga_id not in may_be_mixed:
            yield Violation("mixed", saga_id, "it ended MIXED, and no branch was to break its vote")
        elif end not in ("COMPLETED", "COMPENSATED", "MIXED"):
            yield Violation("wrong-end", saga_id, f"it ended {end}")
    if entry.is_refused and ends:
        yield Violation("refused", saga_id, f"its start was refused, and it ended {ends[0]}")


def _movement_violations(
    saga_id: str, entry: Entry, movements: Sequence[Movement], *, is_open: bool
) -> Iterator[Violation]:
    """Rules 2 to 5."""
    there = Counter(_worth(each) for each in movements)
    for worth, count in there.items():
        if count > 1:
            yield Violation("twice", saga_id, f"{worth} moved {count} times")
    try:
        wanted = _wanted(entry)
    except amends.Rejected as rejected:
        if movements:
            yield Violation("otherwise", saga_id, f"has moved for what is no transfer: {rejected}")
        return
    for worth in sorted(there.keys() - wanted):
        yield Violation("otherwise", saga_id, f"{worth}: not what was asked for")
    missing = sorted(wanted - there.keys())
    match entry.ends[:1]:
        case ["COMPLETED"]:
            for worth in missing:
                yield Violation("missing", saga_id, f"it completed without {worth}")
        case ["COMPENSATED"]:
            for worth in sorted(there):
                yield Violation("not-undone", saga_id, f"it was compensated, and there is {worth}")
        case ["MIXED"]:
            if not there or not missing:
                said = "nothing has" if not there else "all of it has"
                yield Violation("not-mixed", saga_id, f"it ended MIXED, and {said} moved")
        case _ if entry.is_refused and there:
            names = ", ".join(sorted(there))
            yield Violation("refused", saga_id, f"its start was refused, and it has moved {names}")
        case _ if there and missing and not is_open:
            yield Violation("half-done", saga_id, f"it has no end, and moved {', '.join(there)}")


def _worth(movement: Movement) -> str:
    return _in_words(movement.branch, movement.action, movement.account, movement.amount_cents)


def _in_words(branch: str, action: str, account: str, amount_cents: int) -> str:
    return f"{action} of {amount_cents:+} cents to {account} at {branch}"


def _wanted(entry: Entry) -> set[str]:
    """Give what a transfer moves when it completes. Raises `amends.Rejected` for what is none."""
    steps = STEPS.get(entry.input.get("definition", ""))
    if steps is None:
        raise amends.Rejected("unknown_definition", "there is no such transfer")
    transfer = read_transfer(entry.input.get("input"))
    return {_in_words(branch, action, *transfer.moves(action)) for action, branch in steps.items()}


# -- the books -------------------------------------------------------------------------------------


def _held_violations(
    books: Mapping[str, Books], may_be_open: Collection[str]
) -> Iterator[Violation]:
    """Rule 6."""
    for branch, each in books.items():
        for held in each.held:
            if held.saga_id not in may_be_open:
                where = held.saga_id or branch
                yield Violation("held", where, f"{branch} still holds {held.what}")


def _balance_violations(books: Mapping[str, Books]) -> Iterator[Violation]:
    """Rule 7."""
    for branch, each in books.items():
        expected = Counter(each.openings)
        for movement in each.movements:
            expected[movement.account] += movement.amount_cents
        for account in sorted(each.balances.keys() | expected.keys()):
            balance, added_up = each.balances.get(account), expected.get(account)
            if balance != added_up:
                yield Violation(
                    "books",
                    branch,
                    f"the balance of {account}: {balance}; by the movements {added_up}",
                )
            if balance is not None and balance < 0:
                yield Violation("below-zero", branch, f"{account} has {balance}")


def _money_violations(
    books: Mapping[str, Books],
    entries: Mapping[str, Entry],
    of_saga: Mapping[str, Sequence[Movement]],
    may_be_open: Collection[str],
) -> Iterator[Violation]:
    """Rule 8. One line for the whole, however many transfers have lost something."""
    opening = sum(each.opening_cents for each in books.values())
    total = sum(each.total_cents for each in books.values())
    explained = sum(
        movement.amount_cents
        for saga_id, movements in of_saga.items()
        if saga_id in may_be_open or (saga_id in entries and entries[saga_id].ends[:1] == ["MIXED"])
        for movement in movements
    )
    if total != opening + explained:
        yield Violation(
            "money",
            "bank",
            f"there were {opening} cents in all, and now {total}; transfers that ended MIXED "
            f"account for {explained:+}",
        )


# -- the command -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Audit a folder; gives the exit code: 0 (clean), 1 (violations) or 2 (nothing to audit)."""
    parser = argparse.ArgumentParser(
        prog="python -m shop.audit_transfers",
        description="Audit the bank of a demo that was left behind; its PostgreSQL is started for "
        "it, if it does not run.",
    )
    parser.add_argument("folder", type=Path, help=f"has the branches' databases and {JOURNAL_NAME}")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    given = parser.parse_args(arguments)
    folder: Path = given.folder
    try:
        with ExitStack() as stack:
            books = read_bank(folder, _dsn(folder / POSTGRES_FOLDER, stack))
        planted = broken_votes(folder / f"{branch}.faults.jsonl" for branch in BRANCHES)
        report = audit_transfers(books, folder / JOURNAL_NAME, may_be_mixed=planted)
    except (OSError, sqlite3.Error, psycopg.Error, PostgresFailed, ValueError) as error:
        print(f"cannot audit {folder}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_json()) if given.json else "\n".join(report.lines()))
    return 0 if report.is_clean else 1


def _dsn(folder: Path, stack: ExitStack) -> str:
    """Say how to connect to the PostgreSQL of a folder, which is started if it does not run."""
    if not (folder / "data" / "PG_VERSION").exists():
        raise FileNotFoundError(f"there is no PostgreSQL in {folder}")
    try:
        lines = (folder / "data" / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        os.kill(int(lines[0]), 0)
    except (FileNotFoundError, ProcessLookupError):
        return stack.enter_context(PostgresServer(folder)).dsn
    password = (folder / "password").read_text(encoding="ascii")
    return f"postgresql://{USER}:{password}@127.0.0.1:{int(lines[3])}/postgres"


if __name__ == "__main__":
    sys.exit(main())
