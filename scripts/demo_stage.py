"""The stage of the demo: folder, processes and client, and what is said to the audience."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from rich.console import Console
from rich.text import Text

import amends
from shop.postgres import PostgresServer
from shop.processes import Process, Processes
from shop.switches import write_switches

END_TIMEOUT_S: Final = 45.0
"""How long a saga may take to end."""

LOOK_EVERY_S: Final = 0.1
"""How often the breaker is looked at."""

LOG_LINES: Final = 8
"""Of each log, when something failed."""

CONNECT_TIMEOUT_S: Final = 2.0
"""How long a collector may take to accept a connection, when it is asked whether it is there."""

HTTPS_PORT: Final = 443  # only an https URL may leave it out

BREAKER: Final = """
[breaker]
failures_to_open = 3  # somebody watches: the default of 5 takes a little longer
open_s = 0.5
max_open_s = 2
"""


class DemoFailed(Exception):
    """Something did not hold; says what."""


class Stage:
    """What all scenes are played on."""

    def __init__(self, folder: Path, *, seed: int, otlp: str | None) -> None:
        self.folder = folder
        self.seed = seed
        self.processes = Processes(folder, environment=_tracing_environment(otlp))
        self.client: amends.Client
        """Of the runtime, while the scenes are played."""
        self.runtime: Process
        self.casualties: list[Process] = []
        """The processes that had ended when something failed."""
        self._otlp = otlp
        self._console = Console(highlight=False, soft_wrap=True)
        self._began_at_s = time.monotonic()

    # -- what is done ------------------------------------------------------------------------------

    async def open(self) -> None:
        """Start the four services, the bank's branches with their PostgreSQL, and the runtime."""
        async with asyncio.TaskGroup() as tasks:
            services = tasks.create_task(self.processes.start_services())
            branches = tasks.create_task(self.processes.start_branches())
        participants = (*services.result(), *branches.result())
        self.runtime = await self.processes.start_runtime(
            {each.name: each.address for each in participants},
            settings=BREAKER,
            arguments=() if self._otlp is None else (f"--otlp={self._otlp}",),
        )
        for process in (*participants, self.runtime):
            self.tell(f"{process.name:<10} {process.address:<16} pid {process.pid}")
        self.tell(f"{'postgres':<10} 127.0.0.1:{self.postgres.port:<6} pid {self.postgres.pid}")

    @property
    def postgres(self) -> PostgresServer:
        """The PostgreSQL of the bank in the east."""
        assert self.processes.postgres is not None, "it was started with the branches"
        return self.processes.postgres

    def switch(self, switches: Mapping[str, Any]) -> None:
        """Say what is to go wrong from now on."""
        write_switches(self.processes.switches, switches)

    def process(self, name: str) -> Process:
        """Give a process by its name."""
        return next(each for each in self.processes.all if each.name == name)

    async def wait_down(self, service: str) -> None:
        """Wait until nobody listens any more on a service's port."""
        address = self.process(service).address
        host, _, port = address.rpartition(":")

        async def refused() -> None:
            while True:
                try:
                    _, writer = await asyncio.open_connection(host, int(port))
                except ConnectionRefusedError:
                    return
                writer.close()
                await asyncio.sleep(LOOK_EVERY_S)

        await within(refused(), f"{service} still listens on {address}")

    async def wait_breaker(self, participant: str, state: amends.BreakerState) -> None:
        """Wait until a participant's breaker is in a state."""

        async def reached() -> None:
            while True:
                breakers = {each.participant: each for each in await self.client.breakers()}
                if breakers[participant].state is state:
                    return
                await asyncio.sleep(LOOK_EVERY_S)

        await within(reached(), f"the breaker of {participant} is not {state}")

    def kill_runtime(self, why: str) -> None:
        """End the runtime with SIGKILL."""
        pid = self.runtime.pid
        self.runtime.kill()
        self.tell(f"kill -9 {pid}, {why}", "bold red")

    async def start_runtime_again(self) -> None:
        """Start the runtime that was killed."""
        await self.runtime.start()
        self.tell(
            f"started again, pid {self.runtime.pid}: the same database, the same port", "bold"
        )

    # -- what is said ------------------------------------------------------------------------------

    def say(self, line: str, style: str = "") -> None:
        """Print a line, now."""
        self._console.print(Text(line, style))

    def headline(self, line: str) -> None:
        """Print the name of a scene."""
        self._console.print()
        self.say(line, "bold cyan")

    def tell(self, line: str, style: str = "") -> None:
        """Print a line of a scene, with the time."""
        self._console.print(Text.assemble((f"{self.elapsed_s():7.2f} s  ", "dim"), (line, style)))

    def show(self, text: str) -> None:
        """Print what a program said, as it said it."""
        for line in text.rstrip().splitlines():
            self.say(f"             {line}", "dim")

    async def tell_history(self, saga_id: str) -> None:
        """Tell what happened to a saga, and by which id a tracing system finds it."""
        async for record in self.client.history(saga_id):
            line, style = in_words(record)
            if line:
                self.tell(f"  {line}", style)
        await self.tell_trace(saga_id)

    async def tell_trace(self, saga_id: str) -> None:
        """Say by which id a tracing system finds a saga, if traces are sent anywhere."""
        if self._otlp is not None:
            trace = await self.client.trace(saga_id)
            self.tell(f"trace of {saga_id}: {trace.trace_id}", "cyan")

    async def tell_if_nobody_collects(self) -> None:
        """Say that no collector is there. Whether all has arrived, only a collector knows."""
        if self._otlp is None:
            return
        url = urlsplit(self._otlp)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, writer = await asyncio.open_connection(url.hostname, url.port or HTTPS_PORT)
        except OSError:  # a TimeoutError is one, too
            self.tell(
                f"no collector answers at {self._otlp} now; without one, traces are lost", "yellow"
            )
        else:
            writer.close()

    def report_failure(self, why: str) -> None:
        """Say what went wrong and where to look; the folder stays."""
        self.headline("The demo failed")
        self.say(why, "bold red")
        for process in self.casualties:
            self.say(f"{process.name} had ended, with {process.exit_code}", "bold red")
        for process in self.processes.all:
            self.say(process.last_lines(LOG_LINES), "dim")
        if self.processes.postgres is not None:
            self.say(self.processes.postgres.last_lines(LOG_LINES), "dim")
        self.say(f"Logs and databases stay in {self.folder}.")
        self.say(f"make demo ARGS=--seed={self.seed} repeats the run.")

    def elapsed_s(self) -> float:
        """Say for how long the demo has been playing, in seconds."""
        return time.monotonic() - self._began_at_s


def in_words(record: amends.Record) -> tuple[str, str]:
    """Tell a record of a history, with a style; nothing for those that a play leaves out."""
    kinds = amends.RecordKind
    match record.kind:
        case kinds.STEP_EXECUTED:
            return f"{record.step} is done{_nth(record)}", ""
        case kinds.STEP_PREPARED:
            return f"{record.step} votes yes{_nth(record)}", ""
        case kinds.DECISION_MADE:
            return f"the decision: {record.decision}", "bold"
        case kinds.ROUND_PLANNED:
            return f"all is rolled back, and tried again in round {record.round}", "yellow"
        case kinds.STEP_REJECTED:
            return f"{record.step} is refused: {record.failure}", "yellow"
        case kinds.ATTEMPT_FAILED:
            status = record.timing.status if record.timing is not None else "no reply"
            return f"{record.step}: attempt {record.attempt} ends unknown ({status})", "yellow"
        case kinds.SAGA_TURNED_BACK:
            return "the saga turns back", "yellow"
        case kinds.STEP_COMPENSATED:
            return f"{record.step} is undone{_nth(record)}", ""
        case kinds.ATTEMPT_LOST:
            return f"{record.step}: attempt {record.attempt} was under way at the kill", "yellow"
        case kinds.SAGA_ENDED:
            return f"{record.state}", "bold"
        case _:
            return "", ""


def _nth(record: amends.Record) -> str:
    return f", at attempt {record.attempt}" if record.attempt > 1 else ""


def _tracing_environment(otlp: str | None) -> dict[str, str]:
    """Say by OpenTelemetry's own variables where spans go, over whatever is set already."""
    if otlp is None:
        return {}
    return {
        "OTEL_SDK_DISABLED": "false",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_TRACES_SAMPLER": "parentbased_always_on",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": otlp,
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
    }


async def within(condition: Awaitable[object], otherwise: str) -> None:
    """Wait for something, but not for ever. Raises `DemoFailed` that says `otherwise`."""
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            await condition
    except TimeoutError:
        raise DemoFailed(f"{otherwise}, within {END_TIMEOUT_S:g} seconds") from None


@asynccontextmanager
async def under_way(
    saga: Coroutine[Any, Any, amends.Saga],
) -> AsyncIterator[Awaitable[amends.Saga]]:
    """Let a saga run beside the block, which waits for it itself; a failure leaves no task."""
    task = asyncio.create_task(saga)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def expect_end(saga: amends.Saga, state: str) -> None:
    """Raise `DemoFailed` unless a saga ended so."""
    if saga.state != state:
        raise DemoFailed(f"saga {saga.saga_id} ended {saga.state}, not {state}")
