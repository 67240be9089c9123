"""A rig: a participant, a runtime in front of it, and the account of what they were made to do.

Whoever uses one gives it loads, and is told what each cost, process by process. When it is taken
down, the account is settled: each saga that a load was told of must be in the store as ended as it
should, and at the participant each of its effects must be there exactly once. What is wrong then is
in `faults`, in words, and a benchmark with faults fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import platform
import signal
import sqlite3
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import amends
from amends_runtime.config import Limits
from scripts.bench_account import Account, end_of
from scripts.bench_loads import Load, run_load
from scripts.bench_participant import ask
from scripts.bench_processes import (
    CONCURRENCY,
    PAYLOAD,
    cpu_seconds,
    memory_bytes,
    participant_command,
    process,
    register,
    runtime_command,
    thread_cpu_seconds,
)

VERSIONS: Final = ("amends", "grpcio", "protobuf", "aiosqlite", "msgspec", "anyio")
SAMPLE_EVERY_S: Final = 0.25
PROBES: Final = 100


@dataclass(frozen=True)
class Setting:
    """What a rig is made of. `collector` is where traces are sent, of `traces_ratio` of all."""

    name: str
    definitions: tuple[str, ...] = ("bench",)
    unary: bool = False
    paced: bool = False
    plant: str = ""
    collector: str = ""
    traces_ratio: float = 1.0
    environment: Mapping[str, str] = field(default_factory=dict)
    profile: Path | None = None


class Rig:
    """A rig; use it with `with`. Raises SystemExit if a process does not come up."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.setting = setting
        self.faults: list[str] = []
        self.disk_bytes = 0
        self.ended: Counter[str] = Counter()
        """By definition: sagas that the store had as ended, when it was taken down."""
        self._folder = folder
        self._database = folder / f"{setting.name}.db"
        self._account = Account()
        self._loads = 0
        self._worker_stack = contextlib.ExitStack()
        self._runtime_stack = contextlib.ExitStack()
        self.worker: dict[str, Any] = {}
        self.runtime: dict[str, Any] = {}

    def __enter__(self) -> Self:
        setting = self.setting
        options = [
            *(["--unary"] if setting.unary else []),
            *(["--paced"] if setting.paced else []),
            *(["--plant", setting.plant] if setting.plant else []),
        ]
        command = participant_command("", "", *options)
        try:
            self.worker = self._worker_stack.enter_context(
                process(self._folder, f"{setting.name} participant", command)
            )
            self.start_runtime()
            asyncio.run(register(self.runtime["address"], *setting.definitions))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._runtime_stack.close()  # which moves the log into the database
            if kind is None:
                self._settle()
        finally:
            self._end()

    def _end(self) -> None:
        with self._worker_stack, self._runtime_stack:
            pass

    # -- the runtime -----------------------------------------------------------------------------

    def start_runtime(self) -> None:
        """Starts the runtime, or starts it again on its database."""
        setting = self.setting
        traced = ["--otlp", setting.collector] if setting.collector else []
        command = runtime_command(self._database, self.worker["address"], setting.profile, *traced)
        environment = {
            "AMENDS_TELEMETRY__TRACES_RATIO": str(setting.traces_ratio),
            **setting.environment,
        }
        (self._folder / f"{setting.name}.json").unlink(missing_ok=True)
        self.runtime = self._runtime_stack.enter_context(
            process(self._folder, setting.name, command, environment)
        )

    def kill_runtime(self) -> None:
        """Ends the runtime by SIGKILL, and waits until it is gone."""
        os.kill(self.runtime["pid"], signal.SIGKILL)
        self._runtime_stack.close()

    def transport(self) -> str:
        """How the runtime calls the participant, as it says itself."""
        return self._lane().transport

    def in_flight(self) -> int:
        """Calls that are on the wire or wait in the lane, as the runtime says."""
        lane = self._lane()
        return lane.calls_in_flight + lane.calls_waiting

    def memory(self) -> int:
        """The runtime's resident memory, in bytes."""
        return memory_bytes(self.runtime["pid"])

    def _lane(self) -> amends.ParticipantInfo:
        async def look() -> amends.ParticipantInfo:
            async with amends.Client(self.runtime["address"]) as client:
                (lane,) = await client.participants()
                return lane

        return asyncio.run(look())

    # -- the participant -------------------------------------------------------------------------

    def ask(self, **asked: object) -> dict[str, Any]:
        """Asks the participant; see `bench_participant.ask`."""
        return asyncio.run(ask(self.worker, **asked))

    # -- loads -----------------------------------------------------------------------------------

    def load(
        self,
        way: str = "amends",
        *,
        seconds: float = math.inf,
        concurrency: int = CONCURRENCY,
        definition: str = "bench",
        **options: object,
    ) -> Load:
        """Runs a load, see `bench_loads.run_load`, and answers what it came to.

        `cpu_us` in it is the CPU of each process for one saga, and of the runtime's threads. Raises
        what `run_load` raises.
        """
        self._loads += 1
        tag = f"{self.setting.name}-{self._loads}"
        if way == "naive":
            address = self.worker["address"]
        else:
            address = self.runtime["address"]
            options |= {
                "definition": definition,
                "ends": end_of(definition).name,
            }
        before = self._cpu()
        done = run_load(way, address, tag, seconds, concurrency, **options)
        used = {name: after - before.get(name, 0.0) for name, after in self._cpu().items()}
        total = max(1, done["total"])
        cpu_us = {name: seconds * 1e6 / total for name, seconds in used.items()}
        cpu_us["load"] = done["cpu_s"] * 1e6 / max(1, done["sagas"])
        cpu_us["all"] = cpu_us["load"] + cpu_us["participant"] + cpu_us["runtime"]
        done["cpu_us"] = cpu_us
        if way == "naive":
            self._account.naive += done["total"]
        else:
            self._account.told[definition] += done["total"]
            self._account.is_certain &= not done["refused"]
        return done

    def _cpu(self) -> dict[str, float]:
        pid = self.runtime["pid"]
        threads = {f"runtime: {name}": s for name, s in thread_cpu_seconds(pid).items()}
        return {
            **threads,
            "runtime": cpu_seconds(pid),
            "participant": cpu_seconds(self.worker["pid"]),
        }

    @contextlib.contextmanager
    def memory_watched(self) -> Iterator[list[int]]:
        """For the length of the block the runtime's memory, in bytes, four times a second."""
        seen: list[int] = []
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(SAMPLE_EVERY_S):
                seen.append(self.memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield seen
        finally:
            is_over.set()
            watcher.join()

    # -- the account -----------------------------------------------------------------------------

    def _settle(self) -> None:
        """Notes what the store has, and what of the account does not agree."""
        self.disk_bytes = self._database.stat().st_size
        stored = _stored(self._database)
        for definition, states in stored.items():
            self.ended[definition] = states.get(end_of(definition), 0)
        faults = self._account.faults(stored, self.ask(report=True))
        self.faults = [f"{self.setting.name}: {fault}" for fault in faults]


def _stored(database: Path) -> dict[str, dict[int, int]]:
    """By definition and state: the sagas of a store, read by a connection that cannot write."""
    found: dict[str, dict[int, int]] = {}
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        for name, state, count in connection.execute(
            "SELECT name, state, count(*) FROM sagas JOIN definitions USING (definition_no)"
            " GROUP BY name, state"
        ):
            found.setdefault(name, {})[state] = count
    return found


# -- figures ---------------------------------------------------------------------------------------


def rate(load: Load) -> float:
    """Sagas per second."""
    return float(load["sagas"] / load["seconds"])


def ratios_of(ours: Sequence[Load], theirs: Sequence[Load]) -> dict[str, Any]:
    """How many times as much as the others, round by round, and the median."""
    ratios = [rate(a) / rate(b) for a, b in zip(ours, theirs, strict=True)]
    return {
        "median": round(statistics.median(ratios), 3),
        "by_round": [round(ratio, 3) for ratio in ratios],
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 of some milliseconds."""
    ordered = sorted(values)
    return {
        f"p{share}": round(ordered[min(len(ordered) - 1, len(ordered) * share // 100)], 2)
        for share in (50, 95, 99)
    }


def cpu_of(loads: Sequence[Load]) -> dict[str, int]:
    """The medians of what the processes and threads used for a saga, in µs; zeros are left out."""
    names = sorted({name for load in loads for name in load["cpu_us"]})
    found = {
        name: round(statistics.median(load["cpu_us"].get(name, 0.0) for load in loads))
        for name in names
    }
    return {name: us for name, us in found.items() if us}


def conditions(folder: Path, **more: object) -> dict[str, Any]:
    """Under which everything was measured, and `more`; `folder` is where the databases lie."""
    limits = Limits()
    return {
        "fdatasync_us": sync_us(folder),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **{name: version(name) for name in VERSIONS},
        "synchronous": "FULL",  # the runtime reads it back from SQLite when it starts
        "commit_batch": limits.commit_batch,
        "commit_queue": limits.commit_queue,
        "payload_bytes": len(PAYLOAD),
        **more,
    }


def sync_us(folder: Path) -> int:
    """The median of fdatasync after 4 KiB, where the database lies: what a commit waits for."""
    taken = []
    with (folder / "sync-probe").open("wb") as probe:
        for _ in range(PROBES):
            probe.write(b"x" * 4096)
            probe.flush()
            began = time.perf_counter()
            os.fdatasync(probe.fileno())
            taken.append(time.perf_counter() - began)
    (folder / "sync-probe").unlink()
    return round(statistics.median(taken) * 1e6)
