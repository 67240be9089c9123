"""What `await client.start(..., wait_s=...)` costs its caller, and what the runtime's way in costs.

    python scripts/bench_client.py [--against FOLDER] [--seconds S] [--rounds N] [--tasks N ...]

Four figures, each in microseconds of CPU for one saga that is started, waited for and read:

    echo      the client against a server that starts nothing and answers as a runtime would, after
              the time that a commit takes: what the client costs at a pace that is its own limit
    runtime   the client against a real runtime with a real participant, and the runtime's own CPU
    starts    `SagaService.StartSagas` by itself, in this process, above a supervisor that answers
              at once: parse, checks, hash, reply
    refusals  the same where every start is refused, because the commit queue is full
    ends      `AwaitSagas` by itself: ids in, ends out

`--against` is the root of another checkout: its client and its way in are measured in alternation
with this one's, round by round, so that a ratio is of one run. Closed loop; the best of the rounds
counts, by CPU time, since other work on the machine can only add to it. `load`, `echo` and `way-in`
are the processes that it starts; nobody else needs to.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import anyio
import grpc.aio

sys.path.append(str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

import amends
from amends.v1 import saga_pb2, saga_pb2_grpc, types_pb2
from scripts.bench_interrupt import bench_folder, child, interruptible
from scripts.bench_options import MOST_AT_ONCE, MOST_ROUNDS, seconds, whole
from scripts.bench_processes import (
    PAYLOAD,
    STEPS,
    announce,
    cpu_seconds,
    participant_command,
    process,
    register,
    runtime_command,
    thread_cpu_seconds,
)

COMMIT_S: Final = 0.002
"""Of the echo: from a start to its answer."""
SAGA_S: Final = 0.004
"""Of the echo: from an id that is waited for to its end."""
WARM_S: Final = 1.0
"""Before a load's CPU is counted: imports, the connection, the first allocations."""
BATCH: Final = 200
"""Starts in one request of the way in: as many as gather at 10,000 a second in 20 ms."""
BATCHES: Final = 40
RUN_WITHIN_S: Final = 1800.0
HERE: Final = Path(__file__).resolve()

Figures = dict[str, float]


# -- the client ------------------------------------------------------------------------------------


async def load(address: str, tag: str, seconds: float, tasks: int) -> Figures:
    """Sagas and the CPU that they cost this process, after a moment of warming up."""
    async with amends.Client(address, timeout_s=60) as client:
        done = number = 0
        over_at = time.monotonic() + WARM_S + seconds

        async def loop() -> None:
            nonlocal done, number
            while time.monotonic() < over_at:
                number += 1
                saga_id = f"{tag}-{number}"
                started = await client.start("bench", PAYLOAD, saga_id=saga_id, wait_s=30)
                saga = await started.result(timeout_s=60)
                if saga.state is not amends.SagaState.COMPLETED:
                    raise RuntimeError(f"saga {saga.saga_id} ended {saga.state}")
                done += 1

        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(loop)
            await anyio.sleep(WARM_S)
            began, cpu_began, done_began = time.monotonic(), time.process_time(), done
            await anyio.sleep(over_at - time.monotonic())
            sagas, cpu_s = done - done_began, time.process_time() - cpu_began
            taken_s = time.monotonic() - began
    return {"us": cpu_s / sagas * 1e6, "per_s": sagas / taken_s}


def run(root: Path, program: str, *arguments: str) -> Figures:
    """Runs a program of this file with the packages of a checkout, and gives what it prints."""
    command = [sys.executable, str(HERE), program, *arguments]
    with child(command, stdout=subprocess.PIPE, env=packages_of(root)) as popen:
        said, _ = popen.communicate(timeout=RUN_WITHIN_S)
    if popen.returncode:
        raise RuntimeError(f"{program} failed, with exit code {popen.returncode}")
    figures: Figures = json.loads(said)
    return figures


def packages_of(root: Path) -> Mapping[str, str]:
    """An environment in which `amends` and `amends_runtime` are those of a checkout."""
    path = os.pathsep.join(str(root / part) for part in ("participants", "runtime"))
    return {**os.environ, "PYTHONPATH": path}


# -- a server that only answers --------------------------------------------------------------------


class Echo(saga_pb2_grpc.SagaServiceServicer):
    """Answers starts after `COMMIT_S`, and waits, each with a completed saga, after `SAGA_S`."""

    async def StartSaga(  # noqa: N802  # the contract's name
        self, request: saga_pb2.StartSagaRequest, context: Any
    ) -> saga_pb2.StartSagaResponse:
        """Ended at once."""
        return saga_pb2.StartSagaResponse(saga=completed(request.saga_id), ended=True)

    async def StartSagas(  # noqa: N802  # as above
        self, request: saga_pb2.StartSagasRequest, context: Any
    ) -> saga_pb2.StartSagasResponse:
        """Started, as lists show it."""
        await anyio.sleep(COMMIT_S)
        response = saga_pb2.StartSagasResponse()
        for start in request.starts:
            saga = response.results.add().started.saga
            saga.CopyFrom(_LISTED)
            saga.saga_id = start.saga_id
        return response

    async def AwaitSagas(  # noqa: N802  # as above
        self, request_iterator: AsyncIterator[saga_pb2.AwaitSagasRequest], context: Any
    ) -> AsyncIterator[saga_pb2.AwaitSagasResponse]:
        """Ends, all of a request together."""
        async for request in request_iterator:
            await anyio.sleep(SAGA_S)
            response = saga_pb2.AwaitSagasResponse()
            for saga_id in request.add:
                end = response.ends.add(saga_id=saga_id)
                end.saga.CopyFrom(_COMPLETED)
                end.saga.saga_id = saga_id
            yield response


def completed(saga_id: str) -> types_pb2.Saga:
    """A saga of the three steps as it is told at its end."""
    payload = types_pb2.Payload(data=PAYLOAD, content_type="application/octet-stream")
    return types_pb2.Saga(
        saga_id=saga_id,
        definition="bench",
        definition_hash="f" * 64,
        state=types_pb2.SAGA_STATE_COMPLETED,
        version=4,
        started_at_ms=1_800_000_000_000,
        updated_at_ms=1_800_000_000_010,
        ended_at_ms=1_800_000_000_010,
        input=payload,
        steps=[
            types_pb2.StepStatus(
                name=name,
                state=types_pb2.STEP_STATE_EXECUTED,
                verb=types_pb2.VERB_EXECUTE,
                round=1,
                attempt=1,
                result=payload,
            )
            for name in STEPS
        ],
    )


_COMPLETED: Final = completed("")
_LISTED: Final = types_pb2.Saga(
    definition="bench",
    definition_hash="f" * 64,
    state=types_pb2.SAGA_STATE_RUNNING,
    version=1,
    started_at_ms=1_800_000_000_000,
    updated_at_ms=1_800_000_000_000,
)


async def echo(ready_file: Path) -> None:
    """Serves until it is ended."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    # The generated .pyi knows only servicers whose methods are of one kind.
    saga_pb2_grpc.add_SagaServiceServicer_to_server(Echo(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    announce(ready_file, f"127.0.0.1:{port}")
    await server.wait_for_termination()


# -- the runtime's way in --------------------------------------------------------------------------


async def way_in() -> Figures:
    """What the handlers cost by themselves, each of `BATCHES` requests of `BATCH` items."""
    from scripts.bench_way_in import WayIn  # noqa: PLC0415  # needs a checkout that has a runtime

    ours = WayIn(BATCH)
    return {
        name: await best_us(part)
        for name, part in (
            ("starts", ours.starts),
            ("refusals", ours.refusals),
            ("ends", ours.ends),
        )
    }


async def best_us(part: Callable[[], Any]) -> float:
    """The least CPU of this process for one item, of `BATCHES` requests."""
    taken = []
    for _ in range(BATCHES):
        began = time.process_time()
        await part()
        taken.append(time.process_time() - began)
    return min(taken) / BATCH * 1e6


# -- all together ----------------------------------------------------------------------------------


def against_echo(roots: Mapping[str, Path], rounds: int, seconds: float, tasks: int) -> None:
    """The client at a pace that is its own limit."""
    with bench_folder() as folder:
        command = [sys.executable, str(HERE), "echo"]
        with process(folder, "echo", command) as server:
            found: dict[str, list[Figures]] = {which: [] for which in roots}
            for number in range(rounds):
                for which, root in roots.items():
                    tag = f"{which}-{number}"
                    found[which].append(
                        run(root, "load", server["address"], tag, str(seconds), str(tasks))
                    )
    show(f"echo, {tasks} tasks", found)


def against_runtime(roots: Mapping[str, Path], rounds: int, seconds: float, tasks: int) -> None:
    """The client in its usual place, and what the runtime uses meanwhile."""
    build = HERE.parent.parent / "build"
    build.mkdir(exist_ok=True)
    with (
        bench_folder(build) as folder,
        process(folder, "participant", participant_command()) as participant,
    ):
        found: dict[str, list[Figures]] = {which: [] for which in roots}
        for which, root in roots.items():
            command = runtime_command(folder / f"{which}.db", participant["address"])
            with process(folder, f"runtime-{which}", command, packages_of(root)) as runtime:
                asyncio.run(register(runtime["address"]))
                for number in range(rounds):
                    before = cpu_seconds(runtime["pid"]), thread_cpu_seconds(runtime["pid"])
                    tag = f"{which}-{tasks}-{number}"
                    figures = run(root, "load", runtime["address"], tag, str(seconds), str(tasks))
                    sagas = figures["per_s"] * (seconds + WARM_S)
                    used = cpu_seconds(runtime["pid"]) - before[0]
                    loop = thread_cpu_seconds(runtime["pid"])["loop"] - before[1]["loop"]
                    figures["runtime_us"] = used / sagas * 1e6
                    figures["runtime_loop_us"] = loop / sagas * 1e6
                    found[which].append(figures)
    show(f"runtime, {tasks} tasks", found)


def show(title: str, found: Mapping[str, list[Figures]]) -> None:
    """Prints the best round of each."""
    for which, rounds in found.items():
        best = min(
            rounds, key=lambda figures: sum(figures[key] for key in ("us",) if key in figures)
        )
        told = "  ".join(f"{key} {value:8.1f}" for key, value in best.items())
        print(f"{title:22} {which:8} {told}", flush=True)


def main() -> int:
    """Runs one of the programs, or all that this file measures."""
    match sys.argv[1:]:
        case ["echo", ready_file]:
            asyncio.run(echo(Path(ready_file)))
        case ["load", address, tag, seconds_each, tasks]:
            print(json.dumps(asyncio.run(load(address, tag, float(seconds_each), int(tasks)))))
        case ["way-in"]:
            print(json.dumps(asyncio.run(way_in())))
        case _:
            options = _parser().parse_args()
            return interruptible(lambda: everything(options))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="what the client and the way in cost")
    parser.add_argument(
        "--against", type=Path, help="the root of another checkout; default: this one alone"
    )
    parser.add_argument(
        "--seconds", type=seconds(), default=3.0, help="of each load; default %(default)s s"
    )
    parser.add_argument(
        "--rounds",
        type=whole(1, MOST_ROUNDS),
        default=3,
        help="of which the best counts; default %(default)s",
    )
    parser.add_argument(
        "--tasks",
        type=whole(1, MOST_AT_ONCE),
        nargs="+",
        default=[100, 1000],
        help="sagas at once; default 100 1000",
    )
    parser.add_argument(
        "--only", choices=("echo", "runtime", "way-in"), help="one of the parts; default: all"
    )
    return parser


def everything(options: argparse.Namespace) -> None:
    """What the top of this file says."""
    roots = {"here": HERE.parent.parent}
    if options.against is not None:
        roots = {"against": options.against.resolve(), **roots}
    for tasks in options.tasks:
        if options.only in {None, "echo"}:
            against_echo(roots, options.rounds, options.seconds, tasks)
        if options.only in {None, "runtime"}:
            against_runtime(roots, options.rounds, options.seconds, tasks)
    if options.only in {None, "way-in"}:
        found: dict[str, list[Figures]] = {which: [] for which in roots}
        for _ in range(options.rounds):
            for which, root in roots.items():
                found[which].append(run(root, "way-in"))
        show("way in", found)


if __name__ == "__main__":
    raise SystemExit(main())
