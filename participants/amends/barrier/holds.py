"""Holds: what a vote promises about a number in the author's own table, and what becomes of it.

How to think about it
---------------------

The author has a table with a row for each account, product, …, and in it a whole number: the
*quantity*. Beside it lies ``amends_reservations``, with a row for each vote that has not been told
yet: a *hold* on one such row, that takes from its quantity or gives to it.

1. Try writes the hold and touches nothing else. It is refused if the quantity, less all that is
   held to be taken already, is not enough. What is held to be given counts for nobody before it is
   confirmed.
2. Confirm moves the quantity and deletes the hold, in one transaction. Cancel deletes the hold.
3. Who looks at the holds of a row has the row: in PostgreSQL it is locked before its holds are
   summed, and SQLite has one writer. So two votes never count on the same amount.
4. What can be seen at the time of the vote that would fail at Confirm is refused then: a row that
   is not there, a sum that its column cannot hold.

Everything is written once, as generators: they give statements and are given rows. `run` takes one
through a SQLite transaction, `run_async` through a connection to PostgreSQL.
"""

from __future__ import annotations

import enum
import json
import re
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

from amends.barrier.port import Barrier, completes_votes
from amends.barrier.statements import load_statements
from amends.errors import InvalidReservation
from amends.in_doubt import InDoubt
from amends.outcomes import Broken, Call, Rejected
from amends.wire import essentials_of

T = TypeVar("T")

SQL: Final = load_statements("reservations.sql")

MAX_AMOUNT: Final = 2**63 - 1
"""What fits into the widest whole number that both databases have."""

MAX_KEY: Final = 512
"""Characters of a key; a longer one is hardly the name of an account."""

IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
"""Names of tables and columns that need no thought in any database."""

LOCK_REFUSED: Final = frozenset(("55P03", "40P01", "40001"))
"""PostgreSQL's lock_not_available, deadlock_detected and serialization_failure: somebody else was
first, and the same again may succeed."""

BAD_VALUE: Final = "22"
"""PostgreSQL's class of errors about values that a column's type does not have."""

ONE_ROW_SAFE: Final = frozenset(("read committed", "serializable"))
"""Isolation levels in which the sum of the holds is current once the row is locked. In PostgreSQL's
``repeatable read`` it would be as old as the transaction, and two votes could count on the same."""

WIDEST: Final = {
    "sqlite": {"integer": MAX_AMOUNT},
    "postgres": {"smallint": 2**15 - 1, "integer": 2**31 - 1, "bigint": MAX_AMOUNT},
}
"""The largest quantity, by the kind of number that the database says it is."""

Row: TypeAlias = tuple[Any, ...]


class Direction(enum.StrEnum):
    """What a hold does to the quantity when it is confirmed; the values are stored."""

    TAKES = "takes"
    GIVES = "gives"


@dataclass(frozen=True, slots=True)
class Hold:
    """What an action wants of one row: so much of its quantity.

    What cannot be wanted is a no to the vote: `Rejected` with the reason ``invalid_amount`` or
    ``invalid_key``.
    """

    key: str | int
    """Which row: the value of its key column. In PostgreSQL of the column's own type (a text for a
    uuid)."""
    amount: int
    """How much, a whole number from 1 to 2^63 - 1, in the smallest unit, for example cents."""

    def __post_init__(self) -> None:
        # Wider than its annotations: both come from what a caller has sent.
        key: object = self.key
        amount: object = self.amount
        if isinstance(amount, bool) or not isinstance(amount, int):
            raise Rejected("invalid_amount", f"an amount is an int, not a {type(amount).__name__}")
        if not 1 <= amount <= MAX_AMOUNT:
            raise Rejected("invalid_amount", "an amount is a whole number from 1 to 2^63 - 1")
        check_key(key)


def check_key(key: object) -> None:
    """Refuse what names no row in any database. Raises `Rejected`."""
    match key:
        case bool():
            pass
        case int():
            if abs(key) <= MAX_AMOUNT:
                return
        case str():
            # Half a character, and in PostgreSQL a NUL, cannot be sent to the database.
            if len(key) <= MAX_KEY and "\0" not in key and _is_whole(key):
                return
        case _:
            pass
    raise Rejected(
        "invalid_key", f"a key is an int, or a text of at most {MAX_KEY} characters without NUL"
    )


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Ask:
    """A statement whose rows the generator waits for."""

    statement: str
    values: tuple[object, ...] = ()


Steps: TypeAlias = Generator[Ask, Sequence[Row], T]
"""Statements, one after the other, and what comes of their rows."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a database, and the driver that is used with it, wants to be spoken to."""

    name: str
    """``sqlite`` or ``postgres``; in the names of statements."""
    quote: str
    """What a name is put between, as a format. Not SQLite's double quotes, in which it takes the
    name of a column that is not there for a text."""
    marks: Callable[[str], str]
    """Puts the driver's marks in place of ``?``."""
    fetch: Callable[[Any, Ask], Any]
    """Runs a statement; its rows, for SQLite, or what has to be awaited for them."""
    key_value: Callable[[str | int], str | int]
    """What the driver is given to be compared with a key column."""

    @property
    def is_async(self) -> bool:
        """Whether what `fetch` gives has to be awaited."""
        return self.name != "sqlite"


@dataclass(frozen=True, slots=True)
class Standing:
    """The author's row, as it stands."""

    key: str | int
    """Its key, as the column has it: however it was asked for, the same row has the same key."""
    quantity: int
    widest: int
    """The largest quantity that the column can hold."""


class Holds:
    """The holds on one quantity of one table."""

    def __init__(
        self, dialect: Dialect, *, table: str, key: str, quantity: str, lock_timeout_s: float
    ) -> None:
        if not dialect.is_async and "." in table:
            raise InvalidReservation(
                f"{table}: name a table of SQLite without a schema; what lies in an attached "
                "database is not committed with its holds"
            )
        self.dialect = dialect
        self.subject = f"{table}.{quantity}"
        """What it is about, as the author names it; for people."""
        self._lock_timeout_ms = round(lock_timeout_s * 1000)
        names = {
            "table": ".".join(dialect.quote.format(part) for part in table.split(".")),
            "key": dialect.quote.format(key),
            "quantity": dialect.quote.format(quantity),
        }
        self._table_name = table
        facts = {"table_name": table, "quantity_name": quantity, "folded": self.subject.lower()}
        # However a table is spelled, its holds lie under one name: the database's own.
        pool = SQL[f"pool-{dialect.name}"].format_map(names | facts)
        self._sql = {
            name: dialect.marks(text.format_map(names | {"lock": "{lock}", "pool": pool}))
            for name, text in SQL.items()
            if not name.startswith(("create-", "check-", "pool-"))
        }
        self.schema = "\n".join(
            (
                SQL[f"create-table-{dialect.name}"],
                SQL[f"check-table-{dialect.name}"].format_map(names | facts),
            )
        )
        """SQL that makes the table of holds and fails if the author's table is not as it was said;
        to be run after the author's own."""

    # --------------------------------------------------------------------------- the three verbs

    def hold(self, call: Call, direction: Direction, wanted: Hold) -> Steps[Hold]:
        """Make a vote's hold; give it as it is held. Raises `Rejected` if it cannot be."""
        yield from self._wait_little()
        try:
            row = yield from self._standing(wanted.key)
        except Exception as error:
            if _names_no_row(error):
                raise _unknown_key() from error
            raise
        if row is None:
            raise _unknown_key()
        held = yield from self._held(row.key, direction)
        if direction is Direction.TAKES and row.quantity - held < wanted.amount:
            raise Rejected("insufficient", f"less is available in {self._table_name}")
        if direction is Direction.GIVES and row.quantity + held + wanted.amount > row.widest:
            raise Rejected("too_much", f"{self.subject} cannot hold as much")
        yield self._ask(
            "write-hold",
            *_life(call),
            call.action,
            json.dumps(row.key),
            direction.value,
            wanted.amount,
            call.incarnation,
            essentials_of(call),
            now_ms(),
        )
        return Hold(row.key, wanted.amount)

    def confirm(self, call: Call) -> Steps[Hold]:
        """Do what a vote has promised, and end its hold; give the hold that was.

        Raises `Broken` if there is none, which only somebody's hand can have caused, and
        `InvalidReservation` if the author's row cannot be changed as was promised.
        """
        yield from self._wait_little()
        found = yield from self._of(call)
        if found is None:
            raise Broken(
                "hold_lost",
                "this branch is asked to commit, and the hold of its vote is gone from "
                "amends_reservations: it was deleted by hand, or the database was restored",
            )
        direction, hold = found
        row = yield from self._standing(hold.key)
        if row is None:
            raise InvalidReservation(
                f"the row of {self._table_name} that saga {call.saga_id} step {call.step} holds "
                f"{self.subject} of is gone: put it back, and the next attempt confirms the hold "
                "(its key stands in amends_reservations)"
            )
        moved = hold.amount if direction is Direction.GIVES else -hold.amount
        if row.quantity + moved > row.widest:
            raise InvalidReservation(
                f"{self.subject} was raised after the vote of saga {call.saga_id} step "
                f"{call.step}, and cannot hold what was promised any more: lower it, and the next "
                "attempt confirms the hold"
            )
        yield self._ask("move-quantity", moved, self.dialect.key_value(row.key))
        yield self._ask("delete-hold", *_life(call))
        return hold

    def cancel(self, call: Call) -> Steps[Hold | None]:
        """End a vote's hold, and give it; None if there is none, which is as good."""
        yield from self._wait_little()
        found = yield from self._of(call)
        if found is None:
            return None
        yield self._ask("delete-hold", *_life(call))
        return found[1]

    # ----------------------------------------------------------------------------------- looking

    def available(self, key: str | int, *, lock: bool) -> Steps[int | None]:
        """Give the quantity of a row less what is held to be taken; None if there is no such row.

        With `lock` the row stays as it is until the transaction ends.
        """
        try:
            check_key(key)
        except Rejected:
            return None  # what is no key names no row
        row = yield from self._standing(key, lock=lock)
        if row is None:
            return None
        if not lock:
            # Nothing keeps the row from being changed since, so both are read anew, at one moment.
            asked = self.dialect.key_value(row.key)
            rows = yield self._ask("read-free", json.dumps(row.key), Direction.TAKES.value, asked)
            return int(rows[0][0]) if rows else None
        held = yield from self._held(row.key, Direction.TAKES)
        return row.quantity - held

    def old(self, since_before_ms: int, *, after: str, limit: int) -> Steps[list[InDoubt]]:
        """List votes that were given by then and are not told."""
        rows = yield self._ask("list-old", since_before_ms, int(after or 0), limit)
        return [
            InDoubt(
                store_id=store_id,
                incarnation=incarnation,
                saga_id=saga_id,
                step=step,
                round=round_,
                since_ms=since_ms,
                what=f"{action}: a hold that {direction} {self.subject}",
                name=str(seq),
            )
            for seq, store_id, incarnation, saga_id, step, round_, since_ms, action, direction in (
                rows
            )
        ]

    def request(self, vote: InDoubt) -> Steps[bytes | None]:
        """Give what was asked in a vote (see `wire.essentials_of`); None if it has been told."""
        life = vote.store_id, vote.saga_id, vote.step, vote.round
        rows = yield self._ask("read-request", *life)
        return bytes(rows[0][0]) if rows else None

    # ------------------------------------------------------------------------------------- parts

    def _wait_little(self) -> Steps[None]:
        if self.dialect.is_async and self._lock_timeout_ms:
            yield self._ask("set-lock-timeout", f"{self._lock_timeout_ms}ms")

    def _standing(self, key: str | int, *, lock: bool = True) -> Steps[Standing | None]:
        how = "FOR NO KEY UPDATE" if lock else ""
        if lock and not self._lock_timeout_ms:
            how += " NOWAIT"
        statement = self._sql[f"read-row-{self.dialect.name}"].format(lock=how)
        rows = yield Ask(statement, (self.dialect.key_value(key),))
        if not rows:
            return None
        if len(rows) > 1:
            raise InvalidReservation(
                f"{self._table_name} has more than one row of one key: the key of a reservation "
                "must be unique (make it the primary key)"
            )
        found, quantity, kind, isolation = rows[0]
        widest = WIDEST[self.dialect.name].get(kind)
        if widest is None:
            raise InvalidReservation(
                f"{self.subject} is of kind {kind}, and reservations count in whole numbers of the "
                "smallest unit, for example cents"
            )
        if isolation not in ONE_ROW_SAFE:
            raise InvalidReservation(
                f"the transaction is {isolation!r}, in which two votes can count on the same "
                "amount: use 'read committed' (the default of PostgreSQL) or 'serializable'"
            )
        if quantity is None:
            raise InvalidReservation(f"{self.subject} is NULL in a row: make the column NOT NULL")
        return Standing(_key(found), quantity, widest)

    def _held(self, key: str | int, direction: Direction) -> Steps[int]:
        rows = yield self._ask("sum-held", json.dumps(key), direction.value)
        return int(rows[0][0])

    def _of(self, call: Call) -> Steps[tuple[Direction, Hold] | None]:
        rows = yield self._ask("read-hold", *_life(call))
        if not rows:
            return None
        pool, own, key, direction, amount = rows[0]
        if pool != own:
            raise InvalidReservation(
                f"the vote of saga {call.saga_id} step {call.step} holds {pool}, and action "
                f"{call.action!r} now reserves {own}: serve it with what it reserved before until "
                "all of its votes are told"
            )
        return Direction(direction), Hold(json.loads(key), amount)

    def _ask(self, statement: str, *values: object) -> Ask:
        return Ask(self._sql[statement], values)


def now_ms() -> int:
    """Give the time, UTC."""
    return time.time_ns() // 1_000_000


def is_lock_refused(error: BaseException) -> bool:
    """Tell whether PostgreSQL has refused to wait, or chosen this transaction to give way."""
    return getattr(error, "sqlstate", None) in LOCK_REFUSED


def _names_no_row(error: Exception) -> bool:
    """Tell whether an error says that a key is not one of the key column's type."""
    state = getattr(error, "sqlstate", None) or ""
    # asyncpg finds it before it sends anything, and then there is no state.
    return str(state).startswith(BAD_VALUE) or type(error).__name__ == "DataError"


def _unknown_key() -> Rejected:
    return Rejected("unknown_key", "there is no row of this key")


def _life(call: Call) -> tuple[str, str, str, int]:
    return call.store_id, call.saga_id, call.step, call.round


def _key(found: object) -> str | int:
    """Give a key as both JSON and the driver take it."""
    match found:
        case bool():
            pass
        case int() | str():
            return found
        case uuid.UUID():
            return str(found)
        case _:
            pass
    raise InvalidReservation(
        f"the key column has a {type(found).__name__}: use a text, a whole number or a uuid"
    )


# ------------------------------------------------------------------------------------ the databases


def run(steps: Steps[T], dialect: Dialect, transaction: Any) -> T:
    """Take steps through a transaction of SQLite; a connection does as well."""
    try:
        ask = next(steps)
        while True:
            ask = steps.send(dialect.fetch(transaction, ask))
    except StopIteration as end:
        value: T = end.value
        return value


async def run_async(steps: Steps[T], dialect: Dialect, connection: Any) -> T:
    """Take steps through a connection to PostgreSQL."""
    try:
        ask = next(steps)
        while True:
            try:
                rows = await dialect.fetch(connection, ask)
            except Exception as error:  # noqa: BLE001  # what it means is known where it was asked
                ask = steps.throw(error)
            else:
                ask = steps.send(rows)
    except StopIteration as end:
        value: T = end.value
        return value


def dialect_of(barrier: Barrier) -> Dialect:
    """Find out how to speak to a barrier's database. Raises `InvalidReservation`."""
    of_def, of_async = getattr(barrier, "transaction_types", (None, None))
    if completes_votes(barrier):
        raise InvalidReservation(
            f"a {type(barrier).__name__} holds what a vote has done until it is told: there is "
            "nothing to reserve. Reservations want a PostgresBarrier or a SqliteBarrier"
        )
    module = getattr(of_async, "__module__", "").partition(".")[0]
    if module == "asyncpg":
        return ASYNCPG
    if module == "psycopg":
        return PSYCOPG
    if getattr(of_def, "__module__", "") == "amends.barrier.sqlite":
        return SQLITE
    raise InvalidReservation(
        "reservations lie in the participant's own database, beside its table: give the "
        f"participant a SqliteBarrier or a PostgresBarrier, not a {type(barrier).__name__}"
    )


def _fetch_sqlite(transaction: Any, ask: Ask) -> list[Row]:
    return [_plain(row) for row in transaction.execute(ask.statement, ask.values).fetchall()]


def _plain(row: Any) -> Row:
    """Undo a row factory of the author's, and a text factory that gives bytes."""
    return tuple(row.values()) if isinstance(row, Mapping) else tuple(row)


async def _fetch_asyncpg(connection: Any, ask: Ask) -> list[Row]:
    return [tuple(row) for row in await connection.fetch(ask.statement, *ask.values)]


async def _fetch_psycopg(connection: Any, ask: Ask) -> list[Row]:
    async with connection.cursor() as cursor:
        cursor.row_factory = _tuples
        await cursor.execute(ask.statement, ask.values)
        if cursor.description is None:
            return []
        rows: list[Row] = await cursor.fetchall()
        return rows


def _tuples(_cursor: Any) -> Callable[[Sequence[Any]], Row]:
    """Undo a row factory of the author's, by psycopg's protocol for one."""
    return tuple


def _numbered(statement: str) -> str:
    first, *rest = statement.split("?")
    return first + "".join(f"${number}{part}" for number, part in enumerate(rest, start=1))


SQLITE: Final = Dialect("sqlite", "[{}]", lambda text: text, _fetch_sqlite, lambda key: key)
ASYNCPG: Final = Dialect("postgres", '"{}"', _numbered, _fetch_asyncpg, lambda key: key)
# psycopg sends a text without a type, so that it is taken for whatever the column has; a number it
# sends as a number, which PostgreSQL does not compare with a text.
PSYCOPG: Final = Dialect(
    "postgres", '"{}"', lambda text: text.replace("?", "%s"), _fetch_psycopg, str
)
