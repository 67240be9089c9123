"""What must hold of two-phase commits, in addition to what holds of any saga.

The ledgers of all participants together say what happened; of the runtime only each saga's end, its
decisions on the disk and the calls that left are taken, and compared with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from amends.outcomes import Verb
from amends.v1 import participant_pb2, types_pb2
from amends_runtime.core.definition import Plan
from amends_runtime.core.records import (
    AttemptFailed,
    CommitDecision,
    DecisionMade,
    HeuristicReported,
    Record,
    RoundPlanned,
    SagaStarted,
    SagaState,
    TurnCause,
)
from amends_runtime.core.records import Verb as CoreVerb
from amends_runtime.core.saga import Saga
from tests.simulation.faults import Fault

if TYPE_CHECKING:
    from tests.simulation.client import Journal
    from tests.simulation.participants import Effect
    from tests.simulation.world import World

__all__ = [
    "audit",
    "audit_money",
    "check_aborting",
    "check_answer",
    "check_reported",
    "check_told",
]

COMMIT, ABORT = CommitDecision.COMMIT, CommitDecision.ABORT


# -- while it goes on ------------------------------------------------------------------------------


def decisions_of(world: World, saga_id: str) -> dict[int, CommitDecision]:
    """The decisions that are on the disk, by round."""
    saga_no = world.disk.saga_nos.get(saga_id, 0)
    return {
        record.round: record.decision
        for turn in world.disk.history.get(saga_no, [])
        for record in turn.records
        if isinstance(record, DecisionMade)
    }


def check_told(world: World, saga_id: str, verb: CoreVerb, round_: int) -> None:
    """A call of the second phase leaves, or arrives: its decision is on the disk, and is that."""
    if verb is CoreVerb.PREPARE:
        return
    decision = decisions_of(world, saga_id).get(round_)
    if decision is None:
        world.violation(
            "nobody is told what is not durable",
            f"{saga_id}: {verb.name} in round {round_}, and no decision is on the disk",
        )
    elif (decision is COMMIT) is not (verb is CoreVerb.EXECUTE):
        world.violation(
            "nobody is told anything but the decision",
            f"{saga_id}: {verb.name} in round {round_}, and it was {decision.name}",
        )


def check_answer(world: World, saga_id: str, round_: int, decision: CommitDecision | None) -> None:
    """A participant in doubt was told this: it is durable, and nobody was told otherwise."""
    if decision is None:
        world.violation("a vote belongs to a two-phase commit", f"{saga_id}: asked, and denied")
    if decision not in (COMMIT, ABORT):
        return
    told = world.facts.told.setdefault((saga_id, round_), decision)
    durable = decisions_of(world, saga_id).get(round_)
    if decision is not told or decision is not durable:
        world.violation(
            "what a participant in doubt is told is durable, and stands",
            f"{saga_id}, round {round_}: told {decision.name}, before that {told.name}; on the disk"
            f" it is {durable.name if durable is not None else 'open'}",
        )


# -- by its history --------------------------------------------------------------------------------


def check_aborting(world: World, plan: Plan, journal: Journal, records: Sequence[Record]) -> None:
    """An ABORT has a reason that the world gave it, and so has a new round."""
    saga_id = journal.script.saga_id
    deadline_at_ms = 0
    for record in records:
        if isinstance(record, SagaStarted):
            deadline_at_ms = record.deadline_at_ms
        elif isinstance(record, RoundPlanned):
            world.faults.count(Fault.NEXT_ROUND, saga_id)
        elif isinstance(record, DecisionMade) and record.decision is ABORT:
            given = _is_given(world, plan, journal, record, deadline_at_ms, records)
            if not given:
                world.violation(
                    "a commit is aborted only after a no, a deadline or somebody's word",
                    f"{saga_id}: {record}",
                )


def _is_given(  # noqa: PLR0917  # one place
    world: World,
    plan: Plan,
    journal: Journal,
    record: DecisionMade,
    deadline_at_ms: int,
    records: Sequence[Record],
) -> bool:
    if record.cause is TurnCause.CANCELLED:
        return journal.asked_to_cancel or journal.asked_to_abandon
    if record.cause is TurnCause.DEADLINE:
        return 0 < deadline_at_ms <= record.at_ms
    assert record.step is not None, "a branch has said no"
    key = (journal.script.saga_id, plan.step_names[record.step])
    facts = world.facts
    if record.cause is TurnCause.REJECTED:
        reasons = facts.refusals.get((*key, record.round), set())
        return record.failure.reason in reasons
    if record.failure.reason in ("BREAKER_OPEN", "NO_PARTICIPANT"):
        return world.faults.fired[Fault.BREAKER_OPEN] > 0 or bool(world.schedule.by_hand)
    if key in facts.broken or key in facts.misconfigured or key in facts.misread:
        return True
    policy = plan.steps[record.step].retry
    assert policy is not None, "a plan is normalised"
    probed = any(
        isinstance(other, AttemptFailed) and other.probe and other.step == record.step
        for other in records
    )
    return probed or policy.give_up_after_ms < PATIENCE_MS


PATIENCE_MS = 60_000
"""Retries that no deadline of these commits would let go so far are not given up."""


# -- by the ledgers --------------------------------------------------------------------------------


def audit(world: World, plan: Plan, saga_id: str, saga: Saga, lines: Sequence[Effect]) -> None:
    """All or none, but for votes that were broken; and nobody holds anything any more."""
    for what in _not_atomic(world, plan, saga, lines):
        world.violation("all or none, as it ended", f"{saga_id} is {saga.state.name}: {what}")
    decisions = decisions_of(world, saga_id)
    for line in lines:
        if line.verb is Verb.EXECUTE and not line.is_fence and not line.is_alone:
            _check_commit(world, plan, decisions, line, lines)
    for participant in world.participants.values():
        for account, life in participant.branches.holds.items():
            if life[0] == saga_id:
                world.violation(
                    "nothing is held at the end",
                    f"{saga_id}: {participant.name} holds {account} for {life[1]}, round {life[2]}",
                )
    _check_calls(world, saga_id, decisions, lines)
    for (told_id, round_), told in world.facts.told.items():
        if told_id == saga_id and decisions.get(round_) is not told:
            world.violation(
                "what a participant in doubt is told is durable, and stands",
                f"{saga_id}, round {round_}: told {told.name}",
            )


def _not_atomic(world: World, plan: Plan, saga: Saga, lines: Sequence[Effect]) -> Iterator[str]:
    """What of the ledgers does not fit the end."""
    broken = {step for saga_id, step in world.facts.broken_votes if saga_id == saga.saga_id}
    if saga.end not in (SagaState.COMPLETED, SagaState.COMPENSATED, SagaState.MIXED):
        yield "which is no end of a two-phase commit"
    if saga.end is SagaState.MIXED and not broken:
        yield "and no vote was broken"
    if saga.end is SagaState.MIXED:
        commits = saga.decision is COMMIT
    else:
        commits = saga.end is SagaState.COMPLETED
        broken = set()  # a promise that was broken and kept after all shows nothing
    for step in plan.steps:
        count = sum(
            line.step == step.name and line.verb is Verb.EXECUTE and not line.is_fence
            for line in lines
        )
        if count > 1:
            yield f"{step.name} was committed {count} times"
        elif count != commits and step.name not in broken:
            yield f"{step.name} was {'not ' if commits else ''}committed"


def _check_commit(
    world: World,
    plan: Plan,
    decisions: dict[int, CommitDecision],
    line: Effect,
    lines: Sequence[Effect],
) -> None:
    """What is visible was voted for by all."""
    votes = {
        other.step
        for other in lines
        if other.verb is Verb.PREPARE
        and not other.is_fence
        and other.round == line.round
        and other.order < line.order
    }
    if votes != set(plan.step_names) or decisions.get(line.round) is not COMMIT:
        world.violation(
            "nothing is visible before all have voted yes",
            f"{line.saga_id}: {line.step} was committed, and {sorted(votes)} had voted",
        )


def _check_calls(
    world: World,
    saga_id: str,
    decisions: dict[int, CommitDecision],
    lines: Sequence[Effect],
) -> None:
    """Each who voted yes is told, all are told the same, and nobody is after the end of a round."""
    told = {
        (message.step, message.round): message.verb for message in _second_phase(world, saga_id)
    }
    for message in _second_phase(world, saga_id):
        decision = decisions.get(message.round)
        if decision is None or message.verb != _VERB_OF[decision]:
            world.violation(
                "nobody is told anything but the decision",
                f"{saga_id}: {message.step} in round {message.round}",
            )
    for line in lines:
        voted = line.verb is Verb.PREPARE and not line.is_fence
        if voted and (line.step, line.round) not in told:
            world.violation(
                "each who voted yes is told the decision",
                f"{saga_id}: {line.step} in round {line.round} never was",
            )


def _second_phase(world: World, saga_id: str) -> Iterator[participant_pb2.Call]:
    for _, message in world.network.sent:
        if message.saga_id == saga_id and message.verb != types_pb2.VERB_PREPARE:
            yield message


_VERB_OF = {COMMIT: types_pb2.VERB_EXECUTE, ABORT: types_pb2.VERB_COMPENSATE}


def check_reported(world: World, plan: Plan, saga_id: str, records: Sequence[Record]) -> None:
    """A branch is said to have broken its vote only where one did."""
    for record in records:
        if not isinstance(record, HeuristicReported):
            continue
        name = plan.step_names[record.step]
        agrees = record.committed is (record.verb is CoreVerb.EXECUTE)
        if not agrees and (saga_id, name) not in world.facts.broken_votes:
            world.violation(
                "only a broken vote is called one", f"{saga_id}: {name}: {record.failure}"
            )


def audit_money(world: World) -> None:
    """What is transferred stays: only a broken vote adds or takes anything."""
    total = sum(
        sum(participant.branches.balances.values()) for participant in world.participants.values()
    )
    mixed = {row.saga_id for row in world.disk.sagas.values() if row.state is SagaState.MIXED}
    excused = sum(line.amount for line in world.ledger if line.saga_id in mixed)
    if total != excused:
        world.violation(
            "the money of all accounts together stays the same",
            f"it is {total}, of which {excused} are of broken votes",
        )
