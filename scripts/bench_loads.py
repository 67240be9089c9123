"""The loads: the naive loop and the client of amends, each in a process of its own.

`bench_loads.py WAY ADDRESS TAG ...` runs one and prints what it came to as JSON.

    naive      three unary grpc.aio calls, one after another; nothing durable, nothing retried
    amends     `await client.start(...)`, and then its `result()`
    start      `await client.start(...)` alone, `--count` of them

Closed loop: as many loops as `--concurrency`, each beginning its next piece of work when its last
one has ended. Open loop, with `--rate`: a piece of work begins at each 1/rate of a second, whatever
has become of those before it, and its latency counts from when it was to begin.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import anyio
import grpc.aio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

import amends
from amends.v1 import participant_pb2, participant_pb2_grpc
from scripts.bench_interrupt import child
from scripts.bench_processes import CONCURRENCY, PAYLOAD, STEPS, call_of, saga_id_of

Load = dict[str, Any]
"""What a load came to.

`sagas` (or naive pieces of work) done, `seconds` that it took, `cpu_s` of its process within them,
`latencies_ms` of each, `refused` by the errors' types, and in `ended_by_s` how many had ended by
the end of each second. `total` are these sagas and those before them that nobody has timed.
"""

One = Callable[[int], Awaitable[None]]
"""Does the piece of work that has this number. Raises `AmendsError` if it is refused."""


class NothingMeasured(Exception):
    """A load did nothing in its time, so that there is no figure to judge: its argument says which.

    Give the load more seconds, or find out what holds the runtime up.
    """


STARTED_WITHIN_S: Final = 60.0
ENDED_WITHIN_S: Final = 120.0
LOADED_WITHIN_S: Final = 1800.0


WARM: Final = 20
"""Pieces of work, one after another, before anything is timed: connections are made by then."""


async def closed_loop(
    one: One, seconds: float, concurrency: int, *, at_most: float = math.inf, first: int = 1
) -> Load:
    """So many loops for so long, or until `at_most` pieces of work were begun. Answers a load.

    `first` is the number of the first piece of work; those before it are in the load's total.
    """
    record = _Record(first - 1)
    numbers = itertools.count(first)

    async def loop() -> None:
        while record.elapsed_s() < seconds and (number := next(numbers)) < first + at_most:
            await record.work(one, number, time.monotonic())

    async with anyio.create_task_group() as tasks:
        for _ in range(concurrency):
            tasks.start_soon(loop)
    return record.load()


async def open_loop(one: One, seconds: float, rate: float, *, first: int = 1) -> Load:
    """Begins `rate` pieces of work each second for so long, and waits for all. Answers a load.

    `first` is as in `closed_loop`. Begins them by means that cost little, for they are no part of
    what is measured: asyncio's tasks, a third of anyio's, and no search for cycles, which with ten
    thousand tasks stops the loop for a fifth of a second, and what is due meanwhile comes at once.
    """
    record = _Record(first - 1)
    total = round(seconds * rate)
    number = 0
    gc.disable()
    try:
        async with asyncio.TaskGroup() as tasks:
            while number < total:
                due = min(total, math.floor(record.elapsed_s() * rate) + 1)
                while number < due:
                    due_s = record.began_s + number / rate
                    tasks.create_task(record.work(one, first + number, due_s))
                    number += 1
                await anyio.sleep(max(0.0, record.began_s + number / rate - time.monotonic()))
    finally:
        gc.enable()
    return record.load()


class _Record:
    """What a load has come to so far."""

    def __init__(self, before: int) -> None:
        self._before = before
        self.began_s = time.monotonic()
        self._cpu_s = time.process_time()
        self._latencies_ms: list[float] = []
        self._refused: Counter[str] = Counter()
        self._ended: Counter[int] = Counter()

    def elapsed_s(self) -> float:
        return time.monotonic() - self.began_s

    async def work(self, one: One, number: int, due_s: float) -> None:
        try:
            await one(number)
        except amends.AmendsError as refusal:
            self._refused[type(refusal).__name__] += 1
            return
        now_s = time.monotonic()
        self._latencies_ms.append(round((now_s - due_s) * 1000, 3))
        self._ended[int(now_s - self.began_s)] += 1

    def load(self) -> Load:
        seconds = self.elapsed_s()
        return {
            "sagas": len(self._latencies_ms),
            "total": self._before + len(self._latencies_ms),
            "seconds": seconds,
            "cpu_s": time.process_time() - self._cpu_s,
            "latencies_ms": self._latencies_ms,
            "refused": self._refused,
            "ended_by_s": list(
                itertools.accumulate(self._ended[second] for second in range(int(seconds) + 1))
            ),
        }


# -- the ways --------------------------------------------------------------------------------------


async def naive(options: argparse.Namespace) -> Load:
    """Three unary calls, one after another."""
    settings = [("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(options.address, options=settings) as channel:
        stub = participant_pb2_grpc.ParticipantServiceStub(channel)

        async def one(number: int) -> None:
            result = PAYLOAD
            for step in STEPS:
                call = call_of(f"naive-{options.tag}-{number}", step, result)
                response = await stub.Execute(participant_pb2.ExecuteRequest(call=call), timeout=60)
                result = response.outcome.done.result.data

        return await _looped(one, options)


async def through_amends(options: argparse.Namespace) -> Load:
    """A saga that is started and waited for."""
    expected = amends.SagaState[options.ends]
    async with amends.Client(options.address) as client:

        async def one(number: int) -> None:
            handle = await client.start(
                options.definition,
                PAYLOAD,
                saga_id=saga_id_of(options.tag, number),
                wait_s=30,
                timeout_s=options.patience,
            )
            saga = await handle.result(timeout_s=ENDED_WITHIN_S)
            if saga.state is not expected:
                raise RuntimeError(f"saga {saga.saga_id} ended {saga.state}, not {expected}")

        return await _looped(one, options)


async def starts(options: argparse.Namespace) -> Load:
    """A saga that is started, and then left to itself."""
    async with amends.Client(options.address) as client:

        async def one(number: int) -> None:
            await client.start(
                options.definition,
                PAYLOAD,
                saga_id=saga_id_of(options.tag, number),
                timeout_s=options.patience,
            )

        return await _looped(one, options)


async def _looped(one: One, options: argparse.Namespace) -> Load:
    if options.count < math.inf:
        return await closed_loop(one, options.seconds, options.concurrency, at_most=options.count)
    for number in range(1, WARM + 1):
        await one(number)
    if options.rate:
        return await open_loop(one, options.seconds, options.rate, first=WARM + 1)
    return await closed_loop(one, options.seconds, options.concurrency, first=WARM + 1)


WAYS: Final = {"naive": naive, "amends": through_amends, "start": starts}


def run_load(
    way: str,
    address: str,
    tag: str,
    seconds: float = math.inf,
    concurrency: int = CONCURRENCY,
    **options: object,
) -> Load:
    """Runs a load in a process of its own, and waits for what it came to.

    `way` is one of `WAYS`. `options` are those of the command line: rate, count, definition, ends,
    patience. Raises RuntimeError if a piece of work was refused, unless `may_refuse` is given, or
    if the load failed; NothingMeasured if no piece of work was done.
    """
    may_refuse = options.pop("may_refuse", False)
    command = [
        *(sys.executable, str(Path(__file__).resolve()), way, address, tag),
        *("--seconds", str(seconds), "--concurrency", str(concurrency)),
        *(text for name, value in options.items() for text in (f"--{name}", str(value))),
    ]
    with child(command, stdout=subprocess.PIPE) as popen:
        said, _ = popen.communicate(timeout=LOADED_WITHIN_S)
    if popen.returncode:
        raise RuntimeError(f"load {way} {tag} failed, with exit code {popen.returncode}")
    done: Load = json.loads(said)
    if done["refused"] and not may_refuse:
        raise RuntimeError(f"load {way} {tag} was refused: {done['refused']}")
    if not done["sagas"]:
        raise NothingMeasured(f"load {way} {tag} did nothing in {done['seconds']:.2f} s")
    return done


def main() -> None:
    """Runs the load that the arguments say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("way", choices=WAYS, help="see the top of this file")
    parser.add_argument("address", help="host:port of the runtime; of naive, of the participant")
    parser.add_argument("tag", help="a part of the sagas' ids, new for each load of a runtime")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="how long work begins; default: no end"
    )
    parser.add_argument(
        "--concurrency", type=int, default=CONCURRENCY, help="loops at once; default %(default)s"
    )
    parser.add_argument(
        "--rate", type=float, default=0.0, help="pieces of work a second; default: closed loops"
    )
    parser.add_argument(
        "--count", type=float, default=math.inf, help="pieces of work in all; default: no end"
    )
    parser.add_argument(
        "--definition", default="bench", help="what is started; default %(default)s"
    )
    parser.add_argument(
        "--ends", default="COMPLETED", help="the state to end in; default %(default)s"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=STARTED_WITHIN_S,
        help="seconds after which a start is given up; default %(default)s",
    )
    options = parser.parse_args()
    print(json.dumps(asyncio.run(WAYS[options.way](options))))


if __name__ == "__main__":
    main()
