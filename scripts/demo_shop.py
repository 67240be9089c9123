"""The shop's scenes of the demo: orders go through four services, and the runtime is killed."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import amends
from scripts.demo_stage import END_TIMEOUT_S, DemoFailed, Stage, expect_end, under_way, within
from shop.audit import JOURNAL_NAME, audit, databases_in, effects_of
from shop.catalogue import (
    DECLINED_CARD,
    EMPTY_PURSE,
    OPENING_BALANCES_CENTS,
    PRODUCTS,
    UNKNOWN_ADDRESS,
)
from shop.definition import order
from shop.faults import count_faults
from shop.journal import Journal
from shop.server import faults_file

CROWD: Final = 200
"""Sagas that are under way when the runtime is killed,"""

ENDED_AT_KILL: Final = 20
"""and how many of them have ended by then: a tenth, so that it is in the middle."""


class ShopScenes:
    """Scenes 1 to 5, and their audit."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._databases = databases_in(stage.folder)
        self._journal: Journal

    async def play(self) -> None:
        """Play them. Raises `DemoFailed` and what clients and processes raise."""
        registered = await self._stage.client.register(order)
        self._stage.tell(
            f"definition {registered.name}, version {registered.version},"
            f" {registered.content_hash[:12]}: place, then charge and reserve, then ship,"
            " then confirm"
        )
        with Journal(self._stage.folder / JOURNAL_NAME) as self._journal:
            await self._scene_an_order_completes()
            await self._scene_a_card_is_declined()
            await self._scene_a_reply_is_lost()
            await self._scene_shipping_is_down()
            await self._scene_the_runtime_is_killed()
        self._audit()

    async def _scene_an_order_completes(self) -> None:
        self._stage.headline("1. An order completes")
        saga = await self._buy("an-order", quantity=2)
        await self._stage.tell_history(saga.saga_id)
        expect_end(saga, "COMPLETED")
        self._expect_effects(saga, "place", "charge", "reserve", "ship", "confirm")
        label = saga.step("confirm").result
        assert label is not None
        self._stage.tell(
            f"the customer is told: {label.json()['tracking_code']} is on its way", "green"
        )

    async def _scene_a_card_is_declined(self) -> None:
        self._stage.headline("2. A card is declined, and everything is made right")
        saga = await self._buy("a-declined-card", card=DECLINED_CARD)
        await self._stage.tell_history(saga.saga_id)
        expect_end(saga, "COMPENSATED")
        done = self._expect_effects(saga, "place", "cancel", may=("reserve", "release"))
        self._stage.tell(f"the ledgers say: {', '.join(done)}; no money moved", "green")

    async def _scene_a_reply_is_lost(self) -> None:
        self._stage.headline("3. A reply is lost after the effect, and nothing happens twice")
        self._stage.switch({"payments": {"charge": {"lose_reply": {"next": 2}}}})
        self._stage.tell("payments will charge, and then lose its next two replies")
        saga = await self._buy("a-lost-reply", sku="kettle")
        await self._stage.tell_history(saga.saga_id)
        self._stage.switch({})
        expect_end(saga, "COMPLETED")
        attempts = saga.step("charge").attempt
        lost = count_faults(faults_file(self._databases["payments"]))["charge lose_reply"]
        if attempts < 3 or lost != 2:
            raise DemoFailed(f"expected 3 attempts and 2 lost replies, not {attempts} and {lost}")
        self._expect_effects(saga, "place", "charge", "reserve", "ship", "confirm")
        self._stage.tell(
            f"charge was asked {attempts} times, and the ledger has one charge", "green"
        )

    async def _scene_shipping_is_down(self) -> None:
        self._stage.headline("4. Shipping is down: the saga waits, and completes when it is back")
        self._stage.switch({"shipping": {"down": True}})
        await self._stage.wait_down("shipping")
        self._stage.tell("shipping refuses connections")
        async with under_way(self._buy("a-patient-order", sku="tray")) as waiting:
            await self._stage.wait_breaker("shipping", amends.BreakerState.OPEN)
            self._stage.tell(
                "its breaker is open: calls wait, and nothing is undone for it", "yellow"
            )
            saga = await self._stage.client.get("a-patient-order")
            ship = saga.step("ship")
            self._stage.tell(
                f"the saga is {saga.state}; ship is {ship.state}, at attempt {ship.attempt}",
                "yellow",
            )
            if saga.ended:
                raise DemoFailed(f"the saga has ended {saga.state} while shipping was down")
            self._stage.switch({})
            self._stage.tell("shipping is switched on again")
            saga = await waiting
        await self._stage.tell_history(saga.saga_id)
        expect_end(saga, "COMPLETED")
        self._expect_effects(saga, "place", "charge", "reserve", "ship", "confirm")
        await self._stage.wait_breaker("shipping", amends.BreakerState.CLOSED)
        self._stage.tell("the breaker is closed, the order shipped once", "green")

    async def _scene_the_runtime_is_killed(self) -> None:
        self._stage.headline(f"5. {CROWD} sagas are under way, and the runtime is killed")
        chances = random.Random(self._stage.seed)  # noqa: S311  # to be repeated, not to be secret
        orders = {f"crowd-{n:03}": _some_order(chances) for n in range(1, CROWD + 1)}
        lossy = {"slow": 0.5, "slow_s": 0.2, "lose_reply": 0.05, "fail_before": 0.05}
        self._stage.switch(
            {
                "seed": self._stage.seed,
                "payments": {"charge": lossy, "refund": lossy},
                "inventory": {"reserve": lossy, "release": lossy},
                "shipping": {"ship": lossy},
                "orders": {"confirm": lossy},
            }
        )
        self._stage.tell(
            "some cannot be paid, stocked or delivered; services are slow and lose replies"
        )
        enough = asyncio.Event()
        ends: Counter[str] = Counter()

        async def buy(saga_id: str, wanted: Mapping[str, Any]) -> None:
            saga = await self._order(saga_id, wanted)
            ends[saga.state] += 1
            if ends.total() == ENDED_AT_KILL:
                enough.set()
            if ends.total() % 50 == 0:
                self._stage.tell(f"{ends.total()} have ended")

        async with asyncio.TaskGroup() as tasks:
            for saga_id, wanted in orders.items():
                tasks.create_task(buy(saga_id, wanted))
            await within(enough.wait(), f"{ENDED_AT_KILL} sagas did not end")
            self._stage.kill_runtime(f"when {ends.total()} of {CROWD} had ended")
            if ends.total() >= CROWD // 2:
                raise DemoFailed(f"{ends.total()} had ended: that was not the middle")
            await self._stage.start_runtime_again()
        self._stage.switch({})
        told = ", ".join(f"{count} {state}" for state, count in sorted(ends.items()))
        self._stage.tell(f"all have ended: {told}", "green")
        lost = await self._count_lost(orders)
        if not lost:
            raise DemoFailed("no call was on the wire when the runtime was killed")
        self._stage.tell(
            f"{lost.total()} calls were under way at the kill; each was asked again, by its key"
        )
        [(most_lost, _)] = lost.most_common(1)
        await self._stage.tell_trace(most_lost)

    def _audit(self) -> None:
        self._stage.headline("The shop's ledgers are audited against what the client was told")
        report = audit(self._databases, self._stage.folder / JOURNAL_NAME)
        for line in report.lines():
            self._stage.tell(line)
        struck = sum(
            (count_faults(faults_file(path)) for path in self._databases.values()), Counter[str]()
        )
        self._stage.tell(
            "faults: " + ", ".join(f"{n} {fault}" for fault, n in sorted(struck.items()))
        )
        if not report.is_clean:
            raise DemoFailed(f"the audit found {len(report.violations)} violations")
        if report.acknowledged != CROWD + 4 or report.completed + report.compensated != CROWD + 4:
            raise DemoFailed(f"{report.acknowledged} sagas were acknowledged, not {CROWD + 4}")
        self._stage.tell("every effect is there once, what was undone nets to zero,", "green")
        self._stage.tell("and money and stock add up to the cent and to the piece", "green")

    async def _buy(self, saga_id: str, **changes: object) -> amends.Saga:
        wanted = _an_order() | changes
        self._stage.tell(
            f"order {saga_id}: {wanted['quantity']} x {wanted['sku']} for {wanted['customer']}"
        )
        return await self._order(saga_id, wanted)

    async def _order(self, saga_id: str, wanted: Mapping[str, Any]) -> amends.Saga:
        """Start a saga and wait for its end, through whatever happens to the runtime."""
        self._journal.starting(saga_id, wanted)
        started = await self._stage.client.start(
            "order", wanted, saga_id=saga_id, timeout_s=END_TIMEOUT_S
        )
        self._journal.acknowledged(saga_id)
        saga = await started.result(timeout_s=END_TIMEOUT_S)
        self._journal.ended(saga_id, saga.state)
        return saga

    async def _count_lost(self, saga_ids: Mapping[str, object]) -> Counter[str]:
        """Count the attempts that were on the wire when the runtime died, by their saga."""
        lost: Counter[str] = Counter()
        for saga_id in saga_ids:
            async for record in self._stage.client.history(saga_id):
                if record.kind is amends.RecordKind.ATTEMPT_LOST:
                    lost[saga_id] += 1
        return lost

    def _expect_effects(
        self, saga: amends.Saga, *must: str, may: tuple[str, ...] = ()
    ) -> list[str]:
        """Compare the ledgers with what should be there once; `may` is there as a whole or not."""
        found = [each.effect for each in effects_of(self._databases, saga.saga_id)]
        if sorted(found) not in (sorted(must), sorted((*must, *may))):
            raise DemoFailed(
                f"the ledgers have, of {saga.saga_id}: {', '.join(found) or 'nothing'}"
            )
        return found


def _an_order() -> dict[str, Any]:
    return {
        "customer": "customer-07",
        "card": "4242",
        "sku": "teapot",
        "quantity": 1,
        "address": "1 Harbour Road",
    }


def _some_order(chances: random.Random) -> dict[str, Any]:
    """Make an order; about a third cannot be fulfilled, for one reason or another."""
    customers = [name for name in OPENING_BALANCES_CENTS if name.startswith("customer")]
    in_stock = [sku for sku, product in PRODUCTS.items() if product.opening_stock]
    wanted = _an_order() | {
        "customer": chances.choice(customers),
        "sku": chances.choice(in_stock),
        "quantity": chances.randint(1, 5),
    }
    trouble: list[dict[str, object]] = [
        {"card": DECLINED_CARD},
        {"customer": EMPTY_PURSE},
        {"sku": "samovar"},
        {"address": UNKNOWN_ADDRESS},
    ]
    return wanted | (chances.choice(trouble) if chances.random() < 1 / 3 else {})
