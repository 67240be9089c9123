"""Serving a participant: the port, health, reflection, TLS, and an orderly end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, Self

import anyio
import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from amends.admission import DEFAULT_MAX_CONCURRENT
from amends.barrier.absent import NoBarrier
from amends.errors import AmendsError, InvalidParticipant, ListenError
from amends.participant import Participant
from amends.resolver import InDoubtResolver
from amends.servicer import ParticipantServicer
from amends.signals import EndSignals
from amends.v1 import participant_pb2, participant_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE: Final[str] = participant_pb2.DESCRIPTOR.services_by_name["ParticipantService"].full_name

DEFAULT_GRACE_S: Final = 30.0
"""How long handlers may still run after SIGTERM; three times the default deadline of an attempt."""

LAST_REPLIES_S: Final = 1.0
"""For replies that are on their way out, and for handlers that are being cancelled."""

MAX_PORT: Final = 65535

CLOSE_S: Final = 5.0
"""For the barrier's last commit; a `def` handler that still runs has had the grace already."""

OPTIONS: Final = [
    # On by default: a second server would bind the same port silently and swallow calls.
    ("grpc.so_reuseport", 0),
    # The client's side of this pair pings every 30 s; gRPC's default would strike it for that.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]

EXIT_USAGE: Final = 2
EXIT_UNAVAILABLE: Final = 5
EXIT_FORCED: Final = 1


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where the server's certificate is; PEM files."""

    cert: Path | str
    """The server's certificate chain."""
    key: Path | str
    """Its private key."""
    client_ca: Path | str | None = None
    """Certificates that have signed those of clients; none: clients need no certificate."""


class Server:
    """A participant that is being served, between ``async with`` and its end.

    Made by `serve`. Leaving the block drains: health says ``NOT_SERVING``, new calls are answered
    ``UNAVAILABLE``, handlers may run for `grace_s` more, then they are cancelled (and what they
    wrote in their transaction is rolled back), and the barrier is closed.
    """

    def __init__(
        self,
        participant: Participant,
        *,
        listen: str,
        tls: TlsFiles | None,
        insecure: bool,
        grace_s: float,
        max_concurrent: int,
        resolver: InDoubtResolver | None,
    ) -> None:
        self._participant = participant
        self._resolver = resolver
        self._handlers = participant.handlers()
        self._listen = listen
        _check_address(listen)
        self._grace_s = grace_s
        self._max_concurrent = max_concurrent
        if tls is None and not insecure and not is_loopback(listen):
            raise ListenError(
                f"{listen} can be reached from other machines and there is no TLS: give tls=, or "
                "say insecure=True if the network in between is trusted"
            )
        self._credentials = None if tls is None else _credentials(tls)
        self._closed = asyncio.Event()
        self._address = ""
        self._server: grpc.aio.Server | None = None
        self._servicer: ParticipantServicer | None = None
        self._health: health.aio.HealthServicer | None = None
        self._draining = asyncio.Lock()
        self.is_clean = True
        """False if a `def` handler outlived everything and had to be left behind."""

    @property
    def address(self) -> str:
        """Where it listens, with the port that was chosen: what a runtime's configuration needs."""
        return self._address

    async def __aenter__(self) -> Self:
        await self._participant.barrier.open()
        try:
            if self._resolver is not None:
                await self._resolver.__aenter__()
            try:
                await self._start()
            except BaseException:
                await self._stop_resolving()
                raise
        except BaseException:
            await self._participant.barrier.aclose()
            raise
        logger.info("participant %s listens on %s", self._participant.name, self._address)
        if isinstance(self._participant.barrier, NoBarrier):
            logger.info(
                "participant %s has no barrier: repeated calls run its handlers again",
                self._participant.name,
            )
        return self

    async def __aexit__(self, *_exception: object) -> None:
        # Shielded: a cancelled scope around the block means shutdown, which is this. It is bounded.
        with anyio.CancelScope(shield=True):
            await self.drain()

    async def wait_closed(self) -> None:
        """Wait until it has been drained."""
        await self._closed.wait()

    async def drain(self) -> None:
        """Stop taking calls, let handlers end within the grace, close the barrier; idempotent."""
        async with self._draining:
            if not self._closed.is_set():
                await self._drain()
                self._closed.set()

    async def _start(self) -> None:
        server = grpc.aio.server(options=OPTIONS)
        self._servicer = ParticipantServicer(
            self._participant.name,
            self._handlers,
            self._participant.barrier,
            aliases=self._participant.aliases,
            max_concurrent=self._max_concurrent,
        )
        participant_pb2_grpc.add_ParticipantServiceServicer_to_server(self._servicer, server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            [SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], server
        )
        self._address = _bind(server, self._listen, self._credentials)
        await server.start()
        self._server = server
        serving = health_pb2.HealthCheckResponse.SERVING
        for service in ("", SERVICE):
            await self._health.set(service, serving)

    async def _drain(self) -> None:
        assert self._server is not None
        assert self._servicer is not None
        assert self._health is not None
        admission = self._servicer.admission
        logger.info("participant %s drains: %d calls", self._participant.name, admission.inside)
        self._servicer.begin_draining()
        await self._health.enter_graceful_shutdown()
        await self._stop_resolving()
        # Not server.stop(grace): it would wait for health's watchers, too, and that is for ever.
        await self._within(self._grace_s, admission.wait_idle())
        await self._server.stop(LAST_REPLIES_S)
        # stop() returns before the handlers that it cancelled have run their `finally`.
        await self._within(LAST_REPLIES_S, admission.wait_idle())
        if not await self._within(CLOSE_S, self._participant.barrier.aclose()):
            self.is_clean = False
            logger.error(
                "participant %s: a handler does not return; its transaction is not committed",
                self._participant.name,
            )

    async def _stop_resolving(self) -> None:
        if self._resolver is not None:
            await self._resolver.__aexit__(None, None, None)

    async def _within(self, seconds: float, work: Coroutine[object, object, None]) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await work
        except TimeoutError:
            return False
        return True


def serve(
    participant: Participant,
    listen: str = "127.0.0.1:0",
    *,
    tls: TlsFiles | None = None,
    insecure: bool = False,
    grace_s: float = DEFAULT_GRACE_S,
    max_concurrent: int = DEFAULT_MAX_CONCURRENT,
    resolver: InDoubtResolver | None = None,
) -> Server:
    """Serve a participant for the length of an ``async with``; call it inside the event loop.

    ::

        async with serve(payments, listen="127.0.0.1:50061") as server:
            print(server.address)
            await server.wait_closed()

    `listen` is ``host:port`` (port 0 takes a free one), ``[v6]:port`` or ``unix:path``. Off the
    loopback it needs `tls`, or the word that plain text is meant: ``insecure=True``. With a
    `resolver` it also asks the runtime about votes that were not told for long.

    Raises `InvalidParticipant` and `ListenError`; entering raises `BarrierError` and, for what only
    binding the port can tell, `ListenError`.
    """
    return Server(
        participant,
        listen=listen,
        tls=tls,
        insecure=insecure,
        grace_s=grace_s,
        max_concurrent=max_concurrent,
        resolver=resolver,
    )


def run(
    participant: Participant,
    listen: str = "127.0.0.1:0",
    *,
    tls: TlsFiles | None = None,
    insecure: bool = False,
    grace_s: float = DEFAULT_GRACE_S,
    max_concurrent: int = DEFAULT_MAX_CONCURRENT,
    resolver: InDoubtResolver | None = None,
    on_ready: Callable[[Server], None] | None = None,
) -> None:
    """Serve a participant as this process's main work, until SIGTERM or SIGINT; then drain.

    Takes what `serve` takes, and `on_ready`, which is called once calls are taken. Returns after a
    drain in which every handler ended; a second signal, and a `def` handler that never returns, end
    the process at once with status 1. Once it has returned both signals are ignored, so that a late
    one does not spoil the status of a process that is ending. What is wrong from the start is said
    on stderr, with status 2 (participant, address) or 5 (database).
    """
    logging.basicConfig(level=logging.INFO)  # does nothing if the author has set up logging

    signals = EndSignals(_end_now)

    async def main() -> None:
        server = serve(
            participant,
            listen,
            tls=tls,
            insecure=insecure,
            grace_s=grace_s,
            max_concurrent=max_concurrent,
            resolver=resolver,
        )
        asked = asyncio.Event()
        signals.on_first(asked.set)
        async with server:
            if on_ready is not None:
                on_ready(server)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_drain_when, asked, server)
                await server.wait_closed()
                tasks.cancel_scope.cancel()
        signals.ignore()
        if not server.is_clean:
            _end_now("a handler does not return: ending without it")

    # Before the server is up: a signal that comes in between must not kill it half-way.
    signals.install()
    try:
        anyio.run(main)
    except AmendsError as error:
        signals.restore()
        sys.stderr.write(f"{participant.name}: {error}\n")
        is_usage = isinstance(error, InvalidParticipant | ListenError)
        raise SystemExit(EXIT_USAGE if is_usage else EXIT_UNAVAILABLE) from None
    except BaseException:
        signals.restore()
        raise


async def _drain_when(asked: asyncio.Event, server: Server) -> None:
    await asked.wait()
    await server.drain()


def _end_now(why: str) -> NoReturn:
    """End the process although threads run: what they have not committed is rolled back."""
    try:
        # No buffered stream: a signal may have interrupted a write to it.
        os.write(2, f"amends: {why}\n".encode())
        logging.shutdown()
        sys.stderr.flush()
    finally:
        os._exit(EXIT_FORCED)


def is_loopback(listen: str) -> bool:
    """Tell whether an address can be reached from this machine only."""
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_address(listen: str) -> None:
    """Refuse what is no address; gRPC would take port 99999 for 34463."""
    if listen.startswith("unix:"):
        return
    host, _, port = listen.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and int(port) <= MAX_PORT):
        raise ListenError(
            f"cannot listen on {listen!r}: write host:port, for example 127.0.0.1:50061, with a "
            f"port up to {MAX_PORT}, or 0 for a free one"
        )


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    key, cert = _read(tls.key), _read(tls.cert)
    client_ca = None if tls.client_ca is None else _read(tls.client_ca)
    return grpc.ssl_server_credentials(
        [(key, cert)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )


def _read(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ListenError(f"the TLS file {path} cannot be read: {error.strerror}") from error


def _bind(server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None) -> str:
    """Bind, and give the address with the port that was chosen. Raises `ListenError`."""
    try:
        if credentials is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise ListenError(_why_not(listen))
    if listen.startswith("unix:"):
        return listen
    return f"{listen.rpartition(':')[0]}:{port}"


def _why_not(listen: str) -> str:
    """Find the operating system's reason, which gRPC keeps to itself."""
    if listen.startswith("unix:"):
        return f"cannot listen on {listen}: the folder is missing, or not to be written to"
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
    except OSError as error:
        why = error.strerror or str(error)
        return f"cannot listen on {listen}: {why}; choose another address, or port 0 for a free one"
    return f"cannot listen on {listen}: gRPC refuses the address or the TLS files"
