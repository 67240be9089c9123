"""Calling a participant over TLS: what gets through, and what the attempt says when it does not.

Real participants on both sides of a real handshake; nothing is ever decided by one that fails.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import amends
from amends_runtime.clock import SystemClock
from amends_runtime.core.messages import Done, Unknown
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Verb
from amends_runtime.dispatch.handshakes import explain_handshake
from amends_runtime.dispatch.unary import UnaryTransport
from amends_runtime.ports import Call, Reply, StoreIdentity
from amends_runtime.tls import ParticipantTls
from tests.certificates import HOUR, Authority, Issued


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Who has signed the certificates of the participant and of the runtime."""
    return Authority(tmp_path)


class Payments:
    """A participant that counts what reaches its handler."""

    def __init__(self) -> None:
        self.charged = 0
        self.participant = amends.Participant("payments", barrier=None)
        self.participant.execute("charge", compensatable=False)(self._charge)

    async def _charge(self, call: amends.Call) -> None:
        self.charged += 1


@pytest.fixture
def payments() -> Payments:
    """The participant."""
    return Payments()


def tls_to(ca: Authority, client: Issued | None = None, *, server_name: str = "") -> ParticipantTls:
    """Say how the runtime calls it."""
    cert, key = (None, None) if client is None else (path.read_bytes() for path in client)
    return ParticipantTls(ca.cert.read_bytes(), cert, key, server_name)


async def asked(address: str, tls: ParticipantTls | None) -> Reply:
    """Send one attempt."""
    transport = UnaryTransport(
        address,
        StoreIdentity(store_id="store", incarnation="first", epoch=1),
        SystemClock(),
        max_result_bytes=1024,
        oldest_open_ms=lambda: 0,
        tls=tls,
    )
    try:
        return await transport.call(
            Call(
                saga_id="order-1",
                definition_name="order",
                step=0,
                step_name="charge",
                participant="payments",
                action="charge",
                verb=Verb.EXECUTE,
                round=1,
                attempt=1,
                timeout_ms=30_000,
                input=Payload(),
            )
        )
    finally:
        await transport.close()


@asynccontextmanager
async def refusing(payments: Payments, tls: amends.TlsFiles | None) -> AsyncIterator[str]:
    """Serve the participant; in the end nothing may have reached it."""
    async with amends.serve(payments.participant, tls=tls) as server:
        yield server.address
    assert payments.charged == 0


def said(reply: Reply) -> str:
    """Give the text of an attempt that found nobody; the endpoint is unwell, nothing is decided."""
    assert reply.status == "UNAVAILABLE"
    assert reply.healthy is False
    assert isinstance(reply.outcome, Unknown)
    assert not reply.outcome.misconfigured  # a certificate is renewed while the saga waits
    assert "(gRPC: " in reply.outcome.message
    return reply.outcome.message


# -- what gets through -----------------------------------------------------------------------------


async def test_a_participant_with_a_certificate_is_called(
    authority: Authority, payments: Payments
) -> None:
    """It is signed by the authority and is for the host of its address."""
    tls = amends.TlsFiles(*authority.issue("payments"))
    async with amends.serve(payments.participant, tls=tls) as server:
        reply = await asked(server.address, tls_to(authority))
    assert isinstance(reply.outcome, Done)
    assert payments.charged == 1


async def test_the_runtime_shows_its_certificate(authority: Authority, payments: Payments) -> None:
    """A participant that asks for one is content with it."""
    tls = amends.TlsFiles(*authority.issue("payments"), client_ca=authority.cert)
    async with amends.serve(payments.participant, tls=tls) as server:
        reply = await asked(server.address, tls_to(authority, authority.issue("runtime")))
    assert isinstance(reply.outcome, Done)


async def test_a_name_may_be_given_that_the_address_lacks(
    authority: Authority, payments: Payments
) -> None:
    """For an address behind which the certificate means another name."""
    tls = amends.TlsFiles(*authority.issue("payments", names=("payments.example",)))
    async with amends.serve(payments.participant, tls=tls) as server:
        reply = await asked(server.address, tls_to(authority, server_name="payments.example"))
    assert isinstance(reply.outcome, Done)


# -- what does not ---------------------------------------------------------------------------------


async def test_plain_text_where_tls_is_configured(authority: Authority, payments: Payments) -> None:
    """The call is not sent in plain text instead."""
    async with refusing(payments, None) as address:
        text = said(await asked(address, tls_to(authority)))
    assert text.startswith("the participant does not speak TLS, and tls_ca says that it must")


async def test_a_certificate_of_somebody_else(
    tmp_path: Path, authority: Authority, payments: Payments
) -> None:
    """Whoever listens there may be another."""
    strangers = Authority(tmp_path, "strangers")
    async with refusing(payments, amends.TlsFiles(*strangers.issue("payments"))) as address:
        text = said(await asked(address, tls_to(authority)))
    assert text.startswith(
        "the participant's certificate is not signed by an authority in its tls_ca"
    )


async def test_a_certificate_that_expired(authority: Authority, payments: Payments) -> None:
    """It is to be renewed."""
    expired = amends.TlsFiles(*authority.issue("payments", ends=-HOUR))
    async with refusing(payments, expired) as address:
        text = said(await asked(address, tls_to(authority)))
    assert text.startswith("the participant's certificate, or one that it rests on, has expired")


async def test_a_certificate_of_tomorrow(authority: Authority, payments: Payments) -> None:
    """One of the clocks is wrong."""
    early = amends.TlsFiles(*authority.issue("payments", starts=HOUR))
    async with refusing(payments, early) as address:
        text = said(await asked(address, tls_to(authority)))
    assert text.startswith("the participant's certificate is not valid yet")


@pytest.mark.parametrize("server_name", ["", "shipping.example"])
async def test_a_certificate_for_another_name(
    authority: Authority, payments: Payments, server_name: str
) -> None:
    """The line says which name was looked for."""
    tls = amends.TlsFiles(*authority.issue("payments", names=("payments.example",)))
    async with refusing(payments, tls) as address:
        text = said(await asked(address, tls_to(authority, server_name=server_name)))
    name = server_name or "the host of its address"
    assert text.startswith(f"the participant's certificate is not for {name}: ")


async def test_a_runtime_without_the_certificate_that_is_asked_for(
    tmp_path: Path, authority: Authority, payments: Payments
) -> None:
    """The participant hangs up without a word, so the line names what may be missing."""
    tls = amends.TlsFiles(*authority.issue("payments"), client_ca=authority.cert)
    stranger = Authority(tmp_path, "strangers").issue("runtime")
    async with refusing(payments, tls) as address:
        without = said(await asked(address, tls_to(authority)))
        another = said(await asked(address, tls_to(authority, stranger)))
        plain = said(await asked(address, None))
    assert "if it asks for a certificate, give the runtime one" in without
    assert "it may not accept the runtime's certificate (tls_cert)" in another
    assert "if the participant speaks TLS, give it a tls_ca" in plain


def test_older_words_of_grpc_are_known() -> None:
    """The oldest gRPC that is supported says of a wrong name something else than the newest."""
    text = explain_handshake(
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:7001: "
        "Peer name 10.0.0.1 is not in peer certificate",
        ParticipantTls(b"", None, None),
    )
    assert text.startswith("the participant's certificate is not for the host of its address")


def test_what_is_no_handshake_is_left_as_it_is() -> None:
    """A participant that is down, or that dies under a call, has nothing to do with TLS."""
    tls = ParticipantTls(b"", None, None)
    for details in ("", "Socket closed", "failed to connect to all addresses; refused"):
        assert explain_handshake(details, tls) == details
        assert explain_handshake(details, None) == details
