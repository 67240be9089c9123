"""A real PostgreSQL server for tests, and for each test a database in which there is nothing.

A conftest that wants them imports the fixtures by name::

    from tests.postgres import postgres, postgres_connection, postgres_server

    __all__ = ["postgres", "postgres_connection", "postgres_server"]

Each worker of pytest-xdist has a server of its own. A test that kills a server, or wants it set up
otherwise, starts one itself: `PostgresServer`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import Connection, sql

from shop.postgres import PostgresServer

DATABASE = "tests"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """Give the worker's server; it ends with the worker, and its data with it."""
    with PostgresServer() as server:
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
        yield server


@pytest.fixture(scope="session")
def postgres_connection(postgres_server: PostgresServer) -> Iterator[Connection]:
    """Give the connection by which tests look into their database; one serves them all."""
    dsn = postgres_server.dsn_of(DATABASE)
    # Nothing is prepared: each test makes tables of its own, by names that others had.
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as connection:
        yield connection


@dataclass
class Postgres:
    """A database of the server, seen from outside of what is tested."""

    server: PostgresServer
    connection: Connection
    database: str = DATABASE

    @property
    def dsn(self) -> str:
        """How to connect to it; has the password."""
        return self.server.dsn_of(self.database)

    def dsn_by(self, port: int | None) -> str:
        """Say how to connect to it by another port, behind which it can be reached."""
        here, there = f":{self.server.port}/", f":{port or self.server.port}/"
        return self.dsn.replace(here, there)

    def reconnect(self) -> None:
        """Connect anew, after the server was away."""
        self.connection.close()
        self.connection = psycopg.connect(self.dsn, autocommit=True)

    def execute(self, statement: LiteralString, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement (values for ``%s``) outside any transaction, and give its rows."""
        cursor = self.connection.execute(statement, values or None)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def postgres(
    postgres_server: PostgresServer, postgres_connection: Connection
) -> Iterator[Postgres]:
    """Give an empty database; whatever the test leaves in it is gone after it."""
    yield Postgres(postgres_server, postgres_connection)
    clear(postgres_connection)


@contextmanager
def opened_database(server: PostgresServer) -> Iterator[Postgres]:
    """Give an empty database of a test's own server; the one before it is dropped."""
    name = sql.Identifier(DATABASE)
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))
        connection.execute(sql.SQL("CREATE DATABASE {}").format(name))
    connection = psycopg.connect(server.dsn_of(DATABASE), autocommit=True)
    database = Postgres(server, connection)
    try:
        yield database
    finally:
        database.connection.close()


def clear(connection: Connection) -> None:
    """Empty the database: quicker than making another, and as empty."""
    connection.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    prepared = connection.execute(
        "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
    )
    for (gid,) in prepared.fetchall():
        connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
    connection.execute(CLEAR)


CLEAR: LiteralString = """
DO $$
DECLARE name text;
BEGIN
    FOR name IN SELECT nspname FROM pg_namespace
        WHERE nspname <> 'information_schema' AND nspname !~ '^pg_'
    LOOP
        EXECUTE format('DROP SCHEMA %I CASCADE', name);
    END LOOP;
    CREATE SCHEMA public;
    EXECUTE format('ALTER DATABASE %I RESET ALL', current_database());
END
$$
"""


@pytest.fixture
def reachable_folder() -> Iterator[Path]:
    """Give a folder in which a PostgreSQL can have its data, also if we are root.

    It is somebody else then, who does not come through pytest's folders.
    """
    folder = Path(tempfile.mkdtemp(prefix="amends-shop-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)
