"""One run of a soak: everything is started, loaded, killed, looked at, drained and stopped."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio

import amends
from scripts.soak_load import OPEN_STATES, WAIT_S, Load, News, Stalled, Tally
from scripts.soak_plan import (
    JOURNAL_NAME,
    LAST_NEWS,
    RUNTIME,
    Errand,
    Findings,
    Kill,
    Trade,
    plan_errands,
    plan_kills,
)
from scripts.soak_victims import Victim
from shop.faults import count_faults
from shop.journal import Journal
from shop.processes import Process, Processes, ProcessFailed
from shop.server import faults_file
from shop.switches import write_switches

MANY_SAGAS: Final = 1_000
"""From here on every planned fault must have fired; a shorter run may miss a rare one."""

MANY_KILLS: Final = 20
"""From here on each of the processes must have been killed."""

STALL_S: Final = 180.0
"""Without any news for so long, nothing will come any more."""

DRAIN_S: Final = 180.0
"""From the last start's answer to the last end: backoffs and breakers have long gone round."""

PROGRESS_S: Final = 3.0

WATCH_S: Final = 0.1

EXCHANGE: Final = "exchange"

UNARY: Final = "unary"


# -- the kills -------------------------------------------------------------------------------------


class Killer:
    """Kills processes as planned and starts them again at once."""

    def __init__(self, victims: Sequence[Victim], news: News, tally: Tally) -> None:
        self._victims = {victim.name: victim for victim in victims}
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
                victim = self._victims[kill.victim]
                killed_s = time.monotonic()
                await victim.kill()
                self._tally.kills[kill.victim] += 1
                self._tally.kills_while_starting += kill.victim in self._starting
                self._lives[kill.victim] += 1
                self._starting.add(kill.victim)
                tasks.start_soon(self._see_ready, victim, killed_s, self._lives[kill.victim])

    async def watch(self) -> None:
        """Raise `ProcessFailed` when one has ended that nobody has killed."""
        while True:
            for victim in self._victims.values():
                if how := victim.ended():
                    raise ProcessFailed(how)
            await anyio.sleep(WATCH_S)

    async def _see_ready(self, victim: Victim, killed_s: float, life: int) -> None:
        await victim.wait_ready()
        if self._lives[victim.name] != life:
            return  # it was killed again meanwhile, and somebody else measures that
        self._starting.discard(victim.name)
        if victim.name == RUNTIME:
            self._tally.restart_s.append(time.monotonic() - killed_s)
            self._news.at_next.append(
                lambda: self._tally.first_news_s.append(time.monotonic() - killed_s)
            )


# -- the run ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says."""

    trade: Trade
    sagas: int
    kills: int
    seed: int
    clients: int
    transport: str
    keep: bool

    @property
    def unary(self) -> Sequence[str]:
        """Those that are called by the unary verbs."""
        return self.trade.unary_of(self.transport)

    def way_to(self, participant: str) -> str:
        """Say how a participant is called."""
        return UNARY if participant in self.unary else EXCHANGE


async def run(options: Options, folder: Path, tally: Tally) -> list[str]:
    """Run load and kills in `folder`, drain, stop; gives what was wrong, a line each."""
    failures: list[str] = []
    with Journal(folder / JOURNAL_NAME) as journal:
        try:
            failures += await _run(options, folder, journal, tally)
        except* (ProcessFailed, Stalled, amends.AmendsError) as failed:
            failures += [f"{type(error).__name__}: {error}" for error in _leaves(failed)]
    for participant in options.trade.participants:
        tally.faults += count_faults(faults_file(folder / f"{participant}.db"))
    return failures


async def _run(options: Options, folder: Path, journal: Journal, tally: Tally) -> list[str]:
    """Run load and kills, drain, stop; gives what was wrong, a line each."""
    trade = options.trade
    errands = plan_errands(trade, options.seed, options.sagas)
    kills = plan_kills(trade, options.seed, options.kills, errands)
    failures: list[str] = []
    async with Processes(folder) as processes:
        write_switches(processes.switches, {"seed": options.seed, **trade.switches()})
        participants = await trade.start(processes)
        runtime = await processes.start_runtime(
            {each.name: each.address for each in participants},
            unary=options.unary,
            settings=trade.settings,
        )
        async with amends.Client(runtime.address) as client:
            for definition in trade.definitions():
                await client.register(definition)
            load = Load(trade, client, journal, errands, tally)
            killer = Killer(trade.victims(processes), load.news, tally)
            moments = look_moments(trade, errands)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_show_progress, options, runtime, tally)
                tasks.start_soon(killer.watch)
                tasks.start_soon(_watch_stall, load.news)
                async with anyio.create_task_group() as loads:
                    loads.start_soon(killer.run, kills)
                    loads.start_soon(_look, processes, load, moments, tally, failures)
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
    while True:
        still_open = [saga async for saga in client.list(state=OPEN_STATES)]
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
        f"{name} was called by {way}, not by {options.way_to(name)}"
        for name, way in tally.transports.items()
        # Empty: nobody has called it since the runtime's last start.
        if way not in ("", options.way_to(name))
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


# -- looking while it runs -------------------------------------------------------------------------


def look_moments(trade: Trade, errands: Sequence[Errand]) -> list[int]:
    """Give the news after which the books are looked at, evenly over the run."""
    certain = sum(errand.certain_news for errand in errands)
    looks = trade.looks(len(errands))
    return [int(certain * LAST_NEWS * number / (looks + 1)) for number in range(1, looks + 1)]


async def _look(
    processes: Processes, load: Load, moments: Sequence[int], tally: Tally, failures: list[str]
) -> None:
    """At each moment let no more sagas start, wait until none is under way, and look."""
    for moment in moments:
        await load.news.wait_for(moment)
        load.pause()
        try:
            wrong = await _look_when_quiet(load.trade, processes, load)
        finally:
            load.go_on()
        tally.looks += 1
        failures += [f"after {load.news.count} pieces of news: {line}" for line in wrong]


async def _look_when_quiet(trade: Trade, processes: Processes, load: Load) -> list[str]:
    """Look at the books; what was under way meanwhile, or not there, is looked at again."""
    give_up_at_s = time.monotonic() + DRAIN_S
    while time.monotonic() < give_up_at_s:
        before = await load.under_way()
        if before is not None and before[0] == 0:
            with contextlib.suppress(*trade.unreadable):
                wrong = await anyio.to_thread.run_sync(trade.look, processes)
                # An impatient client's start may have come in between.
                if await load.under_way() == before:
                    return wrong
        await anyio.sleep(WATCH_S)
    return [f"it was not quiet within {DRAIN_S:g} s"]


# -- what there is to say --------------------------------------------------------------------------


def missing(options: Options, tally: Tally) -> list[str]:
    """Name what was planned and never fired: such a run has shown less than it says."""
    found: list[str] = []
    if tally.kills.total() != options.kills:
        found.append(f"{options.kills} kills were planned, and {tally.kills.total()} happened")
    if options.kills >= MANY_KILLS:
        victims = [*options.trade.killed, RUNTIME]
        found += [f"never fired: a kill of {name}" for name in victims if not tally.kills[name]]
    if options.sagas >= MANY_SAGAS:
        found += [
            f"never fired: {name}"
            for name in options.trade.planned_faults()
            if not tally.faults[name]
        ]
    return found


def say_result(
    tally: Tally, found: Findings, by_transport: Mapping[str, int], failures: Sequence[str]
) -> None:
    """Print it for people."""
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
    if tally.looks:
        print(f"times that the books were looked at while it ran: {tally.looks}")
    print("\nthe audit:")
    for line in [*found.lines, *(f"VIOLATION {failure}" for failure in failures)]:
        print(f"  {line}")


def spread(measured: Sequence[float]) -> dict[str, float] | None:
    """Give the median and the most of some seconds; None if there are none."""
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
