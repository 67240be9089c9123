"""What the participants' tests share."""

from pathlib import Path

import pytest

from tests.participants.ledger import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Give a participant with a ledger in a database of its own."""
    return Ledger(tmp_path / "payments.db")
