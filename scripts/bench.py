"""`make bench`: what a durable saga costs, beside the same three calls made naively.

Two ways to do the same work, in alternation, on the same machine, against the same participant:

    naive    one process, 100 loops, each making three unary grpc.aio calls one after another;
    nothing
             is durable, nothing is retried, a crash loses everything
    amends   one process with 100 tasks, each `await client.start(..., wait_s=...)` of a saga of
    the same
             three steps; the runtime between them, its database on a real disk with real syncs

Closed loop: a loop begins its next piece of work when the last has ended. After it one at a time,
for the latency of a saga when nobody else is there. At the end the participant is asked for its
effects: each saga must have left each of its three exactly once, else the run fails.

Quote ratios: the machines are noisy, and the two alternate within one run because of that.
`participant`, `naive` and `amends` are the processes that `run` starts; nobody else needs to.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
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


# -- the participant -------------------------------------------------------------------------------


async def participant(ready_file: Path) -> None:
    """Serves three actions that count their effects, and `report`, which answers the count."""
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
        _announce(ready_file, server.address)
        await server.wait_closed()


# -- the two loads ---------------------------------------------------------------------------------


async def naive(address: str, tag: str, seconds: float, concurrency: int) -> dict[str, Any]:
    """Three unary calls, one after another, in as many loops as `concurrency`."""
    options = [("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = participant_pb2_grpc.ParticipantServiceStub(channel)

        async def one(number: int) -> None:
            result = PAYLOAD
            for step in STEPS:
                call = _call(f"naive-{tag}-{number}", step, result)
                response = await stub.Execute(participant_pb2.ExecuteRequest(call=call), timeout=10)
                result = response.outcome.done.result.data

        return await _load(one, seconds, concurrency)


def _call(saga_id: str, step: str, data: bytes) -> participant_pb2.Call:
    """A call as the runtime would make it, so that both ways put the same bytes on the wire."""
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


async def through_amends(
    address: str, tag: str, seconds: float, concurrency: int
) -> dict[str, Any]:
    """As many tasks as `concurrency`, each starting a saga and waiting for its end."""
    async with amends.Client(address) as client:

        async def one(number: int) -> None:
            handle = await client.start(
                "bench", PAYLOAD, saga_id=f"amends-{tag}-{number}", wait_s=30
            )
            saga = await handle.result(timeout_s=60)
            if saga.state is not amends.SagaState.COMPLETED:
                raise RuntimeError(f"saga {saga.saga_id} ended {saga.state}")

        return await _load(one, seconds, concurrency)


async def _load(
    one: Callable[[int], Awaitable[None]], seconds: float, concurrency: int
) -> dict[str, Any]:
    """A closed loop.

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


# -- the run ---------------------------------------------------------------------------------------


def run(rounds: int, seconds: float, output: Path, profile: Path | None) -> int:
    """Alternates the two loads and writes `output`. Answers the exit code."""
    print(
        f"amends bench: {rounds} rounds of {seconds:g} s each way, then one at a time", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="amends-bench-") as name:
        folder = Path(name)
        conditions = _conditions(rounds, seconds, folder)
        figures, done = _measure(folder, rounds, seconds, profile)
        # The runtime has ended, which moved its log into the database.
        finished = _count_sagas(folder / "amends.db")
        disk = (folder / "amends.db").stat().st_size
    figures["disk_bytes_per_saga"] = round(disk / finished)
    figures["conditions"] = conditions
    exact = figures["exact"] = _exact(figures, done, finished)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")
    _print_table(figures, output)
    return 0 if exact else 1


def _measure(
    folder: Path, rounds: int, seconds: float, profile: Path | None
) -> tuple[dict[str, Any], Counter[str]]:
    """Runs everything. Answers the figures, and how many sagas each way was told were done."""
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(_process(folder, "participant", _self("participant")))
        command = _runtime(folder, worker["address"], profile)
        runtime = stack.enter_context(_process(folder, "runtime", command))
        asyncio.run(_register(runtime["address"]))
        addresses = {"naive": worker["address"], "amends": runtime["address"]}
        done: Counter[str] = Counter()

        def load(way: str, tag: str, seconds: float, concurrency: int) -> dict[str, Any]:
            before = [_cpu_seconds(process["pid"]) for process in (worker, runtime)]
            result = _run_load(way, addresses[way], tag, seconds, concurrency)
            after = [_cpu_seconds(process["pid"]) for process in (worker, runtime)]
            used = (result["cpu_s"], after[0] - before[0], after[1] - before[1])
            result["cpu_us"] = dict(
                zip(
                    ("load", "participant", "runtime"),
                    (round(seconds * 1e6 / result["sagas"]) for seconds in used),
                    strict=True,
                )
            )
            done[way] += result["sagas"]
            return result

        results: dict[str, list[dict[str, Any]]] = {way: [] for way in addresses}
        for way in addresses:  # connections, imports and caches are warm before anything is timed
            load(way, "warm", 1.0, CONCURRENCY)
        for number in range(rounds):
            for way in addresses:
                result = load(way, f"r{number}", seconds, CONCURRENCY)
                results[way].append(result)
                rate = result["sagas"] / result["seconds"]
                print(f"  round {number + 1}  {way:7} {rate:8.0f} sagas/s", flush=True)
        single = {way: load(way, "single", 3.0, 1) for way in addresses}
        figures = _figures(results, single)
        figures["effects"] = asyncio.run(_report(worker["address"]))
        return figures, done


def _run_load(way: str, address: str, tag: str, seconds: float, concurrency: int) -> dict[str, Any]:
    command = [*_self(way), address, f"{tag}-{os.getpid()}", str(seconds), str(concurrency)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=seconds + 120)
    done: dict[str, Any] = json.loads(ended.stdout)
    return done


def _figures(
    results: dict[str, list[dict[str, Any]]], single: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for way, rounds in results.items():
        rates = [done["sagas"] / done["seconds"] for done in rounds]
        latencies = [value for done in rounds for value in done["latencies_ms"]]
        figures[way] = {
            "sagas_per_s": round(statistics.median(rates), 1),
            "sagas_per_s_by_round": [round(rate, 1) for rate in rates],
            "sagas": sum(done["sagas"] for done in rounds),
            "cpu_us_per_saga": {
                process: round(statistics.median(done["cpu_us"][process] for done in rounds))
                for process in rounds[0]["cpu_us"]
            },
            "latency_ms": _percentiles(latencies),
            "one_at_a_time_ms": _percentiles(single[way]["latencies_ms"]),
        }
    pairs = zip(
        figures["amends"]["sagas_per_s_by_round"],
        figures["naive"]["sagas_per_s_by_round"],
        strict=True,
    )
    ratios = [ours / theirs for ours, theirs in pairs]
    figures["ratio"] = round(statistics.median(ratios), 3)
    figures["ratio_by_round"] = [round(ratio, 3) for ratio in ratios]
    figures["one_at_a_time_ratio"] = round(
        figures["amends"]["one_at_a_time_ms"]["p50"] / figures["naive"]["one_at_a_time_ms"]["p50"],
        2,
    )
    return figures


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        f"p{share}": round(ordered[min(len(ordered) - 1, len(ordered) * share // 100)], 2)
        for share in (50, 95, 99)
    }


def _exact(figures: dict[str, Any], done: Counter[str], finished: int) -> bool:
    """Whether every piece of work left each of its effects once: neither lost nor doubled.

    `done` is what the loads were told, `finished` what the store holds; the effects are counted
    by the participant.
    """
    effects = figures["effects"]
    effects["expected"] = (done["naive"] + done["amends"]) * len(STEPS)
    return (
        effects["effects"] == effects["keys"] == effects["expected"]
        and effects["doubled"] == effects["undone"] == 0
        and finished == done["amends"]
    )


# -- processes -------------------------------------------------------------------------------------


def _self(*arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), *arguments]


def _runtime(folder: Path, participant_address: str, profile: Path | None) -> list[str]:
    profiled = ["-m", "cProfile", "-o", str(profile)] if profile else []
    return [
        *(sys.executable, *profiled, "-m", "amends_runtime", "serve"),
        *("--listen", "127.0.0.1:0", "--database", str(folder / "amends.db")),
        *("--participant", f"bench={participant_address}", "--log-level", "warning"),
        "--ready-file",
    ]


@contextlib.contextmanager
def _process(folder: Path, name: str, command: list[str]) -> Iterator[dict[str, Any]]:
    """A process that writes a ready file; ended by SIGTERM. Its log is shown if it fails."""
    ready_file, log = folder / f"{name}.json", folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, str(ready_file)], stdout=output, stderr=output)
        try:
            give_up_at = time.monotonic() + READY_S
            while not ready_file.exists():
                if process.poll() is not None or time.monotonic() > give_up_at:
                    raise SystemExit(f"{name} did not come up:\n{log.read_text()[-2000:]}")
                time.sleep(0.02)
            yield json.loads(ready_file.read_text())
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _announce(ready_file: Path, address: str) -> None:
    draft = ready_file.with_suffix(".draft")
    draft.write_text(json.dumps({"pid": os.getpid(), "address": address}))
    draft.replace(ready_file)


async def _register(address: str) -> None:
    definition = amends.Definition("bench")
    for step in STEPS:
        definition = definition.step(step, participant="bench", action=step)
    async with amends.Client(address) as client:
        await client.register(definition)


async def _report(address: str) -> dict[str, int]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = participant_pb2_grpc.ParticipantServiceStub(channel)
        call = _call("report", "report", b"")
        response = await stub.Execute(participant_pb2.ExecuteRequest(call=call), timeout=10)
    counted: dict[str, int] = json.loads(response.outcome.done.result.data)
    return counted


def _count_sagas(database: Path) -> int:
    """Sagas that the store has as COMPLETED, read by a connection that cannot write."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM sagas WHERE ended_at_ms > 0").fetchone()
    return int(count)


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (Linux: /proc; elsewhere 0)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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


def _conditions(rounds: int, seconds: float, folder: Path) -> dict[str, Any]:
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


def _print_table(figures: dict[str, Any], output: Path) -> None:
    print(f"\n{'':22}{'naive':>10}{'amends':>10}{'ratio':>8}")
    ours, theirs = figures["amends"], figures["naive"]
    rows = [("sagas/s, 100 at once", theirs["sagas_per_s"], ours["sagas_per_s"], figures["ratio"])]
    for share in ("p50", "p95", "p99"):
        a, b = theirs["latency_ms"][share], ours["latency_ms"][share]
        rows.append((f"latency {share} ms", a, b, b / a))
    for share in ("p50", "p95"):
        a, b = theirs["one_at_a_time_ms"][share], ours["one_at_a_time_ms"][share]
        rows.append((f"one at a time {share} ms", a, b, b / a))
    for name, a, b, ratio in rows:
        print(f"{name:22}{a:>10}{b:>10}{ratio:>8.2f}")
    effects = figures["effects"]
    print(
        f"\neffects counted at the participant: {effects['effects']}, doubled {effects['doubled']}"
    )
    print(f"fdatasync of 4 KiB: {figures['conditions']['fdatasync_us']} µs")
    print(f"disk per saga {figures['disk_bytes_per_saga']} bytes")
    for way in ("naive", "amends"):
        used = ", ".join(f"{name} {us}" for name, us in figures[way]["cpu_us_per_saga"].items())
        print(f"{way}: CPU per saga in µs: {used}")
    print(f"{'exact' if figures['exact'] else 'NOT EXACT: the run fails'}; written to {output}")


def main() -> int:
    """Parses the command line and does what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    whole = commands.add_parser("run", help="the benchmark (the default)")
    for target in (parser, whole):
        target.add_argument("--rounds", type=int, default=5)
        target.add_argument("--seconds", type=float, default=6.0)
        target.add_argument("--output", type=Path, default=Path("build/bench.json"))
        target.add_argument("--profile", type=Path, help="write a cProfile of the runtime here")
    commands.add_parser("participant").add_argument("ready_file", type=Path)
    for way in ("naive", "amends"):
        load = commands.add_parser(way)
        load.add_argument("address")
        load.add_argument("tag")
        load.add_argument("seconds", type=float)
        load.add_argument("concurrency", type=int)
    options = parser.parse_args()
    if options.command == "participant":
        asyncio.run(participant(options.ready_file))
        return 0
    if options.command in ("naive", "amends"):
        load_of = naive if options.command == "naive" else through_amends
        done = asyncio.run(
            load_of(options.address, options.tag, options.seconds, options.concurrency)
        )
        print(json.dumps(done))
        return 0
    return run(options.rounds, options.seconds, options.output, options.profile)


if __name__ == "__main__":
    raise SystemExit(main())
