"""A participant that is called over TLS stays so, wherever an operator moves it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog

import amends
from amends_runtime.config import Config, Participant
from amends_runtime.engine import Engine, run_engine
from tests.acceptance.world import until
from tests.api.shop import ORDER, Shop
from tests.certificates import Authority

TO_SHIP = amends.Definition("letter").pivot("ship", "shop", "ship")


async def move(client: amends.Client, address: str) -> None:
    """Point the participant to an address, as an operator does."""
    await client.put_participant("shop", address, author="op", reason="moved")


async def test_an_operator_moves_no_participant_into_plain_text(
    tmp_path: Path, config: Config, shop: Shop
) -> None:
    """The order waits while it is asked for at an address without TLS, and ends at one with it."""
    authority = Authority(tmp_path)
    tls = amends.TlsFiles(*authority.issue("shop"), client_ca=authority.cert)
    cert, key = authority.issue("runtime")
    secured = Shop()  # of its own: `shop` is served in plain text
    participant = Participant(
        address=shop.address, tls_ca=str(authority.cert), tls_cert=str(cert), tls_key=str(key)
    )
    config = config.model_copy(update={"participants": {"shop": participant}})
    async with (
        amends.serve(secured.participant(), tls=tls) as server,
        run_engine(config, [ORDER]) as engine,
        amends.Client(engine.address) as client,
    ):
        await move(client, server.address)
        first = await client.start("order", saga_id="s-1")
        assert (await first.result(timeout_s=60)).completed

        await move(client, shop.address)
        second = await client.start("order", saga_id="s-2")

        async def is_told() -> bool:
            [lane] = await client.participants()
            return "does not speak TLS" in lane.last_error

        await until(is_told, "the handshake to fail")
        assert shop.calls == []

        await move(client, server.address)
        assert (await second.result(timeout_s=60)).completed
    assert {call.saga_id for call in secured.calls} == {"s-1", "s-2"}


# -- once its section is gone ----------------------------------------------------------------------


class Encrypted:
    """A shop that is served over TLS, and a runtime's configurations with it and without."""

    def __init__(self, folder: Path, plain: Config) -> None:
        authority = Authority(folder)
        self.tls = amends.TlsFiles(*authority.issue("shop"))
        self.authority = authority
        self.shop = Shop()
        self.address = ""
        self._plain = plain

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        """Serves it for the length of the block."""
        async with amends.serve(self.shop.participant(), tls=self.tls, grace_s=0) as server:
            self.address = server.address
            yield

    def named(self, address: str = "127.0.0.1:1") -> Config:
        """With its section."""
        participant = Participant(address=address, tls_ca=str(self.authority.cert))
        return self._plain.model_copy(update={"participants": {"shop": participant}})

    def in_plain_text(self, address: str) -> Config:
        """With a section that has no TLS."""
        shop = Participant(address=address)
        return self._plain.model_copy(update={"participants": {"shop": shop}})

    @property
    def unnamed(self) -> Config:
        """Without a section."""
        return self._plain.model_copy(update={"participants": {}})


@pytest.fixture
async def encrypted(tmp_path: Path, config: Config) -> AsyncIterator[Encrypted]:
    """The shop with TLS; `shop` is one without."""
    encrypted = Encrypted(tmp_path, config)
    async with encrypted.served():
        yield encrypted


@asynccontextmanager
async def a_runtime(config: Config) -> AsyncIterator[tuple[Engine, amends.Client]]:
    """A runtime that knows the order, and a client of it."""
    async with run_engine(config) as engine, amends.Client(engine.address) as client:
        yield engine, client


async def test_a_participant_of_tls_waits_for_its_files(encrypted: Encrypted, shop: Shop) -> None:
    """An operator holds it, and its section is gone: nothing leaves in plain text, and it is said.

    It goes on when its files are named again.
    """
    async with a_runtime(encrypted.named()) as (_, client):
        await move(client, shop.address)  # there is no TLS, and nothing is started yet
        await client.register(TO_SHIP)
    with structlog.testing.capture_logs() as logs:
        async with a_runtime(encrypted.unnamed) as (_, client):
            [warning] = [one for one in logs if one["event"] == "participant_lacks_tls"]
            assert warning["log_level"] == "warning"
            assert "tls_ca under [participants.shop]" in warning["hint"]
            await client.start("letter", saga_id="s-1")

            async def waits() -> bool:
                [lane] = await client.participants()
                return lane.calls_waiting == 1

            await until(waits, "the call to wait in its lane")
            [lane] = await client.participants()
            assert (lane.address, lane.transport, lane.by_operator) == (shop.address, "", True)
            assert "tls_ca under [participants.shop]" in lane.last_error
            with pytest.raises(amends.WrongState, match="called in plain text") as refusal:
                await move(client, shop.address)
            assert refusal.value.reason == "TLS_FILES_MISSING"
    assert shop.calls == []
    async with a_runtime(encrypted.named()) as (_, client):
        await move(client, encrypted.address)
        assert (await client.wait("s-1", timeout_s=60)).completed
    assert shop.calls == []


async def test_a_section_that_lost_its_tls_is_no_way_around(
    encrypted: Encrypted, shop: Shop
) -> None:
    """As long as the operator's word stands; taken back, the configuration's counts."""
    async with a_runtime(encrypted.named()) as (_, client):
        await move(client, shop.address)
        await client.register(TO_SHIP)
        await client.start("letter", saga_id="s-1")
    async with a_runtime(encrypted.in_plain_text(shop.address)) as (_, client):
        [lane] = await client.participants()
        assert lane.transport == ""
        await client.remove_participant("shop", author="op", reason="no TLS any more")
        assert (await client.wait("s-1", timeout_s=60)).completed


async def test_a_participant_without_section_is_added_anew_in_plain_text(
    encrypted: Encrypted, shop: Shop
) -> None:
    """Two words of an operator's, and none of them by chance."""
    async with a_runtime(encrypted.named()) as (_, client):
        await move(client, encrypted.address)
        await client.register(TO_SHIP)
    async with a_runtime(encrypted.unnamed) as (_, client):
        await client.remove_participant("shop", author="op", reason="no TLS any more")
        await move(client, shop.address)
        assert (await (await client.start("letter")).result(timeout_s=60)).completed
    assert len(shop.calls) == 1


async def test_a_participant_that_got_its_tls_later_keeps_it(
    encrypted: Encrypted, shop: Shop
) -> None:
    """Registered in plain text, then given TLS by the configuration: that is kept, too."""
    async with a_runtime(encrypted.unnamed) as (_, client):
        await move(client, shop.address)
        await client.register(TO_SHIP)
    async with a_runtime(encrypted.named()) as (engine, client):

        async def is_kept() -> bool:
            return all(one.tls for one in await engine.store.participants())

        await until(is_kept, "the start to write down that it is called with TLS")
        assert [one.words.author for one in await engine.store.audit(9)] == ["amends serve", "op"]
    async with a_runtime(encrypted.unnamed) as (_, client):
        [lane] = await client.participants()
        assert (lane.address, lane.transport) == (shop.address, "")


async def test_a_participant_of_tls_is_on_no_unix_socket(encrypted: Encrypted) -> None:
    """There is no host that a certificate could name: it stays where it is."""
    async with a_runtime(encrypted.named(encrypted.address)) as (_, client):
        with pytest.raises(amends.InvalidRequest, match="Unix sockets have none"):
            await move(client, "unix:/run/shop.sock")
        [lane] = await client.participants()
        assert (lane.address, lane.by_operator) == (encrypted.address, False)
