"""The proxy does to bytes what it is told to, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from tests.network.frames import CutInside, frames_in, message_in
from tests.network.listening import Listening
from tests.network.proxy import Cut, CutAfter, Direction, Open, Proxy, Stalled

pytestmark = pytest.mark.anyio

PATIENCE_S = 60.0


@asynccontextmanager
async def echo(**options: tuple[int, int]) -> AsyncIterator[Proxy]:
    """A proxy to a server that sends back whatever it is sent."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
            await writer.drain()

    async with Listening(serve) as server, Proxy(server.address, seed=1, **options) as proxy:
        yield proxy


async def connected(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to it."""
    host, _, port = proxy.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


@pytest.mark.parametrize("cut", [*Cut])
@pytest.mark.parametrize("count", [0, 1, 7, 20])
async def test_exactly_so_many_bytes_pass_before_a_cut(cut: Cut, count: int) -> None:
    """An RST is an error of the connection, a FIN its end; what passed before has arrived."""
    async with echo() as proxy:
        proxy.gates[Direction.TO_CLIENT] = CutAfter(count, cut)
        reader, writer = await connected(proxy)
        writer.write(b"x" * 20)
        received = b""
        with anyio.fail_after(PATIENCE_S):
            try:
                while data := await reader.read(100):
                    received += data
                ended = Cut.FIN
            except ConnectionResetError:
                ended = Cut.RST
        writer.close()
    assert received == b"x" * count
    assert ended is cut
    assert proxy.connections[0].passed[Direction.TO_CLIENT] == count


async def test_whoever_connects_at_the_last_moment_is_hung_up_on() -> None:
    """Accepted or not yet, served or not yet: no task and no socket is left, and nothing raised."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    before = asyncio.all_tasks()
    for turns in range(8):
        with socket.socket() as late:
            late.setblocking(False)
            async with Listening(serve) as server:
                late.connect_ex(("127.0.0.1", server.port))
                for _ in range(turns):
                    await asyncio.sleep(0)
            late.setblocking(True)
            with contextlib.suppress(ConnectionError):
                assert late.recv(1) == b""
        gc.collect()  # a socket that was forgotten warns here, which fails the test
    assert asyncio.all_tasks() == before


async def test_crumbs_are_the_same_bytes() -> None:
    """Nothing is lost, doubled or out of order, however small the pieces."""
    sent = bytes(range(256)) * 4
    async with echo(crumbs=(1, 7)) as proxy:
        reader, writer = await connected(proxy)
        writer.write(sent)
        with anyio.fail_after(PATIENCE_S):
            assert await reader.readexactly(len(sent)) == sent
        writer.close()


async def test_a_stalled_direction_goes_on_where_it_stopped() -> None:
    """The connection stands; what came meanwhile passes when it is let go on."""
    async with echo() as proxy:
        proxy.gates[Direction.TO_SERVER] = Stalled()
        reader, writer = await connected(proxy)
        writer.write(b"hello")
        with anyio.fail_after(PATIENCE_S):
            while not proxy.connections or not proxy.connections[0].came[Direction.TO_SERVER]:
                await anyio.lowlevel.checkpoint()
            assert proxy.connections[0].passed[Direction.TO_SERVER] == 0
            proxy.gates[Direction.TO_SERVER] = Open()
            await proxy.ask_again()
            assert await reader.readexactly(5) == b"hello"
        writer.close()


async def test_a_client_connects_again_after_a_cut() -> None:
    """Each connection is one of its own."""
    async with echo() as proxy:
        for number in range(3):
            reader, writer = await connected(proxy)
            writer.write(b"x")
            with anyio.fail_after(PATIENCE_S):
                assert await reader.readexactly(1) == b"x"
            proxy.cut_all()
            writer.close()
            assert len(proxy.connections) == number + 1


def test_frames_are_found_whole_and_a_message_in_one() -> None:
    """A preface, a SETTINGS frame, a DATA frame with one message, and half of another."""
    message = b"\0\0\0\0\3abc"
    data = (8).to_bytes(3, "big") + b"\0\0" + (1).to_bytes(4, "big") + message
    came = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]) + data
    frames = [*frames_in(came + data[:-1])]
    assert [(frame.begin, frame.end) for frame in frames] == [(24, 33), (33, 50)]
    assert [message_in(frame) for frame in frames] == [None, b"abc"]
    assert not [*frames_in(came[:10])]


async def test_a_frame_is_cut_inside_once() -> None:
    """Whole frames pass until it is aimed; then as many bytes of the next one as it says."""
    frame = (6).to_bytes(3, "big") + b"\0\0" + (1).to_bytes(4, "big") + b"\0\0\0\0\1!"
    async with echo() as proxy:
        gate = CutInside(lambda message: message == b"!")
        proxy.gates[Direction.TO_CLIENT] = gate
        reader, writer = await connected(proxy)
        with anyio.fail_after(PATIENCE_S):
            writer.write(frame)
            assert await reader.readexactly(len(frame)) == frame
            gate.aim(11, Cut.FIN)
            writer.write(frame)
            assert await reader.read() == frame[:11]
        writer.close()
    assert gate.struck == [(len(frame), 11, b"!")]
    assert not gate.is_aimed
