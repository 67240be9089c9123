"""The demo: real orders go through four real services, and the runtime is killed in the middle.

Starts the shop's services and a runtime as processes in a fresh folder, plays five scenes, and
audits the ledgers. Exits with 0 only if everything held, and with 1, after saying where the logs
are, if anything did not. No process outlives it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from rich.console import Console
from rich.text import Text

import amends
from amends_runtime.core.addresses import check_collector
from shop.audit import JOURNAL_NAME, audit, databases_in, effects_of
from shop.catalogue import (
    DECLINED_CARD,
    EMPTY_PURSE,
    OPENING_BALANCES_CENTS,
    PRODUCTS,
    UNKNOWN_ADDRESS,
)
from shop.definition import order
from shop.faults import count_faults
from shop.journal import Journal
from shop.processes import Process, Processes, ProcessFailed
from shop.server import faults_file
from shop.switches import write_switches

TIME_LIMIT_S: Final = 110.0
"""It takes half a minute; a demo that hangs is a demo that fails."""

END_TIMEOUT_S: Final = 45.0
"""How long a saga may take to end."""

LOOK_EVERY_S: Final = 0.1
"""How often the breaker is looked at."""

CROWD: Final = 200
"""Sagas that are under way when the runtime is killed,"""

ENDED_AT_KILL: Final = 20
"""and how many of them have ended by then: a tenth, so that it is in the middle."""

LOG_LINES: Final = 8
"""Of each log, when something failed."""

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130

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


def main() -> int:
    """Play the demo; gives the exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument(
        "--keep", action="store_true", help="stay up afterwards, until Ctrl-C (make: ARGS=--keep)"
    )
    parser.add_argument("--seed", type=int, help="repeats the orders and the faults of a run")
    parser.add_argument(
        "--otlp",
        type=_collector,
        metavar="HOST:PORT",
        help="send every saga's trace to a collector by OTLP over gRPC, such as Jaeger's port 4317;"
        " or its URL",
    )
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    folder = Path(tempfile.mkdtemp(prefix="amends-demo-"))
    demo = Demo(folder, seed=seed, keep=given.keep, otlp=given.otlp)
    try:
        asyncio.run(demo.play())
    except (KeyboardInterrupt, asyncio.CancelledError):
        if demo.is_over:
            demo.say(f"stopped; the files stay in {folder}", "bold")
            return EXIT_DONE
        if not demo.in_time():
            demo.report_failure(f"it took more than {TIME_LIMIT_S:g} seconds")
            return EXIT_FAILED
        shutil.rmtree(folder)
        demo.say("interrupted; nothing is left running", "bold")
        return EXIT_INTERRUPTED
    except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001  # whatever it was, say it
        demo.report_failure(_describe(error))
        return EXIT_FAILED
    shutil.rmtree(folder)
    return EXIT_DONE


def _collector(text: str) -> str:
    """Check where a collector is; argparse says what is wrong with it, before anything starts.

    Gives its URL.
    """
    try:
        check_collector(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    url = text if "://" in text else f"http://{text}"
    if urlsplit(url).path.strip("/"):
        raise argparse.ArgumentTypeError(
            "takes no path: the demo sends by gRPC, which knows none, mostly to port 4317"
        )
    return url.rstrip("/")


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


def _describe(error: BaseException) -> str:
    """Say what went wrong; of several things that did, the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, DemoFailed | ProcessFailed):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


class Demo:
    """The stage: the folder, the processes, the client, and what is said to the audience."""

    def __init__(self, folder: Path, *, seed: int, keep: bool, otlp: str | None) -> None:
        self.is_over = False
        """All scenes were played and all of it held."""
        self._folder = folder
        self._databases = databases_in(folder)
        self._seed = seed
        self._keep = keep
        self._otlp = otlp
        self._console = Console(highlight=False, soft_wrap=True)
        self._began_at_s = time.monotonic()
        self._processes = Processes(folder, environment=_tracing_environment(otlp))
        self._journal = Journal(folder / JOURNAL_NAME)
        self._casualties: list[Process] = []
        self._client: amends.Client
        self._runtime: Process

    # -- the play ----------------------------------------------------------------------------------

    async def play(self) -> None:
        """Play all scenes. Raises `DemoFailed` and what clients and processes raise."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        limit = loop.call_later(TIME_LIMIT_S, task.cancel)
        self.say(f"Everything is in {self._folder}; ARGS=--seed={self._seed} repeats it.")
        if self._otlp is not None:
            self.say(f"Every saga's trace is sent to {self._otlp}; find it by its trace id.")
        with self._journal:
            async with self._processes, self._casualties_noted(), self._stage():
                await self._scene_an_order_completes()
                await self._scene_a_card_is_declined()
                await self._scene_a_reply_is_lost()
                await self._scene_shipping_is_down()
                await self._scene_the_runtime_is_killed()
                self._audit()
                await self._tell_if_nobody_collects()
                self.is_over = True
                self.headline(f"All of it held, in {self._elapsed_s():.0f} seconds")
                limit.cancel()
                if self._keep:
                    self._show_what_to_try()
                    await asyncio.Event().wait()  # until Ctrl-C

    @contextlib.asynccontextmanager
    async def _casualties_noted(self) -> AsyncIterator[None]:
        """Note which processes had ended before everything was stopped."""
        try:
            yield
        except BaseException:
            self._casualties = [each for each in self._processes.all if not each.is_running]
            raise

    @contextlib.asynccontextmanager
    async def _stage(self) -> AsyncIterator[None]:
        self.headline("Four services and a runtime start, each a process with its own database")
        services = await self._processes.start_services()
        self._runtime = await self._processes.start_runtime(
            {service.name: service.address for service in services},
            settings=BREAKER,
            arguments=() if self._otlp is None else (f"--otlp={self._otlp}",),
        )
        for process in (*services, self._runtime):
            self.tell(f"{process.name:<10} {process.address:<16} pid {process.pid}")
        async with amends.Client(self._runtime.address) as self._client:
            registered = await self._client.register(order)
            self.tell(
                f"definition {registered.name}, version {registered.version},"
                f" {registered.content_hash[:12]}: place, then charge and reserve, then ship,"
                " then confirm"
            )
            yield

    async def _scene_an_order_completes(self) -> None:
        self.headline("1. An order completes")
        saga = await self._buy("an-order", quantity=2)
        await self._tell_history(saga.saga_id)
        self._expect_end(saga, "COMPLETED")
        self._expect_effects(saga, "place", "charge", "reserve", "ship", "confirm")
        label = saga.step("confirm").result
        assert label is not None
        self.tell(f"the customer is told: {label.json()['tracking_code']} is on its way", "green")

    async def _scene_a_card_is_declined(self) -> None:
        self.headline("2. A card is declined, and everything is made right")
        saga = await self._buy("a-declined-card", card=DECLINED_CARD)
        await self._tell_history(saga.saga_id)
        self._expect_end(saga, "COMPENSATED")
        done = self._expect_effects(saga, "place", "cancel", may=("reserve", "release"))
        self.tell(f"the ledgers say: {', '.join(done)}; no money moved", "green")

    async def _scene_a_reply_is_lost(self) -> None:
        self.headline("3. A reply is lost after the effect, and nothing happens twice")
        self._switch({"payments": {"charge": {"lose_reply": {"next": 2}}}})
        self.tell("payments will charge, and then lose its next two replies")
        saga = await self._buy("a-lost-reply", sku="kettle")
        await self._tell_history(saga.saga_id)
        self._switch({})
        self._expect_end(saga, "COMPLETED")
        attempts = saga.step("charge").attempt
        lost = count_faults(faults_file(self._databases["payments"]))["charge lose_reply"]
        if attempts < 3 or lost != 2:
            raise DemoFailed(f"expected 3 attempts and 2 lost replies, not {attempts} and {lost}")
        self._expect_effects(saga, "place", "charge", "reserve", "ship", "confirm")
        self.tell(f"charge was asked {attempts} times, and the ledger has one charge", "green")

    async def _scene_shipping_is_down(self) -> None:
        self.headline("4. Shipping is down: the saga waits, and completes when it is back")
        self._switch({"shipping": {"down": True}})
        await self._wait_down("shipping")
        self.tell("shipping refuses connections")
        waiting = asyncio.create_task(self._buy("a-patient-order", sku="tray"))
        try:
            await self._wait_breaker("shipping", amends.BreakerState.OPEN)
            self.tell("its breaker is open: calls wait, and nothing is undone for it", "yellow")
            saga = await self._client.get("a-patient-order")
            ship = saga.step("ship")
            self.tell(
                f"the saga is {saga.state}; ship is {ship.state}, at attempt {ship.attempt}",
                "yellow",
            )
            if saga.ended:
                raise DemoFailed(f"the saga has ended {saga.state} while shipping was down")
            self._switch({})
            self.tell("shipping is switched on again")
            saga = await waiting
        finally:
            await _cancelled(waiting)
        await self._tell_history(saga.saga_id)
        self._expect_end(saga, "COMPLETED")
        self._expect_effects(saga, "place", "charge", "reserve", "ship", "confirm")
        await self._wait_breaker("shipping", amends.BreakerState.CLOSED)
        self.tell("the breaker is closed, the order shipped once", "green")

    async def _scene_the_runtime_is_killed(self) -> None:
        self.headline(f"5. {CROWD} sagas are under way, and the runtime is killed")
        chances = random.Random(self._seed)  # noqa: S311  # to be repeated, not to be secret
        orders = {f"crowd-{n:03}": _some_order(chances) for n in range(1, CROWD + 1)}
        lossy = {"slow": 0.5, "slow_s": 0.2, "lose_reply": 0.05, "fail_before": 0.05}
        self._switch(
            {
                "seed": self._seed,
                "payments": {"charge": lossy, "refund": lossy},
                "inventory": {"reserve": lossy, "release": lossy},
                "shipping": {"ship": lossy},
                "orders": {"confirm": lossy},
            }
        )
        self.tell("some cannot be paid, stocked or delivered; services are slow and lose replies")
        enough = asyncio.Event()
        ends: Counter[str] = Counter()

        async def buy(saga_id: str, wanted: Mapping[str, Any]) -> None:
            saga = await self._order(saga_id, wanted)
            ends[saga.state] += 1
            if ends.total() == ENDED_AT_KILL:
                enough.set()
            if ends.total() % 50 == 0:
                self.tell(f"{ends.total()} have ended")

        async with asyncio.TaskGroup() as tasks:
            for saga_id, wanted in orders.items():
                tasks.create_task(buy(saga_id, wanted))
            await _within(enough.wait(), f"{ENDED_AT_KILL} sagas did not end")
            pid = self._runtime.pid
            self._runtime.kill()
            self.tell(f"kill -9 {pid}, when {ends.total()} of {CROWD} had ended", "bold red")
            if ends.total() >= CROWD // 2:
                raise DemoFailed(f"{ends.total()} had ended: that was not the middle")
            await self._runtime.start()
            self.tell(
                f"started again, pid {self._runtime.pid}: the same database, the same port", "bold"
            )
        self._switch({})
        told = ", ".join(f"{count} {state}" for state, count in sorted(ends.items()))
        self.tell(f"all have ended: {told}", "green")
        lost = await self._count_lost(orders)
        if not lost:
            raise DemoFailed("no call was on the wire when the runtime was killed")
        self.tell(
            f"{lost.total()} calls were under way at the kill; each was asked again, by its key"
        )
        [(most_lost, _)] = lost.most_common(1)
        await self._tell_trace(most_lost)

    def _audit(self) -> None:
        self.headline("The ledgers are audited against what the client was told")
        report = audit(self._databases, self._folder / JOURNAL_NAME)
        for line in report.lines():
            self.tell(line)
        struck = sum(
            (count_faults(faults_file(path)) for path in self._databases.values()), Counter[str]()
        )
        self.tell("faults: " + ", ".join(f"{n} {fault}" for fault, n in sorted(struck.items())))
        if not report.is_clean:
            raise DemoFailed(f"the audit found {len(report.violations)} violations")
        if report.acknowledged != CROWD + 4 or report.completed + report.compensated != CROWD + 4:
            raise DemoFailed(f"{report.acknowledged} sagas were acknowledged, not {CROWD + 4}")
        self.tell("every effect is there once, what was undone nets to zero,", "green")
        self.tell("and money and stock add up to the cent and to the piece", "green")

    # -- actions -----------------------------------------------------------------------------------

    async def _buy(self, saga_id: str, **changes: object) -> amends.Saga:
        wanted = _an_order() | changes
        self.tell(
            f"order {saga_id}: {wanted['quantity']} x {wanted['sku']} for {wanted['customer']}"
        )
        return await self._order(saga_id, wanted)

    async def _order(self, saga_id: str, wanted: Mapping[str, Any]) -> amends.Saga:
        """Start a saga and wait for its end, through whatever happens to the runtime."""
        self._journal.starting(saga_id, wanted)
        started = await self._client.start(
            "order", wanted, saga_id=saga_id, timeout_s=END_TIMEOUT_S
        )
        self._journal.acknowledged(saga_id)
        saga = await started.result(timeout_s=END_TIMEOUT_S)
        self._journal.ended(saga_id, saga.state)
        return saga

    def _switch(self, switches: Mapping[str, Any]) -> None:
        write_switches(self._processes.switches, switches)

    async def _wait_down(self, service: str) -> None:
        """Wait until nobody listens any more on a service's port."""
        address = next(each.address for each in self._processes.all if each.name == service)
        host, _, port = address.rpartition(":")

        async def refused() -> None:
            while True:
                try:
                    _, writer = await asyncio.open_connection(host, int(port))
                except ConnectionRefusedError:
                    return
                writer.close()
                await asyncio.sleep(LOOK_EVERY_S)

        await _within(refused(), f"{service} still listens on {address}")

    async def _wait_breaker(self, participant: str, state: amends.BreakerState) -> None:
        async def reached() -> None:
            while True:
                breakers = {each.participant: each for each in await self._client.breakers()}
                if breakers[participant].state is state:
                    return
                await asyncio.sleep(LOOK_EVERY_S)

        await _within(reached(), f"the breaker of {participant} is not {state}")

    async def _count_lost(self, saga_ids: Mapping[str, object]) -> Counter[str]:
        """Count the attempts that were on the wire when the runtime died, by their saga."""
        lost: Counter[str] = Counter()
        for saga_id in saga_ids:
            async for record in self._client.history(saga_id):
                if record.kind is amends.RecordKind.ATTEMPT_LOST:
                    lost[saga_id] += 1
        return lost

    # -- expectations ------------------------------------------------------------------------------

    def _expect_end(self, saga: amends.Saga, state: str) -> None:
        if saga.state != state:
            raise DemoFailed(f"saga {saga.saga_id} ended {saga.state}, not {state}")

    def _expect_effects(
        self, saga: amends.Saga, *must: str, may: tuple[str, ...] = ()
    ) -> list[str]:
        """Compare the ledgers with what should be there once; `may` is there as a whole or not."""
        found = [each.effect for each in effects_of(self._databases, saga.saga_id)]
        if sorted(found) not in (sorted(must), sorted((*must, *may))):
            raise DemoFailed(
                f"the ledgers have, of {saga.saga_id}: {', '.join(found) or 'nothing'}"
            )
        return found

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
        self._console.print(Text.assemble((f"{self._elapsed_s():7.2f} s  ", "dim"), (line, style)))

    async def _tell_history(self, saga_id: str) -> None:
        async for record in self._client.history(saga_id):
            line, style = _in_words(record)
            if line:
                self.tell(f"  {line}", style)
        await self._tell_trace(saga_id)

    async def _tell_trace(self, saga_id: str) -> None:
        """Say by which id a tracing system finds a saga, if traces are sent anywhere."""
        if self._otlp is not None:
            trace = await self._client.trace(saga_id)
            self.tell(f"trace of {saga_id}: {trace.trace_id}", "cyan")

    async def _tell_if_nobody_collects(self) -> None:
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

    def _show_what_to_try(self) -> None:
        amends_command = shlex.join([sys.executable, "-m", "amends_runtime"])
        target = f"--target {self._runtime.address}"
        a_payload = (
            '{"customer":"customer-01","card":"4242","sku":"cup","quantity":3,"address":"here"}'
        )
        self.say("It stays up until Ctrl-C. In another terminal:", "bold")
        commands = [
            f"{amends_command} list {target}",
            f"{amends_command} history a-declined-card {target}",
            f"{amends_command} participants {target}",
            f"{amends_command} start order --input {shlex.quote(a_payload)} --wait {target}",
        ]
        if self._otlp is not None:
            commands.append(f"{amends_command} trace export crowd-001 --to {self._otlp} {target}")
        for command in commands:
            self.say(f"  {command}")
        self.say("Break something: the switches are read again whenever the file changes, e.g.")
        self.say(f'  echo \'{{"shipping": {{"down": true}}}}\' > {self._processes.switches}')
        self.say("Listening, with their databases and logs:", "bold")
        for process in self._processes.all:
            database = self._processes.database(process.name)
            self.say(f"  {process.name:<10} {process.address:<16} {database}  {process.log}")

    def report_failure(self, why: str) -> None:
        """Say what went wrong and where to look; the folder stays."""
        self.headline("The demo failed")
        self.say(why, "bold red")
        for process in self._casualties:
            self.say(f"{process.name} had ended, with {process.exit_code}", "bold red")
        for process in self._processes.all:
            self.say(process.last_lines(LOG_LINES), "dim")
        self.say(f"Logs and databases stay in {self._folder}.")
        self.say(f"make demo ARGS=--seed={self._seed} repeats the run.")

    def in_time(self) -> bool:
        """Whether the time limit has not been reached."""
        return self._elapsed_s() < TIME_LIMIT_S

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began_at_s


def _in_words(record: amends.Record) -> tuple[str, str]:
    """Tell a record of a history, with a style; nothing for those that a play leaves out."""
    kinds = amends.RecordKind
    match record.kind:
        case kinds.STEP_EXECUTED:
            return f"{record.step} is done{_nth(record)}", ""
        case kinds.STEP_REJECTED:
            return f"{record.step} is refused: {record.failure}", "yellow"
        case kinds.ATTEMPT_FAILED:
            status = record.timing.status if record.timing is not None else "no reply"
            return f"{record.step}: attempt {record.attempt} ends unknown ({status})", "yellow"
        case kinds.SAGA_TURNED_BACK:
            return "the saga turns back", "yellow"
        case kinds.STEP_COMPENSATED:
            return f"{record.step} is undone{_nth(record)}", ""
        case kinds.SAGA_ENDED:
            return f"{record.state}", "bold"
        case _:
            return "", ""


def _nth(record: amends.Record) -> str:
    return f", at attempt {record.attempt}" if record.attempt > 1 else ""


def _an_order() -> dict[str, Any]:
    return {
        "customer": "customer-07",
        "card": "4242",
        "sku": "teapot",
        "quantity": 1,
        "address": "1 Harbour Road",
    }


def _some_order(chances: random.Random) -> dict[str, Any]:
    """Make an order; about a third cannot be fulfilled, for one reason or another."""
    customers = [name for name in OPENING_BALANCES_CENTS if name.startswith("customer")]
    in_stock = [sku for sku, product in PRODUCTS.items() if product.opening_stock]
    wanted = _an_order() | {
        "customer": chances.choice(customers),
        "sku": chances.choice(in_stock),
        "quantity": chances.randint(1, 5),
    }
    trouble: list[dict[str, object]] = [
        {"card": DECLINED_CARD},
        {"customer": EMPTY_PURSE},
        {"sku": "samovar"},
        {"address": UNKNOWN_ADDRESS},
    ]
    return wanted | (chances.choice(trouble) if chances.random() < 1 / 3 else {})


async def _within(condition: Any, otherwise: str) -> None:  # any awaitable
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            await condition
    except TimeoutError:
        raise DemoFailed(f"{otherwise}, within {END_TIMEOUT_S:g} seconds") from None


async def _cancelled(task: asyncio.Task[Any]) -> None:
    """Leave no task behind that a failure has orphaned."""
    task.cancel()
    with contextlib.suppress(BaseException):
        await task


if __name__ == "__main__":
    sys.exit(main())
