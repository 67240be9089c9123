"""The barrier's rules, row by row, without a database."""

import dataclasses

import pytest

from amends.barrier.verdict import (
    Answer,
    Question,
    Replay,
    Row,
    RowState,
    Run,
    Settlement,
    Verdict,
    Write,
    has_no_rows,
    held_rows,
    judge,
    question_of,
    request_hash,
    settle,
)
from amends.outcomes import Broken, Done, Heuristic, InProgress, Rejected, Verb
from amends.payload import Payload
from tests.participants.asking import call_of

PREPARE, EXECUTE, COMPENSATE = Verb.PREPARE, Verb.EXECUTE, Verb.COMPENSATE

DONE = Row(RowState.DONE, b"same", b"done before")
REJECTED = Row(RowState.REJECTED, b"same", b"rejected before")
FENCED = Row(RowState.FENCED)
REPORTED = Row(RowState.HEURISTIC, b"same", b"reported before")
RESOLVED = Row(RowState.DONE, None, b"resolved before")
"""Written by the participant's own resolver, which knows no request."""

FORWARD_VERBS = pytest.mark.parametrize("verb", [PREPARE, EXECUTE], ids=str)


def ask(
    verb: Verb,
    *,
    executed: bool = False,
    request: bytes | None = b"same",
    two_phase: bool = False,
) -> Question:
    """Make a question."""
    return Question(verb, request, executed, two_phase)


def say(verdict: Verdict) -> str:
    """Say a verdict in a few words."""
    match verdict:
        case Run():
            return "run"
        case Replay(reply=reply):
            return f"replay {reply.decode()}"
        case Answer(outcome=Rejected() | Broken() | Heuristic() as outcome, writes=writes):
            assert writes == ()
            return f"{type(outcome).__name__} {outcome.reason}"
        case Answer(outcome=outcome, writes=writes):
            written = " ".join(f"{write.verb}={write.state}" for write in writes)
            return f"{type(outcome).__name__} {written}".strip()


@pytest.mark.parametrize("verb", list(Verb), ids=str)
def test_a_call_of_a_step_that_is_held_is_to_be_asked_again(verb: Verb) -> None:
    """While another call of the step runs, or the lock is taken, every verb is in progress."""
    assert say(judge(ask(verb), None)) == "InProgress"


@FORWARD_VERBS
def test_the_first_call_runs(verb: Verb) -> None:
    """Without any row the handler is run."""
    assert say(judge(ask(verb), {})) == "run"


def test_execute_runs_after_a_vote() -> None:
    """A done Prepare row does not stand in Execute's way."""
    assert say(judge(ask(EXECUTE), {PREPARE: DONE})) == "run"


@FORWARD_VERBS
def test_a_finished_duplicate_gets_the_stored_reply(verb: Verb) -> None:
    """Done and rejected rows answer with what was answered before."""
    assert say(judge(ask(verb), {verb: DONE})) == "replay done before"
    assert say(judge(ask(verb), {verb: REJECTED})) == "replay rejected before"


def test_a_finished_compensation_gets_the_stored_reply() -> None:
    """A second Compensate is answered from its row, whatever the forward rows say."""
    for forward in (DONE, REJECTED, FENCED):
        rows = {COMPENSATE: DONE, EXECUTE: forward}
        assert say(judge(ask(COMPENSATE), rows)) == "replay done before"
    assert say(judge(ask(COMPENSATE, executed=True), {COMPENSATE: DONE})) == "replay done before"


@pytest.mark.parametrize("verb", list(Verb), ids=str)
def test_the_same_key_with_another_request_is_broken(verb: Verb) -> None:
    """A stored reply belongs to the request that it was made for."""
    rows = {verb: DONE}
    assert say(judge(ask(verb, request=b"other"), rows)) == "Broken request_changed"


def test_a_branch_is_rolled_back_for_whoever_asks() -> None:
    """After a restore the vote may be known to one and not to the other: there is one roll back."""
    other = dataclasses.replace(ask(COMPENSATE, request=b"other"), two_phase=True)
    assert say(judge(other, {COMPENSATE: DONE, PREPARE: DONE})) == "replay done before"
    assert (
        say(judge(dataclasses.replace(other, verb=EXECUTE), {EXECUTE: DONE}))
        == "Broken request_changed"
    )


@pytest.mark.parametrize("verb", [PREPARE, EXECUTE], ids=str)
def test_compensate_runs_once_if_a_forward_row_is_done(verb: Verb) -> None:
    """What took effect is undone: an execution, or a vote that was never committed."""
    assert say(judge(ask(COMPENSATE), {verb: DONE})) == "run"
    assert say(judge(ask(COMPENSATE, executed=True), {verb: DONE})) == "run"


def test_compensate_runs_if_the_vote_is_done_and_the_commit_was_refused() -> None:
    """A reservation that is held must be undone although Execute has no effect."""
    assert say(judge(ask(COMPENSATE), {PREPARE: DONE, EXECUTE: REJECTED})) == "run"


@pytest.mark.parametrize("executed", [True, False], ids=["executed", "perhaps"])
def test_compensate_of_a_refused_step_is_done_and_runs_nothing(executed: bool) -> None:  # noqa: FBT001
    """A refusal had no effect, so there is nothing to undo; the free places are fenced."""
    verdict = judge(ask(COMPENSATE, executed=executed), {EXECUTE: REJECTED})
    assert say(verdict) == "Done prepare=fenced compensate=done"
    verdict = judge(ask(COMPENSATE, executed=executed), {PREPARE: REJECTED})
    assert say(verdict) == "Done execute=fenced compensate=done"


def test_compensate_of_a_step_that_never_came_fences_it() -> None:
    """Nothing is run, and whatever comes late finds its place taken."""
    verdict = judge(ask(COMPENSATE), {})
    assert say(verdict) == "Done prepare=fenced execute=fenced compensate=done"


def test_compensate_of_an_executed_step_without_a_row_is_broken() -> None:
    """The runtime recorded Done and the row is gone: no silent Done, and no fence either."""
    assert say(judge(ask(COMPENSATE, executed=True), {})) == "Broken barrier_lost"


def test_compensate_finds_only_its_fence() -> None:
    """If a purge took Compensate's own row and left the fence, there is still nothing to undo."""
    assert say(judge(ask(COMPENSATE), {EXECUTE: FENCED, PREPARE: FENCED})) == "Done compensate=done"


@FORWARD_VERBS
def test_a_call_after_the_fence_is_refused(verb: Verb) -> None:
    """Fenced for its own row, for the other forward row, and for Compensate's row alone."""
    for rows in ({verb: FENCED}, {PREPARE: FENCED, EXECUTE: FENCED}, {COMPENSATE: DONE}):
        assert say(judge(ask(verb), rows)) == "Rejected fenced"


@FORWARD_VERBS
def test_a_done_step_that_was_compensated_is_fenced(verb: Verb) -> None:
    """A restored runtime that asks again must not hear Done of what has been undone."""
    assert say(judge(ask(verb), {verb: DONE, COMPENSATE: DONE})) == "Rejected fenced"


@FORWARD_VERBS
def test_a_refused_step_that_was_compensated_keeps_its_refusal(verb: Verb) -> None:
    """Its own refusal says more than the fence."""
    verdict = judge(ask(verb), {verb: REJECTED, COMPENSATE: DONE})
    assert say(verdict) == "replay rejected before"


@FORWARD_VERBS
def test_done_keeps_the_effect_and_writes_the_row(verb: Verb) -> None:
    """Effect and row are committed together."""
    settlement = settle(ask(verb), {}, Done())
    assert settlement == Settlement(keeps_effect=True, writes=(Write(verb, RowState.DONE),))


@FORWARD_VERBS
def test_a_refusal_drops_the_effect_and_writes_the_row(verb: Verb) -> None:
    """The refusal is remembered, what the handler wrote is not."""
    settlement = settle(ask(verb), {}, Rejected("card_declined"))
    assert settlement == Settlement(keeps_effect=False, writes=(Write(verb, RowState.REJECTED),))


@pytest.mark.parametrize("verb", list(Verb), ids=str)
def test_unfinished_and_broken_keep_nothing(verb: Verb) -> None:
    """Nothing is stored, so that the next attempt begins anew."""
    for outcome in (InProgress(1), Broken("ledger_lost")):
        settlement = settle(ask(verb), {EXECUTE: DONE}, outcome)
        assert settlement == Settlement(keeps_effect=False, writes=())


def test_a_compensation_writes_its_row_and_fences_the_free_places() -> None:
    """Execute's row stays as it is; Prepare's place is taken."""
    settlement = settle(ask(COMPENSATE), {EXECUTE: DONE}, Done())
    assert settlement.keeps_effect
    assert settlement.writes == (
        Write(PREPARE, RowState.FENCED),
        Write(COMPENSATE, RowState.DONE),
    )


def test_a_compensation_is_never_settled_as_refused() -> None:
    """The handler's layer turns such a refusal into an error; settling it is our bug."""
    with pytest.raises(AssertionError):
        settle(ask(COMPENSATE), {EXECUTE: DONE}, Rejected("no"))


# ------------------------------------------------------------------------- two-phase commits


def test_a_commit_runs_after_a_yes_vote() -> None:
    """Execute of a two-phase commit finds Prepare's row done."""
    assert say(judge(ask(EXECUTE, two_phase=True), {PREPARE: DONE})) == "run"


@pytest.mark.parametrize("rows", [{}, {PREPARE: REJECTED}], ids=["no vote", "voted no"])
def test_a_commit_without_a_yes_vote_is_broken(rows: dict[Verb, Row]) -> None:
    """A vote that is not there is not made up; the saga ends MIXED, and shows why."""
    assert say(judge(ask(EXECUTE, two_phase=True), rows)) == "Broken vote_lost"


def test_a_commit_after_a_rollback_is_fenced() -> None:
    """Whatever the vote was: the fence comes first."""
    for rows in ({PREPARE: DONE, EXECUTE: FENCED, COMPENSATE: DONE}, {PREPARE: FENCED}):
        assert say(judge(ask(EXECUTE, two_phase=True), rows)) == "Rejected fenced"


def test_a_repeated_commit_gets_the_stored_reply() -> None:
    """Also if a purge has taken the vote's row in between."""
    for rows in ({PREPARE: DONE, EXECUTE: DONE}, {EXECUTE: DONE}):
        assert say(judge(ask(EXECUTE, two_phase=True), rows)) == "replay done before"


def test_a_rollback_after_a_yes_vote_runs() -> None:
    """And without one it fences, as ever."""
    asked = ask(COMPENSATE, executed=True, two_phase=True)
    assert say(judge(asked, {PREPARE: DONE})) == "run"
    assert say(judge(ask(COMPENSATE, two_phase=True), {})) == (
        "Done prepare=fenced execute=fenced compensate=done"
    )
    assert say(judge(asked, {})) == "Broken vote_lost"


def test_what_is_held_stands_for_the_row_of_its_vote() -> None:
    """A reservation whose rows are gone is let go of; a life that has rows is judged by these."""
    for executed in (True, False):
        asked = ask(COMPENSATE, executed=executed, two_phase=True)
        assert has_no_rows(asked, {})
        assert not has_no_rows(asked, {EXECUTE: FENCED})
        assert say(judge(asked, held_rows())) == "run"
        settled = settle(asked, held_rows(), Done())
        assert settled.keeps_effect
        assert [(write.verb, write.state) for write in settled.writes] == [
            (EXECUTE, RowState.FENCED),
            (COMPENSATE, RowState.DONE),
        ]
    for verb in (PREPARE, EXECUTE):
        assert not has_no_rows(ask(verb, two_phase=True), {})


def test_a_rollback_of_what_was_committed_is_reported() -> None:
    """Only a restored runtime asks for it; nothing is run, and nothing is hidden."""
    rows = {PREPARE: DONE, EXECUTE: DONE}
    for executed in (True, False):
        asked = ask(COMPENSATE, executed=executed, two_phase=True)
        assert say(judge(asked, rows)) == "Heuristic committed"
    assert say(judge(ask(COMPENSATE), rows)) == "run", "in a saga that is an ordinary undo"


@pytest.mark.parametrize("verb", [EXECUTE, COMPENSATE], ids=str)
def test_what_the_resolver_has_settled_is_answered_from_its_row(verb: Verb) -> None:
    """Its row has no hash, and is true for the runtime's call, whatever that carries."""
    rows = {PREPARE: DONE, verb: RESOLVED}
    asked = ask(verb, executed=verb is COMPENSATE, two_phase=True)
    assert say(judge(asked, rows)) == "replay resolved before"


@pytest.mark.parametrize("verb", [EXECUTE, COMPENSATE], ids=str)
def test_what_the_runtime_has_settled_is_answered_to_the_resolver(verb: Verb) -> None:
    """A question without a hash takes the row that is there for its own."""
    rows = {PREPARE: DONE, verb: DONE}
    assert say(judge(ask(verb, request=None, two_phase=True), rows)) == "replay done before"


@pytest.mark.parametrize("verb", [EXECUTE, COMPENSATE], ids=str)
def test_a_report_keeps_nothing_of_the_handlers_and_is_stored(verb: Verb) -> None:
    """It tells what happened elsewhere; and asked again, it is the same."""
    rows = {PREPARE: DONE}
    settlement = settle(ask(verb, two_phase=True), rows, Heuristic(committed=False, reason="late"))
    assert not settlement.keeps_effect
    written = {write.verb: write.state for write in settlement.writes}
    fence = {EXECUTE: RowState.FENCED} if verb is COMPENSATE else {}
    assert written == {**fence, verb: RowState.HEURISTIC}
    assert say(judge(ask(verb, two_phase=True), {**rows, verb: REPORTED})) == (
        "replay reported before"
    )


def test_a_rollback_after_a_report_asks_the_author_again() -> None:
    """What was committed or rolled back alone only he knows."""
    rows = {PREPARE: DONE, EXECUTE: REPORTED}
    assert say(judge(ask(COMPENSATE, two_phase=True), rows)) == "run"


def test_a_commit_after_a_reported_rollback_is_fenced() -> None:
    """Its own report stays what it was, if it has one."""
    rows = {PREPARE: DONE, COMPENSATE: REPORTED, EXECUTE: FENCED}
    assert say(judge(ask(EXECUTE, two_phase=True), rows)) == "Rejected fenced"
    rows = {PREPARE: DONE, COMPENSATE: DONE, EXECUTE: REPORTED}
    assert say(judge(ask(EXECUTE, two_phase=True), rows)) == "replay reported before"


def test_nobody_reports_before_he_has_voted() -> None:
    """The handler's layer refuses that; settling it is our bug."""
    for asked in (ask(PREPARE), ask(EXECUTE)):
        with pytest.raises(AssertionError):
            settle(asked, {}, Heuristic(committed=True, reason="no"))


def test_the_request_hash_ignores_what_differs_between_attempts() -> None:
    """Attempt, poll, deadline, epoch and trace context may change under one key."""
    call = call_of()
    again = dataclasses.replace(
        call,
        attempt=7,
        poll=True,
        deadline_at_ms=99,
        epoch=3,
        traceparent="00-1-2-01",
        tracestate="a=b",
        oldest_open_at_ms=5,
    )
    assert request_hash(again) == request_hash(call)


def test_the_request_hash_covers_what_the_effect_may_depend_on() -> None:
    """Action, verb, input, results, own result: each makes another request."""
    call = call_of(COMPENSATE, results={"reserve": 1}, own_result={"id": 1})
    payload = Payload(b"x", "text/plain")
    said, changed = call.results["reserve"], Payload(b"other", "application/json")
    assert call.own_result is not None
    assert said.content_type == call.own_result.content_type == changed.content_type
    others = [
        dataclasses.replace(call, action="other"),
        dataclasses.replace(call, verb=EXECUTE),
        dataclasses.replace(call, input=b"other"),
        dataclasses.replace(call, content_type="text/plain"),
        dataclasses.replace(call, results={}),
        dataclasses.replace(call, results={"reserve": payload}),
        dataclasses.replace(call, results={"reserve": changed}),
        dataclasses.replace(call, results={"reserve": Payload(said.data, "text/plain")}),
        dataclasses.replace(call, results={"other": said}),
        dataclasses.replace(call, own_result=None),
        dataclasses.replace(call, own_result=payload),
        dataclasses.replace(call, own_result=changed),
        dataclasses.replace(call, own_result=Payload(call.own_result.data, "text/plain")),
    ]
    assert len({request_hash(other) for other in [call, *others]}) == len(others) + 1


def test_the_order_of_results_does_not_matter() -> None:
    """Results are a map; the runtime may send them in any order."""
    one = call_of(results={"a": 1, "b": 2})
    other = call_of(results={"b": 2, "a": 1})
    assert request_hash(one) == request_hash(other)


def test_parts_of_a_request_do_not_run_together() -> None:
    """Moving bytes from the content type to the input is another request."""
    call = call_of()
    one = dataclasses.replace(call, content_type="ab", input=b"c")
    other = dataclasses.replace(call, content_type="a", input=b"bc")
    assert request_hash(one) != request_hash(other)


def test_a_question_is_what_decides() -> None:
    """Verb, hash and whether Done was recorded."""
    call = call_of(COMPENSATE, executed=True)
    assert question_of(call) == Question(COMPENSATE, request_hash(call), executed=True)
    commit = dataclasses.replace(call_of(EXECUTE), two_phase=True)
    assert question_of(commit) == Question(EXECUTE, request_hash(commit), two_phase=True)
    resolved = dataclasses.replace(commit, from_resolver=True)
    assert question_of(resolved) == Question(EXECUTE, None, two_phase=True)
