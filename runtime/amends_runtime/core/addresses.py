"""Names and addresses: what one looks like, and what to write instead.

The configuration, the operator's verbs and every command ask here, so that what one of them takes
the other does not refuse.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = [
    "HOST",
    "PARTICIPANT_NAME",
    "check_address",
    "check_collector",
    "check_http_listen",
    "check_participant_name",
]

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
    _without_scheme(text)
    wanted = 'host:port or unix:path, for example "127.0.0.1:7001" (IPv6 in brackets: "[::1]:7001")'
    _check_host_port(text, wanted, lowest_port)
    return text


def check_http_listen(text: str) -> str:
    """The address, if an HTTP server can listen there: `host:port`, 0 for any free port.

    Raises ValueError with what it must be.
    """
    if text.startswith("unix:"):
        raise ValueError("must be host:port: Prometheus scrapes no unix sockets")
    _without_scheme(text)
    wanted = 'host:port, for example "127.0.0.1:9464" (IPv6 in brackets: "[::1]:9464")'
    _check_host_port(text, wanted, lowest_port=0)
    return text


def check_collector(text: str) -> str:
    """The address or URL, if a collector can be sent to there.

    It has a port, because that tells OTLP over gRPC from OTLP over HTTP; only an `https` URL may
    leave it out, as those of providers do. Raises ValueError with what it must be.
    """
    wanted = 'host:port or a URL, for example "127.0.0.1:4317" or "https://collector.example:4318"'
    scheme, has_scheme, rest = text.rpartition("://")
    if "@" in text:  # before anything is shown: it may have a password
        raise ValueError(
            "takes no user or password: give them in OTEL_EXPORTER_OTLP_HEADERS, and here only "
            + wanted
        )
    place, slash, _ = rest.partition("/")
    if (
        not place.strip()
        or text.startswith("unix:")
        or (slash and not has_scheme)
        or (has_scheme and scheme not in {"http", "https"})
        or any(mark in text for mark in "?# ")
    ):
        raise ValueError(f"must be {wanted}, not {_shown(text)}")
    port = place.removeprefix(":")
    if port.isascii() and port.isdigit():
        raise ValueError(f'has no host: write "127.0.0.1:{port}", or where else the collector is')
    if HOST.fullmatch(place) or IPV6_HOST.fullmatch(place):
        if scheme == "https":
            return text
        raise ValueError(
            f'has no port: write "{place}:4317", where collectors take OTLP over gRPC, or '
            f'"{place}:4318" with the protocol http/protobuf'
        )
    _check_host_port(place, wanted, lowest_port=1)
    return text


def _without_scheme(text: str) -> None:
    scheme, separator, rest = text.partition("://")
    if separator:
        raise ValueError(f"must be host:port without {scheme}://, for example {rest or '…'}")


def _check_host_port(text: str, wanted: str, lowest_port: int) -> None:
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        raise ValueError(f"must be {wanted}, not {_shown(text)}")
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
