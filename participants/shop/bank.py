"""The bank's branches: who has how much when they open, and what a transfer between them asks for.

Everything that several of the bank's modules must agree on. Each branch shows another way of taking
part in a two-phase commit:

==============  ==============  ==================================================================
`bank_east`     PostgreSQL      prepared transactions: votes alone are written
`bank_west`     SQLite          reservations (TCC): nothing is written but which row and how much
`bank_fees`     SQLite          by hand: all three verbs, and what a resolver needs
==============  ==============  ==================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import amends
from amends.in_doubt import InDoubtSource

EAST: Final = "bank-east"
WEST: Final = "bank-west"
FEES: Final = "bank-fees"

BRANCHES: Final = (EAST, WEST, FEES)
"""The branches, by the names of their participants and processes."""

DSN_VARIABLE: Final = "BANK_EAST_DSN"
"""The environment variable that says where the PostgreSQL of `bank_east` is. Not an argument, since
those of a process can be read by everybody on its machine, and a DSN has a password."""

ACCOUNTS_A_BRANCH: Final = 20
"""Few, so that transfers meet."""

OPENING_CENTS: Final = 1_000_000_00
"""On each of them; it outlasts any soak, so that only planted refusals occur."""

FEES_ACCOUNT: Final = "fees"
"""Where the third branch puts what it collects; opens empty."""


def account(branch: str, number: int) -> str:
    """Name one of the accounts of `EAST` or `WEST`, by its number from 0."""
    return f"{branch.removeprefix('bank-')}-{number:02}"


def empty_account(branch: str) -> str:
    """Name the account of `EAST` or `WEST` on which there is nothing."""
    return f"{branch.removeprefix('bank-')}-empty"


OPENINGS_CENTS: Final = {
    **{
        branch: {
            **{account(branch, number): OPENING_CENTS for number in range(ACCOUNTS_A_BRANCH)},
            empty_account(branch): 0,
        }
        for branch in (EAST, WEST)
    },
    FEES: {FEES_ACCOUNT: 0},
}
"""What is on each account when its branch's database is made, by branch."""

REFUSALS: Final = {
    "debit": "account_frozen",
    "credit": "account_frozen",
    "collect": "closed_for_business",
}
"""The branches' actions, and the reason with which the switch `decline` refuses each."""

ACTIONS: Final = {
    EAST: ("debit", "credit"),
    WEST: ("debit", "credit"),
    FEES: ("collect",),
}
"""What each branch can be asked."""

WITH_FEE: Final = "transfer_with_fee"
"""The definition with a step that collects; in the others a fee would be paid to nobody."""

MAX_CENTS: Final = 1_000_000_000_00
"""Of one transfer; more is taken for a slip of the keyboard."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a customer of the bank wants: the input of a two-phase commit."""

    payer: str
    payee: str
    cents: int
    """What the payee gets."""
    fee_cents: int
    """What the bank gets beside it; the payer pays both."""

    @property
    def debit_cents(self) -> int:
        """What the payer pays."""
        return self.cents + self.fee_cents

    def to_json(self) -> dict[str, object]:
        """Give it as `read_transfer` takes it."""
        document: dict[str, object] = {"from": self.payer, "to": self.payee, "cents": self.cents}
        return document | ({"fee_cents": self.fee_cents} if self.fee_cents else {})

    def moves(self, action: str) -> tuple[str, int]:
        """Say which account an action changes, and by how many cents."""
        match action:
            case "debit":
                return self.payer, -self.debit_cents
            case "credit":
                return self.payee, self.cents
            case "collect":
                return FEES_ACCOUNT, self.fee_cents
            case _:
                raise ValueError(f"no branch has an action {action!r}")


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch as its process serves it."""

    participant: amends.Participant
    in_doubt: InDoubtSource
    """What its resolver asks about."""


def asked_of(call: amends.Call) -> Transfer:
    """Give the transfer that a vote is about. Raises `amends.Rejected` as `read_transfer` does."""
    transfer = read_transfer(call.json())
    if transfer.fee_cents and call.definition != WITH_FEE:
        raise amends.Rejected("invalid_transfer", f"a fee is collected in {WITH_FEE} alone")
    return transfer


def read_transfer(document: object) -> Transfer:
    """Read a transfer from the saga's input.

    Raises `amends.Rejected` with the reason ``invalid_transfer`` and every fault in its message.
    """
    if not isinstance(document, dict):
        raise amends.Rejected("invalid_transfer", "the input is not a JSON object")
    faults = [
        f"{name} must be a non-empty string"
        for name in ("from", "to")
        if not (isinstance(document.get(name), str) and document[name])
    ]
    for name, least in (("cents", 1), ("fee_cents", 0)):
        cents = document.get(name, 0)
        # A bool is an int in Python, and a transfer of True cents is none.
        if type(cents) is not int or not least <= cents <= MAX_CENTS:
            faults.append(f"{name} must be a whole number from {least} to {MAX_CENTS}")
    if faults:
        raise amends.Rejected("invalid_transfer", "; ".join(faults))
    return Transfer(
        document["from"], document["to"], document["cents"], document.get("fee_cents", 0)
    )
