"""What the participants' tests share."""

from pathlib import Path

import pytest

from tests.participants.ledger import Ledger
from tests.postgres import postgres, postgres_connection, postgres_server

__all__ = ["postgres", "postgres_connection", "postgres_server"]


@pytest.fixture(params=[False, True], ids=["own commits", "shared commits"])
def share_commits(request: pytest.FixtureRequest) -> bool:
    """Give both forms of the barrier: whatever it promises holds in each."""
    assert isinstance(request.param, bool)
    return request.param


@pytest.fixture
def ledger(tmp_path: Path, *, share_commits: bool) -> Ledger:
    """Give a participant with a ledger in a database of its own."""
    return Ledger(tmp_path / "payments.db", share_commits=share_commits)
