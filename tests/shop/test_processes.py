"""Services as processes: how they start, go wrong, are killed, come back, and end."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest

from amends.v1 import participant_pb2, participant_pb2_grpc, types_pb2
from shop.audit import databases_in, effects_of
from shop.faults import count_faults
from shop.processes import Process, Processes, ProcessFailed
from shop.server import faults_file
from shop.switches import write_switches
from tests.shop.calls import order_input
from tests.shop.gone import is_gone

BOUND_S = 60.0


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[Processes]:
    """Give an empty folder's processes, and end them."""
    async with Processes(tmp_path) as processes:
        yield processes


@asynccontextmanager
async def stub_of(
    process: Process,
) -> AsyncIterator[participant_pb2_grpc.ParticipantServiceAsyncStub]:
    """Speak to a service as the runtime does."""
    async with grpc.aio.insecure_channel(
        process.address, options=[("grpc.enable_retries", 0)]
    ) as channel:
        yield participant_pb2_grpc.ParticipantServiceStub(channel)


def place(saga_id: str = "saga-1", *, attempt: int = 1) -> participant_pb2.ExecuteRequest:
    """Make the request to place an order."""
    return participant_pb2.ExecuteRequest(
        call=participant_pb2.Call(
            idempotency_key=f"store/{saga_id}/place/execute/1",
            store_id="store",
            saga_id=saga_id,
            definition="order",
            step="place",
            action="place",
            verb=types_pb2.VERB_EXECUTE,
            round=1,
            attempt=attempt,
            input=types_pb2.Payload(
                data=json.dumps(order_input()).encode(), content_type="application/json"
            ),
        )
    )


async def ask(process: Process, request: participant_pb2.ExecuteRequest) -> str:
    """Send one request; gives the kind of outcome, or the name of the gRPC status."""
    async with stub_of(process) as stub:
        try:
            reply = await stub.Execute(request, timeout=BOUND_S, wait_for_ready=False)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return str(reply.outcome.WhichOneof("outcome"))


def effects(processes: Processes, saga_id: str = "saga-1") -> list[str]:
    """Name the effects of a saga in the orders' ledger."""
    database = processes.database("orders")
    of_service = dict.fromkeys(databases_in(processes.folder), database)
    # Only one service runs here; the auditor's reader wants four databases.
    found = {(each.seq, each.effect) for each in effects_of(of_service, saga_id)}
    return [effect for _, effect in sorted(found)]


def switch(processes: Processes, orders: Mapping[str, object]) -> None:
    """Set the switches of the orders."""
    write_switches(processes.switches, {"orders": orders})


async def test_a_repeated_call_has_one_effect(processes: Processes) -> None:
    """A service answers a repeat as it answered the first, and the ledger has one line."""
    [orders] = await processes.start_services(["orders"])
    assert await ask(orders, place()) == "done"
    assert await ask(orders, place(attempt=2)) == "done"
    assert effects(processes) == ["place"]


async def test_a_lost_reply_leaves_the_effect(processes: Processes) -> None:
    """The caller sees UNAVAILABLE, the effect is there, and the next attempt is told of it."""
    switch(processes, {"place": {"lose_reply": {"next": 1}}})
    [orders] = await processes.start_services(["orders"])
    assert await ask(orders, place()) == "UNAVAILABLE"
    assert effects(processes) == ["place"]
    assert await ask(orders, place(attempt=2)) == "done"
    assert effects(processes) == ["place"]
    assert count_faults(faults_file(processes.database("orders"))) == {"place lose_reply": 1}


async def test_a_failure_before_the_effect_leaves_nothing(processes: Processes) -> None:
    """The caller sees UNAVAILABLE, and nothing has happened."""
    switch(processes, {"place": {"fail_before": {"next": 1}}})
    [orders] = await processes.start_services(["orders"])
    assert await ask(orders, place()) == "UNAVAILABLE"
    assert effects(processes) == []
    assert await ask(orders, place(attempt=2)) == "done"


async def test_a_declined_order_stays_declined(processes: Processes) -> None:
    """A refusal is definite: the barrier keeps it when the switch is long off."""
    switch(processes, {"place": {"decline": 1}})
    [orders] = await processes.start_services(["orders"])
    assert await ask(orders, place()) == "rejected"
    switch(processes, {})
    assert await ask(orders, place(attempt=2)) == "rejected"
    assert await ask(orders, place("saga-2")) == "done"
    assert effects(processes) == []


async def test_a_slow_call_that_was_given_up_has_no_effect(processes: Processes) -> None:
    """A caller whose deadline passes while the service dawdles finds nothing done."""
    switch(processes, {"place": {"slow": 1, "slow_s": 600}})
    [orders] = await processes.start_services(["orders"])
    async with stub_of(orders) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.Execute(place(), timeout=0.2)
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    switch(processes, {})
    assert await ask(orders, place(attempt=2)) == "done"
    assert effects(processes) == ["place"]


async def test_down_means_down(processes: Processes) -> None:
    """Nobody listens, connections are cut; then it is back on its port and knows what it did."""
    [orders] = await processes.start_services(["orders"])
    async with stub_of(orders) as stub:
        assert (await stub.Execute(place(), timeout=BOUND_S)).outcome.HasField("done")
        switch(processes, {"down": True})
        await wait_refused(orders)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.Execute(place(attempt=2), timeout=BOUND_S, wait_for_ready=False)
        # CANCELLED if it left on the old connection just before that was cut.
        cut = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert failed.value.code() in cut
        assert orders.is_running
        switch(processes, {})
        again = await stub.Execute(place(attempt=3), timeout=BOUND_S, wait_for_ready=True)
        assert again.outcome.HasField("done")
    assert effects(processes) == ["place"]
    assert count_faults(faults_file(processes.database("orders"))) == {"orders down": 1}


async def wait_refused(process: Process) -> None:
    """Wait until nobody listens on a port."""
    host, _, port = process.address.rpartition(":")
    with anyio.fail_after(BOUND_S):
        while True:
            try:
                await (await anyio.connect_tcp(host, int(port))).aclose()
            except OSError:
                return
            await anyio.sleep(0.02)


async def test_a_held_reply_is_let_go_by_any_change(processes: Processes) -> None:
    """The effect is there and committed while its caller waits; who holds before it has none."""
    switch(processes, {"place": {"hold_reply": 1}})
    [orders] = await processes.start_services(["orders"])
    async with anyio.create_task_group() as tasks:
        answers: list[str] = []

        async def placing(saga_id: str) -> None:
            answers.append(await ask(orders, place(saga_id)))

        tasks.start_soon(placing, "saga-1")
        await wait_struck(processes, "place hold_reply")
        assert effects(processes) == ["place"]
        assert answers == []
        switch(processes, {"place": {"hold": 1}})
        await wait_answers(answers, 1)
        tasks.start_soon(placing, "saga-2")
        await wait_struck(processes, "place hold")
        assert effects(processes, "saga-2") == []
        switch(processes, {})
    assert answers == ["done", "done"]
    assert effects(processes, "saga-2") == ["place"]


async def wait_struck(processes: Processes, fault: str) -> None:
    """Wait until the orders have written down a fault."""
    with anyio.fail_after(BOUND_S):
        # Another process writes it down.
        while not count_faults(faults_file(processes.database("orders")))[fault]:  # noqa: ASYNC110
            await anyio.sleep(0.02)


async def wait_answers(answers: list[str], count: int) -> None:
    """Wait until so many calls were answered."""
    with anyio.fail_after(BOUND_S):
        while len(answers) < count:  # noqa: ASYNC110
            await anyio.sleep(0.02)


async def test_a_service_that_starts_down_is_ready_to_be_switched_on(processes: Processes) -> None:
    """Whoever starts it is not kept waiting for a service that is meant to be down."""
    switch(processes, {"down": True})
    [orders] = await processes.start_services(["orders"])
    assert await ask(orders, place()) == "UNAVAILABLE"
    switch(processes, {})
    async with stub_of(orders) as stub:
        reply = await stub.Execute(place(), timeout=BOUND_S, wait_for_ready=True)
    assert reply.outcome.HasField("done")


async def test_a_killed_service_comes_back_as_it_was(processes: Processes) -> None:
    """After SIGKILL the ledger can be read, and the same call on the same port is a repeat."""
    [orders] = await processes.start_services(["orders"])
    assert await ask(orders, place()) == "done"
    pid = orders.pid
    orders.kill()
    assert orders.exit_code == -signal.SIGKILL
    assert effects(processes) == ["place"]
    await orders.start()
    assert orders.pid != pid
    assert await ask(orders, place(attempt=2)) == "done"
    assert effects(processes) == ["place"]


async def test_a_service_ends_by_draining(processes: Processes) -> None:
    """SIGTERM ends it with 0."""
    [orders] = await processes.start_services(["orders"])
    assert await orders.stop() == 0


async def test_postgres_ends_with_the_processes(reachable_folder: Path) -> None:
    """It is started once, comes back after a kill where it was, and does not outlive the block."""
    async with Processes(reachable_folder) as processes:
        server = await processes.start_postgres()
        assert await processes.start_postgres() is server
        dsn, pid = server.dsn, server.pid
        server.kill()
        await processes.start_postgres()
        assert server.dsn == dsn
        assert server.pid is not None
        assert server.pid != pid
        pid = server.pid
    assert not server.is_running
    assert is_gone(pid)


async def test_an_interrupted_start_of_postgres_leaves_nothing(reachable_folder: Path) -> None:
    """Whoever is cancelled meanwhile stops it when it is up."""

    async def start() -> None:
        async with Processes(reachable_folder) as processes:
            servers.append(processes)
            await processes.start_postgres()

    servers: list[Processes] = []
    task = asyncio.create_task(start())
    with anyio.fail_after(BOUND_S):
        while not servers or servers[0].postgres is None:
            await anyio.lowlevel.checkpoint()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    server = servers[0].postgres
    assert server is not None
    assert not server.is_running
    assert not (server.data / "postmaster.pid").exists()


async def test_a_service_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """However a script ends, its services end with it: their standard input closes."""
    script = (
        "import asyncio, os, pathlib, signal, sys\n"
        "from shop.processes import Processes\n"
        "async def main():\n"
        "    async with Processes(pathlib.Path(sys.argv[1])) as processes:\n"
        "        [orders] = await processes.start_services(['orders'])\n"
        "        print(orders.pid, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    ended = await anyio.run_process([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    pid = int(ended.stdout)
    with anyio.fail_after(BOUND_S):
        while not is_gone(pid):  # noqa: ASYNC110  # the end of a process sets no event
            await anyio.sleep(0.02)


async def test_a_process_that_fails_says_where_to_look(processes: Processes) -> None:
    """A service that cannot start is reported with its exit code and the end of its log."""
    processes.switches.write_text("{", encoding="utf-8")
    with pytest.raises(ProcessFailed) as failed:
        await processes.start_services(["orders"])
    assert "orders ended with 2" in str(failed.value)
    assert "is not JSON" in str(failed.value)


async def test_leaving_the_block_ends_everything(tmp_path: Path) -> None:
    """Whatever happens inside, no process outlives the block."""
    started: list[Process] = []

    async def fail_in_the_block() -> None:
        async with Processes(tmp_path) as processes:
            started.extend(await processes.start_services(["orders", "shipping"]))
            raise RuntimeError("something else went wrong")

    with pytest.raises(RuntimeError, match="something else"):
        await fail_in_the_block()
    assert [process.is_running for process in started] == [False, False]
    assert [process.exit_code for process in started] == [0, 0]


def run_service(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m shop`` until it ends."""
    return subprocess.run(
        [sys.executable, "-m", "shop", *arguments],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_a_busy_port_is_one_clear_line(tmp_path: Path) -> None:
    """A port that somebody else listens on is refused, with exit code 2."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = run_service("orders", "--listen", address, "--database", str(tmp_path / "o.db"))
    assert ended.returncode == 2
    assert ended.stderr.strip() == f"orders: cannot listen on {address}: Address already in use"


def test_bad_usage_is_one_clear_line(tmp_path: Path) -> None:
    """Unknown services and addresses end with 2, a database that cannot be made with 5."""
    database = str(tmp_path / "o.db")
    assert run_service("bakery", "--database", database).returncode == 2
    refused = run_service("orders", "--listen", "here", "--database", database)
    assert refused.returncode == 2
    assert "write HOST:PORT" in refused.stderr
    no_dsn = run_service("bank-east", "--database", database)
    assert no_dsn.returncode == 2
    assert "BANK_EAST_DSN" in no_dsn.stderr
    nowhere = run_service("orders", "--database", str(tmp_path / "missing" / "o.db"))
    assert nowhere.returncode == 5
    assert "Traceback" not in nowhere.stderr
    assert len(nowhere.stderr.strip().splitlines()) == 1
