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
import contextlib
import math
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final, Generic, TypeVar, cast

import anyio
import anyio.lowlevel
import grpc

from amends.errors import ApiError, Overloaded, Unavailable
from amends.status import error_from_status, unreachable
from amends.tls import ClientTls

Request = TypeVar("Request")
Response = TypeVar("Response")

FIRST_BACKOFF_S: Final = 0.05
"""Bound of the first wait: a runtime that restarts is back within a second or so."""
MAX_BACKOFF_S: Final = 1.0
"""Bound of all later waits: nobody notices more, and many clients together ask no more often."""

REACH_S: Final = 60.0
"""How long one look at the runtime may take where the caller has all the time in the world."""

MAX_HOLD_S: Final = 60.0
"""The runtime holds no reply longer than this; who waits longer asks again."""

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

    def __init__(
        self, target: str, *, tls: ClientTls | None = None, retry_unavailable: bool
    ) -> None:
        """Open the channel; nothing is connected yet. Raises `InvalidTls`."""
        self.target = target
        self._tls = tls
        self.channel = _channel(target, tls)
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
                await self.reach((until if in_doubt else unsent_until) + grace_s)
                left_s = _left_s(until)
                return await self.attempt(method, ask(left_s), left_s + grace_s)
            except ApiError as error:
                failed += 1
                in_doubt = error.in_doubt = error.in_doubt or in_doubt
                wait_s = self.backoff_s(error, failed)
                limit = until if in_doubt else unsent_until
                if wait_s is None or time.monotonic() + wait_s >= limit:
                    raise
            await anyio.sleep(wait_s)

    async def follow(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Request, Response],
        ask: Callable[[], Request],
        timeout_s: float,
    ) -> AsyncGenerator[Response, None]:
        """Read a stream that has no end of its own, and open it again whenever it breaks.

        `ask` makes the request of each opening: where to go on. Until the first response the
        runtime has `timeout_s`; after it all the time in the world. Raises `ApiError`.
        """
        until = time.monotonic() + timeout_s
        failed = 0
        while True:
            call: grpc.aio.UnaryStreamCall[Request, Response] | None = None
            try:
                await self.reach(min(until, time.monotonic() + REACH_S))
                call = method(ask())
                while (response := await self._answer(call.read())) is not grpc.aio.EOF:
                    failed, until = 0, math.inf
                    # mypy cannot tell that it is not the EOF.
                    yield _readable(cast("Response", response), self.target)
                broken: ApiError = _ended_early(self.target)
            except grpc.aio.AioRpcError as error:
                broken = error_from_status(error, self.target, self._tls)
            except ApiError as error:
                broken = error
            finally:
                if call is not None:
                    call.cancel()  # the caller may have left in the middle
            failed += 1
            wait_s = self.backoff_s(broken, failed)
            if wait_s is None or time.monotonic() + wait_s >= until:
                raise broken
            await anyio.sleep(wait_s)

    async def attempt(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout_s: float,
    ) -> Response:
        """Call once, after `reach`. Raises `ApiError`."""
        try:
            response = await self._answer(method(request, timeout=timeout_s))
        except grpc.aio.AioRpcError as error:
            raise error_from_status(error, self.target, self._tls) from None
        return _readable(response, self.target)

    def stream(
        self, method: grpc.aio.StreamStreamMultiCallable[Request, Response]
    ) -> Stream[Request, Response]:
        """Open a stream that has no end of its own, after `reach`."""
        return Stream(method(), self._answer, self._stream_error, self.target)

    def _stream_error(self, error: grpc.aio.AioRpcError | None) -> ApiError:
        if error is None:
            return _ended_early(self.target)
        return error_from_status(error, self.target, self._tls)

    def backoff_s(self, error: ApiError, failed: int) -> float | None:
        """Give the wait before asking again, or None if that does not help.

        `failed` is how many attempts running have failed, this one included.
        """
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

    @property
    def is_ready(self) -> bool:
        """Whether `reach` has nothing to do."""
        return not self.closed and (
            self.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY
        )

    async def reach(self, until: float) -> None:
        """Return when the channel is READY, or somebody answers at the target, in whatever way."""
        if self.closed:
            raise closed_error(in_doubt=False)
        if self.is_ready:
            return
        try:
            await self._answer(self._health_check(b"", timeout=_left_s(until)))
        except grpc.aio.AioRpcError as error:
            code = error.code()
            if code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
                message = unreachable(self.target, error.details() or code.name, self._tls)
                raise Unavailable(message, reason=code.name, code=code) from None
        except Unavailable as error:
            error.in_doubt = False  # only the health check was under way
            raise

    async def _answer(self, call: Awaitable[Response]) -> Response:
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
        raise closed_error(in_doubt=True)


class Stream(Generic[Request, Response]):
    """A stream in both directions: one task reads, one writes, and `cancel` ends it."""

    def __init__(
        self,
        call: grpc.aio.StreamStreamCall[Request, Response],
        answer: Callable[[Awaitable[Any]], Awaitable[Any]],
        error_for: Callable[[grpc.aio.AioRpcError | None], ApiError],
        target: str,
    ) -> None:
        self._call = call
        self._answer = answer
        self._error_for = error_for
        self._target = target
        self._is_broken = False  # seen by a write

    async def read(self) -> Response:
        """Give the next message. Raises `ApiError` when the stream is over, however it ended."""
        try:
            message: Response = await self._answer(self._call.read())
        except grpc.aio.AioRpcError as error:
            if self._is_broken and error.code() is grpc.StatusCode.INTERNAL:
                # What gRPC says where a write was the first to find the connection gone.
                raise self._error_for(None) from None
            raise self._error_for(error) from None
        if message is grpc.aio.EOF:
            raise self._error_for(None)
        return _readable(message, self._target)

    async def write(self, message: Request) -> None:
        """Send a message; on a stream that is over nothing happens, for the reader is told."""
        try:
            await self._answer(self._call.write(message))
        except _OVER:
            self._is_broken = True

    async def finish(self) -> None:
        """Say that there will be no further message."""
        with contextlib.suppress(*_OVER):
            await self._answer(self._call.done_writing())

    def cancel(self) -> None:
        """End it; both sides let go of what belongs to it."""
        self._call.cancel()


_OVER: Final = (
    ApiError,
    asyncio.InvalidStateError,
    grpc.aio.AioRpcError,
    grpc.aio.InternalError,
    grpc.aio.UsageError,
)
"""What gRPC raises of a write to a stream that is over, and what `_answer` makes of a close."""


def _channel(target: str, tls: ClientTls | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(target, options=OPTIONS)
    options: list[tuple[str, int | str]] = list(OPTIONS)
    if tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.aio.secure_channel(target, tls.credentials(), options=options)


def closed_error(*, in_doubt: bool) -> Unavailable:
    """Give the error of what was under way when the client was closed."""
    return Unavailable(
        "the client was closed while the call was under way",
        reason="CLIENT_CLOSED",
        code=grpc.StatusCode.CANCELLED,
        in_doubt=in_doubt,
    )


def _readable(response: Response | None, target: str) -> Response:
    """Refuse None, grpc.aio's word for bytes that it cannot parse. Raises `ApiError`."""
    if response is None:
        raise ApiError(
            f"the runtime at {target} answered with bytes that this client cannot read: "
            "is it another version?",
            reason="UNREADABLE_ANSWER",
            code=grpc.StatusCode.INTERNAL,
            in_doubt=True,
        )
    return response


def _ended_early(target: str) -> Unavailable:
    return Unavailable(
        f"the runtime at {target} ended a stream that has no end",
        reason="STREAM_ENDED",
        code=grpc.StatusCode.UNAVAILABLE,
    )


def _left_s(until: float) -> float:
    """Give the seconds until a monotonic instant, and a millisecond if it has passed."""
    return max(until - time.monotonic(), 0.001)
