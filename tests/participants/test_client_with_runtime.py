"""The client, a runtime and a participant, all real."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import pytest

import amends

PATIENCE_S = 60.0
"""Bounds a broken test; no test waits for it."""

ORDER = (
    amends.Definition("order")
    .step("reserve", "shop", "reserve")
    .step("charge", "shop", "charge", timeout_s=PATIENCE_S)
    .pivot("ship", "shop", "ship")
)


class Shop:
    """A participant whose charge can be held back, and which counts what it was asked."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str, amends.Verb]] = Counter()
        """By saga, action and verb."""
        self.open = anyio.Event()
        """Charges wait for it."""
        self.open.set()
        self.busy = False
        """Charges are in progress, and to be asked for again."""
        self.charging = anyio.Event()
        """A charge is waiting, or has been made, since the gate was last closed."""
        self.participant = amends.Participant("shop", barrier=None)
        for action in ("reserve", "charge", "ship"):
            self.participant.execute(action)(self._execute)
            self.participant.compensate(action)(self._compensate)

    def close(self) -> None:
        """Let charges wait from now on."""
        self.open, self.charging = anyio.Event(), anyio.Event()

    async def _execute(self, call: amends.Call) -> object:
        self.calls[call.saga_id, call.action, call.verb] += 1
        if call.action == "charge":
            self.charging.set()
            await self.open.wait()
            if self.busy:
                return amends.InProgress(after_s=0.02)
            if call.json()["amount"] > 100:
                raise amends.Rejected("card_declined", "the amount is above the limit")
        return {"did": call.action}

    async def _compensate(self, call: amends.Call) -> None:
        self.calls[call.saga_id, call.action, call.verb] += 1


class Runtime:
    """A runtime in a process of its own, always at the same address and with the same database."""

    def __init__(self, folder: Path, shop_address: str) -> None:
        self._folder = folder
        self._shop_address = shop_address
        self._process: subprocess.Popen[bytes] | None = None
        self.address = "127.0.0.1:0"

    async def start(self) -> None:
        """Start it, and wait until it serves."""
        ready = self._folder / "ready.json"
        ready.unlink(missing_ok=True)
        arguments = ["--listen", self.address, "--database", str(self._folder / "amends.db")]
        arguments += ["--participant", f"shop={self._shop_address}", "--ready-file", str(ready)]
        with (self._folder / "runtime.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "amends_runtime",
                    "serve",
                    "--until-stdin-closes",
                    *arguments,
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        while not ready.exists():
            assert self._process.poll() is None, (self._folder / "runtime.log").read_text()
            await anyio.sleep(0.02)
        self.address = json.loads(ready.read_text())["address"]

    async def kill(self) -> None:
        """Kill it, as a power cut would."""
        assert self._process is not None
        self._process.kill()
        await anyio.to_thread.run_sync(self._process.communicate)
        self._process = None

    async def stop(self) -> int | None:
        """Stop it in good order, and give its exit code; None if it does not run."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        process.terminate()
        await anyio.to_thread.run_sync(process.communicate)
        return process.returncode


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[tuple[Shop, Runtime]]:
    """Run a shop and a runtime for the length of the block."""
    shop = Shop()
    async with amends.serve(shop.participant, grace_s=0) as server:
        runtime = Runtime(folder, server.address)
        await runtime.start()
        try:
            yield shop, runtime
        finally:
            with anyio.CancelScope(shield=True):
                await runtime.stop()


@dataclass(frozen=True)
class World:
    """A shop, a runtime that knows it and the order's definition, and an open client."""

    shop: Shop
    runtime: Runtime
    client: amends.Client


@asynccontextmanager
async def world_in(folder: Path) -> AsyncIterator[World]:
    """Run one for the length of the block."""
    async with (
        running(folder) as (shop, runtime),
        amends.Client(runtime.address, timeout_s=PATIENCE_S) as client,
    ):
        await client.register(ORDER)
        yield World(shop, runtime, client)


@pytest.fixture(scope="module")
async def shared_world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Give the world of the tests that leave the runtime running."""
    async with world_in(tmp_path_factory.mktemp("shared")) as world:
        yield world


@pytest.fixture
async def own_world(tmp_path: Path) -> AsyncIterator[World]:
    """Give a world to a test that stops the runtime."""
    async with world_in(tmp_path) as world:
        yield world


async def test_an_order_is_started_followed_and_read(shared_world: World) -> None:
    """From the start to the history: what the client shows is what the shop did."""
    shop = shared_world.shop
    client = shared_world.client
    started = await client.start("order", {"amount": 5}, labels={"shop": "north"})
    assert not started.existed
    saga = await started.result(timeout_s=PATIENCE_S)
    assert saga.completed
    assert saga.ended
    assert saga.input.json() == {"amount": 5}
    assert saga.labels == {"shop": "north"}
    assert [step.name for step in saga.steps] == ["reserve", "charge", "ship"]
    assert {step.state for step in saga.steps} == {amends.StepState.EXECUTED}
    charge = saga.step("charge").result
    assert charge is not None
    assert charge.json() == {"did": "charge"}
    assert await client.get(started.saga_id) == saga
    for action in ("reserve", "charge", "ship"):
        assert shop.calls[saga.saga_id, action, amends.Verb.EXECUTE] == 1
    kinds = [record.kind for record in [r async for r in started.history()]]
    assert kinds[0] is amends.RecordKind.SAGA_STARTED
    assert kinds[-1] is amends.RecordKind.SAGA_ENDED
    assert kinds.count(amends.RecordKind.STEP_EXECUTED) == 3


async def test_a_refusal_turns_the_saga_back(shared_world: World) -> None:
    """The client sees why, where, and that what was done is undone."""
    client = shared_world.client
    started = await client.start("order", {"amount": 500}, wait_s=PATIENCE_S)
    saga = started.saga
    assert saga.state is amends.SagaState.COMPENSATED
    assert saga.turn is not None
    assert (saga.turn.cause, saga.turn.step) == (amends.Cause.REJECTED, "charge")
    assert saga.turn.failure is not None
    assert saga.turn.failure.reason == "card_declined"
    assert saga.step("reserve").state is amends.StepState.COMPENSATED


async def test_a_start_is_idempotent_by_id_and_content(shared_world: World) -> None:
    """The same again is the same saga; other content under the id is refused."""
    client = shared_world.client
    labels = {"test": "twice"}
    first = await client.start("order", {"amount": 5}, saga_id="order-7", labels=labels)
    again = await client.start("order", {"amount": 5}, saga_id="order-7", labels=labels)
    assert (first.existed, again.existed) == (False, True)
    with pytest.raises(amends.AlreadyExists) as caught:
        await client.start("order", {"amount": 6}, saga_id="order-7", labels=labels)
    assert not caught.value.in_doubt
    listed = [saga.saga_id async for saga in client.list(labels={"test": "twice"})]
    assert listed == ["order-7"]


async def test_a_running_saga_can_be_cancelled(shared_world: World) -> None:
    """Who and why land in the history; a saga that has ended refuses."""
    shop = shared_world.shop
    client = shared_world.client
    shop.close()
    started = await client.start("order", {"amount": 5})
    await shop.charging.wait()
    with pytest.raises(amends.WaitTimeout) as caught:
        await started.result(timeout_s=0)
    assert caught.value.saga.state is amends.SagaState.RUNNING
    cancelled = await started.cancel(author="desk", reason="changed her mind")
    assert cancelled.disposition is amends.CancelDisposition.TURNED_BACK
    shop.open.set()
    saga = await started.result(timeout_s=PATIENCE_S)
    assert saga.state is amends.SagaState.COMPENSATED
    asked = [r async for r in started.history() if r.kind is amends.RecordKind.CANCEL_REQUESTED]
    assert [(record.author, record.reason) for record in asked] == [("desk", "changed her mind")]

    done = await client.start("order", {"amount": 5}, wait_s=PATIENCE_S)
    with pytest.raises(amends.WrongState):
        await done.cancel(author="desk", reason="too late")


async def test_sagas_are_listed_by_state_and_label(shared_world: World) -> None:
    """Newest first, without steps and payloads."""
    client = shared_world.client
    await client.register(replace(ORDER, name="listed"))
    for number in range(5):
        await client.start(
            "listed",
            {"amount": 500 if number == 2 else 5},
            saga_id=f"listed-{number}",
            labels={"shop": "north" if number % 2 else "south"},
            wait_s=PATIENCE_S,
        )
    listed = [saga async for saga in client.list(definition="listed")]
    assert [saga.saga_id for saga in listed] == [f"listed-{number}" for number in (4, 3, 2, 1, 0)]
    assert all(saga.steps == () and saga.input == amends.Payload(b"", "") for saga in listed)

    async def ids(**conditions: Any) -> list[str]:
        return [saga.saga_id async for saga in client.list(definition="listed", **conditions)]

    assert await ids(state=amends.SagaState.COMPENSATED) == ["listed-2"]
    assert await ids(labels={"shop": "north"}) == ["listed-3", "listed-1"]
    assert await ids(limit=2) == ["listed-4", "listed-3"]
    assert await ids(started_from_ms=listed[-1].started_at_ms) == [s.saga_id for s in listed]
    assert await ids(started_before_ms=listed[-1].started_at_ms) == []


async def test_definitions_are_registered_and_read_back(shared_world: World) -> None:
    """The same content is a no-op, other content a new version; what is read is what was sent."""
    client = shared_world.client
    order = replace(ORDER, name="versions")
    assert not (await client.register(order)).existed
    again = await client.register(order)
    changed = await client.register(order.retriable("notify", "shop", "ship"))
    assert (again.existed, changed.existed) == (True, False)
    assert (again.version, changed.version) == (1, 2)

    async def versions(*, all_versions: bool) -> list[int]:
        found = await client.definitions(all_versions=all_versions)
        return [definition.version for definition in found if definition.name == "versions"]

    assert await versions(all_versions=False) == [2]
    assert await versions(all_versions=True) == [1, 2]
    first = await client.definition("versions", content_hash=again.content_hash)
    assert first.definition is not None
    assert [step.name for step in first.definition.steps] == ["reserve", "charge", "ship"]
    assert not first.latest
    # The runtime writes all defaults down, and that has the same meaning: the same hash.
    assert (await client.register(first.definition)).content_hash == first.content_hash


async def test_a_definition_is_compared_with_the_registered_one(shared_world: World) -> None:
    """Before it is registered: new, the same, other, or refused; and nothing is registered."""
    client = shared_world.client
    order = replace(ORDER, name="compared")
    new = await client.diff(order)
    assert (new.same, new.violations) == (False, ())
    assert new.differences
    await client.register(order)
    assert await client.diff(order) == amends.DefinitionDiff(
        same=True, differences=(), violations=()
    )
    other = await client.diff(order.retriable("notify", "shop", "ship"))
    assert not other.same
    assert any("notify" in line for line in other.differences)
    refused = await client.diff(order.retriable("notify", "nobody", "ship"))
    assert not refused.same
    assert any("nobody" in violation.message for violation in refused.violations)
    assert (await client.definition("compared")).version == 1


async def test_what_is_wrong_comes_back_as_it_is(shared_world: World) -> None:
    """Each refusal in its class, and nothing in doubt."""
    client = shared_world.client
    with pytest.raises(amends.NotFound, match="nothing"):
        await client.get("nothing")
    with pytest.raises(amends.NotFound):
        await client.wait("nothing", timeout_s=PATIENCE_S)
    with pytest.raises(amends.NotFound):
        [record async for record in client.history("nothing")]
    with pytest.raises(amends.NotFound) as unknown:
        await client.start("ordr", {})
    assert not unknown.value.in_doubt
    with pytest.raises(amends.InvalidRequest) as invalid:
        await client.start("order", {}, saga_id="a/b", labels={"Shop": "north"})
    assert len(invalid.value.violations) == 2
    with pytest.raises(amends.InvalidRequest) as refused:
        await client.register(
            amends.Definition("odd")
            .pivot("first", "shop", "ship")
            .step("second", "shop", "charge")
            .pivot("third", "nobody", "ship")
        )
    assert refused.value.violations


async def test_the_runtime_tells_of_itself(own_world: World) -> None:
    """Participants with their breakers, versions and counts."""
    runtime = own_world.runtime
    client = own_world.client
    [shop] = await client.participants()
    assert (shop.name, shop.by_operator) == ("shop", False)
    assert shop.breaker.state is amends.BreakerState.CLOSED
    assert await client.breakers() == (shop.breaker,)
    before = await client.runtime()
    await runtime.kill()
    await runtime.start()
    after = await client.runtime()
    assert after.store_id == before.store_id
    assert after.epoch > before.epoch


async def test_a_wait_and_a_start_outlive_a_killed_runtime(own_world: World) -> None:
    """Killed with a saga in flight and restarted at the same address: nothing is lost or doubled.

    The wait goes on and ends with the saga; a start made while nobody listens is asked again under
    its one id; no step of either saga is done twice without need.
    """
    shop = own_world.shop
    runtime = own_world.runtime
    client = own_world.client
    shop.close()
    async with anyio.create_task_group() as tasks:
        ended: dict[str, amends.Saga] = {}

        async def follow(saga_id: str) -> None:
            ended[saga_id] = await client.wait(saga_id)

        async def start_and_follow(saga_id: str) -> None:
            await client.start("order", {"amount": 5}, saga_id=saga_id)
            await follow(saga_id)

        await client.start("order", {"amount": 5}, saga_id="before")
        tasks.start_soon(follow, "before")
        await shop.charging.wait()
        await runtime.kill()
        tasks.start_soon(start_and_follow, "meanwhile")
        await runtime.start()
        shop.open.set()
    assert {saga_id: saga.state for saga_id, saga in ended.items()} == {
        "before": amends.SagaState.COMPLETED,
        "meanwhile": amends.SagaState.COMPLETED,
    }
    assert sorted([saga.saga_id async for saga in client.list()]) == ["before", "meanwhile"]
    execute = amends.Verb.EXECUTE
    assert shop.calls["meanwhile", "charge", execute] == 1
    assert shop.calls["before", "reserve", execute] == 1
    assert shop.calls["before", "charge", execute] == 2  # in flight at the kill: unknown, so again
    assert (await client.start("order", {"amount": 5}, saga_id="meanwhile")).existed


async def test_a_runtime_that_stops_in_good_order_is_outlived_as_well(own_world: World) -> None:
    """SIGTERM: the wait is asked again by itself, and the runtime exits with 0."""
    shop = own_world.shop
    runtime = own_world.runtime
    client = own_world.client
    shop.busy = True
    started = await client.start("order", {"amount": 5})
    await shop.charging.wait()
    async with anyio.create_task_group() as tasks:
        ended: list[amends.Saga] = []

        async def follow() -> None:
            ended.append(await started.result())

        tasks.start_soon(follow)
        assert await runtime.stop() == 0
        await runtime.start()
        shop.busy = False
    assert [saga.state for saga in ended] == [amends.SagaState.COMPLETED]


async def test_many_at_once_have_each_their_own_answer(shared_world: World) -> None:
    """Good and bad starts in one request, and good and bad ids in one stream."""
    client = shared_world.client

    async def outcome(**start: Any) -> amends.Saga | Exception:
        try:
            started = await client.start(**start)
            return await started.result(timeout_s=PATIENCE_S)
        except Exception as error:  # noqa: BLE001  # it is what is asked for
            return error

    good: list[dict[str, Any]] = [
        {"definition": "order", "input": {"amount": number}, "labels": {"many": "yes"}}
        for number in range(100)
    ]
    bad: list[dict[str, Any]] = [
        {"definition": "ordr"},
        {"definition": "order", "saga_id": "a/b", "labels": {"Shop": "north"}},
    ]
    outcomes = await asyncio.gather(
        *(outcome(**start) for start in [*good, *bad]),
        *(answered_or_not(client, saga_id) for saga_id in ("nobody", "not an id")),
    )
    sagas = [one for one in outcomes if isinstance(one, amends.Saga)]
    assert [saga.input.json()["amount"] for saga in sagas] == list(range(100))
    assert all(saga.completed and len(saga.steps) == 3 for saga in sagas)
    assert len([saga async for saga in client.list(labels={"many": "yes"})]) == 100
    unknown, malformed, nobody, no_id = outcomes[100:]
    assert isinstance(unknown, amends.NotFound)
    assert unknown.reason == "UNKNOWN_DEFINITION"
    assert isinstance(malformed, amends.InvalidRequest)
    assert sorted(violation.field for violation in malformed.violations) == [
        "labels['Shop']",
        "saga_id",
    ]
    assert isinstance(nobody, amends.NotFound)
    assert isinstance(no_id, amends.InvalidRequest)


async def answered_or_not(client: amends.Client, saga_id: str) -> amends.Saga | Exception:
    """Wait for a saga, and give what comes of it."""
    try:
        return await client.wait(saga_id, timeout_s=PATIENCE_S)
    except amends.ApiError as error:
        return error
