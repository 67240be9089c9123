"""A way to a PostgreSQL server that is cut at a COMMIT, before or after it arrived."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import re
from types import TracebackType
from typing import Final, Self

from tests.network.listening import Listening

COMMIT: Final = re.compile(rb"COMMIT[;\0]")
"""The whole statement, as each driver sends it: READ COMMITTED is another one's."""


class Cut(enum.Enum):
    """Where the connection ends."""

    BEFORE_COMMIT = "the COMMIT does not arrive"
    AFTER_COMMIT = "the server commits, and its answer does not arrive"


class CuttingProxy:
    """Forwards connections; once `arm` was called, the next COMMIT is cut, and only that."""

    def __init__(self, port: int, cut: Cut) -> None:
        self._server_port = port
        self._cut = cut
        self._is_armed = False
        self._drops_answer = False
        self._listening = Listening(self._serve)

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._listening.port

    def arm(self) -> None:
        """Cut the next COMMIT."""
        self._is_armed = True

    async def __aenter__(self) -> Self:
        await self._listening.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self._listening.__aexit__(kind, error, at)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        answering = asyncio.ensure_future(self._answer(server_reader, writer))
        try:
            while data := await reader.read(65536):
                if self._is_armed and COMMIT.search(data):
                    self._is_armed = False
                    if self._cut is Cut.BEFORE_COMMIT:
                        break
                    self._drops_answer = True
                    server_writer.write(data)
                    await answering
                    break
                server_writer.write(data)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            answering.cancel()
            for end in (writer, server_writer):
                end.transport.abort()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await answering

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward what the server says, to its end or to the answer that is dropped."""
        while data := await reader.read(65536):
            if self._drops_answer:
                # It came: so the server has committed.
                self._drops_answer = False
                return
            writer.write(data)
        writer.close()
