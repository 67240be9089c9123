"""A TCP server on loopback that leaves nothing behind, at whatever moment it is closed.

asyncio's own `Server.close` forgets a connection that it has accepted and not yet handed on, and
waits for none: its socket is then closed by the garbage collector, whose warning fails whichever
test runs at that moment.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Final, Self, TypeAlias

__all__ = ["Listening", "Serve"]

Serve: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Serves one connection. Its side of the connection is closed when this returns or raises."""

TURNS: Final = 3
"""Of the event loop, from accepting a connection to the first step of the task that serves it."""


class Listening:
    """Serves each connection in a task of its own; leaving the block cancels and awaits them.

    What `serve` raises is raised when the block is left, but for an `OSError`, which is how the
    end of a connection looks.
    """

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: list[BaseException] = []
        self.port = 0
        """Where it listens, on 127.0.0.1."""

    @property
    def address(self) -> str:
        """Give host:port."""
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        # Bound here: where no socket is left, asyncio's own binding says nothing and has none.
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self._server = await asyncio.start_server(self._accepted, sock=listening)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._server is not None
        for listening in self._server.sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())
        for _ in range(TURNS):  # what is accepted comes as far as its task
            await asyncio.sleep(0)
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # in which their sockets are closed
        if error is None and self._failed:
            raise self._failed[0]

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # No coroutine: asyncio would begin it a turn later, and know nothing of its end.
        task = asyncio.create_task(self._served(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, writer))

    async def _served(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve(reader, writer)
        except OSError:
            pass  # whoever was connected has broken off
        except Exception as error:  # noqa: BLE001  # raised at the end
            self._failed.append(error)

    def _ended(self, writer: asyncio.StreamWriter, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            writer.transport.abort()  # what is not sent yet would keep it open
        else:
            writer.close()
