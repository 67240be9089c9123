"""A collector that takes no traces: sagas, the runtime's memory and its end are none the worse.

A real `amends serve` traces every saga to a collector that takes requests and never answers, one
that takes connections and says nothing, one that is not there, and one that is killed while the
sagas run. Only spans may be lost, and they are counted.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import urllib.request
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

import amends
from amends_runtime.telemetry.sending import QUEUE_BYTES
from amends_runtime.telemetry.traces import SMALL_PAYLOADS
from shop.ports import HeldPort
from shop.processes import Process, Processes
from tests.acceptance.world import PATIENCE_S, until
from tests.telemetry import otlp_receiver
from tests.telemetry.otlp_receiver import Behaviour, read_kept, receiving

SAGAS: Final = 100
AT_ONCE: Final = 50
STEPS: Final = ("one", "two", "three")
SPANS_OF_A_SAGA: Final = 1 + 2 * len(STEPS)
"""The saga, and of each step itself and its attempt."""

DEFINITIONS: Final = {"trial": STEPS, "short": STEPS[:1]}

PROTOCOLS: Final = ("grpc", "http/protobuf")


@dataclass
class Running:
    """A runtime that traces every saga, and what its participant has done."""

    runtime: Process
    client: amends.Client
    effects: Counter[str] = field(default_factory=Counter)
    begun: int = 0

    async def complete(self, sagas: int, definition: str = "trial", data: bytes = b"x") -> None:
        """Run so many sagas, some at once; each completes, with each of its effects once."""
        steps = len(DEFINITIONS[definition])
        effects = self.effects.total() + sagas * steps
        waiting = iter(range(self.begun, self.begun + sagas))
        self.begun += sagas

        async def run() -> None:
            for number in waiting:
                saga = await self.client.start(definition, data, saga_id=f"trial-{number}")
                ended = await saga.result(timeout_s=PATIENCE_S)
                assert ended.completed

        async with anyio.create_task_group() as tasks:
            for _ in range(AT_ONCE):
                tasks.start_soon(run)
        assert self.effects.total() == len(self.effects) == effects

    def metric(self, name: str) -> dict[str, float]:
        """Read a metric at the runtime's endpoint: its values by their labels' values."""
        address = json.loads(self.runtime.ready_file.read_text(encoding="utf-8"))["metrics"]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE_S) as answer:
            text = str(answer.read(), "utf-8")
        return {
            ",".join(sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        }

    def log(self) -> list[dict[str, Any]]:
        """Give the lines of the runtime's log. All that the process writes is one."""
        text = self.runtime.log.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    async def stop(self) -> None:
        """Stop it as an operator does: it ends by itself, in order, and has nothing to add."""
        self.runtime.terminate()
        # No bound of ours: a runtime that waits for its collector for ever is seen by the watchdog.
        assert await self.runtime.wait_ended(timeout_s=2 * PATIENCE_S) == 0
        log = self.log()
        assert log[-1]["message"] == "amends has stopped"
        assert "Traceback" not in json.dumps(log)
        assert {line["level"] for line in log} <= {"info", "warning"}
        warnings = Counter(line["message"] for line in log if line["level"] == "warning")
        assert max(warnings.values(), default=0) <= 1, "what goes wrong is said once"


@asynccontextmanager
async def running(folder: Path, endpoint: str, protocol: str) -> AsyncIterator[Running]:
    """Start a runtime that sends traces to `endpoint`, and its participant."""
    trial = amends.Participant("trial", barrier=None)
    effects: Counter[str] = Counter()

    async def act(call: amends.Call) -> bytes:
        effects[f"{call.saga_id}/{call.action}"] += 1
        return b"done"

    async def undo(call: amends.Call) -> None:
        effects[f"{call.saga_id}/{call.action} undone"] += 1

    for step in STEPS:
        trial.execute(step)(act)
        trial.compensate(step)(undo)
    settings = f"""
        [telemetry]
        otlp_endpoint = "{endpoint}"
        otlp_protocol = "{protocol}"
        metrics_listen = "127.0.0.1:0"
    """
    async with amends.serve(trial, listen="127.0.0.1:0") as server, Processes(folder) as processes:
        runtime = await processes.start_runtime({"trial": server.address}, settings=settings)
        async with amends.Client(runtime.address) as client:
            for name, steps in DEFINITIONS.items():
                definition = amends.Definition(name)
                for step in steps:
                    definition = definition.step(step, participant="trial", action=step)
                await client.register(definition)
            yield Running(runtime, client, effects)


# -- collectors ------------------------------------------------------------------------------------


@contextlib.contextmanager
def silent_port() -> Iterator[str]:
    """Listen, and say nothing: the system takes the connections, and nobody reads them."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@contextlib.contextmanager
def absent_port() -> Iterator[str]:
    """Give a port that nobody listens on."""
    port = HeldPort()
    try:
        yield port.address
    finally:
        port.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_collector_takes_requests_and_never_answers(tmp_path: Path, protocol: str) -> None:
    """All sagas complete, what waits for the collector is bounded, and the runtime ends."""
    async with receiving() as receiver:
        receiver.behave(Behaviour.HANG)
        endpoint = f"http://{receiver.grpc_address}" if protocol == "grpc" else receiver.http_url
        async with running(tmp_path, endpoint, protocol) as world:
            await world.complete(1)
            await receiver.wait_until(lambda: receiver.arrived > 0)  # from here on it hangs
            await world.complete(SAGAS - 1)
            await world.stop()
        assert receiver.spans() == []


async def test_what_waits_for_a_collector_is_bounded(tmp_path: Path) -> None:
    """Once the queue is full, further traces are dropped and counted, and sagas go on."""
    data = bytes(SMALL_PAYLOADS - 1024)  # as much as waits together with a trace's records
    bound = QUEUE_BYTES // len(data)
    sagas = bound * 5 // 4
    async with receiving() as receiver:
        receiver.behave(Behaviour.HANG)
        async with running(tmp_path, f"http://{receiver.grpc_address}", "grpc") as world:
            await world.complete(sagas, "short", data)

            def lost() -> float:
                return sum(world.metric("amends_telemetry_spans_total").values()) / 3

            # The metric is of the last look, some seconds ago.
            await until(lambda: sagas - lost() <= bound, "no more than the queue's bound to wait")
            await world.stop()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("port", [silent_port, absent_port], ids=["silent", "absent"])
async def test_nobody_speaks_at_the_collectors_port(
    tmp_path: Path, port: Any, protocol: str
) -> None:
    """The same if the connection is taken and nothing is said, and if it is refused."""
    with port() as address:
        async with running(tmp_path, f"http://{address}", protocol) as world:
            await world.complete(SAGAS)
            await world.stop()


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_collector_is_killed_in_the_middle(tmp_path: Path, protocol: str) -> None:
    """Traces of before are with it, whole; the sagas of after complete all the same."""
    kept, half = tmp_path / "kept", SAGAS // 2
    async with (
        collector(tmp_path, kept) as receiver,
        running(tmp_path, receiver.endpoint(protocol), protocol) as world,
    ):
        await world.complete(half)
        await until(lambda: len(whole_traces(kept)) == half, "the traces of before")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(world.complete, SAGAS - half)
            receiver.kill()
        await world.stop()
    assert len(whole_traces(kept)) >= half


def whole_traces(kept: Path) -> list[str]:
    """Give the traces of which a collector has kept every span, and none twice."""
    spans: defaultdict[str, list[str]] = defaultdict(list)
    for span in read_kept(kept).spans():
        if not span.name.startswith("queued: "):  # a machine that is busy may add some of these
            spans[span.trace_id].append(span.span_id)
    return [
        trace_id for trace_id, ids in spans.items() if len(ids) == len(set(ids)) == SPANS_OF_A_SAGA
    ]


@dataclass
class Collector:
    """A collector in a process of its own."""

    process: subprocess.Popen[bytes]
    grpc: str
    http: str

    def endpoint(self, protocol: str) -> str:
        """Give where it listens."""
        return self.grpc if protocol == "grpc" else self.http

    def kill(self) -> None:
        """End it with SIGKILL. Returns when it is gone."""
        self.process.kill()
        self.process.wait()


@asynccontextmanager
async def collector(folder: Path, kept: Path) -> AsyncIterator[Collector]:
    """Run a collector as a process of its own."""
    ready = folder / "collector.ready"
    command = [
        *(sys.executable, otlp_receiver.__file__),
        *("--ready-file", str(ready), "--keep", str(kept)),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            await until(ready.exists, "the collector to be ready")
            addresses = json.loads(ready.read_text(encoding="utf-8"))
            yield Collector(process, f"http://{addresses['grpc']}", addresses["http"])
        finally:
            process.kill()
