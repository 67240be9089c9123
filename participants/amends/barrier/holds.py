"""Holds: what a vote promises about a number in the author's own table, and what becomes of it.

How to think about it
---------------------

The author has a table with a row for each account, product, …, and in it a whole number: the
*quantity*. Beside it, in the same schema, lies ``amends_reservations``, with a row for each vote
that has not been told yet: a *hold* on one such row, that takes from its quantity or gives to it.

1. Try writes the hold and touches nothing else. It is refused if the quantity, less all that is
   held to be taken already, is not enough. What is held to be given counts for nobody before it is
   confirmed.
2. Confirm moves the quantity and deletes the hold, in one transaction. Cancel deletes the hold.
3. Who looks at the holds of a row has the row: in PostgreSQL it is locked before its holds are
   summed, and SQLite has one writer. So two votes never count on the same amount.
   Nor by another way to the same row: who shares a table shares its holds, and all know its rows
   by the same key. An opening that comes with another one fails.
4. What can be seen at the time of the vote that would fail at Confirm is refused then: a row that
   is not there, a sum that its column cannot hold.
5. A hold is the participant's that has voted. Nobody else's resolver settles it.

Everything is written once, as generators: they give statements and are given rows. `run` takes one
through a SQLite transaction, `run_async` through a connection to PostgreSQL.
"""

from __future__ import annotations

import enum
import json
import re
import time
import uuid
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
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

FIND_HOLDS: Final = load_statements("postgres.sql")["find-holds"]
"""For PostgreSQL, where each schema may have a table of holds."""

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
    escape: Callable[[str], str] = str
    """Writes a name, as the database gives it, so that the driver finds no mark in it."""

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


@dataclass(frozen=True, slots=True)
class Place:
    """Where the holds of a table lie."""

    pool: str
    """The table and the quantity, by the database's own names: the same however they are spelled.
    """
    names: Mapping[str, str]
    """What is written for the names in statements."""
    sql: Mapping[str, str]
    """The statements, by name."""

    def ask(self, statement: str, *values: object) -> Ask:
        """Make a statement that is waited for."""
        return Ask(self.sql[statement], values)


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
        self._table_name = table
        self._quantity_name = quantity
        self._columns = {
            "key": dialect.quote.format(key),
            "quantity": dialect.quote.format(quantity),
        }
        written = ".".join(dialect.quote.format(part) for part in table.split("."))
        facts = {
            "table": written,
            "table_name": table,
            "key_name": key,
            "quantity_name": quantity,
            "pool": self.subject.lower(),  # names of SQLite have no case
        }
        self._find_table = SQL["find-table"].format_map(facts)
        self._place: Place | None = None
        if not dialect.is_async:
            self._place = self._place_of(self.subject.lower(), written, "")
        self.schema = SQL[f"open-{dialect.name}"].format_map(self._columns | facts)
        """SQL that makes the table of holds and fails if the author's table cannot be reserved
        from; to be run after the author's own."""

    def _place_of(self, pool: str, table: str, schema: str) -> Place:
        escape = self.dialect.escape
        names = {"table": escape(table), "place": escape(schema), **self._columns}
        # The marks first: a name of the database's own may have letters like them.
        sql = {
            name: self.dialect.marks(text).format_map(names)
            for name, text in SQL.items()
            if not name.startswith(("open-", "find-", "list-", "read-row-"))
        }
        row = self.dialect.marks(SQL[f"read-row-{self.dialect.name}"])
        lock = "FOR NO KEY UPDATE" if self._lock_timeout_ms else "FOR NO KEY UPDATE NOWAIT"
        sql["lock-row"] = row.format_map(names | {"lock": lock})
        sql["read-row"] = row.format_map(names | {"lock": ""})
        return Place(pool, names, sql)

    def _placed(self, *, is_ours: bool = True) -> Steps[Place]:
        """Give where the holds lie: in PostgreSQL, where this connection's search path leads.

        With `is_ours` it is the barrier's connection, and what is found stays so: the tables that
        were made at the opening.
        """
        if self._place is not None:
            return self._place
        rows = yield Ask(self._find_table)
        if not rows:
            raise InvalidReservation(
                f"{self._table_name} is not there (any more), as this connection's search path has "
                "it: name it with its schema"
            )
        schema, table = rows[0]
        place = self._place_of(
            f"{schema}.{table}.{self._quantity_name}", f"{schema}.{table}", f"{schema}."
        )
        if is_ours:
            self._place = place
        return place

    # --------------------------------------------------------------------------- the three verbs

    def hold(self, call: Call, direction: Direction, wanted: Hold, participant: str) -> Steps[Hold]:
        """Make a participant's hold; give it as it is held. Raises `Rejected` if it cannot be."""
        place = yield from self._placed()
        yield from self._wait_little(place)
        try:
            row = yield from self._standing(place, wanted.key)
        except Exception as error:
            if _names_no_row(error):
                raise _unknown_key() from error
            raise
        if row is None:
            raise _unknown_key()
        held = yield from self._held(place, row.key, direction)
        if direction is Direction.TAKES and row.quantity - held < wanted.amount:
            raise Rejected("insufficient", f"less is available in {self._table_name}")
        if direction is Direction.GIVES and row.quantity + held + wanted.amount > row.widest:
            raise Rejected("too_much", f"{self.subject} cannot hold as much")
        yield place.ask(
            "write-hold",
            *_life(call),
            participant,
            call.action,
            place.pool,
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
        `InvalidReservation` if the author's row cannot be changed as was promised, or is not.
        """
        place = yield from self._placed()
        yield from self._wait_little(place)
        found = yield from self._of(place, call)
        if found is None:
            raise Broken(
                "hold_lost",
                "this branch is asked to commit, and the hold of its vote is gone from "
                "amends_reservations: it was deleted by hand, or the database was restored",
            )
        direction, hold = found
        row = yield from self._standing(place, hold.key)
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
        asked = self.dialect.key_value(row.key)
        yield place.ask("move-quantity", moved, asked)
        now = yield place.ask("read-quantity", asked)
        if [tuple(one) for one in now] != [(row.quantity + moved,)]:
            raise InvalidReservation(
                f"{self.subject} was to be moved by the amount that saga {call.saga_id} step "
                f"{call.step} holds, and was not: a trigger, rule or policy of {self._table_name} "
                "has prevented or changed it. Nothing was kept; mend that (if it was a rule, start "
                "the participant anew), and the next attempt confirms the hold"
            )
        yield place.ask("delete-hold", *_life(call))
        return hold

    def cancel(self, call: Call) -> Steps[Hold | None]:
        """End a vote's hold, and give it; None if there is none, which is as good."""
        place = yield from self._placed()
        yield from self._wait_little(place)
        found = yield from self._of(place, call)
        if found is None:
            return None
        yield place.ask("delete-hold", *_life(call))
        return found[1]

    def is_living(self, call: Call) -> Steps[bool]:
        """Tell whether there is a hold of the call's life."""
        place = yield from self._placed()
        return bool((yield place.ask("read-hold", *_life(call))))

    # ----------------------------------------------------------------------------------- looking

    def available(self, key: str | int, *, lock: bool) -> Steps[int | None]:
        """Give the quantity of a row less what is held to be taken; None if there is no such row.

        With `lock` the row stays as it is until the transaction ends.
        """
        try:
            check_key(key)
        except Rejected:
            return None  # what is no key names no row
        place = yield from self._placed(is_ours=False)
        row = yield from self._standing(place, key, lock=lock)
        if row is None:
            return None
        if not lock:
            # Nothing keeps the row from being changed since, so both are read anew, at one moment.
            asked = self.dialect.key_value(row.key)
            rows = yield place.ask(
                "read-free", place.pool, json.dumps(row.key), Direction.TAKES.value, asked
            )
            return int(rows[0][0]) if rows else None
        held = yield from self._held(place, row.key, Direction.TAKES)
        return row.quantity - held

    def old(
        self, since_before_ms: int, *, of: Collection[str], after: str, limit: int
    ) -> Steps[list[InDoubt]]:
        """List votes that participants of these names have given by then, and that are not told."""
        place = yield from self._placed()
        text = SQL["list-old"].replace("{names}", ", ".join("?" * len(of)))
        values = place.pool, since_before_ms, int(after or 0), *of, limit
        rows = yield Ask(self.dialect.marks(text).format_map(place.names), values)
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

    def request(self, vote: InDoubt) -> Steps[tuple[str, bytes] | None]:
        """Give who gave a vote, and what it was asked (see `wire.essentials_of`).

        None if it has been told.
        """
        place = yield from self._placed()
        life = vote.store_id, vote.saga_id, vote.step, vote.round
        rows = yield place.ask("read-request", *life)
        return (rows[0][0], bytes(rows[0][1])) if rows else None

    # ------------------------------------------------------------------------------------- parts

    def _wait_little(self, place: Place) -> Steps[None]:
        if self.dialect.is_async and self._lock_timeout_ms:
            yield place.ask("set-lock-timeout", f"{self._lock_timeout_ms}ms")

    def _standing(
        self, place: Place, key: str | int, *, lock: bool = True
    ) -> Steps[Standing | None]:
        rows = yield place.ask("lock-row" if lock else "read-row", self.dialect.key_value(key))
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

    def _held(self, place: Place, key: str | int, direction: Direction) -> Steps[int]:
        rows = yield place.ask("sum-held", place.pool, json.dumps(key), direction.value)
        return int(rows[0][0])

    def _of(self, place: Place, call: Call) -> Steps[tuple[Direction, Hold] | None]:
        rows = yield place.ask("read-hold", *_life(call))
        if not rows:
            rows = yield from self._elsewhere(call)
        if not rows:
            return None
        pool, key, direction, amount = rows[0]
        if pool != place.pool:
            raise InvalidReservation(
                f"the vote of saga {call.saga_id} step {call.step} holds {pool}, and action "
                f"{call.action!r} now reserves {place.pool}: serve it with what it reserved before "
                "until all of its votes are told"
            )
        return Direction(direction), Hold(json.loads(key), amount)

    def _elsewhere(self, call: Call) -> Steps[Sequence[Row]]:
        """Look for a hold beside other tables, in PostgreSQL: it is not lost, but misplaced."""
        if not self.dialect.is_async:
            return ()
        for (table,) in (yield Ask(FIND_HOLDS)):
            names = {"place": self.dialect.escape(table.removesuffix("amends_reservations"))}
            statement = self.dialect.marks(SQL["read-hold"]).format_map(names)
            rows = yield Ask(statement, _life(call))
            if rows:
                return rows
        return ()


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
    "postgres",
    '"{}"',
    lambda text: text.replace("?", "%s"),
    _fetch_psycopg,
    str,
    escape=lambda name: name.replace("%", "%%"),
)
