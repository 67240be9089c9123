"""A client's TLS: its files, read and checked before gRPC sees them, and a failed handshake's hint.

gRPC takes any bytes for a certificate and says nothing before the first connection, and then only
in words of its own library. So the files are checked here, and what a handshake failed of is told
in words that say which of the two sides has to change what.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from amends.errors import InvalidTls

CERTIFICATE: Final = re.compile(
    rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How a client speaks TLS with a runtime; PEM files, read when the client is opened.

    Raises `InvalidTls`, here for a certificate without its key, and when the client is opened for
    files that cannot be used.
    """

    ca: Path | str | None = None
    """Certificates that have signed the runtime's; None: those that gRPC brings with it."""
    cert: Path | str | None = None
    """The client's own certificate chain, for a runtime that asks for one."""
    key: Path | str | None = None
    """Its private key, not encrypted."""
    server_name: str | None = None
    """The name that the runtime's certificate must have; None: the host of the client's target."""

    def __post_init__(self) -> None:
        if self.cert is not None and self.key is None:
            raise InvalidTls(f"cert={str(self.cert)!r} is given without its key: give key=, too")
        if self.key is not None and self.cert is None:
            raise InvalidTls(
                f"key={str(self.key)!r} is given without its certificate: give cert=, too"
            )

    def credentials(self) -> grpc.ChannelCredentials:
        """Read and check the files. Raises `InvalidTls`."""
        ca = None if self.ca is None else _certificates("ca", self.ca)
        if self.cert is None or self.key is None:
            return grpc.ssl_channel_credentials(ca)
        chain, key = _certificates("cert", self.cert), _read("key", self.key)
        _check_pair(self.cert, self.key)
        return grpc.ssl_channel_credentials(ca, key, chain)


def handshake_hint(why: str, tls: ClientTls | None) -> str:
    """Say what to change if gRPC's words tell of a failed handshake; empty if they don't."""
    if tls is None:
        if "Socket closed" in why or "Connection reset" in why:
            return (
                "something listens there and hangs up: if it is a runtime that speaks TLS, give "
                "tls=amends.ClientTls(ca)"
            )
        return ""
    if "WRONG_VERSION_NUMBER" in why:
        return "the TLS handshake failed: the runtime there does not speak TLS; leave tls= out"
    if "CERTIFICATE_VERIFY_FAILED" in why:
        signed_by = "the authorities that gRPC brings with it" if tls.ca is None else f"{tls.ca}"
        return (
            f"the TLS handshake failed: the runtime's certificate is not good by {signed_by}; give "
            "the certificate of the authority that has signed it as ca="
        )
    if "Hostname Verification" in why or "is not in peer certificate" in why:  # newer, older gRPC
        name = "the target's host" if tls.server_name is None else repr(tls.server_name)
        return (
            f"the TLS handshake failed: the runtime's certificate is not for {name}; use a target "
            "that it names, or give its name as server_name="
        )
    if "Socket closed" in why or "Connection reset" in why:
        if tls.cert is None:
            return (
                "the runtime hangs up during the TLS handshake: if it asks clients for a "
                "certificate, give cert= and key="
            )
        return (
            f"the runtime hangs up during the TLS handshake: it may not accept {tls.cert}; give a "
            "certificate, not expired, of an authority that it knows"
        )
    if "handshake" in why.lower():
        return "the TLS handshake failed; look at the TLS files of both sides"
    return ""


def _certificates(field: str, path: Path | str) -> bytes:
    content = _read(field, path)
    found = CERTIFICATE.findall(content)
    if not found:
        raise InvalidTls(
            f"{field}={str(path)!r} holds no certificate: give a PEM file, where one begins with "
            "-----BEGIN CERTIFICATE-----"
        )
    try:
        text = b"\n".join(found).decode("ascii")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        raise InvalidTls(
            f"{field}={str(path)!r} holds a certificate that cannot be read: it is damaged, or cut "
            "short; make or copy it anew"
        ) from None
    return content


def _check_pair(cert: Path | str, key: Path | str) -> None:
    try:
        # The password is there so that nobody is asked for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, password=lambda: "")
    except OSError as error:  # ssl.SSLError is one
        if "KEY_VALUES_MISMATCH" in str(error):
            raise InvalidTls(
                f"key={str(key)!r} is not the key of cert={str(cert)!r}: give two files that "
                "belong together"
            ) from None
        raise InvalidTls(
            f"key={str(key)!r} cannot be read as a private key: give a PEM file that is not "
            "encrypted"
        ) from None


def _read(field: str, path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidTls(
            f"{field}={str(path)!r} cannot be read ({error.strerror}): give a PEM file that this "
            "process may read"
        ) from None
