"""The client's one channel to a runtime, and the only place where a call over it is awaited.

How to think about it:

1. A call has one time limit, which covers all of its attempts and the waits between them. Each
   attempt is bounded by gRPC's own ``timeout=`` with what is left of it: a cancel scope around a
   unary call would leak its cancellation into the caller.
2. All calls of amends are idempotent, so a call is asked again as it is: after UNAVAILABLE (or
   CANCELLED by the other side), and after RESOURCE_EXHAUSTED that says when. Never after anything
   else.
3. Nothing is sent before the channel is seen to be READY. Until then the runtime is *reached* with
   a health check, which may be lost without harm. So a call that never left is told apart from one
   that may have arrived: `ApiError.in_doubt`, which covers all attempts of the call.
4. Retries inside gRPC are off: each attempt is ours and under rule 3.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

import anyio
import anyio.lowlevel
import grpc

from amends.errors import ApiError, Overloaded, Unavailable
from amends.status import error_from_status, unreachable

Request = TypeVar("Request")
Response = TypeVar("Response")

FIRST_BACKOFF_S: Final = 0.05
"""Bound of the first wait: a runtime that restarts is back within a second or so."""
MAX_BACKOFF_S: Final = 1.0
"""Bound of all later waits: nobody notices more, and many clients together ask no more often."""

MAX_RECEIVE_BYTES: Final = 32 * 1024 * 1024
"""gRPC's default of 4 MiB would refuse a page of history with many payloads and long errors."""

OPTIONS: Final = (
    ("grpc.enable_retries", 0),
    # A connection that died silently is noticed within 40 s; the runtime permits pings like this.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own reconnects wait as long as ours; by default it would be up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", int(FIRST_BACKOFF_S * 1000)),
    ("grpc.max_reconnect_backoff_ms", int(MAX_BACKOFF_S * 1000)),
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    # A proxy that the environment names for the web would be asked for the runtime, too.
    ("grpc.enable_http_proxy", 0),
)


class Connection:
    """One channel. Must be made inside the running event loop, and closed there."""

    def __init__(self, target: str, *, retry_unavailable: bool) -> None:
        self.target = target
        self.channel = grpc.aio.insecure_channel(target, options=OPTIONS)
        self._retry_unavailable = retry_unavailable
        self._health_check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = (
            self.channel.unary_unary("/grpc.health.v1.Health/Check")
        )
        self.closed = False
        """Whether `close` was called."""

    async def close(self) -> None:
        """End what is under way with `Unavailable`, and close the channel."""
        self.closed = True
        with anyio.CancelScope(shield=True):  # or a cancelled block would leave the channel open
            await self.channel.close()

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        ask: Callable[[float], Request],
        timeout_s: float,
        *,
        unsent_s: float | None = None,
        grace_s: float = 0.0,
    ) -> Response:
        """Call until there is an answer, an error that asking again does not mend, or no time.

        `ask` makes the request of an attempt, given the seconds that are left, at least 0.001. As
        long as nothing can have been done, the time is `unsent_s` (by default `timeout_s`). An
        attempt may take `grace_s` longer than the time, in which no further one begins. Raises
        `ApiError`.
        """
        until = unsent_until = time.monotonic() + timeout_s
        if unsent_s is not None:
            unsent_until += unsent_s - timeout_s
        failed = 0
        in_doubt = False
        while True:
            try:
                await self._reach((until if in_doubt else unsent_until) + grace_s)
                return await self._attempt(method, ask, until, grace_s)
            except ApiError as error:
                failed += 1
                in_doubt = error.in_doubt = error.in_doubt or in_doubt
                wait_s = self._wait_before_next(error, failed)
                limit = until if in_doubt else unsent_until
                if wait_s is None or time.monotonic() + wait_s >= limit:
                    raise
            await anyio.sleep(wait_s)

    def _wait_before_next(self, error: ApiError, failed: int) -> float | None:
        """Give the wait before asking again, or None if that does not help."""
        if not self._retry_unavailable or self.closed:
            return None
        bound = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failed - 1, 10))
        jitter = random.uniform(0, bound)  # noqa: S311  # spreads clients, guards no secret
        match error:
            case Unavailable():
                return jitter
            case Overloaded(retry_after_s=float(retry_after_s)):
                return retry_after_s + jitter
            case _:
                return None

    async def _attempt(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        ask: Callable[[float], Request],
        until: float,
        grace_s: float,
    ) -> Response:
        left_s = _left_s(until)
        try:
            return await self._answer(method(ask(left_s), timeout=left_s + grace_s))
        except grpc.aio.AioRpcError as error:
            raise error_from_status(error, self.target) from None

    async def _reach(self, until: float) -> None:
        """Return when the channel is READY, or somebody answers at the target, in whatever way."""
        if self.closed:
            raise _closed(in_doubt=False)
        if self.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY:
            return
        try:
            await self._answer(self._health_check(b"", timeout=_left_s(until)))
        except grpc.aio.AioRpcError as error:
            code = error.code()
            if code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
                message = unreachable(self.target, error.details() or code.name)
                raise Unavailable(message, reason=code.name, code=code) from None
        except Unavailable as error:
            error.in_doubt = False  # only the health check was under way
            raise

    async def _answer(self, call: grpc.aio.UnaryUnaryCall[Request, Response]) -> Response:
        try:
            return await call
        except asyncio.CancelledError:
            # gRPC's CancelledError is not the one that an enclosing scope of anyio waits for:
            # without this the scope would not know its own cancellation and let it out.
            await anyio.lowlevel.checkpoint_if_cancelled()
            task = asyncio.current_task()
            if not self.closed or task is None or task.cancelling():
                raise
        # Nobody cancelled the caller: closing the channel ends its calls like this.
        raise _closed(in_doubt=True)


def _closed(*, in_doubt: bool) -> Unavailable:
    return Unavailable(
        "the client was closed while the call was under way",
        reason="CLIENT_CLOSED",
        code=grpc.StatusCode.CANCELLED,
        in_doubt=in_doubt,
    )


def _left_s(until: float) -> float:
    """Give the seconds until a monotonic instant, and a millisecond if it has passed."""
    return max(until - time.monotonic(), 0.001)
