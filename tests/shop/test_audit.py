"""The auditor finds nothing in honest ledgers, and everything that is planted in broken ones."""

# ruff: noqa: S608  # the statements are ours, and breaking databases is the point

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest

from shop.audit import AFTER, audit, databases_in, main
from shop.catalogue import ACTIONS
from shop.definition import order as order_definition
from tests.shop.calls import Shop, order_input


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    """Give a shop that has seen a completed, a compensated and a refused order."""
    async with Shop(tmp_path) as shop:
        await shop.complete("saga-done")
        await shop.complete("saga-cups", sku="cup", quantity=12, customer="customer-03")
        await shop.decline("saga-undone")
        shop.journal.starting("saga-refused", order_input())
        shop.journal.refused("saga-refused")
        yield shop


def findings(shop: Shop) -> set[tuple[str, str]]:
    """Audit, and give what was found as (rule, saga or service)."""
    report = audit(shop.databases, shop.journal_path)
    return {(violation.rule, violation.where) for violation in report.violations}


def tamper(shop: Shop, service: str, *statements: str) -> None:
    """Change a service's database behind its back, ledger included."""
    with closing(sqlite3.connect(shop.databases[service])) as connection:
        connection.execute("DROP TRIGGER IF EXISTS effects_are_not_changed")
        connection.execute("DROP TRIGGER IF EXISTS effects_are_not_deleted")
        for statement in statements:
            connection.execute(statement)
        connection.commit()


# What can be planted. Each gives a function that does it; the lines of a ledger are found by saga
# and effect.

Plant = Callable[[Shop], None]


def run(service: str, *statements: str) -> Plant:
    """Run SQL on a service's database."""
    return lambda shop: tamper(shop, service, *statements)


def forget(service: str, saga_id: str, effect: str) -> Plant:
    """Take an effect out of the ledger."""
    return run(service, f"DELETE FROM effects {of(saga_id, effect)}")


def change(service: str, saga_id: str, effect: str, /, **changes: object) -> Plant:
    """Rewrite columns of an effect; values are SQL."""
    settings = ", ".join(f"{column} = {value}" for column, value in changes.items())
    return run(service, f"UPDATE effects SET {settings} {of(saga_id, effect)}")


def repeat(service: str, saga_id: str, effect: str, /, **changes: object) -> Plant:
    """Append an effect to the ledger once more, with some columns changed; values are SQL."""
    values = ", ".join(str(changes.get(column, column)) for column in COLUMNS)
    return run(
        service,
        f"INSERT INTO effects ({', '.join(COLUMNS)})"
        f" SELECT {values} FROM effects {of(saga_id, effect)}",
    )


def tell(saga_id: str, *, end: str = "") -> Plant:
    """Tell the journal of an acknowledged saga without effects, and perhaps of its end."""
    return lambda shop: lost(shop, saga_id, end)


def of(saga_id: str, effect: str) -> str:
    """Give the condition for one line of the ledger."""
    return f"WHERE saga_id = '{saga_id}' AND effect = '{effect}'"


def lost(shop: Shop, saga_id: str, end: str = "") -> None:
    """Tell the journal of an acknowledged saga without effects, and perhaps of its end."""
    shop.journal.starting(saga_id, order_input())
    shop.journal.acknowledged(saga_id)
    if end:
        shop.journal.ended(saga_id, end)


COLUMNS = (
    "at_ms",
    "clock_ns",
    "saga_id",
    "step",
    "effect",
    "key",
    "order_id",
    "subject",
    "quantity",
    "amount_cents",
)

MUCH_LATER = "clock_ns + 1000000000000"

PLANTED: dict[str, tuple[Plant, tuple[str, str]]] = {
    "a charge is made twice": (
        repeat("payments", "saga-done", "charge"),
        ("twice", "saga-done"),
    ),
    "a parcel is shipped twice, under two keys": (
        repeat("shipping", "saga-done", "ship", key="'another'"),
        ("twice", "saga-done"),
    ),
    "a completed order has no reservation": (
        forget("inventory", "saga-done", "reserve"),
        ("missing", "saga-done"),
    ),
    "a completed order was never confirmed": (
        forget("orders", "saga-done", "confirm"),
        ("missing", "saga-done"),
    ),
    "a completed order was refunded": (
        repeat("payments", "saga-done", "charge", effect="'refund'"),
        ("undone", "saga-done"),
    ),
    "a compensated order was not refunded": (
        forget("payments", "saga-undone", "refund"),
        ("not-undone", "saga-undone"),
    ),
    "a compensated order was shipped": (
        repeat("shipping", "saga-done", "ship", saga_id="'saga-undone'"),
        ("irreversible", "saga-undone"),
    ),
    "a refund is made twice": (
        repeat("payments", "saga-undone", "refund"),
        ("undone-too-often", "saga-undone"),
    ),
    "a refund without a charge": (
        forget("payments", "saga-undone", "charge"),
        ("undone-too-often", "saga-undone"),
    ),
    "a refund of another amount": (
        change("payments", "saga-undone", "refund", amount_cents=1),
        ("undone-otherwise", "saga-undone"),
    ),
    "a charge after its refund": (
        change("payments", "saga-undone", "charge", seq=9999),
        ("after-undo", "saga-undone"),
    ),
    "a reservation after the order was cancelled": (
        change("inventory", "saga-undone", "reserve", clock_ns=MUCH_LATER),
        ("after-undo", "saga-undone"),
    ),
    "the order is cancelled before the money is back": (
        change("payments", "saga-undone", "refund", clock_ns=MUCH_LATER),
        ("undo-order", "saga-undone"),
    ),
    "a parcel is shipped before it is paid for": (
        change("shipping", "saga-done", "ship", clock_ns=1),
        ("order", "saga-done"),
    ),
    "a charge without an order": (
        forget("orders", "saga-done", "place"),
        ("order", "saga-done"),
    ),
    "the charge is not what the order costs": (
        change("payments", "saga-done", "charge", amount_cents=1),
        ("otherwise", "saga-done"),
    ),
    "the wrong product is reserved": (
        change("inventory", "saga-done", "reserve", subject="'kettle'"),
        ("otherwise", "saga-done"),
    ),
    "the effects belong to two orders": (
        change("shipping", "saga-done", "ship", order_id="'order-99'"),
        ("two-orders", "saga-done"),
    ),
    "a saga that nobody started": (
        repeat("orders", "saga-done", "place", saga_id="'saga-ghost'"),
        ("nobody-started", "saga-ghost"),
    ),
    "a refused start has effects": (
        repeat("orders", "saga-done", "place", saga_id="'saga-refused'"),
        ("refused", "saga-refused"),
    ),
    "an effect in the wrong ledger": (
        repeat("payments", "saga-done", "charge", effect="'ship'"),
        ("foreign", "saga-done"),
    ),
    "money vanishes from an account": (
        run(
            "payments",
            "UPDATE accounts SET balance_cents = balance_cents - 1 WHERE account = 'customer-50'",
        ),
        ("money", "payments"),
    ),
    "money moves without an effect": (
        run(
            "payments",
            "UPDATE accounts SET balance_cents = balance_cents - 1 WHERE account = 'customer-50'",
            "UPDATE accounts SET balance_cents = balance_cents + 1 WHERE account = 'shop'",
        ),
        ("books", "payments"),
    ),
    "a piece vanishes from the shelf": (
        run("inventory", "UPDATE stock SET on_hand = on_hand - 1 WHERE sku = 'tray'"),
        ("books", "inventory"),
    ),
    "an account is overdrawn": (
        run(
            "payments",
            "PRAGMA ignore_check_constraints = on",
            "UPDATE accounts SET balance_cents = -5 WHERE account = 'customer-50'",
        ),
        ("below-zero", "payments"),
    ),
    "the book says confirmed and the ledger cancelled": (
        run("orders", "UPDATE orders SET state = 'confirmed' WHERE saga_id = 'saga-undone'"),
        ("books", "orders"),
    ),
    "a parcel that is in no ledger": (
        forget("shipping", "saga-done", "ship"),
        ("books", "shipping"),
    ),
    "an acknowledged saga has no end": (
        tell("saga-lost"),
        ("no-end", "saga-lost"),
    ),
    "a client is told two ends": (
        lambda shop: shop.journal.ended("saga-done", "COMPENSATED"),
        ("two-ends", "saga-done"),
    ),
    "a saga was abandoned": (
        tell("saga-left", end="ABANDONED"),
        ("wrong-end", "saga-left"),
    ),
    "a saga completed, and nothing happened": (
        tell("saga-empty", end="COMPLETED"),
        ("missing", "saga-empty"),
    ),
    "a refused start has an end": (
        lambda shop: shop.journal.ended("saga-refused", "COMPENSATED"),
        ("refused", "saga-refused"),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
async def test_planted_violations_are_found(shop: Shop, name: str) -> None:
    """Each way of breaking the books is found, under the name of the rule that it breaks."""
    break_it, expected = PLANTED[name]
    break_it(shop)
    assert expected in findings(shop)


async def test_honest_ledgers_have_no_violations(shop: Shop) -> None:
    """Whatever the services themselves have written passes, and is counted."""
    report = audit(shop.databases, shop.journal_path)
    assert report.violations == ()
    assert report.is_clean
    assert (report.sagas, report.acknowledged) == (4, 3)
    assert (report.completed, report.compensated, report.unknown_starts) == (2, 1, 0)
    assert report.effects == {
        "place": 3,
        "charge": 3,
        "reserve": 3,
        "ship": 2,
        "confirm": 2,
        "cancel": 1,
        "refund": 1,
        "release": 1,
    }
    assert "2 completed" in report.lines()[0]
    assert json.loads(json.dumps(report.to_json()))["violations"] == []


async def test_unknown_start_may_have_happened_whole(shop: Shop) -> None:
    """A start without an answer may have completed, or been compensated, or never been."""
    shop.journal.starting("saga-unheard", order_input())
    assert audit(shop.databases, shop.journal_path).unknown_starts == 1
    await shop.complete("saga-extra")
    tamper_journal(shop, "saga-extra", keep=("starting",))
    report = audit(shop.databases, shop.journal_path)
    assert (report.unknown_starts, report.violations) == (2, ())


async def test_unknown_start_may_not_have_happened_by_halves(shop: Shop) -> None:
    """A start without an answer whose effects are neither whole nor undone is a violation."""
    await shop.complete("saga-extra")
    tamper_journal(shop, "saga-extra", keep=("starting",))
    forget("orders", "saga-extra", "confirm")(shop)
    assert ("half-done", "saga-extra") in findings(shop)


def tamper_journal(shop: Shop, saga_id: str, *, keep: tuple[str, ...]) -> None:
    """Forget all but some of what the client was told of a saga."""
    lines = shop.journal_path.read_text(encoding="utf-8").splitlines()
    kept = [
        line
        for line in lines
        if json.loads(line)["saga_id"] != saga_id or json.loads(line)["event"] in keep
    ]
    shop.journal_path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


async def test_sagas_with_a_planted_permanent_fault_may_be_stuck(shop: Shop) -> None:
    """A saga that is excepted by name needs no end; another one does."""
    lost(shop, "saga-stuck")
    report = audit(shop.databases, shop.journal_path, may_be_stuck={"saga-stuck"})
    assert report.violations == ()


async def test_a_whole_broken_run_is_summed_up(shop: Shop) -> None:
    """A person is shown the first violations and how many more there are."""
    for number in range(30):
        lost(shop, f"saga-lost-{number}")
    lines = audit(shop.databases, shop.journal_path).lines()
    assert len(lines) == 23
    assert lines[-1] == "and 10 more violations"


def test_the_auditor_knows_the_order_saga() -> None:
    """The auditor's own table of what comes after what is that of the definition."""
    after: dict[str, set[str]] = {}
    previous: tuple[str, ...] = ()
    for step in order_definition.steps:
        direct = previous if step.after is None else step.after
        after[step.action] = set(direct).union(*(after[name] for name in direct))
        previous = (step.name,)
        assert step.name == step.action
        assert step.participant == ACTIONS[step.action].service
    assert {name: set(earlier) for name, earlier in AFTER.items()} == after


async def test_the_command_says_what_it_found(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    """``python -m shop.audit FOLDER`` exits with 0, with 1 on violations, with 2 on no shop."""
    assert main([str(shop.folder)]) == 0
    assert "4 sagas: 2 completed, 1 compensated" in capsys.readouterr().out
    assert main([str(shop.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completed"] == 2
    lost(shop, "saga-lost")
    assert main([str(shop.folder)]) == 1
    assert "saga-lost: it was acknowledged and has no end" in capsys.readouterr().out
    assert main([str(shop.folder / "elsewhere")]) == 2
    assert "cannot audit" in capsys.readouterr().err


async def test_a_missing_database_is_named(shop: Shop, tmp_path: Path) -> None:
    """An audit of half a shop is none."""
    elsewhere = databases_in(shop.folder) | {"payments": tmp_path / "missing.db"}
    with pytest.raises(FileNotFoundError, match=r"missing\.db"):
        audit(elsewhere, shop.journal_path)
