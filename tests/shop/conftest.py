"""What the tests of the shop and its bank share: a PostgreSQL, and room for one of their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import postgres, postgres_connection, postgres_server

__all__ = ["postgres", "postgres_connection", "postgres_server"]


@pytest.fixture
def reachable_folder() -> Iterator[Path]:
    """Give a folder in which a PostgreSQL can have its data, also if we are root.

    It is somebody else then, who does not come through pytest's folders.
    """
    folder = Path(tempfile.mkdtemp(prefix="amends-shop-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)
