"""The server over TLS: who gets in, who doesn't, and what is refused before it listens."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from amends.v1 import saga_pb2, saga_pb2_grpc
from amends_runtime.api.server import ApiServer
from amends_runtime.config import Config, Server, read_tls
from amends_runtime.engine import Engine, run_engine
from amends_runtime.errors import ConfigurationError
from amends_runtime.tls import ServerTls
from tests.certificates import HOUR, Authority, Issued

_HEALTH: Any = health_pb2_grpc.HealthStub  # whose types know only half of it
_REFLECTION: Any = reflection_pb2_grpc.ServerReflectionStub  # as above

Channel = grpc.aio.Channel


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Who has signed the runtime's certificate, and those of its clients."""
    return Authority(tmp_path)


@pytest.fixture
def strangers(tmp_path: Path) -> Authority:
    """Somebody else."""
    return Authority(tmp_path, "strangers")


@asynccontextmanager
async def served(
    engine: Engine, authority: Authority, *, mutual: bool, **options: Any
) -> AsyncIterator[str]:
    """Serve the runtime once more, with TLS, and give the address."""
    cert, key = authority.issue("runtime")
    client_ca = authority.cert.read_bytes() if mutual else None
    server = ApiServer(
        options.pop("listen", "127.0.0.1:0"),
        engine.store,
        engine.supervisor,
        engine.definitions,
        engine.lanes,
        participants=engine.participants,
        tls=ServerTls(cert.read_bytes(), key.read_bytes(), client_ca),
        **options,
    )
    try:
        yield await server.start()
    finally:
        await server.stop(0)


def channel(address: str, ca: Authority | None, client: Issued | None = None) -> Channel:
    """Open a channel: in plain text if `ca` is None."""
    if ca is None:
        return grpc.aio.insecure_channel(address)
    cert, key = (None, None) if client is None else (p.read_bytes() for p in client)
    credentials = grpc.ssl_channel_credentials(ca.cert.read_bytes(), key, cert)
    return grpc.aio.secure_channel(address, credentials)


async def started(channel: Channel, saga_id: str) -> bool:
    """Tell whether a start gets through; one that does not has done nothing."""
    sagas = saga_pb2_grpc.SagaServiceStub(channel)
    call = sagas.StartSaga(saga_pb2.StartSagaRequest(saga_id=saga_id, definition="order"))
    code = await call.code()
    assert code in {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, await call.details()
    return code is grpc.StatusCode.OK


async def listed(engine: Engine) -> list[str]:
    """Give the ids of all sagas that there are."""
    async with channel(engine.address, None) as plain:
        sagas = saga_pb2_grpc.SagaServiceStub(plain)
        answer = await sagas.ListSagas(saga_pb2.ListSagasRequest())
        return [saga.saga_id for saga in answer.sagas]


# -- who gets in -----------------------------------------------------------------------------------


async def test_with_a_client_ca_only_its_clients_get_in(
    engine: Engine, authority: Authority, strangers: Authority
) -> None:
    """No certificate, a stranger's, an expired one, plain text: nothing of them arrives."""
    expired = authority.issue("expired", ends=-HOUR)
    async with served(engine, authority, mutual=True) as address:
        for number, (ca, client) in enumerate(
            [
                (authority, None),
                (authority, strangers.issue("stranger")),
                (authority, expired),
                (None, None),
            ]
        ):
            async with channel(address, ca, client) as refused:
                assert not await started(refused, f"refused-{number}")
        async with channel(address, authority, authority.issue("client")) as known:
            assert await started(known, "taken")
    assert await listed(engine) == ["taken"]


async def test_health_and_reflection_ask_for_the_certificate_too(
    engine: Engine, authority: Authority
) -> None:
    """The handshake comes before any service."""
    async with served(engine, authority, mutual=True) as address:
        for client, gets_in in ((None, False), (authority.issue("client"), True)):
            async with channel(address, authority, client) as asking:
                check = _HEALTH(asking).Check(health_pb2.HealthCheckRequest())
                request = reflection_pb2.ServerReflectionRequest(list_services="")
                reflected = _REFLECTION(asking).ServerReflectionInfo(iter([request]))
                for answer in (check, reflected.read()):
                    if gets_in:
                        assert await answer
                        continue
                    with pytest.raises(grpc.aio.AioRpcError) as raised:
                        await answer
                    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_without_a_client_ca_nobody_is_asked_who_he_is(
    engine: Engine, authority: Authority, strangers: Authority
) -> None:
    """Encrypted all the same: plain text is refused, and so is the server by who trusts others."""
    async with served(engine, authority, mutual=False) as address:
        async with channel(address, None) as plain:
            assert not await started(plain, "plain")
        async with channel(address, strangers) as distrustful:
            assert not await started(distrustful, "distrustful")
        async with channel(address, authority) as encrypted:
            assert await started(encrypted, "encrypted")
    assert await listed(engine) == ["encrypted"]


async def test_a_chain_is_sent_as_a_whole(
    tmp_path: Path, engine: Engine, authority: Authority
) -> None:
    """A client that knows only the authority at the end of it is content, and the other way."""
    between = Authority(tmp_path, "between", issuer=authority)
    cert, key = between.issue("runtime")
    tls = ServerTls(cert.read_bytes(), key.read_bytes(), authority.cert.read_bytes())
    server = ApiServer(
        "127.0.0.1:0",
        engine.store,
        engine.supervisor,
        engine.definitions,
        engine.lanes,
        participants=engine.participants,
        tls=tls,
    )
    try:
        async with channel(await server.start(), authority, between.issue("client")) as known:
            assert await started(known, "taken")
    finally:
        await server.stop(0)


# -- addresses -------------------------------------------------------------------------------------


async def test_other_machines_may_come_if_they_say_who_they_are(
    engine: Engine, authority: Authority
) -> None:
    """With a client CA nobody has to insist, and there is nothing to warn of."""
    with structlog.testing.capture_logs() as logs:
        async with served(engine, authority, mutual=True, listen="0.0.0.0:0") as address:
            port = address.rpartition(":")[2]
            async with channel(f"127.0.0.1:{port}", authority, authority.issue("client")) as known:
                assert await started(known, "taken")
    assert [entry for entry in logs if entry["log_level"] == "warning"] == []


async def test_encryption_alone_does_not_open_the_door_to_other_machines(
    engine: Engine, authority: Authority
) -> None:
    """Whoever reaches the port could start sagas, unseen by others: that must be meant."""
    with pytest.raises(ConfigurationError) as refused:
        async with served(engine, authority, mutual=False, listen="0.0.0.0:0"):
            pass
    assert "encrypts, but lets everybody in: give tls_client_ca" in str(refused.value)
    assert "--insecure" in str(refused.value)
    with structlog.testing.capture_logs() as logs:
        async with served(engine, authority, mutual=False, listen="0.0.0.0:0", insecure=True):
            pass
    [warning] = [entry for entry in logs if entry["log_level"] == "warning"]
    assert "no client has to prove who it is" in warning["event"]
    assert warning["encrypted"] is True


# -- the whole runtime -----------------------------------------------------------------------------


async def test_a_runtime_whose_files_are_wrong_does_not_start(
    config: Config, tmp_path: Path
) -> None:
    """It says so before it makes a database."""
    database = tmp_path / "untouched.db"
    server = Server(
        listen="127.0.0.1:0", database=str(database), tls_cert="/nope.pem", tls_key="/nope.key"
    )
    with pytest.raises(ConfigurationError, match=r"server\.tls_cert: /nope\.pem: there is no such"):
        async with run_engine(config.model_copy(update={"server": server})):
            pass
    assert not database.exists()


async def test_a_runtime_whose_certificate_expired_starts_and_says_so(
    config: Config, tmp_path: Path, authority: Authority
) -> None:
    """Its sagas go on without clients."""
    cert, key = authority.issue("runtime", ends=-HOUR)
    server = Server(
        listen="127.0.0.1:0",
        database=str(tmp_path / "tls.db"),
        tls_cert=str(cert),
        tls_key=str(key),
    )
    config = config.model_copy(update={"server": server})
    with structlog.testing.capture_logs() as logs:
        async with run_engine(config) as engine, channel(engine.address, authority) as strict:
            assert not await started(strict, "refused")
    [remark] = read_tls(config).remarks
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == [remark]
