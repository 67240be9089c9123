"""Who waits for whom, read off one saga: every case that the runtime can show."""

from __future__ import annotations

import time

import pytest

import amends
from amends.sagas import Step, StepState
from amends_runtime.cli.doubt_views import print_doubts
from amends_runtime.cli.doubts import Branch, Doubts, branches_of
from amends_runtime.cli.options import COMMON

TRANSFER = (
    amends.Definition("transfer", mode=amends.Mode.TWO_PHASE_COMMIT, ordered=True)
    .step("debit", "east", "debit")
    .step("fee", "east", "fee")
    .step("credit", "west", "credit")
)


def saga(decision: amends.Decision | None, *steps: Step, ended: bool = False) -> amends.Saga:
    """A transfer with these steps, started at 1000."""
    return amends.Saga(
        saga_id="t",
        definition="transfer",
        definition_hash="ab",
        state=amends.SagaState.COMPLETED if ended else amends.SagaState.RUNNING,
        version=3,
        started_at_ms=1000,
        updated_at_ms=2000,
        ended_at_ms=2000 if ended else None,
        decision=decision,
        round=1,
        steps=steps,
    )


def said(branches: list[Branch]) -> list[tuple[str, bool, int, tuple[str, ...], tuple[str, ...]]]:
    """What counts of each branch."""
    return [
        (each.step, each.voted_yes, each.since_ms, each.waits_for, each.told) for each in branches
    ]


def test_while_votes_are_collected() -> None:
    """Who has voted waits for all votes to come, also those that are not asked for yet."""
    found = branches_of(
        saga(
            amends.Decision.PENDING,
            Step(name="debit", state=StepState.PREPARED, prepared_at_ms=1500),
            Step(name="fee", state=StepState.PREPARING),
            Step(name="credit", state=StepState.PENDING),
        ),
        TRANSFER,
    )
    assert said(found) == [
        ("fee", False, 1000, ("east",), ()),
        ("debit", True, 1500, ("east", "west"), ()),
    ]


@pytest.mark.parametrize(
    ("decision", "state", "done"),
    [
        (amends.Decision.COMMIT, StepState.EXECUTING, StepState.EXECUTED),
        (amends.Decision.ABORT, StepState.COMPENSATING, StepState.COMPENSATED),
        (amends.Decision.COMMIT, StepState.EXECUTING, StepState.BROKEN),
    ],
)
def test_after_the_decision(decision: amends.Decision, state: StepState, done: StepState) -> None:
    """Each waits for its own participant; who has acknowledged, however, is told."""
    found = branches_of(
        saga(
            decision,
            Step(name="debit", state=state, prepared_at_ms=1500),
            Step(name="fee", state=state),  # its vote never came: it is told all the same
            Step(name="credit", state=done),
        ),
        TRANSFER,
    )
    assert said(found) == [
        ("fee", False, 1000, ("east",), ("west",)),
        ("debit", True, 1500, ("east",), ("west",)),
    ]


def test_who_holds_nothing_is_not_in_doubt() -> None:
    """A refusal, a vote that was never asked for, an end, a saga that is no two-phase commit."""
    refused = Step(name="debit", state=StepState.REJECTED)
    never = Step(name="fee", state=StepState.PENDING)
    holds = Step(name="credit", state=StepState.PREPARED, prepared_at_ms=5)
    assert branches_of(saga(amends.Decision.ABORT, refused, never), TRANSFER) == []
    assert branches_of(saga(amends.Decision.COMMIT, holds, ended=True), TRANSFER) == []
    assert branches_of(saga(None, holds), TRANSFER) == []


def test_of_a_definition_that_cannot_be_read_the_steps_are_known() -> None:
    """It is of a newer version of amends; whoever asks for it still learns what is held."""
    [branch] = branches_of(
        saga(
            amends.Decision.COMMIT,
            Step(name="credit", state=StepState.EXECUTING, prepared_at_ms=5),
        ),
        None,
    )
    assert (branch.participant, branch.waits_for) == ("", ("credit",))


def test_what_can_be_done_is_said_of_what_waits_for_long(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After a minute, for each participant that is waited for, on standard error."""
    now_ms = time.time_ns() // 1_000_000
    steps = (
        Step(name="debit", state=StepState.EXECUTING, prepared_at_ms=now_ms - 3_600_000),
        Step(name="credit", state=StepState.EXECUTING, prepared_at_ms=now_ms),
    )
    found = branches_of(saga(amends.Decision.COMMIT, *steps), TRANSFER)
    print_doubts(Doubts(branches=tuple(found)), COMMON, limit=1000)
    out, err = capsys.readouterr()
    assert "2 branches in 1 saga" in out
    first, last = err.splitlines()
    assert first.startswith("amends: east has been waited for 1 h 00 min: ")
    assert "amends participants add east=HOST:PORT --reason WHY" in first
    assert "docs/operating.md" in last
    assert "nothing is skipped and nothing forced" in last
