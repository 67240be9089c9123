"""The barrier's tables in a PostgreSQL database, and the transactions in which they are used.

What `PostgresBarrier` and `PreparedTransactions` share: they make the tables, hold a life, read and
write its rows. Every transaction on a life goes

    ``begin``  →  ``hold``  →  ``read``  →  (``set_savepoint`` → handler → ``keep`` or ``undo``)
    →  ``write``  →  the session's ``commit`` or ``prepare``

1. `hold` comes before `read`, each a statement of its own: in READ COMMITTED every statement sees
   what was committed before *it* began, so who has the lock reads all that those before him wrote.
2. `write` is the last statement before the end: it also sees to it that the end is durable.
3. Who answers and writes no row ends with `make_seen_safe` and a commit, also where none was found:
   a server that was cut off, and lives on, does not know what was written since elsewhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from amends.barrier.postgres_opening import find_place, make_tables, run_schema
from amends.barrier.postgres_port import (
    UNDEFINED_COLUMN,
    Session,
    StatementFailed,
    identifier,
)
from amends.barrier.statements import load_statements
from amends.barrier.verdict import Question, Row, RowState, Write
from amends.errors import BarrierError
from amends.outcomes import Call, Outcome, Verb
from amends.wire import outcome_to_wire

logger = logging.getLogger(__name__)

SQL: Final = load_statements("postgres.sql")

CLOCK_SKEW_MS: Final = 10 * 60 * 1000
"""How far the runtime's clock may be ahead of ours, when its word allows a purge."""

OPEN_STEP_MS: Final = 60 * 1000
"""How far a store's oldest open saga moves before it is written down: not with every call. A purge
that knows less keeps more."""

PURGE_PAGE: Final = 1000
"""Rows that a purge reads and deletes in one transaction, so that none is long."""

PURGE_WITHIN_S: Final = 60.0
"""For a page, which may have to be looked for in a large table."""

ROWS: Final = "amends_barrier"
STORES: Final = "amends_barrier_stores"

OPEN: Final = "open"
"""The mark of a transaction that `begin` began."""

OPENING_LOCK_S: Final = 0.05
"""How long an opening waits for a lock on a table: shorter than a vote waits for its row."""

OPENING_PAUSE_S: Final = 1.0
OPENING_ATTEMPTS: Final = 60
"""So long as a deployment may wait for transactions that are under way."""

Life: TypeAlias = tuple[str, str, str, int]
"""Store, saga, step and round."""


class Tables:
    """The barrier's two tables in one schema; holds no connection. Made by `open_tables`."""

    def __init__(self, schema: str) -> None:
        self.schema = schema
        """The schema's name, unquoted."""
        # Those with {schema} alone: the others get their numbers where they are used.
        quoted = identifier(schema)
        self._sql = {name: sql.replace("{schema}", quoted) for name, sql in SQL.items()}

    async def hold(self, session: Session, life: Life) -> bool:
        """Take the life's lock for the open transaction; False if somebody else has it."""
        return await session.rows(self._sql["lock-life"], lock_of(life)) == [(True,)]

    async def read(self, session: Session, life: Life) -> dict[Verb, Row]:
        """Read a life's rows. Raises `BarrierError` if one cannot be read."""
        try:
            return {
                Verb(verb): Row(RowState(state), request_hash, reply)
                for verb, state, request_hash, reply in await session.rows(
                    self._sql["read-rows"], *life
                )
            }
        except ValueError as error:
            raise unreadable(error) from error

    async def write(
        self,
        session: Session,
        call: Call,
        question: Question,
        writes: Iterable[Write],
        outcome: Outcome,
    ) -> None:
        """Write a verdict's rows; what follows is the transaction's end, and nothing else.

        Raises what an outcome raises that cannot be written down; then nothing was sent.
        """
        verbs, states, hashes, replies = [], [], [], []
        for write in writes:
            own = write.verb is question.verb
            verbs.append(write.verb.value)
            states.append(write.state.value)
            hashes.append(question.request_hash if own else None)
            replies.append(outcome_to_wire(outcome).SerializeToString() if own else None)
        now_ms = time.time_ns() // 1_000_000
        await session.rows(
            self._sql["write-rows"],
            *life_of(call),
            now_ms,
            verbs,
            states,
            hashes,
            replies,
            call.oldest_open_at_ms,
            OPEN_STEP_MS,
        )

    async def purge(self, session: Session, older_than_ms: int) -> int:
        """Delete old rows of sagas that have ended and whose lives hold no reservation.

        Gives how many. No transaction may be open.
        """
        is_not_held = "\n".join(
            self._sql["is-not-held"].replace("{holds}", holds)
            for (holds,) in await session.rows(self._sql["find-holds"])
        )
        purge_page = self._sql["purge-page"].replace("{is_not_held}", is_not_held)
        written_before_ms = time.time_ns() // 1_000_000 - older_than_ms
        deleted = 0
        position: int | None = 0
        while position is not None:
            [(gone, read, old, last_seq)] = await session.rows(
                purge_page,
                position,
                PURGE_PAGE,
                written_before_ms,
                CLOCK_SKEW_MS,
                within_s=PURGE_WITHIN_S,
            )
            deleted += gone
            position = last_seq if read == PURGE_PAGE and old == read else None
        return deleted

    async def make(self, session: Session) -> None:
        """Make the tables if they are not there, and look whether they are ours."""
        create = self._sql["create-table"], self._sql["create-stores-table"]
        await make_tables(session, self.schema, (ROWS, STORES), create)
        for check, table in ("check-table", ROWS), ("check-stores-table", STORES):
            try:
                await session.rows(self._sql[check])
            except StatementFailed as error:
                if error.sqlstate != UNDEFINED_COLUMN:
                    raise
                raise BarrierError(
                    f"the database has a table {table} in schema {self.schema!r} that this "
                    f"version of amends cannot use ({error}): it was made by another version; "
                    "upgrade the SDK"
                ) from error


async def open_tables(session: Session, schema: str, added: Sequence[str] = ()) -> Tables:
    """Make the barrier's tables where the session's search path says, and run the author's schema.

    `added` is what was added to that, such as the tables of reservations.

    Two processes that do it at once take turns. Who waits for a lock on a table holds up all that
    come after it: so it waits for a moment only, lets go of everything and begins anew.

    Raises `BarrierError`; nothing is half made.
    """
    for attempt in range(1, OPENING_ATTEMPTS + 1):
        try:
            return await _open_tables(session, schema, added)
        except StatementFailed as error:
            if not error.is_held_up or attempt == OPENING_ATTEMPTS:
                raise
            if attempt == 1:
                logger.warning(
                    "opening the barrier waits for a lock that somebody else has: %s", error
                )
            await asyncio.sleep(OPENING_PAUSE_S)
    raise AssertionError("the last attempt returns or raises")


async def _open_tables(session: Session, schema: str, added: Sequence[str]) -> Tables:
    await session.begin()
    try:
        # Whoever has it runs an author's schema, which may take long, as may ours.
        await session.rows(SQL["lock-opening"], within_s=None)
        await session.rows(SQL["wait-little"], f"{_ms(OPENING_LOCK_S)}ms")
        tables = Tables(await find_place(session))
        await tables.make(session)
        await run_schema(session, schema)
        for own_sql in added:
            await session.run(own_sql, within_s=None)
        await session.rows(SQL["make-commit-safe"])
        await session.commit()
    except BaseException:
        if session.is_usable:
            await session.roll_back()
        raise
    return tables


async def begin(session: Session, *, statement_s: float, lock_s: float, idle_s: float) -> None:
    """Open a transaction that bounds its statements, its waits for locks and its idleness."""
    await session.begin(
        SQL["enter"].format(statement_ms=_ms(statement_s), lock_ms=_ms(lock_s), idle_ms=_ms(idle_s))
    )


async def is_ours(session: Session) -> bool:
    """Tell whether the open transaction is the one that `begin` began, not one of a handler's.

    Raises `StatementFailed` if the transaction has failed.
    """
    return await session.rows(SQL["read-mark"]) == [(OPEN,)]


async def make_commit_safe(session: Session) -> None:
    """See to it that the COMMIT that follows is durable, where no row is written."""
    await session.rows(SQL["make-commit-safe"])


async def make_seen_safe(session: Session) -> None:
    """See to it that, once the COMMIT that follows has worked, what was read is as safe as it is.

    A row can be seen that is on no standby: the one that wrote it was cut off while it waited for
    them. What is answered from it must not be lost in a failover.
    """
    await session.rows(SQL["make-seen-safe"])


async def is_durable(session: Session) -> bool:
    """Tell whether the server syncs what it commits."""
    return await session.rows(SQL["is-durable"]) == [(True,)]


def life_of(call: Call) -> Life:
    """Give the life that a call belongs to."""
    return call.store_id, call.saga_id, call.step, call.round


def lock_of(life: Life) -> int:
    """Give the number of a life's advisory lock: 64 bits of a hash.

    Two lives with one number would only take turns.
    """
    parts = [str(part).encode() for part in life]
    text = b"amends life 1" + b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big", signed=True)


def unreadable(error: Exception) -> BarrierError:
    """Say that a row of the barrier cannot be read."""
    return BarrierError(
        f"a row of {ROWS} cannot be read ({type(error).__name__}): it was written by another "
        "version, or by hand"
    )


def _ms(seconds: float) -> int:
    # 0 would mean: no limit.
    return max(1, round(seconds * 1000))
