"""The stream to a participant: what leaves on it, and what every way of its ending means.

The participant here is a real gRPC server whose side of the stream is a script: it keeps what it
was sent and says what the test wants, which no participant of ours would say.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import grpc
import grpc.aio
import pytest

from amends.v1 import participant_pb2, participant_pb2_grpc, types_pb2
from amends_runtime.clock import SystemClock
from amends_runtime.core.messages import Done, InProgress, Rejected, Unknown
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Failure, SagaTurnedBack, TurnCause, Verb
from amends_runtime.dispatch import exchange
from amends_runtime.dispatch.exchange import ExchangeTransport
from amends_runtime.dispatch.unary import UnaryTransport
from amends_runtime.ports import Call, Reply, StoreIdentity

IDENTITY = StoreIdentity(store_id="store-1", incarnation="first", epoch=7)
DONE = participant_pb2.Outcome(done=participant_pb2.Done())


class Line:
    """The participant's end of one stream."""

    def __init__(self, requests: AsyncIterator[Any], context: Any) -> None:
        self._requests = requests
        self._context = context
        self.over = anyio.Event()
        self._ends: tuple[grpc.StatusCode, str] | None = None

    async def hello(self, window: int = 256) -> participant_pb2.ExchangeHello:
        """Read the first message, and grant credits."""
        first = await anext(self._requests)
        assert not first.calls
        await self.say(credits=window)
        hello: participant_pb2.ExchangeHello = first.hello
        return hello

    async def calls(self) -> list[participant_pb2.ExchangeCall]:
        """Read the next message."""
        async with asyncio.timeout(20):
            message = await anext(self._requests)
        return list(message.calls)

    async def say(self, **response: Any) -> None:
        """Send one message."""
        await self._context.write(participant_pb2.ExchangeResponse(**response))

    async def say_bytes(self, message: bytes) -> None:
        """Send what need not be a message of the contract."""
        await self._context.write(message)

    async def answer(self, *numbers: int, outcome: participant_pb2.Outcome = DONE) -> None:
        """Answer calls, in one message."""
        replies = [
            participant_pb2.ExchangeReply(call_number=number, outcome=outcome) for number in numbers
        ]
        await self.say(replies=replies)

    def end(self, code: grpc.StatusCode = grpc.StatusCode.OK, details: str = "") -> None:
        """End the stream."""
        self._ends = code, details
        self.over.set()

    async def hold(self) -> None:
        """Keep it open until it is ended."""
        await self.over.wait()
        assert self._ends is not None
        code, details = self._ends
        if code is not grpc.StatusCode.OK:
            await self._context.abort(code, details)


class Scripted(participant_pb2_grpc.ParticipantServiceServicer):
    """Hands each stream to the test; the unary verbs answer Done and are counted."""

    def __init__(self) -> None:
        self._opened: asyncio.Queue[Line] = asyncio.Queue()
        self.executed = 0
        self.remaining_s = 0.0  # of the last unary call, when it came
        self._lines = 0
        self._none_left = anyio.Event()
        self._none_left.set()

    async def wait_ended(self) -> None:
        """Wait until no stream is being served."""
        with anyio.fail_after(20):
            await self._none_left.wait()

    async def line(self) -> Line:
        """Wait for the next stream."""
        with anyio.fail_after(20):
            return await self._opened.get()

    async def Execute(self, request: Any, context: Any) -> participant_pb2.ExecuteResponse:
        self.executed += 1
        self.remaining_s = context.time_remaining()
        return participant_pb2.ExecuteResponse(outcome=DONE)

    async def Exchange(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # type: ignore[override]
        line = Line(request_iterator, context)
        self._lines += 1
        self._none_left = anyio.Event()
        try:
            self._opened.put_nowait(line)
            await line.hold()
        finally:
            self._lines -= 1
            if not self._lines:
                self._none_left.set()


def serve(participant: Scripted, server: grpc.aio.Server) -> None:
    """Add it to a server as the generated code would, but that it may also send any bytes."""
    loose: Any = _Loose(server)
    participant_pb2_grpc.add_ParticipantServiceServicer_to_server(participant, loose)


class _Loose:
    """What the generated code needs of a server, whose streams send bytes as they are."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Nothing is different for those without a registered method."""
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, methods: dict[str, Any]) -> None:
        """The stream's serializer leaves bytes alone."""
        methods = {**methods}
        methods["Exchange"] = grpc.stream_stream_rpc_method_handler(
            methods["Exchange"].stream_stream,
            request_deserializer=methods["Exchange"].request_deserializer,
            response_serializer=lambda said: (
                said if isinstance(said, bytes) else said.SerializeToString()
            ),
        )
        self._server.add_registered_method_handlers(service, methods)


class Answers:
    """What the transport said of each call, by saga."""

    def __init__(self) -> None:
        self.replies: dict[str, Reply] = {}
        self._news = anyio.Event()

    def take(self, saga_id: str, reply: Reply) -> None:
        """Keep the answer of one call."""
        assert saga_id not in self.replies, "answered twice"
        self.replies[saga_id] = reply
        self._news.set()
        self._news = anyio.Event()

    async def wait(self, *saga_ids: str) -> list[Reply]:
        """Wait until all of them have an answer."""
        with anyio.fail_after(20):
            while not all(saga_id in self.replies for saga_id in saga_ids):
                await self._news.wait()
        return [self.replies[saga_id] for saga_id in saga_ids]


def call(saga_id: str, **changes: Any) -> Call:
    """Give an attempt of one step."""
    fields: dict[str, Any] = {
        "saga_id": saga_id,
        "definition_name": "order",
        "step": 0,
        "step_name": "charge",
        "participant": "payments",
        "action": "charge",
        "verb": Verb.EXECUTE,
        "round": 1,
        "attempt": 1,
        "timeout_ms": 20_000,
        "input": Payload(b"12.50", "text/plain"),
    }
    return Call(**{**fields, **changes})


class Case:
    """A transport, its participant, and what it answered."""

    def __init__(self, transport: ExchangeTransport, participant: Scripted) -> None:
        self.transport = transport
        self.participant = participant
        self.answers = Answers()
        self.limits: list[int | None] = []
        self.given_back: list[str] = []

    def send(self, *saga_ids: str, **changes: Any) -> None:
        """Send a call for each saga; one that is given back is sent again, as by a lane."""
        for saga_id in saga_ids:
            self._hand_over(call(saga_id, **changes))

    def _hand_over(self, one: Call) -> None:
        def take(reply: Reply | None) -> None:
            if reply is None:
                self.given_back.append(one.saga_id)
                asyncio.get_running_loop().call_soon(self._hand_over, one)
            else:
                self.answers.take(one.saga_id, reply)

        self.transport.send(one, take)


@asynccontextmanager
async def a_case(
    port: int = 0, *, oldest_open_ms: int = 0
) -> AsyncIterator[tuple[Case, Callable[[], Awaitable[None]]]]:
    """Give a transport to a participant, and what ends that participant's process in an instant."""
    participant = Scripted()  # type: ignore[abstract]  # it serves what is called here
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    serve(participant, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    unary = UnaryTransport(
        f"127.0.0.1:{bound}",
        IDENTITY,
        SystemClock(),
        max_result_bytes=1024,
        oldest_open_ms=lambda: oldest_open_ms,
    )
    transport = ExchangeTransport(
        "payments",
        unary,
        IDENTITY,
        max_result_bytes=1024,
        oldest_open_ms=lambda: oldest_open_ms,
    )

    async def die() -> None:
        await server.stop(None)

    try:
        async with anyio.create_task_group() as tasks:
            case = Case(transport, participant)
            transport.open(tasks, lambda: case.limits.append(transport.limit))
            try:
                yield case, die
            finally:
                await transport.close()
                tasks.cancel_scope.cancel()
    finally:
        await server.stop(None)
        await participant.wait_ended()


@pytest.fixture
async def case() -> AsyncIterator[Case]:
    """A transport and its participant."""
    async with a_case() as (one, _):
        yield one


pytestmark = pytest.mark.anyio


async def test_the_first_message_says_who_calls_and_a_call_leaves_that_out() -> None:
    """What is the same for all calls is said once; each has its number, deadline and payloads."""
    async with a_case(oldest_open_ms=123) as (case, _):
        case.send("a", results=(("reserve", Payload(b"r-1", "text/plain")),), traceparent="00-x")
        line = await case.participant.line()
        hello = await line.hello()
        assert (hello.store_id, hello.epoch, hello.incarnation) == ("store-1", 7, "first")
        assert hello.participant == "payments"
        (sent,) = await line.calls()
        assert 19_000 < sent.timeout_ms <= 20_000
        one = sent.call
        assert (one.saga_id, one.step, one.action, one.round) == ("a", "charge", "charge", 1)
        assert one.verb is types_pb2.VERB_EXECUTE or one.verb == types_pb2.VERB_EXECUTE
        assert (one.input.data, one.results[0].result.data) == (b"12.50", b"r-1")
        assert one.traceparent == "00-x"
        assert not one.store_id
        assert not one.idempotency_key
        await line.answer(sent.call_number)
        (reply,) = await case.answers.wait("a")
        assert (reply.outcome, reply.healthy) == (Done(), True)


async def test_calls_that_come_together_leave_together_and_are_answered_in_any_order(
    case: Case,
) -> None:
    """One message for all who wait; replies find their calls by number."""
    case.send("a", "b", "c")
    line = await case.participant.line()
    await line.hello()
    sent = {one.call.saga_id: one.call_number for one in await line.calls()}
    assert sorted(sent) == ["a", "b", "c"]
    await line.answer(
        sent["c"],
        outcome=participant_pb2.Outcome(rejected=participant_pb2.Rejected(reason="no")),
    )
    await line.answer(
        sent["a"],
        outcome=participant_pb2.Outcome(in_progress=participant_pb2.InProgress(poll_after_ms=9)),
    )
    await line.answer(sent["b"])
    a, b, c = await case.answers.wait("a", "b", "c")
    assert (a.outcome, b.outcome, c.outcome) == (InProgress(9), Done(), Rejected("no"))


async def test_an_error_of_one_call_is_what_a_unary_call_would_have_failed_with(case: Case) -> None:
    """Status and message; its neighbours have their own ends. An unknown number is UNKNOWN."""
    case.send("a", "b", "c", "d")
    line = await case.participant.line()
    await line.hello()
    sent = {one.call.saga_id: one.call_number for one in await line.calls()}

    def error(saga_id: str, code: int) -> participant_pb2.ExchangeReply:
        return participant_pb2.ExchangeReply(
            call_number=sent[saga_id], error=types_pb2.Error(code=code, message="told")
        )

    replies = [error("a", 14), error("b", 12), error("d", 4711)]
    replies += [participant_pb2.ExchangeReply(call_number=sent["c"])]
    await line.say(replies=replies)
    a, b, c, d = await case.answers.wait("a", "b", "c", "d")
    assert a == Reply(Unknown("UNAVAILABLE", "told"), "UNAVAILABLE", healthy=False)
    assert b.outcome == Unknown("UNIMPLEMENTED", "told", misconfigured=True)
    assert isinstance(c.outcome, Unknown)
    assert c.outcome.reason == "NO_OUTCOME"
    assert d.status == "UNKNOWN"


async def test_no_more_calls_leave_than_there_are_credits_for(case: Case) -> None:
    """A window of 2: the third leaves when a reply has given a credit back. More may be granted."""
    case.send("a", "b", "c", "d")
    line = await case.participant.line()
    await line.hello(window=2)
    first = await line.calls()
    assert [one.call.saga_id for one in first] == ["a", "b"]
    assert case.transport.limit == 2
    await line.answer(first[1].call_number)
    (third,) = await line.calls()
    assert third.call.saga_id == "c"
    await line.say(credits=5)
    (fourth,) = await line.calls()
    assert fourth.call.saga_id == "d"
    assert case.transport.limit == 7
    assert case.limits[-1] == 7


async def test_a_message_is_bounded_by_count_and_by_bytes(case: Case) -> None:
    """Big calls leave few at a time, and the biggest alone; none is left behind."""
    case.send(*(f"small-{number}" for number in range(exchange.MAX_CALLS + 1)))
    case.send("big-1", "big-2", input=Payload(b"x" * 900_000))
    case.send("last")
    line = await case.participant.line()
    await line.hello(window=10_000)
    sizes = []
    seen: list[str] = []
    while "last" not in seen:
        calls = await line.calls()
        seen += [one.call.saga_id for one in calls]
        sizes.append((len(calls), sum(one.ByteSize() for one in calls)))
    assert len(seen) == exchange.MAX_CALLS + 4
    assert max(count for count, _ in sizes) <= exchange.MAX_CALLS
    assert max(size for _, size in sizes) <= exchange.MAX_BYTES


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
        (grpc.StatusCode.INTERNAL, "INTERNAL"),
        (grpc.StatusCode.OK, "UNAVAILABLE"),
        (grpc.StatusCode.UNIMPLEMENTED, "UNAVAILABLE"),
    ],
)
async def test_when_a_stream_ends_all_that_is_on_it_is_unknown_and_the_rest_goes_on(
    case: Case, code: grpc.StatusCode, reason: str
) -> None:
    """Whatever it ends with: what was written has an unknown outcome, what waited leaves next."""
    case.send("answered", "open", "waits")
    line = await case.participant.line()
    await line.hello(window=2)
    sent = {one.call.saga_id: one.call_number for one in await line.calls()}
    line.end(code)
    (lost,) = await case.answers.wait("open")
    assert isinstance(lost.outcome, Unknown)
    assert (lost.outcome.reason, lost.healthy) == (reason, False)
    assert sorted(sent) == ["answered", "open"]
    second = await case.participant.line()
    await second.hello()
    (again,) = await second.calls()
    assert again.call.saga_id == "waits"
    assert again.call_number not in sent.values()
    await second.answer(again.call_number)
    await case.answers.wait("waits")


async def test_a_participant_that_dies_leaves_its_calls_unknown_and_then_nobody_is_there() -> None:
    """The first are on a connection that broke; who comes after that finds none at all."""
    async with a_case() as (case, die):
        case.send("a", "b")
        line = await case.participant.line()
        await line.hello()
        await line.calls()
        await die()
        for reply in await case.answers.wait("a", "b"):
            assert isinstance(reply.outcome, Unknown)
            assert reply.healthy is False
        case.send("late")
        (reply,) = await case.answers.wait("late")
        assert (reply.status, reply.away) == ("UNAVAILABLE", True)


async def test_a_participant_without_the_stream_is_called_by_the_unary_verbs(case: Case) -> None:
    """UNIMPLEMENTED is no failure of anything: what waited goes by the unary verbs at once."""
    case.send("a", "b")
    line = await case.participant.line()
    line.end(grpc.StatusCode.UNIMPLEMENTED, "no such method")
    for reply in await case.answers.wait("a", "b"):
        assert reply.outcome == Done()
    case.send("c")
    await case.answers.wait("c")
    assert case.participant.executed == 3
    assert case.transport.name == "unary"
    assert case.transport.limit is None


async def test_after_a_while_the_stream_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """Somebody has rolled out a newer participant meanwhile."""
    monkeypatch.setattr(exchange, "TRY_AGAIN_S", 0.0)
    case.send("a")
    (await case.participant.line()).end(grpc.StatusCode.UNIMPLEMENTED)
    await case.answers.wait("a")
    with anyio.fail_after(20):
        while case.transport.name == "unary":
            await anyio.lowlevel.checkpoint()
    case.send("b")
    line = await case.participant.line()
    await line.hello()
    (sent,) = await line.calls()
    await line.answer(sent.call_number)
    await case.answers.wait("b")
    assert case.transport.name == "exchange"


async def test_a_reply_that_is_too_large_costs_the_others_the_stream_and_nothing_else(
    case: Case,
) -> None:
    """The whole stream ends for it; by the unary verbs only its own call would suffer."""
    case.send("a", "b")
    line = await case.participant.line()
    await line.hello()
    (a, _) = await line.calls()
    result = types_pb2.Payload(data=b"x" * 5 * 1024 * 1024)
    done = participant_pb2.Outcome(done=participant_pb2.Done(result=result))
    with contextlib.suppress(Exception):  # whichever side is the first to notice
        await line.answer(a.call_number, outcome=done)
    for reply in await case.answers.wait("a", "b"):
        assert isinstance(reply.outcome, Unknown)
        assert not reply.outcome.misconfigured
    case.send("c")
    (reply,) = await case.answers.wait("c")
    assert (reply.outcome, case.transport.name) == (Done(), "unary")


async def test_what_waits_when_the_stream_is_given_up_is_given_back(case: Case) -> None:
    """It was never sent, so its time begins anew when it leaves by the unary verbs."""
    case.send("a", timeout_ms=5_000)
    line = await case.participant.line()
    line.end(grpc.StatusCode.UNIMPLEMENTED)
    (reply,) = await case.answers.wait("a")
    assert (reply.outcome, case.given_back) == (Done(), ["a"])


@pytest.mark.parametrize(
    "size",
    [
        {"own_result": Payload(b"x" * 100_000)},
        {"results": (("a" * 48, Payload(b"", "t" * 250)),) * 100},
        {"turn": SagaTurnedBack(1, TurnCause.REJECTED, 0, Failure("r" * 64, "m" * 16_000))},
    ],
    ids=["own result", "names and content types", "why it turned back"],
)
async def test_whatever_makes_calls_large_a_message_is_bounded(
    case: Case, size: dict[str, Any]
) -> None:
    """Else gRPC refuses the whole message, again and again."""
    case.send(*(f"s{number}" for number in range(200)), verb=Verb.COMPENSATE, **size)
    line = await case.participant.line()
    await line.hello(window=10_000)
    seen = 0
    while seen < 200:
        calls = await line.calls()
        seen += len(calls)
        assert sum(one.ByteSize() for one in calls) <= exchange.MAX_BYTES
        await line.answer(*(one.call_number for one in calls))
    await case.answers.wait(*(f"s{number}" for number in range(200)))


async def test_a_call_that_no_message_can_hold_fails_by_itself(case: Case) -> None:
    """It goes by the unary way, where gRPC refuses it alone; its neighbours have their stream."""
    case.send("a")
    case.send("huge", input=Payload(b"x" * 5 * 1024 * 1024))
    case.send("b")
    line = await case.participant.line()
    await line.hello()
    sent = await line.calls()
    assert [one.call.saga_id for one in sent] == ["a", "b"]
    (reply,) = await case.answers.wait("huge")
    assert isinstance(reply.outcome, Unknown)
    await line.answer(*(one.call_number for one in sent))
    await case.answers.wait("a", "b")


async def test_a_call_is_told_the_time_that_is_left(case: Case) -> None:
    """It has waited for a credit: the participant's time-out ends when the runtime's does."""
    case.send("a")
    line = await case.participant.line()
    await line.hello(window=0)
    (waiting,) = case.transport._waiting
    waiting.expires_s -= 15
    await line.say(credits=1)
    (one,) = await line.calls()
    assert 0 < one.timeout_ms <= 5_000


async def test_a_stream_that_has_gone_silent_is_replaced(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """Open, and nobody answers on it any more: calls find another way, a breaker's probes too."""
    monkeypatch.setattr(exchange, "LATE_REPLIES_S", 0.0)
    case.send("first")
    line = await case.participant.line()
    await line.hello()
    (one,) = await line.calls()
    await line.answer(one.call_number)
    await case.answers.wait("first")
    case.send("lost", timeout_ms=400)
    await case.answers.wait("lost")
    case.send("next", timeout_ms=10_000)
    second = await case.participant.line()
    await second.hello()
    (one,) = await second.calls()
    await second.answer(one.call_number)
    await case.answers.wait("next")


async def test_a_late_reply_makes_room_and_the_lane_is_told(case: Case) -> None:
    """It has no other way to hear of it: the call has had its answer."""
    case.send("late", timeout_ms=400)
    line = await case.participant.line()
    await line.hello(window=1)
    (late,) = await line.calls()
    await case.answers.wait("late")
    told = len(case.limits)
    assert case.transport.room == 0
    await line.answer(late.call_number)
    with anyio.fail_after(20):
        while len(case.limits) == told:
            await anyio.lowlevel.checkpoint()
    assert case.transport.room == 1


async def test_a_reply_to_nothing_gives_no_credit(case: Case) -> None:
    """Not a number that never was, and not one that was answered: then more would leave."""
    case.send("a")
    line = await case.participant.line()
    await line.hello(window=1)
    (a,) = await line.calls()
    await line.answer(a.call_number, a.call_number, a.call_number + 7)
    await case.answers.wait("a")
    case.send("b")
    await line.calls()
    assert case.transport.room == 0


async def test_more_credits_than_anybody_means_are_cut(case: Case) -> None:
    """So that the limit stays a number that can be shown."""
    case.send("a")
    line = await case.participant.line()
    await line.hello(window=2**31 - 1)
    (a,) = await line.calls()
    await line.say(credits=2**31 - 1)
    await line.answer(a.call_number)
    await case.answers.wait("a")
    assert case.transport.limit == exchange.MAX_WINDOW


async def test_what_has_no_credits_waits_and_counts_as_nothing(case: Case) -> None:
    """A participant that grants none for a while: there is no room, so its lane keeps the calls."""
    case.send("a", timeout_ms=100)
    line = await case.participant.line()
    await line.hello(window=0)
    with anyio.fail_after(20):
        while not case.given_back:
            await anyio.lowlevel.checkpoint()
    assert case.answers.replies == {}
    await line.say(credits=1)
    (a,) = await line.calls()
    await line.answer(a.call_number)
    (reply,) = await case.answers.wait("a")
    assert reply.outcome == Done()


class Lost:
    """A stream that was refused while its hello was written: gRPC does not say with what."""

    async def write(self, _: bytes) -> None:
        """Fail as gRPC does."""
        nothing = grpc.aio.Metadata()
        details = "Internal error from Core"
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, details)

    def cancel(self) -> bool:
        """It is over."""
        return False


@pytest.mark.parametrize("lost", [2, 10])
async def test_a_refusal_that_was_lost_is_asked_for_again(case: Case, lost: int) -> None:
    """A few times; then it is what the call has ended with."""
    really, opened = case.transport._exchange, 0

    def open_stream() -> Any:
        nonlocal opened
        opened += 1
        return Lost() if opened <= lost else really()

    case.transport._exchange = open_stream  # type: ignore[assignment]
    case.send("a")
    if lost > exchange.MAX_UNSAID:
        (reply,) = await case.answers.wait("a")
        assert (reply.status, opened) == ("INTERNAL", exchange.MAX_UNSAID + 1)
        return
    (await case.participant.line()).end(grpc.StatusCode.UNIMPLEMENTED)
    (reply,) = await case.answers.wait("a")
    assert reply.outcome == Done()


async def test_a_slow_call_does_not_cost_its_neighbours_the_stream(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """Replies came meanwhile, so the stream is alive and only the one handler is not."""
    monkeypatch.setattr(exchange, "LATE_REPLIES_S", 0.0)
    case.send("slow", timeout_ms=100)
    line = await case.participant.line()
    await line.hello()
    await line.calls()
    case.send("quick")
    (quick,) = await line.calls()
    await line.answer(quick.call_number)
    await case.answers.wait("slow", "quick")
    case.send("later")
    (later,) = await line.calls()
    await line.answer(later.call_number)
    await case.answers.wait("later")


async def test_streams_that_bring_nothing_are_opened_less_and_less_often() -> None:
    """However long it goes on: a crash loop over a night ends no runtime."""
    pauses = [exchange._pause_s(number) for number in (1, 2, 3, 5_000)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == exchange.MAX_PAUSE_S


async def test_streams_that_drain_at_once_are_not_opened_in_a_circle(case: Case) -> None:
    """A participant that takes streams, drains, and is slow to end them."""
    opened = 0

    async def take_all() -> None:
        nonlocal opened
        while True:
            line = await case.participant.line()
            opened += 1
            await line.say(credits=10, draining=True)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take_all)
        case.send("a", timeout_ms=500)
        await case.answers.wait("a")
        tasks.cancel_scope.cancel()
    assert opened < 10


async def test_a_transport_that_is_closed_while_it_pauses_opens_nothing(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """An operator has moved the participant, because its streams brought nothing."""
    monkeypatch.setattr(exchange, "PAUSE_S", 0.02)
    case.send("a")
    line = await case.participant.line()
    await line.hello()
    await line.calls()
    line.end(grpc.StatusCode.UNAVAILABLE, "crash")
    await case.answers.wait("a")
    case.send("b", timeout_ms=10)
    await case.answers.wait("b")
    await case.transport.close()
    with anyio.fail_after(20):
        while any(task.get_name().startswith("exchange") for task in asyncio.all_tasks()):
            await anyio.lowlevel.checkpoint()


async def test_a_stream_that_cannot_be_read_is_ended(case: Case) -> None:
    """Its calls are unknown, nobody reads on, and the unary verbs do from then on."""
    case.send("a")
    line = await case.participant.line()
    await line.hello()
    await line.calls()
    await line.say_bytes(b"\xff\xff\xff")
    (reply,) = await case.answers.wait("a")
    assert isinstance(reply.outcome, Unknown)
    assert case.transport.name == "unary"
    await case.participant.wait_ended()


async def test_a_draining_stream_takes_nothing_new_and_answers_what_it_has(case: Case) -> None:
    """Calls that come meanwhile leave by the next stream."""
    case.send("a")
    line = await case.participant.line()
    await line.hello()
    (a,) = await line.calls()
    await line.say(draining=True)
    with anyio.fail_after(20):
        while case.transport.room > 1:
            await anyio.lowlevel.checkpoint()
    case.send("b")
    second = await case.participant.line()
    await second.hello()
    (b,) = await second.calls()
    await line.answer(a.call_number)
    line.end()
    await second.answer(b.call_number)
    for reply in await case.answers.wait("a", "b"):
        assert reply.outcome == Done()


async def test_each_call_has_its_own_deadline_and_a_late_reply_does_nothing(case: Case) -> None:
    """The time of one is over: it is unknown, the others wait on, and its credit comes back."""
    case.send("short", timeout_ms=400)
    case.send("long")
    line = await case.participant.line()
    await line.hello(window=2)
    sent = {one.call.saga_id: one.call_number for one in await line.calls()}
    (reply,) = await case.answers.wait("short")
    assert (reply.status, reply.healthy) == ("DEADLINE_EXCEEDED", False)
    assert "long" not in case.answers.replies
    case.send("next")
    await line.answer(sent["short"])
    (third,) = await line.calls()
    assert third.call.saga_id == "next"
    await line.answer(sent["long"], third.call_number)
    await case.answers.wait("long", "next")


async def test_one_deadline_after_another_fires(case: Case) -> None:
    """On a stream that stays silent; what never left is given back and leaves with a new time."""
    case.send("first", "second", "waits")
    line = await case.participant.line()
    await line.hello(window=2)
    sent = [one.call_number for one in await line.calls()]
    transport, stream = case.transport, case.transport._stream
    assert stream is not None
    now_s = asyncio.get_running_loop().time()
    for number, one in enumerate([*stream.pending.values(), *transport._waiting]):
        one.expires_s = now_s + number * 0.01
    transport._expire_at(now_s)
    for reply in await case.answers.wait("first", "second"):
        assert reply.status == "DEADLINE_EXCEEDED"
    with anyio.fail_after(20):
        while case.given_back != ["waits"]:
            await anyio.lowlevel.checkpoint()
    await line.answer(*sent)
    (again,) = await line.calls()
    assert (again.call.saga_id, again.timeout_ms > 19_000) == ("waits", True)


async def test_a_call_that_waits_to_be_sent_puts_off_nobody_elses_deadline(case: Case) -> None:
    """What is on the wire is over when its own time is, not when the waiting one's is."""
    case.send("over", "soon", "waits")
    line = await case.participant.line()
    await line.hello(window=2)
    sent = await line.calls()
    transport, stream = case.transport, case.transport._stream
    assert stream is not None
    now_s = asyncio.get_running_loop().time()
    expires_s = {"over": now_s, "soon": now_s + 500, "waits": now_s + 1_000}
    for one in [*stream.pending.values(), *transport._waiting]:
        one.expires_s = expires_s[one.call.saga_id]
    transport._expire()
    assert transport._expires_s == expires_s["soon"]
    await line.answer(*(one.call_number for one in sent))
    (last,) = await line.calls()
    await line.answer(last.call_number)
    await case.answers.wait("over", "soon", "waits")


async def test_a_stream_whose_credits_are_never_given_back_is_replaced(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """A participant that keeps calls to itself for ever does not keep its lane with them."""
    monkeypatch.setattr(exchange, "LATE_REPLIES_S", 0.0)
    case.send("a", timeout_ms=400)
    case.send("b", timeout_ms=450)
    line = await case.participant.line()
    await line.hello(window=1)
    await line.calls()
    for reply in await case.answers.wait("a", "b"):
        assert reply.status == "DEADLINE_EXCEEDED"
    case.send("c")
    second = await case.participant.line()
    await second.hello()
    (sent,) = await second.calls()
    await second.answer(sent.call_number)
    (reply,) = await case.answers.wait("c")
    assert reply.outcome == Done()


async def test_a_call_that_never_leaves_has_its_deadline_too(case: Case) -> None:
    """A participant that takes the connection and grants nothing holds nobody for ever."""
    case.send("a", timeout_ms=400)
    await case.participant.line()
    (reply,) = await case.answers.wait("a")
    assert reply.status == "DEADLINE_EXCEEDED"


async def test_a_participant_that_does_not_open_the_stream_is_given_up(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """Who waits is told; the next call tries again."""
    monkeypatch.setattr(exchange, "OPENING_S", 0.05)
    case.send("a")
    await case.participant.line()
    (reply,) = await case.answers.wait("a")
    assert (reply.status, reply.healthy) == ("UNAVAILABLE", False)
    case.send("b")
    line = await case.participant.line()
    await line.hello()
    (sent,) = await line.calls()
    await line.answer(sent.call_number)
    await case.answers.wait("b")


async def test_a_call_that_cannot_be_written_down_is_unknown_and_leaves_its_neighbours_alone(
    case: Case,
) -> None:
    """A fault of our own, here a name that is no UTF-8."""
    case.send("a")
    case.send("odd", action="\udc80")
    case.send("b")
    line = await case.participant.line()
    await line.hello()
    sent = await line.calls()
    assert [one.call.saga_id for one in sent] == ["a", "b"]
    (reply,) = await case.answers.wait("odd")
    assert reply.status == "INTERNAL"
    await line.answer(*(one.call_number for one in sent))
    await case.answers.wait("a", "b")


async def test_nobody_is_answered_by_a_transport_that_was_closed(case: Case) -> None:
    """What was under way is nobody's then; its tasks end."""
    case.send("a")
    line = await case.participant.line()
    await line.hello()
    await line.calls()
    await case.transport.close()
    await asyncio.sleep(0)
    assert case.answers.replies == {}
