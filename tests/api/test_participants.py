"""Participants by an operator's hand: added, moved, taken back; with a restart in between.

Runtime, file, participants and lanes are real. A move is seen by which of two participants gets a
call.
"""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypedDict

import anyio
import anyio.lowlevel
import grpc.aio
import pytest
import structlog

import amends
from amends.v1 import operator_pb2, operator_pb2_grpc
from amends_runtime.clock import SystemClock
from amends_runtime.config import Config, Participant, Server
from amends_runtime.core.breaker import BreakerPolicy
from amends_runtime.dispatch.lanes import Lanes
from amends_runtime.dispatch.participants import MAX_CHANGES, Participants
from amends_runtime.dispatch.reaching import why_not_reached
from amends_runtime.engine import Engine, run_engine
from amends_runtime.errors import Overloaded, StoreError
from amends_runtime.ports import Call, ParticipantAddress, Reply
from amends_runtime.storage import open_memory_store, sqlite
from amends_runtime.storage.by_hand import change_participant
from amends_runtime.telemetry.observers import Observers
from tests.api.refusals import refused
from tests.api.shop import Held, Shop
from tests.api.stubs import Operator

ONE = amends.Definition("one").step(
    "reserve", "shop", "reserve", retry=amends.Retry(first_s=0.001, max_s=0.001)
)


class Words(TypedDict):
    """Who does it and why."""

    author: str
    reason: str


WHO: Words = {"author": "ada", "reason": "moved to the new rack"}
PATIENCE_S = 60.0
NOBODY = "127.0.0.1:1"


@asynccontextmanager
async def a_shop() -> AsyncIterator[Shop]:
    """A participant on a port of its own."""
    shop = Shop()
    async with amends.serve(shop.participant(), grace_s=0) as server:
        shop.address = server.address
        yield shop


@asynccontextmanager
async def a_runtime(
    folder: Path, shop: str = "", **others: str
) -> AsyncIterator[tuple[Engine, amends.Client]]:
    """A runtime over the file in that folder; `shop` is where its configuration has the shop."""
    addresses = others | ({"shop": shop} if shop else {})
    config = Config(
        server=Server(listen="127.0.0.1:0", database=str(folder / "amends.db")),
        participants={name: Participant(address=one) for name, one in addresses.items()},
    )
    async with run_engine(config) as engine, amends.Client(engine.address) as client:
        yield engine, client


async def the_shop(client: amends.Client) -> amends.ParticipantInfo:
    """What the runtime says of it."""
    [found] = [one for one in await client.participants() if one.name == "shop"]
    return found


async def shows(
    client: amends.Client, condition: Callable[[amends.ParticipantInfo], bool]
) -> amends.ParticipantInfo:
    """What the runtime says of it as soon as the condition holds, asked again and again."""
    with anyio.fail_after(PATIENCE_S):
        while not condition(found := await the_shop(client)):
            await anyio.lowlevel.checkpoint()
    return found


async def test_an_added_participant_is_called_and_survives_a_restart(tmp_path: Path) -> None:
    """Without it a start is refused; with it the saga completes, also under the next runtime."""
    async with a_shop() as shop:
        async with a_runtime(tmp_path) as (_, client):
            how = re.escape("to register it: amends participants add shop=HOST:PORT")
            with pytest.raises(amends.InvalidRequest, match=f"is not registered; .*{how}"):
                await client.register(ONE)
            [compared] = (await client.diff(ONE)).violations
            assert re.search(how, compared.message)
            added = await client.put_participant("shop", shop.address, **WHO)
            assert (added.name, added.address) == ("shop", shop.address)
            assert added.by_operator
            assert added.configured_address == ""
            assert (added.concurrency_limit, added.transport) == (256, "")
            await client.register(ONE)
            started = await client.start("one")
            assert (await started.result(timeout_s=PATIENCE_S)).completed
        async with a_runtime(tmp_path) as (_, client):
            assert (await the_shop(client)).by_operator
            started = await client.start("one")
            assert (await started.result(timeout_s=PATIENCE_S)).completed


async def test_calls_that_wait_leave_for_where_the_participant_is_now(tmp_path: Path) -> None:
    """An outage that ends with a move: the queue goes to the new address, with a new breaker."""
    async with a_shop() as shop, a_runtime(tmp_path, NOBODY) as (_, client):
        await client.register(ONE)
        started = [await client.start("one") for _ in range(20)]
        await shows(client, lambda shop: shop.breaker.state is not amends.BreakerState.CLOSED)
        moved = await client.put_participant("shop", shop.address, **WHO)
        assert moved.breaker.state is amends.BreakerState.CLOSED
        assert (moved.last_error, moved.configured_address) == ("", NOBODY)
        for each in started:
            assert (await each.result(timeout_s=PATIENCE_S)).completed


async def test_calls_on_the_wire_get_their_answer_from_where_they_went(tmp_path: Path) -> None:
    """The old connection is kept for them; what comes after them goes to the new address."""
    async with (
        a_shop() as old,
        a_shop() as new,
        a_runtime(tmp_path, old.address) as (_, client),
    ):
        held = old.hold("reserve")
        await client.register(ONE)
        first = await client.start("one", saga_id="first")
        await held.begun.wait()
        await client.put_participant("shop", new.address, **WHO)
        second = await client.start("one", saga_id="second")
        assert (await second.result(timeout_s=PATIENCE_S)).completed
        assert (await the_shop(client)).calls_in_flight == 1
        held.let_go.set()
        assert (await first.result(timeout_s=PATIENCE_S)).completed
        assert [call.saga_id for call in old.calls] == ["first"]
        assert [call.saga_id for call in new.calls] == ["second"]
        assert (await the_shop(client)).calls_in_flight == 0


async def test_a_participant_at_the_address_of_another_runs_nothing(tmp_path: Path) -> None:
    """A typo in a port: who listens there has the action, too, and refuses; then it is mended."""
    rented: list[str] = []

    async def rent(call: amends.Call) -> None:
        rented.append(call.saga_id)

    car = amends.Participant("car", barrier=None)
    car.execute("reserve", compensatable=False)(rent)
    trip = amends.Definition("trip").step(
        "rent", "car", "reserve", retry=amends.Retry(first_s=0.001, max_s=0.001)
    )
    async with a_shop() as shop, amends.serve(car) as server, a_runtime(tmp_path) as (_, client):
        await client.put_participant("car", shop.address, **WHO)
        await client.register(trip)
        started = await client.start("trip", saga_id="trip-1")
        with anyio.fail_after(PATIENCE_S):
            while (failure := (await client.get("trip-1")).steps[0].last_error) is None:
                assert shop.calls == []
                await anyio.lowlevel.checkpoint()
        assert failure.reason == "UNIMPLEMENTED"
        assert failure.message.startswith(
            "this is participant 'shop', and the call is for 'car': is the address of 'car' right? "
            "(amends participants add car=HOST:PORT)"
        )
        await client.put_participant("car", server.address, **WHO)
        assert (await started.result(timeout_s=PATIENCE_S)).completed
    assert (shop.calls, rented) == ([], ["trip-1"])


async def test_one_program_is_registered_by_several_names(tmp_path: Path) -> None:
    """As the aliases in its code say."""
    shop = Shop()
    participant = shop.participant()
    participant.aliases = ("shop-eu", "shop-us")
    definition = (
        amends.Definition("both").step("eu", "shop-eu", "reserve").step("us", "shop-us", "reserve")
    )
    async with amends.serve(participant, grace_s=0) as server:
        names = {"shop-eu": server.address, "shop-us": server.address}
        async with a_runtime(tmp_path, **names) as (_, client):
            await client.register(definition)
            assert (await (await client.start("both")).result(timeout_s=PATIENCE_S)).completed
    assert [call.step for call in shop.calls] == ["eu", "us"]


async def test_a_moved_participant_goes_back_to_its_configuration(tmp_path: Path) -> None:
    """When the operator takes it back, and not before: a start warns of it until then."""
    async with AsyncExitStack() as stack:
        configured, other = [await stack.enter_async_context(a_shop()) for _ in range(2)]
        async with a_runtime(tmp_path, configured.address) as (_, client):
            await client.register(ONE)
            await client.put_participant("shop", other.address, **WHO)
        with structlog.testing.capture_logs() as logs:
            async with a_runtime(tmp_path, configured.address) as (engine, client):
                [warning] = [one for one in logs if one["event"] == "participant_held_elsewhere"]
                assert warning["log_level"] == "warning"
                assert (warning["address"], warning["configured"]) == (
                    other.address,
                    configured.address,
                )
                await (await client.start("one")).result(timeout_s=PATIENCE_S)
                assert len(other.calls) == 1
                await client.remove_participant("shop", **WHO)
                back = await the_shop(client)
                assert (back.address, back.by_operator) == (configured.address, False)
                await (await client.start("one")).result(timeout_s=PATIENCE_S)
                assert len(configured.calls) == 1
                assert [entry.verb for entry in await engine.store.audit(9)] == [
                    "remove_participant",
                    "put_participant",
                ]
        with structlog.testing.capture_logs() as logs:
            async with a_runtime(tmp_path, configured.address):
                assert not [one for one in logs if one["event"] == "participant_held_elsewhere"]


async def test_calls_to_a_removed_participant_wait_and_are_seen(tmp_path: Path) -> None:
    """No start needs it any more; what was under way waits for it, and goes on when it is back."""
    async with a_shop() as shop, a_runtime(tmp_path) as (_, client):
        await client.put_participant("shop", shop.address, **WHO)
        await client.register(ONE)
        held = shop.hold("reserve", amends.InProgress(after_s=0.001))
        started = await client.start("one")
        await held.begun.wait()
        await client.remove_participant("shop", **WHO)
        held.let_go.set()
        gone = await shows(client, lambda shop: shop.calls_waiting == 1)
        assert (gone.address, gone.transport, gone.by_operator) == ("", "", False)
        with pytest.raises(amends.WrongState) as refusal:
            await client.start("one")
        assert refusal.value.reason == "PARTICIPANT_NOT_REGISTERED"
        shop.behaviours.clear()
        await client.put_participant("shop", shop.address, **WHO)
        assert (await started.result(timeout_s=PATIENCE_S)).completed
        await client.remove_participant("shop", **WHO)
        assert await client.participants() == ()


async def test_a_poll_of_an_abandoned_saga_is_never_sent(tmp_path: Path) -> None:
    """It waits in its lane when the saga ends: it must not take effect when the lane goes on."""
    async with a_shop() as shop, a_runtime(tmp_path) as (_, client):
        await client.put_participant("shop", shop.address, **WHO)
        await client.register(ONE)
        held = shop.hold("reserve", amends.InProgress(after_s=0.001))
        started = await client.start("one", saga_id="abandoned")
        await held.begun.wait()
        await client.remove_participant("shop", **WHO)
        held.let_go.set()
        # Removed, it is there no more until the poll is in its lane.
        while [one.calls_waiting for one in await client.participants()] != [1]:
            pass
        abandoned = await started.abandon(**WHO, force=True)
        assert abandoned.remaining_steps == ("reserve",)
        assert await client.participants() == ()
        shop.behaviours.clear()
        await client.put_participant("shop", shop.address, **WHO)
        # Younger, so that it leaves the lane after whatever else is in it.
        later = await client.start("one", saga_id="later")
        assert (await later.result(timeout_s=PATIENCE_S)).completed
        assert [call.saga_id for call in shop.calls] == ["abandoned", "later"]


async def test_a_poll_that_nobody_answers_holds_up_no_compensation(tmp_path: Path) -> None:
    """One participant is away for good; what another one did is undone all the same.

    At the latest when the attempt that is polled would have ended.
    """
    order = (
        amends.Definition("order")
        .step("reserve", "shop", "reserve")
        .read_only("check", "scoring", "check", timeout_s=0.5)
    )
    held = Held(amends.InProgress(after_s=0.001))
    scoring = amends.Participant("scoring", barrier=None)
    scoring.execute("check", compensatable=False)(held)
    async with (
        amends.serve(scoring, grace_s=0) as server,
        a_shop() as shop,
        a_runtime(tmp_path, shop.address) as (_, client),
    ):
        await client.put_participant("scoring", server.address, **WHO)
        await client.register(order)
        started = await client.start("order")
        await held.begun.wait()
        await client.remove_participant("scoring", **WHO)
        held.let_go.set()
        with anyio.fail_after(PATIENCE_S):
            while not any(one.calls_waiting for one in await client.participants()):
                await anyio.lowlevel.checkpoint()
        await started.cancel(**WHO)
        ended = await started.result(timeout_s=PATIENCE_S)
        assert ended.state is amends.SagaState.COMPENSATED
        assert [call.verb for call in shop.calls][-1] is amends.Verb.COMPENSATE


async def test_what_no_operator_registered_is_not_removed(tmp_path: Path) -> None:
    """A configured one says where to remove it, an unknown one that there is none."""
    async with a_runtime(tmp_path, NOBODY) as (_, client):
        with pytest.raises(amends.WrongState, match="take it out of the configuration") as held:
            await client.remove_participant("shop", **WHO)
        assert held.value.reason == "NOT_BY_OPERATOR"
        with pytest.raises(amends.NotFound, match="no participant 'mail'") as error:
            await client.remove_participant("mail", **WHO)
        assert error.value.reason == "UNKNOWN_PARTICIPANT"


async def test_a_dead_address_is_taken_and_said(tmp_path: Path) -> None:
    """It may be that the participant only comes up later; a typo is seen while it is fresh."""
    async with a_shop() as shop, a_runtime(tmp_path) as (_, client):
        added = await client.put_participant("shop", NOBODY, **WHO)
        assert added.address == NOBODY
        assert added.last_error == f"nothing answers at {NOBODY} yet: Connection refused"
        assert (await the_shop(client)).last_error == ""  # no call has failed
        moved = await client.put_participant("shop", shop.address, **WHO)
        assert (moved.address, moved.last_error) == (shop.address, "")


async def test_whether_somebody_answers_is_looked_at_once(tmp_path: Path) -> None:
    """By name, by IPv6 and by path; whatever is wrong is a word, and none of it takes long."""
    for address, why in {
        "127.0.0.1:1": "Connection refused",
        f"unix:{tmp_path}/nobody.sock": "No such file or directory",
        "shop..example:1": "its host is not known",
    }.items():
        assert await why_not_reached(address) == f"nothing answers at {address} yet: {why}"
    with socket.create_server(("127.0.0.1", 0)) as there:
        assert await why_not_reached(f"127.0.0.1:{there.getsockname()[1]}") == ""
        soon = await why_not_reached(f"127.0.0.1:{there.getsockname()[1]}", patience_s=0)
        assert soon.endswith("yet: no connection within 0 s")


async def test_names_and_addresses_are_those_of_the_configuration(tmp_path: Path) -> None:
    """What is wrong is said at once, with what to write instead."""
    async with a_runtime(tmp_path) as (engine, client), grpc_operator(engine) as operator:
        error = await refused(
            operator.PutParticipant(
                operator_pb2.PutParticipantRequest(name="Shop!", address="http://shop:80")
            )
        )
        assert set(error.violations) == {"name", "address", "audit.author", "audit.reason"}
        assert "host:port without http://" in error.violations["address"]
        assert "lower-case letter" in error.violations["name"]
        error = await refused(operator.RemoveParticipant(operator_pb2.RemoveParticipantRequest()))
        assert set(error.violations) == {"name", "audit.author", "audit.reason"}
        for address in ("", "shop", "shop:0", "unix:", "[::1:7"):
            with pytest.raises(amends.InvalidRequest):
                await client.put_participant("shop", address, **WHO)
        assert await client.participants() == ()


async def test_a_lane_follows_the_store_where_nobody_knows_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is told to ask again; the lane is where the store says, whatever that is."""
    async with a_shop() as shop, a_runtime(tmp_path, NOBODY) as (engine, client):

        async def answer_lost(*arguments: Any, **options: Any) -> bool:
            await change_participant(*arguments, **options)
            raise OSError("the answer was lost")

        monkeypatch.setattr(sqlite, "change_participant", answer_lost)
        async with amends.Client(engine.address, retry_unavailable=False) as asking_once:
            with pytest.raises(amends.Unavailable) as unknown:
                await asking_once.put_participant("shop", shop.address, **WHO)
        assert unknown.value.reason == "STORE_FAILED"
        assert unknown.value.in_doubt
        assert (await the_shop(client)).address == shop.address

        async def not_written(*_: object, **__: object) -> bool:
            raise OSError("nothing was written")

        monkeypatch.setattr(sqlite, "change_participant", not_written)
        async with amends.Client(engine.address, retry_unavailable=False) as asking_once:
            with pytest.raises(amends.Unavailable):
                await asking_once.remove_participant("shop", **WHO)
        assert (await the_shop(client)).address == shop.address
        await client.register(ONE)
        assert (await (await client.start("one")).result(timeout_s=PATIENCE_S)).completed


async def test_a_change_is_made_once_however_often_it_is_asked(tmp_path: Path) -> None:
    """A repeat, after an answer that was lost, writes nothing and undoes nothing."""
    first = operator_pb2.PutParticipantRequest(
        name="shop",
        address="127.0.0.1:2",
        audit=operator_pb2.Audit(**WHO, request_id="r-1"),
    )
    back = operator_pb2.RemoveParticipantRequest(
        name="shop", audit=operator_pb2.Audit(**WHO, request_id="r-2")
    )
    async with a_runtime(tmp_path) as (engine, client), grpc_operator(engine) as operator:
        await operator.PutParticipant(first)
        await operator.PutParticipant(first)
        assert len(await engine.store.audit(9)) == 1
        await client.put_participant("shop", "127.0.0.1:3", **WHO)
        answer = await operator.PutParticipant(first)
        assert answer.participant.address == "127.0.0.1:3"
        assert (await the_shop(client)).address == "127.0.0.1:3"
        await operator.RemoveParticipant(back)
        await operator.RemoveParticipant(back)
        assert await client.participants() == ()
        assert [one.verb for one in await engine.store.audit(9)] == [
            "remove_participant",
            "put_participant",
            "put_participant",
        ]


async def test_a_change_whose_caller_left_happens_all_the_same(tmp_path: Path) -> None:
    """The store and the lane never part."""
    async with a_runtime(tmp_path, NOBODY) as (engine, client):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await engine.participants.put("shop", "127.0.0.1:2", **WHO)
        assert scope.cancelled_caught
        await client.put_participant("mail", "127.0.0.1:3", **WHO)  # comes after it
        assert (await the_shop(client)).address == "127.0.0.1:2"
        assert [one.name for one in await engine.store.participants()] == ["mail", "shop"]


async def test_changes_that_wait_are_bounded() -> None:
    """One too many is told the limit, and none of those before it is lost."""
    async with open_memory_store() as store, anyio.create_task_group() as tasks:
        observer, clock = Observers([]), SystemClock()
        lanes = Lanes(BreakerPolicy(), clock, observer, NoTransport, {})
        lanes.open(tasks, lambda _saga_id, _message: None, [])
        participants = Participants(store, lanes, clock)
        await participants.load()
        for number in range(MAX_CHANGES):
            tasks.start_soon(participants.put, f"p-{number}", NOBODY, "ada", "test")
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(Overloaded, match=f"{MAX_CHANGES} changes of participants wait"):
            await participants.put("one-more", NOBODY, "ada", "test")
        tasks.start_soon(participants.run)
        await anyio.wait_all_tasks_blocked()
        await participants.put("last", NOBODY, "ada", "test")
        assert len(lanes.names()) == len(await store.participants()) == MAX_CHANGES + 1
        tasks.cancel_scope.cancel()


class NoTransport:
    """A way that nobody goes."""

    name = "none"

    def __init__(self, address: ParticipantAddress) -> None:
        self.address = address

    async def call(self, call: Call) -> Reply:
        """Nobody does."""
        raise NotImplementedError

    async def close(self) -> None:
        """Nothing is open."""


async def test_a_store_of_another_owner_changes_nothing(tmp_path: Path) -> None:
    """The epoch is compared as with every write."""
    async with a_runtime(tmp_path, NOBODY) as (engine, client):
        store = engine.store
        identity = store.identity
        store._identity = type(identity)(  # type: ignore[attr-defined]
            identity.store_id, identity.incarnation, identity.epoch - 1
        )
        with pytest.raises(StoreError, match="another runtime owns it"):
            await engine.participants.put("shop", "127.0.0.1:2", **WHO)
        assert (await the_shop(client)).address == NOBODY


@asynccontextmanager
async def grpc_operator(engine: Engine) -> AsyncIterator[Operator]:
    """The generated stub, for requests that no client of ours would send."""
    async with grpc.aio.insecure_channel(engine.address) as channel:
        yield operator_pb2_grpc.OperatorServiceStub(channel)
