"""Two-phase commits beside sagas: how many a second, and how long one takes by itself.

    saga-2, saga-3            steps, one after another, each at another participant over SQLite that
                              writes a row
    two-phase-2, two-phase-3  two-phase commits of the same participants: each votes and commits,
                              which is twice the calls
    banks                     a two-phase commit of a participant with prepared transactions over
                              PostgreSQL and one with reservations over SQLite

They take turns on one runtime, over streams. In the end each saga that the loads were told of must
be in the store as COMPLETED, and in each of its participants' databases exactly once; nothing may
be left prepared, reserved or voted for.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import amends
from amends_runtime.core.records import SagaState
from scripts.bench_branch import (
    DSN_VARIABLE,
    effects,
    effects_of_postgres,
    stock_of,
    version_of_postgres,
)
from scripts.bench_loads import Load, run_load
from scripts.bench_processes import HERE, cpu_seconds, process
from scripts.bench_rig import percentiles, rate, ratios_of
from scripts.bench_targets import Verdict, at_least
from shop.postgres import PostgresServer

BRANCHES: Final = {
    "left": "row",
    "middle": "row",
    "right": "row",
    "east": "prepared",
    "west": "reserved",
}
"""The participants, and of which kind each is."""

MEMBERS: Final = {
    "saga-2": ("left", "right"),
    "two-phase-2": ("left", "right"),
    "saga-3": ("left", "middle", "right"),
    "two-phase-3": ("left", "middle", "right"),
    "banks": ("east", "west"),
}
"""The participants of each definition, in the order of its steps."""

SAGA_OF: Final = {"two-phase-2": "saga-2", "two-phase-3": "saga-3", "banks": "saga-2"}
"""The saga of as many steps, to which each is compared."""

SLOWEST: Final = 0.5
"""Of the saga's rate: a two-phase commit is two calls for each of its one, and two commits each."""

DEADLINE_S: Final = 600.0
"""Of votes, so that a closed loop of any width measures commits and no aborts."""


def definition(name: str) -> amends.Definition:
    """One of `MEMBERS`."""
    if name.startswith("saga"):
        made = amends.Definition(name)
    else:
        made = amends.Definition(
            name, mode=amends.Mode.TWO_PHASE_COMMIT, deadline_s=DEADLINE_S, locked_retries=20
        )
    for member in MEMBERS[name]:
        made = made.step(member, member, "row")
    return made


class TwoPhaseRig:
    """Five participants, a PostgreSQL and a runtime; use it with `with`."""

    def __init__(self, folder: Path, plant: str = "") -> None:
        self.faults: list[str] = []
        self._folder = folder
        self._plant = plant
        self._stack = contextlib.ExitStack()
        self._told: Counter[str] = Counter()
        self._loads = 0

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        with self._stack:
            self._running.close()  # so that what is in a log is in its database
            if kind is None:
                self._settle()

    def _start(self) -> None:
        self._postgres = self._stack.enter_context(PostgresServer())
        self._running = self._stack.enter_context(contextlib.ExitStack())
        self._pids: dict[str, int] = {}
        at: list[str] = []
        for name, kind in BRANCHES.items():
            # Planted once, not in each of them.
            plant = ["--plant", self._plant] if self._plant and name == "left" else []
            command = [sys.executable, str(HERE / "bench_branch.py"), *plant]
            started = self._running.enter_context(
                process(
                    self._folder,
                    name,
                    [*command, name, kind, str(self._file(name))],
                    {DSN_VARIABLE: self._postgres.dsn} if kind == "prepared" else None,
                )
            )
            self._pids[name] = started["pid"]
            at += ["--participant", f"{name}={started['address']}"]
        command = [
            *(sys.executable, str(HERE / "bench_runtime.py"), "serve", "--listen", "127.0.0.1:0"),
            *("--database", str(self._file("runtime")), *at, "--log-level", "warning"),
            "--ready-file",
        ]
        runtime = self._running.enter_context(process(self._folder, "runtime", command))
        self._pids["runtime"] = runtime["pid"]
        self._address: str = runtime["address"]
        asyncio.run(self._register())

    async def _register(self) -> None:
        async with amends.Client(self._address) as client:
            for name in MEMBERS:
                await client.register(definition(name))

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.db"

    def load(self, name: str, *, seconds: float, concurrency: int) -> Load:
        """Runs a load, see `bench_loads.run_load`; `cpu_us` is each process's for one saga."""
        self._loads += 1
        before = {each: cpu_seconds(pid) for each, pid in self._pids.items()}
        done = run_load(
            "amends", self._address, f"{name}-{self._loads}", seconds, concurrency, definition=name
        )
        done["cpu_us"] = {
            each: (cpu_seconds(pid) - before[each]) * 1e6 / max(1, done["total"])
            for each, pid in self._pids.items()
        }
        self._told[name] += done["total"]
        return done

    def transports(self) -> set[str]:
        """How the runtime calls those that it has called."""

        async def look() -> set[str]:
            async with amends.Client(self._address) as client:
                return {each.transport for each in await client.participants()}

        return asyncio.run(look())

    def postgresql(self) -> str:
        """The version of the PostgreSQL that `east` is over."""
        return version_of_postgres(self._postgres.dsn)

    def _settle(self) -> None:
        stored = _stored(self._file("runtime"))
        found: dict[str, Mapping[str, tuple[int, int]]] = {
            name: effects_of_postgres(self._postgres.dsn)
            if kind == "prepared"
            else effects(self._file(name))
            for name, kind in BRANCHES.items()
        }
        self.faults = account_faults(self._told, stored, found)
        taken, held = stock_of(self._file("west"))
        if (taken, held) != (self._told["banks"], 0):
            self.faults.append(
                f"west: {taken} were taken and {held} are held; {self._told['banks']} and none"
                " were to be"
            )


def account_faults(
    told: Mapping[str, int],
    stored: Mapping[str, Mapping[str, int]],
    found: Mapping[str, Mapping[str, tuple[int, int]]],
) -> list[str]:
    """What does not agree, in words: what loads were told, the store has, and the databases have.

    By definition: sagas told; sagas by state; by participant: effects, and of how many sagas.
    """
    faults = [
        f"{name}: loads were told of {told.get(name, 0)} sagas, the store has {dict(states)}"
        for name in MEMBERS
        if (states := stored.get(name, {})) != ({"COMPLETED": told[name]} if told.get(name) else {})
    ]
    for branch, by_definition in found.items():
        whole = {
            name: (told[name], told[name])
            for name, members in MEMBERS.items()
            if branch in members and told.get(name)
        }
        if dict(by_definition) != whole:
            faults.append(
                f"{branch}: effects done, and their sagas, by definition: {dict(by_definition)}"
                f" instead of {whole}"
            )
    return faults


def _stored(database: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        for name, state, count in connection.execute(
            "SELECT name, state, count(*) FROM sagas JOIN definitions USING (definition_no)"
            " GROUP BY name, state"
        ):
            found.setdefault(name, {})[SagaState(state).name] = count
    return found


def two_phase(
    folder: Path, rounds: int, seconds: float, concurrency: int, plant: str = ""
) -> tuple[dict[str, Any], list[Verdict], list[str]]:
    """Figures, verdicts, and what is wrong; see the top of this file."""
    many: dict[str, list[Load]] = {name: [] for name in MEMBERS}
    single: dict[str, list[Load]] = {name: [] for name in MEMBERS}
    with TwoPhaseRig(folder, plant) as rig:
        for name in MEMBERS:
            rig.load(name, seconds=min(1.0, seconds), concurrency=concurrency)
        for number in range(rounds):
            for name in MEMBERS if number % 2 else reversed(MEMBERS):
                many[name].append(rig.load(name, seconds=seconds, concurrency=concurrency))
                single[name].append(rig.load(name, seconds=seconds / 2, concurrency=1))
                print(
                    f"  round {number + 1}  {name:12} {rate(many[name][-1]):8.0f} sagas/s  "
                    f"one at a time {statistics.median(single[name][-1]['latencies_ms']):.1f} ms",
                    flush=True,
                )
        transports = rig.transports()
        postgresql = rig.postgresql()
    figures = {"postgresql": postgresql, **figures_of(many, single)}
    faults = [f"two-phase: {fault}" for fault in rig.faults]
    if transports != {"exchange"}:
        faults.append(f"two-phase: participants were called by {sorted(transports)}")
    return figures, [verdict_on(figures)], faults


def figures_of(
    many: Mapping[str, Sequence[Load]], single: Mapping[str, Sequence[Load]]
) -> dict[str, Any]:
    """What the loads of each definition come to, many at once and one at a time, round by round."""
    figures: dict[str, Any] = {
        name: {
            "sagas_per_s": round(statistics.median(map(rate, many[name])), 1),
            "cpu_us": _median_cpu(many[name]),
            "latency_ms": percentiles([ms for load in many[name] for ms in load["latencies_ms"]]),
            "one_at_a_time_ms": percentiles(
                [ms for load in single[name] for ms in load["latencies_ms"]]
            ),
        }
        for name in MEMBERS
    }
    figures["ratio_to_saga"] = {
        name: ratios_of(many[name], many[saga]) for name, saga in SAGA_OF.items()
    }
    return figures


def verdict_on(figures: Mapping[str, Any]) -> Verdict:
    """How the figures stand to the target."""
    return at_least(
        "two-phase commits of three",
        "at least 0.5 x the saga",
        f"{figures['two-phase-3']['sagas_per_s']} /s",
        figures["ratio_to_saga"]["two-phase-3"]["median"],
        SLOWEST,
    )


def _median_cpu(loads: Sequence[Load]) -> dict[str, int]:
    return {
        name: round(statistics.median(load["cpu_us"][name] for load in loads))
        for name in loads[0]["cpu_us"]
    }
