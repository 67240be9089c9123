"""`make soak`: orders under load while processes are killed with SIGKILL; then the audit.

How to think about it. Everything that happens is drawn from one seed: which orders there are, what
goes wrong with each, which process is killed after which of the client's news. What the machine
makes of it (who is how far at that moment) is its own affair, and differs each time.

1. The four services and the runtime are processes of their own, each with its own database. A
   killed one is started again at once, on the same port and the same database. By default two of
   the services are called over streams and two by the unary verbs, so that every order goes by
   both; `--transport` says otherwise.
2. The load is a closed loop of clients over one connection. A client writes into its journal that
   it is about to start an order, then starts it, writes that it was acknowledged, waits, and
   writes the end. When the runtime is gone it just asks again, under the same id. Impatient ones
   do not: their starts may stay unknown, and whatever became of them must still be whole. Forgetful
   ones do not wait: nothing but the runtime itself carries their orders on after a kill.
3. A kill strikes after the k-th piece of news (an acknowledgement or an end), plus some
   milliseconds. Some strike a runtime that is only just coming up again.
4. When all is started, there is so much time for everything to end, which is only looked at in
   lists, since to wait for a saga would wake it. What has not ended by then is a violation, as is a
   runtime that does not end in order when it is told to.
5. The auditor reads the services' ledgers and the client's journal, and never what the runtime
   believes.

The last line on standard output is one JSON object. Exit code: 0 when nothing is wrong; 1 when
something is, and then the folder with all databases, logs and the journal is kept; 2 for arguments
that cannot be; 130 when interrupted. No process is left behind in any case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import secrets
import shutil
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio

import amends
from shop.audit import Report, audit, databases_in
from shop.catalogue import (
    DECLINED_CARD,
    EMPTY_PURSE,
    OPENING_BALANCES_CENTS,
    PRODUCTS,
    SERVICES,
    SHOP_ACCOUNT,
    UNKNOWN_ADDRESS,
)
from shop.definition import order as order_definition
from shop.faults import count_faults
from shop.journal import Journal
from shop.processes import Process, Processes, ProcessFailed
from shop.server import faults_file
from shop.switches import write_switches

JOURNAL_NAME: Final = "journal.jsonl"

MANY_SAGAS: Final = 1_000
"""From here on every planned fault must have fired; a shorter run may miss a rare one."""

MANY_KILLS: Final = 20
"""From here on each of the five processes must have been killed."""

PARTICIPANT_KILLS: Final = 0.3
"""The share of kills that strike a participant; the others strike the runtime."""

AGAIN_KILLS: Final = 0.15
"""The share of the runtime's kills that strike it while it comes up from the one before."""

AGAIN_WITHIN_S: Final = 1.5
"""About what a start takes, so that such a kill strikes any part of one."""

KILL_DELAY_S: Final = 0.03
"""At most so long after the news: longer than a step, so that any part of one can be struck."""

LAST_NEWS: Final = 0.95
"""No kill is planned beyond this share of the news that is certain to come."""

START_TIMEOUT_S: Final = 10.0
"""Of one start; a patient client begins anew with the same id."""

WAIT_S: Final = 60.0
"""After so long a client leaves a saga to the drain, and goes on with the next."""

MANY_LATE: Final = 30
"""After so many sagas that were left like this there is nothing more to learn from going on."""

STALL_S: Final = 180.0
"""Without any news for so long, nothing will come any more."""

DRAIN_S: Final = 180.0
"""From the last start's answer to the last end: backoffs and breakers have long gone round."""

PROGRESS_S: Final = 3.0
WATCH_S: Final = 0.1

OPERATIONS: Final = ("place", "charge", "reserve", "ship", "confirm")
UNDOINGS: Final = ("cancel", "refund", "release")

EXCHANGE: Final = "exchange"
UNARY: Final = "unary"
UNARY_OF: Final[dict[str, tuple[str, ...]]] = {
    "auto": (),
    "unary": SERVICES,
    "both": ("orders", "inventory"),
}
"""By `--transport`: the services that are called by the unary verbs; the others have streams."""

SERVICE_OF: Final = {
    "place": "orders",
    "confirm": "orders",
    "cancel": "orders",
    "charge": "payments",
    "refund": "payments",
    "reserve": "inventory",
    "release": "inventory",
    "ship": "shipping",
}

SWITCHES: Final[dict[str, dict[str, Any]]] = {
    "orders": {
        "place": {"decline": 0.02, "lose_reply": 0.02, "fail_before": 0.02, "slow": 0.02},
        "confirm": {"lose_reply": 0.02, "fail_before": 0.02, "slow": 0.02},
        # Fewer orders are undone than done: higher chances, so that all of them fire.
        "cancel": {"lose_reply": 0.08, "fail_before": 0.08, "slow": 0.05},
    },
    "payments": {
        "charge": {"lose_reply": 0.02, "fail_before": 0.02, "slow": 0.02},
        "refund": {"lose_reply": 0.08, "fail_before": 0.08, "slow": 0.05},
    },
    "inventory": {
        "reserve": {"lose_reply": 0.02, "fail_before": 0.02, "slow": 0.02},
        "release": {"lose_reply": 0.08, "fail_before": 0.08, "slow": 0.05},
    },
    "shipping": {"ship": {"lose_reply": 0.02, "fail_before": 0.02, "slow": 0.02}},
}
"""The chances of each attempt; `decline` of each step."""

SLOW_S: Final = 0.3
"""Longer than an order takes, so that deadlines and cancellations strike in the middle."""

REFUSALS: Final = {
    "card_declined": 0.05,
    "out_of_stock": 0.04,
    "insufficient_funds": 0.03,
    "undeliverable": 0.05,
}
"""The share of orders that are refused because of what they say."""

CANCELLED: Final = 0.04
CANCEL_WITHIN_S: Final = 0.2
HURRIED: Final = 0.04
DEADLINE_S: Final = (0.02, 0.3)
FORGETFUL: Final = 0.15
IMPATIENT: Final = 0.03
PATIENCE_S: Final = (0.001, 0.02)
"""Around what a start takes: some are acknowledged, and of some nobody ever hears."""


# -- the plan --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Errand:
    """One order, and how its client behaves."""

    saga_id: str
    order: Mapping[str, object]
    deadline_s: float | None
    cancel_after_s: float | None
    patience_s: float | None
    """How long an impatient client tries to start it; None: until it is acknowledged."""
    is_forgetful: bool

    @property
    def certain_news(self) -> int:
        """How many pieces of news there will be of it, whatever happens."""
        if self.patience_s is not None:
            return 0
        return 1 if self.is_forgetful else 2


@dataclass(frozen=True, slots=True)
class Kill:
    """A process that is killed `delay_s` after the client's news number `after_news`."""

    after_news: int
    delay_s: float
    victim: str


def plan_errands(seed: int, sagas: int) -> list[Errand]:
    """Draw all orders."""
    return [_errand(seed, number) for number in range(sagas)]


def _errand(seed: int, number: int) -> Errand:
    dice = _dice(seed, "order", number)
    customers = sorted(set(OPENING_BALANCES_CENTS) - {SHOP_ACCOUNT, EMPTY_PURSE})
    order: dict[str, object] = {
        "customer": dice.choice(customers),
        "card": "4000-0000",
        "sku": dice.choice([sku for sku, product in PRODUCTS.items() if product.opening_stock]),
        "quantity": dice.randint(1, 3),
        "address": f"{dice.randint(1, 99)} Long Lane",
    }
    (refusal,) = dice.choices([*REFUSALS, ""], [*REFUSALS.values(), 1 - sum(REFUSALS.values())])
    match refusal:
        case "card_declined":
            order["card"] = DECLINED_CARD
        case "out_of_stock":
            order["sku"] = next(s for s, product in PRODUCTS.items() if not product.opening_stock)
        case "insufficient_funds":
            order["customer"] = EMPTY_PURSE
        case "undeliverable":
            order["address"] = UNKNOWN_ADDRESS
        case _:
            pass
    return Errand(
        saga_id=f"soak-{seed}-{number:06}",
        order=order,
        deadline_s=dice.uniform(*DEADLINE_S) if dice.random() < HURRIED else None,
        cancel_after_s=dice.uniform(0, CANCEL_WITHIN_S) if dice.random() < CANCELLED else None,
        patience_s=dice.uniform(*PATIENCE_S) if dice.random() < IMPATIENT else None,
        is_forgetful=dice.random() < FORGETFUL,
    )


def plan_kills(seed: int, kills: int, errands: Sequence[Errand]) -> list[Kill]:
    """Draw all kills, in their order; none waits for news that may not come."""
    dice = _dice(seed, "kills")
    certain = sum(errand.certain_news for errand in errands)
    of_participants = int(kills * PARTICIPANT_KILLS)
    again = int((kills - of_participants) * AGAIN_KILLS)
    victims = [SERVICES[number % len(SERVICES)] for number in range(of_participants)]
    victims += ["amends"] * (kills - of_participants - again)
    dice.shuffle(victims)
    moments = sorted(dice.randint(0, int(certain * LAST_NEWS)) for _ in victims)
    planned = [
        Kill(moment, dice.uniform(0, KILL_DELAY_S), victim)
        for moment, victim in zip(moments, victims, strict=True)
    ]
    for first in dice.sample([kill for kill in planned if kill.victim == "amends"], k=again):
        at = planned.index(first) + 1
        planned.insert(at, Kill(first.after_news, dice.uniform(0, AGAIN_WITHIN_S), "amends"))
    return planned


def planned_faults() -> list[str]:
    """Name everything that a long run must have seen, as `Tally.faults` counts it."""
    of_switches = [
        f"{operation} {fault}"
        for operations in SWITCHES.values()
        for operation, faults in operations.items()
        for fault in faults
    ]
    turns = ["turned back by cancelled", "turned back by deadline"]
    return [*of_switches, *(f"refused {reason}" for reason in REFUSALS), *turns, "impatient start"]


def _dice(*what: object) -> random.Random:
    """Make a source of chance that the seed decides, another one for each purpose."""
    return random.Random("/".join(map(str, what)))  # noqa: S311  # repeatable, guards no secret


# -- the load --------------------------------------------------------------------------------------


class Stalled(Exception):
    """The load does not go on."""


class News:
    """Counts what the client was told, and wakes whoever waits for the k-th piece of it."""

    def __init__(self) -> None:
        self.count = 0
        self.last_s = time.monotonic()
        self.at_next: list[Callable[[], None]] = []
        """Called with the next piece, once."""
        self._changed = anyio.Event()

    def came(self) -> None:
        """One more acknowledgement or end."""
        self.count += 1
        self.last_s = time.monotonic()
        self._changed.set()
        self._changed = anyio.Event()
        at_next, self.at_next = self.at_next, []
        for call in at_next:
            call()

    async def wait_for(self, count: int) -> None:
        """Wait until there have been so many."""
        while self.count < count:
            await self._changed.wait()


@dataclass(slots=True)
class Tally:
    """What has happened so far."""

    started: int = 0
    under_way: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    kills_while_starting: int = 0
    left: list[str] = field(default_factory=list)
    """Sagas that clients have left to the drain."""
    stuck: int = 0
    """Sagas that had not ended after it."""
    restart_s: list[float] = field(default_factory=list)
    """From a kill of the runtime to its ready file."""
    first_news_s: list[float] = field(default_factory=list)
    """From a kill of the runtime to the first news after it was ready again."""
    resident_mib: list[float] = field(default_factory=list)
    """Of the runtime, through all of its lives."""
    transports: dict[str, str] = field(default_factory=dict)
    """By service: how the last runtime called it."""


class Load:
    """The clients: a closed loop over one connection."""

    def __init__(
        self, client: amends.Client, journal: Journal, errands: Sequence[Errand], tally: Tally
    ) -> None:
        self.news = News()
        self._client = client
        self._journal = journal
        self._errands: Iterator[Errand] = iter(errands)
        self._tally = tally
        self._late = 0

    async def run_client(self) -> None:
        """Run errands, one after another, until there are none."""
        for errand in self._errands:
            self._tally.started += 1
            self._tally.under_way += 1
            if await self._start(errand):
                if errand.cancel_after_s is not None:
                    await self._cancel(errand, errand.cancel_after_s)
                if errand.is_forgetful:
                    self._tally.left.append(errand.saga_id)
                elif not await self.see_end(errand.saga_id, WAIT_S):
                    self._tally.left.append(errand.saga_id)
                    self._note_late()
            self._tally.under_way -= 1

    async def see_end(self, saga_id: str, timeout_s: float) -> bool:
        """Wait for a saga's end and write it down; False if it does not come in time, or at all."""
        give_up_at_s = time.monotonic() + timeout_s
        while (left_s := give_up_at_s - time.monotonic()) > 0:
            try:
                saga = await self._client.wait(saga_id, timeout_s=left_s)
            except (amends.WaitTimeout, amends.Unavailable, amends.DeadlineExceeded):
                continue
            except amends.NotFound:
                return False  # an acknowledged saga is lost; the auditor will say so
            self._journal.ended(saga_id, saga.state)
            self._tally.ended[saga.state] += 1
            self._count_turn(saga)
            self.news.came()
            return True
        return False

    def _note_late(self) -> None:
        self._late += 1
        if self._late >= MANY_LATE:
            raise Stalled(f"{self._late} sagas did not end within {WAIT_S:g} s each")

    async def _start(self, errand: Errand) -> bool:
        """Start it; False if an impatient client never heard that it was."""
        self._journal.starting(errand.saga_id, errand.order)
        while True:
            try:
                await self._client.start(
                    "order",
                    errand.order,
                    saga_id=errand.saga_id,
                    deadline_s=errand.deadline_s,
                    timeout_s=errand.patience_s or START_TIMEOUT_S,
                )
            except amends.StartUnknown:
                if errand.patience_s is not None:
                    self._tally.faults["impatient start"] += 1
                    return False
            except (amends.Unavailable, amends.DeadlineExceeded, amends.Overloaded):
                if errand.patience_s is not None:
                    # Not in doubt, says the SDK; the auditor will hold it to that.
                    self._journal.refused(errand.saga_id)
                    self._tally.faults["refused start"] += 1
                    return False
            else:
                self._journal.acknowledged(errand.saga_id)
                self.news.came()
                return True

    async def _cancel(self, errand: Errand, after_s: float) -> None:
        await anyio.sleep(after_s)
        # It may be too late, or nobody knows; the saga's end shows which.
        with contextlib.suppress(amends.ApiError):
            await self._client.cancel(errand.saga_id, reason="second thoughts", author="customer")

    def _count_turn(self, saga: amends.Saga) -> None:
        if saga.turn is None:
            return
        if saga.turn.cause is amends.Cause.REJECTED and saga.turn.failure is not None:
            self._tally.faults[f"refused {saga.turn.failure.reason}"] += 1
        else:
            self._tally.faults[f"turned back by {saga.turn.cause}"] += 1


# -- the kills -------------------------------------------------------------------------------------


class Killer:
    """Kills processes as planned and starts them again at once."""

    def __init__(self, processes: Sequence[Process], news: News, tally: Tally) -> None:
        self._processes = {process.name: process for process in processes}
        self._news = news
        self._tally = tally
        self._lives: Counter[str] = Counter()
        self._starting: set[str] = set()

    async def run(self, kills: Sequence[Kill]) -> None:
        """Carry out all kills, and return when everything is up again."""
        async with anyio.create_task_group() as tasks:
            for kill in kills:
                await self._news.wait_for(kill.after_news)
                await anyio.sleep(kill.delay_s)
                process = self._processes[kill.victim]
                killed_s = time.monotonic()
                process.kill()
                process.start_nowait()
                self._tally.kills[kill.victim] += 1
                self._tally.kills_while_starting += kill.victim in self._starting
                self._lives[kill.victim] += 1
                self._starting.add(kill.victim)
                tasks.start_soon(self._see_ready, process, killed_s, self._lives[kill.victim])

    async def watch(self) -> None:
        """Raise `ProcessFailed` when one has ended that nobody has killed."""
        while True:
            for process in self._processes.values():
                if not process.is_running:
                    raise ProcessFailed(
                        f"{process.name} ended by itself, with {process.exit_code}\n"
                        f"{process.last_lines()}"
                    )
            await anyio.sleep(WATCH_S)

    async def _see_ready(self, process: Process, killed_s: float, life: int) -> None:
        await process.wait_ready()
        if self._lives[process.name] != life:
            return  # it was killed again meanwhile, and somebody else measures that
        self._starting.discard(process.name)
        if process.name == "amends":
            self._tally.restart_s.append(time.monotonic() - killed_s)
            self._news.at_next.append(
                lambda: self._tally.first_news_s.append(time.monotonic() - killed_s)
            )


# -- the run ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says."""

    sagas: int
    kills: int
    seed: int
    clients: int
    transport: str
    keep: bool

    def way_to(self, service: str) -> str:
        """Say how a service is called."""
        return UNARY if service in UNARY_OF[self.transport] else EXCHANGE


async def soak(options: Options, folder: Path) -> dict[str, Any]:
    """Run it all in `folder`, say what happens, and give the last line's content."""
    began_s = time.monotonic()
    tally = Tally()
    failures: list[str] = []
    with Journal(folder / JOURNAL_NAME) as journal:
        try:
            failures += await _run(options, folder, journal, tally)
        except* (ProcessFailed, Stalled, amends.AmendsError) as failed:
            failures += [f"{type(error).__name__}: {error}" for error in _leaves(failed)]
    for database in databases_in(folder).values():
        tally.faults += count_faults(faults_file(database))
    if not failures:  # a run that did not come to its end is not to be blamed for what it left out
        failures += _missing(options, tally)
    report = _audit(folder, failures)
    by_transport = Counter[str]()
    for operation, count in report.effects.items():
        by_transport[options.way_to(SERVICE_OF[operation])] += count
    if not failures:
        ways = {options.way_to(service) for service in SERVICES}
        failures += [f"nothing took effect by {way}" for way in ways if not by_transport[way]]
    _say_result(tally, report, by_transport, failures)
    return {
        "mode": "saga",
        "seed": options.seed,
        "sagas": report.sagas,
        "kills": tally.kills.total(),
        "completed": report.completed,
        "compensated": report.compensated,
        "violations": len(report.violations) + len(failures),
        "stuck": tally.stuck,
        "unknown_starts": report.unknown_starts,
        "seconds": round(time.monotonic() - began_s, 1),
        "clients": options.clients,
        "transport": options.transport,
        "effects_by_transport": dict(sorted(by_transport.items())),
        "kills_by_process": dict(sorted(tally.kills.items())),
        "kills_while_starting": tally.kills_while_starting,
        "restart_s": _spread(tally.restart_s),
        "first_news_s": _spread(tally.first_news_s),
        "resident_mib": {
            "first": tally.resident_mib[0] if tally.resident_mib else None,
            "highest": max(tally.resident_mib, default=None),
            "last": tally.resident_mib[-1] if tally.resident_mib else None,
        },
        "effects": dict(report.effects),
        "faults": dict(sorted(tally.faults.items())),
    }


async def _run(options: Options, folder: Path, journal: Journal, tally: Tally) -> list[str]:
    """Run load and kills, drain, stop; gives what was wrong, a line each."""
    errands = plan_errands(options.seed, options.sagas)
    kills = plan_kills(options.seed, options.kills, errands)
    failures: list[str] = []
    async with Processes(folder) as processes:
        write_switches(processes.switches, _switches(options.seed))
        services = await processes.start_services()
        runtime = await processes.start_runtime(
            {each.name: each.address for each in services}, unary=UNARY_OF[options.transport]
        )
        async with amends.Client(runtime.address) as client:
            await client.register(order_definition)
            load = Load(client, journal, errands, tally)
            killer = Killer(processes.all, load.news, tally)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_show_progress, options, runtime, tally)
                tasks.start_soon(killer.watch)
                tasks.start_soon(_watch_stall, load.news)
                async with anyio.create_task_group() as loads:
                    loads.start_soon(killer.run, kills)
                    for _ in range(options.clients):
                        loads.start_soon(load.run_client)
                failures += await _drain(client, load, tally)
                failures += await _see_transports(options, client, tally)
                tasks.cancel_scope.cancel()
            tally.resident_mib += _resident_mib(runtime)
        code = await runtime.stop()
        if code != 0:
            failures.append(f"the runtime was told to end and ended with {code}, not 0")
    return failures


async def _drain(client: amends.Client, load: Load, tally: Tally) -> list[str]:
    """Wait until everything has ended; gives a line for each thing that has not."""
    print(f"all started, {len(tally.left)} not waited for", flush=True)
    give_up_at_s = time.monotonic() + DRAIN_S
    states = (amends.SagaState.RUNNING, amends.SagaState.COMPENSATING, amends.SagaState.STUCK)
    while True:
        still_open = [saga async for saga in client.list(state=states)]
        if not still_open or time.monotonic() > give_up_at_s:
            break
        await anyio.sleep(WATCH_S)
    tally.stuck = len(still_open)
    failures = [f"saga {saga.saga_id} has not ended: it is {saga.state}" for saga in still_open]
    without_wake_up = (await client.runtime()).without_wake_up
    if without_wake_up:
        failures.append(f"nothing would wake {without_wake_up} sagas")
    for saga_id in {*tally.left} - {saga.saga_id for saga in still_open}:
        await load.see_end(saga_id, WAIT_S)
    return failures


async def _see_transports(options: Options, client: amends.Client, tally: Tally) -> list[str]:
    """Note how each service is called; gives a line for each that is called otherwise."""
    tally.transports = {each.name: each.transport for each in await client.participants()}
    return [
        f"{service} was called by {way}, not by {options.way_to(service)}"
        for service, way in tally.transports.items()
        if way != options.way_to(service)
    ]


async def _show_progress(options: Options, runtime: Process, tally: Tally) -> None:
    began_s = time.monotonic()
    while True:
        tally.resident_mib += _resident_mib(runtime)
        memory = f"{tally.resident_mib[-1]:.0f} MiB" if tally.resident_mib else "unknown"
        print(
            f"{time.monotonic() - began_s:5.0f} s  "
            f"{tally.ended.total():,} of {options.sagas:,} sagas ended "
            f"({tally.ended['COMPLETED']:,} completed, "
            f"{tally.ended['COMPENSATED']:,} compensated), "
            f"{tally.under_way} under way, {tally.kills.total()} of {options.kills} kills, "
            f"runtime's memory {memory}",
            flush=True,
        )
        await anyio.sleep(PROGRESS_S)


async def _watch_stall(news: News) -> None:
    while True:
        await anyio.sleep(WATCH_S)
        if time.monotonic() - news.last_s > STALL_S:
            raise Stalled(f"the clients have heard nothing for {STALL_S:g} s")


def _switches(seed: int) -> dict[str, Any]:
    document: dict[str, Any] = {"seed": seed}
    for service, operations in SWITCHES.items():
        document[service] = {
            operation: faults | {"slow_s": SLOW_S} for operation, faults in operations.items()
        }
    return document


def _audit(folder: Path, failures: list[str]) -> Report:
    """Audit what there is; a run that failed early may have left nothing to audit."""
    try:
        return audit(databases_in(folder), folder / JOURNAL_NAME)
    except (OSError, sqlite3.Error, ValueError) as error:
        failures.append(f"cannot audit {folder}: {error}")
        return Report(
            sagas=0,
            acknowledged=0,
            completed=0,
            compensated=0,
            unknown_starts=0,
            effects={},
            violations=(),
        )


def _missing(options: Options, tally: Tally) -> list[str]:
    """Name what was planned and never fired: such a run has shown less than it says."""
    missing: list[str] = []
    if tally.kills.total() != options.kills:
        missing.append(f"{options.kills} kills were planned, and {tally.kills.total()} happened")
    if options.kills >= MANY_KILLS:
        victims = [*SERVICES, "amends"]
        missing += [f"never fired: a kill of {name}" for name in victims if not tally.kills[name]]
    if options.sagas >= MANY_SAGAS:
        missing += [f"never fired: {name}" for name in planned_faults() if not tally.faults[name]]
    return missing


def _say_result(
    tally: Tally, report: Report, by_transport: Mapping[str, int], failures: Sequence[str]
) -> None:
    print("\nfaults that fired:")
    for name, count in sorted(tally.faults.items()):
        print(f"  {count:6,}  {name}")
    for name, count in sorted(tally.kills.items()):
        print(f"  {count:6,}  kill of {name}")
    for what, measured in (
        ("from a kill of the runtime until it was ready", tally.restart_s),
        ("from a kill of the runtime until a client had news", tally.first_news_s),
    ):
        if measured:
            print(f"{what}: median {statistics.median(measured):.2f} s, most {max(measured):.2f} s")
    if tally.resident_mib:
        first, last = tally.resident_mib[0], tally.resident_mib[-1]
        print(
            f"runtime's memory: first {first:.0f}, highest {max(tally.resident_mib):.0f}, "
            f"last {last:.0f} MiB"
        )
    for way, count in sorted(by_transport.items()):
        print(f"calls by {way} that took effect: {count:,}")
    print("\nthe audit:")
    for line in [*report.lines(), *(f"VIOLATION {failure}" for failure in failures)]:
        print(f"  {line}")


def _spread(measured: Sequence[float]) -> dict[str, float] | None:
    if not measured:
        return None
    return {"median": round(statistics.median(measured), 2), "most": round(max(measured), 2)}


def _resident_mib(process: Process) -> list[float]:
    """The resident memory of a process in MiB, as a list of one; empty where it cannot be read."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    except OSError:
        return []  # it is just being killed, or this is no Linux
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return [round(int(line.split()[1]) / 1024, 1)]
    return []


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


# -- the command -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak; gives the exit code."""
    options = _read_options(arguments)
    folder = Path(tempfile.mkdtemp(prefix="amends-soak-"))
    print(
        f"soak of {options.sagas:,} sagas and {options.kills} kills, seed {options.seed}, "
        f"{options.clients} clients, in {folder}",
        flush=True,
    )
    last_line = anyio.run(_until_interrupted, options, folder)
    is_clean = last_line is not None and last_line["violations"] == 0
    if is_clean and not options.keep:
        shutil.rmtree(folder)
    else:
        print(f"everything is kept in {folder}; make soak SEED={options.seed} repeats the plan")
    if last_line is None:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(last_line))
    return 0 if is_clean else 1


async def _until_interrupted(options: Options, folder: Path) -> dict[str, Any] | None:
    """Soak until the end, or until SIGINT or SIGTERM, and then give None."""
    last_line: dict[str, Any] | None = None

    async def listen() -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            await anext(signals)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        last_line = await soak(options, folder)
        tasks.cancel_scope.cancel()
    return last_line


def _read_options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="make soak", description="Kill processes under load, then audit the books."
    )
    parser.add_argument("--sagas", type=int, default=300, help="orders to start (default 300)")
    parser.add_argument("--kills", type=int, default=10, help="SIGKILLs in between (default 10)")
    parser.add_argument("--seed", type=int, help="of the plan; default: a new one, printed")
    parser.add_argument("--clients", type=int, default=32, help="orders at a time (default 32)")
    parser.add_argument("--mode", choices=["saga"], default="saga", help="of the sagas")
    parser.add_argument(
        "--transport",
        choices=[*UNARY_OF],
        default="both",
        help="auto: streams; unary: the unary verbs; both (default): two services each",
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder in any case")
    given = parser.parse_args(arguments)
    for name, least in (("sagas", 1), ("kills", 0), ("clients", 1)):
        if getattr(given, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return Options(
        sagas=given.sagas,
        kills=given.kills,
        seed=secrets.randbelow(2**32) if given.seed is None else given.seed,
        clients=given.clients,
        transport=given.transport,
        keep=given.keep,
    )


if __name__ == "__main__":
    sys.exit(main())
