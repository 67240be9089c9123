"""The stream of calls: how they come in, how each is answered once, and how a stream ends."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from opentelemetry import trace

import amends
from amends import Call, Done, InProgress, Participant, Rejected, Verb, serve
from amends.answering import Answering
from amends.exchange import WAITING_CREDITS
from amends.servicer import ParticipantServicer
from amends.v1 import participant_pb2 as pb
from tests.participants.asking import Asker, asking, call_message, json_payload, words
from tests.participants.ledger import Ledger, read_rows
from tests.participants.tracing import ATTEMPT, TRACEPARENT, Spans, facts, parent, provided

EXECUTE = Verb.EXECUTE
LONG_MS = 60_000
"""Bounds a broken test; no test waits for it."""

HELLO = pb.ExchangeHello(store_id="store", epoch=7, incarnation="first", participant="payments")
SAID_ONCE = (
    *("store_id", "epoch", "incarnation", "participant"),
    *("idempotency_key", "deadline_at_ms", "oldest_open_at_ms"),
)


def member(number: int, verb: Verb = EXECUTE, *, timeout_ms: int = LONG_MS, **changes: Any) -> Any:
    """Make a call of a batch, without what a stream says once."""
    traceparent = changes.pop("traceparent", "")
    call = call_message(verb, **{"saga_id": f"order-{number}", **changes})
    call.traceparent = traceparent
    for name in SAID_ONCE:
        call.ClearField(name)  # type: ignore[arg-type]
    return pb.ExchangeCall(call_number=number, call=call, timeout_ms=timeout_ms)


class Stream:
    """A runtime's end of a stream."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.credits = 0
        self.is_draining = False
        self.messages: list[pb.ExchangeResponse] = []
        self.order: list[int] = []
        self.replies: dict[int, pb.ExchangeReply] = {}

    async def send(self, *calls: pb.ExchangeCall, oldest_open_at_ms: int = 0) -> None:
        """Send one message."""
        await self.call.write(pb.ExchangeRequest(calls=calls, oldest_open_at_ms=oldest_open_at_ms))

    async def read(self) -> pb.ExchangeResponse | None:
        """Take one message in; None at the end. No call is answered twice."""
        response: Any = await self.call.read()
        if response is grpc.aio.EOF:
            return None
        self.messages.append(response)
        self.credits += response.credits
        self.is_draining = self.is_draining or response.draining
        for reply in response.replies:
            assert reply.call_number not in self.replies, "answered twice"
            self.order.append(reply.call_number)
            self.replies[reply.call_number] = reply
        return cast("pb.ExchangeResponse", response)

    async def reply(self, number: int) -> pb.ExchangeReply:
        """Wait for the reply of a call."""
        while number not in self.replies:
            assert await self.read() is not None, "the stream has ended"
        return self.replies[number]

    async def say(self, number: int) -> str:
        """Give the reply of a call in words: its outcome, or the code of its error."""
        return said(await self.reply(number))

    async def end(self) -> grpc.StatusCode:
        """Read to the end, and give the status."""
        while await self.read() is not None:
            pass
        code: grpc.StatusCode = await self.call.code()
        return code


def said(reply: pb.ExchangeReply) -> str:
    """Say a reply in words."""
    if reply.WhichOneof("reply") == "outcome":
        return words(reply.outcome)
    return next(code.name for code in grpc.StatusCode if code.value[0] == reply.error.code)


@asynccontextmanager
async def streaming(asker: Asker, hello: pb.ExchangeHello = HELLO) -> AsyncIterator[Stream]:
    """Open a stream and take its first credits."""
    call = asker.stub.Exchange()
    try:
        stream = Stream(call)
        await call.write(pb.ExchangeRequest(hello=hello))
        await stream.read()
        yield stream
    finally:
        call.cancel()


@asynccontextmanager
async def streaming_to(participant: Participant, **options: Any) -> AsyncIterator[Stream]:
    """Serve a participant, with these options, and open the only stream to it."""
    async with (
        serve(participant, **options) as server,
        asking(server.address) as asker,
        streaming(asker) as stream,
    ):
        yield stream


async def refused(asker: Asker, *requests: pb.ExchangeRequest) -> tuple[grpc.StatusCode, str]:
    """Open a stream with some messages, and give the status that it ends with."""
    call = asker.stub.Exchange()
    for request in requests:
        await call.write(request)
    stream = Stream(call)
    try:
        while await stream.read() is not None:
            pass
    except grpc.aio.AioRpcError:
        pass
    assert not stream.replies
    return await call.code(), await call.details() or ""


class Gate:
    """Where a handler waits until the test lets it go on; it tells who has come."""

    def __init__(self) -> None:
        self.came: asyncio.Queue[str] = asyncio.Queue()
        self.opened: dict[str, asyncio.Event] = {}
        self.left: asyncio.Queue[str] = asyncio.Queue()
        self.is_open_for_all = False

    async def passes(self, call: Call) -> None:
        """Wait there."""
        opened = self.opened.setdefault(call.saga_id, asyncio.Event())
        self.came.put_nowait(call.saga_id)
        try:
            if not self.is_open_for_all:
                await opened.wait()
        finally:
            self.left.put_nowait(call.saga_id)

    def open(self, saga_id: str) -> None:
        """Let one go on."""
        self.opened.setdefault(saga_id, asyncio.Event()).set()

    def open_all(self) -> None:
        """Let all go on, those to come, too."""
        self.is_open_for_all = True
        for opened in self.opened.values():
            opened.set()


@pytest.fixture
def gate() -> Gate:
    """Give a gate."""
    return Gate()


def waiting(gate: Gate) -> Participant:
    """Make a participant whose action ``wait`` waits at the gate."""
    participant = Participant("payments", barrier=None)

    @participant.execute("wait", compensatable=False)
    async def wait(call: Call) -> None:
        await gate.passes(call)

    @participant.execute("echo", compensatable=False)
    async def echo(call: Call) -> bytes:
        return call.input

    return participant


# --------------------------------------------------------------------------------------- the calls


async def test_calls_of_a_batch_are_answered_one_by_one(ledger: Ledger) -> None:
    """Each verb by its handler, each with the outcome that the unary verb would have."""
    async with ledger.served() as asker, streaming(asker) as stream:
        await stream.send(
            member(1, Verb.PREPARE), member(2), member(3, amount=500), member(4, Verb.COMPENSATE)
        )
        assert [await stream.say(number) for number in (1, 2, 3, 4)] == [
            *("done", "done", "rejected card_declined", "done")
        ]
        assert stream.replies[2].outcome.done.result.data == b'{"charged":5}'
    assert ledger.entries("order-1") == [("reserve", 5)]
    assert ledger.entries("order-2") == [("charge", 5)]
    assert ledger.entries("order-3") == []


async def test_what_a_stream_says_once_is_in_its_calls() -> None:
    """The handler sees the same call as by the unary verbs."""
    participant = Participant("payments", barrier=None)
    calls: list[Call] = []

    @participant.execute("charge")
    async def charge(call: Call) -> None:
        calls.append(call)

    @participant.compensate("charge")
    async def refund(call: Call) -> None:
        calls.append(call)

    async with serve(participant) as server, asking(server.address) as asker:
        async with streaming(asker) as stream:
            await stream.send(
                member(1, saga_id="a", round=2, results={"reserve": [1]}), oldest_open_at_ms=17
            )
            await stream.reply(1)
            await stream.send(
                member(2, Verb.COMPENSATE, saga_id="a", round=2, executed=True, own_result={"n": 1})
            )
            await stream.reply(2)
        unary = call_message(saga_id="a", round=2, results={"reserve": [1]}, oldest_open_at_ms=17)
        unary.epoch, unary.incarnation = 7, "first"
        await asker.ask(unary)
    executed, compensated, by_verb = calls
    assert executed.idempotency_key == "store/a/pay/execute/2"
    assert compensated.idempotency_key == "store/a/pay/compensate/2"
    assert compensated.execute_key == executed.idempotency_key
    assert (compensated.executed, compensated.own_result_json()) == (True, {"n": 1})
    assert executed.deadline_at_ms > LONG_MS
    assert (executed.epoch, executed.incarnation, executed.oldest_open_at_ms) == (7, "first", 17)
    assert compensated.oldest_open_at_ms == 0
    for name in Call.__dataclass_fields__:
        if name != "deadline_at_ms":
            assert getattr(executed, name) == getattr(by_verb, name), name


async def test_a_call_says_what_it_says_itself() -> None:
    """A runtime may fill in what the stream would say."""
    participant = Participant("payments", barrier=None)
    keys: list[str] = []

    @participant.execute("charge", compensatable=False)
    async def charge(call: Call) -> None:
        keys.append(f"{call.store_id} {call.idempotency_key} {call.epoch} {call.deadline_at_ms}")

    async with streaming_to(participant) as stream:
        full = member(1)
        full.call.MergeFrom(
            pb.Call(store_id="other", idempotency_key="key", epoch=9, deadline_at_ms=5)
        )
        await stream.send(full)
        assert await stream.say(1) == "done"
    assert keys == ["other key 9 5"]


async def test_replies_come_in_any_order(gate: Gate) -> None:
    """A slow call holds up no other."""
    async with streaming_to(waiting(gate)) as stream:
        await stream.send(*(member(n, action="wait") for n in (1, 2, 3)))
        for _ in range(3):
            await gate.came.get()
        for number in (2, 3, 1):
            gate.open(f"order-{number}")
            await stream.reply(number)
        assert stream.order == [2, 3, 1]


@pytest.mark.parametrize(
    "change", ["saga_id", "step", "action", "verb", "round", "attempt", "call"]
)
async def test_a_faulty_call_harms_no_other(ledger: Ledger, change: str) -> None:
    """It gets the error of the unary verb; its neighbours are answered."""
    faulty = member(2)
    (faulty if change == "call" else faulty.call).ClearField(change)
    async with ledger.served() as asker, streaming(asker) as stream:
        await stream.send(member(1), faulty, member(3))
        assert [await stream.say(number) for number in (1, 2, 3)] == [
            *("done", "INVALID_ARGUMENT", "done")
        ]
        message = stream.replies[2].error.message
        assert message.startswith("call is missing" if change == "call" else f"call.{change} is ")
    assert read_rows(ledger.path, "order-2") == []


async def test_an_error_is_that_of_the_unary_verb() -> None:
    """The same code, the same words."""
    participant = Participant("payments", barrier=None)

    @participant.execute("fail", compensatable=False)
    async def fail(call: Call) -> None:
        raise LookupError("4111-secret")

    @participant.execute("odd", compensatable=False)
    async def odd(call: Call) -> Any:
        return Unfinished()

    @participant.execute("tell", compensatable=False)
    async def tell(call: Call) -> None:
        raise amends.BarrierError(call.json()["message"])

    @participant.execute("type", compensatable=False)
    async def typed(call: Call) -> Any:
        return amends.Payload(b"", "t" * 257)

    async with (
        serve(participant) as server,
        asking(server.address) as asker,
        streaming(asker) as stream,
    ):
        calls = [
            call_message(action="fail"),
            call_message(action="odd"),
            call_message(action="unknown"),
            call_message(action="fail", participant="hotels"),
            call_message(Verb.COMPENSATE, action="fail"),
            *(call_message(action="tell", saga_id=message) for message in LONG_MESSAGES),
            call_message(action="type"),
        ]
        for call in calls[-len(LONG_MESSAGES) - 1 : -1]:
            call.input.CopyFrom(json_payload({"message": LONG_MESSAGES[call.saga_id]}))
        await stream.send(
            *(pb.ExchangeCall(call_number=n, call=one, timeout_ms=LONG_MS)
              for n, one in enumerate(calls, 1))
        )  # fmt: skip
        codes = []
        for number, call in enumerate(calls, 1):
            error = (await stream.reply(number)).error
            code, details = await asker.status(call)
            assert (error.code, error.reason) == (code.value[0], code.name)
            assert error.message == details
            assert "secret" not in details
            codes.append(code.name)
    messages = [stream.replies[number].error.message for number in range(1, len(calls) + 1)]
    assert codes == [
        *("UNKNOWN", "INTERNAL", *["UNIMPLEMENTED"] * 3),
        *["UNKNOWN"] * (len(LONG_MESSAGES) + 1),
    ]
    assert messages[5].endswith("of participant payments")
    assert all(message.endswith("…") for message in messages[6:-1])
    assert "257 bytes, the limit is 256" in messages[-1]


LONG_MESSAGES = {"short": "cannot open it", "long": "x" * 5000, "quoted": "漢" * 2000}
"""A unary call's lie in its trailers, where gRPC takes 8 KiB and writes 9 bytes for such a sign."""


class Unfinished(Done):
    """A Done of an author who forgot ``super().__init__()``: it has no result, not even None."""

    def __init__(self) -> None:
        """Leave it so."""


class PanicException(BaseException):
    """What extensions written in Rust raise when they panic; no `Exception`, on purpose."""


def enlarged() -> Rejected:
    """Make a refusal whose message was set after it was made."""
    rejected = Rejected("no")
    rejected.message = "x" * (5 * 1024 * 1024)
    return rejected


FAULTS: dict[str, tuple[Any, str]] = {
    "panic": (PanicException("index out of bounds"), "UNKNOWN"),
    "generator exit": (GeneratorExit(), "UNKNOWN"),
    "error of a name that is no text": (amends.HandlerFailed("no \udce9t\udce9.pdf"), "UNKNOWN"),
    "error of the barrier": (amends.BarrierError("no \udce9t\udce9.pdf"), "UNKNOWN"),
    "long error": (amends.HandlerFailed("x" * (5 * 1024 * 1024)), "UNKNOWN"),
    "unfinished outcome": (Unfinished(), "INTERNAL"),
    "large outcome": (enlarged(), "INTERNAL"),
}
"""What a handler may end with, and the error that its call is answered with."""


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waits"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_what_is_wrong_with_one_call_its_neighbours_do_not_notice(
    gate: Gate, fault: str, *, waits: bool
) -> None:
    """It has an error; those before, beside and after it are answered, and all have places."""
    participant = waiting(gate)
    ends_with, code = FAULTS[fault]

    @participant.execute("fail", compensatable=False)
    async def fail(call: Call) -> Any:
        if waits:
            await asyncio.sleep(0)
        if isinstance(ends_with, BaseException) and not isinstance(ends_with, Rejected):
            raise ends_with
        return ends_with

    async with streaming_to(participant, max_concurrent=2) as stream:
        await stream.send(
            member(1, action="wait"),
            *(member(n, action="fail") for n in (2, 3, 4)),
            *(member(n, action="echo") for n in (5, 6)),
        )
        assert [await stream.say(n) for n in (2, 3, 4)] == [code] * 3
        assert [await stream.say(n) for n in (5, 6)] == ["done"] * 2
        await stream.send(member(7, action="echo"))
        assert await stream.say(7) == "done"
        gate.open_all()
        assert await stream.say(1) == "done"
        await stream.call.done_writing()
        assert await stream.end() is grpc.StatusCode.OK


async def test_a_fault_outside_of_any_call_ends_the_stream_with_a_status(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has calls on it hears it, their handlers are cancelled, and others are served."""

    def look(_tracer: object) -> None:
        raise PanicException

    async with serve(waiting(gate)) as server, asking(server.address) as asker:
        async with streaming(asker) as stream:
            await stream.send(member(1, action="wait"))
            await gate.came.get()
            with monkeypatch.context() as patched:
                patched.setattr("amends.tracing.CallTracer.look", look)
                await stream.send(member(2, action="echo"))
                with pytest.raises(grpc.aio.AioRpcError, match="the SDK failed: PanicException"):
                    await stream.read()
            assert await stream.call.code() is grpc.StatusCode.INTERNAL
            assert await gate.left.get() == "order-1"
        async with streaming(asker) as stream:
            await stream.send(member(1, action="echo"))
            assert await stream.say(1) == "done"


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waits"])
async def test_what_ends_the_process_ends_the_stream_with_a_status_first(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, *, waits: bool
) -> None:
    """Then it goes on its way; it must not leave the event loop while callers wait for nothing."""
    ended: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
    ask, exchange = Answering.ask, ParticipantServicer.Exchange

    async def interrupted(self: Answering, call: Call) -> Any:
        if call.action == "wait":
            return await ask(self, call)
        if waits:
            await asyncio.sleep(0)
        raise KeyboardInterrupt

    async def seen(*arguments: Any) -> None:
        try:
            await exchange(*arguments)
        except KeyboardInterrupt as error:  # or this test would end, too
            ended.set_result(error)

    monkeypatch.setattr(Answering, "ask", interrupted)
    monkeypatch.setattr(ParticipantServicer, "Exchange", seen)
    async with streaming_to(waiting(gate)) as stream:
        await stream.send(member(1, action="wait"))
        await gate.came.get()
        await stream.send(member(2, action="echo"), member(3, action="echo"))
        with pytest.raises(grpc.aio.AioRpcError, match="its process is interrupted"):
            await stream.reply(1)
        assert await stream.call.code() is grpc.StatusCode.UNAVAILABLE
        assert await gate.left.get() == "order-1"
        assert isinstance(await ended, KeyboardInterrupt)


async def test_every_outcome_arrives() -> None:
    """As the unary verbs say them."""
    participant = Participant("payments", barrier=None)
    outcomes: dict[str, Any] = {
        "order-1": Done(),
        "order-2": Done(b""),
        "order-3": Rejected("no", "because"),
        "order-4": InProgress(after_s=2),
        "order-5": amends.Broken("lost"),
        "order-6": amends.Payload(b"", ""),
    }

    @participant.execute("charge", compensatable=False)
    async def charge(call: Call) -> Any:
        return outcomes[call.saga_id]

    async with (
        serve(participant) as server,
        asking(server.address) as asker,
        streaming(asker) as stream,
    ):
        await stream.send(*(member(number) for number in range(1, 7)))
        for number in range(1, 7):
            unary = await asker.ask(call_message(saga_id=f"order-{number}"))
            assert (await stream.reply(number)).outcome == unary
    assert not stream.replies[1].outcome.done.HasField("result")
    assert stream.replies[6].outcome.done.HasField("result")


async def test_large_replies_travel_in_messages_of_their_own() -> None:
    """No message is larger than gRPC takes, however many replies are ready."""
    participant = Participant("payments", barrier=None)
    mega = 1024 * 1024

    @participant.execute("large", compensatable=False)
    async def large(call: Call) -> bytes:
        return b"x" * (mega if call.saga_id != "order-9" else mega // 4)

    async with streaming_to(participant) as stream:
        await stream.send(*(member(n, action="large") for n in range(1, 6)))
        await stream.send(*(member(n, action="large", saga_id="order-9") for n in range(6, 11)))
        for number in range(1, 11):
            assert await stream.say(number) == "done"
        assert all(len(one.replies) <= 4 for one in stream.messages)
        assert all(one.ByteSize() < 2 * mega for one in stream.messages)
        assert max(len(one.replies) for one in stream.messages if one.ByteSize() > mega) == 1


# ------------------------------------------------------------------------------------- its opening


async def test_the_first_message_grants_credits(gate: Gate) -> None:
    """As many as there are places, and some to wait here."""
    async with streaming_to(waiting(gate), max_concurrent=3) as stream:
        (first,) = stream.messages
        assert (first.credits, len(first.replies)) == (3 + WAITING_CREDITS, 0)


HELLO_FIRST = "the first message of a stream carries hello"


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([pb.ExchangeRequest(calls=[member(1)])], HELLO_FIRST),
        (
            [pb.ExchangeRequest(hello=HELLO, calls=[member(1)])],
            "the first message of a stream carries no calls: nothing was done",
        ),
        ([pb.ExchangeRequest(hello=pb.ExchangeHello())], "hello.store_id is missing"),
        (
            [pb.ExchangeRequest(hello=HELLO), pb.ExchangeRequest(hello=HELLO)],
            "hello is said once, in the first message",
        ),
    ],
    ids=["calls first", "calls with it", "empty", "twice"],
)
async def test_a_stream_without_its_hello_ends(
    ledger: Ledger, requests: list[pb.ExchangeRequest], message: str
) -> None:
    """It is told what is missing, and nothing is run."""
    async with ledger.served() as asker:
        code, details = await refused(asker, *requests)
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, message)
    assert ledger.ran == []


async def test_a_stream_that_says_nothing_ends(ledger: Ledger) -> None:
    """When its caller closes it."""
    async with ledger.served() as asker:
        call = asker.stub.Exchange()
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await call.details() == HELLO_FIRST


async def test_bytes_that_are_no_message_end_the_stream(ledger: Ledger) -> None:
    """What they should have said, nobody knows; the calls under way have no reply."""
    async with ledger.served() as asker:
        raw: Any = asker.channel.stream_stream("/amends.v1.ParticipantService/Exchange")()
        await raw.write(pb.ExchangeRequest(hello=HELLO).SerializeToString())
        await raw.read()
        await raw.write(b"\xff\xff")
        assert await raw.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "a message cannot be read" in (await raw.details() or "")


async def test_a_stream_for_another_participant_is_unimplemented(ledger: Ledger) -> None:
    """So that the unary verbs are tried, which refuse each call in the same words."""
    hello = pb.ExchangeHello(store_id="store", participant="hotels")
    async with ledger.served() as asker:
        code, details = await refused(asker, pb.ExchangeRequest(hello=hello))
        assert code is grpc.StatusCode.UNIMPLEMENTED
        assert (code, details) == await asker.status(call_message(participant="hotels"))


@pytest.mark.parametrize("name", ["", "payments", "billing"])
async def test_a_stream_for_an_alias_is_served(name: str) -> None:
    """And one of a runtime that does not say whom it calls."""
    participant = Participant("payments", barrier=None, aliases=["billing"])
    participant.execute("charge", compensatable=False)(lambda _: None)
    hello = pb.ExchangeHello(store_id="store", participant=name)
    async with (
        serve(participant) as server,
        asking(server.address) as asker,
        streaming(asker, hello) as stream,
    ):
        await stream.send(member(1))
        assert await stream.say(1) == "done"


# ------------------------------------------------------------------------------------- its limits


async def test_calls_beyond_the_credits_are_answered(gate: Gate) -> None:
    """RESOURCE_EXHAUSTED, not dropped; and each reply gives one credit back."""
    async with streaming_to(waiting(gate), max_concurrent=1) as stream:
        granted = stream.credits
        await stream.send(*(member(n, action="wait") for n in range(1, granted + 3)))
        for number in (granted + 1, granted + 2):
            assert await stream.say(number) == "RESOURCE_EXHAUSTED"
            assert "nothing was done" in stream.replies[number].error.message
        assert len(stream.replies) == 2
        gate.open_all()
        for number in range(1, granted + 1):
            assert await stream.say(number) == "done"
        await stream.send(*(member(n, action="echo") for n in range(1001, 1001 + granted)))
        for number in range(1001, 1001 + granted):
            assert await stream.say(number) == "done"
    assert gate.came.qsize() == granted


async def test_whoever_floods_without_reading_is_not_read(gate: Gate) -> None:
    """Ten thousand calls beyond the credits are all answered once somebody reads."""
    async with streaming_to(waiting(gate), max_concurrent=1) as stream:
        sending = asyncio.ensure_future(flood(stream))
        last = await sending
        for number in range(1, last + 1):
            assert await stream.say(number) in ("done", "RESOURCE_EXHAUSTED")


async def flood(stream: Stream) -> int:
    """Send many calls, and give the last number."""
    number = 0
    for _ in range(20):
        calls = []
        for _ in range(500):
            number += 1
            calls.append(member(number, action="echo"))
        await stream.send(*calls)
    return number


async def test_a_number_that_is_under_way_is_refused(gate: Gate) -> None:
    """Nobody could tell the two replies apart."""
    async with streaming_to(waiting(gate)) as stream:
        await stream.send(member(1, action="wait"))
        await gate.came.get()
        await stream.send(member(1, action="echo"))
        assert await stream.say(1) == "INVALID_ARGUMENT"
        assert "call_number 1" in stream.replies.pop(1).error.message
        gate.open_all()
        assert await stream.say(1) == "done"


async def test_streams_and_verbs_share_the_places(gate: Gate) -> None:
    """With two places, calls of two streams and by the verbs wait their turn, in their order."""
    async with (
        serve(waiting(gate), max_concurrent=2) as server,
        asking(server.address) as asker,
        streaming(asker) as one,
        streaming(asker) as two,
    ):
        await one.send(member(1, action="wait"), member(2, action="wait"))
        assert {await gate.came.get() for _ in range(2)} == {"order-1", "order-2"}
        await one.send(member(3, action="wait"))
        await one.send(member(10, action="echo", saga_id=""))
        await one.reply(10)  # now the third one stands in the line
        unary = asyncio.ensure_future(asker.ask(call_message(saga_id="order-4", action="wait")))
        health = asyncio.ensure_future(asker.status(call_message(saga_id="", action="wait")))
        await health  # now the unary one does, too
        await two.send(member(5, action="wait"), member(10, action="echo", saga_id=""))
        await two.reply(10)
        assert gate.came.empty()
        gate.open("order-1")
        assert await gate.came.get() == "order-3"
        gate.open("order-2")
        assert await gate.came.get() == "order-4"
        gate.open("order-4")
        assert words(await unary) == "done"
        assert await gate.came.get() == "order-5"
        gate.open_all()
        assert [await one.say(n) for n in (1, 2, 3)] == ["done"] * 3
        assert await two.say(5) == "done"


# ----------------------------------------------------------------------------------- its time-outs


async def test_a_call_whose_time_is_up_is_answered_and_its_handler_cancelled(gate: Gate) -> None:
    """DEADLINE_EXCEEDED; its neighbours have their own time."""
    async with streaming_to(waiting(gate)) as stream:
        await stream.send(member(1, action="wait", timeout_ms=20), member(2, action="wait"))
        assert await stream.say(1) == "DEADLINE_EXCEEDED"
        assert stream.replies[1].error.message == "no outcome within 20 ms"
        assert await gate.left.get() == "order-1"
        gate.open_all()
        assert await stream.say(2) == "done"


async def test_a_handler_that_goes_on_keeps_its_place(gate: Gate) -> None:
    """The call is answered in time; the place is free when its handler has really ended."""
    participant = waiting(gate)
    cleaned = asyncio.Event()

    @participant.execute("stubborn", compensatable=False)
    async def stubborn(call: Call) -> None:
        try:
            await gate.passes(call)
        finally:
            await cleaned.wait()

    async with streaming_to(participant, max_concurrent=1) as stream:
        await stream.send(member(1, action="stubborn", timeout_ms=20))
        assert await stream.say(1) == "DEADLINE_EXCEEDED"
        await gate.left.get()
        await stream.send(member(2, action="wait"), member(3, action="echo", saga_id=""))
        await stream.reply(3)
        assert [await gate.came.get(), gate.came.qsize()] == ["order-1", 0]
        cleaned.set()
        assert await gate.came.get() == "order-2"
        gate.open_all()
        assert await stream.say(2) == "done"


async def test_a_call_that_waits_for_a_place_has_its_time_out(gate: Gate) -> None:
    """It never runs, and the line goes on without it."""
    async with streaming_to(waiting(gate), max_concurrent=1) as stream:
        await stream.send(
            member(1, action="wait"),
            member(2, action="wait", timeout_ms=20),
            member(3, action="wait"),
        )
        assert await stream.say(2) == "DEADLINE_EXCEEDED"
        gate.open_all()
        assert [await stream.say(n) for n in (1, 3)] == ["done", "done"]
    assert [gate.came.get_nowait() for _ in range(gate.came.qsize())] == ["order-1", "order-3"]


@pytest.mark.parametrize("timeout_ms", [0, -5])
async def test_a_call_without_time_is_not_run(ledger: Ledger, timeout_ms: int) -> None:
    """Its time was up before it came."""
    async with ledger.served() as asker, streaming(asker) as stream:
        await stream.send(member(1, timeout_ms=timeout_ms))
        assert await stream.say(1) == "DEADLINE_EXCEEDED"
        assert "nothing was done" in stream.replies[1].error.message
    assert ledger.ran == []


# ----------------------------------------------------------------------------------------- its end


async def test_a_stream_that_its_caller_closes_is_answered_to_the_end(gate: Gate) -> None:
    """Then it ends OK."""
    async with streaming_to(waiting(gate)) as stream:
        await stream.send(member(1, action="wait"))
        await gate.came.get()
        await stream.call.done_writing()
        gate.open_all()
        assert await stream.say(1) == "done"
        assert await stream.end() is grpc.StatusCode.OK


async def test_a_stream_that_breaks_cancels_its_handlers(gate: Gate) -> None:
    """Those that wait for a place are forgotten; the places are free for others."""
    async with serve(waiting(gate), max_concurrent=2) as server, asking(server.address) as asker:
        async with streaming(asker) as stream:
            await stream.send(*(member(n, action="wait") for n in range(1, 6)))
            assert {await gate.came.get() for _ in range(2)} == {"order-1", "order-2"}
        assert {await gate.left.get() for _ in range(2)} == {"order-1", "order-2"}
        async with streaming(asker) as stream:
            await stream.send(member(6, action="wait"), member(7, action="wait"))
            assert {await gate.came.get() for _ in range(2)} == {"order-6", "order-7"}
            gate.open_all()
            assert [await stream.say(n) for n in (6, 7)] == ["done", "done"]
    assert gate.came.empty()


@pytest.mark.parametrize("refuses", [False, True], ids=["cancelled", "ended by us"])
async def test_a_stream_that_breaks_rolls_its_handlers_back(
    ledger: Ledger, gate: Gate, *, refuses: bool
) -> None:
    """An effect is there with its row or not at all, and the next attempt has it once."""

    @ledger.participant.execute("slow", compensatable=False)
    async def slow(call: Call, tx: amends.AsyncTransaction) -> None:
        await tx.execute("INSERT INTO ledger VALUES (?, 'slow', 5)", (call.saga_id,))
        await gate.passes(call)

    async with ledger.served() as asker:
        async with streaming(asker) as stream:
            await stream.send(member(1, action="slow"))
            await gate.came.get()
            if refuses:
                await stream.call.write(pb.ExchangeRequest(hello=HELLO))
                with pytest.raises(grpc.aio.AioRpcError, match="hello is said once"):
                    await stream.read()
        await gate.left.get()
        gate.open_all()
        async with streaming(asker) as stream:
            number, outcome = 1, "in_progress"
            while outcome == "in_progress":  # until the rollback has reached the writer
                number += 1
                await stream.send(member(number, action="slow", saga_id="order-1", attempt=2))
                outcome = await stream.say(number)
            assert outcome == "done"
    assert ledger.entries() == [("slow", 5)]


async def test_a_drain_is_said_once_and_answers_what_is_under_way(gate: Gate) -> None:
    """Calls that come after it are refused as by the verbs, then the stream ends OK."""
    async with (
        serve(waiting(gate)) as server,
        asking(server.address) as asker,
        streaming(asker) as stream,
        streaming(asker) as idle,
    ):
        await stream.send(member(1, action="wait"))
        await gate.came.get()
        draining = asyncio.ensure_future(server.drain())
        while not stream.is_draining:
            assert await stream.read() is not None
        await stream.send(member(2, action="wait"))
        assert await stream.say(2) == "UNAVAILABLE"
        assert "shutting down" in stream.replies[2].error.message
        code, details = await refused(asker, pb.ExchangeRequest(hello=HELLO))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in details
        assert await idle.end() is grpc.StatusCode.OK
        assert idle.is_draining
        gate.open_all()
        assert await stream.say(1) == "done"
        assert await stream.end() is grpc.StatusCode.OK
        assert sum(one.draining for one in stream.messages) == 1
        await draining
    assert gate.came.empty()


async def test_a_stream_that_has_not_said_hello_does_not_hold_up_a_drain(gate: Gate) -> None:
    """It is refused like one that is opened then."""
    async with (
        serve(waiting(gate)) as server,
        asking(server.address) as asker,
        streaming(asker) as known,
    ):
        await known.send(member(1, action="wait"))
        await gate.came.get()
        silent = asker.stub.Exchange()
        await silent.write(pb.ExchangeRequest())  # so that it has come
        assert await silent.code() is grpc.StatusCode.INVALID_ARGUMENT
        silent = asker.stub.Exchange()
        await silent.wait_for_connection()
        draining = asyncio.ensure_future(server.drain())
        assert await silent.code() is grpc.StatusCode.UNAVAILABLE
        gate.open_all()
        assert await known.end() is grpc.StatusCode.OK
        await draining


async def test_a_handler_that_outlives_the_grace_is_cancelled(gate: Gate) -> None:
    """Its stream breaks, and the server is closed all the same."""
    async with (
        serve(waiting(gate), grace_s=0) as server,
        asking(server.address) as asker,
        streaming(asker) as stream,
    ):
        await stream.send(member(1, action="wait"))
        await gate.came.get()
        await server.drain()
        assert server.is_clean
        assert await gate.left.get() == "order-1"
        with pytest.raises(grpc.aio.AioRpcError):
            await stream.reply(1)


# ---------------------------------------------------------------------------- what handlers share

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="")


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waits"])
async def test_a_call_does_not_see_what_another_has_set(*, waits: bool) -> None:
    """Context variables are a call's own, before it waits and after."""
    participant = Participant("payments", barrier=None)
    seen: list[tuple[str, str]] = []

    @participant.execute("look", compensatable=False)
    async def look(call: Call) -> None:
        before = VARIABLE.get()
        VARIABLE.set(call.saga_id)
        if waits:
            await asyncio.sleep(0)
        seen.append((before, VARIABLE.get()))

    async with streaming_to(participant) as stream:
        for first in (1, 11):
            await stream.send(*(member(n, action="look") for n in range(first, first + 10)))
            for number in range(first, first + 10):
                await stream.reply(number)
    assert sorted(seen) == sorted(
        ("", f"order-{number}") for number in [*range(1, 11), *range(11, 21)]
    )


async def test_a_handler_that_waited_has_its_task_for_itself() -> None:
    """What hangs on a task, such as a database session, meets no other call's."""
    participant = Participant("payments", barrier=None)
    tasks: list[asyncio.Task[Any] | None] = []

    @participant.execute("wait", compensatable=False)
    async def wait(call: Call) -> None:
        await asyncio.sleep(0)
        tasks.append(asyncio.current_task())

    async with streaming_to(participant) as stream:
        await stream.send(*(member(n, action="wait") for n in range(1, 51)))
        for number in range(1, 51):
            assert await stream.say(number) == "done"
    assert len(set(tasks)) == 50


@pytest.mark.parametrize("then", ["returns", "raises", "waits"])
async def test_a_handler_that_cancels_its_own_task_harms_no_other(then: str) -> None:
    """One that waits then, or raises, has no outcome; its neighbours have theirs."""
    participant = Participant("payments", barrier=None)

    @participant.execute("charge", compensatable=False)
    async def charge(call: Call) -> None:
        task = asyncio.current_task()
        assert task is not None
        if call.saga_id == "order-2":
            task.cancel()
            if then == "raises":
                raise asyncio.CancelledError
        if then == "waits":
            await asyncio.sleep(0)

    async with streaming_to(participant) as stream:
        await stream.send(*(member(n) for n in range(1, 5)))
        outcomes = [await stream.say(n) for n in range(1, 5)]
        await stream.send(member(5))
        assert await stream.say(5) == "done"
    assert outcomes == ["done", "done" if then == "returns" else "CANCELLED", "done", "done"]


async def test_a_task_that_a_handler_has_kept_is_not_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If it cancels it when others are answered there, they are answered all the same."""
    monkeypatch.setattr("amends.exchange.MAX_TURN_S", -1.0)
    participant = Participant("payments", barrier=None)
    kept: list[asyncio.Task[Any]] = []

    @participant.execute("charge", compensatable=False)
    async def charge(call: Call) -> None:
        task = asyncio.current_task()
        assert task is not None
        kept.append(task)
        asyncio.get_running_loop().call_soon(kept[0].cancel)

    async with streaming_to(participant) as stream:
        for first in (1, 11):
            await stream.send(*(member(n) for n in range(first, first + 10)))
            for number in range(first, first + 10):
                assert await stream.say(number) == "done"


async def test_time_outs_inside_a_handler_are_its_own() -> None:
    """asyncio's, which cancel the task, end what they enclose and no more."""
    participant = Participant("payments", barrier=None)

    @participant.execute("charge", compensatable=False)
    async def charge(call: Call) -> str:
        try:
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        except TimeoutError:
            return "in time"
        return "never"

    async with streaming_to(participant) as stream:
        await stream.send(*(member(n) for n in range(1, 4)))
        for number in range(1, 4):
            reply = await stream.reply(number)
            assert reply.outcome.done.result.data == b'"in time"'


async def test_handlers_that_compute_let_others_have_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a few milliseconds without waiting the event loop goes round once."""
    monkeypatch.setattr("amends.exchange.MAX_TURN_S", -1.0)
    participant = Participant("payments", barrier=None)
    turns: list[str] = []

    @participant.execute("charge", compensatable=False)
    async def charge(call: Call) -> None:
        turns.append(call.saga_id)
        asyncio.get_running_loop().call_soon(turns.append, "another")

    async with streaming_to(participant) as stream:
        await stream.send(*(member(n) for n in range(1, 4)))
        for number in range(1, 4):
            await stream.reply(number)
    assert turns == ["order-1", "another", "order-2", "another", "order-3", "another"]


# ------------------------------------------------------------------------------------------ traces


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """Give what the process's spans are, in a provider of the test's own."""
    with provided(monkeypatch) as spans:
        yield spans


async def test_each_call_is_a_span_below_its_attempt(gate: Gate, spans: Spans) -> None:
    """Answered, refused, or too late: as by the verbs, with the status that its reply has."""
    participant = waiting(gate)
    current: list[str] = []

    @participant.execute("charge", compensatable=False)
    async def charge(call: Call) -> None:
        await asyncio.sleep(0)
        current.append(f"{trace.get_current_span().get_span_context().span_id:016x}")

    async with streaming_to(participant, max_concurrent=2) as stream:
        await stream.send(member(1, traceparent=TRACEPARENT))
        await stream.reply(1)
        await stream.send(
            member(2, traceparent=TRACEPARENT, step=""),
            member(3, traceparent=TRACEPARENT, action="wait", timeout_ms=20),
            member(4, action="wait"),
            member(5, traceparent=TRACEPARENT, timeout_ms=20),
        )
        for number in (2, 3, 5):
            await stream.reply(number)
        gate.open_all()
        await stream.reply(4)
    found = {facts(span)["amends.saga_id"]: span for span in spans.ended}
    statuses = [facts(found[f"order-{n}"])["rpc.response.status_code"] for n in range(1, 6)]
    assert statuses[:3] == ["OK", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED"]
    assert statuses[3:] == ["OK", "DEADLINE_EXCEEDED"]
    assert len(spans.ended) == 5
    for number in (1, 2, 3, 5):
        assert parent(found[f"order-{number}"]) == ATTEMPT
        assert found[f"order-{number}"].name == "amends.v1.ParticipantService/Execute"
    context = found["order-1"].get_span_context()
    assert context is not None
    assert current == [f"{context.span_id:016x}"]


async def test_without_a_provider_the_attempt_is_current() -> None:
    """To be sent on by whoever does; and it is not the next call's."""
    participant = Participant("payments", barrier=None)
    current: list[str] = []

    @participant.execute("charge", compensatable=False)
    async def charge(call: Call) -> None:
        current.append(f"{trace.get_current_span().get_span_context().span_id:016x}")

    async with streaming_to(participant) as stream:
        await stream.send(member(1, traceparent=TRACEPARENT), member(2))
        await stream.reply(2)
    assert current == [ATTEMPT, "0" * 16]
