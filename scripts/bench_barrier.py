"""What a call costs at the barrier, with commits of its own and with shared ones.

    python scripts/bench_barrier.py [--calls 2000] [--rounds 7] [--at-once 1,10,100]

One process, as a participant's is: an event loop in which calls wait, the barrier's thread, a real
file and its real syncs; no gRPC. Each handler writes one row. All forms take turns in each round;
the figures are the best round of each (calls a second, and CPU time of the process, the kernel's
part of the syncs included). Afterwards the effects are counted in the database: a call without its
effect, an effect without its row or one twice is an error, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import sqlite3
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

import amends
from amends.handler import Handler
from amends.outcomes import Done
from scripts.bench_interrupt import bench_folder, interruptible
from scripts.bench_options import MOST_AT_ONCE, MOST_ROUNDS, whole

SCHEMA: Final = "CREATE TABLE IF NOT EXISTS ledger (saga_id TEXT, entry TEXT, amount INTEGER)"
PAYLOAD: Final = b"x" * 200
PATIENCE_S: Final = 60.0  # so that no call is withdrawn on a machine that is busy


@dataclass
class Form:
    """One barrier, so many calls at once, and what its rounds took."""

    name: str
    at_once: int
    path: Path
    barrier: amends.SqliteBarrier
    handler: Handler
    asked: int = 0
    calls_per_s: float = 0.0
    cpu_us: float = field(default=float("inf"))

    async def play(self, calls: int) -> None:
        """Play one round, and keep its figures if they are the best."""
        waiting = iter([call_of(f"saga-{self.asked + number}") for number in range(calls)])
        self.asked += calls

        async def ask() -> None:
            for call in waiting:
                outcome = await self.barrier.run(call, self.handler)
                assert isinstance(outcome, Done), outcome

        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.at_once):
                tasks.create_task(ask())
        self.calls_per_s = max(self.calls_per_s, calls / (time.perf_counter() - began_s))
        self.cpu_us = min(self.cpu_us, 1e6 * (time.process_time() - began_cpu_s) / calls)

    def fault(self) -> str:
        """Say what is wrong with the effects; nothing if they are exact."""
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as connection:
            effects = [saga for (saga,) in connection.execute("SELECT saga_id FROM ledger")]
            rows = [saga for (saga,) in connection.execute("SELECT saga_id FROM amends_barrier")]
        if len(effects) == len(set(effects)) == self.asked and sorted(effects) == sorted(rows):
            return ""
        return (
            f"{self.name}, {self.at_once} at once: {self.asked} calls, {len(effects)} effects of "
            f"{len(set(effects))} calls, {len(rows)} rows"
        )


def call_of(saga_id: str) -> amends.Call:
    """Make one attempt, as the runtime sends it."""
    return amends.Call(
        verb=amends.Verb.EXECUTE,
        action="charge",
        saga_id=saga_id,
        step="pay",
        round=1,
        idempotency_key=f"store/{saga_id}/pay/execute/1",
        store_id="store",
        input=PAYLOAD,
        content_type="application/octet-stream",
    )


def form_of(name: str, at_once: int, folder: Path, *, share_commits: bool) -> Form:
    """Make a barrier on a file of its own."""
    path = folder / f"{name}-{at_once}.db".replace(" ", "-")
    barrier = amends.SqliteBarrier(
        path, schema=SCHEMA, busy_timeout_s=PATIENCE_S, share_commits=share_commits
    )
    participant = amends.Participant("bench", barrier=barrier)

    @participant.execute("charge", compensatable=False)
    def charge(call: amends.Call, tx: amends.Transaction) -> bytes:
        tx.execute("INSERT INTO ledger VALUES (?, ?, ?)", (call.saga_id, "charge", 5))
        return PAYLOAD

    handler = participant.handlers()["charge", amends.Verb.EXECUTE]
    return Form(name, at_once, path, barrier, handler)


async def measure(folder: Path, calls: int, rounds: int, at_once: Sequence[int]) -> list[Form]:
    """Let all forms take turns."""
    forms = [
        form_of(name, count, folder, share_commits=share_commits)
        for count, (name, share_commits) in itertools.product(
            at_once, [("own commits", False), ("shared commits", True)]
        )
    ]
    async with AsyncExitStack() as stack:
        for form in forms:
            await stack.enter_async_context(form.barrier)
        for _ in range(rounds):
            for form in forms:
                # One at a time is slow enough to be measured by fewer.
                await form.play(calls if form.at_once > 1 else max(1, calls // 4))
    return forms


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="What a call costs at the barrier.")
    parser.add_argument(
        "--calls",
        type=whole(1, 1_000_000),
        default=2000,
        help="calls in a round; default %(default)s",
    )
    parser.add_argument(
        "--rounds",
        type=whole(1, MOST_ROUNDS),
        default=7,
        help="rounds, of which the best counts; default %(default)s",
    )
    parser.add_argument(
        "--at-once",
        type=_at_once,
        default="1,10,100",
        help="calls at once, several by commas; default %(default)s",
    )
    parser.add_argument(
        "--json", type=Path, help="write the figures there, too; default: only the table"
    )
    options = parser.parse_args()
    return interruptible(lambda: run(options))


def _at_once(text: str) -> list[int]:
    return [whole(1, MOST_AT_ONCE)(count) for count in text.split(",")]


def run(options: argparse.Namespace) -> int:
    """Measure, print the table, and check the effects; see the command line."""
    with bench_folder(Path.cwd()) as folder:
        forms = asyncio.run(measure(folder, options.calls, options.rounds, options.at_once))
        faults = [fault for form in forms if (fault := form.fault())]
    print(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, WAL,")
    print(f"synchronous=FULL, {os.cpu_count()} cores, best of {options.rounds} rounds\n")
    print(f"{'at once':>7}  {'':<14}  {'calls/s':>8}  {'CPU us/call':>11}")
    for form in forms:
        print(
            f"{form.at_once:>7}  {form.name:<14}  {form.calls_per_s:>8,.0f}  {form.cpu_us:>11.1f}"
        )
    for own, shared in zip(forms[::2], forms[1::2], strict=True):
        print(
            f"\n{own.at_once} at once: shared / own {shared.calls_per_s / own.calls_per_s:.2f} in "
            f"calls/s, {shared.cpu_us / own.cpu_us:.2f} in CPU",
            end="",
        )
    print()
    if options.json is not None:
        figures = [
            {
                "form": form.name,
                "at_once": form.at_once,
                "calls_per_s": form.calls_per_s,
                "cpu_us_per_call": form.cpu_us,
            }
            for form in forms
        ]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for fault in faults:
        print(f"wrong: {fault}", file=sys.stderr)
    if not faults:
        print(f"effects: exact, {sum(form.asked for form in forms)} calls")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
