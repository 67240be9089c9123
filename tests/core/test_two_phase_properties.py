"""Properties of the two-phase commit: whatever the world does, the rules hold and all agree.

`two_phase_rules.py` says what must hold of every decision and of every history; here hypothesis
looks for branches and a run of events that breaks one. `make test MODE=long` looks further.
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
from amends_runtime.core.records import CommitDecision, DecisionMade, Record, SagaState
from amends_runtime.core.saga import decide
from amends_runtime.core.two_phase import decision_of
from tests.core.definitions import chooser, two_phase_plans
from tests.core.rules import rule
from tests.core.two_phase_world import HonestWorld, VotingWorld
from tests.core.voters import Life
from tests.core.world import START_MS, World

EVENTS = st.integers(0, 60)
DEADLINES = st.sampled_from([0, 1, 300, 300, 60_000, 60_000])


@given(two_phase_plans(), st.data(), EVENTS, DEADLINES)
def test_every_rule_holds_in_a_hostile_world(
    plan: Plan, data: st.DataObject, events: int, deadline_ms: int
) -> None:
    """Any reply, lost, repeated or late; restarts, cancellation, a clock that jumps both ways."""
    world = VotingWorld(plan, chooser(data), deadline_ms)
    for _ in range(events):
        world.act()


@given(two_phase_plans(), st.data(), EVENTS, DEADLINES)
def test_every_commit_ends_without_an_operator(
    plan: Plan, data: st.DataObject, events: int, deadline_ms: int
) -> None:
    """After any hostility, once participants answer, it ends: nothing waits for a person."""
    world = VotingWorld(plan, chooser(data), deadline_ms)
    for _ in range(events):
        world.act()
    world.calm_down()
    rule("it ended", holds=is_over(world))


@given(two_phase_plans(), st.data(), EVENTS, DEADLINES)
def test_only_a_broken_promise_ends_mixed(
    plan: Plan, data: st.DataObject, events: int, deadline_ms: int
) -> None:
    """Losses, refusals, restarts and people never end in MIXED where promises are kept."""
    world = VotingWorld(plan, chooser(data), deadline_ms)
    for _ in range(events):
        world.act(friendly=True)
    world.calm_down()
    assert world.state in {SagaState.COMPLETED, SagaState.COMPENSATED}


@given(two_phase_plans(), st.data(), EVENTS, DEADLINES)
def test_all_commit_or_none_and_nothing_stays_held(
    plan: Plan, data: st.DataObject, events: int, deadline_ms: int
) -> None:
    """COMPLETED: every branch has committed, once. COMPENSATED: none has. Nobody holds anything.

    Whatever the network loses, repeats, or delivers after the end, and whoever asks GetDecision.
    Atomicity itself is looked at after every call.
    """
    world = HonestWorld(plan, chooser(data), deadline_ms)
    for _ in range(events):
        world.act()
    world.calm_down()
    before = dict(world.lives)
    world.deliver_everything_again()
    assert world.saga is not None
    assert world.lives == before
    assert Life.HOLDS not in before.values()
    committed = [step for (step, _), life in before.items() if life is Life.COMMITTED]
    if world.state is SagaState.COMPLETED:
        assert sorted(committed) == list(range(len(plan.steps)))
    else:
        assert world.state is SagaState.COMPENSATED
        assert committed == []
    for round_ in range(1, world.saga.round + 1):
        commits = round_ == world.saga.round and world.state is SagaState.COMPLETED
        wanted = CommitDecision.COMMIT if commits else CommitDecision.ABORT
        assert decision_of(world.saga, round_) is wanted
    decisions = [record for record in world.records if isinstance(record, DecisionMade)]
    assert len(decisions) == world.saga.round


@given(two_phase_plans(), st.data(), EVENTS)
def test_terminal_stays_terminal(plan: Plan, data: st.DataObject, events: int) -> None:
    """Whatever is said after the end, and however often, no record follows."""
    world = VotingWorld(plan, chooser(data), 60_000)
    world.calm_down()
    after: list[Message] = [Wake(), RuntimeRestarted(), CancelSaga(), world.start, *world.echoes]
    after += [
        RetrySaga(author="ann", reason="again", revived=True),
        RuntimeRestarted(restored=True),
    ]
    after += [AbandonSaga(author="ann", reason="enough", force=True)]
    for _ in range(events):
        decision = world.tell(world.choose(after))
        assert decision.records == ()
        assert decision.effects == ()


@given(two_phase_plans(), st.data(), EVENTS, DEADLINES)
def test_the_same_messages_tell_the_same_story(
    plan: Plan, data: st.DataObject, events: int, deadline_ms: int
) -> None:
    """Replayed from the start, by a plan built anew, every decision is the same."""
    world = VotingWorld(plan, chooser(data), deadline_ms)
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


@given(two_phase_plans(), st.data(), EVENTS)
def test_records_survive_their_stored_form(plan: Plan, data: st.DataObject, events: int) -> None:
    """Written as msgpack and read again, a history is the same history."""
    world = VotingWorld(plan, chooser(data))
    for _ in range(events):
        world.act()
    stored = msgspec.msgpack.encode(world.records)
    assert msgspec.msgpack.decode(stored, type=list[Record]) == world.records


def is_over(world: World) -> bool:
    """Whether it has ended."""
    assert world.saga is not None
    return world.saga.ended
