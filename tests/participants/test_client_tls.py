"""The client's TLS: which files it takes, and what a handshake that fails is told as."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import pytest

import amends
from amends.v1 import saga_pb2, types_pb2
from tests.certificates import Authority, Issued, write_key
from tests.participants.scripted_runtime import ScriptedRuntime


@dataclass(frozen=True)
class Files:
    """Certificates of two authorities; the runtimes of these tests belong to the first."""

    ours: Authority
    runtime: Issued
    client: Issued
    theirs: Authority
    stranger: Issued

    def server(self, *, ask_clients: bool = False) -> grpc.ServerCredentials:
        """Give a runtime's credentials; it may ask clients for a certificate."""
        return grpc.ssl_server_credentials(
            [(self.runtime.key.read_bytes(), self.runtime.cert.read_bytes())],
            root_certificates=self.ours.cert.read_bytes() if ask_clients else None,
            require_client_auth=ask_clients,
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Make them."""
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    return Files(
        ours=ours,
        runtime=ours.issue("runtime"),
        client=ours.issue("client"),
        theirs=theirs,
        stranger=theirs.issue("stranger"),
    )


@asynccontextmanager
async def runtime_with(credentials: grpc.ServerCredentials | None) -> AsyncIterator[str]:
    """Run a runtime that knows one saga; give its address."""
    runtime = ScriptedRuntime(credentials)
    saga = types_pb2.Saga(saga_id="order-1", state=types_pb2.SAGA_STATE_RUNNING)
    runtime.answer("GetSaga", saga_pb2.GetSagaResponse(saga=saga))
    await runtime.start()
    try:
        yield runtime.address
    finally:
        await runtime.die()


async def test_a_client_speaks_tls(files: Files) -> None:
    """It trusts the authority that signed the runtime's, and no certificate is asked of it."""
    async with (
        runtime_with(files.server()) as address,
        amends.Client(address, tls=amends.ClientTls(files.ours.cert)) as client,
    ):
        assert (await client.get("order-1")).saga_id == "order-1"


async def test_a_client_shows_its_certificate(files: Files) -> None:
    """A runtime that asks for one is content with one of an authority that it knows."""
    tls = amends.ClientTls(str(files.ours.cert), str(files.client.cert), str(files.client.key))
    async with (
        runtime_with(files.server(ask_clients=True)) as address,
        amends.Client(address, tls=tls) as client,
    ):
        assert (await client.get("order-1")).saga_id == "order-1"


async def test_a_certificate_may_have_another_name_than_the_host(files: Files) -> None:
    """`server_name` is the name that is checked in the target's place."""
    elsewhere = files.ours.issue("elsewhere", names=("amends.example",))
    credentials = grpc.ssl_server_credentials(
        [(elsewhere.key.read_bytes(), elsewhere.cert.read_bytes())]
    )
    tls = amends.ClientTls(files.ours.cert, server_name="amends.example")
    async with (
        runtime_with(credentials) as address,
        amends.Client(address, tls=tls) as client,
    ):
        assert (await client.get("order-1")).saga_id == "order-1"


FAILURES: Final[
    dict[
        str,
        tuple[
            Callable[[Files], grpc.ServerCredentials | None],
            Callable[[Files], amends.ClientTls | None],
            str,
        ],
    ]
] = {
    "plain client": (lambda f: f.server(), lambda _: None, "speaks TLS, give tls="),
    "plain runtime": (
        lambda _: None,
        lambda f: amends.ClientTls(f.ours.cert),
        "does not speak TLS; leave tls= out",
    ),
    "authority of the world": (
        lambda f: f.server(),
        lambda _: amends.ClientTls(),
        "is not good by the authorities that gRPC brings with it",
    ),
    "other authority": (
        lambda f: f.server(),
        lambda f: amends.ClientTls(f.theirs.cert),
        "theirs.pem; give the certificate of the authority that has signed it as ca=",
    ),
    "other name": (
        lambda f: f.server(),
        lambda f: amends.ClientTls(f.ours.cert, server_name="amends.example"),
        "certificate is not for 'amends.example'",
    ),
    "no client certificate": (
        lambda f: f.server(ask_clients=True),
        lambda f: amends.ClientTls(f.ours.cert),
        "asks clients for a certificate, give cert= and key=",
    ),
    "client certificate of a stranger": (
        lambda f: f.server(ask_clients=True),
        lambda f: amends.ClientTls(f.ours.cert, *f.stranger),
        "stranger.pem; give a certificate, not expired, of an authority that it knows",
    ),
    "client certificate out of date": (
        lambda f: f.server(ask_clients=True),
        lambda f: amends.ClientTls(
            f.ours.cert, *f.ours.issue("old", starts=dt.timedelta(-9), ends=dt.timedelta(-1))
        ),
        "old.pem; give a certificate, not expired",
    ),
    "key of a kind that gRPC does not speak": (
        lambda f: f.server(ask_clients=True),
        lambda f: amends.ClientTls(f.ours.cert, *f.ours.issue("odd", ed25519_key=True)),
        "look at the TLS files of both sides",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_handshake_that_fails_says_why(files: Files, name: str) -> None:
    """The runtime is unavailable, nothing was sent, and the message says what to change."""
    server, tls, hint = FAILURES[name]
    async with (
        runtime_with(server(files)) as address,
        amends.Client(address, tls=tls(files), retry_unavailable=False) as client,
    ):
        with pytest.raises(amends.Unavailable) as caught:
            await client.start("order")
    assert hint in str(caught.value)
    assert "TLS" in str(caught.value)
    assert address in str(caught.value)
    assert not caught.value.in_doubt


async def test_files_that_cannot_be_used_are_named(files: Files, tmp_path: Path) -> None:
    """Missing, a folder, no PEM, damaged, encrypted, no pair: one line each, nothing is sent."""
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("-----BEGIN CERTIFICATE-----\nMIIBuTCCAV+gAwIB\n-----END CERTIFICATE-----\n")
    locked = tmp_path / "locked.key"
    write_key(locked, password=b"secret")
    cert, key = files.client
    for tls, words in (
        (amends.ClientTls(tmp_path / "none.pem"), "none.pem' cannot be read (No such file"),
        (amends.ClientTls(tmp_path), "cannot be read (Is a directory)"),
        (amends.ClientTls(nonsense), "nonsense.pem' holds no certificate"),
        (amends.ClientTls(damaged), "damaged.pem' holds a certificate that cannot be read"),
        (amends.ClientTls(cert=key, key=key), "client.key' holds no certificate"),
        (amends.ClientTls(cert=cert, key=cert), "client.pem' cannot be read as a private key"),
        (amends.ClientTls(cert=cert, key=nonsense), "nonsense.pem' cannot be read as a private"),
        (amends.ClientTls(cert=cert, key=locked), "locked.key' cannot be read as a private key"),
        (amends.ClientTls(cert=cert, key=files.runtime.key), "runtime.key' is not the key of cert"),
    ):
        with pytest.raises(amends.InvalidTls) as caught:
            async with amends.Client("127.0.0.1:7233", tls=tls):
                pass
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_certificate_and_its_key_come_together(files: Files) -> None:
    """One alone is refused where it is written."""
    with pytest.raises(amends.InvalidTls, match="without its key"):
        amends.ClientTls(cert=files.client.cert)
    with pytest.raises(amends.InvalidTls, match="without its certificate"):
        amends.ClientTls(key=files.client.key)


async def test_a_client_whose_files_were_mended_can_be_opened(files: Files, tmp_path: Path) -> None:
    """The files are read each time that the block is entered."""
    ca = tmp_path / "ca.pem"
    async with runtime_with(files.server()) as address:
        client = amends.Client(address, tls=amends.ClientTls(ca))
        with pytest.raises(amends.InvalidTls):
            await client.__aenter__()
        ca.write_bytes(files.ours.cert.read_bytes())
        async with client:
            await client.get("order-1")
