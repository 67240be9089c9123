"""WatchSagas: everything that is committed, in that order, once; whatever happens in between."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest

import amends
from amends.v1 import saga_pb2, saga_pb2_grpc, types_pb2
from amends_runtime.api import watching
from amends_runtime.api.resuming import token_of
from amends_runtime.config import Config
from amends_runtime.engine import Engine, run_engine
from amends_runtime.errors import StoreError
from amends_runtime.ports import SagaFilter, StoreIdentity, WatchedTurns
from tests.api.refusals import read, refused
from tests.api.shop import ORDER, Shop
from tests.api.stubs import Sagas

PATIENCE_S = 60.0
Told: TypeAlias = saga_pb2.WatchSagasResponse


class Watch:
    """One stream, read message by message."""

    def __init__(self, sagas: Sagas, resume_token: str = "", **conditions: Any) -> None:
        request = saga_pb2.WatchSagasRequest(
            filter=saga_pb2.SagaFilter(**conditions), resume_token=resume_token
        )
        self.call = sagas.WatchSagas(request)

    async def next(self) -> Told:
        """The next response, which must come."""
        with anyio.fail_after(PATIENCE_S):
            response = await self.call.read()
        assert isinstance(response, Told)
        return response

    async def until(self, saga_id: str) -> list[Told]:
        """Responses up to the end of a saga."""
        told: list[Told] = []
        while not told or (told[-1].saga.saga_id, bool(told[-1].saga.ended_at_ms)) != (
            saga_id,
            True,
        ):
            told.append(await self.next())
        return told

    def leave(self) -> None:
        """As a client that has seen enough."""
        self.call.cancel()


async def run(sagas: Sagas, saga_id: str, **options: Any) -> None:
    """A saga from its start to its end."""
    answer = await sagas.StartSaga(
        saga_pb2.StartSagaRequest(saga_id=saga_id, definition="order", wait_ms=60_000, **options)
    )
    assert answer.ended


async def histories(sagas: Sagas, *saga_ids: str) -> list[types_pb2.Record]:
    """All records of these sagas, as the store has them, in their order."""
    records: list[types_pb2.Record] = []
    for saga_id in saga_ids:
        page = await sagas.GetHistory(saga_pb2.GetHistoryRequest(saga_id=saga_id))
        records += page.records
    return sorted(records, key=lambda record: record.seq)


def records_of(told: list[Told]) -> list[types_pb2.Record]:
    """What was told."""
    return [record for response in told for record in response.records]


# -- what is told ----------------------------------------------------------------------------------


async def test_everything_is_told_in_the_order_of_its_commit(sagas: Sagas) -> None:
    """First that one is watching, then every turn of every saga, as the history has it."""
    watch = Watch(sagas)
    notice = await watch.next()
    assert notice.resume_token
    assert not notice.HasField("saga")
    assert not notice.records
    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(run, sagas, f"s-{number}")
    await run(sagas, "last")
    told = await watch.until("last")
    expected = await histories(sagas, *(f"s-{number}" for number in range(5)), "last")
    assert records_of(told) == expected
    for response in told:
        assert len({record.seq for record in response.records}) == 1
        assert {record.version for record in response.records} == {response.saga.version}
        assert response.saga.updated_at_ms == response.records[-1].at_ms
        assert not response.saga.steps
        assert not response.saga.HasField("input")
        assert not response.lagged
        assert not response.purged_turns
    watch.leave()


async def test_what_was_before_is_not_told(sagas: Sagas) -> None:
    """Without a token watching begins now."""
    await run(sagas, "before")
    watch = Watch(sagas)
    await watch.next()
    await run(sagas, "after")
    assert {told.saga.saga_id for told in await watch.until("after")} == {"after"}
    watch.leave()


async def test_only_what_matches_is_told(sagas: Sagas, operator: Any) -> None:
    """By label, by start, by definition: the very same conditions as those of lists."""
    watches = {
        "label": Watch(sagas, labels={"tenant": "a"}),
        "definition": Watch(sagas, definition="order"),
        "nothing": Watch(sagas, definition="other"),
        "later": Watch(sagas, started_from_ms=2**62),
        "both": Watch(sagas, definition="order", labels={"tenant": "b"}),
    }
    for watch in watches.values():
        await watch.next()
    await run(sagas, "a", labels={"tenant": "a"})
    await run(sagas, "b", labels={"tenant": "b"})

    async def seen(name: str, last: str) -> set[str]:
        return {told.saga.saga_id for told in await watches[name].until(last)}

    assert await seen("label", "a") == {"a"}
    assert await seen("definition", "b") == {"a", "b"}
    assert await seen("both", "b") == {"b"}
    for watch in watches.values():
        watch.leave()


async def test_a_state_is_told_although_the_saga_has_moved_on(sagas: Sagas, shop: Shop) -> None:
    """A watcher that comes back finds what turned back, and what ended, and when it was so."""
    watch = Watch(sagas)
    begin = (await watch.next()).resume_token
    watch.leave()
    shop.behaviours["ship"] = refuse
    await run(sagas, "s-1")
    late = Watch(
        sagas,
        begin,
        states=[types_pb2.SAGA_STATE_COMPENSATING, types_pb2.SAGA_STATE_COMPENSATED],
    )
    await late.next()
    told = await late.until("s-1")
    assert [response.saga.state for response in told] == [
        types_pb2.SAGA_STATE_COMPENSATING,
        types_pb2.SAGA_STATE_COMPENSATED,
    ]
    assert [bool(response.saga.ended_at_ms) for response in told] == [False, True]
    late.leave()


async def refuse(call: amends.Call) -> object:
    """A definite refusal."""
    raise amends.Rejected("nobody_home")


async def test_a_damaged_turn_is_told_without_records(
    config: Config, shop: Shop, tmp_path: Path
) -> None:
    """And holds up nothing that comes after it."""
    async with a_runtime(config) as (_, sagas):
        begin = (await Watch(sagas).next()).resume_token
        await run(sagas, "s-1")
    meddle(tmp_path, "DROP TRIGGER history_is_append_only")
    meddle(tmp_path, "UPDATE history SET records = x'c1' WHERE seq = 2")
    async with a_runtime(config) as (_, sagas):
        watch = Watch(sagas, begin)
        await watch.next()
        told = await watch.until("s-1")
        assert [bool(response.records) for response in told[:3]] == [True, False, True]
        assert {response.saga.saga_id for response in told} == {"s-1"}
        watch.leave()


# -- going on --------------------------------------------------------------------------------------


async def test_a_token_goes_on_after_its_response(sagas: Sagas) -> None:
    """From any response: what follows it, all of it, and nothing twice."""
    watch = Watch(sagas)
    begin = (await watch.next()).resume_token
    for number in range(3):
        await run(sagas, f"s-{number}")
    told = await watch.until("s-2")
    watch.leave()
    for position, response in enumerate(told[:-1]):
        again = Watch(sagas, response.resume_token)
        notice = await again.next()
        assert notice.resume_token == response.resume_token
        assert await again.until("s-2") == told[position + 1 :]
        again.leave()
    again = Watch(sagas, begin)
    await again.next()
    assert await again.until("s-2") == told
    again.leave()


async def test_who_watches_for_rare_things_is_told_where_it_is(
    sagas: Sagas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By notices without records, from which it goes on without looking through all of it again."""
    monkeypatch.setattr(watching, "NOTICE_TURNS", 4)
    rare: dict[str, Any] = {"labels": {"rare": "yes"}}
    watch = Watch(sagas, **rare)
    begin = (await watch.next()).resume_token
    for number in range(3):
        await run(sagas, f"s-{number}")
    notice = await watch.next()
    assert not notice.HasField("saga")
    assert notice.resume_token != begin
    watch.leave()
    await run(sagas, "rare", **rare)
    again = Watch(sagas, notice.resume_token, **rare)
    await again.next()
    told = [one for one in await again.until("rare") if one.records]
    assert records_of(told) == await histories(sagas, "rare")
    again.leave()


async def test_tokens_that_are_no_position_of_this_store_are_refused(
    sagas: Sagas, engine: Engine
) -> None:
    """Nonsense and another store's are a wrong request; one of a lost future is a wrong state."""
    ours = engine.store.identity
    for token in ("nonsense", "a" * 1000, "ä", token_of(ours, 0)[:-4]):
        error = await refused(Watch(sagas, token).call.read())
        assert (error.code, set(error.violations)) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            {"resume_token"},
        )
    foreign = token_of(StoreIdentity("another", ours.incarnation, 1), 0)
    error = await refused(Watch(sagas, foreign).call.read())
    assert "of another store, another" in error.violations["resume_token"]
    ahead = token_of(ours, engine.store.head_seq + 1)
    error = await refused(Watch(sagas, ahead).call.read())
    assert (error.code, error.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "RESUME_TOKEN_AHEAD",
    )


async def test_after_a_restore_nobody_goes_on_as_if_nothing_had_happened(
    config: Config, shop: Shop, tmp_path: Path
) -> None:
    """Positions are given out again, to other turns: a token from before the restore is refused."""
    database = Path(config.server.database)
    async with a_runtime(config) as (_, sagas):
        await run(sagas, "kept")
    backup = tmp_path / "backup.db"
    shutil.copy(database, backup)
    async with a_runtime(config) as (_, sagas):
        watch = Watch(sagas)
        begin = (await watch.next()).resume_token
        watch.leave()
        await run(sagas, "lost")
    shutil.copy(backup, database)
    database.with_name(database.name + ".lock").unlink()
    async with a_runtime(config) as (_, sagas):
        await run(sagas, "instead")
        error = await refused(Watch(sagas, begin).call.read())
        assert (error.code, error.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "STORE_RESTORED",
        )


async def test_what_was_purged_meanwhile_is_counted(
    config: Config, shop: Shop, tmp_path: Path
) -> None:
    """Nothing is missed silently: each response says how many turns before it are gone."""
    async with a_runtime(config) as (_, sagas):
        begin = (await Watch(sagas).next()).resume_token
        for number in range(3):
            await run(sagas, f"s-{number}")
        gone = len({record.seq for record in await histories(sagas, "s-1")})
    one = "(SELECT saga_no FROM sagas WHERE saga_id = 's-1')"
    meddle(tmp_path, f"DELETE FROM history WHERE saga_no = {one}")  # noqa: S608  # our own words
    meddle(tmp_path, "DELETE FROM sagas WHERE saga_id = 's-1'")
    async with a_runtime(config) as (_, sagas):
        watch = Watch(sagas, begin)
        await watch.next()
        told = await watch.until("s-2")
        assert {response.saga.saga_id for response in told} == {"s-0", "s-2"}
        assert sum(response.purged_turns for response in told) == gone
        watch.leave()
        rare = Watch(sagas, begin, definition="other")
        await rare.next()
        notice = await rare.next()
        assert notice.purged_turns == gone
        rare.leave()


# -- bounds ----------------------------------------------------------------------------------------


async def test_a_watcher_that_is_far_behind_is_told_and_misses_nothing(
    sagas: Sagas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first response until it has caught up."""
    watch = Watch(sagas)
    begin = (await watch.next()).resume_token
    for number in range(4):
        await run(sagas, f"s-{number}")
    told = await watch.until("s-3")
    watch.leave()
    monkeypatch.setattr(watching, "LAGGED_TURNS", 5)
    late = Watch(sagas, begin)
    assert (await late.next()).lagged
    again = await late.until("s-3")
    assert records_of(again) == records_of(told)
    assert [response.lagged for response in again] == [True] * (len(told) - 6) + [False] * 6
    late.leave()


async def test_a_client_that_does_not_read_costs_a_page(
    sagas: Sagas, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held back, the sagas are not, and in the end it has missed nothing."""
    monkeypatch.setattr(watching, "PAGE_BYTES", 64 * 1024)
    answers: list[WatchedTurns] = []
    turns_after = engine.store.turns_after

    async def counted(after_seq: int, where: SagaFilter, **bounds: int) -> WatchedTurns:
        answers.append(await turns_after(after_seq, where, **bounds))
        return answers[-1]

    monkeypatch.setattr(engine.store, "turns_after", counted)
    # A window of 64 KiB, which gRPC would otherwise let grow to some megabytes on a fast network.
    small_window = [("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(engine.address, options=small_window) as channel:
        watch = Watch(saga_pb2_grpc.SagaServiceStub(channel))
        await watch.next()
        large = types_pb2.Payload(data=bytes(64 * 1024))
        ids = [f"s-{number:03}" for number in range(40)]
        for saga_id in ids:
            await run(sagas, saga_id, input=large)
        # 2.5 MiB lie between a client that does not read and the head: the watcher has read as much
        # as fits the window and a page, and stands at a write.
        assert answers[-1].through_seq < engine.store.head_seq // 2
        told = await watch.until(ids[-1])
        assert records_of(told) == await histories(sagas, *ids)


async def test_a_client_that_does_not_read_holds_up_no_shutdown(config: Config, shop: Shop) -> None:
    """A watcher that stands at a write is let go like one that waits."""
    small_window = [("grpc.http2.bdp_probe", 0)]
    async with run_engine(config, [ORDER]) as engine:
        channel = grpc.aio.insecure_channel(engine.address, options=small_window)
        stub: Sagas = saga_pb2_grpc.SagaServiceStub(channel)
        watch = Watch(stub)
        await watch.next()
        for number in range(10):
            large = types_pb2.Payload(data=bytes(64 * 1024))
            await run(stub, f"s-{number}", input=large)
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await watch.until("nobody")
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    await channel.close()


async def test_watchers_are_counted(sagas: Sagas, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is told the limit; when one has left there is room for it."""
    monkeypatch.setattr(watching, "MAX_WATCHERS", 2)
    watches = [Watch(sagas), Watch(sagas)]
    for watch in watches:
        await watch.next()
    error = await refused(Watch(sagas).call.read())
    assert (error.code, error.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "TOO_MANY_WATCHERS",
    )
    assert error.retry_after_ms
    assert error.metadata["limit"] == "2"
    watches[0].leave()
    another = Watch(sagas)
    with anyio.fail_after(PATIENCE_S):
        while await is_full(another):  # until the server has heard of it
            another = Watch(sagas)
    another.leave()
    watches[1].leave()


async def is_full(watch: Watch) -> bool:
    """Whether it was one too many."""
    try:
        await watch.next()
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return False


async def test_a_watch_ends_with_its_runtime(config: Config, shop: Shop) -> None:
    """UNAVAILABLE, with the word that it stops: go on with the next one."""
    async with run_engine(config, [ORDER]) as engine:
        channel = grpc.aio.insecure_channel(engine.address)
        watch = Watch(saga_pb2_grpc.SagaServiceStub(channel))
        await watch.next()
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await watch.next()
    assert read(ended.value).reason == "SHUTTING_DOWN"
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    await channel.close()


# -- the SDK's ------------------------------------------------------------------------------------


async def test_the_clients_watch_goes_on_through_restarts(config: Config, shop: Shop) -> None:
    """The same loop, over three runtimes of one store, sees every record once and in order."""
    async with run_engine(config, [ORDER]) as engine:
        address = engine.address
    config = config.model_copy(
        update={"server": config.server.model_copy(update={"listen": address})}
    )
    seen: list[int] = []
    ended: list[str] = []
    watching_, done = anyio.Event(), anyio.Event()
    async with amends.Client(address, timeout_s=PATIENCE_S) as client:

        async def watch() -> None:
            async for event in client.watch(definition="order"):
                watching_.set()
                seen.extend(record.seq for record in event.records)
                if event.saga is not None and event.saga.ended:
                    ended.append(event.saga.saga_id)
                if len(ended) == 3:
                    done.set()
                    return

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                for number in range(3):
                    async with run_engine(config):
                        await watching_.wait()
                        started = await client.start("order", saga_id=f"s-{number}")
                        assert (await started.result()).completed
                async with run_engine(config):  # the last end may not have been told yet
                    await done.wait()
                    expected = [
                        record.seq
                        for number in range(3)
                        async for record in client.history(f"s-{number}")
                    ]
    assert ended == ["s-0", "s-1", "s-2"]
    assert seen == expected


async def test_the_clients_watch_goes_on_when_the_store_is_back(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is being reopened ends the stream for a moment, and nothing more."""
    turns_after = engine.store.turns_after
    failures = 2

    async def failing(after_seq: int, where: SagaFilter, **bounds: int) -> WatchedTurns:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise StoreError("it is being reopened")
        return await turns_after(after_seq, where, **bounds)

    monkeypatch.setattr(engine.store, "turns_after", failing)
    async with amends.Client(engine.address) as client:
        events = client.watch()
        first = await anext(events)
        assert (first.saga, first.records, first.purged_turns) == (None, (), 0)
        await (await client.start("order", saga_id="s-1")).result()
        versions: list[int] = []
        async for event in events:
            versions += {record.version for record in event.records}
            if event.saga is not None and event.saga.ended:
                break
        assert failures < 0
        assert versions == sorted(set(versions))
        assert versions == sorted({r.version async for r in client.history("s-1")})


async def test_what_the_clients_watch_cannot_mend_is_raised(engine: Engine) -> None:
    """By its kind, as of any other method."""
    async with amends.Client(engine.address) as client:
        with pytest.raises(amends.InvalidRequest, match="resume_token"):
            await anext(client.watch(resume_token="nonsense"))  # noqa: S106  # guards nothing
        ahead = token_of(engine.store.identity, engine.store.head_seq + 9)
        with pytest.raises(amends.WrongState, match="look at the lists"):
            await anext(client.watch(resume_token=ahead))
    async with amends.Client("127.0.0.1:1", timeout_s=0.2) as nowhere:
        with pytest.raises(amends.Unavailable, match="cannot be reached"):
            await anext(nowhere.watch())


async def test_a_cancelled_watch_leaves_at_once(engine: Engine) -> None:
    """The server has room for another one, and the client goes on working."""
    async with amends.Client(engine.address) as client:
        with anyio.move_on_after(PATIENCE_S) as scope:
            async with aclosing(client.watch()) as events:  # type: ignore[type-var]
                async for _ in events:
                    scope.cancel()
        assert scope.cancelled_caught
        assert [one.name for one in await client.participants()] == ["shop"]


# -- small parts -----------------------------------------------------------------------------------


@asynccontextmanager
async def a_runtime(config: Config) -> AsyncIterator[tuple[Engine, Sagas]]:
    """A runtime that knows the order, and a stub of it."""
    async with (
        run_engine(config, [ORDER]) as engine,
        grpc.aio.insecure_channel(engine.address) as channel,
    ):
        yield engine, saga_pb2_grpc.SagaServiceStub(channel)


def meddle(folder: Path, sql: str) -> None:
    """Changes the database that no runtime has open."""
    connection = sqlite3.connect(folder / "amends.db")
    with connection:
        connection.execute(sql)
    connection.close()
