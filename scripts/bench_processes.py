"""What the benchmarks have in common: the sagas, the processes, and what is seen of these.

A benchmark is a program that starts the others, `bench_participant.py`, `bench_runtime.py`,
`bench_loads.py`: each side has an interpreter of its own, as it has for a user. What a process used
is read from /proc, by process and by thread, so that it is told by the kernel and not by what is
measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

import amends
from amends.v1 import participant_pb2, participant_pb2_grpc, types_pb2
from scripts.bench_interrupt import child

STEPS = ("one", "two", "three")
PAYLOAD = b"x" * 200
CONCURRENCY = 100
READY_S = 30.0
HELD_S = 3600.0
HERE = Path(__file__).resolve().parent

# -- sagas -----------------------------------------------------------------------------------------


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


def saga_id_of(tag: str, number: int) -> str:
    """The id of a load's saga; their numbers are 1, 2, 3, without a gap."""
    return f"amends-{tag}-{number}"


def definition(name: str) -> amends.Definition:
    """The benchmarks' definitions: `bench`, `refused`, `held`, `later` and `steps-N`.

    `bench` is three steps; of `refused` the last one is rejected, in `held` the second waits for
    the participant's gate, and the first of `later` is asked again in an hour. Of `steps-N` each
    step is handed the result of the one before it alone, so that it costs the same wherever it is.
    """
    made = amends.Definition(name)
    if name.startswith("steps-"):
        steps = [f"s{place}" for place in range(int(name.removeprefix("steps-")))]
        for before, step in zip([None, *steps], steps, strict=False):
            made = made.step(step, participant="bench", action="step", uses=before or ())
        return made
    changed = {"refused": {"three": "refuse"}, "held": {"two": "held"}, "later": {"one": "later"}}
    for step in STEPS:
        action = changed.get(name, {}).get(step, step)
        # Nobody gives up a call that is held while a benchmark makes ready.
        timeout_s = HELD_S if action == "held" else None
        made = made.step(step, participant="bench", action=action, timeout_s=timeout_s)
    return made


async def register(address: str, *names: str) -> None:
    """Registers these definitions at a runtime; without any, `bench`."""
    async with amends.Client(address) as client:
        for name in names or ("bench",):
            await client.register(definition(name))


# -- processes -------------------------------------------------------------------------------------


def participant_command(otlp: str = "", service: str = "", *options: str) -> list[str]:
    """The command that runs the participant, which traces if it is told a collector.

    `options` are further ones of `bench_participant.py`.
    """
    traced = ["--otlp", otlp, "--service", service] if otlp else []
    return [sys.executable, str(HERE / "bench_participant.py"), *traced, *options]


def sink_command(*options: str) -> list[str]:
    """The command that runs a collector."""
    return [sys.executable, str(HERE / "bench_sink.py"), *options]


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
    with (
        log.open("wb") as output,
        child(
            [*command, str(ready_file)],
            stdout=output,
            stderr=output,
            env={**clean, **(environment or {})},
        ) as popen,
    ):
        give_up_at = time.monotonic() + READY_S
        while not ready_file.exists():
            if popen.poll() is not None or time.monotonic() > give_up_at:
                raise SystemExit(f"{name} did not come up:\n{log.read_text()[-2000:]}")
            time.sleep(0.02)
        yield json.loads(ready_file.read_text())


def announce(ready_file: Path, address: str, **more: str) -> None:
    """Writes the ready file of this process: its id, its address, and what else there is to say."""
    draft = ready_file.with_suffix(".draft")
    draft.write_text(json.dumps({"pid": os.getpid(), "address": address, **more}))
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


def write_figures(output: Path, figures: Mapping[str, Any]) -> None:
    """Writes `output`, and the folder around it if it is not there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")
