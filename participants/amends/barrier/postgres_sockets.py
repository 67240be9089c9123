"""What is done to the sockets under the drivers, for servers that are gone without a word."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Final, Protocol

SILENCE_S: Final = 10
"""After so long without an answer of the other machine itself, a connection has failed."""

KEEPALIVE_S: Final = 5
"""How often it is asked when there is nothing else to send, as while we wait for an answer."""

OPTIONS: Final[dict[str, int]] = {
    "TCP_KEEPIDLE": KEEPALIVE_S,
    "TCP_KEEPINTVL": KEEPALIVE_S,
    "TCP_KEEPCNT": SILENCE_S // KEEPALIVE_S,
    "TCP_USER_TIMEOUT": SILENCE_S * 1000,
}

LIBPQ_OPTIONS: Final[dict[str, int]] = {
    "keepalives_idle": KEEPALIVE_S,
    "keepalives_interval": KEEPALIVE_S,
    "keepalives_count": SILENCE_S // KEEPALIVE_S,
    "tcp_user_timeout": SILENCE_S * 1000,
}
"""The same by libpq's names."""


class Socket(Protocol):
    """What there is of a socket while an event loop has it."""

    @property
    def family(self) -> int:
        """By what addresses it is reached."""
        ...

    def setsockopt(self, level: int, optname: int, value: int, /) -> None:
        """Set an option that is a number."""
        ...


def end_in_silence(connected: Socket) -> None:
    """Have the system end a connection whose other side is gone; as far as it knows how."""
    if connected.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in OPTIONS.items():
        if (option := getattr(socket, name, None)) is not None:
            connected.setsockopt(socket.IPPROTO_TCP, option, value)


def hang_up(descriptor: int) -> None:
    """End a connection under whoever waits for it: he finds that the other side has left.

    The descriptor stays his to close, so that its number is not another connection's meanwhile.
    """
    with (
        contextlib.suppress(OSError),
        socket.socket(fileno=os.dup(descriptor)) as connected,
    ):
        connected.shutdown(socket.SHUT_RDWR)
