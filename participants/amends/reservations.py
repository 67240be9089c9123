"""Reservations: Try, Confirm and Cancel over a number in the author's own table.

::

    bank = Participant("bank", barrier=SqliteBarrier("bank.db", schema=SCHEMA))
    holds = Reservations("accounts", key="account", quantity="balance_cents")
    holds.takes(bank, "debit", lambda call: Hold(call.json()["from"], call.json()["cents"]))
    holds.gives(bank, "credit", lambda call: Hold(call.json()["to"], call.json()["cents"]))

Each of the two registers all three verbs of an action for two-phase commit. Prepare is Try: it
holds the amount and moves nothing. Execute is Confirm: it moves what is held. Compensate is Cancel:
it lets go. What holds are, and why no two can count on the same amount, stands in
`barrier/holds.py`.

The vote's refusals are ``unknown_key``, ``insufficient``, ``too_much`` (the column cannot hold the
sum), ``invalid_amount``, ``invalid_key``, and ``LOCKED`` (PostgreSQL: somebody else is at that row;
the same again may succeed).
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar, cast, overload

from amends.barrier.holds import (
    IDENTIFIER,
    MAX_AMOUNT,
    Direction,
    Hold,
    Holds,
    Steps,
    dialect_of,
    is_lock_refused,
    now_ms,
    run,
    run_async,
)
from amends.barrier.sqlite import Transaction
from amends.barrier.verdict import POLL_AFTER_S
from amends.errors import InvalidReservation, VoteNotSettled
from amends.handler import Handler, is_async, locate
from amends.in_doubt import PAGE, Decision, InDoubt
from amends.outcomes import Call, Done, InProgress, Outcome, Rejected, Verb
from amends.participant import Participant
from amends.wire import call_of_resolver

T = TypeVar("T")

HoldOf: TypeAlias = Callable[[Call], Hold]
"""Says what an action wants, from its call. May raise `Rejected`."""

OnHold: TypeAlias = Callable[[Call, Any, Hold], object]
"""The author's own writes beside a hold, in its transaction: ``(call, tx, hold)``."""

DEFAULT_LOCK_TIMEOUT_S: Final = 0.1
"""A vote has a row for some milliseconds; who waits much longer for it waits for something else."""

_VERB_OF: Final = {Decision.COMMIT: Verb.EXECUTE, Decision.ABORT: Verb.COMPENSATE}


class Reservations:
    """Holds on one quantity of one table; see the module's beginning.

    `table` has a row for each account, product, … (for PostgreSQL also ``schema.table``), and is
    neither a view nor a partition or child of another table, nor one that forgets (TEMP,
    UNLOGGED); `key` is a column that is unique by itself, a text, a whole number or a uuid;
    `quantity` the column with a whole number: smallint, integer or bigint in PostgreSQL. They are
    names of your code, never of a caller's; however a table is spelled, its holds are the same.
    Opening the barrier fails if anything of this is not so.

    In the table's own schema lie ``amends_reservations`` and ``amends_reservations_pools``, which
    an opening makes if they are not there (so a migration may make them, and the participant needs
    no right to). Several participants may reserve from one table, if all name its rows by the same
    `key`: by two, one row would be held twice, so an opening with another one fails. What is in
    doubt is each one's own, by its name: who renames a participant gives it the old name as an
    alias.

    In PostgreSQL a vote waits at most `lock_timeout_s` for somebody else's lock on the row, then it
    is refused as ``LOCKED``; 0 does not wait at all. SQLite has one writer: there is nothing to
    wait for.

    It is also an `InDoubtSource`, for `InDoubtResolver`. Raises `InvalidReservation` for names that
    are none.
    """

    def __init__(
        self,
        table: str,
        *,
        key: str,
        quantity: str,
        lock_timeout_s: float = DEFAULT_LOCK_TIMEOUT_S,
    ) -> None:
        whole: object = table
        parts = whole.split(".") if isinstance(whole, str) else [whole]
        if not 1 <= len(parts) <= 2:
            raise InvalidReservation("table= is the name of a table, or schema.table")
        for name in parts:
            _check_name("table", name)
        _check_name("key", key)
        _check_name("quantity", quantity)
        if table.rpartition(".")[2].lower().startswith("amends_"):
            raise InvalidReservation(f"{table} is a table of amends; name your own")
        if not 0 <= lock_timeout_s <= MAX_AMOUNT:
            raise InvalidReservation("lock_timeout_s= is a number of seconds, 0 or more")
        self._names = {"table": table, "key": key, "quantity": quantity}
        self._lock_timeout_s = lock_timeout_s
        self._participants: list[Participant] = []
        self._holds: Holds | None = None
        self._handlers: dict[tuple[str, str, Verb], Handler] = {}

    def __repr__(self) -> str:
        return f"<Reservations of {self._names['table']}.{self._names['quantity']}>"

    # ------------------------------------------------------------------------------ the actions

    def takes(
        self,
        participant: Participant,
        action: str,
        hold_of: HoldOf,
        *,
        on_try: OnHold | None = None,
        on_confirm: OnHold | None = None,
        on_cancel: OnHold | None = None,
    ) -> None:
        """Register an action that takes from the quantity, with all three verbs.

        `hold_of` says which row and how much, and is called in Prepare alone. The others are for
        writes of your own, such as a line in a ledger; they are called with ``(call, tx, hold)`` in
        the transaction that makes, confirms or cancels the hold, once for each that is kept:
        functions for a `SqliteBarrier`, functions or `async def` for a `PostgresBarrier`. `on_try`
        may raise `Rejected`; the two others must succeed in the end, since a vote is a promise. An
        `on_cancel` is not called where there was no hold. A call that the resolver makes
        (`Call.from_resolver`) has the input and the results that Prepare had.

        Raises `InvalidReservation` if the participant has no database that this can lie in, or
        another one than before.
        """
        self._register(
            participant, action, Direction.TAKES, hold_of, (on_try, on_confirm, on_cancel)
        )

    def gives(
        self,
        participant: Participant,
        action: str,
        hold_of: HoldOf,
        *,
        on_try: OnHold | None = None,
        on_confirm: OnHold | None = None,
        on_cancel: OnHold | None = None,
    ) -> None:
        """Register an action that gives to the quantity: nothing is available before Confirm.

        Otherwise as `takes`.
        """
        self._register(
            participant, action, Direction.GIVES, hold_of, (on_try, on_confirm, on_cancel)
        )

    # ----------------------------------------------------------------------------------- looking

    @overload
    def available(self, tx: Transaction, key: str | int, *, lock: bool = True) -> int | None: ...

    @overload
    def available(self, tx: Any, key: str | int, *, lock: bool = True) -> Awaitable[int | None]: ...

    def available(
        self, tx: Any, key: str | int, *, lock: bool = True
    ) -> int | Awaitable[int | None] | None:
        """Give how much of a row is free: its quantity less what is held. None: no such row.

        `tx` is the transaction, or for PostgreSQL the connection, and there it has to be awaited.
        For code of yours that takes from the quantity outside any saga: ask here, in the same
        transaction, and take no more than that. In PostgreSQL the row is locked until your
        transaction ends, so that no vote can hold what you take; with ``lock=False`` you only look.
        """
        holds, _ = self._bound()
        steps, dialect = holds.available(key, lock=lock), holds.dialect
        return run_async(steps, dialect, tx) if dialect.is_async else run(steps, dialect, tx)

    # -------------------------------------------------------------------------- what is in doubt

    async def in_doubt(
        self, older_than_s: float = 0, *, after: str = "", limit: int = PAGE
    ) -> list[InDoubt]:
        """List the participant's holds that are at least so old; see `InDoubtSource`."""
        holds, _ = self._bound()
        names = [name for one in self._participants for name in (one.name, *one.aliases)]
        since_before_ms = now_ms() - round(older_than_s * 1000)
        return await self._in_transaction(
            holds.old(since_before_ms, of=names, after=after, limit=limit)
        )

    async def resolve(self, in_doubt: InDoubt, decision: Decision) -> bool:
        """Confirm or cancel a hold as the runtime decided; see `InDoubtSource`.

        Through the barrier, by the same rules as a call of the runtime's, and with a row: what the
        runtime sends later is answered from it. When it is settled there is no hold any more.
        Raises `VoteNotSettled` if the rules or a handler of yours say something else than `Done`.
        """
        verb = _VERB_OF.get(decision)
        if verb is None:
            raise ValueError(f"{decision} decides nothing: what is in doubt stays as it is")
        holds, barrier = self._bound()
        found = await self._in_transaction(holds.request(in_doubt))
        if found is None:
            return True  # somebody was quicker
        participant, request = found
        call = call_of_resolver(request, verb)
        handler = self._handler_of(participant, call)
        outcome = await barrier.run(call, handler)
        match outcome:
            case Done():
                pass
            case InProgress():
                return False
            case _:
                raise VoteNotSettled(
                    f"saga {call.saga_id} step {call.step} was to {decision.lower()}, and answers "
                    f"{type(outcome).__name__}: {outcome}"
                )
        if not await self._in_transaction(holds.is_living(call)):
            return True
        if verb is Verb.COMPENSATE:
            # It was rolled back before: what is held all the same, after a repair by hand, goes.
            return isinstance(await barrier.write(partial(handler.function, call)), Done)
        raise VoteNotSettled(
            f"saga {call.saga_id} step {call.step} was confirmed before, and there is a hold of it "
            "all the same: somebody has put it back. Look whether the amount was moved, and delete "
            "the hold"
        )

    # ---------------------------------------------------------------------------------- the parts

    def _register(
        self,
        participant: Participant,
        action: str,
        direction: Direction,
        hold_of: HoldOf,
        on: tuple[OnHold | None, OnHold | None, OnHold | None],
    ) -> None:
        holds = self._bind(participant)
        self._check_functions(action, hold_of, on)
        on_try, on_confirm, on_cancel = on

        def vote(call: Call) -> tuple[Steps[Hold | None], OnHold | None]:
            wanted = _checked(hold_of(call), hold_of)
            return holds.hold(call, direction, wanted, participant.name), on_try

        def commit(call: Call) -> tuple[Steps[Hold | None], OnHold | None]:
            if not call.two_phase:
                raise Rejected(
                    "two_phase_only",
                    "this action reserves first: it takes part in two-phase commits alone",
                )
            return holds.confirm(call), on_confirm

        def roll_back(call: Call) -> tuple[Steps[Hold | None], OnHold | None]:
            return holds.cancel(call), on_cancel

        for verb, register, begin in (
            (Verb.PREPARE, participant.prepare, vote),
            (Verb.EXECUTE, participant.execute, commit),
            (Verb.COMPENSATE, participant.compensate, roll_back),
        ):
            function = _handler(holds, begin, hold_of)
            if verb is Verb.COMPENSATE:
                function.finds_held = _finder(holds)  # type: ignore[attr-defined]  # see `Handler`
            register(action)(function)
            self._handlers[participant.name, action, verb] = Handler(
                verb=verb,
                action=action,
                function=function,
                where=locate(hold_of),
                is_async=holds.dialect.is_async,
                takes_transaction=True,
            )

    def _bind(self, participant: Participant) -> Holds:
        if self._holds is None:
            barrier: Any = participant.barrier
            holds = Holds(dialect_of(barrier), **self._names, lock_timeout_s=self._lock_timeout_s)
            barrier.add_schema(holds.schema)
            self._holds = holds
        elif self._bound()[1] is not participant.barrier:
            raise InvalidReservation(
                f"{self!r} lies in the database of another participant: make one for each database"
            )
        if participant not in self._participants:
            self._participants.append(participant)
        return self._holds

    def _bound(self) -> tuple[Holds, Any]:
        if self._holds is None:
            raise InvalidReservation(f"{self!r} has no action yet: call takes() or gives() first")
        return self._holds, self._participants[0].barrier

    def _handler_of(self, name: str, call: Call) -> Handler:
        """Give what settles a hold that a participant of this name has made."""
        for one in self._participants:
            handler = self._handlers.get((one.name, call.action, call.verb))
            if name in (one.name, *one.aliases) and handler is not None:
                return handler
        raise VoteNotSettled(
            f"saga {call.saga_id} step {call.step} holds by action {call.action!r} of participant "
            f"{name}, which is registered no more by {self!r}"
        )

    def _check_functions(self, action: str, hold_of: HoldOf, on: tuple[OnHold | None, ...]) -> None:
        given: object = hold_of
        if not callable(given) or is_async(given):
            raise InvalidReservation(
                f"{action!r}: the function that gives its Hold is a plain function of the call"
            )
        for function in on:
            given = function
            if given is None:
                continue
            if not callable(given):
                raise InvalidReservation(f"{action!r}: {given!r} is not a function")
            if is_async(given) and not self._is_async:
                raise InvalidReservation(
                    f"{action!r}: {locate(given)} is async, and a SqliteBarrier's reservations "
                    "call plain functions"
                )

    @property
    def _is_async(self) -> bool:
        return self._bound()[0].dialect.is_async

    async def _in_transaction(self, steps: Steps[T]) -> T:
        holds, barrier = self._bound()

        async def work_async(connection: Any) -> T:
            return await run_async(steps, holds.dialect, connection)

        def work(transaction: Any) -> T:
            return run(steps, holds.dialect, transaction)

        value: T = await barrier.write(work_async if holds.dialect.is_async else work)
        return value


Begin: TypeAlias = Callable[[Call], tuple[Steps[Hold | None], OnHold | None]]
"""Gives what a verb does with holds, and the author's function that comes after it."""


def _handler(holds: Holds, begin: Begin, hold_of: HoldOf) -> Callable[[Call, Any], Any]:
    """Make a handler of the kind that the database wants, in the author's name."""
    dialect = holds.dialect

    def answer(call: Call, tx: Any) -> Outcome:
        steps, then = begin(call)
        hold = run(steps, dialect, tx)
        if then is not None and hold is not None and inspect.isawaitable(then(call, tx, hold)):
            raise InvalidReservation(
                "a function of a SqliteBarrier's reservation gave an awaitable"
            )
        return Done()

    async def answer_async(call: Call, tx: Any) -> Outcome:
        try:
            steps, then = begin(call)
            hold = await run_async(steps, dialect, tx)
            if then is not None and hold is not None:
                given = then(call, tx, hold)
                if inspect.isawaitable(given):
                    await given
        except Exception as error:
            if not is_lock_refused(error):
                raise
            if call.verb is Verb.PREPARE:
                raise Rejected("LOCKED", "somebody else is at the same row") from error
            # Who has promised may not refuse, and who holds the row will let go of it.
            return InProgress(POLL_AFTER_S)
        return Done()

    handler: Any = answer_async if dialect.is_async else answer
    # What is wrong with an action is told with the line of the author's function, not of ours.
    handler.__signature__ = inspect.signature(handler)
    handler.__wrapped__ = hold_of
    return cast("Callable[[Call, Any], Any]", handler)


def _finder(holds: Holds) -> Callable[[Call, Any], Any]:
    """Make a function that tells whether a call's life has a hold, of the kind of its handler."""

    def find(call: Call, tx: Any) -> bool:
        return run(holds.is_living(call), holds.dialect, tx)

    async def find_async(call: Call, tx: Any) -> bool:
        return await run_async(holds.is_living(call), holds.dialect, tx)

    return find_async if holds.dialect.is_async else find


def _checked(hold: object, hold_of: HoldOf) -> Hold:
    if not isinstance(hold, Hold):
        raise InvalidReservation(
            f"{locate(hold_of)} gave an object of type {type(hold).__name__}, and no Hold"
        )
    return hold


def _check_name(argument: str, name: object) -> None:
    if not isinstance(name, str) or IDENTIFIER.fullmatch(name) is None:
        raise InvalidReservation(
            f"{argument}={name!r} is not a name that reservations can use: letters, digits and _, "
            "not beginning with a digit, at most 63"
        )
