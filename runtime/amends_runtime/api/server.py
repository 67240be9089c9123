"""The gRPC server: the two services, health and reflection on one port.

start         binds and serves; health says SERVING
refuse_new    the way down begins: health says NOT_SERVING, starts are refused, waits are let go
stop          no new calls; those under way get a moment; returns when the last handler has left
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
import structlog
from google.protobuf.internal import api_implementation
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from amends.v1 import operator_pb2, operator_pb2_grpc, saga_pb2, saga_pb2_grpc
from amends_runtime import wire
from amends_runtime.actors.definitions import Definitions
from amends_runtime.actors.supervisor import Supervisor
from amends_runtime.api.door import Context, Door, answering
from amends_runtime.api.operator import OperatorService, RuntimeFacts
from amends_runtime.api.service import SagaService
from amends_runtime.api.tracing import SagaTraces
from amends_runtime.clock import SystemClock
from amends_runtime.core.tracing import Tracing
from amends_runtime.dispatch.lanes import Lanes
from amends_runtime.dispatch.participants import Participants
from amends_runtime.errors import ConfigurationError
from amends_runtime.ports import Store
from amends_runtime.tls import ServerTls

__all__ = ["ApiServer", "check_listen"]

MAX_REQUEST_BYTES: Final = 16 * 1024 * 1024
"""A whole request. Beyond it gRPC refuses by itself, and names neither a limit of ours nor a way
out: so this is well above one payload (1 MiB; 3 MiB is the most that can be set), and what is too
large is told so by us. A payload of 15 MiB costs some 25 MB until it is refused, and 50 ms; the
same in millions of empty items some 500 MB, and half a second in which nothing else is answered."""

SERVER_OPTIONS: Final[list[tuple[str, int]]] = [
    ("grpc.so_reuseport", 0),  # else a second runtime binds the same port and swallows calls
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    # Together with the clients' 30 s: a stricter server answers their pings with too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]

SERVICES: Final = (
    saga_pb2.DESCRIPTOR.services_by_name["SagaService"].full_name,
    operator_pb2.DESCRIPTOR.services_by_name["OperatorService"].full_name,
)
_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING

_log = structlog.get_logger(__name__)


class ApiServer:
    """Serves one runtime at `listen`, host:port or unix:path. Made inside the running loop.

    With `tls` every connection is encrypted, and where it has a client CA every client has proved
    who it is before any service hears of it, health and reflection included. Otherwise whoever
    reaches the port can start and cancel sagas, so that only loopback addresses and unix sockets
    are served; `insecure` says that the network around lets nobody else in. `tracing`
    names the traces that clients ask for, `sender` are the resource attributes in them.
    """

    def __init__(
        self,
        listen: str,
        store: Store,
        supervisor: Supervisor,
        definitions: Definitions,
        lanes: Lanes,
        *,
        participants: Participants,
        max_payload_bytes: int = wire.MAX_PAYLOAD_BYTES,
        insecure: bool = False,
        tls: ServerTls | None = None,
        tracing: Tracing | None = None,
        sender: Mapping[str, str] | None = None,
    ) -> None:
        clock = SystemClock()
        self._listen = listen
        self._insecure = insecure
        self._tls = tls
        self._door = Door()
        self._health = _Health(self._door)
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        facts = RuntimeFacts(metadata.version("amends"), store.identity, clock.now_ms())
        saga_pb2_grpc.add_SagaServiceServicer_to_server(
            SagaService(
                supervisor=supervisor,
                definitions=definitions,
                insights=store,
                clock=clock,
                door=self._door,
                identity=store.identity,
                traces=SagaTraces(tracing or Tracing(store.identity.store_id), sender or {}),
                max_payload_bytes=max_payload_bytes,
            ),
            self._server,
        )
        operator_pb2_grpc.add_OperatorServiceServicer_to_server(
            OperatorService(
                supervisor=supervisor,
                definitions=definitions,
                lanes=lanes,
                participants=participants,
                store=store,
                clock=clock,
                facts=facts,
                door=self._door,
            ),
            self._server,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self) -> str:
        """Binds and serves; the answer is the address, with the port that was taken.

        Raises ConfigurationError if the address cannot be had, or should not.
        """
        _check_protobuf()
        is_open = await check_listen(self._listen, insecure=self._insecure, tls=self._tls)
        port = self._bind()
        for service in ("", *SERVICES):
            await self._health.set(service, _NOT_SERVING)
        await self._server.start()
        for service in ("", *SERVICES):
            await self._health.set(service, _SERVING)
        if is_open:
            _log.warning(
                "other machines reach this address, and no client has to prove who it is: whoever"
                " does can start, cancel and operate sagas; see tls_client_ca",
                listen=self._listen,
                encrypted=self._tls is not None,
            )
        if self._listen.startswith("unix:"):
            return self._listen
        host, _, _ = self._listen.rpartition(":")
        return f"{host}:{port}"

    def _bind(self) -> int:
        try:
            if self._tls is None:
                return self._server.add_insecure_port(self._listen)
            return self._server.add_secure_port(self._listen, _credentials(self._tls))
        except RuntimeError as error:  # lost the race for the port since it was checked
            why = "it cannot be bound"
            if self._tls is not None:  # all that we know to look at was looked at
                why += ", or gRPC does not take tls_cert, tls_key or tls_client_ca"
            raise _cannot_listen(self._listen, why) from error

    async def refuse_new(self) -> None:
        """Health to NOT_SERVING, starts refused with SHUTTING_DOWN, held replies sent."""
        await self._health.enter_graceful_shutdown()
        self._door.close()

    async def stop(self, grace_s: float) -> None:
        """Ends the server. Calls under way have `grace_s` to end; then they are cancelled.

        Returns when every handler has left, which gRPC alone does not wait for.
        """
        await self.refuse_new()
        await self._server.stop(grace_s)
        await self._door.wait_empty()


def _credentials(tls: ServerTls) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(tls.key, tls.cert)],
        root_certificates=tls.client_ca,
        require_client_auth=tls.client_ca is not None,
    )


class _Health(health.aio.HealthServicer):
    """The library's, with an end for watchers: each would hold up the stop for all of its grace."""

    def __init__(self, door: Door) -> None:
        super().__init__()
        self.door = door

    @answering
    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        with self.door.holding():
            await super().Watch(request, context)


# -- addresses -------------------------------------------------------------------------------------


async def check_listen(listen: str, *, insecure: bool, tls: ServerTls | None = None) -> bool:
    """Finds what is wrong with an address before gRPC does, which says it less clearly.

    Nothing is opened for longer than the look takes, so it can be asked before anything else is
    done. The answer: whether other machines reach it without having to prove who they are, which
    encryption alone does not change. Raises ConfigurationError with the reason and what to do
    instead, also if they do and `insecure` does not say that this is meant.

    gRPC is also content when one of a name's addresses can be bound; a client that takes another
    one would reach whoever holds that.
    """
    if listen.startswith("unix:"):
        _check_unix(listen)
        return False
    host, _, port = listen.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise _cannot_listen(listen, f"{host!r} is not known ({error.strerror})") from None
    is_open = False
    for family, _, _, _, address in found:
        host_ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if not host_ip.is_loopback and (tls is None or tls.client_ca is None):
            is_open = True
            if not insecure:
                raise ConfigurationError(_too_open(listen, tls))
        _try_to_bind(listen, family, address)
    return is_open


def _too_open(listen: str, tls: ServerTls | None) -> str:
    if tls is None:
        why = "there is neither encryption nor authentication: give tls_cert, tls_key and"
    else:
        why = "TLS without a client CA encrypts, but lets everybody in: give"
    return (
        f"cannot listen on {listen}: it can be reached from other machines, and {why} tls_client_ca"
        " under [server], or listen on 127.0.0.1 or a unix socket, or say --insecure (insecure ="
        " true) if the network, or a proxy, lets only those in who may start and cancel sagas"
    )


def _try_to_bind(
    listen: str,
    family: int,
    address: tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes],
) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As gRPC does it: connections of a runtime that ended a moment ago are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise _cannot_listen(listen, _BIND_ERRORS.get(error.errno or 0, str(error))) from None


_BIND_ERRORS: Final = {
    errno.EADDRINUSE: "another process listens there",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EACCES: "ports below 1024 need a privilege",
}


def _check_unix(listen: str) -> None:
    path = Path(listen.removeprefix("unix:"))
    folder = path.parent
    mend = "choose another path with --listen or listen under [server]"
    if not folder.is_dir():
        raise _cannot_listen(listen, f"there is no folder {folder}", f"make it first, or {mend}")
    if path.exists() and not path.is_socket():
        raise _cannot_listen(listen, "there is something that is not a socket", mend)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if not path.exists():
            try:
                probe.bind(str(path))
                path.unlink()
            except OSError as error:
                why = error.strerror or str(error)
                raise _cannot_listen(listen, f"no socket can be made there ({why})", mend) from None
            return
        try:
            probe.connect(str(path))
        except OSError:
            return  # nobody is there; gRPC takes the place of a socket that was left behind
    raise _cannot_listen(listen, "another process listens there", mend)


_OTHER_ADDRESS: Final = (
    "choose another address with --listen or listen under [server], port 0 for any free one"
)


def _cannot_listen(listen: str, why: str, mend: str = _OTHER_ADDRESS) -> ConfigurationError:
    return ConfigurationError(f"cannot listen on {listen}: {why}; {mend}")


def _check_protobuf() -> None:
    kind = api_implementation.Type()
    if kind != "upb":
        raise ConfigurationError(
            f"protobuf runs on its {kind} implementation, which is many times slower and has limits"
            " of its own: unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION, install protobuf as a wheel"
        )
