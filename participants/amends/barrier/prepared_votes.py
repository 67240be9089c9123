"""The votes in one PostgreSQL database: their rows, and the server's list of what is prepared.

The statements of `prepared.py`, whose rules say what they are for. Nothing here holds a connection:
what is asked is asked in the session that is given.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass
from typing import Final

from amends.barrier import postgres_rows
from amends.barrier.postgres_opening import find_place, make_tables
from amends.barrier.postgres_port import Session, StatementFailed, identifier
from amends.barrier.postgres_rows import (
    CLOCK_SKEW_MS,
    OPEN_STEP_MS,
    PURGE_PAGE,
    PURGE_WITHIN_S,
)
from amends.barrier.prepared_id import PREFIX, GlobalId, VoteLife
from amends.barrier.statements import load_statements
from amends.errors import BarrierError
from amends.in_doubt import InDoubt

SQL: Final = load_statements("prepared.sql")

ROWS: Final = "amends_votes"
STORES: Final = "amends_votes_stores"

TIMEOUT_S: Final = 30.0
"""For each of our own statements, and for a pause between two of them; none takes long."""


class SqlState(enum.StrEnum):
    """SQLSTATEs that say something of a vote."""

    LOCK_NOT_AVAILABLE = "55P03"
    DEADLOCK_DETECTED = "40P01"
    SERIALIZATION_FAILURE = "40001"
    UNDEFINED_OBJECT = "42704"
    """There is no prepared transaction of this name."""
    NOT_IN_PREREQUISITE_STATE = "55000"
    """There is, and another session is at it."""
    INSUFFICIENT_PRIVILEGE = "42501"
    DUPLICATE_OBJECT = "42710"
    OUT_OF_MEMORY = "53200"
    """Also the server's word for its list of prepared transactions being full."""
    FEATURE_NOT_SUPPORTED = "0A000"
    """Also of what a prepared transaction cannot hold."""
    IN_FAILED_TRANSACTION = "25P02"
    UNDEFINED_COLUMN = "42703"


class VoteState(enum.StrEnum):
    """What a row says of its vote; the values are stored."""

    VOTING = "voting"
    """The handler is at work, and nobody else sees it; or has ended its transaction by itself."""
    YES = "yes"
    """Committed: it lay in the prepared transaction."""
    NO = "no"
    """Refused; the reply is stored."""
    ABORTED = "aborted"
    """Rolled back, or never prepared: no Prepare may come any more."""
    LOST = "lost"
    """Asked to commit when there was nothing to commit: no Prepare may come any more."""


@dataclass(frozen=True, slots=True)
class Vote:
    """A row that was read."""

    state: VoteState
    request_hash: bytes
    reply: bytes


class Finish(enum.Enum):
    """What became of COMMIT PREPARED or ROLLBACK PREPARED."""

    DONE = enum.auto()
    GONE = enum.auto()
    """There was none any more: somebody else was faster. Look again."""
    BUSY = enum.auto()
    """Another session is preparing or finishing it at this moment."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long the server lets a transaction do what."""

    lock_s: float
    """A statement's wait for somebody else's lock."""
    statement_s: float = TIMEOUT_S
    """A statement."""
    idle_s: float = TIMEOUT_S
    """Nothing: then we are gone."""


class Votes:
    """The votes of one database, in one schema. Made by `open_votes`."""

    def __init__(self, schema: str) -> None:
        quoted = identifier(schema)
        self._table = f"{quoted}.{ROWS}"
        self._sql = {name: text.replace("{schema}", quoted) for name, text in SQL.items()}
        self._oldest_open: dict[str, int] = {}

    async def place(
        self,
        session: Session,
        life: VoteLife,
        state: VoteState,
        bounds: Bounds,
        *,
        digest: bytes = b"",
        reply: bytes = b"",
    ) -> bool:
        """Begin a transaction and decide the vote in it, if nobody has; else leave none open."""
        await begin(session, bounds)
        try:
            placed = await session.rows(
                self._sql["place"],
                *_key(life),
                state.value,
                digest,
                reply,
                _now_ms(),
                life.lock,
            )
        except StatementFailed as error:
            if not error.is_held_up:
                raise
            placed = []  # somebody writes the row without its lock: by hand
        if not placed:
            await session.roll_back()
        return bool(placed)

    async def say_yes(self, session: Session, life: VoteLife) -> bool:
        """Make a yes of what was placed as voting, right before `Session.prepare`.

        False if it is not there any more. From here on the server bounds no statement.
        """
        return bool(await session.rows(self._sql["vote-yes"], *_key(life)))

    async def in_doubt(self, session: Session, older_than_s: float, after: str) -> list[InDoubt]:
        """List what is prepared and has its row here; see `InDoubtSource`."""
        return await list_in_doubt(session, older_than_s, after, votes_table=self._table)

    async def read(self, session: Session, life: VoteLife) -> Vote | None:
        """Read the row of a life, if one is committed."""
        rows = await session.rows(self._sql["read-vote"], *_key(life))
        if not rows:
            return None
        [(state, digest, reply)] = rows
        try:
            return Vote(VoteState(state), digest, reply)
        except ValueError as error:
            raise BarrierError(
                f"a row of {ROWS} cannot be read: it was written by another version, or by hand"
            ) from error

    async def note_oldest_open(self, session: Session, store_id: str, oldest_ms: int) -> None:
        """Write down what a runtime says of its oldest open saga, if that has moved.

        Never in the transaction of a vote: all other calls of the store would wait for its end.
        """
        known = self._oldest_open.get(store_id)
        if oldest_ms <= 0 or (known is not None and abs(oldest_ms - known) <= OPEN_STEP_MS):
            return
        await session.rows(self._sql["write-oldest-open"], store_id, oldest_ms, OPEN_STEP_MS)
        self._oldest_open[store_id] = oldest_ms

    async def purge(self, session: Session, older_than_ms: int) -> int:
        """Delete old rows of sagas that have ended; give how many. No transaction may be open."""
        written_before_ms = _now_ms() - older_than_ms
        deleted, count = 0, PURGE_PAGE
        while count == PURGE_PAGE:
            gone = await session.rows(
                self._sql["purge"],
                written_before_ms,
                CLOCK_SKEW_MS,
                PURGE_PAGE,
                within_s=PURGE_WITHIN_S,
            )
            count = len(gone)
            deleted += count
        return deleted


async def open_votes(session: Session) -> Votes:
    """Make the tables where the search path says, if they are not there. Raises `BarrierError`."""
    [(most,)] = await session.rows(SQL["max-prepared"])
    if most == 0:
        raise BarrierError(
            "the server takes no prepared transactions, because max_prepared_transactions is 0, "
            "its default. Set it in postgresql.conf to at least as many as transfers may be under "
            "way at once (for example max_prepared_transactions = 100; on standbys no less), and "
            "restart the server: a reload is not enough"
        )
    await session.begin()
    await session.rows(postgres_rows.SQL["lock-opening"], within_s=None)
    where = await find_place(session)
    quoted = identifier(where)
    create = SQL["create-tables"].replace("{schema}", quoted)
    await make_tables(session, where, (ROWS, STORES), [create])
    try:
        await session.rows(SQL["check-tables"].replace("{schema}", quoted))
    except StatementFailed as error:
        if error.sqlstate != SqlState.UNDEFINED_COLUMN:
            raise
        raise BarrierError(
            f"it has tables {ROWS} or {STORES} in schema {where!r} that this version of amends "
            f"cannot use ({error}): they were made by another version; upgrade the SDK"
        ) from error
    await commit(session)
    return Votes(where)


async def begin(session: Session, bounds: Bounds) -> None:
    """Open a transaction within these bounds."""
    await postgres_rows.begin(
        session, statement_s=bounds.statement_s, lock_s=bounds.lock_s, idle_s=bounds.idle_s
    )


async def commit(session: Session) -> None:
    """Commit so that it lasts, whatever the database says of its commits."""
    await postgres_rows.make_commit_safe(session)
    await session.commit()


async def listed(session: Session, life: VoteLife) -> list[GlobalId]:
    """Give what is prepared of a life in this database; more than one is nothing that we do."""
    names = [GlobalId.parse(gid) for (gid,) in await session.rows(SQL["listed"], life.prefix)]
    return [name for name in names if name is not None]


async def finish(session: Session, command: str, name: GlobalId) -> Finish:
    """Send COMMIT PREPARED or ROLLBACK PREPARED. Raises `BarrierError`."""
    try:
        await session.rows(SQL["finish-safely"])
        await session.finish(f"{command} {name.literal}")
    except StatementFailed as error:
        match error.sqlstate:
            case SqlState.UNDEFINED_OBJECT:
                return Finish.GONE
            case SqlState.NOT_IN_PREREQUISITE_STATE:
                return Finish.BUSY
            case SqlState.INSUFFICIENT_PRIVILEGE:
                raise BarrierError(
                    f"{command} {name.literal} is not allowed: another role has prepared it, and "
                    "only that role or a superuser may end it. Connect as that role"
                ) from error
            case _:
                raise
    return Finish.DONE


async def wait_for_standbys(session: Session, bounds: Bounds) -> None:
    """Commit something, so that all that lies before it is as safe as that."""
    await begin(session, bounds)
    await session.rows(SQL["wait-for-standbys"])
    await commit(session)


async def list_in_doubt(
    session: Session, older_than_s: float = 0, after: str = "", *, votes_table: str = ""
) -> list[InDoubt]:
    """List what is prepared in this database under our names: all, or what votes in one table."""
    # Not bounded by a limit: the server lists max_prepared_transactions at most.
    rows = await session.rows(SQL["in-doubt"], PREFIX, after, float(older_than_s), votes_table)
    found = []
    for gid, since_ms, owner, is_ours, tables in rows:
        name = GlobalId.parse(gid)
        if name is None:
            continue
        what = f"locks in {tables}" if tables else "no locks in tables"
        if not is_ours:
            what += f"; prepared by role {owner}"
        found.append(
            InDoubt(
                store_id=name.life.store_id,
                incarnation=name.incarnation,
                saga_id=name.life.saga_id,
                step=name.life.step,
                round=name.life.round,
                since_ms=since_ms,
                what=what,
                name=gid,
            )
        )
    return found


def _key(life: VoteLife) -> tuple[str, str, str, int]:
    return life.store_id, life.saga_id, life.step, life.round


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
