"""`serve` refuses a participant that is wrong, and says where."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, assert_type

import asyncpg
import psycopg
import pytest

from amends import (
    AsyncTransaction,
    Call,
    InvalidParticipant,
    Participant,
    PreparedTransactions,
    SqliteBarrier,
    Transaction,
    Verb,
    serve,
)


@pytest.fixture
def payments(tmp_path: Path) -> Participant:
    """Give a participant with a barrier and no actions."""
    return Participant("payments", barrier=SqliteBarrier(tmp_path / "payments.db"))


@pytest.fixture
def bank() -> Participant:
    """Give a participant whose barrier completes votes, and no actions; it is never opened."""
    return Participant("bank", barrier=PreparedTransactions("postgresql://nobody@127.0.0.1:1/none"))


def do(call: Call) -> None:
    """Do something."""


def undo(call: Call) -> None:
    """Undo it."""


def line_of(function: Callable[..., object]) -> str:
    """Give file and line of a function, as Python itself knows them."""
    return f"{inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1]}"


def refused(participant: Participant) -> tuple[str, ...]:
    """Serve, and give the faults that are found."""
    with pytest.raises(InvalidParticipant) as caught:
        serve(participant)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_an_execute_needs_a_compensation(payments: Participant) -> None:
    """Or the word that there is none."""
    payments.execute("charge")(do)
    (problem,) = refused(payments)
    assert problem.startswith(f"{line_of(do)}: execute 'charge' has no compensate;")
    assert "compensatable=False" in problem


def test_an_action_without_compensation_says_so(payments: Participant) -> None:
    """Then it is served, and reports its actions."""
    payments.execute("charge", compensatable=False)(do)
    assert payments.actions() == ["charge"]
    assert set(payments.handlers()) == {("charge", Verb.EXECUTE)}


@pytest.mark.parametrize("verb", [Verb.COMPENSATE, Verb.PREPARE], ids=str)
def test_a_verb_without_execute_is_refused(payments: Participant, verb: Verb) -> None:
    """A compensation or a vote for nothing."""
    payments.execute("other", compensatable=False)(do)
    getattr(payments, verb)("charge")(undo)
    assert refused(payments) == (f"{line_of(undo)}: {verb} 'charge' has no execute",)


def test_where_votes_are_completed_a_vote_is_enough(bank: Participant) -> None:
    """Nothing else is to be written beside it, and the action is known by it."""
    bank.prepare("debit")(do)
    assert bank.actions() == ["debit"]
    assert set(bank.handlers()) == {("debit", Verb.PREPARE)}
    assert repr(bank) == "<Participant 'bank': debit>"


@pytest.mark.parametrize(
    ("verb", "does"), [(Verb.EXECUTE, "commits"), (Verb.COMPENSATE, "rolls back")], ids=str
)
def test_where_votes_are_completed_nothing_else_is_written(
    bank: Participant, verb: Verb, does: str
) -> None:
    """It would never run, and its author would believe that it does."""
    bank.prepare("debit")(do)
    getattr(bank, verb)("debit")(undo)
    (problem,) = refused(bank)
    assert problem == (
        f"{line_of(undo)}: {verb} 'debit' would never run: PreparedTransactions {does} by itself "
        "what prepare has done; remove it, and write prepare 'debit' alone"
    )


def test_where_votes_are_completed_there_must_be_one(bank: Participant) -> None:
    """And duplicates are found as anywhere."""
    assert refused(bank) == ('no action is registered: decorate a function with @….prepare("…")',)
    bank.prepare("debit")(do)
    bank.prepare("debit")(undo)
    (problem,) = refused(bank)
    assert problem.startswith(f"{line_of(undo)}: prepare 'debit' is registered twice")


def test_a_driver_without_connections_for_a_kind_of_handler(bank: Participant) -> None:
    """There is none of asyncpg for `def` handlers: told with the line, and what to write."""

    @bank.prepare("debit")
    def debit(call: Call, connection: Any) -> None: ...

    (problem,) = refused(bank)
    assert problem.startswith(f"{line_of(debit)}: prepare 'debit' is def and takes a transaction")
    assert "PreparedTransactions has one for async def handlers only, of type Connection" in problem


def test_the_wrong_connection_is_refused() -> None:
    """Whatever parameters its annotation has; the right one is not."""
    barrier = PreparedTransactions("postgresql://nobody@127.0.0.1:1/none", driver="psycopg")
    bank = Participant("bank", barrier=barrier)

    @bank.prepare("debit")
    def debit(call: Call, connection: "psycopg.AsyncConnection[Any]") -> None: ...

    @bank.prepare("credit")
    async def credit(call: Call, connection: "psycopg.AsyncConnection[Any]") -> None: ...

    (problem,) = refused(bank)
    assert "prepare 'debit' is def and annotates its transaction as AsyncConnection" in problem


def test_the_right_connection_is_taken(bank: Participant) -> None:
    """As the driver's own type says."""

    @bank.prepare("debit")
    async def debit(call: Call, connection: "asyncpg.Connection[Any]") -> None: ...

    assert bank.handlers()["debit", Verb.PREPARE].takes_transaction


def test_a_misspelt_action_is_recognised(payments: Participant) -> None:
    """Both ends are named, each with the other's name."""
    payments.execute("charge")(do)
    payments.compensate("chrage")(undo)
    first, second = refused(payments)
    assert "execute 'charge' has no compensate (is 'chrage' misspelt, or this?)" in first
    assert "compensate 'chrage' has no execute (is 'charge' misspelt, or this?)" in second


def test_contradictions_are_refused(payments: Participant) -> None:
    """compensatable=False beside a compensation."""
    payments.execute("charge", compensatable=False)(do)
    payments.compensate("charge")(undo)
    (problem,) = refused(payments)
    assert "says compensatable=False, and there is a compensate for it" in problem


def test_what_is_prepared_needs_a_compensation_and_no_word_that_there_is_none(
    payments: Participant,
) -> None:
    """The word would be refused next."""
    payments.prepare("charge")(do)
    payments.execute("charge")(do)
    (problem,) = refused(payments)
    assert problem == f"{line_of(do)}: execute 'charge' has no compensate; write one"


@pytest.mark.parametrize("has_compensate", [False, True])
def test_what_is_prepared_must_be_able_to_be_rolled_back(
    payments: Participant, *, has_compensate: bool
) -> None:
    """A vote with nothing to undo it would hold for ever what an abort should let go."""
    payments.prepare("charge")(do)
    payments.execute("charge", compensatable=False)(do)
    if has_compensate:
        payments.compensate("charge")(undo)
    (problem,) = refused(payments)
    assert problem == (
        f"{line_of(do)}: execute 'charge' says compensatable=False, and there is a prepare for "
        "it: what is prepared must be able to be rolled back; leave compensatable=False out, and "
        "write a compensate"
    )


def test_duplicates_are_refused(payments: Participant) -> None:
    """With the place of the first."""
    payments.execute("charge", compensatable=False)(do)
    payments.execute("charge", compensatable=False)(undo)
    (problem,) = refused(payments)
    assert problem.startswith(f"{line_of(undo)}: execute 'charge' is registered twice")
    assert problem.endswith(line_of(do))


def nothing() -> None:
    """Have a shape."""


def three(call: Call, tx: Transaction, currency: str) -> None:
    """Have a shape."""


def default(call: Call, tx: Transaction, currency: str = "EUR") -> None:
    """Have a shape."""


def several(*calls: Call) -> None:
    """Have a shape."""


def keyword(call: Call, *, currency: str) -> None:
    """Have a shape."""


def swapped(tx: Transaction, call: Call) -> None:
    """Have a shape."""


class Service:
    def method(self, call: Call) -> None: ...


@pytest.mark.parametrize(
    "function",
    [nothing, three, default, several, keyword, swapped, Service.method],
    ids=lambda function: function.__name__,
)
def test_a_wrong_signature_is_refused(payments: Participant, function: Callable[..., None]) -> None:
    """A handler takes (call) or (call, tx); file and line name the one that does not."""
    payments.execute("charge", compensatable=False)(function)
    (problem,) = refused(payments)
    assert problem.startswith(f"{line_of(function)}: execute 'charge' ")


def test_a_generator_and_a_class_are_refused(payments: Participant) -> None:
    """Neither is called and answers."""

    def generator(call: Call) -> Any:
        yield call

    payments.execute("charge", compensatable=False)(generator)
    payments.execute("ship", compensatable=False)(dict)  # type: ignore[type-var]
    first, second = sorted(refused(payments))
    assert "execute 'ship' is not a function" in first + second
    assert "is a generator; return, do not yield" in first + second


def test_a_barrier_has_to_be_said() -> None:
    """Whether there is one decides what repeated calls do, so nobody goes without by oversight."""
    with pytest.raises(TypeError) as caught:
        Participant("payments")  # type: ignore[call-overload]
    assert str(caught.value) == (
        "Participant('payments'): say barrier=amends.SqliteBarrier(…), or barrier=None if an "
        "effect outside any database makes that impossible: then repeated calls run the handler "
        "again"
    )


@pytest.mark.parametrize("is_without", [True, False], ids=["without", "with"])
async def test_serving_without_a_barrier_is_said_once(
    payments: Participant, caplog: pytest.LogCaptureFixture, *, is_without: bool
) -> None:
    """In one line of the log, at the start; with one there is none."""
    participant = Participant("cars", barrier=None) if is_without else payments
    participant.execute("rent", compensatable=False)(do)
    with caplog.at_level("INFO", logger="amends"):
        async with serve(participant):
            pass
    said = [r.getMessage() for r in caplog.records if "barrier" in r.getMessage()]
    assert said == is_without * [
        "participant cars has no barrier: repeated calls run its handlers again"
    ]


def test_a_transaction_needs_a_barrier() -> None:
    """Without one there is no transaction to give."""
    payments = Participant("payments", barrier=None)

    @payments.execute("charge", compensatable=False)
    def charge(call: Call, tx: Transaction) -> None: ...

    (problem,) = refused(payments)
    assert problem.startswith(f"{line_of(charge)}: execute 'charge' takes a transaction")


@pytest.mark.parametrize("path", ["p.db", Path("p.db")], ids=["str", "Path"])
def test_a_path_is_no_barrier(path: Any) -> None:
    """The line says what to write; the other faults are told as well."""
    payments = Participant("payments", barrier=path)

    @payments.execute("charge")
    def charge(call: Call, tx: Transaction) -> None: ...

    barrier, compensate = sorted(refused(payments), key=lambda problem: "compensate" in problem)
    assert barrier == 'barrier= was given a path: write barrier=SqliteBarrier("p.db")'
    assert "execute 'charge' has no compensate" in compensate


@pytest.mark.parametrize(
    ("barrier", "problem"),
    [
        (SqliteBarrier, 'barrier= was given a class: write barrier=SqliteBarrier("…")'),
        (7, "barrier= was given an object of type int, which has no transaction_types, open, run,"),
    ],
    ids=["class", "int"],
)
def test_what_is_no_barrier_is_refused(barrier: Any, problem: str) -> None:
    """Before anything is served with it."""
    payments = Participant("payments", barrier=barrier)
    payments.execute("charge", compensatable=False)(do)
    (found,) = refused(payments)
    assert found.startswith(problem)


def test_the_wrong_kind_of_transaction_is_refused(payments: Participant) -> None:
    """An async handler that is told of a Transaction would forget to await it, and vice versa."""

    @payments.execute("charge", compensatable=False)
    async def charge(call: Call, tx: Transaction) -> None: ...

    @payments.execute("ship", compensatable=False)
    def ship(call: Call, tx: AsyncTransaction) -> None: ...

    first, second = refused(payments)
    assert "is async def and annotates its transaction as Transaction" in first
    assert "is def and annotates its transaction as AsyncTransaction" in second


def test_a_decorator_without_an_action_name_is_refused(payments: Participant) -> None:
    """`@payments.execute` instead of `@payments.execute("charge")`; the name stays a function."""
    payments.execute("other", compensatable=False)(do)
    decorated: object = payments.execute(undo)  # type: ignore[arg-type]
    assert decorated is undo
    (problem,) = refused(payments)
    assert problem.startswith(f"{line_of(undo)}: @payments.execute has no action name")


def test_a_decorator_that_decorates_nothing_is_refused(payments: Participant) -> None:
    """The line of the call is named."""
    payments.execute("other", compensatable=False)(do)
    payments.compensate("other")
    (problem,) = refused(payments)
    assert problem.startswith(f"{__file__}:")
    assert problem.endswith('.compensate("other") decorates nothing')


def test_an_undecorated_function_that_looks_meant_is_refused(
    payments: Participant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands beside a handler, takes a Call, and is named by a verb."""

    def compensate_charge(call: Call) -> None: ...

    payments.execute("charge", compensatable=False)(do)
    monkeypatch.setitem(globals(), "compensate_charge", compensate_charge)
    (problem,) = refused(payments)
    assert problem.startswith(f"{line_of(compensate_charge)}: compensate_charge takes a Call")


@pytest.mark.parametrize("name", ["", "Pay ments", "p" * 65, 7], ids=str)
def test_a_bad_name_is_refused(name: Any) -> None:
    """For the participant and for an action; both at once."""
    participant = Participant(name, barrier=None)
    participant.execute(name, compensatable=False)(do)
    assert any("is not one for a participant" in problem for problem in refused(participant))
    if name != "Pay ments":
        assert any("is not a name for an action" in problem for problem in refused(participant))


@pytest.mark.parametrize(
    ("aliases", "problem"),
    [
        (["Pay ments"], "the alias 'Pay ments' is not a name for a participant: use lower-case "),
        (["p" * 49], "is not a name for a participant: use lower-case "),
        ([7], "the alias 7 is not a name for a participant: use lower-case "),
        ("payments-eu", "aliases= was given a text: write aliases=['payments-eu']"),
        (None, "aliases= was given an object of type NoneType: give it a list of names"),
    ],
    ids=str,
)
def test_bad_aliases_are_refused(aliases: Any, problem: str) -> None:
    """They are names like the participant's own."""
    participant = Participant("payments", barrier=None, aliases=aliases)
    participant.execute("charge", compensatable=False)(do)
    [found] = refused(participant)
    assert problem in found


def test_a_participant_without_actions_is_refused(payments: Participant) -> None:
    """There is nothing to serve."""
    assert refused(payments) == (
        'no action is registered: decorate a function with @….execute("…")',
    )


def test_all_faults_are_told_at_once(payments: Participant) -> None:
    """Nobody mends one to hear of the next."""
    payments.execute("a")(do)
    payments.execute("b")(nothing)  # type: ignore[type-var]
    payments.compensate("c")(undo)
    assert len(refused(payments)) == 4


def test_methods_partials_and_callable_objects_are_handlers(payments: Participant) -> None:
    """Whatever takes a call is one."""

    class Shipping:
        async def __call__(self, call: Call, tx: AsyncTransaction) -> None: ...

        def cancel(self, call: Call) -> None: ...

    shipping = Shipping()
    payments.execute("ship")(shipping)
    payments.compensate("ship")(shipping.cancel)
    payments.execute("mail", compensatable=False)(partial(three, currency="EUR"))
    payments.execute("note", compensatable=False)(partial(do))
    handlers = payments.handlers()
    assert handlers["ship", Verb.EXECUTE].is_async
    assert handlers["ship", Verb.EXECUTE].takes_transaction
    assert not handlers["ship", Verb.COMPENSATE].is_async
    assert not handlers["note", Verb.EXECUTE].takes_transaction


def test_decorators_keep_the_functions_type(payments: Participant) -> None:
    """For type checkers the function is what it was, and for Python the very same."""

    @payments.execute("charge", compensatable=False)
    def charge(call: Call, tx: Transaction) -> dict[str, int]:
        return {"charged": 1}

    @payments.execute("ship", compensatable=False)
    async def ship(call: Call, tx: AsyncTransaction) -> bytes:
        return b""

    decorated = payments.compensate("other")(undo)
    assert_type(
        decorated(
            Call(
                verb=Verb.EXECUTE,
                action="a",
                saga_id="s",
                step="t",
                round=1,
                idempotency_key="k",
                store_id="i",
            )
        ),
        None,
    )
    typed: Callable[[Call, Transaction], dict[str, int]] = charge
    typed_async: Callable[[Call, AsyncTransaction], Any] = ship
    assert typed is charge
    assert typed_async is ship
    assert decorated is undo
