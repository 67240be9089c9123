"""One trace per saga, whatever died in between: real processes, and a real receiver of OTLP."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final

import anyio

from amends import RecordKind, SagaState
from amends_runtime.core.tracing import Tracing
from shop.catalogue import DECLINED_CARD
from tests.acceptance.patient_service import POLLS
from tests.acceptance.traced import AFTER, Traced, traced_world
from tests.acceptance.world import PATIENCE_S
from tests.telemetry.otlp_receiver import Behaviour, receiving
from tests.telemetry.trace_rules import (
    Expectation,
    Seen,
    Trace,
    assert_well_formed,
    broken_rules,
)

CALLER_TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER_SPAN: Final = "00f067aa0ba902b7"
COMPENSATE: Final = "amends.v1.ParticipantService/Compensate"


def names(spans: list[Seen]) -> list[str]:
    """What they are called, oldest first."""
    return [each.name for each in spans]


def step(trace: Trace, name: str, nth: int = 0) -> Seen:
    """A step's or a compensation's span by its name; the first life, or another."""
    return [each for each in trace.steps if each.name == name][nth]


def outcomes(trace: Trace, name: str, nth: int = 0) -> list[str]:
    """How the attempts of a step ended, in their order."""
    below = trace.children(step(trace, name, nth))
    return [each.text("amends.outcome") for each in below if each in trace.attempts]


def events(each: Seen) -> list[str]:
    """What happened to it."""
    return [event.name for event in each.proto.events]


# -- what may become of a saga ---------------------------------------------------------------------


async def test_an_order_completes(traced: Traced) -> None:
    """Root, steps, attempts, the services' spans, and the span that a service's author has made."""
    started = await traced.world.start()
    await traced.world.end(started)

    trace = await traced.well_formed(started.saga_id)

    (root,) = trace.roots
    assert (root.name, root.text("amends.outcome"), root.is_error) == (
        "saga order",
        "COMPLETED",
        False,
    )
    assert root.parent_id == ""
    assert events(root) == []
    assert Counter(names(trace.children(root))) == Counter(
        f"step {name}" for name in ("place", "charge", "reserve", "ship", "confirm")
    )
    for each in trace.steps:
        (attempt,) = trace.children(each)
        (served,) = trace.children(attempt)
        assert (
            served.service == each.text("amends.participant") == served.text("amends.participant")
        )
        assert not each.is_error
    assert Counter(each.service for each in trace.servers) == {
        "orders": 2,
        "payments": 1,
        "inventory": 1,
        "shipping": 1,
    }
    (attempt,) = trace.children(step(trace, "step charge"))
    (served,) = trace.children(attempt)
    assert names(trace.children(served)) == ["authorise card"]


async def test_a_declined_order_is_compensated(traced: Traced) -> None:
    """It says where and why it turned back; what undoes links to what it undoes."""
    started = await traced.world.start(card=DECLINED_CARD)
    await traced.world.end(started)

    trace = await traced.well_formed(started.saga_id)

    (root,) = trace.roots
    assert root.proto.status.message == "COMPENSATED: card_declined at charge"
    assert events(root) == ["turned back"]
    charge = step(trace, "step charge")
    assert charge.proto.status.message == "card_declined"
    assert outcomes(trace, "step charge") == ["rejected"]
    undone = step(trace, "compensate place")
    assert [link.span_id.hex() for link in undone.proto.links] == [
        step(trace, "step place").span_id
    ]
    (attempt,) = trace.children(undone)
    assert attempt.name == COMPENSATE
    assert [each.text("amends.outcome") for each in trace.servers if each.text("amends.step") ==
            "charge"] == ["rejected"]  # fmt: skip


async def test_a_flaky_service_is_asked_again(traced: Traced) -> None:
    """Each attempt is a span, the failed ones with the status; the step says when it is retried."""
    traced.world.switch(payments={"charge": {"fail_before": {"next": 2}}})
    started = await traced.world.start()
    await traced.world.end(started)

    trace = await traced.well_formed(started.saga_id)

    assert outcomes(trace, "step charge") == ["unknown", "unknown", "done"]
    charge = step(trace, "step charge")
    assert events(charge) == ["retry scheduled", "retry scheduled"]
    first, second, third = trace.children(charge)
    assert [each.number("amends.attempt") for each in (first, second, third)] == [1, 2, 3]
    assert first.text("error.type") == first.text("rpc.response.status_code") == "UNAVAILABLE"
    assert not charge.is_error
    assert not trace.roots[0].is_error


async def test_a_service_that_takes_its_time_is_polled(traced: Traced) -> None:
    """One attempt, and a span of the participant for each time that it was asked."""
    started = await traced.client.start("thoughtful", timeout_s=PATIENCE_S)
    await started.result(timeout_s=PATIENCE_S)

    trace = await traced.well_formed(started.saga_id)

    (attempt,) = trace.children(step(trace, "step think"))
    assert attempt.number("amends.polls") == POLLS
    served = trace.children(attempt)
    assert [each.text("amends.outcome") for each in served] == ["in_progress"] * POLLS + ["done"]
    assert [each.attributes["amends.poll"] for each in served] == [False] + [True] * POLLS
    assert {each.service for each in served} == {"patient"}


async def test_a_service_is_down_and_comes_back(traced: Traced) -> None:
    """The wait for the breaker is a span, and what was sent to look is marked as a probe."""
    await traced.world.take_down("shipping")
    started = await traced.world.start()
    await traced.wait_probe(started.saga_id)
    traced.world.switch()
    await traced.world.end(started)

    trace = await traced.well_formed(started.saga_id)

    below = trace.children(step(trace, "step ship"))
    waits = [each for each in below if each.name == "breaker open: shipping"]
    assert waits
    assert all(each.number("amends.held_ms") > 0 for each in waits)
    attempts = [each for each in below if each in trace.attempts]
    assert [each.text("amends.outcome") for each in attempts[:-1]] == ["unknown"] * (
        len(attempts) - 1
    )
    assert attempts[-1].text("amends.outcome") == "done"
    assert any(each.attributes.get("amends.probe") for each in attempts)


async def test_a_stuck_order_is_retried_by_an_operator(traced: Traced) -> None:
    """What was stuck is a span that has ended, sent before the saga's end; the retry links it."""
    traced.world.switch(orders={"confirm": {"decline": {"next": 1}}})
    started = await traced.world.start()
    await traced.world.wait_record(started.saga_id, RecordKind.STEP_STUCK, "confirm")
    trace_id = await traced.trace_id(started.saga_id)
    stuck = Expectation(is_open=True, after=AFTER)
    await traced.wait(
        lambda: (
            any(each.name == "step confirm" for each in traced.spans(trace_id))
            and not broken_rules(traced.spans(trace_id), stuck)
        ),
        "the stuck step",
    )
    assert_well_formed(traced.spans(trace_id), stuck)

    await started.retry(step="confirm", author="ada", reason="the shop is open again")
    await traced.world.end(started)

    trace = await traced.well_formed(started.saga_id)
    first, second = step(trace, "step confirm"), step(trace, "step confirm", 1)
    assert first.proto.status.message == "shop_closed"
    assert "stuck" in events(first)
    assert [link.span_id.hex() for link in second.proto.links] == [first.span_id]
    assert (second.number("amends.round"), second.text("amends.outcome")) == (2, "done")
    assert events(trace.roots[0]) == ["step stuck", "operator acted"]


async def test_a_stuck_undoing_is_retried_by_an_operator(traced: Traced) -> None:
    """Both lives of it link the step that they undo, the second also the first."""
    started = await traced.client.start("regretted", timeout_s=PATIENCE_S)
    await traced.world.wait_record(started.saga_id, RecordKind.STEP_STUCK, "begin")
    await started.retry(step="begin", author="ada", reason="it is in the mood now")
    ended = await started.result(timeout_s=PATIENCE_S)
    assert ended.state is SagaState.COMPENSATED

    trace = await traced.well_formed(started.saga_id)

    forward = step(trace, "step begin")
    first, second = step(trace, "compensate begin"), step(trace, "compensate begin", 1)
    assert outcomes(trace, "compensate begin")[0] == "broken"
    assert [link.span_id.hex() for link in first.proto.links] == [forward.span_id]
    assert {link.span_id.hex() for link in second.proto.links} == {forward.span_id, first.span_id}


async def test_a_stuck_order_is_abandoned(traced: Traced) -> None:
    """The root ends, and says so."""
    traced.world.switch(orders={"confirm": {"decline": {"next": 1}}})
    started = await traced.world.start()
    traced.world.may_be_stuck.add(started.saga_id)
    await traced.world.wait_record(started.saga_id, RecordKind.STEP_STUCK, "confirm")

    await started.abandon(author="ada", reason="confirmed by telephone")

    trace = await traced.well_formed(started.saga_id)
    (root,) = trace.roots
    assert root.text("amends.outcome") == "ABANDONED"
    assert root.proto.status.message.startswith("ABANDONED")
    assert events(root)[-1] == "operator acted"


# -- who started it --------------------------------------------------------------------------------


async def test_a_caller_s_trace_is_joined(traced: Traced) -> None:
    """The root is below the caller's span, which nobody here has sent."""
    saga = await traced.client.start(
        "thoughtful",
        traceparent=f"00-{CALLER_TRACE}-{CALLER_SPAN}-01",
        timeout_s=PATIENCE_S,
    )
    await saga.result(timeout_s=PATIENCE_S)

    trace = await traced.well_formed(saga.saga_id, caller=CALLER_SPAN)

    assert trace.roots[0].trace_id == CALLER_TRACE
    assert trace.roots[0].parent_id == CALLER_SPAN


async def test_a_caller_who_is_not_sampled_has_decided(traced: Traced) -> None:
    """Nothing of the saga is sent, by the runtime or by a service."""
    unsampled = "0af7651916cd43dd8448eb211c80319c"
    saga = await traced.client.start(
        "thoughtful", traceparent=f"00-{unsampled}-{CALLER_SPAN}-00", timeout_s=PATIENCE_S
    )
    await saga.result(timeout_s=PATIENCE_S)
    told = await traced.client.trace(saga.saga_id)
    assert (told.trace_id, told.sampled) == (unsampled, False)
    # A later one has come, so the earlier would have, too; and when everything has ended, a trace
    # that nobody expects is an error.
    later = await traced.world.start()
    await traced.world.end(later)
    await traced.well_formed(later.saga_id)

    assert traced.spans(unsampled) == []


# -- whatever dies ---------------------------------------------------------------------------------


async def test_the_runtime_is_killed_in_the_middle(traced: Traced) -> None:
    """One trace, before and after; the attempt that was lost with it is there."""
    world = traced.world
    world.switch(payments={"charge": {"hold": {"next": 1}}})
    struck = world.strikes("payments", "charge hold")
    started = await world.start()
    await world.wait_strike("payments", "charge hold", after=struck)
    before = await traced.trace_id(started.saga_id)

    traced.kill_runtime()
    await world.runtime.start()
    world.switch()
    await world.end(started)

    trace = await traced.well_formed(started.saga_id, crashed=True)
    assert trace.roots[0].trace_id == before
    assert outcomes(trace, "step charge")[0] == "lost"
    assert outcomes(trace, "step charge")[-1] == "done"
    lost = trace.children(step(trace, "step charge"))[0]
    assert lost.text("error.type") == "lost"
    assert events(trace.roots[0]) == ["runtime restarted"]
    epochs = {each.number("amends.epoch") for each in trace.attempts}
    assert len(epochs) == 2


async def test_a_service_is_killed_in_the_middle(traced: Traced) -> None:
    """The service's span is lost with it; the runtime's attempt is not, and says what it met."""
    world = traced.world
    world.switch(payments={"charge": {"hold": {"next": 1}}})
    struck = world.strikes("payments", "charge hold")
    started = await world.start()
    await world.wait_strike("payments", "charge hold", after=struck)

    world.services["payments"].kill()
    world.switch()
    await world.services["payments"].start()
    await world.end(started)

    trace = await traced.well_formed(started.saga_id, lossy=frozenset({"payments"}))
    first = trace.children(step(trace, "step charge"))[0]
    assert first.text("rpc.response.status_code") == "UNAVAILABLE"
    assert trace.children(first) == []
    assert outcomes(trace, "step charge")[-1] == "done"


async def test_what_a_killed_runtime_had_not_sent_is_sent_by_the_next(traced: Traced) -> None:
    """The sagas had ended, so nobody goes on with them; their spans come all the same, whole."""
    world = traced.world
    asked = traced.receiver.arrived
    traced.receiver.behave(Behaviour.HANG)
    sagas = [await world.start() for _ in range(5)]
    for each in sagas:
        await world.end(each)
    await traced.receiver.wait_until(lambda: traced.receiver.arrived > asked)
    trace_ids = [await traced.trace_id(each.saga_id) for each in sagas]
    traced.kill_runtime()
    traced.receiver.behave(Behaviour.ANSWER)

    await world.runtime.start()

    for each, trace_id in zip(sagas, trace_ids, strict=True):
        trace = await traced.well_formed(each.saga_id, crashed=True)
        assert trace.roots[0].trace_id == trace_id
        assert outcomes(trace, "step confirm") == ["done"]


# -- which are kept, and whose trace it is ---------------------------------------------------------


async def test_one_in_a_hundred_is_kept_by_all_alike(tmp_path: Path) -> None:
    """By the trace id alone, so that the services keep the same ones as the runtime."""
    settings = "\n[telemetry]\ntraces_ratio = 0.01\n"
    async with (
        receiving() as receiver,
        traced_world(tmp_path, receiver, settings=settings) as traced,
    ):
        tracing = Tracing((await traced.client.runtime()).store_id, ratio=0.01)
        sampled, others = _ids_of(tracing, sampled=2, others=20)
        async with anyio.create_task_group() as orders:
            for saga_id in (*others, *sampled):
                orders.start_soon(_order, traced, saga_id)

        for saga_id in sampled:
            await traced.well_formed(saga_id)
        for saga_id in others:
            assert not (await traced.client.trace(saga_id)).sampled
    # That nothing else came is said at the end of the world.


def _ids_of(tracing: Tracing, *, sampled: int, others: int) -> tuple[list[str], list[str]]:
    """Find ids of sagas whose traces are kept, and of some that are not."""
    kept: list[str] = []
    left: list[str] = []
    number = 0
    while len(kept) < sampled:
        saga_id = f"one-of-many-{number}"
        number += 1
        is_kept = tracing.is_sampled(tracing.trace_id(saga_id, ""), "")
        (kept if is_kept else left).append(saga_id)
    return kept, left[:others]


async def _order(traced: Traced, saga_id: str) -> None:
    await traced.world.end(await traced.world.start(saga_id=saga_id))


async def test_a_caller_is_linked_instead(tmp_path: Path) -> None:
    """By configuration: a trace of the saga's own, whose root links to the caller's span."""
    settings = '\n[telemetry]\ncaller_trace = "link"\n'
    async with (
        receiving() as receiver,
        traced_world(tmp_path, receiver, settings=settings) as traced,
    ):
        saga = await traced.client.start(
            "thoughtful",
            # Not sampled: a saga with a trace of its own decides for itself.
            traceparent=f"00-{CALLER_TRACE}-{CALLER_SPAN}-00",
            timeout_s=PATIENCE_S,
        )
        await saga.result(timeout_s=PATIENCE_S)

        trace = await traced.well_formed(saga.saga_id, linked_caller=(CALLER_TRACE, CALLER_SPAN))

        assert trace.roots[0].trace_id != CALLER_TRACE
        assert trace.roots[0].parent_id == ""
