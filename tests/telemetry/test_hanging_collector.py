"""A collector that hangs, is away or dies: sagas do not notice, and neither does the way down.

Each test runs `amends serve` and the shop as processes of their own. The receiver runs in the test,
or in a process where it must die.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio
import pytest

import amends
from shop.definition import order as order_definition
from shop.processes import Process, Processes
from shop.switches import write_switches
from tests.acceptance.world import ORDER, PATIENCE_S, until
from tests.telemetry import otlp_receiver
from tests.telemetry.otlp_receiver import Behaviour, read_kept, receiving

PROTOCOLS: Final = ("grpc", "http/protobuf")


@asynccontextmanager
async def runtime(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[Process, amends.Client]]:
    """The shop, a runtime with these arguments, and a client of it."""
    async with Processes(folder, environment=environment) as processes:
        write_switches(processes.switches, {})
        services = await processes.start_services()
        process = await processes.start_runtime(
            {service.name: service.address for service in services},
            arguments=("--log-format=json", *arguments),
        )
        async with amends.Client(process.address) as client:
            await client.register(order_definition)
            yield process, client


async def complete(client: amends.Client, count: int) -> list[str]:
    """Start so many sagas, and wait until all are COMPLETED."""
    started = [await client.start("order", ORDER) for _ in range(count)]
    for saga in started:
        ended = await saga.result(timeout_s=PATIENCE_S)
        assert ended.state is amends.SagaState.COMPLETED
    return [saga.saga_id for saga in started]


def logged(process: Process, message: str) -> list[dict[str, object]]:
    """The lines of its log with this message."""
    lines = process.log.read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    return [entry for entry in entries if entry["message"] == message]


async def assert_ends_well(process: Process) -> None:
    """SIGTERM, exit code 0, the last line says so, and no traceback anywhere."""
    assert await process.stop(timeout_s=PATIENCE_S) == 0
    log = process.log.read_text(encoding="utf-8")
    assert "Traceback" not in log
    assert "terminate called" not in log, "the C++ runtime has ended the process"
    assert logged(process, "amends has stopped")


def flags(address: str, protocol: str) -> tuple[str, dict[str, str]]:
    """What makes a runtime send there, by this protocol."""
    return f"--otlp={address}", {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol}


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_collector_that_never_answers_holds_up_nothing(
    tmp_path: Path, protocol: str
) -> None:
    """Sagas complete while a request hangs, and the process ends in order while it still does."""
    async with receiving() as receiver:
        receiver.behave(Behaviour.HANG)
        address = receiver.grpc_address if protocol == "grpc" else receiver.http_url
        otlp, environment = flags(address, protocol)
        async with runtime(tmp_path, otlp, environment=environment) as (process, client):
            await complete(client, 3)
            await receiver.wait_until(lambda: receiver.arrived >= 1)
            await complete(client, 3)
            await assert_ends_well(process)
            [abandoned] = logged(process, "traces_abandoned")
            assert abandoned["level"] == "warning"
            assert abandoned["sagas"] == 6, "those that were being sent, too"
        assert receiver.received.requests == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_collector_that_is_not_there_is_said_once(tmp_path: Path, protocol: str) -> None:
    """One warning, however many sagas end; nothing else of it in the log, and exit code 0."""
    async with receiving() as receiver:
        address = receiver.grpc_address if protocol == "grpc" else receiver.http_url
    otlp, environment = flags(address, protocol)
    # A time-out of a second, so that the exporter itself gives up within the test.
    environment["OTEL_EXPORTER_OTLP_TIMEOUT"] = "1000"
    async with runtime(tmp_path, otlp, environment=environment) as (process, client):
        await complete(client, 3)
        [up] = logged(process, "amends is up")
        assert address.removeprefix("http://") in str(up["traces"])
        await until(lambda: bool(logged(process, "traces_not_taken")), "the warning")
        await complete(client, 3)
        await assert_ends_well(process)
        [warning] = logged(process, "traces_not_taken")
        assert warning["level"] == "warning"
        assert address.removeprefix("http://") in str(warning["to"])
        assert warning["why"]
        [abandoned] = logged(process, "traces_abandoned")
        assert abandoned["sagas"] == 6
        assert isinstance(abandoned["spans_lost"], int)
        assert abandoned["spans_lost"] > 0
        assert "amends trace export" in str(abandoned["hint"])
        assert "opentelemetry" not in process.log.read_text(encoding="utf-8")


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_collector_that_dies_and_comes_back_gets_what_waited(
    tmp_path: Path, protocol: str
) -> None:
    """Killed in the middle: the spans of what ended meanwhile arrive when it is back."""
    kept = tmp_path / "kept"
    first = await collector(tmp_path, kept)
    address = first.grpc if protocol == "grpc" else first.http
    otlp, environment = flags(address, protocol)
    environment["OTEL_EXPORTER_OTLP_TIMEOUT"] = "1000"
    second = None
    try:
        async with runtime(tmp_path, otlp, environment=environment) as (process, client):
            sagas = await complete(client, 2)
            await until(lambda: roots(kept) == set(sagas), "the first traces")
            first.process.kill()
            first.process.wait()
            meanwhile = await complete(client, 3)
            await until(lambda: bool(logged(process, "traces_not_taken")), "the warning")
            second = await collector(
                tmp_path, kept, grpc_port=port_of(first.grpc), http_port=port_of(first.http)
            )
            await until(lambda: roots(kept) == {*sagas, *meanwhile}, "the traces that waited")
            await until(lambda: bool(logged(process, "traces_taken_again")), "the good news")
            assert [line["spans_lost"] for line in logged(process, "traces_taken_again")] == [0]
            await assert_ends_well(process)
    finally:
        for each in (first, second):
            if each is not None:
                each.close()


# -- a collector in a process of its own -----------------------------------------------------------


class Collector:
    """A receiver that can be killed."""

    def __init__(self, process: subprocess.Popen[bytes], ready: Mapping[str, str]) -> None:
        self.process = process
        self.grpc = ready["grpc"]
        self.http = ready["http"]

    def close(self) -> None:
        """End it, whether it runs or not."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


async def collector(
    folder: Path, kept: Path, *, grpc_port: int = 0, http_port: int = 0
) -> Collector:
    """Start a receiver that writes what it gets to `kept`."""
    ready = folder / "collector.ready"
    ready.unlink(missing_ok=True)
    process = await anyio.to_thread.run_sync(
        lambda: subprocess.Popen(
            [
                *(sys.executable, otlp_receiver.__file__),
                *(f"--ready-file={ready}", f"--keep={kept}"),
                *(f"--grpc-port={grpc_port}", f"--http-port={http_port}"),
            ],
            stdin=subprocess.PIPE,
        )
    )
    await until(ready.exists, "the collector")
    return Collector(process, json.loads(ready.read_text(encoding="utf-8")))


def port_of(address: str) -> int:
    """The port at the end of an address or a URL."""
    return int(address.rpartition(":")[2])


def roots(kept: Path) -> set[str]:
    """The sagas whose root span a collector has kept."""
    return {
        span.attributes["amends.saga_id"]
        for span in read_kept(kept).spans()
        if span.name.startswith("saga ")
    }
