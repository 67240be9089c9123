"""What the benchmarks have in common: a participant, a load through amends, and processes.

A benchmark is a program that starts the others, as `bench.py NAME ...`: each side has an
interpreter of its own, as it has for a user. What a process used is read from /proc, by process and
by thread, so that it is told by the kernel and not by what is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
import grpc.aio

import amends
from amends.v1 import participant_pb2, participant_pb2_grpc, types_pb2

STEPS = ("one", "two", "three")
PAYLOAD = b"x" * 200
CONCURRENCY = 100
READY_S = 30.0
HERE = Path(__file__).resolve().parent

Load = dict[str, Any]
"""What a load answers: sagas, seconds, cpu_s and latencies_ms."""


# -- the participant -------------------------------------------------------------------------------


async def participant(ready_file: Path, otlp: str = "", service: str = "") -> None:
    """Serves three actions that count their effects, and `report`, which answers the count.

    With `otlp`, the address of a collector, its part of sampled traces is sent there as `service`.
    """
    if otlp:
        _trace(otlp, service)
    effects: Counter[str] = Counter()
    undone: Counter[str] = Counter()
    bench = amends.Participant("bench", barrier=None)

    async def act(call: amends.Call) -> bytes:
        effects[f"{call.saga_id}/{call.action}"] += 1
        return PAYLOAD

    async def undo(call: amends.Call) -> None:
        undone[f"{call.saga_id}/{call.action}"] += 1

    for action in STEPS:
        bench.execute(action)(act)
        bench.compensate(action)(undo)

    @bench.execute("report", compensatable=False)
    async def report(_: amends.Call) -> dict[str, int]:
        return {
            "effects": effects.total(),
            "keys": len(effects),
            "doubled": sum(count > 1 for count in effects.values()),
            "undone": undone.total(),
        }

    async with amends.serve(bench, listen="127.0.0.1:0") as server:
        announce(ready_file, server.address)
        await server.wait_closed()


def _trace(otlp: str, service: str) -> None:
    """Sets up OpenTelemetry as an author would, with a queue that no load of ours fills."""
    from opentelemetry import trace  # noqa: PLC0415  # only who traces has these in memory
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415  # as above
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415  # as above
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415  # as above
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415  # as above

    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    exporter = OTLPSpanExporter(endpoint=f"http://{otlp}", insecure=True)
    provider.add_span_processor(
        BatchSpanProcessor(exporter, max_queue_size=2**18, schedule_delay_millis=500)
    )
    trace.set_tracer_provider(provider)


def call_of(saga_id: str, step: str, data: bytes) -> participant_pb2.Call:
    """A call as the runtime would make it, so that all ways put the same bytes on the wire."""
    return participant_pb2.Call(
        idempotency_key=f"naive/{saga_id}/{step}/EXECUTE/1",
        store_id="naive",
        saga_id=saga_id,
        definition="bench",
        step=step,
        action=step,
        verb=types_pb2.VERB_EXECUTE,
        round=1,
        attempt=1,
        input=types_pb2.Payload(data=data),
    )


async def effects_at(address: str) -> dict[str, int]:
    """What the participant there has counted."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = participant_pb2_grpc.ParticipantServiceStub(channel)
        call = call_of("report", "report", b"")
        response = await stub.Execute(participant_pb2.ExecuteRequest(call=call), timeout=10)
    counted: dict[str, int] = json.loads(response.outcome.done.result.data)
    return counted


# -- the loads -------------------------------------------------------------------------------------


def saga_id_of(tag: str, number: int) -> str:
    """The id of a load's saga; their numbers are 1, 2, 3, without a gap."""
    return f"amends-{tag}-{number}"


async def through_amends(address: str, tag: str, seconds: float, concurrency: int) -> Load:
    """As many tasks as `concurrency`, each starting a saga and waiting for its end."""
    async with amends.Client(address) as client:

        async def one(number: int) -> None:
            handle = await client.start(
                "bench", PAYLOAD, saga_id=saga_id_of(tag, number), wait_s=30
            )
            saga = await handle.result(timeout_s=60)
            if saga.state is not amends.SagaState.COMPLETED:
                raise RuntimeError(f"saga {saga.saga_id} ended {saga.state}")

        return await closed_loop(one, seconds, concurrency)


async def closed_loop(
    one: Callable[[int], Awaitable[None]], seconds: float, concurrency: int
) -> Load:
    """Loops that each begin their next piece of work when the last has ended.

    Answers how many were done, in how long, and each one's latency in milliseconds.
    """
    latencies_ms: list[float] = []
    number = 0
    began = time.monotonic()

    async def loop() -> None:
        nonlocal number
        while time.monotonic() - began < seconds:
            number += 1
            sent = time.monotonic()
            await one(number)
            latencies_ms.append((time.monotonic() - sent) * 1000)

    async with anyio.create_task_group() as tasks:
        for _ in range(concurrency):
            tasks.start_soon(loop)
    return {
        "sagas": len(latencies_ms),
        "seconds": time.monotonic() - began,
        "cpu_s": time.process_time(),
        "latencies_ms": latencies_ms,
    }


def run_load(way: str, address: str, tag: str, seconds: float, concurrency: int) -> Load:
    """Runs a load, `naive` or `amends`, in a process of its own, and waits for its answer."""
    command = [*itself(way), address, tag, str(seconds), str(concurrency)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=seconds + 120)
    done: Load = json.loads(ended.stdout)
    return done


async def register(address: str) -> None:
    """Registers the saga of the three steps at a runtime."""
    definition = amends.Definition("bench")
    for step in STEPS:
        definition = definition.step(step, participant="bench", action=step)
    async with amends.Client(address) as client:
        await client.register(definition)


# -- processes -------------------------------------------------------------------------------------


def itself(*arguments: str) -> list[str]:
    """The command that runs one of `bench.py`'s own programs."""
    return [sys.executable, str(HERE / "bench.py"), *arguments]


def participant_command(otlp: str = "", service: str = "") -> list[str]:
    """The command that runs the participant, which traces if it is told a collector."""
    traced = ["--otlp", otlp, "--service", service] if otlp else []
    return itself("participant", *traced)


def runtime_command(
    database: Path, participant_address: str, profile: Path | None = None, *options: str
) -> list[str]:
    """The command that runs a runtime with `options` besides the usual ones.

    `profile` is where cProfile writes what the loop's thread did, if it is to.
    """
    profiled = ["-m", "cProfile", "-o", str(profile)] if profile else []
    return [
        *(sys.executable, *profiled, str(HERE / "bench_runtime.py"), "serve"),
        *("--listen", "127.0.0.1:0", "--database", str(database)),
        *("--participant", f"bench={participant_address}", "--log-level", "warning"),
        *options,
        "--ready-file",
    ]


@contextlib.contextmanager
def process(
    folder: Path,
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """A process that writes a ready file; ended by SIGTERM. Its log is shown if it fails.

    `environment` goes over this process's own, without what would configure amends or
    OpenTelemetry: a benchmark is the same for everybody.
    """
    ready_file, log = folder / f"{name}.json", folder / f"{name}.log"
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("AMENDS_", "OTEL_"))
    }
    with log.open("wb") as output:
        popen = subprocess.Popen(
            [*command, str(ready_file)],
            stdout=output,
            stderr=output,
            env={**clean, **(environment or {})},
        )
        try:
            give_up_at = time.monotonic() + READY_S
            while not ready_file.exists():
                if popen.poll() is not None or time.monotonic() > give_up_at:
                    raise SystemExit(f"{name} did not come up:\n{log.read_text()[-2000:]}")
                time.sleep(0.02)
            yield json.loads(ready_file.read_text())
        finally:
            popen.terminate()
            try:
                popen.wait(timeout=30)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.wait()


def announce(ready_file: Path, address: str) -> None:
    """Writes the ready file of this process."""
    draft = ready_file.with_suffix(".draft")
    draft.write_text(json.dumps({"pid": os.getpid(), "address": address}))
    draft.replace(ready_file)


# -- seeing ----------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (Linux: /proc; elsewhere 0)."""
    return _cpu_seconds(Path(f"/proc/{pid}"))


def thread_cpu_seconds(pid: int) -> dict[str, float]:
    """The same by names of its threads that run now; those of one name are added up.

    Names are those that the kernel has, 15 bytes (see `bench_runtime.py`); the main thread, in
    which the event loop runs, is `loop`.
    """
    used: dict[str, float] = {}
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                comm = (task / "comm").read_text().strip()
                name = "loop" if task.name == str(pid) else comm
                used[name] = used.get(name, 0.0) + _cpu_seconds(task)
    return used


def memory_bytes(pid: int) -> int:
    """Resident memory of a process (Linux: /proc; elsewhere 0)."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _cpu_seconds(folder: Path) -> float:
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def count_ended(database: Path) -> int:
    """Sagas that the store has as ended, read by a connection that cannot write."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM sagas WHERE ended_at_ms > 0").fetchone()
    return int(count)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 of some milliseconds."""
    ordered = sorted(values)
    return {
        f"p{share}": round(ordered[min(len(ordered) - 1, len(ordered) * share // 100)], 2)
        for share in (50, 95, 99)
    }


def conditions(folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Under which everything was measured; `folder` is where the databases lie."""
    return {
        "fdatasync_us": _sync_us(folder),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "grpcio": version("grpcio"),
        "amends": version("amends"),
        "synchronous": "FULL",
        "transport": "unary",
        "steps": len(STEPS),
        "payload_bytes": len(PAYLOAD),
        "concurrency": CONCURRENCY,
        "rounds": rounds,
        "seconds_per_round": seconds,
        "loop": "closed",
        "machine": platform.machine(),
    }


def _sync_us(folder: Path) -> int:
    """The median of fdatasync after 4 KiB, where the database lies: what a commit waits for."""
    taken = []
    with (folder / "sync-probe").open("wb") as probe:
        for _ in range(100):
            probe.write(b"x" * 4096)
            probe.flush()
            began = time.perf_counter()
            os.fdatasync(probe.fileno())
            taken.append(time.perf_counter() - began)
    (folder / "sync-probe").unlink()
    return round(statistics.median(taken) * 1e6)


def write_figures(output: Path, figures: Mapping[str, Any]) -> None:
    """Writes `output`, and the folder around it if it is not there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")
