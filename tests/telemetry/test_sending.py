"""The queue and its thread: what leaves, what is tried again, what is counted, what is said."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest
import structlog.testing

from amends_runtime.telemetry import sending as sending_module
from amends_runtime.telemetry.collector import Answer, Refused, SpanExport, Taken
from amends_runtime.telemetry.otel_variables import Destination
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
    """A way to a collector that answers what a test says, in this order, and then well.

    A text is why it has refused for now.
    """

    def __init__(self, *answers: str | Answer) -> None:
        self._answers = [Refused(one) if isinstance(one, str) else one for one in answers]
        self.sent: list[list[str]] = []
        self.closed = False

    def send(self, spans: Sequence[Span]) -> Answer:
        """The next answer."""
        self.sent.append([one.name for one in spans])
        return self._answers.pop(0) if self._answers else Taken()

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


async def test_what_is_refused_for_good_is_dropped_at_once() -> None:
    """One bad message costs itself alone: not those of the same saga, nor any time."""
    export, left = Scripted(Refused("bad", may_pass=False)), Left()
    with structlog.testing.capture_logs() as lines:
        async with sender_of(export, left, spans_each=300) as sender:
            sender.offer(0, 10)
            await left.wait(1)
            assert [len(message) for message in export.sent] == [256, 44]
            assert sender.counts() == (44, 0, 256)
            assert left.taken == [(0, True)], "it would be refused again"
    assert [line["event"] for line in lines] == ["traces_not_taken", "traces_taken_again"]
    assert (lines[0]["why"], lines[1]["spans_lost"]) == ("bad", 256)


class Picky:
    """A collector that takes no message with one of these spans in it."""

    def __init__(self, *bad: str) -> None:
        self._bad = set(bad)
        self.sent = 0
        self.taken: list[str] = []

    def send(self, spans: Sequence[Span]) -> Answer:
        """All of them, or none."""
        self.sent += 1
        names = [one.name for one in spans]
        if self._bad.intersection(names):
            return Refused("too large", may_pass=False, of_content=True)
        self.taken += names
        return Taken()

    def close(self) -> None:
        """There is nothing to break off."""


async def test_a_span_that_is_never_taken_costs_itself_alone() -> None:
    """Those that came with it leave, in their order; it is said as of a part that was rejected."""
    export, left = Picky("span 77", "span 200"), Left()
    with structlog.testing.capture_logs() as lines:
        async with sender_of(export, left, spans_each=256) as sender:
            sender.offer(0, 10)
            await left.wait(1)
            assert sender.counts() == (254, 0, 2)
            assert left.taken == [(0, True)]
    others = [f"span {number}" for number in range(256) if number not in {77, 200}]
    assert export.taken == others
    assert export.sent <= 1 + sending_module.MAX_PARTS
    assert [(line["event"], line.get("spans")) for line in lines] == [("spans_rejected", 2)]


async def test_a_collector_that_takes_no_part_is_not_asked_for_each() -> None:
    """Then it is not one span; a few messages tell, and later ones are not taken apart."""
    export, left = Picky(*(f"span {number}" for number in range(1_000))), Left()
    with structlog.testing.capture_logs() as lines:
        async with sender_of(export, left, spans_each=256) as sender:
            sender.offer(0, 10)
            await left.wait(1)
            assert export.sent == 1 + sending_module.MAX_PARTS
            sender.offer(1, 10)
            await left.wait(2)
            assert export.sent == 2 + sending_module.MAX_PARTS
            assert sender.counts() == (0, 0, 512)
    assert lines[0]["event"] == "traces_not_taken"
    assert lines[0]["why"] == "too large"


async def test_what_is_abandoned_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is with the collector when the end comes, and what has waited behind it."""
    monkeypatch.setattr(sending_module, "LET_GO_S", 0.0)
    asked, let_go, left = threading.Event(), threading.Event(), Left()

    class Deaf(Scripted):
        def send(self, spans: Sequence[Span]) -> Answer:
            asked.set()
            let_go.wait()
            return Taken()

    sender = Sender[int](
        Deaf(),
        where="x",
        unpack=lambda number: [span(5 * number + i) for i in range(5)],
        left=left,
        about=lambda _: 4,
    )
    sender.offer(0, 10)
    sender.start()
    await anyio.to_thread.run_sync(asked.wait)
    for number in range(1, 4):
        sender.offer(number, 10)
    await sender.close(0.0)
    assert sender.counts() == (0, 5 + 3 * 4, 0)
    let_go.set()


async def test_spans_that_a_collector_rejects_are_failed_and_said() -> None:
    """OTLP's partial success: the others are taken, and it is not said with every message."""
    rejecting = [Taken(rejected=2, why="too old"), Taken(rejected=9, why="too old"), Taken()]
    export, left = Scripted(*rejecting), Left()
    with structlog.testing.capture_logs() as lines:
        async with sender_of(export, left, spans_each=5) as sender:
            for number in range(3):
                sender.offer(number, 10)
                await left.wait(number + 1)
            assert sender.counts() == (3 + 5, 0, 2 + 5)
    [line] = lines
    assert (line["event"], line["log_level"]) == ("spans_rejected", "warning")
    assert (line["spans"], line["why"], line["to"]) == (2, "too old", "the collector")


async def test_a_collector_is_left_alone_for_as_long_as_it_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within reason: what asks for an hour is asked again after what is a wait here."""
    monkeypatch.setattr(sending_module, "MAX_ASKED_WAIT_S", 0.02)
    waits: list[float | None] = []
    export, left = Scripted(Refused("busy", after_s=0.015), Refused("busy", after_s=3600.0)), Left()
    async with sender_of(export, left) as sender:
        wait = sender._closing.wait

        def noted(timeout: float | None = None) -> bool:
            waits.append(timeout)
            return wait(timeout)

        monkeypatch.setattr(sender._closing, "wait", noted)
        sender.offer(0, 10)
        await left.wait(1)
        assert sender.counts() == (1, 0, 0)
    assert [one for one in waits if one != sending_module.GATHER_S] == [0.015, 0.02]


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
    with structlog.testing.capture_logs() as lines:
        await later.close(5.0)
    assert later.counts() == (0, 0, 1)
    abandoned = lines[-1]
    assert (abandoned["event"], abandoned["log_level"]) == ("traces_abandoned", "warning")
    assert (abandoned["sagas"], abandoned["spans_lost"], abandoned["why"]) == (1, 1, "down")
    assert "amends trace export" in abandoned["hint"]


async def test_the_end_tells_of_what_was_lost_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that never came back is the reason for a line at the end, too."""
    monkeypatch.setattr(sending_module, "TRY_FOR_S", 0.0)
    left = Left()
    with structlog.testing.capture_logs() as lines:
        async with sender_of(Scripted("bad"), left, spans_each=2) as sender:
            sender.offer(0, 10)
            await left.wait(1)
            sender.drop(3)
    assert [line["event"] for line in lines] == ["traces_not_taken", "traces_abandoned"]
    assert (lines[1]["sagas"], lines[1]["spans_lost"], lines[1]["why"]) == (1, 5, "bad")


async def test_what_is_being_sent_at_the_end_is_not_forgotten() -> None:
    """A collector that has it and does not answer: those sagas are among the abandoned."""
    let_go, sending = threading.Event(), threading.Event()

    class Hanging(Scripted):
        def send(self, spans: Sequence[Span]) -> Answer:
            sending.set()
            let_go.wait()
            return Refused("closed")

        def close(self) -> None:
            let_go.set()

    left = Left()
    sender = Sender[int](
        Hanging(), where="x", unpack=lambda number: [span(number)], left=left, queue_bytes=100
    )
    sender.offer(0, 10)
    sender.offer(1, 10)
    sender.start()
    await anyio.to_thread.run_sync(sending.wait)
    sender.offer(2, 10)
    with structlog.testing.capture_logs() as lines:
        await sender.close(0.0)
    [abandoned] = lines
    assert (abandoned["event"], abandoned["sagas"]) == ("traces_abandoned", 3)
    assert abandoned["why"] == "it had not answered yet"


async def receive_after_an_outage(receiver: Receiver, destination: Destination) -> None:
    """Spans that are offered while nobody listens, and what becomes of them."""
    left = Left()
    async with sender_of(SpanExport(destination, {}), left) as sender:
        sender.offer(0, 10)
        await left.wait(1)  # answered too: what is received without an answer is sent again
        await receiver.stop()
        for number in range(1, 4):
            sender.offer(number, 10)
        await receiver.start()
        await left.wait(4)
        receiver.behave(Behaviour.REFUSE)
        before = receiver.arrived
        sender.offer(4, 10)
        await receiver.wait_until(lambda: receiver.arrived > before)
        receiver.behave(Behaviour.SLOW)
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
