"""A participant that is called over TLS stays so, wherever an operator moves it."""

from pathlib import Path

import amends
from amends_runtime.config import Config, Participant
from amends_runtime.engine import run_engine
from tests.acceptance.world import until
from tests.api.shop import ORDER, Shop
from tests.certificates import Authority


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
