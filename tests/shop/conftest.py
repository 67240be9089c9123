"""What the tests of the shop and its bank share: a PostgreSQL, and room for one of their own."""

from __future__ import annotations

from tests.postgres import postgres, postgres_connection, postgres_server, reachable_folder

__all__ = ["postgres", "postgres_connection", "postgres_server", "reachable_folder"]
