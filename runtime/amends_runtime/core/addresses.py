"""Names and addresses of participants: what one looks like, and what to write instead.

The configuration and the operator's verbs both ask here, so that what one of them takes the other
does not refuse.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["HOST", "PARTICIPANT_NAME", "check_address", "check_participant_name"]

PARTICIPANT_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,47}")
HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})")
IPV6_HOST: Final = re.compile(r"\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]")
MAX_UNIX_PATH_BYTES: Final = 107  # sockaddr_un on Linux has 108, the last of which is a zero
MAX_PORT: Final = 65_535
MAX_SHOWN: Final = 60  # of a wrong value in an error line: enough to recognise it


def check_participant_name(name: str) -> str:
    """The name, if it is one. Raises ValueError with what it must be."""
    if not PARTICIPANT_NAME.fullmatch(name):
        raise ValueError(
            "is not a participant's name: use a lower-case letter, then up to 47 of a-z 0-9 _ -"
        )
    return name


def check_address(text: str, lowest_port: int = 1) -> str:
    """The address, if it is `host:port` or `unix:path`. Raises ValueError with what it must be."""
    if text.startswith("unix:"):
        return _unix_address(text)
    scheme, separator, rest = text.partition("://")
    if separator:
        raise ValueError(f"must be host:port without {scheme}://, for example {rest or '…'}")
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        raise ValueError(
            'must be host:port or unix:path, for example "127.0.0.1:7001" '
            f'(IPv6 in brackets: "[::1]:7001"), not {_shown(text)}'
        )
    if not host:
        raise ValueError(
            f'has no host: write "127.0.0.1:{port}" (this machine only) or "0.0.0.0:{port}"'
        )
    if not HOST.fullmatch(host) and not IPV6_HOST.fullmatch(host):
        raise ValueError(
            f"has a host that cannot be: {_shown(host)}; write a name or an IP address"
        )
    if not (port.isascii() and port.isdigit() and lowest_port <= int(port) <= MAX_PORT):
        raise ValueError(f"has a port that cannot be: {_shown(port)}; write {lowest_port} to 65535")
    return text


def _unix_address(text: str) -> str:
    path = text.removeprefix("unix:")
    if not path or "\0" in path:
        raise ValueError('has no path: write "unix:/run/name.sock"')
    size = len(path.encode(errors="surrogateescape"))
    if size > MAX_UNIX_PATH_BYTES:
        raise ValueError(
            f"has a path of {size} bytes, and a socket's may have {MAX_UNIX_PATH_BYTES}: "
            "use a shorter folder"
        )
    return text


def _shown(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…")
