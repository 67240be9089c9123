"""`amends serve`: one runtime, from its configuration to its last commit.

1. Everything that can be wrong is looked at before anything is opened: configuration, definition
   files, the ready file's folder.
2. The ready file appears when all is up, and is gone when nothing is served any more.
3. The first SIGTERM or SIGINT asks the engine to stop, and the exit code is 0. The second ends the
   process at once with 1; that is safe, because what was acknowledged is on the disk.
"""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.cli.lifetime import ReadyFile, Signals
from amends_runtime.cli.options import Debug, Flag, parse_pairs
from amends_runtime.errors import InvalidRequest

if TYPE_CHECKING:
    from amends_runtime.config import Config
    from amends_runtime.core.definition import Definition

__all__ = ["serve"]


def serve(
    *,
    config: Annotated[
        Path | None, Parameter(name=("--config", "-c"), env_var="AMENDS_CONFIG")
    ] = None,
    listen: str | None = None,
    insecure: Flag = False,
    tls_cert: str | None = None,
    tls_key: str | None = None,
    tls_client_ca: str | None = None,
    database: str | None = None,
    restored: Flag = False,
    participant: Annotated[tuple[str, ...], Parameter(show_default=False, negative="")] = (),
    definition: Annotated[tuple[str, ...], Parameter(show_default=False, negative="")] = (),
    ready_file: Path | None = None,
    until_stdin_closes: Flag = False,
    otlp: str | None = None,
    metrics_listen: str | None = None,
    log_format: Literal["auto", "console", "json"] | None = None,
    log_level: Literal["debug", "info", "warning", "error"] | None = None,
    debug: Debug = False,
) -> int:
    """Run a runtime until SIGTERM or Ctrl-C.

    Flags go over AMENDS_* variables, these over the configuration file, and
    that over the defaults.

    Ctrl-C or SIGTERM once: no new starts, what is decided is committed, exit
    code 0; sagas go on when the runtime is started again. A second time: the
    process ends at once, exit code 1.

    For example:

      amends serve --config amends.toml
      amends serve --participant payments=127.0.0.1:7001 --definition order.toml
      AMENDS_LOG_LEVEL=debug amends serve --config amends.toml

    Parameters
    ----------
    config:
        Configuration file, TOML; docs/configuration.md lists its keys.
    listen:
        Address for clients: host:port (port 0: any free one) or unix:path. Default 127.0.0.1:7233.
    insecure:
        Take a --listen that other machines reach, although clients need no certificate.
    tls_cert:
        The server's certificate, PEM: clients are served with TLS only; with --tls-key.
    tls_key:
        Its private key, PEM, not encrypted.
    tls_client_ca:
        Authorities, PEM: every client must show a certificate that one of them has signed.
    database:
        The SQLite file; made if it is missing. Default amends.db.
    restored:
        The database came from a backup together with its .lock file, as with a whole folder, volume
        or machine, so that nothing else can tell. Say it at the first start, and only then.
    participant:
        NAME=ADDRESS of a participant, such as payments=127.0.0.1:7001; may be repeated.
    definition:
        Definition file (YAML, TOML or JSON) or pattern to register at start; may be repeated.
    ready_file:
        Written when all is up, with {"pid", "address"} as JSON, and "metrics" if there is an
        endpoint for Prometheus; removed at the end.
    until_stdin_closes:
        Also stop when standard input ends: for scripts that must leave nothing behind.
    otlp:
        Where traces go: HOST:PORT or URL of an OpenTelemetry collector, such as Jaeger's port 4317.
    metrics_listen:
        HOST:PORT of an endpoint for Prometheus, at /metrics. Default: none.
    log_format:
        auto (the default) is console on a terminal and JSON elsewhere.
    log_level:
        The least that is logged. Default info.
    """
    # Heavy, and of no use to any other command.
    from amends_runtime.cli.definition_files import (  # noqa: PLC0415
        find_definitions,
        strangers,
    )
    from amends_runtime.config import Flags, load  # noqa: PLC0415
    from amends_runtime.telemetry.logging import configure_logging  # noqa: PLC0415

    flags = Flags(
        listen=listen,
        insecure=insecure or None,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        database=database,
        participants=parse_pairs(participant, "--participant", "NAME=ADDRESS"),
        definitions=definition,
        otlp=otlp,
        metrics_listen=metrics_listen,
        log_format=log_format,
        log_level=log_level,
    )
    loaded = load(config, flags)
    definitions = find_definitions(loaded.definitions)
    doubts = strangers(loaded.definitions, loaded.participants)
    if doubts and not Path(loaded.server.database).exists():
        raise Exit(ExitCode.USAGE, *doubts)  # a new database knows no participants of its own
    ready = ReadyFile(ready_file)
    configure_logging(loaded.log_format, loaded.log_level)
    signals = Signals(until_stdin_closes=until_stdin_closes, before_force=ready.discard)
    signals.install()
    # Live sagas are many small, long-lived objects that form no cycles; walking them at Python's
    # default pace took a tenth of the runtime's CPU under load (scripts/bench.py, 1,420 to 1,230 µs
    # a saga).
    gc.set_threshold(*GC_THRESHOLDS)
    with ready.absent():
        try:
            asyncio.run(_serve(loaded, definitions, ready, signals, restored=restored))
        except InvalidRequest as refused:
            raise Exit(ExitCode.USAGE, *(doubts or str(refused).splitlines())) from refused
    return ExitCode.OK


async def _serve(
    config: Config,
    definitions: list[Definition],
    ready: ReadyFile,
    signals: Signals,
    *,
    restored: bool,
) -> None:
    import structlog  # noqa: PLC0415  # as above

    from amends_runtime.engine import run_engine  # noqa: PLC0415  # as above

    log = structlog.get_logger(__name__)
    async with run_engine(config, definitions=definitions, restored=restored) as engine:

        def stop() -> None:
            ready.discard()
            log.info("stopping: nothing new is taken, what is decided is committed")
            engine.request_stop()

        ready.write(engine.address, engine.metrics_address)
        log.info(
            "amends is up",
            address=engine.address,
            security=_security(config),
            database=config.server.database,
            participants=sorted(engine.lanes.names()),
            definitions=sorted({definition.name for definition in definitions}),
            traces=engine.traces_to or "nowhere",
            traces_ratio=engine.traces_ratio,
            metrics=engine.metrics_to or "nowhere",
            pid=os.getpid(),
        )
        signals.on_first(stop)
        await engine.wait_stopped()
    log.info("amends has stopped")


def _security(config: Config) -> str:
    """How the runtime listens."""
    if config.server.tls_cert is None:
        return "plain text"
    return "TLS" if config.server.tls_client_ca is None else "mutual TLS"


GC_THRESHOLDS: Final = (100_000, 50, 100)
