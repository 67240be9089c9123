"""The runtime's TLS files: read whole, and checked before anything is served or called.

How to think about it. The runtime has two sides. On each there may be a certificate with its key,
which say who it is, and authorities, which say whom it believes:

    server         tls_cert, tls_key     every connection is encrypted
                   tls_client_ca         and every client proves who it is
    participant    tls_ca                its certificate must be signed by one of these
                   tls_cert, tls_key     and the runtime proves who it is

1. Files are read at the start, and new ones take effect with the next, which loses nothing. gRPC
   takes any bytes, and complains of them at the first connection or on standard error: so whatever
   can be found wrong with a file is found here, and all of it at once.
2. A date is no fault but a remark for the log: a runtime whose certificate expired over night must
   still be able to start, because its sagas go on without clients.
3. What a file holds is shown nowhere: in no error, and in no `repr`.
"""

from __future__ import annotations

import datetime as dt
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

__all__ = [
    "ParticipantTls",
    "ServerTls",
    "TlsFault",
    "read_participant_tls",
    "read_server_tls",
]

MAX_FILE_BYTES: Final = 4 * 1024 * 1024
"""All authorities of an operating system together are 0.3 MB."""

EXPIRES_SOON: Final = dt.timedelta(days=14)
"""Time enough for a person to do something about it; those who renew by a program do so earlier."""


class TlsFault(NamedTuple):
    """One thing that is wrong: the key of the configuration, and what to do about it."""

    key: str
    what: str


@dataclass(frozen=True, slots=True)
class ServerTls:
    """How clients are served. PEM, as gRPC takes it."""

    cert: bytes = field(repr=False)
    """The server's certificate, then those between it and its authority."""
    key: bytes = field(repr=False)
    client_ca: bytes | None = field(repr=False)
    """Every client must have a certificate that one of these has signed; None: none is asked."""
    remarks: tuple[str, ...] = ()
    """What an operator should know of the files' dates."""


@dataclass(frozen=True, slots=True)
class ParticipantTls:
    """How a participant is called. PEM, as gRPC takes it."""

    ca: bytes = field(repr=False)
    """The participant's certificate must be signed by one of these."""
    cert: bytes | None = field(repr=False)
    """The runtime's own certificate, then those between it and its authority."""
    key: bytes | None = field(repr=False)
    server_name: str = ""
    """The name that the participant's certificate must have; empty: the host of its address."""
    remarks: tuple[str, ...] = ()
    """As above."""


def read_server_tls(
    *, listen: str, cert: str, key: str, client_ca: str
) -> tuple[ServerTls | None, list[TlsFault]]:
    """Reads the files of `[server]`; an empty path is one that is not configured.

    The answer is None without TLS, and where there are faults.
    """
    if not (cert or key or client_ca):
        return None, []
    files = _Files()
    if listen.startswith("unix:"):
        files.wrong("tls_cert" if cert else "tls_key" if key else "tls_client_ca", _UNIX)
    pair = files.pair(cert, key)
    authorities = files.authorities("tls_client_ca", client_ca)
    if client_ca and not (cert or key):
        files.wrong("tls_client_ca", "is given without tls_cert and tls_key: give all three")
    if files.faults or pair is None:
        return None, files.faults
    return ServerTls(*pair, authorities, tuple(files.remarks)), []


def read_participant_tls(
    *, address: str, ca: str, cert: str, key: str, server_name: str
) -> tuple[ParticipantTls | None, list[TlsFault]]:
    """Reads the files of one `[participants.NAME]`; as `read_server_tls`."""
    given = {"tls_ca": ca, "tls_cert": cert, "tls_key": key, "tls_server_name": server_name}
    if not any(given.values()):
        return None, []
    files = _Files()
    first = next(name for name, value in given.items() if value)
    if address.startswith("unix:"):
        files.wrong(first, _UNIX)
    if not ca:
        files.wrong(
            first,
            "is given without tls_ca: give the certificates of whoever signed the participant's,"
            " or it would be called in plain text",
        )
    authorities = files.authorities("tls_ca", ca)
    pair = files.pair(cert, key)
    if files.faults or authorities is None:
        return None, files.faults
    own_cert, own_key = pair or (None, None)
    return ParticipantTls(authorities, own_cert, own_key, server_name, tuple(files.remarks)), []


_UNIX: Final = (
    "is for a host:port: a unix socket has no host whose name a certificate could prove, and its"
    " folder's permissions say who may use it; leave the tls_* keys out, or give a host:port"
)


class _Files:
    """Files that are being read, and what is wrong with them so far."""

    def __init__(self) -> None:
        self.faults: list[TlsFault] = []
        self.remarks: list[str] = []
        self._now = dt.datetime.now(dt.UTC)

    def wrong(self, key: str, what: str) -> None:
        self.faults.append(TlsFault(key, what))

    def pair(self, cert_path: str, key_path: str) -> tuple[bytes, bytes] | None:
        """A certificate and its key; None if there are none, or something is wrong."""
        if cert_path and not key_path:
            self.wrong("tls_cert", "is given without tls_key, its private key: give both")
        if key_path and not cert_path:
            self.wrong("tls_key", "is given without tls_cert, its certificate: give both")
        cert = self._read("tls_cert", cert_path)
        key = self._read("tls_key", key_path)
        chain = [] if cert is None else self._certificates("tls_cert", cert_path, cert)
        private = None if key is None else self._private_key(key_path, key)
        if not chain or private is None:
            return None
        if chain[0].public_key() != private.public_key():
            self.wrong(
                "tls_key",
                f"{key_path} is not the key of {cert_path}, whose first certificate must be the"
                " runtime's own: give two files that belong together",
            )
        # One that has expired spoils the chain.
        self._look_at_dates(
            f"tls_cert {cert_path}",
            max(each.not_valid_before_utc for each in chain),
            min(each.not_valid_after_utc for each in chain),
        )
        return (cert, key) if cert is not None and key is not None else None

    def authorities(self, name: str, path: str) -> bytes | None:
        """Certificates of authorities; None if there are none, or something is wrong."""
        content = self._read(name, path)
        found = [] if content is None else self._certificates(name, path, content)
        if not found:
            return None
        # While authorities are changed the old one stands beside the new one.
        self._look_at_dates(
            f"{name} {path}",
            min(each.not_valid_before_utc for each in found),
            max(each.not_valid_after_utc for each in found),
        )
        return content

    def _read(self, key: str, path: str) -> bytes | None:
        if not path:
            return None
        try:
            # A pipe would be empty when it is read again, and might never end.
            if not stat.S_ISREG(Path(path).stat().st_mode):
                self.wrong(key, f"{path} is not a file: give the path of a PEM file")
                return None
            with Path(path).open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            self.wrong(key, f"{path}: there is no such file")
            return None
        except OSError as error:
            self.wrong(key, f"{path} cannot be read: {error.strerror}")
            return None
        if len(content) > MAX_FILE_BYTES:
            self.wrong(key, f"{path} has more than {MAX_FILE_BYTES:,} bytes: it is no PEM file")
            return None
        return content

    def _certificates(self, key: str, path: str, content: bytes) -> list[x509.Certificate]:
        from cryptography import x509  # noqa: PLC0415  # 50 ms, and most runtimes have no TLS
        from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415  # as above

        if b"-----BEGIN CERTIFICATE-----" not in content:
            holds = " (it holds a private key)" if b" PRIVATE KEY-----" in content else ""
            self.wrong(
                key,
                f"{path} holds no certificate{holds}: give a PEM file, in which one begins with"
                " -----BEGIN CERTIFICATE-----",
            )
            return []
        try:
            found = x509.load_pem_x509_certificates(content)
            for each in found:
                each.public_key()
        except (ValueError, UnsupportedAlgorithm):
            self.wrong(
                key,
                f"{path} holds a certificate that cannot be read: it is damaged, or cut short;"
                " make or copy it anew",
            )
            return []
        return found

    def _private_key(self, path: str, content: bytes) -> PrivateKeyTypes | None:
        from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415  # as above
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415  # as above

        if b" PRIVATE KEY-----" not in content:
            self.wrong(
                "tls_key",
                f"{path} holds no private key: give a PEM file, in which one begins with"
                " -----BEGIN PRIVATE KEY-----",
            )
            return None
        try:
            found = serialization.load_pem_private_key(content, password=None)
        except TypeError:  # how the library says that it needs a password
            self.wrong(
                "tls_key",
                f"{path} is encrypted, and nobody is there to give its password: write it without"
                " one, to a file that only the runtime's user may read",
            )
            return None
        except (ValueError, UnsupportedAlgorithm):
            self.wrong(
                "tls_key",
                f"{path} holds a private key that cannot be read: it is damaged, or cut short;"
                " make or copy it anew",
            )
            return None
        if not _is_spoken(found):
            self.wrong(
                "tls_key",
                f"{path} holds a key of a kind that gRPC does not speak in TLS: give an RSA, P-256"
                " or P-384 key and a certificate for it",
            )
            return None
        return found

    def _look_at_dates(self, what: str, since: dt.datetime, until: dt.datetime) -> None:
        if self._now > until:
            remark = f"expired on {_day(until)}: whoever checks it refuses it; {_RENEW}"
        elif self._now < since:
            remark = (
                f"is not valid before {_day(since)}: until then whoever checks it refuses it;"
                " is this machine's clock right?"
            )
        elif self._now + EXPIRES_SOON > until:
            remark = f"expires on {_day(until)}: {_RENEW} before that"
        else:
            return
        self.remarks.append(f"{what} {remark}")


_RENEW: Final = "put a new one there and restart the runtime"


def _is_spoken(key: PrivateKeyTypes) -> bool:
    """Whether gRPC's library negotiates keys of this kind, which is less than it can read."""
    from cryptography.hazmat.primitives.asymmetric import ec, rsa  # noqa: PLC0415  # as above

    if isinstance(key, ec.EllipticCurvePrivateKey):
        return isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1)
    return isinstance(key, rsa.RSAPrivateKey)


def _day(instant: dt.datetime) -> str:
    return instant.strftime("%Y-%m-%d %H:%M UTC")
