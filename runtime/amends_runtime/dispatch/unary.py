"""The unary transport: one gRPC call per attempt. Every participant has it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog

from amends.v1 import participant_pb2, participant_pb2_grpc
from amends_runtime import wire
from amends_runtime.core.messages import Unknown
from amends_runtime.core.records import Verb
from amends_runtime.dispatch.handshakes import explain_handshake
from amends_runtime.dispatch.status import reply_of
from amends_runtime.ports import Call, Clock, Reply, StoreIdentity
from amends_runtime.tls import ParticipantTls

__all__ = ["CHANNEL_OPTIONS", "UnaryTransport", "failed_inside"]

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.enable_retries", 0),  # every attempt is ours, numbered and recorded
    ("grpc.enable_http_proxy", 0),  # a proxy of the environment is not on the way to a participant
    ("grpc.max_send_message_length", 4 * 1024 * 1024),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    # A participant that is back must be reachable when the breaker probes it; gRPC's own default
    # would keep the channel shut for up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Together with the server's settings in the SDK; a stricter server answers too_many_pings.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]

_UNREADABLE = Reply(
    Unknown(
        "UNREADABLE_REPLY",
        "the participant answered OK with bytes that are no reply of the contract:"
        " is it another service that listens at its address?",
        misconfigured=True,
    ),
    "OK",
    None,
)

_log = structlog.get_logger(__name__)


class UnaryTransport:
    """Calls one participant by Prepare, Execute and Compensate. Made inside the running loop.

    With `tls` nothing ever leaves in plain text; without, everything does.
    """

    name = "unary"

    def __init__(
        self,
        address: str,
        identity: StoreIdentity,
        clock: Clock,
        *,
        max_result_bytes: int,
        oldest_open_ms: Callable[[], int],
        tls: ParticipantTls | None = None,
    ) -> None:
        self._identity = identity
        self._max_result_bytes = max_result_bytes
        self._oldest_open_ms = oldest_open_ms
        self._clock = clock
        self._tls = tls
        self.channel = _channel(address, tls)
        stub = participant_pb2_grpc.ParticipantServiceStub(self.channel)
        self._verbs: dict[Verb, tuple[Callable[..., Awaitable[Any]], Callable[..., Any]]] = {
            Verb.PREPARE: (stub.Prepare, participant_pb2.PrepareRequest),
            Verb.EXECUTE: (stub.Execute, participant_pb2.ExecuteRequest),
            Verb.COMPENSATE: (stub.Compensate, participant_pb2.CompensateRequest),
        }

    async def call(self, call: Call) -> Reply:
        """Sends one attempt.

        The deadline is gRPC's own, so nothing is cancelled here but at shutdown.
        """
        method, request_of = self._verbs[call.verb]
        try:
            request = request_of()
            wire.put_call(
                request.call,  # in its place: a message that is handed over is copied
                call,
                self._identity,
                self._clock.now_ms() + call.timeout_ms,
                self._oldest_open_ms(),
            )
            response = await method(request, timeout=call.timeout_ms / 1000)
            if response is None:  # grpc.aio's word for bytes that it cannot parse
                return _UNREADABLE
            outcome = wire.outcome_from_proto(
                response.outcome,
                call.verb,
                max_result_bytes=self._max_result_bytes,
                two_phase=call.two_phase,
            )
        except grpc.aio.AioRpcError as error:
            details = error.details() or ""
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                details = self.explain(details)
            return reply_of(error.code(), details, away=self.is_away())
        except Exception as error:  # noqa: BLE001  # whatever it was, the outcome is unknown
            return failed_inside(call, error)
        return Reply(outcome, "OK", healthy=True)

    def is_away(self) -> bool:
        """Whether there is no connection: a service that refuses every call has one."""
        return self.channel.get_state() is not grpc.ChannelConnectivity.READY

    def explain(self, details: str) -> str:
        """The details of an UNAVAILABLE, in words of whoever runs the runtime."""
        return explain_handshake(details, self._tls)

    async def close(self) -> None:
        """Closes the channel; calls under way end as cancelled."""
        await self.channel.close()


def failed_inside(call: Call, error: Exception) -> Reply:
    """Logs a fault of our own in sending a call; its outcome is unknown like any other."""
    _log.error(
        "call_failed_inside",
        saga_id=call.saga_id,
        trace_id=call.traceparent[3:35],  # version, trace, span, flags
        step=call.step_name,
        verb=call.verb.name,
        attempt=call.attempt,
        exc_info=error,
    )
    return Reply(Unknown("INTERNAL", type(error).__name__), "INTERNAL", None)


def _channel(address: str, tls: ParticipantTls | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    options: list[tuple[str, int | str]] = [*CHANNEL_OPTIONS]
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)
    return grpc.aio.secure_channel(address, credentials, options=options)
