"""Two-phase commit with PostgreSQL's own prepared transactions.

How to think about it
---------------------

PostgreSQL can end a transaction with PREPARE TRANSACTION: it is then on disk with all its locks,
belongs to no connection, survives the server's death, and waits for COMMIT PREPARED or ROLLBACK
PREPARED, which any connection may send. That is a vote. So Prepare runs the author's handler and
ends with PREPARE TRANSACTION; Execute and Compensate are one command each. None of the two can
share a transaction with anything else, so there is no row that could be written along with them;
what they leave behind must by itself say what has happened.

The *life* of a vote is one (store, saga, step, round). Two things stand for it:

- its **row** in ``amends_votes``, at most one: ``voting``, ``yes``, ``no``, ``aborted`` or
  ``lost``. It is written inside the vote's transaction, as ``voting`` first thing, and made a
  ``yes`` right before PREPARE TRANSACTION: nobody sees it before the commit, and with a roll back
  it is gone. So a ``yes`` that is seen is a vote that was prepared and *committed*; a ``voting``
  that is seen is no vote: its handler has ended the transaction by itself. The others are committed
  by themselves and forbid that a ``yes`` ever comes.
- its **lock**, an advisory one that ends with the transaction that took it. Prepared transactions
  keep theirs, over a restart of the server, too. Whoever writes the row takes the lock in the same
  statement, without waiting.

So a life is in one of these states, and every step from one to the next is a single commit:

=============  ============  =======  ========================================================
state          lock          row      what leads out of it
=============  ============  =======  ========================================================
nothing        free          none     Prepare → *at work*; Compensate → ``aborted``;
                                      Execute → ``lost``
at work        held          unseen   PREPARE TRANSACTION → *prepared*; else → *nothing*;
                                      a COMMIT of the handler's own → ``voting``;
                                      a ROLLBACK of its own → *nothing* → ``voting``
prepared       held, listed  unseen   COMMIT PREPARED → ``yes``; ROLLBACK PREPARED → *nothing*
``voting``     free          voting   (for ever: half of it may be there, and must be looked at)
``yes``        free          yes      (for ever: committed)
``no``         free          no       (for ever: refused, nothing was held)
``aborted``    free          aborted  (for ever: rolled back, and fenced)
``lost``       free          lost     (for ever: asked to commit, and there was no vote)
=============  ============  =======  ========================================================

Why that is enough, whatever dies when and however many processes serve the participant:

1. **One statement decides** (``place``): it takes the lock if it is free, and then the row if there
   is none. Where it writes, no other transaction of that life is open or prepared, and none has
   ended otherwise: PostgreSQL makes a prepared transaction's rows visible before it lets go of its
   locks. Where it does not write, nothing has happened, and what there is is read and told.
2. **The list is read before the row**, each in a statement of its own. COMMIT PREPARED makes the
   row visible first and takes the name off the list after that. So what is not listed, and was
   committed, is seen by whoever looks later. Read the other way round, a commit in between would
   hide both. (One statement would be as wrong: its snapshot is older than its look at the list.)
   What then depends on there being nothing at all, an ``aborted`` or a ``lost``, is placed as in 1.
3. **A lost reply costs nothing.** PREPARE TRANSACTION, COMMIT PREPARED or ROLLBACK PREPARED that
   was sent and not answered has happened or not; the next attempt looks. While the server is still
   at it, the lock is held and nothing is listed, or the name is busy: `InProgress`.
4. **Compensate in two transactions.** It rolls back what is listed, then places ``aborted``. Killed
   in between, the life has *nothing*, and the repeated Compensate places it then. A Prepare that
   comes in between holds the lock or is listed again: then ``aborted`` is not placed, and what is
   listed is rolled back at the next look. Only what was placed is answered `Done`.
5. **Compensate finds nothing, and the vote was recorded** (``executed``): rolled back by somebody,
   or by ourselves before a crash, or lost with the database. The three cannot be told apart, and
   need not be: a vote that is not there has no effect, which is what was asked for. So there is no
   ``Broken("barrier_lost")`` here.
6. **Execute finds nothing**: ``Broken("vote_lost")``, never `Done`; and ``lost`` is placed first,
   so that no late Prepare makes a liar of that answer.
7. **Compensate finds a yes**: somebody committed it, by hand or with another decision:
   ``Heuristic(committed=True)``.
8. **What is found is as safe as what is given.** A prepared transaction is listed, and a row seen,
   before the standbys have it: whoever was to wait for them may have been cut off. A repeated
   Prepare that said yes at once could lose its vote in a failover; after a `Done` for an
   ``aborted`` that was found a failover could bring back what it had rolled back, with its locks,
   and nobody would come any more. So whoever answers from what is there commits something of his
   own first, which waits for them (``wait-for-standbys``).
9. **A handler that has ended its transaction** is ``Broken("transaction_ended")``, to every verb
   from then on: what it did is bound to no vote, nobody knows how much of it is there, and nothing
   here can undo it. Its own COMMIT leaves a ``voting`` behind, which says so. Its own ROLLBACK
   leaves nothing, and what it wrote after that may have been kept as well; so ``voting`` is placed
   then: it must not run again each time, nor be rolled back without a word.
10. A no is placed, too (`Rejected` for reasons of the author's, and ``LOCKED``), in a transaction
    of its own after the handler's was rolled back: the same round is never asked twice with
    different answers. If it cannot be placed, somebody else has decided, and that is told.
11. **The resolver only ends what is listed** and is in this barrier's schema, and writes nothing:
    the runtime's own calls place what they need. What is gone by then and has left no ``yes`` has
    been rolled back: settled if that was decided, else `VoteNotSettled`.

``LOCKED`` is the no of whoever would have to wait: a lock that is not free within
`lock_timeout_s`, a deadlock, a serialization failure. The server's list of prepared transactions
being full is a ``LOCKED``, too: its places are held by other votes just as locks are, waiting for
one while holding others is how two transfers come to wait for each other, and a new round is how
the runtime gets out of that. Nothing is kept of the vote in any of these cases.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import NoneType
from typing import Any, Final, Self, TypeVar

from google.protobuf.message import DecodeError

from amends.barrier import postgres_rows
from amends.barrier.postgres import (
    DEFAULT_MAX_CONNECTIONS,
    DEFAULT_MAX_HOLD_S,
    IDLE_MARGIN_S,
    Connecting,
    Driver,
    name_of,
)
from amends.barrier.postgres_opening import run_schema
from amends.barrier.postgres_pool import Pool, PoolBusy
from amends.barrier.postgres_port import (
    HELD_UP,
    ConnectionLost,
    Session,
    StatementFailed,
    said_in,
    sqlstate_of,
)
from amends.barrier.prepared_id import GlobalId, VoteLife
from amends.barrier.prepared_votes import (
    Bounds,
    Finish,
    SqlState,
    Vote,
    Votes,
    VoteState,
    begin,
    commit,
    finish,
    list_in_doubt,
    listed,
    open_votes,
    wait_for_standbys,
)
from amends.barrier.verdict import POLL_AFTER_S, request_hash
from amends.errors import BarrierError, HandlerFailed, VoteNotSettled
from amends.handler import Handler
from amends.in_doubt import PAGE, Decision, InDoubt
from amends.outcomes import (
    Broken,
    Call,
    Done,
    Heuristic,
    InProgress,
    Outcome,
    Rejected,
    Verb,
)
from amends.v1 import participant_pb2
from amends.wire import outcome_from_wire, outcome_to_wire

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_LOCK_TIMEOUT_S: Final = 0.1
"""A vote that would have to wait says no quickly: what it has locked by then holds up others."""

DEFAULT_BUSY_TIMEOUT_S: Final = 1.0
"""How long a call waits for a connection; shorter than an attempt's deadline."""

SCHEMA_BOUNDS: Final = Bounds(lock_s=5.0, statement_s=600.0, idle_s=60.0)
"""For the author's schema: a lock is not free for longer than a short transaction holds it, and a
statement may make an index over a large table."""

LOOKS: Final = 3
"""How often a call looks again because somebody else was faster, before it says `InProgress`."""

LOCKED: Final = "LOCKED"
"""The reason that tells the runtime that a new round may do better."""


class PreparedTransactions:
    """A barrier whose votes are prepared transactions of PostgreSQL.

    ::

        bank = Participant("bank", barrier=PreparedTransactions(dsn))


        @bank.prepare("debit")
        async def debit(call: Call, connection: asyncpg.Connection) -> None: ...

    The author writes `prepare` handlers alone: what one has done is committed or rolled back by the
    barrier, as the runtime decides. A handler is given the driver's own connection inside a
    transaction (READ COMMITTED), and a vote carries no result: return None or ``Done()``, raise
    `Rejected` to vote no. It may not end the transaction, nor use what PostgreSQL cannot prepare:
    temporary tables, LISTEN and NOTIFY, cursors WITH HOLD.

    `database` and `driver` are as in `PostgresBarrier`: a DSN or a function that connects; with
    ``asyncpg`` handlers are `async def`, with ``psycopg`` of both kinds. All connections must be of
    one role: only the role that prepared a transaction, or a superuser, may end it.

    A statement of a handler that waits for somebody else's lock for `lock_timeout_s` makes the vote
    ``Rejected("LOCKED")``. A call that has no connection after `busy_timeout_s` is answered
    `InProgress`. A handler that takes longer than `max_hold_s` has failed. `max_connections`, at
    least 2, are opened at most; one of them is kept from votes, which may be waiting for what only
    Execute and Compensate let go. `schema` is SQL for tables of your own, run at each opening, so
    write ``CREATE TABLE IF NOT EXISTS``; it is put off, with a warning, while something in doubt
    has those tables locked.

    The barrier makes its tables ``amends_votes`` and ``amends_votes_stores``. It is a source for
    the `InDoubtResolver`, too. Opening it raises `BarrierError` if the server takes no prepared
    transactions (``max_prepared_transactions`` is 0, its default).
    """

    completes_votes = True

    transaction_types: tuple[type[Any], type[Any]]

    def __init__(
        self,
        database: str | Callable[[], Any],
        *,
        driver: Driver = "asyncpg",
        schema: str = "",
        lock_timeout_s: float = DEFAULT_LOCK_TIMEOUT_S,
        busy_timeout_s: float = DEFAULT_BUSY_TIMEOUT_S,
        max_hold_s: float = DEFAULT_MAX_HOLD_S,
        max_connections: int = DEFAULT_MAX_CONNECTIONS,
    ) -> None:
        if max_connections < 2:
            raise ValueError(
                f"max_connections is {max_connections}; there must be 2, one of them for what lets "
                "go of the locks that votes wait for"
            )
        self._name = name_of(database)
        self._schema = schema
        self._lock_timeout_s = lock_timeout_s
        self._bounds = Bounds(lock_s=lock_timeout_s)
        self._busy_timeout_s = busy_timeout_s
        self._max_hold_s = max_hold_s
        self._max_connections = max_connections
        self._connect = Connecting(database, driver, max_connections)
        self.transaction_types = self._connect.sessions.transaction_types
        self._openings = 0
        self._opening = asyncio.Lock()
        self._open: _Open | None = None
        self._votes_are_async = True

    def __repr__(self) -> str:
        return f"<PreparedTransactions {self._name}>"

    # ------------------------------------------------------------------------ open and close

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.aclose()

    async def open(self) -> None:
        """Connect, and make the barrier's tables and yours. Raises `BarrierError`.

        May be called again while it is open; each `open` wants its `aclose`.
        """
        async with self._opening:
            if self._open is None:
                self._open = await self._opened_anew()
            self._openings += 1

    async def aclose(self) -> None:
        """Let the calls under way end, then close the connections. What is prepared stays so."""
        async with self._opening:
            self._openings = max(0, self._openings - 1)
            if self._openings == 0 and self._open is not None:
                opened, self._open = self._open, None
                await opened.pool.aclose()
                self._connect.aclose()

    async def _opened_anew(self) -> _Open:
        pool = Pool(
            self._connect.sessions, max_connections=self._max_connections, name=self._name, kept=1
        )
        try:
            async with pool.lent(is_async=self._kind(is_async=True)) as session:
                votes = await open_votes(session)
                await self._make_schema(session)
                if not await postgres_rows.is_durable(session):
                    logger.warning("%s has fsync = off: a power cut loses votes", self._name)
        except BaseException as error:
            await pool.aclose()
            self._connect.aclose()
            if isinstance(error, BarrierError):
                raise BarrierError(
                    f"{self._name} cannot be used for prepared transactions: {error}"
                ) from error
            raise
        return _Open(pool, votes)

    async def _make_schema(self, session: Session) -> None:
        if not self._schema.strip():
            return
        try:
            await begin(session, SCHEMA_BOUNDS)
            # Its statements are bounded by the server.
            await session.rows(postgres_rows.SQL["lock-opening"], within_s=None)
            await run_schema(session, self._schema)
            await commit(session)
        except StatementFailed as error:
            await session.roll_back()
            # What is in doubt may hold the tables, and only a participant that opens lets it go.
            if not (error.is_held_up and await list_in_doubt(session)):
                raise
            logger.warning(
                "%s: the schema was not run, because its tables are locked and transactions are in "
                "doubt there; it is run when the participant is started again",
                self._name,
            )

    def _opened(self) -> _Open:
        if self._open is None:
            raise BarrierError(f"{self._name} is not open for prepared transactions")
        return self._open

    # -------------------------------------------------------------------------------- the verbs

    async def run(self, call: Call, handler: Handler | None) -> Outcome:
        """Answer one call. Raises as `Barrier.run` does."""
        try:
            match call.verb:
                case Verb.PREPARE | Verb.EXECUTE if not call.two_phase:
                    return _needs_two_phase(call)
                case Verb.PREPARE:
                    assert handler is not None, "whoever asks for a vote has somebody to vote"
                    return await self._prepare(self._opened(), call, handler)
                case _:
                    return await self._complete(self._opened(), call)
        except PoolBusy:
            return InProgress(POLL_AFTER_S)

    async def _complete(self, opened: _Open, call: Call) -> Outcome:
        votes, life = opened.votes, VoteLife.of(call)

        async def complete(session: Session) -> Outcome:
            await votes.note_oldest_open(session, call.store_id, call.oldest_open_at_ms)
            if call.verb is Verb.EXECUTE:
                return await self._commit(votes, session, life)
            return await self._roll_back(votes, session, life, is_two_phase=call.two_phase)

        return await self._with_session(opened, complete)

    async def _with_session(self, opened: _Open, work: Callable[[Session], Awaitable[T]]) -> T:
        """Do work that is not cancelled half-way, on a connection of its own."""
        # Of the kind that votes use: others would take the place of theirs, one call after another.
        session = await opened.pool.take(
            is_async=self._kind(is_async=self._votes_are_async), timeout_s=self._busy_timeout_s
        )

        async def to_its_end() -> T:
            return await work(session)

        return await opened.pool.uncancelled(to_its_end(), session)

    def _kind(self, *, is_async: bool) -> bool:
        """Give the kind of connection for a kind of handler: its own, if there is that kind."""
        for_def, for_async = self.transaction_types
        wanted = for_async if is_async else for_def
        return is_async if wanted is not NoneType else not is_async

    # --- Prepare

    async def _prepare(self, opened: _Open, call: Call, handler: Handler) -> Outcome:
        name = GlobalId.of(call)
        if not name.fits:
            return Rejected(
                "global_id_too_long",
                "the ids of saga and step are too long for PostgreSQL's 199 bytes (together about "
                "130 characters): start such sagas with shorter ids",
            )
        self._votes_are_async = handler.is_async
        digest = request_hash(call)
        session = await opened.pool.take(
            is_async=self._kind(is_async=handler.is_async),
            timeout_s=self._busy_timeout_s,
            leaves_kept=True,
        )
        ballot = _Ballot(opened.votes, session, call, handler, name, digest)
        try:
            voted = await self._vote(ballot)
        except BaseException:
            # Also of a handler that took too long, in a thread: it may still be at it.
            opened.pool.give_back(session, was_cut=True)
            raise
        # From here on the vote may come to be; who leaves now must not tear the connection.
        return await opened.pool.uncancelled(self._end(ballot, voted), session)

    async def _vote(self, ballot: _Ballot) -> Outcome | HandlerFailed | None:
        """Run the handler in an open transaction that holds the vote's place; None: no place."""
        session, call, handler = ballot.session, ballot.call, ballot.handler
        if not await self._place(ballot, VoteState.VOTING):
            return None
        await session.set_savepoint()
        try:
            async with asyncio.timeout(self._max_hold_s):
                voted: Outcome | HandlerFailed = await session.answer(handler, call)
        except TimeoutError as error:
            raise HandlerFailed(
                f"the handler of prepare {call.action!r} held its transaction for more than "
                f"{self._max_hold_s:g} s; it was rolled back",
                cause_type="TimeoutError",
                where=handler.where,
            ) from error
        except HandlerFailed as failed:
            voted = failed
        if not session.is_usable:
            raise ConnectionLost("the connection to PostgreSQL was lost while the handler ran")
        return voted

    async def _end(self, ballot: _Ballot, voted: Outcome | HandlerFailed | None) -> Outcome:
        """Make of what the handler did what the runtime is told, durably."""
        session = ballot.session
        if voted is not None:
            try:
                voted = await self._settled(ballot, voted)
            except HandlerFailed:
                await session.roll_back()
                raise
            if isinstance(voted, Done):
                return voted
            await session.roll_back()
        match voted:
            case Rejected():
                if await self._place(ballot, VoteState.NO, voted):
                    await commit(session)
                    return voted
            case None:
                pass
            case _:  # InProgress and Broken leave nothing
                return voted
        return await self._told(ballot)

    async def _settled(self, ballot: _Ballot, voted: Outcome | HandlerFailed) -> Outcome:
        """Turn the handler's transaction into a vote if it said yes; `Done` only if it is one."""
        left = await _left(ballot.session)
        if left is _Left.ENDED:
            await ballot.session.roll_back()  # whatever the handler has begun since then
            if await self._place(ballot, VoteState.VOTING):
                await commit(ballot.session)
            return _ended(ballot.subject)
        match voted:
            case HandlerFailed():
                sqlstate = sqlstate_of(voted)
                if sqlstate not in HELD_UP:
                    raise voted
                return _locked(sqlstate)
            case Done() if left is _Left.FAILED:
                raise HandlerFailed(
                    f"{ballot.subject} voted yes after a statement of its transaction had failed: "
                    "nothing of it can be kept. Let the error pass, raise Rejected, or wrap a "
                    "statement that may fail in a connection.transaction() of its own",
                    cause_type=Done.__name__,
                    where=ballot.handler.where,
                )
            case Done(result=None):
                return await self._prepared(ballot, voted)
            case Done():
                raise HandlerFailed(
                    f"{ballot.subject} returned a result, and a vote carries none: return None. "
                    "What other steps need to know belongs into the saga's input",
                    cause_type=Done.__name__,
                    where=ballot.handler.where,
                )
            case _:
                return voted

    async def _prepared(self, ballot: _Ballot, voted: Done) -> Outcome:
        session = ballot.session
        try:
            await session.keep()
            if not await ballot.votes.say_yes(session, ballot.name.life):
                raise HandlerFailed(
                    f"{ballot.subject} has changed amends_votes, where its vote is kept: leave "
                    "that table alone",
                    cause_type=Done.__name__,
                    where=ballot.handler.where,
                )
            await session.prepare(str(ballot.name))
        except StatementFailed as error:
            match error.sqlstate:
                case sqlstate if sqlstate in HELD_UP:
                    return _locked(sqlstate)
                case SqlState.OUT_OF_MEMORY:
                    return Rejected(
                        LOCKED,
                        "the server has no place for another prepared transaction: as many as its "
                        "max_prepared_transactions are waiting for their decision",
                    )
                case SqlState.DUPLICATE_OBJECT:
                    return Broken(
                        "global_id_in_use",
                        f"{ballot.name} is prepared in another database of this server: two "
                        "participants answer for one step",
                    )
                case _:
                    raise _unprepared(ballot, error) from error
        return voted

    async def _place(
        self, ballot: _Ballot, state: VoteState, reply: Rejected | None = None
    ) -> bool:
        return await ballot.votes.place(
            ballot.session,
            ballot.name.life,
            state,
            Bounds(
                lock_s=self._lock_timeout_s,
                statement_s=self._max_hold_s,
                idle_s=self._max_hold_s + IDLE_MARGIN_S,
            ),
            digest=ballot.digest,
            reply=b"" if reply is None else outcome_to_wire(reply).SerializeToString(),
        )

    async def _told(self, ballot: _Ballot) -> Outcome:
        """Answer a Prepare by what is there already: the list first, then the row."""
        session, name = ballot.session, ballot.name
        prepared = await listed(session, name.life)
        vote = None if prepared else await ballot.votes.read(session, name.life)
        if not prepared and vote is None:
            return InProgress(POLL_AFTER_S)
        await wait_for_standbys(session, self._bounds)
        if vote is None:
            is_same = all(one.request == name.request for one in prepared)
            return Done() if is_same else _changed()
        if vote.state in {VoteState.ABORTED, VoteState.LOST}:
            return Rejected("fenced", f"the vote is over ({vote.state}); prepare came after that")
        if vote.state is VoteState.VOTING:
            return _ended(ballot.subject)
        if vote.request_hash != ballot.digest:
            return _changed()
        return _reply(vote) if vote.state is VoteState.NO else Done()

    # --- Execute and Compensate

    async def _commit(self, votes: Votes, session: Session, life: VoteLife) -> Outcome:
        for _ in range(LOOKS):
            for name in await listed(session, life):
                match await finish(session, "COMMIT PREPARED", name):
                    case Finish.DONE:
                        return Done()
                    case Finish.BUSY:
                        return InProgress(POLL_AFTER_S)
                    case Finish.GONE:
                        pass
            vote = await votes.read(session, life)
            if vote is not None:
                await wait_for_standbys(session, self._bounds)
                return _committed(vote)
            # Neither listed nor seen; but a Prepare may be at it, or on its way.
            if await votes.place(session, life, VoteState.LOST, self._bounds):
                await commit(session)
                return _vote_lost("there is neither a prepared transaction nor a trace of one")
        return InProgress(POLL_AFTER_S)

    async def _roll_back(
        self, votes: Votes, session: Session, life: VoteLife, *, is_two_phase: bool = True
    ) -> Outcome:
        for _ in range(LOOKS):
            for name in await listed(session, life):
                if await finish(session, "ROLLBACK PREPARED", name) is Finish.BUSY:
                    return InProgress(POLL_AFTER_S)
            if await votes.place(session, life, VoteState.ABORTED, self._bounds):
                await commit(session)
                return Done()
            vote = await votes.read(session, life)
            if vote is None:
                continue
            await wait_for_standbys(session, self._bounds)
            if vote.state is VoteState.VOTING:
                return _ended("its handler")
            if vote.state is not VoteState.YES:
                return Done()
            message = "the prepared transaction was committed, although it was to be rolled back"
            if is_two_phase:
                return Heuristic(True, "committed", message)
            return Broken("committed", message)
        return InProgress(POLL_AFTER_S)

    # ------------------------------------------------------------------- what is in doubt

    async def in_doubt(
        self, older_than_s: float = 0, *, after: str = "", limit: int = PAGE
    ) -> list[InDoubt]:
        """List the votes that wait for their decision; see `InDoubtSource`.

        They are read from the server's own list, so those of earlier processes are among them: all
        that is prepared in this database and has its row in this barrier's schema.
        """
        opened = self._opened()
        found = await self._with_session(
            opened, lambda session: opened.votes.in_doubt(session, older_than_s, after)
        )
        return found[:limit]

    async def resolve(self, in_doubt: InDoubt, decision: Decision) -> bool:
        """Commit or roll back what is in doubt; see `InDoubtSource`."""
        if not decision.is_final:
            raise ValueError(f"{decision} is no decision that can be carried out")
        opened = self._opened()
        life = VoteLife(in_doubt.store_id, in_doubt.saga_id, in_doubt.step, in_doubt.round)
        commits = decision is Decision.COMMIT
        return await self._with_session(
            opened, lambda session: self._settle(opened.votes, session, life, commits=commits)
        )

    async def _settle(
        self, votes: Votes, session: Session, life: VoteLife, *, commits: bool
    ) -> bool:
        """End what is listed, and see what has become of the vote; by rule 11."""
        command = "COMMIT PREPARED" if commits else "ROLLBACK PREPARED"
        for name in await listed(session, life):
            if await finish(session, command, name) is Finish.BUSY:
                return False
        vote = await votes.read(session, life)
        state = None if vote is None else vote.state
        await wait_for_standbys(session, self._bounds)
        if commits and state is VoteState.YES:
            return True
        if not commits and state not in {VoteState.YES, VoteState.VOTING}:
            return True
        found = "is gone without a trace" if state is None else f"is found as {state.value!r}"
        raise VoteNotSettled(
            f"the vote of saga {life.saga_id} step {life.step} round {life.round} was to be "
            + (
                f"committed, and {found}: the database was restored or exchanged, or somebody has "
                "rolled it back by hand"
                if commits
                else "rolled back, and was committed, by hand or by another decision"
            )
        )

    # ------------------------------------------------------------------------------- the rows

    async def purge(self, older_than_ms: int) -> int:
        """Delete rows of votes that are over, written more than `older_than_ms` ago; give how many.

        Choose the age as for `SqliteBarrier.purge`: beyond the oldest backup that could ever be
        restored. Rows that may belong to a saga that is still open stay, and what is prepared is
        never touched. Raises `BarrierError`.
        """
        if older_than_ms < 0:
            raise ValueError(f"older_than_ms is an age, and {older_than_ms} is negative")
        opened = self._opened()
        return await self._with_session(
            opened, lambda session: opened.votes.purge(session, older_than_ms)
        )


@dataclass(frozen=True, slots=True)
class _Ballot:
    """One Prepare on its way."""

    votes: Votes
    session: Session
    call: Call
    handler: Handler
    name: GlobalId
    digest: bytes
    """The request's hash."""

    @property
    def subject(self) -> str:
        """Whom messages are about."""
        return f"the handler of prepare {self.call.action!r}"


@dataclass(frozen=True, slots=True)
class _Open:
    """What there is while it is open."""

    pool: Pool
    votes: Votes


class _Left(enum.Enum):
    """How a handler has left the transaction that it was given."""

    OPEN = enum.auto()
    FAILED = enum.auto()
    """A statement of it has failed: PostgreSQL keeps nothing of it."""
    ENDED = enum.auto()
    """The handler has committed it or rolled it back, and perhaps begun another."""


async def _left(session: Session) -> _Left:
    if not session.in_transaction:
        return _Left.ENDED
    try:
        return _Left.OPEN if await postgres_rows.is_ours(session) else _Left.ENDED
    except StatementFailed as error:
        if error.sqlstate != SqlState.IN_FAILED_TRANSACTION:
            raise
    try:
        # In a failed one nothing can be asked before the savepoint is rolled back to.
        await session.undo()
        return _Left.FAILED if await postgres_rows.is_ours(session) else _Left.ENDED
    except StatementFailed:
        return _Left.ENDED


def _committed(vote: Vote) -> Outcome:
    match vote.state:
        case VoteState.YES:
            return Done()
        case VoteState.ABORTED:
            return Rejected("fenced", "the vote was rolled back; execute came after that")
        case VoteState.NO:
            return _vote_lost("the vote was no")
        case VoteState.VOTING:
            return _ended("its handler")
        case VoteState.LOST:
            return _vote_lost("there was no vote when that was first asked")


def _needs_two_phase(call: Call) -> Rejected:
    return Rejected(
        "two_phase_only",
        f"action {call.action!r} can only be prepared and then committed, and this {call.verb} "
        "belongs to no two-phase commit: use it in a definition with mode TWO_PHASE_COMMIT. "
        "Nothing was done",
    )


def _locked(sqlstate: str) -> Rejected:
    return Rejected(LOCKED, _WHY_LOCKED[sqlstate])


_WHY_LOCKED: Final[dict[str, str]] = {
    SqlState.LOCK_NOT_AVAILABLE: "somebody else holds a lock that this vote needs",
    SqlState.DEADLOCK_DETECTED: "this vote and somebody else waited for each other",
    SqlState.SERIALIZATION_FAILURE: "somebody else has changed what this vote had read",
}
assert _WHY_LOCKED.keys() == HELD_UP, "each of them has its words"


def _changed() -> Broken:
    return Broken(
        "request_changed",
        "this key was answered before for another request to prepare (other action, input or "
        "results); no reply is true for both",
    )


def _vote_lost(why: str) -> Broken:
    return Broken(
        "vote_lost",
        f"this branch is asked to commit, and {why}: the database was restored or exchanged, or "
        "somebody has rolled back by hand. What was voted for has no effect here",
    )


def _ended(subject: str) -> Broken:
    return Broken(
        "transaction_ended",
        f"{subject} ended its transaction by itself: what it wrote is part of no vote, and may be "
        "there. Look, and mend it by hand; a handler returns to vote yes and raises Rejected to "
        "vote no",
    )


def _unprepared(ballot: _Ballot, error: StatementFailed) -> HandlerFailed:
    """Say why a transaction that a handler was done with cannot be prepared."""
    cause = error.__cause__
    if error.sqlstate == SqlState.FEATURE_NOT_SUPPORTED and cause is not None:
        # The server's messages for it quote nothing.
        message = (
            f"{ballot.subject} did what PostgreSQL cannot prepare: {said_in(cause)}. Leave it out"
        )
    else:
        # Without the server's words: they may quote what the handler wrote.
        message = (
            f"what {ballot.subject} wrote cannot be prepared (SQLSTATE {error.sqlstate}): a "
            "deferred constraint or trigger refuses it"
        )
    return HandlerFailed(message, cause_type=type(cause).__name__, where=ballot.handler.where)


def _reply(vote: Vote) -> Outcome:
    try:
        return outcome_from_wire(participant_pb2.Outcome.FromString(vote.reply))
    except (DecodeError, ValueError) as error:
        raise BarrierError("the stored reply of a vote cannot be read") from error
