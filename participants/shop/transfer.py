"""Transfers between the bank's branches: two-phase commits.

::

    transfer_east_west     debit at bank-east    credit at bank-west
    transfer_west_east     debit at bank-west    credit at bank-east
    transfer_with_fee      debit at bank-east    credit at bank-west    collect at bank-fees

The votes are asked for at the same time, and all or none of the branches move money.
"""

from __future__ import annotations

from typing import Final

import amends
from shop.bank import EAST, FEES, WEST, WITH_FEE

_RETRY: Final = amends.Retry(first_s=0.1, factor=2, max_s=1)
"""As by default, but somebody watches, and locks are held: no wait is longer than a second."""

_TIMEOUT_S: Final = 3
"""A hundred times what a branch takes."""

PREPARE_DEADLINE_S: Final = 15
"""Within it all must have voted, from the start on; longer than a restart of the runtime or of
PostgreSQL takes."""

LOCKED_RETRIES: Final = 20
"""Who meets another transfer at the same account tries again, until the deadline."""


def _transfer(name: str, **branches: str) -> amends.Definition:
    """Make a definition of these actions, each at its branch."""
    definition = amends.Definition(
        name,
        mode=amends.Mode.TWO_PHASE_COMMIT,
        deadline_s=PREPARE_DEADLINE_S,
        locked_retries=LOCKED_RETRIES,
    )
    for action, branch in branches.items():
        definition = definition.step(
            action,
            branch,
            action,
            timeout_s=_TIMEOUT_S,
            retry=_RETRY,
            compensation_retry=_RETRY,
        )
    return definition


transfer_east_west: Final = _transfer("transfer_east_west", debit=EAST, credit=WEST)
transfer_west_east: Final = _transfer("transfer_west_east", debit=WEST, credit=EAST)
transfer_with_fee: Final = _transfer(WITH_FEE, debit=EAST, credit=WEST, collect=FEES)

TRANSFERS: Final = (transfer_east_west, transfer_west_east, transfer_with_fee)
"""All of them."""
