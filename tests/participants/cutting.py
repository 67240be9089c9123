"""A relay between a driver and PostgreSQL that swallows one answer and cuts the connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from tests.network.listening import Listening


class Relay:
    """Passes bytes on, until a command goes by that it is told to cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._command = b""
        self.cuts = 0
        """How often it has cut a connection."""
        self.port = 0
        """Where it listens."""

    def cut(self, command: str) -> None:
        """Let the next such command reach the server, wait for its answer, and tell nobody."""
        self._command = command.encode()

    async def serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        """Relay one connection, until either side ends it."""
        server, to_server = await asyncio.open_connection("127.0.0.1", self._port)
        must_cut = False

        async def forth() -> None:
            nonlocal must_cut
            while data := await client.read(65536):
                if self._command and self._command in data:
                    self._command, must_cut = b"", True
                to_server.write(data)

        async def back() -> None:
            while data := await server.read(65536):
                if must_cut:
                    self.cuts += 1
                    return
                to_client.write(data)

        async def until_the_end(way: Callable[[], Awaitable[None]]) -> None:
            # Whichever side ends first, and however: then both have ended.
            with contextlib.suppress(ConnectionError):
                await way()
            to_client.close()
            to_server.close()

        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(until_the_end(forth))
                tasks.create_task(until_the_end(back))
        finally:
            to_server.close()


@asynccontextmanager
async def relay(port: int) -> AsyncIterator[Relay]:
    """Run a relay to a port of this machine."""
    running = Relay(port)
    async with Listening(running.serve) as server:
        running.port = server.port
        yield running
