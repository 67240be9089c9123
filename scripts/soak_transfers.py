"""What `make soak MODE=2pc` does: two-phase commits between the branches of the shop's bank.

Transfers go in both directions between the branch on PostgreSQL and the one with reservations on
SQLite; some leave a fee at a third branch. Some are refused (no funds, no such account, a frozen
account), some meet at the same few accounts and try again in a new round, some are cancelled; votes
hang beyond the prepare deadline, replies are lost, calls fail. Runtime, branches and PostgreSQL are
killed.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import anyio
import psycopg

import amends
from scripts.soak_plan import (
    JOURNAL_NAME,
    Behaviour,
    Errand,
    Findings,
    Trade,
    dice_of,
)
from scripts.soak_victims import ProcessVictim, Victim
from shop.audit_transfers import audit_transfers, entry_of
from shop.bank import (
    ACCOUNTS_A_BRANCH,
    BRANCHES,
    EAST,
    FEES,
    WEST,
    WITH_FEE,
    Transfer,
    account,
    empty_account,
)
from shop.bank_witnesses import POSTGRES_FOLDER, read_bank
from shop.postgres import PostgresFailed, PostgresServer
from shop.processes import Process, Processes, ProcessFailed
from shop.transfer import TRANSFERS

POSTGRES: Final = "postgres"

MOST_LOOKS: Final = 10
"""Each costs the time that the slowest transfer under way still takes."""

REST_S: Final = 1.0
"""A vote is not waited for where a breaker is open: clients that went on at once would spend all
of their transfers on one kill."""

# A branch that is back is noticed at once, or most transfers would be refused for the one before.
SETTINGS: Final = """
[breaker]
open_s = 0.2
max_open_s = 0.5
"""

HOT_ACCOUNTS: Final = 3
HOT: Final = 0.3
"""The share of transfers that go to or from one of a few accounts, where they meet."""

CENTS: Final = (1, 50_000)
FEE_CENTS: Final = (1, 300)

DIRECTIONS: Final = {"transfer_east_west": 0.4, "transfer_west_east": 0.4, WITH_FEE: 0.2}
"""The share of each definition."""

REFUSALS: Final = {"empty": 0.05, "unknown_payer": 0.03, "unknown_payee": 0.04}
"""The share of transfers that are refused because of what they say."""

HURRIED: Final = 0.2
DEADLINE_S: Final = (0.3, 2.0)
SLOW_S: Final = 2.5
"""Longer than any deadline of a hurried one, and shorter than a step's time-out: a vote that hangs
is a vote, and comes too late."""

_VOTES: Final = {"decline": 0.02, "lose_reply": 0.02, "fail_before": 0.02, "slow": 0.02}
_COMMITS: Final = {"lose_reply": 0.02, "fail_before": 0.02, "slow": 0.01}
# Fewer transfers are rolled back than committed: higher chances, so that all of them fire.
_ROLL_BACKS: Final = {"lose_reply": 0.08, "fail_before": 0.08, "slow": 0.03}


def _switches_of(action: str, more: float = 1.0) -> dict[str, dict[str, float]]:
    return {
        f"{verb}_{action}": {fault: chance * more for fault, chance in faults.items()}
        for verb, faults in (
            ("prepare", _VOTES),
            ("commit", _COMMITS),
            ("roll_back", _ROLL_BACKS),
        )
    }


SWITCHES: Final = {
    EAST: _switches_of("debit") | _switches_of("credit"),
    WEST: _switches_of("debit") | _switches_of("credit"),
    # Asked of a fifth of all transfers.
    FEES: _switches_of("collect", 3.0),
}
"""The chances of each attempt; `decline` of each step and round."""

REASONS: Final = (
    "insufficient_funds",
    "insufficient",
    "unknown_account",
    "unknown_key",
    "account_frozen",
    "closed_for_business",
)
"""With which votes are refused; east and west have words of their own."""

NEW_ROUND: Final = "tried again in a new round"
BEHAVIOUR: Final = Behaviour(hurried=HURRIED, deadline_s=DEADLINE_S)


class Transfers(Trade):
    """Two-phase commits of two branches, or of three."""

    mode = "2pc"
    participants = BRANCHES
    unary_of_both = (WEST,)
    killed = (EAST, WEST, POSTGRES, FEES)
    participant_kills = 0.5
    settings = SETTINGS
    unreadable = (OSError, ValueError, sqlite3.Error, psycopg.Error, PostgresFailed)

    def definitions(self) -> Sequence[amends.Definition]:
        """The transfers."""
        return TRANSFERS

    def errand(self, seed: int, number: int) -> Errand:
        """Draw one transfer, and how its client behaves."""
        dice = dice_of(seed, "transfer", number)
        (name,) = dice.choices([*DIRECTIONS], [*DIRECTIONS.values()])
        (refusal,) = dice.choices([*REFUSALS, ""], [*REFUSALS.values(), 1 - sum(REFUSALS.values())])
        payer_at, payee_at = (WEST, EAST) if name == "transfer_west_east" else (EAST, WEST)
        payer, payee = _account(dice, payer_at), _account(dice, payee_at)
        match refusal:
            case "empty":
                payer = empty_account(payer_at)
            case "unknown_payer":
                payer = "nobody"
            case "unknown_payee":
                payee = "nobody"
            case _:
                pass
        fee_cents = dice.randint(*FEE_CENTS) if name == WITH_FEE else 0
        transfer = Transfer(payer, payee, dice.randint(*CENTS), fee_cents)
        return Errand.drawn(
            f"soak-{seed}-{number:06}",
            name,
            transfer.to_json(),
            entry_of(name, transfer),
            dice,
            behaviour=BEHAVIOUR,
        )

    def switches(self) -> dict[str, Any]:
        """What goes wrong, by branch."""
        return {
            branch: {
                operation: faults | {"slow_s": SLOW_S} for operation, faults in operations.items()
            }
            for branch, operations in SWITCHES.items()
        }

    def planned_faults(self) -> list[str]:
        """Name everything that a long run must have seen."""
        of_switches = {
            f"{operation} {fault}": None
            for operations in SWITCHES.values()
            for operation, faults in operations.items()
            for fault in faults
        }
        turns = ["turned back by cancelled", "turned back by deadline"]
        refused = [f"refused {reason}" for reason in REASONS]
        return [*of_switches, *refused, *turns, NEW_ROUND, "impatient start"]

    async def start(self, processes: Processes) -> Sequence[Process]:
        """Start PostgreSQL and the three branches."""
        try:
            return await processes.start_branches()
        except PostgresFailed as error:
            raise ProcessFailed(str(error)) from error

    def victims(self, processes: Processes) -> Sequence[Victim]:
        """The runtime, the branches, and PostgreSQL."""
        assert processes.postgres is not None, "it was started with the branches"
        turn = anyio.Semaphore(1)
        of_processes: list[Victim] = [
            EastVictim(each, turn) if each.name == EAST else ProcessVictim(each)
            for each in processes.all
        ]
        return [*of_processes, PostgresVictim(processes.postgres, turn)]

    def noted(self, saga: amends.Saga) -> Sequence[str]:
        """Name further rounds, and votes that were given up."""
        found = [NEW_ROUND] if saga.round > 1 else []
        if _is_given_up(saga) and saga.turn is not None and saga.turn.failure is not None:
            found.append(f"given up {saga.turn.failure.reason}")
        return found

    def rests_s(self, saga: amends.Saga) -> float:
        """Whoever hears that a branch is away does not ask again at once."""
        return REST_S if _is_given_up(saga) else 0.0

    def looks(self, sagas: int) -> int:
        """Twice, and more often in a long run."""
        return min(MOST_LOOKS, 2 + sagas // 250)

    def look(self, processes: Processes) -> list[str]:
        """Audit at a moment at which nothing is under way; what has ended may not be told yet."""
        assert processes.postgres is not None, "it was started with the branches"
        books = read_bank(processes.folder, processes.postgres.dsn)
        report = audit_transfers(books, processes.folder / JOURNAL_NAME)
        return [str(each) for each in report.violations if each.rule != "no-end"]

    def audit(self, folder: Path) -> Findings:
        """Compare the books of the three branches with the journal."""
        if not (folder / POSTGRES_FOLDER / "data").exists():
            raise FileNotFoundError("there is no PostgreSQL")
        with PostgresServer(folder / POSTGRES_FOLDER) as server:
            books = read_bank(folder, server.dsn)
        report = audit_transfers(books, folder / JOURNAL_NAME)
        return Findings(
            sagas=report.transfers,
            completed=report.completed,
            compensated=report.compensated,
            unknown_starts=report.unknown_starts,
            effects=report.movements,
            by_participant=[*report.movements.items()],
            violations=len(report.violations),
            lines=report.lines(),
            more={
                "mixed": report.mixed,
                "held": sum(len(each.held) for each in books.values()),
                "opening_cents": report.opening_cents,
                "total_cents": report.total_cents,
            },
        )


def _account(dice: random.Random, branch: str) -> str:
    """Draw an account of a branch; often one of those at which transfers meet."""
    among = HOT_ACCOUNTS if dice.random() < HOT else ACCOUNTS_A_BRANCH
    return account(branch, dice.randrange(among))


def _is_given_up(saga: amends.Saga) -> bool:
    return saga.turn is not None and saga.turn.cause is amends.Cause.GAVE_UP


class EastVictim(ProcessVictim):
    """The branch on PostgreSQL, which cannot start while that is away: they take turns."""

    def __init__(self, process: Process, turn: anyio.Semaphore) -> None:
        super().__init__(process)
        self._turn = turn

    async def kill(self) -> None:
        """Kill it when PostgreSQL runs, and begin to start it again."""
        await self._turn.acquire()
        await super().kill()

    async def wait_ready(self) -> None:
        """Wait until it is ready."""
        try:
            await super().wait_ready()
        finally:
            self._turn.release()


class PostgresVictim:
    """The PostgreSQL of the eastern branch, all of its processes."""

    name = POSTGRES

    def __init__(self, server: PostgresServer, turn: anyio.Semaphore) -> None:
        self._server = server
        self._turn = turn
        self._is_starting = False

    def ended(self) -> str:
        """Say how it has ended by itself."""
        if self._is_starting or self._server.is_running:
            return ""
        return f"PostgreSQL ended by itself\n{self._server.last_lines()}"

    async def kill(self) -> None:
        """Kill it; `wait_ready` starts it."""
        await self._turn.acquire()
        self._is_starting = True
        await anyio.to_thread.run_sync(self._server.kill)

    async def wait_ready(self) -> None:
        """Start it on its data, which it recovers."""
        try:
            await anyio.to_thread.run_sync(self._server.start)
        except PostgresFailed as error:
            raise ProcessFailed(str(error)) from error
        finally:
            self._is_starting = False
            self._turn.release()
