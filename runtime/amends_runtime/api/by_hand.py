"""What an operator's verb is about: whom it calls, or why it was refused and what helps instead."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from amends_runtime.actors.supervisor import SagaView
from amends_runtime.core.records import CommitDecision, SagaState
from amends_runtime.core.saga import Answer, StepStatus
from amends_runtime.core.two_phase import is_held
from amends_runtime.errors import WrongState

__all__ = ["called_now", "not_abandoned", "not_retried", "stuck_steps", "waits_for"]


def not_retried(view: SagaView, answer: Answer, step: str | None) -> WrongState:
    """The refusal of a retry; `step` is the one that was named, if one was."""
    if answer is Answer.ENDED:
        return _ended(view, "nothing of it is tried again")
    saga_id, stuck = view.saga.saga_id, list(stuck_steps(view))
    metadata = {"saga_id": saga_id, "state": view.saga.state.name, "stuck": ", ".join(stuck)}
    if step is None:
        return WrongState(
            "NOTHING_STUCK",
            f"no step of saga {saga_id!r} is stuck or waits for its next attempt, so there is"
            " nothing to try now:"
            f" {_doing(view)}",
            metadata,
        )
    status = view.saga.steps[view.plan.number_of[step]].status
    mend = f"stuck is {', '.join(stuck)}: retry that" if stuck else _doing(view)
    return WrongState(
        "NOTHING_STUCK",
        f"step {step!r} of saga {saga_id!r} is {status.name}, neither stuck nor waiting for its"
        f" next attempt, and was left alone: {mend}",
        {**metadata, "step": step},
    )


def called_now(view: SagaView, step: str | None) -> set[str]:
    """Whom a saga that is retried calls: the participants of its open attempts, or of one step."""
    return {
        call.participant
        for call, state in zip(view.plan.steps, view.saga.steps, strict=True)
        if state.open and step in (None, call.name)
    }


def not_abandoned(view: SagaView, answer: Answer) -> WrongState:
    """The refusal to abandon."""
    if answer is Answer.ENDED:
        return _ended(view, "its end stays what it is")
    if answer is Answer.DECIDED:
        return _decided(view)
    saga_id = view.saga.saga_id
    return WrongState(
        "NOT_STUCK",
        f"saga {saga_id!r} is not stuck, and was left alone: {_doing(view)}. To turn it back,"
        " cancel it; to end it as it is all the same, with effects that nobody undoes, use force",
        {"saga_id": saga_id, "state": view.saga.state.name},
    )


def _decided(view: SagaView) -> WrongState:
    saga, waited_for = view.saga, ", ".join(waits_for(view))
    return WrongState(
        "DECIDED",
        f"saga {saga.saga_id!r} has decided COMMIT, which nobody takes back: whoever has committed"
        f" would keep what others never did. It waits for {waited_for} to acknowledge that, and"
        " says it again and again until then: mend what is in the way, and amends retry"
        f" {saga.saga_id} --reason WHY tries at once. For a participant that is lost for ever let a"
        " program in its place say what became of its vote (Heuristic); the saga then ends MIXED,"
        " unless that was to commit",
        {
            "saga_id": saga.saga_id,
            "state": saga.state.name,
            "decision": CommitDecision.COMMIT.name,
            "waits_for": waited_for,
        },
    )


def waits_for(view: SagaView) -> Iterator[str]:
    """The names of a two-phase commit's steps that have not acknowledged its decision."""
    for step, state in zip(view.plan.steps, view.saga.steps, strict=True):
        if is_held(state):
            yield step.name


def _ended(view: SagaView, so: str) -> WrongState:
    saga = view.saga
    if saga.state is SagaState.COMPLETED:
        mend = "to reverse what it did, start a saga that does the opposite"
    elif saga.state is SagaState.MIXED:
        mend = "its history says which participant broke its vote: put that right there"
    else:
        mend = "start a new one, with another id"
    return WrongState(
        "SAGA_ENDED",
        f"saga {saga.saga_id!r} has ended {saga.state.name}, and {so}: {mend}",
        {"saga_id": saga.saga_id, "state": saga.state.name},
    )


def stuck_steps(view: SagaView) -> Iterator[str]:
    """The names of its steps that wait for an operator."""
    for step, state in zip(view.plan.steps, view.saga.steps, strict=True):
        if state.status is StepStatus.STUCK or (view.saga.round and state.stuck_since_ms):
            yield step.name


def _doing(view: SagaView) -> str:
    """What it is at, and until when nothing can be expected of it."""
    under_way = list(_under_way(view))
    state = view.saga.state.name
    return f"it is {state}, and at {'; '.join(under_way)}" if under_way else f"it is {state}"


_AT_WORK: Final = (StepStatus.PREPARING, StepStatus.EXECUTING, StepStatus.COMPENSATING)


def _under_way(view: SagaView) -> Iterator[str]:
    for step, state in zip(view.plan.steps, view.saga.steps, strict=True):
        if state.status not in _AT_WORK:
            continue
        attempt = f"{step.name} ({state.status.name}, attempt {state.attempt}"
        if state.open:
            yield f"{attempt} is under way)"
        elif state.retry_at_ms:
            due = datetime.fromtimestamp(state.retry_at_ms / 1000, UTC)
            yield f"{attempt} is over, the next is due {due:%Y-%m-%d %H:%M:%S} UTC)"
        else:
            yield f"{attempt} is over)"
