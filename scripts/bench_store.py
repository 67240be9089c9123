"""What a durable turn costs in the store, by itself, in one process: `bench_store.py`.

The work is sagas of three steps as the core decides them: four turns each, 200-byte payloads, a row
of the read model at the start and at the end only. Many are under way at once and go on in no
order, so that a batch holds turns of many sagas as an engine's does. The file is a real one, every
commit is synced.

    quiet    nobody but the store wants the interpreter: CPU of the loop's thread and of SQLite's,
             each by itself, and how long a commit took
    busy     the loop is kept at work between two looks at its files, as an engine's is under load:
             then a commit waits for the interpreter lock as well, and how long is the question

CPU time is this machine's and drifts with what else it does; the rounds of all sizes take turns,
and the least of them is what the code costs. Quote ratios within one run.
"""

from __future__ import annotations

import argparse
import random
import sqlite3
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

import anyio
import anyio.lowlevel
import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

from amends.ids import SagaIds
from amends_runtime.core import saga as core
from amends_runtime.core.definition import Definition, Plan, Step, normalise
from amends_runtime.core.effects import CallParticipant
from amends_runtime.core.messages import Answered, Done, Message, StartSaga
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Record, SagaStarted
from amends_runtime.ports import SagaSummary, Transition, summarise
from amends_runtime.storage import SqliteStore, open_sqlite_store
from scripts.bench_interrupt import bench_folder, interruptible
from scripts.bench_options import add_output
from scripts.bench_processes import write_figures

BATCHES: Final = (1, 10, 50, 100, 200)  # turns in a commit
TURNS: Final = 2_000  # of a round: some hundredth of a second for the quickest
ROUNDS: Final = 9
BUSY_SLICE_S: Final = 0.002  # the loop's work between two looks at its files
PAYLOAD: Final = Payload(b"\x00\xffpayload!" * 20)  # 200 bytes, no text
AT_MS: Final = 1_800_000_000_000
PLAN: Final = Plan(
    normalise(
        Definition(
            name="bench",
            steps=tuple(
                Step(name=name, participant="bench", action=name)
                for name in ("one", "two", "three")
            ),
        )
    )
)


class Round(NamedTuple):
    """What one round measured. Times in µs: CPU a turn, and wall-clock time of each commit."""

    loop_us: float
    sqlite_us: float
    turns_per_s: float
    commits_us: Sequence[float]


# -- the work --------------------------------------------------------------------------------------


def turns_of_a_saga() -> list[Transition]:
    """The transitions of a saga of three steps that completes; its number and id are to be set."""
    found: list[Transition] = []
    saga: core.Saga | None = None
    shown: object = None
    message: Message = StartSaga(saga_id="bench", content_hash="c" * 64, input=PAYLOAD)
    now_ms = AT_MS
    while True:
        decision = core.decide(PLAN, saga, message, now_ms, 1)
        saga = decision.saga
        shows = (saga.state, saga.past_no_return, saga.ended_at_ms)
        number = len(found) + 1
        summary = summarise(saga, 1, number) if shows != shown else None
        shown = shows
        found.append(
            Transition(1, number, decision.records, saga.state, saga.past_no_return, summary)
        )
        if saga.ended:
            return found
        (effect,) = decision.effects
        assert isinstance(effect, CallParticipant), "each turn but the last asks for one call"
        now_ms += 4
        message = Answered(
            step=effect.step,
            verb=effect.verb,
            round=effect.round,
            attempt=effect.attempt,
            sent_at_ms=now_ms - 3,
            answered_at_ms=now_ms - 1,
            status="OK",
            polls=0,
            outcome=Done(PAYLOAD),
            sent_us=417,
            answered_us=905,
        )


class Work:
    """Batches of turns of sagas that are all under way at once. `sagas` counts those begun."""

    def __init__(self, store: SqliteStore, seed: int) -> None:
        self._store = store
        self._chance = random.Random(seed)  # noqa: S311  # so that a run can be repeated
        self._ids = SagaIds()
        self._pattern = turns_of_a_saga()
        self._under_way: list[Iterator[Transition]] = []
        self.sagas = 0

    def batch(self, size: int) -> list[Transition]:
        """The next turns of so many different sagas, one for each."""
        while len(self._under_way) < 4 * size:
            self._under_way.append(self._saga())
        self._chance.shuffle(self._under_way)
        turns: list[Transition] = []
        while len(turns) < size:
            saga = self._under_way.pop()
            turn = next(saga)
            turns.append(turn)
            if turn.version < len(self._pattern):
                self._under_way.insert(0, saga)
            else:
                self._under_way.insert(0, self._saga())
        return turns

    def rest(self) -> list[Transition]:
        """What is missing to the end of all that have begun."""
        return [turn for saga in self._under_way for turn in saga]

    def _saga(self) -> Iterator[Transition]:
        replace = msgspec.structs.replace
        saga_no, saga_id = self._store.next_saga_no(), str(self._ids.next())
        self.sagas += 1
        for turn in self._pattern:
            records: tuple[Record, ...] = tuple(
                replace(one, saga_id=saga_id) if isinstance(one, SagaStarted) else one
                for one in turn.records
            )
            summary: SagaSummary | None = turn.summary and replace(
                turn.summary, saga_no=saga_no, saga_id=saga_id
            )
            yield replace(turn, saga_no=saga_no, records=records, summary=summary)


# -- measuring -------------------------------------------------------------------------------------


async def one_round(store: SqliteStore, batches: Sequence[Sequence[Transition]]) -> Round:
    """Commits the batches one after another."""
    commits_us: list[float] = []
    turns = sum(map(len, batches))
    # All that is not this thread's is SQLite's: nothing else runs in this process.
    began_s, loop_s, all_s = time.perf_counter(), time.thread_time(), time.process_time()
    for batch in batches:
        commit_s = time.perf_counter()
        await store.commit(batch)
        commits_us.append((time.perf_counter() - commit_s) * 1e6)
    took_s = time.perf_counter() - began_s
    loop_s, all_s = time.thread_time() - loop_s, time.process_time() - all_s
    return Round(
        loop_s / turns * 1e6, (all_s - loop_s) / turns * 1e6, turns / took_s, tuple(commits_us)
    )


async def keep_busy(stop: anyio.Event) -> None:
    """Holds the interpreter, but for a look at the loop's files in between."""
    while not stop.is_set():
        until_s = time.perf_counter() + BUSY_SLICE_S
        while time.perf_counter() < until_s:
            pass
        await anyio.lowlevel.checkpoint()


async def measure(path: Path) -> dict[str, Any]:
    """Lets all sizes take turns, quiet and busy."""
    quiet: dict[int, list[Round]] = {size: [] for size in BATCHES}
    busy: dict[int, list[Round]] = {size: [] for size in BATCHES}
    async with open_sqlite_store(path) as store:
        await store.put_definition(PLAN.definition, AT_MS)
        work = Work(store, seed=1)
        await store.commit(work.batch(1000))  # pages, statements and caches are there
        for _ in range(ROUNDS):
            for size in BATCHES:
                turns = TURNS if size > 1 else TURNS // 10
                batches = [work.batch(size) for _ in range(turns // size)]
                quiet[size].append(await one_round(store, batches))
        for _ in range(ROUNDS // 2):
            for size in BATCHES:
                batches = [work.batch(size) for _ in range(10)]
                stop = anyio.Event()
                async with anyio.create_task_group() as group:
                    group.start_soon(keep_busy, stop)
                    busy[size].append(await one_round(store, batches))
                    stop.set()
        rest = work.rest()
        for start in range(0, len(rest), 100):
            await store.commit(rest[start : start + 100])
    sagas = work.sagas
    return {
        "batches": {size: _figures(quiet[size], busy[size]) for size in BATCHES},
        "disk_bytes_per_saga": round(path.stat().st_size / sagas),
        "sagas": sagas,
    }


def _figures(quiet: Sequence[Round], busy: Sequence[Round]) -> dict[str, float]:
    commits = sorted(us for each in quiet for us in each.commits_us)
    delayed = sorted(us for each in busy for us in each.commits_us)
    best = min(quiet, key=lambda each: each.loop_us + each.sqlite_us)
    return {
        "loop_us": round(best.loop_us, 2),
        "sqlite_us": round(best.sqlite_us, 2),
        "both_us": round(best.loop_us + best.sqlite_us, 2),
        "both_median_us": round(
            statistics.median(each.loop_us + each.sqlite_us for each in quiet), 2
        ),
        "turns_per_s": round(max(each.turns_per_s for each in quiet)),
        "commit_p50_ms": round(commits[len(commits) // 2] / 1e3, 3),
        "busy_commit_p50_ms": round(delayed[len(delayed) // 2] / 1e3, 3),
        "busy_commit_p99_ms": round(delayed[len(delayed) * 99 // 100] / 1e3, 3),
    }


def run(output: Path) -> int:
    """Measures, prints a table, writes `output`."""
    print(f"what a turn costs in the store; {ROUNDS} rounds, every commit synced\n", flush=True)
    with bench_folder() as folder:
        figures = anyio.run(measure, folder / "amends.db")
    columns = list(figures["batches"][BATCHES[0]])
    print(f"{'turns a commit':>16}{''.join(f'{name:>20}' for name in columns)}")
    for size, row in figures["batches"].items():
        print(f"{size:>16}{''.join(f'{row[name]:>20,}' for name in columns)}")
    print(f"\nbytes on disk per finished saga: {figures['disk_bytes_per_saga']:,}")
    figures |= {
        "rounds": ROUNDS,
        "sqlite": sqlite3.sqlite_version,
        "amends": version("amends"),
    }
    write_figures(output, figures)
    print(f"written to {output}")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_output(parser, Path("build/bench-store.json"))
    options = parser.parse_args()
    return interruptible(lambda: run(options.output))


if __name__ == "__main__":
    raise SystemExit(main())
