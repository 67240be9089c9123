"""The door: who is inside, how they leave, and what they are told when something goes wrong.

Every handler goes in by `answering`. It is counted until it has left, its errors leave by the one
table in `status`, and nothing else is caught: a cancellation is the client's leaving or the end of
the server, and an abort is gRPC's own way out.

While the server stops the door is *closing*: whoever only waits is let go, and starts are refused.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar

import anyio
import grpc.aio
import structlog
from google.rpc import status_pb2
from grpc_status import rpc_status

from amends.v1 import types_pb2
from amends_runtime.api.status import (
    NotAvailable,
    ShuttingDown,
    error_to_proto,
    internal_error,
    internal_status,
    is_ours,
    status_of,
)
from amends_runtime.api.validation import is_saga_id
from amends_runtime.errors import AmendsError, StoreError, Unavailable

__all__ = ["Context", "Door", "answering", "error_for", "not_available", "streaming"]

_log = structlog.get_logger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class Door:
    """Counts the handlers that are inside, and lets those that only wait go when it closes."""

    def __init__(self) -> None:
        self.closing = False
        self._inside = 0
        self._empty = anyio.Event()
        self._holding: set[anyio.CancelScope] = set()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Around all that a handler does."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Around a wait that may be cut short. Raises ShuttingDown when it was."""
        if self.closing:
            raise ShuttingDown
        with anyio.CancelScope() as scope:
            self._holding.add(scope)
            try:
                yield
            finally:
                self._holding.discard(scope)
        if scope.cancelled_caught:
            raise ShuttingDown

    def close(self) -> None:
        """Lets those who wait go. Whoever comes now sees `closing`."""
        self.closing = True
        for scope in self._holding:
            scope.cancel()

    async def wait_empty(self) -> None:
        """Returns when nobody is inside."""
        while self._inside:
            self._empty = anyio.Event()
            await self._empty.wait()


class _HasDoor(Protocol):
    @property
    def door(self) -> Door: ...


Servicer = TypeVar("Servicer", bound=_HasDoor)
Request = TypeVar("Request")
Response = TypeVar("Response")


def answering(
    handler: Callable[[Servicer, Request, Context], Awaitable[Response]],
) -> Callable[[Servicer, Request, Context], Coroutine[Any, Any, Response]]:
    """Makes a method that raises AmendsError into a gRPC handler of a servicer with a `door`."""

    @functools.wraps(handler)
    async def answered(self: Servicer, request: Request, context: Context) -> Response:
        with self.door.inside():
            try:
                return await handler(self, request, context)
            except Exception as error:  # noqa: BLE001  # whatever it is, the caller gets a status
                status = _status_for(
                    error,
                    handler.__name__,
                    getattr(request, "saga_id", ""),
                    closing=self.door.closing,
                )
            # gRPC keeps the abort's traceback, and with it this frame, in a cycle: whole requests
            # would stay in memory until the collector comes by.
            del request
            return await _abort(context, status)

    return answered


def streaming(
    handler: Callable[[Servicer, Request, Context], Awaitable[None]],
) -> Any:
    """`answering` for a method that writes by `context.write`, whatever it reads.

    Of type Any, for the generated types know only handlers that are generators.
    """
    return answering(handler)


def error_for(error: Exception, method: str, saga_id: str) -> types_pb2.Error:
    """What one item of a batch is answered that ended with `error`; a bug is logged."""
    if isinstance(error, AmendsError) and is_ours(error):
        return error_to_proto(error)
    return internal_error(_incident(error, method, saga_id))


def not_available(message: str) -> Any:
    """A handler for a method that the contract has and this version has not.

    Of type Any, for it stands in for methods of every signature.
    """

    @answering
    async def refused(self: _HasDoor, request: object, context: Context) -> NoReturn:
        raise NotAvailable(message)

    return refused


def _status_for(error: Exception, method: str, saga_id: str, *, closing: bool) -> status_pb2.Status:
    if closing and isinstance(error, Unavailable):
        return status_of(ShuttingDown())
    if isinstance(error, AmendsError) and is_ours(error):
        if isinstance(error, StoreError):
            _log.error("store_failed", method=method, **_about(saga_id), error=str(error))
        return status_of(error)
    return internal_status(_incident(error, method, saga_id))


def _incident(error: Exception, method: str, saga_id: str) -> str:
    """Logs a bug; the answer is the id that the log entry is found by."""
    incident = uuid.uuid4().hex
    _log.error(
        "request_failed", method=method, **_about(saga_id), incident=incident, exc_info=error
    )
    return incident


def _about(saga_id: str) -> dict[str, str]:
    """The saga that a request names, for the log. What cannot be an id is not repeated there."""
    return {"saga_id": saga_id} if saga_id and is_saga_id(saga_id) else {}


async def _abort(context: Context, status: status_pb2.Status) -> NoReturn:
    wanted = rpc_status.to_status(status)
    await context.abort(wanted.code, wanted.details, wanted.trailing_metadata)
