"""The server around the handlers: health, reflection, TLS, ports, and its end."""

import asyncio
import socket
import threading
from pathlib import Path

import anyio
import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from amends import Call, ListenError, TlsFiles, Verb, serve
from amends.server import is_loopback
from tests.certificates import Authority
from tests.participants.asking import CHANNEL_OPTIONS, Asker, asking, call_message, health_of
from tests.participants.ledger import Ledger

SERVICE = "amends.v1.ParticipantService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_serves_and_then_does_not(ledger: Ledger) -> None:
    """Its watchers see the drain, and do not hold it up."""
    async with serve(ledger.participant) as server, asking(server.address) as asker:
        health = health_of(asker)
        for service in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=service)
            assert (await health.Check(request)).status == SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == SERVING
        draining = asyncio.ensure_future(server.drain())
        assert (await watch.read()).status == NOT_SERVING
        await draining
        await server.wait_closed()
        assert server.is_clean
        code, _ = await asker.status(call_message(Verb.EXECUTE))
        assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_drain_lets_handlers_end_and_takes_no_new_calls(ledger: Ledger) -> None:
    """The call under way is answered, the next one is not taken."""
    reached, opened = asyncio.Event(), asyncio.Event()

    @ledger.participant.execute("wait", compensatable=False)
    async def wait(call: Call) -> None:
        reached.set()
        await opened.wait()

    async with serve(ledger.participant) as server, asking(server.address) as asker:
        health = health_of(asker)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        await watch.read()
        under_way = asyncio.ensure_future(asker.say(call_message(Verb.EXECUTE, action="wait")))
        await reached.wait()
        draining = asyncio.ensure_future(server.drain())
        assert (await watch.read()).status == NOT_SERVING
        code, details = await asker.status(call_message(Verb.EXECUTE, saga_id="late"))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in details
        opened.set()
        assert await under_way == "done"
        await draining
    assert ledger.ran == []


async def test_a_handler_that_outlives_the_grace_is_cancelled(ledger: Ledger) -> None:
    """An async handler is rolled back; the server is closed all the same."""
    reached = asyncio.Event()

    @ledger.participant.execute("hang", compensatable=False)
    async def hang(call: Call) -> None:
        reached.set()
        await asyncio.Event().wait()

    async with serve(ledger.participant, grace_s=0) as server, asking(server.address) as asker:
        asked = asyncio.ensure_future(asker.status(call_message(Verb.EXECUTE, action="hang")))
        await reached.wait()
        await server.drain()
        assert server.is_clean
        await asked


async def test_a_cancelled_scope_around_the_server_drains_it(ledger: Ledger) -> None:
    """Cancellation means shutdown: the barrier is closed and can be opened again."""
    with anyio.CancelScope() as scope:
        async with serve(ledger.participant) as server:
            scope.cancel()
            await anyio.sleep_forever()
    await server.wait_closed()
    async with ledger.served() as asker:
        assert await asker.say(call_message(Verb.EXECUTE)) == "done"


async def test_a_def_handler_that_never_returns_is_left_behind(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread cannot be ended; the server says so and closes without it."""
    monkeypatch.setattr("amends.server.CLOSE_S", 0.05)
    reached, opened = threading.Event(), threading.Event()

    @ledger.participant.execute("hang", compensatable=False)
    def hang(call: Call) -> None:
        reached.set()
        opened.wait()

    async with serve(ledger.participant, grace_s=0) as server, asking(server.address) as asker:
        asked = asyncio.ensure_future(asker.status(call_message(Verb.EXECUTE, action="hang")))
        await asyncio.to_thread(reached.wait)
        await server.drain()
        assert not server.is_clean
        assert "a handler does not return" in caplog.text
        opened.set()
        await asked


async def test_reflection_describes_the_service(ledger: Ledger) -> None:
    """A client that has only the address finds methods and messages."""
    async with serve(ledger.participant) as server:

        def describe() -> list[str]:
            with grpc.insecure_channel(server.address) as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                assert SERVICE in database.get_services()
                service = DescriptorPool(database).FindServiceByName(SERVICE)
                return [method.name for method in service.methods]

        methods = await asyncio.to_thread(describe)
    assert methods == ["Prepare", "Execute", "Compensate", "Exchange"]


async def test_mutual_tls(ledger: Ledger, tmp_path: Path) -> None:
    """With the client's certificate calls are answered; without it, or in plain text, none is."""
    authority = Authority(tmp_path)
    tls = TlsFiles(*authority.issue("payments"), client_ca=authority.cert)
    ca = authority.cert.read_bytes()
    cert, key = (path.read_bytes() for path in authority.issue("client"))
    known = grpc.ssl_channel_credentials(ca, key, cert)
    unknown = grpc.ssl_channel_credentials(ca)
    async with serve(ledger.participant, tls=tls) as server:
        address = server.address
        for credentials, answered in [(known, True), (unknown, False)]:
            async with grpc.aio.secure_channel(address, credentials, CHANNEL_OPTIONS) as channel:
                asker = Asker(channel)
                if answered:
                    assert await asker.say(call_message(Verb.EXECUTE)) == "done"
                else:
                    code, _ = await asker.status(call_message(Verb.EXECUTE))
                    assert code is grpc.StatusCode.UNAVAILABLE
        async with asking(address) as plain:
            code, _ = await plain.status(call_message(Verb.EXECUTE))
            assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_busy_port_is_one_clear_line(ledger: Ledger, tmp_path: Path) -> None:
    """The second server does not share the port silently; the barrier it opened is closed again."""
    second = Ledger(tmp_path / "second.db")
    async with serve(ledger.participant) as server:
        with pytest.raises(ListenError) as caught:
            async with serve(second.participant, server.address):
                pass
        assert f"cannot listen on {server.address}: Address already in use" in str(caught.value)
        assert "\n" not in str(caught.value)
    async with second.served() as asker:
        assert await asker.say(call_message(Verb.EXECUTE)) == "done"


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1:http!", "127.0.0.1:99999", ":0", ""])
def test_what_is_no_address_is_one_clear_line(ledger: Ledger, listen: str) -> None:
    """With an example."""
    with pytest.raises(ListenError, match="write host:port") as caught:
        serve(ledger.participant, listen, insecure=True)
    assert listen in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("listen", ["nowhere.invalid:0", "unix:missing/payments.sock"])
async def test_an_address_of_others_is_one_clear_line(ledger: Ledger, listen: str) -> None:
    """With the system's reason."""
    with pytest.raises(ListenError, match="cannot listen on") as caught:
        async with serve(ledger.participant, listen, insecure=True):
            pass
    assert listen in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "10.0.0.1:0", "payments.example:0"])
def test_off_the_loopback_plain_text_must_be_meant(ledger: Ledger, listen: str) -> None:
    """Without TLS it needs insecure=True."""
    with pytest.raises(ListenError, match="insecure=True"):
        serve(ledger.participant, listen)
    serve(ledger.participant, listen, insecure=True)


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:0", "127.8.8.8:1", "localhost:0", "[::1]:5", "unix:a"]
)
def test_the_loopback_is_known(listen: str) -> None:
    """In all of its spellings."""
    assert is_loopback(listen)


async def test_a_unix_socket_is_an_address(ledger: Ledger, tmp_path: Path) -> None:
    """For participants on the same machine."""
    listen = f"unix:{tmp_path / 'payments.sock'}"
    async with serve(ledger.participant, listen) as server, asking(server.address) as asker:
        assert await asker.say(call_message(Verb.EXECUTE)) == "done"


def test_a_missing_tls_file_is_named(ledger: Ledger, tmp_path: Path) -> None:
    """With the system's reason."""
    cert = Authority(tmp_path).issue("payments").cert
    missing = tmp_path / "missing.pem"
    with pytest.raises(ListenError, match=r"missing\.pem cannot be read: No such file"):
        serve(ledger.participant, tls=TlsFiles(cert, missing))


async def test_tls_files_that_are_none_are_told(ledger: Ledger, tmp_path: Path) -> None:
    """What gRPC refuses becomes our line."""
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    with pytest.raises(ListenError, match="TLS files"):
        async with serve(ledger.participant, tls=TlsFiles(nonsense, nonsense)):
            pass


async def test_the_port_is_free_again(ledger: Ledger) -> None:
    """After the drain anybody may listen there."""
    async with serve(ledger.participant) as server:
        port = int(server.address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
