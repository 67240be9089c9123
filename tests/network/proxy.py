"""A TCP proxy on loopback, which does to bytes what networks do.

How to think about it. Of each direction of each connection the proxy has all that has come in, from
the connection's first byte, and one question: up to where may it pass, and is the connection cut
there? A `Gate` answers that; everything else is one:

    `Open`         all of it, at once
    `CutAfter(n)`  exactly n bytes, then both sides are cut off
    `Stalled()`    nothing: the connection stands, and nothing comes, until it is let go on
    a test's own   which may look at what the bytes are, as `frames` does

What may pass is written in crumbs of so many bytes, each so late: both drawn from the seed, which
`Proxy` shows. A connection is cut by an RST, which says that it broke, or by a FIN, which says that
the other side has no more to say. TCP itself loses, doubles and reorders nothing; nor does this.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from enum import Enum
from types import TracebackType
from typing import Final, NamedTuple, Protocol, Self

from tests.network.listening import Listening

__all__ = [
    "Connection",
    "Cut",
    "CutAfter",
    "Direction",
    "Gate",
    "Open",
    "Passage",
    "Proxy",
    "Stalled",
]

READ: Final = 65536
NO_LINGER: Final = struct.pack("ii", 1, 0)  # closing sends an RST, and what waits is dropped
NEVER: Final = 2**62


class Direction(Enum):
    """Which way bytes go. The server is who the proxy connects to."""

    TO_SERVER = "to the server"
    TO_CLIENT = "to the client"


class Cut(Enum):
    """How a connection ends."""

    RST = "RST"
    FIN = "FIN"


class Passage(NamedTuple):
    """What a gate says: bytes before `until` pass; if `cut`, the connection ends there."""

    until: int
    cut: Cut | None = None


class Gate(Protocol):
    """Says how far the bytes of one direction may pass, of any number of connections."""

    def passage(self, connection: Connection, came: bytes) -> Passage:
        """Judge what has come so far, from the connection's first byte. Asked with each more."""
        ...


class Open:
    """Everything passes."""

    def passage(self, connection: Connection, came: bytes) -> Passage:
        """All of it."""
        return Passage(len(came))


class CutAfter:
    """Cuts each connection after so many bytes: none more, none fewer pass."""

    def __init__(self, count: int, cut: Cut = Cut.RST) -> None:
        self._count = count
        self._cut = cut

    def passage(self, connection: Connection, came: bytes) -> Passage:
        """The first `count` bytes, and then the end."""
        if len(came) < self._count:
            return Passage(len(came))
        return Passage(self._count, self._cut)


class Stalled:
    """Takes bytes and lets nothing pass."""

    def passage(self, connection: Connection, came: bytes) -> Passage:
        """Nothing."""
        return Passage(0)


class Connection:
    """One connection: what has come and what has passed in each direction, and how it ended."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.came = {direction: bytearray() for direction in Direction}
        self.passed = dict.fromkeys(Direction, 0)
        self.cut: Cut | None = None
        self.turns = {direction: asyncio.Lock() for direction in Direction}
        self._writers: dict[Direction, asyncio.StreamWriter] = {}

    def was_cut(self) -> bool:
        """Whether it was cut."""
        return self.cut is not None

    def end(self, how: Cut) -> None:
        """Cut it off, on both sides."""
        if self.was_cut():
            return
        self.cut = how
        for writer in self._writers.values():
            if how is Cut.RST and not writer.transport.is_closing():
                connected: socket.socket = writer.get_extra_info("socket")
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
                writer.transport.abort()
            else:
                writer.close()  # does nothing where it is closed


class Proxy:
    """Listens on a port of its own, and connects to `target` (host:port) for each who comes.

    `gates` may be changed at any time; `ask_again` lets what waits be judged anew. `crumbs` is how
    many bytes are written at once, `delay_s` how late each: from, to.
    """

    def __init__(
        self,
        target: str,
        *,
        seed: int = 0,
        crumbs: tuple[int, int] = (NEVER, NEVER),
        delay_s: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.seed = seed
        self.gates: dict[Direction, Gate] = {direction: Open() for direction in Direction}
        self.connections: list[Connection] = []
        self.address = ""
        self._target = target
        self._chance = random.Random(seed)  # noqa: S311  # to be repeated, not to be secret
        self._crumbs = crumbs
        self._delay_s = delay_s
        self._listening = Listening(self._serve)

    def __str__(self) -> str:
        return f"proxy to {self._target}, seed {self.seed}"

    async def __aenter__(self) -> Self:
        await self._listening.__aenter__()
        self.address = self._listening.address
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.cut_all()
        await self._listening.__aexit__(kind, error, at)

    def cut_all(self, how: Cut = Cut.RST) -> None:
        """Cut every connection that is there."""
        for connection in self.connections:
            connection.end(how)

    async def ask_again(self) -> None:
        """Let the gates judge once more what they have kept back."""
        for connection in self.connections:
            for direction in connection._writers:
                await self._pass(connection, direction)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(len(self.connections))
        self.connections.append(connection)
        host, _, port = self._target.rpartition(":")
        server_reader, server_writer = await asyncio.open_connection(host, int(port))
        try:
            connection._writers = {
                Direction.TO_CLIENT: writer,
                Direction.TO_SERVER: server_writer,
            }
            for each in (writer, server_writer):
                each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if connection.was_cut():  # while it was being connected
                return
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(connection, Direction.TO_SERVER, reader))
                pumps.create_task(self._pump(connection, Direction.TO_CLIENT, server_reader))
        finally:
            server_writer.close()

    async def _pump(
        self, connection: Connection, direction: Direction, source: asyncio.StreamReader
    ) -> None:
        """Carry one direction of a connection to its end."""
        try:
            while not connection.was_cut():
                data = await source.read(READ)
                if not data:
                    connection._writers[direction].write_eof()
                    return
                connection.came[direction] += data
                await self._pass(connection, direction)
        except OSError:
            connection.end(Cut.RST)  # one side has broken off: the other is told so

    async def _pass(self, connection: Connection, direction: Direction) -> None:
        """Let pass what may, and cut the connection if it is to be."""
        sink, came, passed = connection._writers[direction], connection.came, connection.passed
        async with connection.turns[direction]:
            if connection.was_cut():
                return
            until, cut = self.gates[direction].passage(connection, bytes(came[direction]))
            while passed[direction] < until:
                size = min(until - passed[direction], self._chance.randint(*self._crumbs))
                await self._be_late()
                if connection.was_cut():
                    return
                sink.write(came[direction][passed[direction] : passed[direction] + size])
                passed[direction] += size
                await sink.drain()
            if cut is not None:
                connection.end(cut)

    async def _be_late(self) -> None:
        low, high = self._delay_s
        if high:
            await asyncio.sleep(self._chance.uniform(low, high))
