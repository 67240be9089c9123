"""The demo: orders and money go through real services, and all of them are killed in the middle.

Starts the shop's services, the bank's branches with a PostgreSQL, and a runtime as processes in a
fresh folder, plays eleven scenes, and audits the ledgers. Exits with 0 only if everything held, and
with 1, after saying where the logs are, if anything did not. No process outlives it.
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
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

import amends
from amends_runtime.core.addresses import check_collector
from scripts.demo_bank import BankScenes
from scripts.demo_shop import ShopScenes
from scripts.demo_stage import DemoFailed, Stage
from shop.postgres import PostgresFailed, find_programs
from shop.processes import ProcessFailed

TIME_LIMIT_S: Final = 110.0
"""It takes half a minute; a demo that hangs is a demo that fails."""

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130


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
    try:
        find_programs()
    except PostgresFailed as error:
        print(f"The demo failed: {error}")
        return EXIT_FAILED
    folder = Path(tempfile.mkdtemp(prefix="amends-demo-"))
    demo = Demo(folder, seed=seed, keep=given.keep, otlp=given.otlp)
    try:
        asyncio.run(demo.play())
    except (KeyboardInterrupt, asyncio.CancelledError):
        if demo.is_over:
            demo.stage.say(f"stopped; the files stay in {folder}", "bold")
            return EXIT_DONE
        if not demo.in_time():
            demo.stage.report_failure(f"it took more than {TIME_LIMIT_S:g} seconds")
            return EXIT_FAILED
        shutil.rmtree(folder)
        demo.stage.say("interrupted; nothing is left running", "bold")
        return EXIT_INTERRUPTED
    except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001  # whatever it was, say it
        demo.stage.report_failure(_describe(error))
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


def _describe(error: BaseException) -> str:
    """Say what went wrong; of several things that did, the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, DemoFailed | ProcessFailed | PostgresFailed):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


class Demo:
    """The play."""

    def __init__(self, folder: Path, *, seed: int, keep: bool, otlp: str | None) -> None:
        self.is_over = False
        """All scenes were played and all of it held."""
        self.stage = Stage(folder, seed=seed, otlp=otlp)
        self._keep = keep
        self._otlp = otlp

    async def play(self) -> None:
        """Play all scenes. Raises `DemoFailed` and what clients and processes raise."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        limit = loop.call_later(TIME_LIMIT_S, task.cancel)
        stage = self.stage
        stage.say(f"Everything is in {stage.folder}; ARGS=--seed={stage.seed} repeats it.")
        if self._otlp is not None:
            stage.say(f"Every saga's trace is sent to {self._otlp}; find it by its trace id.")
        async with stage.processes, self._casualties_noted():
            stage.headline(
                "Four services, a bank's three branches, a PostgreSQL and a runtime start: each "
                "a process"
            )
            await stage.open()
            async with amends.Client(stage.runtime.address) as stage.client:
                await ShopScenes(stage).play()
                await BankScenes(stage).play()
                await stage.tell_if_nobody_collects()
                self.is_over = True
                stage.headline(f"All of it held, in {stage.elapsed_s():.0f} seconds")
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
            processes = self.stage.processes.all
            self.stage.casualties = [each for each in processes if not each.is_running]
            raise

    def _show_what_to_try(self) -> None:
        amends_command = shlex.join([sys.executable, "-m", "amends_runtime"])
        target = f"--target {self.stage.runtime.address}"
        a_payload = (
            '{"customer":"customer-01","card":"4242","sku":"cup","quantity":3,"address":"here"}'
        )
        self.stage.say("It stays up until Ctrl-C. In another terminal:", "bold")
        a_transfer = '{"from":"east-01","to":"west-01","cents":500}'
        commands = [
            f"{amends_command} list {target}",
            f"{amends_command} history a-declined-card {target}",
            f"{amends_command} history killed-before-the-decision {target}",
            f"{amends_command} participants {target}",
            f"{amends_command} start order --input {shlex.quote(a_payload)} --wait {target}",
            (
                f"{amends_command} start transfer_east_west --input {shlex.quote(a_transfer)}"
                f" --wait {target}"
            ),
        ]
        if self._otlp is not None:
            commands.append(f"{amends_command} trace export crowd-001 --to {self._otlp} {target}")
        for command in commands:
            self.stage.say(f"  {command}")
        self.stage.say(
            "Break something: the switches are read again whenever the file changes, e.g."
        )
        self.stage.say(
            f'  echo \'{{"shipping": {{"down": true}}}}\' > {self.stage.processes.switches}'
        )
        self.stage.say("Listening, with their databases and logs:", "bold")
        for process in self.stage.processes.all:
            database = self.stage.processes.database(process.name)
            self.stage.say(f"  {process.name:<10} {process.address:<16} {database}  {process.log}")

    def in_time(self) -> bool:
        """Whether the time limit has not been reached."""
        return self.stage.elapsed_s() < TIME_LIMIT_S


if __name__ == "__main__":
    sys.exit(main())
