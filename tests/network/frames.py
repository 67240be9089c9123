"""Where in a connection's bytes a gRPC message lies: HTTP/2 frames, read from its first byte.

RFC 9113, section 4.1: a frame is nine bytes (24 bits of length, type, flags, 32 bits of stream) and
its payload. A DATA frame's payload is a piece of the stream's gRPC messages, each one byte of flags
and 32 bits of length before its own bytes. A client's bytes begin with a preface of 24 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from tests.network.proxy import Connection, Cut, Passage

__all__ = ["CutInside", "Frame", "Strike", "frames_in", "message_in"]

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER: Final = 9
DATA: Final = 0
PADDED: Final = 0x8
MESSAGE_HEADER: Final = 5


class Frame(NamedTuple):
    """A whole frame: where it begins and ends among the connection's bytes, and its payload."""

    begin: int
    end: int
    kind: int
    payload: bytes


def frames_in(came: bytes, begin: int = 0) -> Iterator[Frame]:
    """Give the whole frames from `begin` on, which is 0 or where a frame ended."""
    if begin == 0 and came.startswith(PREFACE[: len(came)]):
        begin = len(PREFACE)
    while len(came) >= begin + HEADER:
        length = int.from_bytes(came[begin : begin + 3], "big")
        kind, flags = came[begin + 3], came[begin + 4]
        end = begin + HEADER + length
        if len(came) < end:
            return
        assert kind != DATA or not flags & PADDED, "gRPC pads nothing"
        yield Frame(begin, end, kind, came[begin + HEADER : end])
        begin = end


def message_in(frame: Frame) -> bytes | None:
    """Give the gRPC message that a frame consists of; None if it is another frame, or a piece."""
    if frame.kind != DATA or len(frame.payload) < MESSAGE_HEADER:
        return None
    compressed, length = frame.payload[0], int.from_bytes(frame.payload[1:MESSAGE_HEADER], "big")
    if compressed or length != len(frame.payload) - MESSAGE_HEADER:
        return None
    return frame.payload[MESSAGE_HEADER:]


class Strike(NamedTuple):
    """A frame that was cut: its length, after how many of its bytes, and its whole message."""

    length: int
    offset: int
    message: bytes


class CutInside:
    """A gate that lets whole frames pass, and cuts one, once, at a byte of it.

    `aim` it; the first frame then whose message is `wanted` is cut after so many of its bytes, its
    header's included: none, some, or all.
    """

    def __init__(self, wanted: Callable[[bytes], bool]) -> None:
        self.struck: list[Strike] = []
        self._wanted = wanted
        self._aimed: tuple[int, Cut] | None = None
        self._judged: dict[Connection, int] = {}

    def aim(self, offset: int, cut: Cut) -> None:
        """Cut the next wanted frame after `offset` bytes, or after all if it has fewer."""
        self._aimed = offset, cut

    @property
    def is_aimed(self) -> bool:
        """Whether it has yet to strike."""
        return self._aimed is not None

    def passage(self, connection: Connection, came: bytes) -> Passage:
        """Every frame that has come whole, unless it is the one."""
        until = self._judged.get(connection, 0)
        for frame in frames_in(came, until):
            message = message_in(frame)
            if self._aimed is not None and message is not None and self._wanted(message):
                offset, cut = self._aimed
                self._aimed = None
                length = frame.end - frame.begin
                offset = min(offset, length)
                self.struck.append(Strike(length, offset, message))
                return Passage(frame.begin + offset, cut)
            until = frame.end
        self._judged[connection] = until
        return Passage(until)
