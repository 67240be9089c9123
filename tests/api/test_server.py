"""The server: health, reflection, addresses, and the way down."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest
import structlog
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.internal import api_implementation
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from amends.v1 import operator_pb2, saga_pb2, saga_pb2_grpc, types_pb2
from amends_runtime.actors.supervisor import SagaView
from amends_runtime.api.server import SERVICES, ApiServer, _check_protobuf, check_listen
from amends_runtime.config import Config, Server
from amends_runtime.engine import Engine, run_engine
from amends_runtime.errors import ConfigurationError
from tests.api.refusals import read, refused
from tests.api.shop import Shop
from tests.api.stubs import Sagas

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_HEALTH: Any = health_pb2_grpc.HealthStub  # whose types know only half of it
_REFLECTION: Any = reflection_pb2_grpc.ServerReflectionStub  # as above


@pytest.fixture
async def serve(engine: Engine) -> AsyncIterator[Callable[..., ApiServer]]:
    """Makes further servers on the same runtime; they are stopped at the end."""
    async with AsyncExitStack() as stack:

        def serve(listen: str = "127.0.0.1:0", **options: Any) -> ApiServer:
            server = ApiServer(
                listen,
                engine.store,
                engine.supervisor,
                engine.definitions,
                engine.lanes,
                participants=engine.participants,
                **options,
            )
            stack.push_async_callback(server.stop, 0)
            return server

        yield serve


Serve = Callable[..., ApiServer]


# -- any client ------------------------------------------------------------------------------------


async def test_a_client_needs_nothing_but_the_generated_stubs(engine: Engine) -> None:
    """Start, wait, list, read the history, be refused: with plain gRPC."""
    async with grpc.aio.insecure_channel(engine.address) as channel:
        stub = saga_pb2_grpc.SagaServiceStub(channel)
        started = await stub.StartSaga(saga_pb2.StartSagaRequest(saga_id="s", definition="order"))
        assert started.saga.saga_id == "s"
        waited = await stub.WaitSaga(saga_pb2.WaitSagaRequest(saga_id="s", timeout_ms=60_000))
        assert waited.ended
        listed = await stub.ListSagas(saga_pb2.ListSagasRequest())
        assert [saga.saga_id for saga in listed.sagas] == ["s"]
        history = await stub.GetHistory(saga_pb2.GetHistoryRequest(saga_id="s"))
        assert history.records[-1].saga_ended.state == types_pb2.SAGA_STATE_COMPLETED
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.CancelSaga(saga_pb2.CancelSagaRequest(saga_id="s", reason="x"))
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION


class Reflected:
    """A client that knows nothing beforehand: it asks the server what there is."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._stub: Any = _REFLECTION(channel)
        self._pool = descriptor_pool.DescriptorPool()
        self._known: set[str] = set()

    async def services(self) -> list[str]:
        """Names of all services."""
        answer = await self._ask(reflection_pb2.ServerReflectionRequest(list_services=""))
        return [service.name for service in answer.list_services_response.service]

    async def service(self, name: str) -> ServiceDescriptor:
        """A service, with all files that it needs."""
        answer = await self._ask(
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
        )
        await self._learn(answer)
        return self._pool.FindServiceByName(name)

    async def call(self, method: MethodDescriptor, **fields: Any) -> dict[str, Any]:
        """Calls a unary method with messages made from what was learned."""
        request = message_factory.GetMessageClass(method.input_type)
        response = message_factory.GetMessageClass(method.output_type)
        call = self._channel.unary_unary(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        answer: Message = await call(json_format.ParseDict(fields, request()))
        return json_format.MessageToDict(answer)

    async def _learn(self, answer: reflection_pb2.ServerReflectionResponse) -> None:
        for data in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            if file.name in self._known:
                continue
            self._known.add(file.name)
            for dependency in file.dependency:
                await self._learn(
                    await self._ask(
                        reflection_pb2.ServerReflectionRequest(file_by_filename=dependency)
                    )
                )
            self._pool.Add(file)

    async def _ask(
        self, request: reflection_pb2.ServerReflectionRequest
    ) -> reflection_pb2.ServerReflectionResponse:
        answer = await self._stub.ServerReflectionInfo(iter([request])).read()
        assert isinstance(answer, reflection_pb2.ServerReflectionResponse)
        return answer


async def test_a_client_needs_nothing_but_reflection(channel: grpc.aio.Channel) -> None:
    """What grpcurl does: list, describe, call, with no generated code at all."""
    client = Reflected(channel)
    assert set(await client.services()) == {
        "amends.v1.SagaService",
        "amends.v1.OperatorService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    sagas = await client.service("amends.v1.SagaService")
    answer = await client.call(
        sagas.methods_by_name["StartSaga"], sagaId="s-1", definition="order", waitMs="60000"
    )
    assert (answer["ended"], answer["saga"]["state"]) == (True, "SAGA_STATE_COMPLETED")
    operator = await client.service("amends.v1.OperatorService")
    answer = await client.call(operator.methods_by_name["ListDefinitions"])
    assert [one["definition"]["name"] for one in answer["definitions"]] == ["order"]


UNAVAILABLE_METHODS = {
    "SagaService": {"SignalSaga"},
    "OperatorService": {
        "SetBreaker",
        "SkipStep",
        "ForceCompensation",
        "PauseSaga",
        "ResumeSaga",
        "ResolveStep",
        "RunBulk",
    },
}
UNAVAILABLE = [
    pytest.param(method, id=method.name)
    for file in (saga_pb2.DESCRIPTOR, operator_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
    if method.name in UNAVAILABLE_METHODS[service.name]
]


@pytest.mark.parametrize("method", UNAVAILABLE)
async def test_what_this_version_has_not_says_so(
    channel: grpc.aio.Channel, method: MethodDescriptor
) -> None:
    """UNIMPLEMENTED with a reason and what to use instead, for unary methods and streams."""
    request = message_factory.GetMessageClass(method.input_type)
    path = f"/{method.containing_service.full_name}/{method.name}"
    make = channel.unary_stream if method.server_streaming else channel.unary_unary
    call: Any = make(path, request_serializer=request.SerializeToString)(request())
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await (call.read() if method.server_streaming else call)
    error = read(raised.value)
    assert (error.code, error.reason) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_AVAILABLE")
    assert "in this version" in error.message


# -- errors of ours --------------------------------------------------------------------------------


async def test_a_bug_is_internal_with_an_id_and_no_text(
    engine: Engine, sagas: Sagas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller gets an id to report, the log has the traceback under it."""

    async def buggy(saga_id: str) -> None:
        raise ValueError("secret")

    monkeypatch.setattr(engine.supervisor, "view", buggy)
    with structlog.testing.capture_logs() as logs:
        error = await refused(sagas.GetSaga(saga_pb2.GetSagaRequest(saga_id="s-1")))
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in repr(error)
    (entry,) = [entry for entry in logs if entry["event"] == "request_failed"]
    assert entry["incident"] == error.metadata["incident"]
    assert entry["method"] == "GetSaga"
    assert isinstance(entry["exc_info"], ValueError)


# -- health ----------------------------------------------------------------------------------------


async def test_health_says_serving(channel: grpc.aio.Channel) -> None:
    """The server as a whole and each service; an unknown one is not found."""
    stub = _HEALTH(channel)
    for service in ("", *SERVICES):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == SERVING
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Check(health_pb2.HealthCheckRequest(service="amends.v2.SagaService"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


# -- the way down ----------------------------------------------------------------------------------


async def test_a_stopping_server_refuses_starts_and_answers_the_rest(
    engine: Engine, serve: Serve, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Health first; no new starts; what is there can still be read; held replies are let go."""
    waits = anyio.Semaphore(0)
    wait = engine.supervisor.wait

    async def counted(*arguments: Any) -> SagaView:
        waits.release()
        return await wait(*arguments)

    monkeypatch.setattr(engine.supervisor, "wait", counted)
    held = shop.hold("reserve")
    server = serve()
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        sagas = saga_pb2_grpc.SagaServiceStub(channel)
        await sagas.StartSaga(saga_pb2.StartSagaRequest(saga_id="s-1", definition="order"))
        await held.begun.wait()
        waiting = sagas.WaitSaga(saga_pb2.WaitSagaRequest(saga_id="s-1"))
        starting = sagas.StartSaga(
            saga_pb2.StartSagaRequest(saga_id="s-2", definition="order", wait_ms=60_000)
        )
        await waits.acquire()
        await waits.acquire()

        await server.refuse_new()

        health = _HEALTH(channel)
        for service in ("", *SERVICES):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == NOT_SERVING
        for call in (
            waiting,
            sagas.WaitSaga(saga_pb2.WaitSagaRequest(saga_id="s-1")),
            sagas.StartSaga(saga_pb2.StartSagaRequest(saga_id="s-3", definition="order")),
        ):
            error = await refused(call)
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
            assert "same id" in error.message
        assert not (await starting).ended  # it is started, durably, and the caller knows its id
        listed = await sagas.ListSagas(saga_pb2.ListSagasRequest())
        assert [saga.saga_id for saga in listed.sagas] == ["s-2", "s-1"]


async def test_a_stopping_server_ends_streams_of_waits(serve: Serve, shop: Shop) -> None:
    """The client is told why; when the runtime is back it sends its open ids again."""
    shop.hold("reserve")
    server = serve()
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        sagas = saga_pb2_grpc.SagaServiceStub(channel)
        await sagas.StartSaga(saga_pb2.StartSagaRequest(saga_id="s-1", definition="order"))
        stream: Any = sagas.AwaitSagas()
        await stream.write(saga_pb2.AwaitSagasRequest(add=["s-1", "nobody"]))
        assert (await stream.read()).ends[0].saga_id == "nobody"
        await server.refuse_new()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stream.read()
        assert read(raised.value).reason == "SHUTTING_DOWN"


async def test_a_stop_waits_for_the_handlers(
    engine: Engine, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that cleans up after its cancellation has left before `stop` returns."""
    inside = anyio.Event()
    left: list[str] = []

    async def slow(saga_id: str) -> None:
        inside.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.cancel_shielded_checkpoint()
            left.append(saga_id)

    monkeypatch.setattr(engine.supervisor, "view", slow)
    server = serve()
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        await server.refuse_new()  # who asks now is still answered, and waited for
        call = saga_pb2_grpc.SagaServiceStub(channel).GetSaga(
            saga_pb2.GetSagaRequest(saga_id="s-1")
        )
        await inside.wait()
        await server.stop(0)
        assert left == ["s-1"]
        with pytest.raises(grpc.aio.AioRpcError):
            await call


async def test_watchers_of_health_hold_up_no_stop(serve: Serve) -> None:
    """Who watches sees SERVING, and then the end: at once, not after the grace."""
    server = serve()
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        watch = _HEALTH(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        with anyio.fail_after(30):
            await server.stop(3_600)


# -- addresses -------------------------------------------------------------------------------------


async def test_a_taken_port_is_refused_in_one_line(engine: Engine, serve: Serve) -> None:
    """The port is not shared silently; the address, the reason and the way out are named."""
    with pytest.raises(ConfigurationError) as refused_:
        await serve(engine.address).start()
    assert str(refused_.value).startswith(
        f"cannot listen on {engine.address}: another process listens there; choose another"
    )
    assert "\n" not in str(refused_.value)


async def test_a_name_is_taken_if_one_of_its_addresses_is(serve: Serve) -> None:
    """A client of localhost must not find another process behind one of its addresses."""
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(ConfigurationError, match="another process listens there"),
    ):
        await serve(f"localhost:{other.getsockname()[1]}").start()


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"], ids=["any IPv4", "any IPv6"])
async def test_other_machines_are_kept_out(serve: Serve, listen: str) -> None:
    """Without encryption and authentication only this machine is served."""
    with pytest.raises(ConfigurationError, match="can be reached from other machines"):
        await serve(listen).start()


async def test_whoever_insists_is_served(serve: Serve) -> None:
    """The network around may see to it."""
    address = await serve("0.0.0.0:0", insecure=True).start()
    port = address.rpartition(":")[2]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = await _HEALTH(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == SERVING


async def test_a_host_that_nobody_knows_is_refused(serve: Serve) -> None:
    """In one line, with the name."""
    with pytest.raises(ConfigurationError, match=r"'nobody\.invalid' is not known"):
        await serve("nobody.invalid:0").start()


async def test_an_address_of_another_machine_is_refused(serve: Serve) -> None:
    """TEST-NET-1 is nobody's."""
    with pytest.raises(ConfigurationError, match="no such address"):
        await serve("192.0.2.1:0", insecure=True).start()


async def test_a_unix_socket(serve: Serve, tmp_path: Path) -> None:
    """It serves; a second server is refused; one that was left behind is taken over."""
    listen = f"unix:{tmp_path}/api.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(f"{tmp_path}/api.sock")
    assert await serve(listen).start() == listen
    async with grpc.aio.insecure_channel(listen) as channel:
        answer = await _HEALTH(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == SERVING
    with pytest.raises(ConfigurationError, match="another process listens there"):
        await serve(listen).start()


async def test_a_place_where_no_socket_can_be_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the reason and a mend that fits, and gRPC's own complaint does not get out."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path, reason in (
        (f"{tmp_path}/nope/api.sock", f"there is no folder {tmp_path}/nope; make it first"),
        (f"{tmp_path}/file", "there is something that is not a socket; choose another path"),
        ("/proc/api.sock", "choose another path"),
    ):
        with pytest.raises(ConfigurationError) as refused_:
            await check_listen(f"unix:{path}", insecure=False)
        assert reason in str(refused_.value)
        assert "port" not in str(refused_.value)
    assert capfd.readouterr() == ("", "")


def test_only_the_fast_protobuf_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pure-Python one is refused with what to unset."""
    monkeypatch.setattr(api_implementation, "Type", lambda: "python")
    with pytest.raises(ConfigurationError, match="PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"):
        _check_protobuf()


async def test_a_runtime_whose_port_is_taken_does_not_start(
    engine: Engine, config: Config, tmp_path: Path
) -> None:
    """The same one line, from the whole runtime; its store is free again afterwards."""
    server = Server(listen=engine.address, database=str(tmp_path / "second.db"))
    second = config.model_copy(update={"server": server})
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="another process listens there"):
            async with run_engine(second):
                pass
