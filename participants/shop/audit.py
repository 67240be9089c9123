"""The auditor: compares what clients were told with what really happened.

How to think about it. It reads two kinds of witnesses and nothing else: the append-only ledgers of
the four services (with the balances and books beside them), and the journal of the client. It never
reads the runtime's tables: what the runtime believes is what is on trial. Run it after the drain,
when everything that was started should have ended.

What must hold:

1. Every acknowledged saga has an end, the client was told only one, and it is COMPLETED or
   COMPENSATED. (Sagas that a permanent fault was planted for may be excepted by name.)
2. COMPLETED: each of its effects exactly once, none undone, each as the order asked for.
3. COMPENSATED: what took effect was undone, once, to the cent and to the piece; nothing that cannot
   be undone took effect.
4. Nothing is undone that did not take effect before, and nothing takes effect after it was undone.
5. Effects come in the order of the definition; undoing goes in the reverse order; nothing takes
   effect after something that it depends on was undone.
6. All effects of one saga belong to one order.
7. A saga that nobody started, or that was definitely refused, has no effects. One whose start is
   unknown has, if any, those of a completed or those of a compensated saga.
8. Openings plus effects are balances, for each account and each product, and in total; nothing is
   below zero; the books say the same as the ledgers.

``python -m shop.audit FOLDER`` audits what a demo has left behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sqlite3
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import amends
from shop.catalogue import ACTIONS, SERVICES, SHOP_ACCOUNT, Order, read_order
from shop.journal import Entry, read_journal
from shop.switches import operations_of

AFTER: Final[Mapping[str, tuple[str, ...]]] = {
    "place": (),
    "charge": ("place",),
    "reserve": ("place",),
    "ship": ("charge", "reserve", "place"),
    "confirm": ("ship", "charge", "reserve", "place"),
}
"""The order saga as the auditor knows it: the effects that each effect comes after, all of them."""

UNDO_OF: Final = {name: action.undo for name, action in ACTIONS.items() if action.undo is not None}
EFFECT_OF: Final = {undo: effect for effect, undo in UNDO_OF.items()}

JOURNAL_NAME: Final = "journal.jsonl"
"""The client's journal in a demo's folder."""

SHOWN_VIOLATIONS: Final = 20
"""Lines that a person is shown; a broken run has thousands, and they say the same."""


@dataclass(frozen=True, slots=True)
class Effect:
    """One line of a ledger."""

    service: str
    seq: int
    at_ms: int
    clock_ns: int
    saga_id: str
    step: str
    effect: str
    key: str
    order_id: str
    subject: str
    quantity: int
    amount_cents: int


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must not be."""

    rule: str
    """Which kind, for programs."""
    where: str
    """The saga, or the service."""
    message: str
    """One line for people."""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the auditor found."""

    sagas: int
    """In the journal."""
    acknowledged: int
    completed: int
    compensated: int
    unknown_starts: int
    """Neither acknowledged nor refused, and no end told."""
    effects: Mapping[str, int]
    """How often each effect, and each undoing, is in the ledgers."""
    violations: tuple[Violation, ...]

    @property
    def is_clean(self) -> bool:
        """Whether everything holds."""
        return not self.violations

    def to_json(self) -> dict[str, Any]:
        """Give everything as values that JSON has; violations as lines."""
        return dataclasses.asdict(self) | {"violations": [str(each) for each in self.violations]}

    def lines(self) -> list[str]:
        """Say it for people: the counts, and the first violations."""
        counted = ", ".join(f"{count} {effect}" for effect, count in self.effects.items() if count)
        others = self.sagas - self.completed - self.compensated - self.unknown_starts
        found = [
            (
                f"{self.sagas} sagas: {self.completed} completed, {self.compensated} compensated; "
                f"{self.unknown_starts} starts without an answer, {others} refused or not ended"
            ),
            f"effects: {counted or 'none'}",
        ]
        found += [f"VIOLATION {each}" for each in self.violations[:SHOWN_VIOLATIONS]]
        if len(self.violations) > SHOWN_VIOLATIONS:
            found.append(f"and {len(self.violations) - SHOWN_VIOLATIONS} more violations")
        return found


def databases_in(folder: Path) -> dict[str, Path]:
    """Say where the services' databases are in a folder."""
    return {service: folder / f"{service}.db" for service in SERVICES}


def effects_of(databases: Mapping[str, Path], saga_id: str) -> list[Effect]:
    """Give what the ledgers have of one saga, in the order in which it happened.

    Raises as `audit` does.
    """
    found: list[Effect] = []
    for service in SERVICES:
        with closing(_connect(databases[service])) as connection:
            found += _read_ledger(connection, service, saga_id)
    return sorted(found, key=lambda effect: effect.clock_ns)


def audit(
    databases: Mapping[str, Path], journal: Path, *, may_be_stuck: Collection[str] = ()
) -> Report:
    """Compare the ledgers of the four services with a client's journal.

    `may_be_stuck` names sagas for which a permanent fault was planted: they need no end. Nothing is
    written. Raises `FileNotFoundError`, `sqlite3.Error` for files that are no databases of the
    shop, and `ValueError` for a journal that contradicts itself.
    """
    entries = read_journal(journal)
    ledgers: dict[str, list[Effect]] = {}
    violations: list[Violation] = []
    for service in SERVICES:
        with closing(_connect(databases[service])) as connection:
            connection.execute("BEGIN")  # one snapshot of ledger and books
            ledger = _read_ledger(connection, service)
            known = [effect for effect in ledger if effect.effect in operations_of(service)]
            violations += [
                Violation("foreign", effect.saga_id, f"{service} has an effect {effect.effect!r}")
                for effect in ledger
                if effect.effect not in operations_of(service)
            ]
            ledgers[service] = known
            violations += _BOOKS[service](connection, known)
    of_saga: defaultdict[str, list[Effect]] = defaultdict(list)
    for known in ledgers.values():
        for effect in known:
            of_saga[effect.saga_id].append(effect)
    for saga_id in of_saga.keys() | entries.keys():
        entry, effects = entries.get(saga_id), of_saga.get(saga_id, [])
        violations += _saga_violations(saga_id, entry, effects, is_excepted=saga_id in may_be_stuck)
    ended = Counter(entry.ends[0] for entry in entries.values() if entry.ends)
    counted = Counter(effect.effect for known in ledgers.values() for effect in known)
    return Report(
        sagas=len(entries),
        acknowledged=sum(1 for entry in entries.values() if entry.acknowledged_at_ms),
        completed=ended["COMPLETED"],
        compensated=ended["COMPENSATED"],
        unknown_starts=sum(1 for entry in entries.values() if _is_unknown(entry)),
        effects={name: counted[name] for name in (*ACTIONS, *EFFECT_OF)},
        violations=tuple(sorted(violations, key=lambda each: (each.where, each.rule))),
    )


def _connect(path: Path) -> sqlite3.Connection:
    if not path.exists():
        raise FileNotFoundError(f"there is no database {path}")
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)


def _read_ledger(
    connection: sqlite3.Connection, service: str, saga_id: str | None = None
) -> list[Effect]:
    rows = connection.execute(
        "SELECT seq, at_ms, clock_ns, saga_id, step, effect, key, order_id, subject, quantity,"
        " amount_cents FROM effects WHERE ?1 IS NULL OR saga_id = ?1 ORDER BY seq",
        (saga_id,),
    )
    return [Effect(service, *row) for row in rows]


def _is_unknown(entry: Entry) -> bool:
    return not (entry.acknowledged_at_ms or entry.is_refused or entry.ends)


# -- one saga --------------------------------------------------------------------------------------


def _saga_violations(
    saga_id: str, entry: Entry | None, effects: Sequence[Effect], *, is_excepted: bool
) -> Iterator[Violation]:
    by_name: defaultdict[str, list[Effect]] = defaultdict(list)
    for effect in effects:
        by_name[effect.effect].append(effect)

    def violation(rule: str, message: str) -> Violation:
        return Violation(rule, saga_id, message)

    if entry is None:
        names = ", ".join(by_name)
        yield violation("nobody-started", f"has effects ({names}), and nobody started it")
        return
    if entry.is_refused and effects:
        names = ", ".join(by_name)
        yield violation("refused", f"its start was refused, and it has effects ({names})")
    if not is_excepted:
        yield from _end_violations(saga_id, entry)
    yield from _pair_violations(saga_id, by_name)
    yield from _order_violations(saga_id, by_name)
    yield from _content_violations(saga_id, entry, effects)
    match entry.ends[:1]:
        case ["COMPLETED"]:
            yield from _completed_violations(saga_id, by_name)
        case ["COMPENSATED"]:
            yield from _compensated_violations(saga_id, by_name)
        case _ if effects and _is_unknown(entry):
            completed = list(_completed_violations(saga_id, by_name))
            if completed and list(_compensated_violations(saga_id, by_name)):
                yield violation(
                    "half-done",
                    f"its start is unknown, and it is neither completed nor compensated"
                    f" ({', '.join(by_name)})",
                )


def _end_violations(saga_id: str, entry: Entry) -> Iterator[Violation]:
    """Rule 1."""
    ends = list(dict.fromkeys(entry.ends))
    if entry.acknowledged_at_ms and not ends:
        yield Violation("no-end", saga_id, "it was acknowledged and has no end")
    if len(ends) > 1:
        yield Violation("two-ends", saga_id, f"the client was told two ends: {' and '.join(ends)}")
    for end in ends:
        if end not in ("COMPLETED", "COMPENSATED"):
            yield Violation("wrong-end", saga_id, f"it ended {end}")
    if entry.is_refused and ends:
        yield Violation("refused", saga_id, f"its start was refused, and it ended {ends[0]}")


def _pair_violations(saga_id: str, by_name: Mapping[str, Sequence[Effect]]) -> Iterator[Violation]:
    """Rule 4, and the part of 2 and 3 that holds for a saga in any state: nothing twice."""
    for name, found in by_name.items():
        if len(found) > 1:
            keys = ", ".join(dict.fromkeys(effect.key for effect in found))
            yield Violation("twice", saga_id, f"{name} took effect {len(found)} times ({keys})")
    for undo, name in EFFECT_OF.items():
        undone, done = by_name.get(undo, ()), by_name.get(name, ())
        if not undone:
            continue
        if len(undone) > len(done):
            yield Violation(
                "undone-too-often", saga_id, f"{len(undone)} {undo} for {len(done)} {name}"
            )
        elif undone[0].seq < done[0].seq:
            yield Violation("after-undo", saga_id, f"{name} took effect after its {undo}")
        elif _worth(undone[0]) != _worth(done[0]):
            yield Violation(
                "undone-otherwise",
                saga_id,
                f"{undo} of {_worth(undone[0])} does not undo {name} of {_worth(done[0])}",
            )


def _worth(effect: Effect) -> str:
    """Say what an effect is about, so that an effect and its undoing can be compared."""
    return f"{effect.quantity} pieces, {effect.amount_cents} cents, {effect.subject}"


def _order_violations(saga_id: str, by_name: Mapping[str, Sequence[Effect]]) -> Iterator[Violation]:
    """Rule 5. The ledgers of four databases are ordered by the machine's monotonic clock."""
    when = {name: found[0].clock_ns for name, found in by_name.items()}
    for later, earlier_ones in AFTER.items():
        for earlier in earlier_ones:
            undo_earlier, undo_later = UNDO_OF.get(earlier), UNDO_OF.get(later)
            for first, second, rule in (
                (earlier, later, "order"),
                (undo_later, undo_earlier, "undo-order"),
                (later, undo_earlier, "after-undo"),
            ):
                if first in when and second in when and when[first] > when[second]:
                    yield Violation(rule, saga_id, f"{second} came before {first}")
        if later in when:
            missing = [name for name in earlier_ones if name not in when]
            if missing:
                yield Violation("order", saga_id, f"{later} came without {', '.join(missing)}")


def _content_violations(
    saga_id: str, entry: Entry, effects: Sequence[Effect]
) -> Iterator[Violation]:
    """Rule 6, and that effects are what the order asked for."""
    order_ids = sorted({effect.order_id for effect in effects})
    if len(order_ids) > 1:
        yield Violation("two-orders", saga_id, f"its effects name {', '.join(order_ids)}")
    if not effects:
        return
    try:
        order = read_order(entry.input)
    except amends.Rejected as rejected:
        yield Violation("otherwise", saga_id, f"has effects of an order that is none: {rejected}")
        return
    for effect in effects:
        wanted = _wanted(order).get(effect.effect)
        if wanted is not None and _worth(effect) != wanted:
            yield Violation(
                "otherwise",
                saga_id,
                f"{effect.effect} of {_worth(effect)}; the order asked for {wanted}",
            )


def _wanted(order: Order) -> dict[str, str]:
    whole = f"{order.quantity} pieces, {order.amount_cents} cents, {order.customer}"
    return {
        "place": whole,
        "confirm": whole,
        "charge": f"0 pieces, {order.amount_cents} cents, {order.customer}",
        "reserve": f"{order.quantity} pieces, 0 cents, {order.sku}",
        "ship": f"{order.quantity} pieces, 0 cents, {order.address}",
    }


def _completed_violations(
    saga_id: str, by_name: Mapping[str, Sequence[Effect]]
) -> Iterator[Violation]:
    """Rule 2."""
    for name in ACTIONS:
        if name not in by_name:
            yield Violation("missing", saga_id, f"it completed without {name}")
    for undo in EFFECT_OF:
        if undo in by_name:
            yield Violation("undone", saga_id, f"it completed, and there is a {undo}")


def _compensated_violations(
    saga_id: str, by_name: Mapping[str, Sequence[Effect]]
) -> Iterator[Violation]:
    """Rule 3."""
    for name, found in by_name.items():
        if name in EFFECT_OF:
            continue
        undo = UNDO_OF.get(name)
        if undo is None:
            yield Violation("irreversible", saga_id, f"it was compensated, and there is a {name}")
        elif len(by_name.get(undo, ())) < len(found):
            yield Violation(
                "not-undone",
                saga_id,
                f"it was compensated, and its {name} was not undone",
            )


# -- the books -------------------------------------------------------------------------------------


def _orders_violations(
    connection: sqlite3.Connection, ledger: Sequence[Effect]
) -> Iterator[Violation]:
    book = dict(connection.execute("SELECT 'order-' || order_number, state FROM orders").fetchall())
    said: dict[str, str] = {}
    states = {"place": "placed", "cancel": "cancelled", "confirm": "confirmed"}
    for effect in ledger:
        said[effect.order_id] = states[effect.effect]
    yield from _compare("orders", "the book of orders", book, said)


def _payments_violations(
    connection: sqlite3.Connection, ledger: Sequence[Effect]
) -> Iterator[Violation]:
    accounts = connection.execute("SELECT account, opening_cents, balance_cents FROM accounts")
    opening: dict[str, int] = {}
    balance: dict[str, int] = {}
    for account, opening_cents, balance_cents in accounts:
        opening[account], balance[account] = opening_cents, balance_cents
    expected = Counter(opening)
    open_charges: Counter[str] = Counter()
    for effect in ledger:
        sign = 1 if effect.effect == "charge" else -1
        expected[effect.subject] -= sign * effect.amount_cents
        expected[SHOP_ACCOUNT] += sign * effect.amount_cents
        open_charges[effect.order_id] += sign
    yield from _compare("payments", "the balance", balance, dict(expected))
    if sum(balance.values()) != sum(opening.values()):
        yield Violation(
            "money",
            "payments",
            f"there were {sum(opening.values())} cents in all, and now {sum(balance.values())}",
        )
    yield from _below_zero("payments", balance)
    book = connection.execute("SELECT order_id, sum(1 - refunded) FROM charges GROUP BY order_id")
    yield from _compare("payments", "the open charges", dict(book.fetchall()), dict(open_charges))


def _inventory_violations(
    connection: sqlite3.Connection, ledger: Sequence[Effect]
) -> Iterator[Violation]:
    expected: Counter[str] = Counter()
    on_hand: dict[str, int] = {}
    for sku, opening, now in connection.execute("SELECT sku, opening, on_hand FROM stock"):
        expected[sku], on_hand[sku] = opening, now
    open_reservations: Counter[str] = Counter()
    for effect in ledger:
        sign = 1 if effect.effect == "reserve" else -1
        expected[effect.subject] -= sign * effect.quantity
        open_reservations[effect.order_id] += sign
    yield from _compare("inventory", "the stock", on_hand, dict(expected))
    yield from _below_zero("inventory", on_hand)
    book = connection.execute(
        "SELECT order_id, sum(1 - released) FROM reservations GROUP BY order_id"
    )
    yield from _compare(
        "inventory", "the open reservations", dict(book.fetchall()), dict(open_reservations)
    )


def _shipping_violations(
    connection: sqlite3.Connection, ledger: Sequence[Effect]
) -> Iterator[Violation]:
    book = connection.execute("SELECT order_id, count(*) FROM shipments GROUP BY order_id")
    shipped = Counter(effect.order_id for effect in ledger)
    yield from _compare("shipping", "the shipments", dict(book.fetchall()), dict(shipped))


_BOOKS: Final = {
    "orders": _orders_violations,
    "payments": _payments_violations,
    "inventory": _inventory_violations,
    "shipping": _shipping_violations,
}


def _compare(
    service: str, what: str, book: Mapping[str, object], ledger: Mapping[str, object]
) -> Iterator[Violation]:
    """Rule 8: what a table says against what the ledger adds up to."""
    for name in sorted(book.keys() | ledger.keys()):
        if book.get(name) != ledger.get(name):
            yield Violation(
                "books",
                service,
                f"{what} of {name}: {book.get(name)}; by the ledger {ledger.get(name)}",
            )


def _below_zero(service: str, amounts: Mapping[str, int]) -> Iterator[Violation]:
    for name, amount in amounts.items():
        if amount < 0:
            yield Violation("below-zero", service, f"{name} has {amount}")


# -- the command -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Audit a folder; gives the exit code: 0 (clean), 1 (violations) or 2 (nothing to audit)."""
    parser = argparse.ArgumentParser(
        prog="python -m shop.audit", description="Audit what a demo has left behind."
    )
    parser.add_argument("folder", type=Path, help=f"has the services' databases and {JOURNAL_NAME}")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    given = parser.parse_args(arguments)
    try:
        report = audit(databases_in(given.folder), given.folder / JOURNAL_NAME)
    except (OSError, sqlite3.Error, ValueError) as error:
        print(f"cannot audit {given.folder}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_json()) if given.json else "\n".join(report.lines()))
    return 0 if report.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
