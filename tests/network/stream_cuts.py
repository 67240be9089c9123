"""A runtime and a participant whose stream is cut at every byte of a batch; and what came of it.

How to think about it. Three sagas at a time make one batch: the participant's barrier is the real
one, and only what it answers is held until all of the group's first attempts have an outcome, so
that their replies leave in one message. The proxy in between lets whole HTTP/2 frames pass until
that message, and cuts the connection inside its frame, after so many bytes: none, some or all. What
the participant has done by then is committed, and the runtime cannot know it. Each saga must end as
it would have, and each effect must have happened once.

A `Target` is which message is cut. For each, an offset is one run with one cut; they run in several
lanes at once, each with a proxy, a stream and sagas of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sqlite3
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio

import amends
from amends.barrier import Barrier
from amends.handler import Handler
from amends.outcomes import Outcome, Verb
from amends.v1 import participant_pb2
from amends_runtime.config import Breaker, Config, Server
from amends_runtime.config import Participant as Registered
from amends_runtime.engine import Engine, run_engine
from tests.network.frames import CutInside
from tests.network.proxy import Cut, Direction, Proxy

__all__ = ["REPLIES", "REQUESTS", "UNDOINGS", "Report", "StreamCuts", "Target", "opened"]

SCHEMA: Final = "CREATE TABLE IF NOT EXISTS effects (saga_id TEXT, effect TEXT)"
PATIENCE_S: Final = 60.0
"""Bounds a broken run; nothing waits for it."""
TIMEOUT_S: Final = 5.0
MANY_TRIES: Final = 20
"""Of one offset whose frame turned out shorter; it differs by a byte per reply at most."""

RETRY: Final = amends.Retry(first_s=0.005, max_s=0.05, give_up_after_s=PATIENCE_S)


@dataclass(frozen=True)
class Target:
    """Which message is cut: of a group's calls, or the replies to its first attempts of `verb`."""

    name: str
    direction: Direction
    verb: Verb
    is_refused: bool = False
    """Whether the sagas are refused in their second step, and so compensated."""


REPLIES: Final = Target("replies to Execute", Direction.TO_CLIENT, Verb.EXECUTE)
UNDOINGS: Final = Target(
    "replies to Compensate", Direction.TO_CLIENT, Verb.COMPENSATE, is_refused=True
)
REQUESTS: Final = Target("calls", Direction.TO_SERVER, Verb.EXECUTE)


@dataclass
class Report:
    """What was cut, and what was wrong afterwards."""

    offsets: dict[str, set[int]] = field(default_factory=dict)
    """By target: after how many bytes of the frame it was cut."""
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    """By target: how long the frames were."""
    members: dict[str, Counter[int]] = field(default_factory=dict)
    """By target: how many calls or replies the messages had that were cut."""
    cuts: Counter[str] = field(default_factory=Counter)
    sagas: int = 0
    wrong: list[str] = field(default_factory=list)

    def missing(self, target: Target) -> list[int]:
        """Give the offsets of the longest frame at which nothing was cut."""
        longest = max(self.lengths.get(target.name, {0: 0}))
        return sorted({*range(longest + 1)} - self.offsets.get(target.name, set()))


class _Together:
    """A barrier that gives the outcomes of a group's first attempts all at once."""

    def __init__(self, inner: amends.SqliteBarrier) -> None:
        self.transaction_types = inner.transaction_types
        self._inner = inner
        self._expected: dict[str, _Expected] = {}

    def expect(self, group: str, verb: Verb, count: int, all_here: Callable[[], None]) -> None:
        """Hold this group's; `all_here` is called when the last one has its outcome."""
        self._expected[group] = _Expected(verb, count, all_here)

    async def open(self) -> None:
        """Open the database."""
        await self._inner.open()

    async def run(self, call: amends.Call, handler: Handler | None) -> Outcome:
        """Answer a call, and hold what was answered until its group is there."""
        outcome = await self._inner.run(call, handler)
        expected = self._expected.get(call.json()["group"])
        first = call.action == "reserve" and call.attempt == 1
        if expected is not None and first and call.verb is expected.verb:
            expected.came += 1
            if expected.came == expected.count:
                expected.all_here()
                expected.event.set()
            await expected.event.wait()
        return outcome

    async def aclose(self) -> None:
        """Close the database."""
        await self._inner.aclose()


class _Expected:
    """A group whose outcomes are held."""

    def __init__(self, verb: Verb, count: int, all_here: Callable[[], None]) -> None:
        self.verb = verb
        self.count = count
        self.all_here = all_here
        self.came = 0
        self.event = asyncio.Event()


@dataclass
class _Run:
    """One cut that is wanted, and how often it was tried."""

    target: Target
    offset: int
    cut: Cut
    tries: int = 0


@dataclass
class _Lane:
    """One participant's name, and the proxy that its stream goes through."""

    name: str
    proxy: Proxy
    gates: dict[Direction, CutInside]


class StreamCuts:
    """A runtime, a participant, and proxies in between. Made by `opened`."""

    def __init__(
        self,
        engine: Engine,
        client: amends.Client,
        barrier: _Together,
        lanes: Sequence[_Lane],
        database: Path,
        *,
        batch: int,
        seed: int,
    ) -> None:
        self.report = Report()
        self._engine = engine
        self._client = client
        self._barrier = barrier
        self._lanes = lanes
        self._database = database
        self._batch = batch
        self._chance = random.Random(seed)  # noqa: S311  # to be repeated, not to be secret
        self._groups = 0
        self._expected: dict[str, bool] = {}  # by saga: whether it is refused
        self._runs: deque[_Run] = deque()
        self._under_way = 0

    async def cut_everywhere(self, target: Target, cuts: Sequence[Cut] | None = None) -> None:
        """Cut after every number of bytes, in each of these ways; by default in turn in one."""
        length = await self._length(target)
        planned = 0
        while planned <= length:
            for offset in range(planned, length + 1):
                ways = cuts or ([Cut.RST, Cut.FIN][offset % 2],)
                self._runs.extend(_Run(target, offset, cut) for cut in ways)
            planned = length + 1
            await self._run_all()
            length = max(self.report.lengths[target.name])  # numbers grow, and so do frames

    async def cut_sometimes(self, target: Target, strata: int) -> None:
        """Cut once in each of so many equal parts of the frame, at its begin and at its end."""
        length = await self._length(target)
        edges = [round(length * number / strata) for number in range(strata + 1)]
        inside = [self._chance.randint(low, high) for low, high in itertools.pairwise(edges)]
        for number, offset in enumerate(sorted({0, *inside, length})):
            self._runs.append(_Run(target, offset, [Cut.RST, Cut.FIN][number % 2]))
        await self._run_all()

    def audit(self) -> Report:
        """Compare all effects with all sagas, once everything is over."""
        with closing(sqlite3.connect(f"{self._database.as_uri()}?mode=ro", uri=True)) as connection:
            found = Counter(connection.execute("SELECT saga_id, effect FROM effects").fetchall())
        wanted = Counter[tuple[str, str]]()
        for saga_id, is_refused in self._expected.items():
            effects = ("reserve", "release") if is_refused else ("reserve", "charge")
            wanted.update((saga_id, effect) for effect in effects)
        wrong = self.report.wrong
        wrong += [f"{what} is missing {count} times" for what, count in (wanted - found).items()]
        wrong += [f"{what} is there {count} times more" for what, count in (found - wanted).items()]
        for status in self._engine.lanes.status():
            if status.transport != "exchange":
                wrong.append(f"{status.name} was called by {status.transport} in the end")
        self.report.sagas = len(self._expected)
        return self.report

    async def _length(self, target: Target) -> int:
        """Cut once at the end of the frame, to see how long it is."""
        self._runs.append(_Run(target, 0, Cut.FIN))
        await self._run_all()
        return max(self.report.lengths[target.name])

    async def _run_all(self) -> None:
        async with anyio.create_task_group() as tasks:
            for lane in self._lanes:
                tasks.start_soon(self._run_in, lane)

    async def _run_in(self, lane: _Lane) -> None:
        while self._runs:
            run = self._runs.popleft()
            await self._run_one(lane, run)

    async def _run_one(self, lane: _Lane, run: _Run) -> None:
        """Run a group of sagas, and cut its batch."""
        target, gate = run.target, lane.gates[run.target.direction]
        struck_before = len(gate.struck)
        self._groups += 1
        group = f"g{self._groups}"
        if target.direction is Direction.TO_CLIENT:
            self._barrier.expect(
                group, target.verb, self._batch, lambda: gate.aim(run.offset, run.cut)
            )
        else:
            gate.aim(run.offset, run.cut)
        async with anyio.create_task_group() as tasks:
            for number in range(self._batch):
                tasks.start_soon(self._run_saga, lane, f"{group}-{number}", target)
        if len(gate.struck) == struck_before:
            self.report.wrong.append(f"{group}: nothing was cut at {run.offset} of {target.name}")
            return
        struck = gate.struck[-1]
        report = self.report
        report.lengths.setdefault(target.name, Counter())[struck.length] += 1
        report.members.setdefault(target.name, Counter())[_members(target, struck.message)] += 1
        report.offsets.setdefault(target.name, set()).add(struck.offset)
        report.cuts[f"{target.name} by {run.cut.value}"] += 1
        run.tries += 1
        if struck.offset != run.offset and run.tries < MANY_TRIES:
            self._runs.append(run)

    async def _run_saga(self, lane: _Lane, saga_id: str, target: Target) -> None:
        self._expected[saga_id] = target.is_refused
        order = {"group": saga_id.partition("-")[0], "refused": target.is_refused}
        await self._client.start(lane.name, order, saga_id=saga_id, timeout_s=PATIENCE_S)
        try:
            ended = await self._client.wait(saga_id, timeout_s=PATIENCE_S)
        except amends.WaitTimeout:
            self.report.wrong.append(f"{saga_id} has not ended")
            return
        state = amends.SagaState.COMPENSATED if target.is_refused else amends.SagaState.COMPLETED
        if ended.state is not state:
            self.report.wrong.append(f"{saga_id} is {ended.state}, not {state}")


@asynccontextmanager
async def opened(
    folder: Path,
    *,
    lanes: int = 4,
    batch: int = 3,
    seed: int = 0,
    crumbs: tuple[int, int] | None = None,
) -> AsyncIterator[StreamCuts]:
    """Run a participant, a runtime, and a proxy for each lane.

    `batch` is how many sagas share a message; `crumbs` how many bytes pass at once, from and to.
    """
    names = [f"lane-{number}" for number in range(lanes)]
    database = folder / "participant.db"
    barrier = _Together(amends.SqliteBarrier(database, schema=SCHEMA))
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            amends.serve(_participant(names, barrier), listen="127.0.0.1:0")
        )
        ways: list[_Lane] = []
        for number, name in enumerate(names):
            proxy = Proxy(
                server.address, seed=seed + number, **({"crumbs": crumbs} if crumbs else {})
            )
            gates = {
                Direction.TO_CLIENT: CutInside(_has_replies),
                Direction.TO_SERVER: CutInside(_has_calls),
            }
            proxy.gates.update(gates)
            ways.append(_Lane(name, await stack.enter_async_context(proxy), gates))
        config = Config(
            server=Server(listen="127.0.0.1:0", database=str(folder / "amends.db")),
            participants={way.name: Registered(address=way.proxy.address) for way in ways},
            breaker=Breaker(failures_to_open=1_000),  # what is cut is what is looked at
        )
        engine = await stack.enter_async_context(run_engine(config))
        client = await stack.enter_async_context(
            amends.Client(engine.address, timeout_s=PATIENCE_S)
        )
        for name in names:
            await client.register(_definition(name))
        yield StreamCuts(engine, client, barrier, ways, database, batch=batch, seed=seed)


def _participant(names: Sequence[str], barrier: Barrier) -> amends.Participant:
    participant = amends.Participant(names[0], barrier=barrier, aliases=names[1:])

    def note(call: amends.Call, tx: amends.Transaction, effect: str) -> None:
        tx.execute("INSERT INTO effects VALUES (?, ?)", (call.saga_id, effect))

    @participant.execute("reserve")
    def reserve(call: amends.Call, tx: amends.Transaction) -> dict[str, str]:
        note(call, tx, "reserve")
        return {"reservation": "r-0001"}

    @participant.compensate("reserve")
    def release(call: amends.Call, tx: amends.Transaction) -> None:
        note(call, tx, "release")

    @participant.execute("charge", compensatable=False)
    def charge(call: amends.Call, tx: amends.Transaction) -> None:
        if call.json()["refused"]:
            raise amends.Rejected("card_declined")
        note(call, tx, "charge")

    return participant


def _definition(name: str) -> Any:
    return (
        amends.Definition(name)
        .step(
            "reserve",
            name,
            "reserve",
            timeout_s=TIMEOUT_S,
            retry=RETRY,
            compensation_retry=RETRY,
        )
        .pivot("charge", name, "charge", timeout_s=TIMEOUT_S, retry=RETRY)
    )


def _has_replies(message: bytes) -> bool:
    return len(participant_pb2.ExchangeResponse.FromString(message).replies) > 0


def _has_calls(message: bytes) -> bool:
    return len(participant_pb2.ExchangeRequest.FromString(message).calls) > 0


def _members(target: Target, message: bytes) -> int:
    if target.direction is Direction.TO_CLIENT:
        return len(participant_pb2.ExchangeResponse.FromString(message).replies)
    return len(participant_pb2.ExchangeRequest.FromString(message).calls)
