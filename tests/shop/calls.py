"""Calls as the runtime would make them, and the shop's services in this process to answer them."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import amends
from amends.payload import JSON
from shop import ledger
from shop.audit import JOURNAL_NAME, databases_in
from shop.catalogue import ACTIONS, SERVICES
from shop.journal import Journal
from shop.server import PARTICIPANTS, open_shop

STORE = "store"


def order_input(**changes: object) -> dict[str, Any]:
    """Give an order that nobody refuses, with some of its fields changed."""
    order = {
        "customer": "customer-07",
        "card": "4242",
        "sku": "teapot",
        "quantity": 2,
        "address": "1 Harbour Road",
    }
    return order | changes


def make_call(
    action: str,
    verb: amends.Verb = amends.Verb.EXECUTE,
    *,
    saga_id: str = "saga-1",
    order: object = None,
    results: dict[str, object] | None = None,
    executed: bool = False,
    attempt: int = 1,
) -> amends.Call:
    """Make the call of one step of the order saga; steps are named as their actions."""
    return amends.Call(
        verb=verb,
        action=action,
        saga_id=saga_id,
        step=action,
        round=1,
        idempotency_key=f"{STORE}/{saga_id}/{action}/{verb}/1",
        store_id=STORE,
        input=json.dumps(order_input() if order is None else order).encode(),
        content_type=JSON,
        results={
            step: amends.Payload(json.dumps(result).encode(), JSON)
            for step, result in (results or {}).items()
        },
        executed=executed,
        attempt=attempt,
    )


class Shop:
    """The four services with their barriers, in a folder, driven like a runtime would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.databases = databases_in(folder)
        self.journal_path = folder / JOURNAL_NAME
        self.journal = Journal(self.journal_path)
        self._stack = AsyncExitStack()
        self._barriers: dict[str, amends.SqliteBarrier] = {}

    async def __aenter__(self) -> Self:
        for service in SERVICES:
            barrier = amends.SqliteBarrier(self.databases[service], schema=ledger.schema(service))
            self._barriers[service] = await self._stack.enter_async_context(barrier)
            await open_shop(service, barrier)
            PARTICIPANTS[service].barrier = barrier
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.journal.__exit__(kind, error, trace)
        await self._stack.aclose()

    async def ask(self, call: amends.Call) -> object:
        """Send one call through the service's barrier; gives the outcome."""
        service = ACTIONS[call.action].service
        handler = PARTICIPANTS[service].handlers().get((call.action, call.verb))
        return await self._barriers[service].run(call, handler)

    async def complete(self, saga_id: str, **changes: object) -> None:
        """Let an order go through, and tell the journal."""
        order = order_input(**changes)
        self.journal.starting(saga_id, order)
        self.journal.acknowledged(saga_id)
        results: dict[str, object] = {}
        for action in ACTIONS:
            results[action] = await self._execute(saga_id, action, order, results)
        self.journal.ended(saga_id, "COMPLETED")

    async def decline(self, saga_id: str, **changes: object) -> None:
        """Let an order be placed, charged and reserved, then undone, and tell the journal."""
        order = order_input(**changes)
        self.journal.starting(saga_id, order)
        self.journal.acknowledged(saga_id)
        results: dict[str, object] = {}
        for action in ("place", "charge", "reserve"):
            results[action] = await self._execute(saga_id, action, order, results)
        for action in ("reserve", "charge", "place"):
            call = make_call(
                action, amends.Verb.COMPENSATE, saga_id=saga_id, order=order, executed=True
            )
            assert isinstance(await self.ask(call), amends.Done)
        self.journal.ended(saga_id, "COMPENSATED")

    async def _execute(
        self, saga_id: str, action: str, order: object, results: dict[str, object]
    ) -> object:
        outcome = await self.ask(make_call(action, saga_id=saga_id, order=order, results=results))
        assert isinstance(outcome, amends.Done), outcome
        assert outcome.result is not None
        return outcome.result.json()
