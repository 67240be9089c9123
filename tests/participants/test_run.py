"""`run` as a process's main work: signals, drain, exit statuses."""

import signal
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from amends import Verb
from amends.v1 import participant_pb2 as pb
from tests.participants.asking import asking, call_message, health_of, words
from tests.participants.ledger import read_ledger
from tests.participants.processes import program

EXECUTE = Verb.EXECUTE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
async def test_a_signal_drains(tmp_path: Path, number: signal.Signals) -> None:
    """Health says so, no new call is taken, the one under way is answered, the status is 0."""
    database = tmp_path / "payments.db"
    async with program("payments.py", database, "before-commit") as running:
        async with asking(await running.line()) as asker:
            health = health_of(asker)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            under_way = asker.stub.Execute(pb.ExecuteRequest(call=call_message(EXECUTE)))
            assert await running.line() == "here"
            running.signal(number)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            code, _ = await asker.status(call_message(EXECUTE, saga_id="late"))
            assert code is grpc.StatusCode.UNAVAILABLE
            await running.say("go on")
            assert words((await under_way).outcome) == "done"
        assert await running.wait() == 0
    assert read_ledger(database) == [("charge", 5)]
    assert read_ledger(database, "late") == []


async def test_a_signal_wakes_a_loop_that_sleeps() -> None:
    """Also one that the system gives to another thread than the one that acts on it."""
    async with program("sleeping.py") as running:
        await running.line()
        running.signal(signal.SIGTERM)
        assert await running.wait() == 0


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """The handler that hangs is not waited for; nothing of it is kept."""
    database = tmp_path / "payments.db"
    async with (
        program("payments.py", database, "before-commit") as running,
        asking(await running.line()) as asker,
    ):
        watch = health_of(asker).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        under_way = asker.stub.Execute(pb.ExecuteRequest(call=call_message(EXECUTE)))
        assert await running.line() == "here"
        running.signal(signal.SIGTERM)
        await watch.read()
        running.signal(signal.SIGTERM)
        assert await running.wait() == 1
        assert await under_way.code() is grpc.StatusCode.UNAVAILABLE
    assert read_ledger(database) == []


async def test_late_signals_do_not_spoil_the_status(tmp_path: Path) -> None:
    """After the drain there is nothing left to stop: the status is 0 until the very end."""
    async with program("late_signals.py") as running:
        await running.line()
        running.signal(signal.SIGTERM)
        assert await running.line() == "returned"
        assert await running.wait() == 0


async def test_a_busy_port_is_one_line_and_status_2(tmp_path: Path) -> None:
    """No traceback."""
    async with (
        program("payments.py", tmp_path / "a.db", "nowhere") as first,
        program(
            "payments.py", tmp_path / "b.db", "nowhere", address := await first.line()
        ) as second,
    ):
        assert await second.wait() == 2
        last = (await second.stderr()).splitlines()[-1]
    assert last.startswith(f"payments: cannot listen on {address}: Address already in use")


async def test_an_unusable_database_is_one_line_and_status_5(tmp_path: Path) -> None:
    """No traceback."""
    async with program("payments.py", tmp_path / "missing" / "a.db", "nowhere") as running:
        assert await running.wait() == 5
        stderr = await running.stderr()
    assert stderr.startswith("payments: the database of the connection factory cannot be used")
    assert "Traceback" not in stderr
