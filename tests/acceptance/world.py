"""A shop and a runtime as real processes, and what a user can see of them.

Tests share them within a module. Each has orders of its own, and leaves the switches as it found
them. At the end of a module everything that was started must have ended (but for what a test has
excepted by name), and the auditor must find nothing.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio

import amends
from shop.audit import audit, databases_in
from shop.definition import order as order_definition
from shop.faults import count_faults
from shop.journal import Journal
from shop.processes import Process, Processes
from shop.server import faults_file
from shop.switches import write_switches

PATIENCE_S: Final = 60.0
"""Bounds a broken test; no test waits for it."""

LOOK_EVERY_S: Final = 0.02

# Breakers that open and try again quickly; otherwise as a user has it.
SETTINGS: Final = """
[breaker]
failures_to_open = 3
open_s = 0.2
max_open_s = 0.5
"""

ORDER: Final[Mapping[str, object]] = {
    "customer": "customer-07",
    "card": "4000-0000",
    "sku": "teapot",
    "quantity": 2,
    "address": "12 Long Lane",
}


@dataclass
class World:
    """Services, a runtime, and a client of it."""

    processes: Processes
    services: Mapping[str, Process]
    runtime: Process
    client: amends.Client
    journal: Journal
    may_be_stuck: set[str] = field(default_factory=set)
    """Sagas that a test has given a fault that does not pass."""
    started: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where all files are."""
        return self.processes.folder

    # -- doing -----------------------------------------------------------------------------------

    async def start(
        self,
        definition: str = "order",
        *,
        deadline_s: float | None = None,
        saga_id: str | None = None,
        **changes: object,
    ) -> amends.StartedSaga:
        """Start a saga with an order that differs from `ORDER` in `changes`."""
        order = {**ORDER, **changes}
        saga_id = saga_id or amends.new_saga_id()
        self.journal.starting(saga_id, order)
        started = await self.client.start(
            definition, order, saga_id=saga_id, deadline_s=deadline_s, timeout_s=PATIENCE_S
        )
        self.journal.acknowledged(saga_id)
        self.started.append(saga_id)
        return started

    def switch(self, **services: Mapping[str, Any]) -> None:
        """Let go wrong what `services` says, and nothing else; see `shop.switches`."""
        write_switches(self.processes.switches, services)

    async def take_down(self, service: str) -> None:
        """Switch a service off, and wait until it no longer listens."""
        before = self.strikes(service, f"{service} down")
        self.switch(**{service: {"down": True}})
        await until(
            lambda: self.strikes(service, f"{service} down") > before, f"{service} to be down"
        )

    async def end(self, saga: amends.SagaHandle) -> amends.Saga:
        """Wait for a saga's end."""
        ended = await saga.result(timeout_s=PATIENCE_S)
        self.journal.ended(saga.saga_id, ended.state)
        return ended

    # -- seeing ----------------------------------------------------------------------------------

    def effects(self, saga_id: str) -> list[str]:
        """Give a saga's effects, in the order in which they took place, of all four ledgers."""
        found: list[tuple[int, str]] = []
        for database in databases_in(self.folder).values():
            uri = f"{database.as_uri()}?mode=ro"
            with closing(sqlite3.connect(uri, uri=True)) as connection:
                found += connection.execute(
                    "SELECT clock_ns, effect FROM effects WHERE saga_id = ?", (saga_id,)
                ).fetchall()
        return [effect for _, effect in sorted(found)]

    def strikes(self, service: str, fault: str) -> int:
        """Count how often a fault has struck so far, such as ``"charge slow"``."""
        return count_faults(faults_file(self.processes.database(service)))[fault]

    async def history(self, saga_id: str) -> list[amends.Record]:
        """Give a saga's records."""
        return [record async for record in self.client.history(saga_id)]

    async def records(
        self, saga_id: str, kind: amends.RecordKind, step: str = ""
    ) -> list[amends.Record]:
        """Give a saga's records of a kind, those about `step` if it is named."""
        return [
            record
            for record in await self.history(saga_id)
            if record.kind is kind and step in {"", record.step}
        ]

    async def wait_record(
        self, saga_id: str, kind: amends.RecordKind, step: str = "", *, count: int = 1
    ) -> None:
        """Wait until a saga's history has so many records of a kind, about `step` if named."""

        async def is_there() -> bool:
            return len(await self.records(saga_id, kind, step)) >= count

        await until(is_there, f"{count} {kind} of {step or 'any step'} in {saga_id}")

    async def breaker(self, participant: str) -> amends.BreakerInfo:
        """Give a participant's breaker."""
        return next(b for b in await self.client.breakers() if b.participant == participant)

    async def wait_breaker(self, participant: str, state: amends.BreakerState) -> None:
        """Wait until a participant's breaker is seen in a state."""

        async def is_so() -> bool:
            return (await self.breaker(participant)).state is state

        await until(is_so, f"the breaker of {participant} to be {state}")

    async def wait_strike(self, service: str, fault: str, *, after: int) -> None:
        """Wait until a fault has struck once more than `after` times; see `strikes`."""
        await until(lambda: self.strikes(service, fault) > after, f"{fault} to strike")

    # -- the end ---------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Wait for every end that no test has waited for, and let the auditor compare."""
        self.switch()
        for saga_id in self.started:
            if saga_id not in self.may_be_stuck:
                await self.end(self.client.handle(saga_id))
        report = audit(
            databases_in(self.folder), self.folder / "journal.jsonl", may_be_stuck=self.may_be_stuck
        )
        assert report.is_clean, "\n".join(report.lines())
        assert (await self.client.runtime()).without_wake_up == 0


async def until(condition: Callable[[], Awaitable[bool] | bool], what: str) -> None:
    """Wait for what can only be asked for again and again."""
    give_up_at_s = time.monotonic() + PATIENCE_S
    while True:
        held = condition()
        if held if isinstance(held, bool) else await held:
            return
        # No cancel scope around the calls inside: gRPC's would leak out of it.
        if time.monotonic() > give_up_at_s:
            raise AssertionError(f"waited {PATIENCE_S:g} s for {what}")
        await anyio.sleep(LOOK_EVERY_S)


@asynccontextmanager
async def opened(
    folder: Path, participants: Mapping[str, str] | None = None, *, unary: Collection[str] = ()
) -> AsyncIterator[World]:
    """Start the shop and a runtime that also knows `participants`; in the end, settle.

    Those in `unary` are called by the unary verbs, the others over streams.
    """
    async with (
        shop_in(folder) as (processes, services),
        runtime_of(processes, services, participants or {}, unary=unary) as world,
    ):
        yield world


@asynccontextmanager
async def shop_in(folder: Path) -> AsyncIterator[tuple[Processes, dict[str, Process]]]:
    """Start the shop's services, with nothing going wrong."""
    async with Processes(folder) as processes:
        write_switches(processes.switches, {})
        yield processes, {service.name: service for service in await processes.start_services()}


@asynccontextmanager
async def runtime_of(
    processes: Processes,
    services: Mapping[str, Process],
    participants: Mapping[str, str],
    *,
    unary: Collection[str] = (),
) -> AsyncIterator[World]:
    """Start a runtime that knows the services and `participants`; in the end, settle."""
    addresses = {name: service.address for name, service in services.items()}
    runtime = await processes.start_runtime(
        {**addresses, **participants}, unary=unary, settings=SETTINGS
    )
    with Journal(processes.folder / "journal.jsonl") as journal:
        async with amends.Client(runtime.address) as client:
            await client.register(order_definition)
            world = World(processes, services, runtime, client, journal)
            yield world
            await world.settle()
