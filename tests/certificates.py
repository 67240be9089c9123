"""Certificates made when a test needs them: an authority, and what it signs, as PEM files.

::

    authority = Authority(tmp_path)
    runtime = authority.issue("runtime", names=("localhost", "127.0.0.1"))
    client = authority.issue("client")

Nothing of this is checked in: no key lies in the repository, and no test fails because a date has
passed. Keys are P-256, which takes a millisecond to make.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = ["DAY", "HOUR", "LOOPBACK", "Authority", "Issued", "write_key"]

LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
"""The names of whoever serves on this machine; gRPC calls a unix socket `localhost`, too."""

HOUR: Final = dt.timedelta(hours=1)
DAY: Final = dt.timedelta(days=1)

Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


class Issued(NamedTuple):
    """A certificate and its key."""

    cert: Path
    key: Path


class Authority:
    """Somebody who signs certificates. All files are written to `folder`, under their names.

    One that has an `issuer` stands between that one and its own certificates, which then have its
    own behind them, as those that one buys do.
    """

    def __init__(self, folder: Path, name: str = "ca", *, issuer: Authority | None = None) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        now = _now()
        self._certificate: x509.Certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(name) if issuer is None else issuer._certificate.subject)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + 365 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key if issuer is None else issuer._key, hashes.SHA256())
        )
        self._chain = b"" if issuer is None else _pem(self._certificate)
        self.cert = folder / f"{name}.pem"
        """Its own certificate: what the other side is given to know by whom to believe."""
        self.cert.write_bytes(_pem(self._certificate))

    def issue(
        self,
        name: str,
        *,
        names: Sequence[str] = LOOPBACK,
        starts: dt.timedelta = -DAY,
        ends: dt.timedelta = 365 * DAY,
        ed25519_key: bool = False,
    ) -> Issued:
        """Sign a certificate for servers and clients, good from `starts` to `ends`, seen from now.

        `names` are the host names and IP addresses that it is for. With `ed25519_key` it has a key
        of a kind that gRPC does not speak.
        """
        key: Key = (
            ed25519.Ed25519PrivateKey.generate()
            if ed25519_key
            else ec.generate_private_key(ec.SECP256R1())
        )
        now = _now()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + starts)
            .not_valid_after(now + ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([_host(each) for each in names]), critical=False
            )
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        issued = Issued(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        issued.cert.write_bytes(_pem(certificate) + self._chain)
        write_key(issued.key, key)
        return issued


def write_key(path: Path, key: Key | None = None, *, password: bytes | None = None) -> None:
    """Write a private key, a new one if none is given, encrypted if there is a password."""
    path.write_bytes(
        (key or ec.generate_private_key(ec.SECP256R1())).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption()
            if password is None
            else serialization.BestAvailableEncryption(password),
        )
    )
    path.chmod(0o600)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
