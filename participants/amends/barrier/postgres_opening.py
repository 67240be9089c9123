"""What an opening does in a PostgreSQL database, and what it says to a role that may not do it.

Our tables are made once, by whoever may; later openings need no right to make them. An author's
schema is his own: PostgreSQL wants the right to create even for a CREATE TABLE IF NOT EXISTS that
finds its table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from amends.barrier.postgres_port import (
    INSUFFICIENT_PRIVILEGE,
    Session,
    StatementFailed,
    identifier,
    said_in,
)
from amends.barrier.statements import load_statements
from amends.errors import BarrierError

SQL: Final = load_statements("postgres.sql")


async def find_place(session: Session) -> str:
    """Give the schema, unquoted, in which an unqualified table is made. Raises `BarrierError`."""
    [(where,)] = await session.rows(SQL["current-schema"])
    if where is None:
        raise BarrierError(
            "no schema of the search path exists that this role may use, so there is no place for "
            "the barrier's tables: create one, or GRANT USAGE on it, or set search_path in the DSN "
            "or for the role"
        )
    return str(where)


async def make_tables(
    session: Session, schema: str, names: Sequence[str], statements: Sequence[str]
) -> None:
    """Make our tables, if one is not there, and see that our role may use them.

    Raises `BarrierError` that says what to grant.
    """
    tables = [f"{identifier(schema)}.{name}" for name in names]
    [(role, may_create)] = await session.rows(SQL["may-create"], schema)
    if await session.rows(SQL["has-tables"], tables) != [(True,)]:
        if not may_create:
            raise BarrierError(
                f"role {role!r} may not make the barrier's tables {' and '.join(names)}: have the "
                f"owner of schema {schema!r} run GRANT CREATE ON SCHEMA {identifier(schema)} TO "
                f"{identifier(role)}, or start once as a role that may, and then run "
                f"{_grant(tables, role)}"
            )
        for statement in statements:
            await session.run(statement)
    if await session.rows(SQL["may-use"], tables) != [(True,)]:
        raise BarrierError(
            f"role {role!r} may not use the barrier's tables: have their owner run "
            f"{_grant(tables, role)}"
        )


async def run_schema(session: Session, schema: str) -> None:
    """Run an author's `schema`, which may take long. Raises `StatementFailed` in its name."""
    if not schema.strip():
        return
    [(role,)] = await session.rows(SQL["current-role"])
    try:
        await session.run(schema, within_s=None)
    except StatementFailed as error:
        cause = error.__cause__
        said = str(error) if cause is None else said_in(cause)
        if error.sqlstate == INSUFFICIENT_PRIVILEGE:
            said += (
                f". CREATE TABLE IF NOT EXISTS, too, wants GRANT CREATE ON SCHEMA … TO "
                f"{identifier(role)}: run that, or have the tables' owner run your `schema`, and "
                "leave it out here"
            )
        raise StatementFailed(
            f"PostgreSQL refused a statement of your `schema`: {said}", error.sqlstate
        ) from cause


def _grant(tables: Sequence[str], role: str) -> str:
    return f"GRANT SELECT, INSERT, UPDATE, DELETE ON {', '.join(tables)} TO {identifier(role)}"
