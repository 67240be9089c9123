"""Properties: whatever the definition and whatever the world does, the rules hold.

`rules.py` says what must hold of every decision and of every history; here hypothesis looks for a
definition and a run of events that breaks one. `make test MODE=long` looks further.
"""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from amends_runtime.core.definition import Plan
from amends_runtime.core.messages import (
    AbandonSaga,
    CancelSaga,
    Message,
    RetrySaga,
    RuntimeRestarted,
    Wake,
)
from amends_runtime.core.records import Record, SagaState
from amends_runtime.core.saga import decide, remaining_steps
from tests.core.barrier import MoneyWorld
from tests.core.definitions import chooser, plans
from tests.core.rules import rule
from tests.core.world import START_MS, World

EVENTS = st.integers(0, 60)
DEADLINES = st.sampled_from([0, 0, 1, 300, 60_000])


@given(plans(), st.data(), EVENTS, DEADLINES)
def test_every_rule_holds_in_a_hostile_world(
    plan: Plan, data: st.DataObject, events: int, deadline_ms: int
) -> None:
    """Any reply, in any order, lost, repeated or late; restarts, cancellation, a jumping clock."""
    world = World(plan, chooser(data), deadline_ms)
    for _ in range(events):
        world.act()


@given(plans(), st.data(), EVENTS, DEADLINES)
def test_every_saga_ends_or_says_that_it_is_stuck(
    plan: Plan, data: st.DataObject, events: int, deadline_ms: int
) -> None:
    """After any hostility, once participants answer again, nothing is left hanging."""
    world = World(plan, chooser(data), deadline_ms)
    for _ in range(events):
        world.act()
    world.calm_down()
    rule("it ended, or it is stuck", holds=is_over(world) or world.state is SagaState.STUCK)


@given(plans(), st.data(), EVENTS, DEADLINES)
def test_nothing_stuck_is_without_a_way_out(
    plan: Plan, data: st.DataObject, events: int, deadline_ms: int
) -> None:
    """Once participants are mended, one retry brings whatever is stuck to its end."""
    world = World(plan, chooser(data), deadline_ms)
    for _ in range(events):
        world.act()
    world.calm_down()
    if world.state is SagaState.STUCK:
        world.tell(RetrySaga(author="ann", reason="the participant is mended"))
        world.calm_down()
    rule("it ended", holds=is_over(world))


@given(plans(patient=True), st.data(), EVENTS, DEADLINES)
def test_without_permanent_faults_every_saga_ends(
    plan: Plan, data: st.DataObject, events: int, deadline_ms: int
) -> None:
    """Losses, refusals, restarts and cancellation alone never leave a saga to an operator."""
    world = World(plan, chooser(data), deadline_ms)
    for _ in range(events):
        world.act(friendly=True)
    world.calm_down()
    rule("it ended", holds=is_over(world))


@given(plans(), st.data(), EVENTS, DEADLINES)
def test_no_money_is_lost_or_made(
    plan: Plan, data: st.DataObject, events: int, deadline_ms: int
) -> None:
    """Behind a barrier: COMPLETED means each effect once, COMPENSATED means net zero.

    Whatever the network loses, repeats, or delivers after the saga has ended.
    """
    world = MoneyWorld(plan, chooser(data), deadline_ms)
    for _ in range(events):
        world.act()
    world.calm_down()
    world.deliver_everything_again()
    if world.state is SagaState.COMPLETED:
        assert world.balances() <= {1}
    elif world.state is SagaState.COMPENSATED:
        assert world.balances() <= {0}
    elif world.state is SagaState.ABANDONED:
        assert world.saga is not None
        told = remaining_steps(plan, world.saga)
        assert [
            step for step, coins in enumerate(world.balance) if coins and step not in told
        ] == []
    else:
        rule("it is stuck", holds=world.state is SagaState.STUCK)


@given(plans(), st.data(), EVENTS)
def test_terminal_stays_terminal(plan: Plan, data: st.DataObject, events: int) -> None:
    """Whatever is said after the end, and however often, no record follows."""
    world = World(plan, chooser(data))
    world.calm_down()
    after: list[Message] = [Wake(), RuntimeRestarted(), CancelSaga(), world.start, *world.echoes]
    after += [RetrySaga(author="ann", reason="again", revived=True)]
    after += [AbandonSaga(author="ann", reason="enough", force=True)]
    for _ in range(events):
        decision = world.tell(world.choose(after))
        assert decision.records == ()
        assert decision.effects == ()


@given(plans(), st.data(), EVENTS, DEADLINES)
def test_the_same_messages_tell_the_same_story(
    plan: Plan, data: st.DataObject, events: int, deadline_ms: int
) -> None:
    """Replayed from the start, by a plan built anew, every decision is the same."""
    world = World(plan, chooser(data), deadline_ms)
    times = [START_MS]
    for _ in range(events):
        told = len(world.told)
        world.act()
        times += [world.now_ms] * (len(world.told) - told)
    rebuilt = Plan(plan.definition)
    saga = None
    for (message, decision), now_ms in zip(world.told, times, strict=True):
        again = decide(rebuilt, saga, message, now_ms, 1)
        assert again == decision
        saga = again.saga


@given(plans(), st.data(), EVENTS)
def test_records_survive_their_stored_form(plan: Plan, data: st.DataObject, events: int) -> None:
    """Written as msgpack and read again, a history is the same history."""
    world = World(plan, chooser(data))
    for _ in range(events):
        world.act()
    stored = msgspec.msgpack.encode(world.records)
    assert msgspec.msgpack.decode(stored, type=list[Record]) == world.records


def is_over(world: World) -> bool:
    """Whether the saga has ended."""
    assert world.saga is not None
    return world.saga.ended
