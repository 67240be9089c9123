"""A ledger behind each form of a barrier that shares its transaction: one contract for all.

A test file that states a rule of every barrier says ``ledger = every_ledger``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.participants.ledger import Ledger
from tests.participants.postgres_ledger import KINDS, PostgresLedger

SQLITE = {"sqlite": False, "sqlite, shared commits": True}


@pytest.fixture(params=[*SQLITE, *KINDS])
def every_ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger | PostgresLedger:
    """Give a participant with a ledger in a database of its own."""
    if request.param in SQLITE:
        return Ledger(tmp_path / "payments.db", share_commits=SQLITE[request.param])
    return PostgresLedger(request.getfixturevalue("postgres"), request.param)
