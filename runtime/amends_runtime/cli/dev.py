"""`amends dev`: a runtime to try things out with, a participant, and a saga to look at.

1. It reads no configuration, neither a file nor AMENDS_* variables: participants that do real work
   must not be called because somebody tries something out. OpenTelemetry's variables count, as for
   every program of a machine, and where traces and metrics go is printed.
2. It uses and removes only databases that it made itself (`dev_files.py`).
3. What it prints is for a person; `--ready-file` tells a program that it is up, as for `serve`.
"""

# ruff: noqa: PLC0415  # what is heavy is imported by the command that runs, not by help

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.cli.lifetime import ReadyFile, Signals
from amends_runtime.cli.options import Common, Debug, Flag, parse_pairs

if TYPE_CHECKING:
    import amends
    from amends_runtime.cli.dev_files import DevFiles
    from amends_runtime.config import Config, Flags
    from amends_runtime.core.definition import Definition
    from amends_runtime.engine import Engine

__all__ = ["dev"]

DEFAULT_PORT: Final = 7233
DATABASE: Final = "amends-dev.db"
"""In the current folder, where it is seen, found again and easily thrown away; and not the
`amends.db` of `amends serve`, which nobody may play with."""
INPUT: Final = {"item": "tea", "cents": 1200}


def dev(
    *,
    database: str = DATABASE,
    listen: str | None = None,
    participant: Annotated[tuple[str, ...], Parameter(show_default=False, negative="")] = (),
    definition: Annotated[tuple[str, ...], Parameter(show_default=False, negative="")] = (),
    reset: Flag = False,
    otlp: str | None = None,
    metrics_listen: str | None = None,
    ready_file: Path | None = None,
    until_stdin_closes: Flag = False,
    log_level: Literal["debug", "info", "warning", "error"] = "warning",
    debug: Debug = False,
) -> int:
    """Run a runtime for trying things out, with a participant and a saga to look at.

    It prints where everything is, runs a saga before your eyes and names the
    commands to try next. A second run goes on with the same database, also after
    a kill. It reads no configuration and no AMENDS_* variables, only those of
    OpenTelemetry; for anything real there is amends serve.

    Ctrl-C or SIGTERM ends it with exit code 0, a second one at once with 1.

    For example:

      amends dev
      amends dev --participant payments=127.0.0.1:7001 --definition order.toml
      amends dev --otlp 127.0.0.1:4317
      amends dev --reset

    Parameters
    ----------
    database:
        The SQLite file; made if it is missing. One that amends dev did not make is refused.
    listen:
        Address for clients, on this machine. Default 127.0.0.1:7233, or if that is taken any other.
    participant:
        NAME=ADDRESS of a participant of yours, besides the built-in demo; may be repeated.
    definition:
        Definition file or pattern to register at start; may be repeated.
    reset:
        First remove what earlier runs left: the database, and all files beside it that are its own.
    otlp:
        Where traces go: HOST:PORT or URL of an OpenTelemetry collector, such as Jaeger's port 4317.
    metrics_listen:
        HOST:PORT of an endpoint for Prometheus, at /metrics. Default: none.
    ready_file:
        Written when all is up, with {"pid", "address"} as JSON, and "metrics" if there is an
        endpoint for Prometheus; removed at the end.
    until_stdin_closes:
        Also stop when standard input ends: for scripts that must leave nothing behind.
    log_level:
        The least that is logged.
    """
    from amends_runtime.cli.dev_files import DevFiles
    from amends_runtime.config import Flags
    from amends_runtime.telemetry.logging import configure_logging

    for name in [name for name in os.environ if name.startswith("AMENDS_")]:
        if name != "AMENDS_DEBUG":
            del os.environ[name]
    addresses = parse_pairs(participant, "--participant", "NAME=ADDRESS")
    files = DevFiles(database)
    flags = Flags(
        listen=listen or _free_address(),
        database=str(files.database),
        participants=addresses,
        definitions=definition,
        otlp=otlp,
        metrics_listen=metrics_listen,
    )
    config, definitions = _configured(flags)
    config = config.model_copy(update={"log_level": log_level})
    ready = ReadyFile(ready_file)
    if reset and files.remove():
        _say(f"removed what earlier runs left in {files.database}", "")
    configure_logging("auto", log_level)
    signals = Signals(until_stdin_closes=until_stdin_closes, before_force=ready.discard)
    signals.install()
    with ready.absent():
        asyncio.run(_dev(files, config, definitions, ready, signals))
    return ExitCode.OK


def _configured(flags: Flags) -> tuple[Config, list[Definition]]:
    """The configuration but for the demo's address, which is known once it is served."""
    from amends.server import is_loopback
    from amends_runtime.cli.definition_files import find_definitions
    from amends_runtime.cli.dev_shop import NAME
    from amends_runtime.config import load

    if NAME in flags.participants:
        raise Exit(
            ExitCode.USAGE, f"--participant {NAME}: is the built-in one; give yours another name"
        )
    config = load(None, flags)
    if not is_loopback(config.server.listen):
        raise Exit(
            ExitCode.USAGE,
            f"--listen {flags.listen}: other machines reach it, and amends dev is for this one "
            "only; use 127.0.0.1, or amends serve",
        )
    return config, find_definitions(config.definitions)


def _free_address() -> str:
    """The address that every command asks by default; any other if it is taken."""
    try:
        with socket.create_server(("127.0.0.1", DEFAULT_PORT)):
            return f"127.0.0.1:{DEFAULT_PORT}"
    except OSError:
        return "127.0.0.1:0"


async def _dev(
    files: DevFiles,
    config: Config,
    definitions: list[Definition],
    ready: ReadyFile,
    signals: Signals,
) -> None:
    import anyio

    from amends_runtime.api.server import check_listen
    from amends_runtime.cli.client import connect
    from amends_runtime.errors import ConfigurationError

    # Before any file is made: a wrong address must not leave one.
    try:
        await check_listen(config.server.listen, insecure=False)
    except ConfigurationError as error:
        # No configuration is read here, so none can be the way out.
        line = str(error).replace(" or listen under [server]", "")
        raise Exit(ExitCode.USAGE, line) from error
    files.claim()
    async with AsyncExitStack() as stack:
        demo = await stack.enter_async_context(_demo(files))
        engine = await stack.enter_async_context(_engine(config, definitions, demo.address))
        files.made(engine.store.identity.store_id)

        def stop() -> None:
            ready.discard()
            engine.request_stop()

        async with connect(Common(target=engine.address)) as client:
            await client.register(_definition())
        _print_addresses(files, config, engine, demo)
        ready.write(engine.address, engine.metrics_address)
        signals.on_first(stop)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_show, engine.address)
            await engine.wait_stopped()
            tasks.cancel_scope.cancel()
    _say("", "stopped; amends dev goes on with the same database")


def _definition() -> amends.Definition:
    from amends_runtime.cli.dev_shop import DEFINITION

    return DEFINITION


@asynccontextmanager
async def _demo(files: DevFiles) -> AsyncIterator[amends.Server]:
    """The demo participant, served in this process on a port of its own."""
    import amends
    from amends_runtime.cli.dev_shop import demo_participant

    try:
        async with amends.serve(demo_participant(files.ledger)) as server:
            yield server
    except amends.BarrierError as error:
        raise Exit(ExitCode.UNAVAILABLE, f"{error}; amends dev --reset starts afresh") from error


@asynccontextmanager
async def _engine(
    config: Config, definitions: list[Definition], demo_address: str
) -> AsyncIterator[Engine]:
    from amends_runtime.cli.dev_shop import NAME
    from amends_runtime.config import Participant
    from amends_runtime.engine import run_engine

    participants = {**config.participants, NAME: Participant(address=demo_address)}
    whole = config.model_copy(update={"participants": participants})
    async with run_engine(whole, definitions=definitions) as engine:
        yield engine


async def _show(address: str) -> None:
    """Runs a saga, shows what happens to it, and says what to try next."""
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.watching import Turns, follow

    async with connect(Common(target=address)) as client:
        saga_id = await _start(client)
        command = f"amends start hello --id {saga_id} --input '{json.dumps(INPUT)}'"
        _say("", f"$ {command}", "")
        turns = Turns(payloads=True)
        async for records, _ in follow(client, saga_id):
            turns.print(records)
    _print_next(address, saga_id)


async def _start(client: amends.Client) -> str:
    from amends.errors import AlreadyExists
    from amends.ids import new_saga_id

    # The epoch grows with every start of the runtime, so each run has a saga of its own.
    saga_id = f"hello-{(await client.runtime()).epoch}"
    try:
        await client.start(_definition().name, INPUT, saga_id=saga_id)
    except AlreadyExists:  # somebody has taken the name
        saga_id = new_saga_id()
        await client.start(_definition().name, INPUT, saga_id=saga_id)
    return saga_id


def _print_addresses(files: DevFiles, config: Config, engine: Engine, demo: amends.Server) -> None:
    from amends_runtime.cli.tables import print_facts

    _say("amends dev: a runtime for trying things out", "")
    print_facts(
        [
            ("runtime", engine.address),
            ("participant", f"demo at {demo.address}, in this process"),
            *(
                ("", f"{name} at {each.address}")
                for name, each in sorted(config.participants.items())
            ),
            ("definitions", ", ".join(each.definition.name for each in engine.definitions.all())),
            ("database", str(files.database)),
            ("demo's ledger", str(files.ledger)),
            ("traces", engine.traces_to),
            ("metrics", engine.metrics_to),
        ]
    )
    sys.stdout.flush()


def _print_next(address: str, saga_id: str) -> None:
    from amends_runtime.cli.dev_shop import LIMIT_CENTS

    dear = json.dumps({"item": "tea", "cents": LIMIT_CENTS + 1})
    _say("", "Try in another terminal:", "")
    if address != f"127.0.0.1:{DEFAULT_PORT}":
        _say(f"  export AMENDS_TARGET={address}    # {DEFAULT_PORT} is taken", "")
    _say(
        "  amends watch                                  # leave it open beside the others",
        f"  amends start hello --wait --input '{dear}'",
        "                                                # too dear: refused, so it turns back",
        "  amends start hello --id mine --input '{\"stuck\": true}'",
        "  amends get mine                               # its charge is stuck, and says why",
        '  amends retry mine --reason "the ledger is open again"',
        f"  amends history {saga_id}",
        f"  amends trace show {saga_id}",
        "  amends list",
        "",
        "Ctrl-C ends it; amends dev --reset starts afresh.",
    )


def _say(*lines: str) -> None:
    from amends_runtime.cli.tables import print_line

    for line in lines:
        print_line(line)
    sys.stdout.flush()
