"""The queue and its thread: what leaves, what is tried again, what is counted, what is said."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest
import structlog.testing

from amends_runtime.telemetry import sending as sending_module
from amends_runtime.telemetry.otel_variables import Destination
from amends_runtime.telemetry.otlp import SpanExport, resource
from amends_runtime.telemetry.sending import Export, Sender
from amends_runtime.telemetry.spans import Span, SpanKind
from tests.telemetry.otlp_receiver import Behaviour, Receiver, receiving


def span(number: int) -> Span:
    """A span with this number as its id."""
    return Span(
        trace_id="0a" * 16,
        span_id=f"{number + 1:016x}",
        parent_id="",
        name=f"span {number}",
        kind=SpanKind.INTERNAL,
        start_ns=1,
        end_ns=2,
        attributes={},
    )


class Scripted:
    """A way to a collector that answers what a test says, in this order, and then well."""

    def __init__(self, *answers: str | None) -> None:
        self._answers = list(answers)
        self.sent: list[list[str]] = []
        self.closed = False

    def send(self, spans: Sequence[Span]) -> str | None:
        """The next answer."""
        self.sent.append([one.name for one in spans])
        return self._answers.pop(0) if self._answers else None

    def close(self) -> None:
        """There is nothing to break off."""
        self.closed = True


class Left:
    """What the sender has said of parcels."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, bool]] = []
        self._all = threading.Condition()

    def __call__(self, parcel: int, taken: bool) -> None:  # noqa: FBT001  # as the sender calls it
        with self._all:
            self.taken.append((parcel, taken))
            self._all.notify_all()

    async def wait(self, count: int) -> None:
        """Until so many parcels have left."""

        def wait() -> None:
            with self._all:
                self._all.wait_for(lambda: len(self.taken) >= count)

        await anyio.to_thread.run_sync(wait)


@asynccontextmanager
async def sender_of(export: Export, left: Left, spans_each: int = 1) -> AsyncIterator[Sender[int]]:
    """A sender of numbers, each of which has so many spans in it; closed in the end."""
    sender = Sender[int](
        export,
        where="the collector",
        unpack=lambda number: [span(spans_each * number + i) for i in range(spans_each)],
        left=left,
    )
    sender.start()
    yield sender
    await sender.close(5.0)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once."""
    monkeypatch.setattr(sending_module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(sending_module, "MAX_WAIT_S", 0.01)


async def test_what_comes_together_leaves_together() -> None:
    """One message for all that waits, in the order in which it came, and nothing of it later."""
    export, left = Scripted(), Left()
    async with sender_of(export, left) as sender:
        for number in range(5):
            assert sender.offer(number, 10)
        await left.wait(5)
        assert export.sent == [[f"span {number}" for number in range(5)]]
        assert left.taken == [(number, True) for number in range(5)]
        assert sender.counts() == (5, 0, 0)
        assert sender.waiting_bytes == 0
    assert export.closed


async def test_a_large_parcel_leaves_in_several_messages() -> None:
    """None is larger than a collector takes."""
    export, left = Scripted(), Left()
    async with sender_of(export, left, spans_each=1_000) as sender:
        sender.offer(0, 10)
        await left.wait(1)
        assert [len(message) for message in export.sent] == [256, 256, 256, 232]
        assert sender.counts().exported == 1_000


async def test_what_was_not_taken_is_tried_again_and_said_once() -> None:
    """A warning at the first failure, a line at the next success, nothing in between."""
    export, left = Scripted("down", "down", "still down"), Left()
    with structlog.testing.capture_logs() as lines:
        async with sender_of(export, left) as sender:
            sender.offer(0, 10)
            await left.wait(1)
            assert export.sent == [["span 0"]] * 4
            assert sender.counts() == (1, 0, 0)
    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("traces_not_taken", "warning"),
        ("traces_taken_again", "info"),
    ]
    assert (lines[0]["why"], lines[0]["to"]) == ("down", "the collector")
    assert lines[1]["spans_lost"] == 0


async def test_what_is_never_taken_does_not_stop_what_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is counted as failed once its time is over, and its owner knows."""
    monkeypatch.setattr(sending_module, "TRY_FOR_S", 0.0)
    export, left = Scripted("bad"), Left()
    with structlog.testing.capture_logs() as lines:
        async with sender_of(export, left) as sender:
            sender.offer(0, 10)
            await left.wait(1)
            sender.drop(3)
            sender.offer(1, 10)
            await left.wait(2)
            assert left.taken == [(0, False), (1, True)]
            assert sender.counts() == (1, 3, 1)
    assert lines[-1]["spans_lost"] == 4


async def test_a_parcel_of_which_no_spans_can_be_made_concerns_no_other() -> None:
    """A bug in making spans costs one trace."""
    export, left = Scripted(), Left()

    def unpack(number: int) -> list[Span]:
        if number == 1:
            raise ValueError("a bug")
        return [span(number)]

    sender = Sender[int](export, where="the collector", unpack=unpack, left=left)
    with structlog.testing.capture_logs() as lines:
        for number in range(3):
            sender.offer(number, 10)
        sender.start()
        await left.wait(3)
        await sender.close(5.0)
    assert export.sent == [["span 0", "span 2"]]
    assert [line["event"] for line in lines] == ["trace_not_made"]


async def test_a_full_queue_takes_nothing_until_there_is_room() -> None:
    """What is being sent counts, too; one parcel always fits."""
    export, left = Scripted(), Left()
    sender = Sender[int](
        export, where="x", unpack=lambda number: [span(number)], left=left, queue_bytes=100
    )
    assert sender.offer(0, 1_000)
    assert not sender.offer(1, 1)
    assert sender.waiting_bytes == 1_000
    sender.start()
    await left.wait(1)
    await sender.close(5.0)
    assert sender.has_room
    assert sender.counts() == (1, 0, 0)


async def test_the_end_sends_what_waits_and_tries_once() -> None:
    """A collector that is away does not hold up the end: what waits is counted as failed."""
    export, left = Scripted("down", "down"), Left()
    async with sender_of(export, left) as sender:
        await sender.close(5.0)
        assert export.closed
    later = Sender[int](
        Scripted("down"), where="x", unpack=lambda number: [span(number)], left=left
    )
    later.offer(0, 10)
    later._closing.set()
    later.start()
    await later.close(5.0)
    assert later.counts() == (0, 0, 1)


async def receive_after_an_outage(receiver: Receiver, destination: Destination) -> None:
    """Spans that are offered while nobody listens, and what becomes of them."""
    left = Left()
    async with sender_of(SpanExport(destination, resource("store", {})), left) as sender:
        sender.offer(0, 10)
        await receiver.wait_until(lambda: len(receiver.spans()) == 1)
        await receiver.stop()
        for number in range(1, 4):
            sender.offer(number, 10)
        await receiver.start()
        await receiver.wait_until(lambda: len(receiver.spans()) == 4)
        receiver.behave(Behaviour.REFUSE)
        before = receiver.arrived
        sender.offer(4, 10)
        await receiver.wait_until(lambda: receiver.arrived > before)
        receiver.behave(Behaviour.SLOW)
        await receiver.wait_until(lambda: len(receiver.spans()) == 5)
        await left.wait(5)
        assert sender.counts() == (5, 0, 0)
    assert [one.name for one in receiver.spans()] == [f"span {number}" for number in range(5)]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_nothing_is_lost_while_a_collector_is_away_refuses_or_is_slow(protocol: str) -> None:
    """A real one that stops, comes back on its port, refuses for a while, and takes its time.

    Its answers are never late, after which it would be sent the same spans once more.
    """
    async with receiving() as receiver:
        if protocol == "grpc":
            endpoint = f"http://{receiver.grpc_address}"
            to = Destination(signal="traces", protocol="grpc", endpoint=endpoint, timeout_s=60.0)
        else:
            endpoint = f"{receiver.http_url}/v1/traces"
            to = Destination(
                signal="traces", protocol="http/protobuf", endpoint=endpoint, timeout_s=60.0
            )
        await receive_after_an_outage(receiver, to)
