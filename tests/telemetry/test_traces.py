"""Which spans leave a runtime, and when: each saga's once, whatever happens to saga and runtime.

The runtime is a whole one in this process, over SQLite and gRPC, and the receiver is a real one;
but for the tests of bounds, in which time and the collector must stand still.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import msgspec
import pytest
import structlog.testing
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

import amends
from amends_runtime.config import Config, Participant, Server, Telemetry
from amends_runtime.core.definition import Definition, Plan, RetryPolicy, Step, normalise
from amends_runtime.core.messages import Answered, Done, Message, StartSaga, Unknown, Wake
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Verb
from amends_runtime.core.saga import Saga, decide
from amends_runtime.core.tracing import Tracing
from amends_runtime.engine import Engine, run_engine
from amends_runtime.errors import CommitUnknown, StoreError, UnreadableSaga
from amends_runtime.ports import LoadedSaga, Store, Transition, summarise
from amends_runtime.storage import SqliteStore, open_memory_store, open_sqlite_store
from amends_runtime.telemetry import traces as traces_module
from amends_runtime.telemetry.collector import Answer, Taken
from amends_runtime.telemetry.spans import Span
from amends_runtime.telemetry.traces import Traces
from tests.actors.runtimes import Hooks, hook_store
from tests.telemetry.otlp_receiver import ReceivedSpan, Receiver, receiving

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7"
SOON = amends.Retry(first_s=0.01, max_s=0.05, give_up_after_s=86_400)

TWO_STEPS = amends.Definition("two").step("a", "shop", "do").step("b", "shop", "wait", retry=SOON)
ONE_STEP = amends.Definition("one").step("a", "shop", "do")


class Shop:
    """A participant whose action `wait` fails until `opens` is called."""

    def __init__(self) -> None:
        self.is_open = False
        self.tried = 0
        self._asked = anyio.Event()
        self.participant = amends.Participant("shop", barrier=None)

        @self.participant.execute("do")
        async def do(call: amends.Call) -> None:
            """Nothing to do."""

        @self.participant.compensate("do")
        async def undo(call: amends.Call) -> None:
            """Nothing to undo."""

        @self.participant.execute("wait", compensatable=False)
        async def wait(call: amends.Call) -> amends.InProgress | None:
            self.tried += 1
            self._asked.set()
            if not self.is_open:
                raise RuntimeError("closed")
            return None

    async def wait_tried(self, count: int) -> None:
        """Until `wait` was called so often."""
        while self.tried < count:
            self._asked = anyio.Event()
            await self._asked.wait()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A collector that is well."""
    async with receiving() as running:
        yield running


@pytest.fixture
async def shop() -> AsyncIterator[tuple[Shop, str]]:
    """The participant, and its address."""
    the_shop = Shop()
    async with amends.serve(the_shop.participant, listen="127.0.0.1:0") as server:
        yield the_shop, server.address


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes on is handed over soon, so that tests need not wait for seconds."""
    monkeypatch.setattr(traces_module, "LOOK_EVERY_S", 0.05)


@asynccontextmanager
async def runtime(
    folder: Path, receiver: Receiver, shop: tuple[Shop, str], **telemetry: object
) -> AsyncIterator[tuple[Engine, amends.Client]]:
    """A runtime that sends to the receiver, and a client that has registered both definitions."""
    config = Config(
        server=Server(listen="127.0.0.1:0", database=str(folder / "amends.db")),
        participants={"shop": Participant(address=shop[1])},
        telemetry=Telemetry(otlp_endpoint=receiver.grpc_address, **telemetry),  # type: ignore[arg-type]
    )
    async with (
        run_engine(config) as engine,
        amends.Client(engine.address, timeout_s=30) as client,
    ):
        await client.register(ONE_STEP)
        await client.register(TWO_STEPS)
        yield engine, client


def root_of(spans: Iterable[ReceivedSpan], saga_id: str) -> ReceivedSpan | None:
    """The root span of a saga, if it is there."""
    return next(
        (
            span
            for span in spans
            if span.name.startswith("saga ") and span.attributes["amends.saga_id"] == saga_id
        ),
        None,
    )


def times_each(spans: Iterable[ReceivedSpan]) -> set[int]:
    """How often spans were sent."""
    return set(Counter(span.span_id for span in spans).values())


# -- when ------------------------------------------------------------------------------------------


async def test_a_saga_that_ends_leaves_whole_and_once(
    tmp_path: Path, receiver: Receiver, shop: tuple[Shop, str]
) -> None:
    """Root, step and attempt, in the trace that its id makes."""
    async with runtime(tmp_path, receiver, shop) as (engine, client):
        saga = await client.start("one", saga_id="s-1")
        await saga.result()
        await receiver.wait_until(lambda: root_of(receiver.spans(), "s-1") is not None)
        trace_id = Tracing(engine.store.identity.store_id).trace_id("s-1", "")
    spans = receiver.spans(trace_id)
    assert [span.name for span in spans] == [
        "saga one",
        "step a",
        "amends.v1.ParticipantService/Execute",
    ]
    assert len(receiver.spans()) == 3
    assert {span.service for span in spans} == {"amends"}


async def test_a_saga_that_lives_on_sends_what_has_closed_and_nothing_twice(
    tmp_path: Path, receiver: Receiver, shop: tuple[Shop, str]
) -> None:
    """Its first step is seen while the second is tried again and again; at the end the rest is."""
    async with runtime(tmp_path, receiver, shop) as (_, client):
        saga = await client.start("two")
        await receiver.wait_until(lambda: len(receiver.spans()) >= 6)
        assert "step a" in {span.name for span in receiver.spans()}
        assert root_of(receiver.spans(), saga.saga_id) is None
        shop[0].is_open = True
        await saga.result()
        await receiver.wait_until(lambda: root_of(receiver.spans(), saga.saga_id) is not None)
    assert times_each(receiver.spans()) == {1}
    assert {span.name for span in receiver.spans()} >= {"saga two", "step a", "step b"}


async def test_what_has_closed_leaves_before_a_runtime_that_stops_is_gone(
    tmp_path: Path,
    receiver: Receiver,
    shop: tuple[Shop, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though nobody has looked yet."""
    monkeypatch.setattr(traces_module, "LOOK_EVERY_S", 3600.0)
    async with runtime(tmp_path, receiver, shop) as (_, client):
        await client.start("two")
        await shop[0].wait_tried(2)
    assert "step a" in {span.name for span in receiver.spans()}


async def test_a_recovered_saga_sends_everything_that_is_closed_again_and_equal(
    tmp_path: Path, receiver: Receiver, shop: tuple[Shop, str]
) -> None:
    """One trace, and what is there twice is there byte by byte."""
    async with runtime(tmp_path, receiver, shop) as (_, client):
        saga = await client.start("two")
        await receiver.wait_until(lambda: "step a" in {span.name for span in receiver.spans()})
    first = receiver.spans()
    shop[0].is_open = True
    async with runtime(tmp_path, receiver, shop) as (_, client):
        await client.handle(saga.saga_id).result()
        await receiver.wait_until(lambda: root_of(receiver.spans(), saga.saga_id) is not None)
    second = receiver.spans()[len(first) :]
    assert len(receiver.received.trace_ids()) == 1
    assert times_each(first) == times_each(second) == {1}
    assert {span.span_id for span in first} < {span.span_id for span in second}
    again = {span.span_id: span for span in second}
    for span in first:
        assert span.proto.SerializeToString() == again[span.span_id].proto.SerializeToString()
        assert span.resource == again[span.span_id].resource


async def test_what_ended_just_before_a_runtime_did_is_sent_again_and_equal(
    tmp_path: Path, receiver: Receiver, shop: tuple[Shop, str]
) -> None:
    """By the next one, whoever has it already; but nothing of what its caller does not sample."""
    async with runtime(tmp_path, receiver, shop) as (_, client):
        for saga_id, flag in (("s-1", "01"), ("s-2", "00"), ("s-3", "01")):
            saga = await client.start("one", saga_id=saga_id, traceparent=f"{CALLER}-{flag}")
            await saga.result()
    first = receiver.spans()
    async with runtime(tmp_path, receiver, shop):
        await receiver.wait_until(lambda: len(receiver.spans()) == 2 * len(first))
    again = {span.span_id: span for span in receiver.spans()[len(first) :]}
    assert len(first) == len(again) == 6
    for span in first:
        assert span == again[span.span_id]


async def live_in_store(store: Store, saga_id: str, at_ms: int, *, ends: bool = True) -> None:
    """Commit a saga's life, each turn at this time."""
    await store.put_definition(PLAN.definition, 1)
    number, before = store.next_saga_no(), None
    for version, message in enumerate(messages_of(saga_id, PLAN)[: 2 if ends else 1], 1):
        decision = decide(PLAN, before, message, at_ms, 1)
        saga = before = decision.saga
        summary = summarise(saga, number, version)
        summary = msgspec.structs.replace(summary, definition_hash=PLAN.content_hash)
        await store.commit(
            [
                Transition(
                    saga_no=number,
                    version=version,
                    records=decision.records,
                    state=saga.state,
                    past_no_return=saga.past_no_return,
                    summary=summary,
                )
            ]
        )


async def looked_back(store: Store) -> list[str]:
    """Whose history a new runtime reads, in this order."""
    traces = Traces(Tracing("store"), store, Stopped(), where="nowhere")
    await live_in_store(store, "of-this-runtime", 10**12)
    await traces._look_back()
    found = [*traces._to_read]
    await traces._look_back()
    assert [*traces._to_read] == found, "it looks back once"
    traces._to_read.clear()
    traces._sender._export.close()
    await traces.close()
    return found


@pytest.mark.parametrize(("stretch", "size"), [(256, 10**6), (2, 1), (3, 10**6)])
async def test_a_look_back_is_bounded_by_time(
    monkeypatch: pytest.MonkeyPatch, stretch: int, size: int
) -> None:
    """Ten seconds before the last commit, of whichever saga; in as many answers as it takes."""
    monkeypatch.setattr(traces_module, "LOOK_BACK_STRETCH", stretch)
    monkeypatch.setattr(traces_module, "LOOK_BACK_SIZE", size)
    monkeypatch.setattr(traces_module, "READ_PAUSE_S", 0.0)
    async with open_memory_store() as store:
        assert await looked_back(store) == []
    async with open_memory_store() as store:
        for number in range(20):
            await live_in_store(store, f"s-{number}", 1_000 * (number + 1))
        await live_in_store(store, "goes-on", 22_000, ends=False)
        assert sorted(await looked_back(store)) == sorted(f"s-{number}" for number in range(11, 20))


async def test_a_look_back_that_fails_is_tried_again_and_holds_up_no_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store may just be reopened; and what one has not read at its end, the next one will."""
    async with open_memory_store() as store:
        await live_in_store(store, "s-1", 1_000)
        export = Stopped()
        traces = Traces(Tracing("store"), store, export, where="nowhere")
        with monkeypatch.context() as broken:

            async def failing(*_: object, **__: object) -> None:
                raise StoreError("as planned")

            broken.setattr(store, "turns_after", failing)
            await traces._look_and_read()
            assert traces._to_read == {}
        await traces._look_back()
        assert [*traces._to_read] == ["s-1"]
        export.goes.set()
        await traces.close()
        assert traces.counts() == (0, 0, 0)


async def test_a_look_back_is_bounded_by_turns_and_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The newest are the likeliest to be missing."""
    monkeypatch.setattr(traces_module, "READ_PAUSE_S", 0.0)
    monkeypatch.setattr(traces_module, "LOOK_BACK_TURNS", 6)
    async with open_memory_store() as store:
        for number in range(10):
            await live_in_store(store, f"s-{number}", 1_000)
        assert sorted(await looked_back(store)) == ["s-7", "s-8", "s-9"]
    monkeypatch.setattr(traces_module, "LOOK_BACK_STRETCH", 2)
    monkeypatch.setattr(traces_module, "LOOK_BACK_ANSWERS", 1)
    async with open_memory_store() as store:
        for number in range(10):
            await live_in_store(store, f"s-{number}", 1_000)
        assert await looked_back(store) == ["s-9"]


@pytest.mark.parametrize("how", ["written", "not written"])
async def test_a_failed_commit_leaves_no_hole_in_a_trace(
    tmp_path: Path,
    receiver: Receiver,
    shop: tuple[Shop, str],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """A turn that was written, and that nobody was told of, is read from the store."""
    hooks: Hooks = hook_store(monkeypatch)
    left = [2]  # the answer of the first step: the saga is known, and its step has not ended

    async def commit(store: SqliteStore, transitions: Sequence[Transition]) -> int:
        left[0] -= 1
        if left[0] == 0:
            if how == "written":
                await store.commit(transitions)
            raise CommitUnknown("as planned")
        return await store.commit(transitions)

    async with runtime(tmp_path, receiver, shop) as (_, client):
        shop[0].is_open = True
        hooks["commit"] = commit
        saga = await client.start("two")
        await saga.result()
        assert left[0] < 0
        await receiver.wait_until(lambda: root_of(receiver.spans(), saga.saga_id) is not None)
    names = Counter(span.name for span in receiver.spans())
    assert names["step a"] == names["step b"] == names["saga two"] == 1
    assert times_each(receiver.spans()) == {1}


async def test_sagas_for_whose_records_there_is_no_room_are_read_from_the_store(
    tmp_path: Path,
    receiver: Receiver,
    shop: tuple[Shop, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their traces are as whole as others."""
    monkeypatch.setattr(traces_module, "KEPT_RECORDS", 2)
    async with runtime(tmp_path, receiver, shop) as (_, client):
        shop[0].is_open = True
        sagas = [await client.start("two") for _ in range(20)]
        for saga in sagas:
            await saga.result()
        await receiver.wait_until(
            lambda: all(root_of(receiver.spans(), saga.saga_id) for saga in sagas)
        )
    assert len(receiver.spans()) == 20 * 5
    assert times_each(receiver.spans()) == {1}


async def test_a_recovered_saga_is_read_once(
    tmp_path: Path,
    receiver: Receiver,
    shop: tuple[Shop, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long it lives on: what was read is kept, and what follows is told."""
    monkeypatch.setattr(traces_module, "REST_S_PER_RECORD", 0.0)
    async with runtime(tmp_path, receiver, shop) as (_, client):
        saga = await client.start("two")
        await shop[0].wait_tried(3)
    first = len(receiver.spans())
    hooks: Hooks = hook_store(monkeypatch)
    reads: list[str] = []

    async def load(store: SqliteStore, saga_ids: Sequence[str]) -> object:
        reads.extend(saga_ids)
        return await store.load(saga_ids)

    async with runtime(tmp_path, receiver, shop) as (_, client):
        hooks["load"] = load
        await receiver.wait_until(lambda: len(receiver.spans()) > first)
        read = len(reads)
        await shop[0].wait_tried(shop[0].tried + 20)
        before = len(receiver.spans())
        await receiver.wait_until(lambda: len(receiver.spans()) > before)
        assert len(reads) - read <= 2, "a turn may have been under way when it was read"
        shop[0].is_open = True
        await client.handle(saga.saga_id).result()
        await receiver.wait_until(lambda: root_of(receiver.spans(), saga.saga_id) is not None)
        assert reads.count(saga.saga_id) <= 5, "by the recovery, too"
    assert times_each(receiver.spans()[first:]) == {1}


async def test_a_page_of_histories_is_bounded_by_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding them holds up the loop; one that is longer than a page is one alone."""
    monkeypatch.setattr(traces_module, "READ_RECORDS", 10)
    async with open_memory_store() as store:
        traces = Traces(Tracing("store"), store, Stopped(), where="nowhere")
        for number, length in enumerate((4, 4, 4, 50, 1)):
            live = traces_module._Live(PLAN, f"s-{number}", None, None)
            live.length = length
            traces._to_read[live.saga_id] = live
        pages = [[live.length for live in traces._next_page()] for _ in range(4)]
        assert pages == [[4, 4], [4], [50], [1]]
        traces._sender._export.close()
        await traces.close()


async def test_a_disk_that_stalls_does_not_hold_up_the_end(
    tmp_path: Path,
    receiver: Receiver,
    shop: tuple[Shop, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What has not been read by then is left, and said."""
    monkeypatch.setattr(traces_module, "KEPT_RECORDS", 0)
    monkeypatch.setattr(traces_module, "LOOK_EVERY_S", 3600.0)
    monkeypatch.setattr(traces_module, "CLOSE_S", 0.2)
    hooks: Hooks = hook_store(monkeypatch)

    async def load(store: SqliteStore, saga_ids: Sequence[str]) -> None:
        await anyio.sleep_forever()

    with structlog.testing.capture_logs() as lines:
        async with runtime(tmp_path, receiver, shop) as (_, client):
            saga = await client.start("one")
            await saga.result()
            hooks["load"] = load
    [line] = [line for line in lines if line["event"] == "traces_not_read"]
    assert (line["log_level"], line["sagas"]) == ("warning", 1)


async def test_a_read_that_is_given_up_leaves_a_reader_that_reads(tmp_path: Path) -> None:
    """As often as there are readers, and more."""
    async with open_sqlite_store(str(tmp_path / "amends.db")) as store:
        await live_in_store(store, "s-1", 1_000)
        for _ in range(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(store.load, ["s-1"])
                await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            [found] = (await store.load(["s-1"])).values()
            assert isinstance(found, LoadedSaga)
            assert len(found.turns) == 2


async def test_a_saga_that_cannot_be_read_holds_up_no_other(
    tmp_path: Path,
    receiver: Receiver,
    shop: tuple[Shop, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A damaged history has no trace; those that are read together with it have theirs."""
    monkeypatch.setattr(traces_module, "KEPT_RECORDS", 0)
    monkeypatch.setattr(traces_module, "LOOK_EVERY_S", 3600.0)
    hooks: Hooks = hook_store(monkeypatch)

    async def load(store: SqliteStore, saga_ids: Sequence[str]) -> object:
        if "damaged" in saga_ids:
            raise UnreadableSaga("damaged", "as planned")
        return await store.load(saga_ids)

    async with runtime(tmp_path, receiver, shop) as (_, client):
        for saga_id in ("s-1", "damaged", "s-2"):
            saga = await client.start("one", saga_id=saga_id)
            await saga.result()
        hooks["load"] = load
    assert root_of(receiver.spans(), "s-1") is not None
    assert root_of(receiver.spans(), "s-2") is not None
    assert root_of(receiver.spans(), "damaged") is None


# -- which -----------------------------------------------------------------------------------------


async def test_a_caller_that_does_not_sample_is_followed(
    tmp_path: Path, receiver: Receiver, shop: tuple[Shop, str]
) -> None:
    """Nothing of its saga leaves; a saga of one that does is in the caller's trace."""
    async with runtime(tmp_path, receiver, shop, traces_ratio=0.0) as (_, client):
        for flag in ("00", "01"):
            saga = await client.start("one", saga_id=f"s-{flag}", traceparent=f"{CALLER}-{flag}")
            await saga.result()
        await receiver.wait_until(lambda: root_of(receiver.spans(), "s-01") is not None)
    root = root_of(receiver.spans(), "s-01")
    assert root is not None
    assert (root.trace_id, root.parent_id) == (CALLER[3:35], CALLER[36:52])
    assert {span.trace_id for span in receiver.spans()} == {CALLER[3:35]}
    assert root_of(receiver.spans(), "s-00") is None


async def test_a_share_of_traces_is_the_share_that_opentelemetry_keeps(
    tmp_path: Path, receiver: Receiver, shop: tuple[Shop, str]
) -> None:
    """The runtime's own choice, of traces that it names itself, and the library's are the same."""
    sampler = TraceIdRatioBased(0.5)
    async with runtime(tmp_path, receiver, shop, traces_ratio=0.5) as (engine, client):
        tracing = Tracing(engine.store.identity.store_id)
        traces = {f"s-{number}": tracing.trace_id(f"s-{number}", "") for number in range(40)}
        for saga_id in traces:
            saga = await client.start("one", saga_id=saga_id)
            await saga.result()
    kept = {
        trace_id
        for trace_id in traces.values()
        if sampler.should_sample(None, int(trace_id, 16), "saga one").decision
        is Decision.RECORD_AND_SAMPLE
    }
    assert set(receiver.received.trace_ids()) == kept
    assert len(receiver.spans()) == 3 * len(kept)


@given(st.integers(1, 2**128 - 1), st.sampled_from([0.0, 0.01, 0.1, 1 / 3, 0.5, 0.99, 1.0]))
def test_every_trace_is_kept_that_the_library_would_keep(number: int, ratio: float) -> None:
    """So participants that sample by themselves, by the same ratio, keep the same sagas."""
    by_the_library = TraceIdRatioBased(ratio).should_sample(None, number, "saga").decision
    sampled = Tracing("store", ratio=ratio).is_sampled(f"{number:032x}", "")
    assert sampled is (by_the_library is Decision.RECORD_AND_SAMPLE)


# -- bounds ----------------------------------------------------------------------------------------

STEPS = tuple(Step(name=name, participant="p", action="do") for name in "abc")
PLAN = Plan(normalise(Definition(name="one", steps=STEPS[:1])))
LONGER = Plan(normalise(Definition(name="three", steps=STEPS)))


class Stopped:
    """A collector that answers nothing until it is let go, and then everything."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.goes = threading.Event()
        self.sent: list[Span] = []

    def send(self, spans: Sequence[Span]) -> Answer:
        """Waits, and keeps them."""
        self.asked.set()
        self.goes.wait()
        self.sent += spans
        return Taken()

    def close(self) -> None:
        """Lets go of who waits."""
        self.goes.set()


def live_a_life(
    traces: Traces, saga_id: str, payload: bytes = b"", traceparent: str = "", plan: Plan = PLAN
) -> None:
    """Tell of a saga that starts, does its steps one after the other, and completes."""
    before: Saga | None = None
    for message in messages_of(saga_id, plan, payload, traceparent):
        decision = decide(plan, before, message, 1_000, 1)
        traces.turn_committed(plan, before, decision.saga, decision.records)
        before = decision.saga
    assert before is not None
    assert before.ended


def messages_of(
    saga_id: str, plan: Plan, payload: bytes = b"", traceparent: str = ""
) -> list[Message]:
    """What a saga is told that completes without ado."""
    start = StartSaga(
        saga_id=saga_id, content_hash="", input=Payload(payload), traceparent=traceparent
    )
    answers: list[Message] = [
        Answered(
            step=step,
            verb=Verb.EXECUTE,
            round=1,
            attempt=1,
            polls=0,
            outcome=Done(Payload(payload)),
            sent_at_ms=1_000,
            answered_at_ms=1_001,
            status="OK",
        )
        for step in range(len(plan.steps))
    ]
    return [start, *answers]


async def test_what_waits_is_bounded_while_a_collector_hangs() -> None:
    """The first ones wait, the others are counted; when it answers again, the first ones leave."""
    export = Stopped()
    async with open_memory_store() as store:
        traces = Traces(Tracing("store"), store, export, where="nowhere", queue_bytes=16 * 1024)
        live_a_life(traces, "first")
        await anyio.to_thread.run_sync(export.asked.wait)
        for number in range(1_000):
            live_a_life(traces, f"s-{number}")
        waiting = traces.waiting
        assert 0 < waiting < 10
        assert traces.counts().dropped == (1_000 - waiting) * 3
        assert traces._sender.waiting_bytes <= 16 * 1024
        assert (traces._kept, traces._live) == (0, {})
        export.goes.set()
        await traces.close()
        assert traces.counts() == ((1 + waiting) * 3, (1_000 - waiting) * 3, 0)
        assert len(export.sent) == (1 + waiting) * 3


async def test_payloads_do_not_wait_with_their_records() -> None:
    """A megabyte in, a megabyte out: what waits is as small as for any other saga."""
    export = Stopped()
    async with open_memory_store() as store:
        traces = Traces(Tracing("store"), store, export, where="nowhere")
        for number in range(10):
            live_a_life(traces, f"s-{number}", payload=bytes(1024 * 1024))
        assert traces._sender.waiting_bytes < 64 * 1024
        export.goes.set()
        await traces.close()
        assert traces.counts().exported == 30


async def test_what_was_looked_at_while_it_lived_is_let_go_of_when_it_has_ended() -> None:
    """A saga's state holds its payloads, and the next look comes only after some seconds."""
    export = Stopped()
    async with open_memory_store() as store:
        traces = Traces(Tracing("store"), store, export, where="nowhere")
        live_a_life(traces, "s-1", payload=bytes(500_000), plan=LONGER)
        [looked_at] = traces._young
        assert (looked_at.saga, looked_at.records) == (None, None)
        export.goes.set()
        await traces.close()
        assert traces.counts() == (7, 0, 0)


SLOW = RetryPolicy(first_ms=3_600_000, max_ms=3_600_000, give_up_after_ms=86_400_000)
RESTING = Plan(
    normalise(
        Definition(name="slow", steps=(Step(name="a", participant="p", action="do", retry=SLOW),))
    )
)


def tell(traces: Traces, before: Saga | None, message: Message) -> Saga:
    """Tell of one turn; the state after it."""
    decision = decide(RESTING, before, message, 1_000, 1)
    traces.turn_committed(RESTING, before, decision.saga, decision.records)
    return decision.saga


async def test_of_a_saga_at_rest_no_payload_is_kept() -> None:
    """Once what has closed was handed over: it has left memory, and may never come back."""
    export = Stopped()
    async with open_memory_store() as store:
        traces = Traces(Tracing("store"), store, export, where="nowhere")
        start, answer = messages_of("s-1", RESTING, bytes(500_000))
        assert isinstance(answer, Answered)
        failed = msgspec.structs.replace(answer, outcome=Unknown("UNAVAILABLE", "it is away"))
        saga = tell(traces, tell(traces, None, start), failed)
        assert saga.steps[0].retry_at_ms
        for _ in range(2):
            await traces._look()
        [live] = traces._live.values()
        assert (live.saga, live.records, traces._kept) == (None, None, 0)
        # It comes back as another object that says the same, and ends.
        again = tell(traces, msgspec.structs.replace(saga), Wake(saga.steps[0].retry_at_ms))
        assert traces._at_rest == {}
        tell(traces, again, msgspec.structs.replace(answer, attempt=2))
        assert (traces._live, traces._kept) == ({}, 0)
        export.goes.set()
        await traces.close()


async def test_of_a_saga_that_has_been_quiet_for_a_minute_no_payload_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its attempt may be one that is asked again in hours; and of such there may be any number."""
    monkeypatch.setattr(traces_module, "AT_REST", 3)
    export = Stopped()
    async with open_memory_store() as store:
        traces = Traces(Tracing("store"), store, export, where="nowhere")
        for number in range(10):
            tell(traces, None, messages_of(f"s-{number}", RESTING, bytes(500_000))[0])
        for _ in range(traces_module.QUIET_LOOKS * 2):
            await traces._look()
        assert [live.saga for live in traces._live.values()] == [None] * 3
        assert traces._kept == 0
        export.goes.set()
        await traces.close()


async def test_nothing_is_kept_of_sagas_that_are_not_sampled() -> None:
    """But for the decision, while they are live, and of those no more than there is room for."""
    export = Stopped()
    async with open_memory_store() as store:
        traces = Traces(Tracing("store", ratio=0.0), store, export, where="nowhere")
        for number in range(100):
            live_a_life(traces, f"s-{number}")
        live_a_life(traces, "joined", traceparent=f"{CALLER}-01")
        assert (traces._kept, traces._live, traces._unsampled) == (0, {}, {})
        export.goes.set()
        await traces.close()
        assert {span.trace_id for span in export.sent} == {CALLER[3:35]}


async def test_a_collector_that_hangs_at_the_end_is_left_behind() -> None:
    """`close` returns though the thread never does, and what waited is not forgotten silently."""

    class Deaf(Stopped):
        def close(self) -> None:
            """Hangs, too."""
            threading.Event().wait()

    export = Deaf()
    async with open_memory_store() as store:
        traces = Traces(Tracing("store"), store, export, where="nowhere")
        live_a_life(traces, "first")
        await anyio.to_thread.run_sync(export.asked.wait)
        await traces.close()
        assert traces._sender._thread.is_alive()
        assert traces.counts().exported == 0
    export.goes.set()
