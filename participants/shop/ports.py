"""A port that stays ours while nobody listens on it.

A service that is down, or a process that is killed and started again, must come back on the same
port. Between the two the port is free, and the operating system may give it to any connection, even
to that of a client who is trying to reach the service.
"""

from __future__ import annotations

import socket
import sys


class HeldPort:
    """Holds a port of a loopback or other IPv4 address without listening on it, until `close`.

    A server of this or of another process may listen on it meanwhile (gRPC sets SO_REUSEADDR, which
    allows it), and connections are refused while none does. Raises `OSError` if somebody who does
    not hold it in this way has the port. Outside Linux a port cannot be held and listened on at the
    same time; there it is only chosen.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
        except BaseException:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]
        self.address = f"{host}:{self.port}"
        if sys.platform != "linux":
            self._socket.close()

    def close(self) -> None:
        """Let go of it."""
        self._socket.close()
