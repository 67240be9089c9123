"""What sagas at rest cost, and how quickly they are back: parked ones, and those of a restart.

    python scripts/bench_parking.py [--sagas 100000] [--live 100000]

The engine over SQLite in this process, one participant in the same process whose calls are function
calls: so what is measured is the runtime's own memory and time. Each part is a process of its own.

    retry      sagas that wait an hour for their next attempt: nothing of them is in memory
    poll       sagas that are in progress and asked again in an hour: an entry each
    stuck      sagas that only a person moves
    recovery   sagas with a call under way when the runtime dies: the first call after the restart,
               and when all of them are under way
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import structlog

from amends_runtime.actors.supervisor import Limits, StartRequest
from amends_runtime.clock import SystemClock
from amends_runtime.core.definition import Definition, RetryPolicy, Step
from amends_runtime.core.messages import Broken, Done, InProgress, Outcome, Unknown
from amends_runtime.core.payload import Payload
from amends_runtime.engine import Engine
from amends_runtime.ports import Call, ParticipantAddress, Reply
from amends_runtime.storage import open_sqlite_store
from amends_runtime.telemetry.observers import Observers

HOUR_MS = 3_600_000
PARTS: dict[str, Outcome | None] = {
    "retry": Unknown("UNAVAILABLE", "measured"),
    "poll": InProgress(HOUR_MS),
    "stuck": Broken("MEASURED"),
    "recovery": None,
}
ROUND = 2_000  # sagas started before the next are


class LaterClock(SystemClock):
    """The machine's clock, some hours ahead: what rests is due."""

    def now_ms(self) -> int:
        """UTC milliseconds, of a later day."""
        return super().now_ms() + 24 * HOUR_MS


class Participant:
    """Answers every call alike, at once; without an outcome none."""

    name = "in process"

    def __init__(self, outcome: Outcome | None) -> None:
        self._outcome = outcome
        self.calls = 0
        self.first_s = 0.0

    async def call(self, call: Call) -> Reply:
        """One call."""
        self.calls += 1
        if self.calls == 1:
            self.first_s = time.monotonic()
        if self._outcome is None:
            await anyio.sleep_forever()
            raise AssertionError
        await anyio.lowlevel.checkpoint()
        return Reply(self._outcome, "OK", healthy=True)

    async def close(self) -> None:
        """Nothing is open."""


def resident_bytes() -> int:
    """This process's."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@asynccontextmanager
async def a_runtime(
    folder: str, participant: Participant, clock: SystemClock, live: int
) -> AsyncIterator[Engine]:
    """A runtime over a database in this folder; it is killed at the end of the block."""
    async with open_sqlite_store(f"{folder}/amends.db") as store:
        engine = Engine(
            store,
            clock=clock,
            observer=Observers([]),
            connect=lambda _address, _oldest_open_ms: participant,
            concurrency={"shop": 1_000},
            limits=Limits(live_sagas=live, commit_queue=100_000),
        )
        await engine.load()
        async with anyio.create_task_group() as tasks:
            engine.open(tasks, [ParticipantAddress("shop", "nowhere")])
            engine.run(tasks)
            yield engine
            tasks.cancel_scope.cancel()


async def start_all(engine: Engine, sagas: int) -> None:
    """Starts so many, with an input of 100 bytes."""
    slow = RetryPolicy(first_ms=HOUR_MS, max_ms=HOUR_MS, give_up_after_ms=1_000 * HOUR_MS)
    steps = (Step(name="a", participant="shop", action="do", retry=slow),)
    await engine.definitions.register(Definition(name="one", steps=steps))
    for first in range(0, sagas, ROUND):
        await engine.supervisor.start_sagas(
            [
                StartRequest(
                    saga_id=f"order-2026-{number:012}",
                    definition_name="one",
                    content_hash="c" * 64,
                    input=Payload(bytes(100)),
                )
                for number in range(first, min(first + ROUND, sagas))
            ]
        )


async def until(condition: Callable[[], bool], timeout_s: float = 600) -> None:
    """Looks again and again."""
    with anyio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110  # nobody says when
            await anyio.sleep(0.01)


def is_empty(engine: Engine) -> bool:
    """Whether all sagas have ended."""
    counts = engine.supervisor.counts()
    return not (counts.live or counts.parked or counts.arriving)


async def measure(part: str, sagas: int, live: int) -> dict[str, float]:
    """One part's figures, by name."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with a_runtime(folder, Participant(PARTS[part]), SystemClock(), live) as engine:
            await start_all(engine, 1_000)  # what is made once is not a saga's
            await anyio.sleep(2)
            before = resident_bytes()
            began_s = time.monotonic()
            await start_all(engine, sagas + 1_000)
            if part == "recovery":
                await until(lambda: engine.supervisor.counts().backlog == 0)
            else:
                # Some of those that wait an hour at most are due by now.
                await until(lambda: engine.supervisor.counts().live == 0)
            found["sagas/s in"] = sagas / (time.monotonic() - began_s)
            counts = engine.supervisor.counts()
            found["parked"], found["kept"] = counts.parked, counts.kept
            found["resident bytes/saga"] = (resident_bytes() - before) / sagas
        clock = SystemClock() if part == "recovery" else LaterClock()
        shop, total = Participant(Done()), sagas + 1_000
        began_s = time.monotonic()
        async with a_runtime(folder, shop, clock, live) as engine:
            if part == "stuck":
                await anyio.sleep(1)
                found["live after a restart"] = engine.supervisor.counts().live
                return found
            await until(lambda: shop.calls >= total)
            found["s to the first call"] = shop.first_s - began_s
            found["s until all are called"] = time.monotonic() - began_s
            await until(lambda: is_empty(engine))
            found["sagas/s back"] = total / (time.monotonic() - began_s)
            found["resident bytes/saga at the end"] = (resident_bytes() - before) / sagas
    return found


def main() -> None:
    """Runs all parts, one after another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sagas", type=int, default=100_000)
    parser.add_argument("--live", type=int, default=200_000)
    parser.add_argument("--part", choices=PARTS)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    if arguments.part is not None:
        figures = asyncio.run(measure(arguments.part, arguments.sagas, arguments.live))
        print(json.dumps(figures))
        return
    for part in PARTS:
        command = [sys.executable, __file__, "--part", part]
        command += ["--sagas", str(arguments.sagas), "--live", str(arguments.live)]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        figures = json.loads(ran.stdout.splitlines()[-1])
        shown = ", ".join(f"{name} {value:,.6g}" for name, value in figures.items())
        print(f"{part:9} {shown}", flush=True)


if __name__ == "__main__":
    main()
