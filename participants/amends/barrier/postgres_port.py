"""The port between what keeps rows in PostgreSQL and the drivers that reach it.

A `Session` is one connection with at most one transaction; `Sessions` makes them, and
`postgres_pool.py` keeps and lends them. Behind it lie `postgres_asyncpg.py` and
`postgres_psycopg.py`; nothing above it knows which. What every session holds to:

1. Statements are written with ``$1``, ``$2``, … and cast their values (``$1::bigint``): so one text
   serves all drivers. Rows are tuples, whatever row factory an author has set.
2. A statement that the server refused raises `StatementFailed`, with its SQLSTATE; the session can
   be used again after `roll_back`. A connection that has failed raises `ConnectionLost`, and the
   session cannot be used again.
3. A COMMIT (or PREPARE TRANSACTION, COMMIT PREPARED, ROLLBACK PREPARED) that was sent and not
   answered raises `CommitUnknown`. One that the server refused raises `StatementFailed`: then it
   has changed nothing. One that the server answered with ROLLBACK, because a statement before it
   had failed, raises `StatementFailed`, too.
4. Nobody waits for a server that is gone. Each statement has a time for its answer (`within_s`):
   little for what costs the server nothing, more for what ends a transaction, none for an author's
   own. When it is over the connection is discarded under whoever waits, which is rule 2 or 3.
5. A method that is cancelled leaves its session in a state that only `roll_back` or `discard`
   mends; the pool sees to that (`Pool.give_back`). So whoever holds a session gives it back however
   its work ends.
6. Nobody asks the server to stop what rule 3 is about: it would only end its wait for its standbys,
   and all would see what no standby has. `Pool.uncancelled` shields it; and what is cancelled all
   the same, as at the event loop's end, drops the connection without a word (`unasked`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import types
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar

from amends.errors import BarrierError, CommitUnknown
from amends.handler import Handler
from amends.outcomes import Call, Outcome

logger = logging.getLogger(__name__)

T = TypeVar("T")

APPLICATION_NAME: Final = "amends"
"""What ``pg_stat_activity`` shows of our connections, unless the DSN says another."""

CONNECT_TIMEOUT_S: Final = 10.0
"""As long as an attempt may take by default."""

ANSWER_WITHIN_S: Final = 10.0
"""For a statement of ours that ends no transaction: some milliseconds are its due."""

COMMIT_TIMEOUT_S: Final = 60.0
"""A COMMIT that waits longer (for standbys, or for a network that is gone) is unknown."""

CHECK_CLIENT_EVERY_MS: Final = 2000
"""How often the server looks, during a long statement, whether we are still there: or what a killed
participant began would hold its locks until that statement ends."""

LOCK_NOT_AVAILABLE: Final = "55P03"
DEADLOCK_DETECTED: Final = "40P01"
SERIALIZATION_FAILURE: Final = "40001"

HELD_UP: Final = frozenset({LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED, SERIALIZATION_FAILURE})
"""SQLSTATEs that say: somebody else was in the way, and nothing is wrong with the statement."""

INSUFFICIENT_PRIVILEGE: Final = "42501"
IN_FAILED_TRANSACTION: Final = "25P02"
UNDEFINED_COLUMN: Final = "42703"
INVALID_SAVEPOINT: Final = "3B001"
NO_ACTIVE_TRANSACTION: Final = "25P01"


KNOWN_WORDS: Final = (
    "password authentication failed",
    "no pg_hba.conf entry",
    "too many clients",
    "the database system is starting up",
    "the database system is shutting down",
    "does not exist",
    "Connection refused",
    "Name or service not known",
    "failed to resolve host",
    "certificate verify failed",
    "server does not support SSL",
    "rejected SSL upgrade",
    "invalid port number",
    "invalid integer value",
    "invalid sslmode value",
    "No such file or directory",
    "server closed the connection unexpectedly",
    "the connection is closed",
    "timeout expired",
)
"""What drivers say of errors for which they have no SQLSTATE; the first that is found is told."""


WRITE_A_DSN: Final = (
    "the DSN, or a setting in it, cannot be read. Write "
    "postgresql://user:password@host:5432/database, with %40 for an @ in a name or password, %2F "
    "for a /, and so on"
)

ADVICE: Final = {
    "invalid port number": WRITE_A_DSN,
    "invalid integer value": WRITE_A_DSN,
    "invalid sslmode value": WRITE_A_DSN,
    **dict.fromkeys(
        ("server does not support SSL", "rejected SSL upgrade"),
        "the server refused TLS. Switch it on there (ssl = on in postgresql.conf); where the "
        "network is yours alone, sslmode=disable in the DSN does without",
    ),
}
"""What to do about some of them."""


_HOST: Final = r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?"

PLAIN_DSN: Final = re.compile(
    r"postgres(?:ql)?://(?:[^/?#@\s]*@)?"
    rf"(?P<hosts>(?:{_HOST}(?:,{_HOST})*)?)(?P<path>/[A-Za-z0-9._-]*)?(?:\?[^#@\s]*)?"
)
"""A DSN in which nothing but what stands before the only ``@`` can be a password."""


class StatementFailed(BarrierError):
    """The server refused a statement; the transaction, if one is open, can only be rolled back."""

    def __init__(self, message: str, sqlstate: str) -> None:
        self.sqlstate = sqlstate
        """Five letters by which PostgreSQL says what it was, for example ``23505``."""
        super().__init__(message)

    @property
    def is_held_up(self) -> bool:
        """Whether somebody else was in the way, so that trying again later may work."""
        return self.sqlstate in HELD_UP


class ConnectionLost(BarrierError):
    """The connection has failed; what was not committed is rolled back by the server."""


class Session(Protocol):
    """One connection, and the transaction that is open in it."""

    @property
    def connection(self) -> Any:
        """The driver's own connection."""
        ...

    @property
    def is_async(self) -> bool:
        """Whether `async def` handlers can use its connection; else `def` handlers can."""
        ...

    @property
    def is_usable(self) -> bool:
        """Whether the connection is open, as far as this side knows."""
        ...

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open, be it one that has failed; asks nobody."""
        ...

    @property
    def running(self) -> asyncio.Future[Any] | None:
        """What a thread is still doing with it, whoever waits for that; it cannot be stopped."""
        ...

    async def run(self, script: str, *, within_s: float | None = ANSWER_WITHIN_S) -> None:
        """Run one statement or several, without values, and drop their rows.

        None waits for as long as they take.
        """
        ...

    async def rows(
        self, statement: str, *values: object, within_s: float | None = ANSWER_WITHIN_S
    ) -> list[tuple[Any, ...]]:
        """Run one statement with values for ``$1``, …, and give all of its rows."""
        ...

    async def begin(self, settings: str = "") -> None:
        """Open a transaction, READ COMMITTED whatever the database's default is.

        `settings` are statements to run in it at once, without values.
        """
        ...

    async def set_savepoint(self) -> None:
        """Mark where `undo` goes back to; once in a transaction, before the handler."""
        ...

    async def keep(self) -> None:
        """Release the savepoint: what was written since then stays in the transaction."""
        ...

    async def undo(self) -> None:
        """Roll back to the savepoint and release it. Works in a failed transaction, too."""
        ...

    async def commit(self) -> None:
        """Commit, right after a statement that has worked. See the rules above for its errors."""
        ...

    async def prepare(self, global_id: str) -> None:
        """End the transaction with PREPARE TRANSACTION. Raises as `commit` does."""
        ...

    async def finish(self, command: str) -> None:
        """Send COMMIT PREPARED or ROLLBACK PREPARED, in no transaction. Raises as `commit` does."""
        ...

    async def roll_back(self) -> None:
        """Leave no transaction open, whatever has been begun or sent. Raises `ConnectionLost`."""
        ...

    async def answer(self, handler: Handler, call: Call) -> Outcome:
        """Run a handler of this session's kind with the connection. Raises `HandlerFailed`."""
        ...

    async def in_own_way(self, work: Any) -> Any:
        """Call ``work(connection)``, awaited or in the session's thread, and give what it gives."""
        ...

    def discard(self) -> None:
        """Drop the connection at once, without a word to the server; never raises.

        Whoever waits for it finds that it has failed.
        """
        ...

    async def aclose(self) -> None:
        """Close the connection in order; never raises."""
        ...


class Sessions(Protocol):
    """Opens connections of one driver."""

    @property
    def transaction_types(self) -> tuple[type[Any], type[Any]]:
        """What `def` and `async def` handlers are given; ``NoneType`` where they can have none."""
        ...

    async def connect(self, *, is_async: bool) -> Session:
        """Open a connection for handlers of this kind, or of the other where there is but one.

        Raises `BarrierError`, which never shows a password.
        """
        ...


def literal(text: str) -> str:
    """Write a text as a literal of SQL, for statements that take no values."""
    assert "\\" not in text, "standard_conforming_strings may be off"
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """Write a name as SQL, whatever letters it has."""
    return '"' + name.replace('"', '""') + '"'


def named(command: str) -> str:
    """Give what a COMMIT PREPARED or ROLLBACK PREPARED is called in messages: its two words."""
    return " ".join(command.split()[:2])


def sqlstate_of(error: BaseException | None) -> str:
    """Give the SQLSTATE of a driver's error, or of its cause; empty if there is none."""
    while error is not None:
        state = getattr(error, "sqlstate", None)
        if isinstance(state, str):
            return state
        error = error.__cause__
    return ""


def is_fatal(sqlstate: str) -> bool:
    """Tell whether an error with this SQLSTATE means that the connection has ended.

    Class 08 is connections, 57P01 to 57P05 are servers that shut down and sessions that were idle
    for too long, 25P03 and 25P04 a transaction that was; after XX (corruption, internal errors)
    nothing is to be built on the session.
    """
    return sqlstate[:2] in {"08", "XX"} or sqlstate[:4] == "57P0" or sqlstate in {"25P03", "25P04"}


def missing(driver: str, extra: str) -> BarrierError:
    """Say that a driver is not installed, and how to install it."""
    return BarrierError(f"the driver {driver} is not installed: run pip install 'amends[{extra}]'")


def give_up_after(session: Session, within_s: float) -> asyncio.TimerHandle:
    """Discard a session after this time, unless the timer is cancelled before.

    Nothing is cancelled: drivers ask the server for that, and wait for it.
    """

    def give_up() -> None:
        logger.warning("PostgreSQL has not answered for %g s: a connection is given up", within_s)
        session.discard()

    return asyncio.get_running_loop().call_later(within_s, give_up)


@contextmanager
def answered_within(session: Session, within_s: float | None) -> Iterator[None]:
    """Discard a session if the block has not ended after this time."""
    if within_s is None:
        yield
        return
    timer = give_up_after(session, within_s)
    try:
        yield
    finally:
        timer.cancel()


@types.coroutine
def unasked(session: Session, work: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Await what ends a transaction; whoever is cancelled meanwhile drops the connection.

    The driver is not told of that: it would ask the server to stop, by a connection of its own.
    """
    try:
        awaited = work.send(None)
        while True:
            try:
                given = yield awaited
            except Exception as error:  # noqa: BLE001  # what was awaited has failed: passed on
                awaited = work.throw(error)
            except BaseException:
                session.discard()
                work.close()
                raise
            else:
                awaited = work.send(given)
    except StopIteration as end:
        value: T = end.value
        return value


@contextmanager
def translated(
    session: Session,
    kinds: tuple[type[Exception], ...],
    *,
    commits: str = "",
    ends: bool = False,
) -> Iterator[None]:
    """Turn a driver's and the system's errors, of these kinds, into ours, by the rules above.

    `commits` names the command that ends the transaction, if this is one; `ends` says that the
    session is of no use if this fails.
    """
    try:
        yield
    except kinds as error:
        sqlstate = sqlstate_of(error)
        is_refusal = bool(sqlstate) and not is_fatal(sqlstate)
        if not is_refusal or ends:
            session.discard()
        if commits and not is_refusal:
            raise CommitUnknown(
                f"{commits} in PostgreSQL was not answered ({type(error).__name__}) and may have "
                "happened all the same; the next attempt finds out"
            ) from error
        if ends or not session.is_usable:
            raise ConnectionLost(
                f"the connection to PostgreSQL has failed: {said_in(error)}"
            ) from error
        if commits:
            # Without its words: a deferred constraint or trigger may quote what a handler wrote.
            raise StatementFailed(
                f"PostgreSQL refused {commits}, which changed nothing: {type(error).__name__} "
                f"{sqlstate}",
                sqlstate,
            ) from error
        raise StatementFailed(
            f"PostgreSQL refused a statement: {said_in(error)}{_right_missing(sqlstate)}", sqlstate
        ) from error


def said_in(error: BaseException) -> str:
    """Give the type and the message of a driver's error in one line, without its details.

    Details quote the values of rows. Of an error that the server has not sent only the system's
    words are told, and those that we know: a driver's own may quote a value, or a piece of a DSN.
    """
    kind = type(error).__name__
    if sqlstate_of(error):
        diagnosis = getattr(error, "diag", None)
        said = getattr(diagnosis, "message_primary", None) or getattr(error, "message", None)
        return f"{kind}: {' '.join(str(said or error).split())}"
    return ": ".join((kind, *_known_words(error)))


def _right_missing(sqlstate: str) -> str:
    if sqlstate != INSUFFICIENT_PRIVILEGE:
        return ""
    return ". Its role needs SELECT, INSERT, UPDATE and DELETE on our tables: GRANT them"


def _known_words(error: BaseException) -> list[str]:
    text = str(error)
    known = [words for words in KNOWN_WORDS if words in text]
    if not known and isinstance(error, OSError) and (error.errno or 0) > 0:
        known = [os.strerror(error.errno or 0)]
    return known[:1]


def unreachable(error: BaseException, *, by_dsn: bool) -> BarrierError:
    """Say that no connection could be opened; to be raised where the driver's error is no cause.

    Nor are the server's words told: it quotes user and database, and of a DSN that was read in
    another way than it was meant these may be pieces of its password. `by_dsn`: not by a function
    of the author's, so that what is wrong with a value is the DSN's.
    """
    known = _known_words(error)
    said = ": ".join((type(error).__name__, *known))
    advice = [ADVICE[words] for words in known if words in ADVICE]
    if by_dsn and isinstance(error, ValueError | OverflowError):
        advice = [WRITE_A_DSN]
    return BarrierError("; ".join((f"PostgreSQL cannot be reached: {said}", *advice)))


def rolled_back(command: str) -> StatementFailed:
    """Say that the server rolled back when it was told to commit."""
    return StatementFailed(
        f"PostgreSQL answered {command} with ROLLBACK, because a statement before it had failed",
        IN_FAILED_TRANSACTION,
    )
