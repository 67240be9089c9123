"""The world of the acceptance tests, all of whose processes send their spans to a real receiver."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import anyio

import amends
from amends import RecordKind
from shop.definition import order as order_definition
from shop.journal import Journal
from shop.ports import HeldPort
from shop.processes import Process, Processes
from shop.switches import write_switches
from tests.acceptance.world import PATIENCE_S, SETTINGS, World, until
from tests.telemetry.otlp_receiver import ReceivedSpan, Receiver
from tests.telemetry.trace_rules import Expectation, Trace, assert_well_formed, broken_rules

PATIENT_PROGRAM: Final = Path(__file__).with_name("patient_service.py")

AFTER: Final = {
    "charge": ("place",),
    "reserve": ("place",),
    "ship": ("charge", "reserve"),
    "confirm": ("ship",),
}
"""The order's steps, and what they wait for."""

thoughtful: Final = (
    amends.Definition("thoughtful")
    .step("begin", "patient", "stubborn")
    .retriable("think", "patient", "ponder")
)
"""Completes, after its participant was asked again and again."""

regretted: Final = (
    amends.Definition("regretted")
    .step("begin", "patient", "stubborn")
    .pivot("never", "patient", "refuse")
)
"""Turns back, and its undoing gets stuck."""


def environment_of(otlp: str) -> dict[str, str]:
    """Name the collector for runtime and services, over whatever this machine says."""
    return {
        "OTEL_SDK_DISABLED": "false",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_TRACES_SAMPLER": "parentbased_always_on",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://{otlp}",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
        "OTEL_SERVICE_NAME": "",
        "OTEL_RESOURCE_ATTRIBUTES": "",
        # The services' own; the default of five seconds would be waited for in each test.
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }


@dataclass
class Traced:
    """A world, where its spans arrive, and what each trace is expected to be."""

    world: World
    receiver: Receiver
    expected: dict[str, Expectation] = field(default_factory=dict)
    """By trace id; all that came is compared with it once more when everything has ended."""

    @property
    def client(self) -> amends.Client:
        """The world's client."""
        return self.world.client

    async def trace_id(self, saga_id: str) -> str:
        """Ask the runtime which trace is a saga's."""
        return (await self.client.trace(saga_id, timeout_s=PATIENCE_S)).trace_id

    async def wait(self, predicate: Callable[[], bool], what: str) -> None:
        """Wait until it holds of what has arrived."""
        try:
            # No gRPC call is inside of it, of which a cancel scope would leak.
            with anyio.fail_after(PATIENCE_S):
                await self.receiver.wait_until(predicate)
        except TimeoutError:
            raise AssertionError(f"waited {PATIENCE_S:g} s for {what}") from None

    def kill_runtime(self) -> None:
        """Kill it. The next one sends again what ended in the last seconds, whoever has it."""
        self.world.runtime.kill()
        for trace_id, expected in self.expected.items():
            self.expected[trace_id] = replace(expected, crashed=True)

    async def wait_probe(self, saga_id: str) -> None:
        """Wait until a probe of an open breaker has found nobody there, for this saga."""

        async def has_probed() -> bool:
            failed = await self.world.records(saga_id, RecordKind.ATTEMPT_FAILED)
            return any(record.probe for record in failed)

        await until(has_probed, f"a probe of {saga_id}")

    async def well_formed(self, saga_id: str, **known: Any) -> Trace:
        """Wait until a saga's trace is all there, and give it; `known` makes an `Expectation`.

        Raises AssertionError with what is wrong with it and the tree, if that does not change.
        """
        trace_id = await self.trace_id(saga_id)
        expected = Expectation(after=AFTER, **known)
        self.expected[trace_id] = expected

        def holds() -> bool:
            return not broken_rules(self.receiver.spans(trace_id), expected)

        with anyio.move_on_after(PATIENCE_S):
            await self.receiver.wait_until(holds)
        return assert_well_formed(self.receiver.spans(trace_id), expected)

    def spans(self, trace_id: str) -> list[ReceivedSpan]:
        """All that has come of a trace."""
        return self.receiver.spans(trace_id)


@asynccontextmanager
async def shop_that_traces(
    folder: Path, otlp: str
) -> AsyncIterator[tuple[Processes, dict[str, Process]]]:
    """Start the shop and the patient participant, sending spans to a collector at HOST:PORT."""
    async with Processes(folder, environment=environment_of(otlp)) as processes:
        write_switches(processes.switches, {})
        services = {service.name: service for service in await processes.start_services()}
        port = HeldPort()
        patient = processes._add(  # as the tests of TLS do
            "patient", port, str(PATIENT_PROGRAM), f"--listen={port.address}"
        )
        await patient.start()
        yield processes, {**services, "patient": patient}


@asynccontextmanager
async def world_of(
    processes: Processes, services: Mapping[str, Process], *, settings: str = ""
) -> AsyncIterator[World]:
    """Start a runtime over services; `settings` is more of its configuration. Settle in the end."""
    addresses = {name: service.address for name, service in services.items()}
    runtime = await processes.start_runtime(addresses, settings=SETTINGS + settings)
    with Journal(processes.folder / "journal.jsonl") as journal:
        async with amends.Client(runtime.address) as client:
            for definition in (order_definition, thoughtful, regretted):
                await client.register(definition)
            world = World(processes, services, runtime, client, journal)
            yield world
            await world.settle()


@asynccontextmanager
async def traced_world(
    folder: Path, receiver: Receiver, *, settings: str = ""
) -> AsyncIterator[Traced]:
    """Run it all; when it has ended, all that came is as expected, and nothing else came."""
    async with (
        shop_that_traces(folder, receiver.grpc_address) as (processes, services),
        world_of(processes, services, settings=settings) as world,
    ):
        traced = Traced(world, receiver)
        yield traced
    # Everything was stopped in order, so whatever anybody still had to send has come.
    wrong = [
        f"{trace_id}: {line}"
        for trace_id, expected in traced.expected.items()
        for line in broken_rules(receiver.spans(trace_id), expected)
    ]
    strangers = set(receiver.received.trace_ids()) - set(traced.expected)
    wrong += [f"{trace_id}: nobody has started it" for trace_id in strangers]
    assert not wrong, "\n".join(wrong)
