"""What must hold of every decision of a two-phase commit, checked without trusting its code.

The twin of `rules.py`: `check_votes` looks at one call of `decide`, and `Minutes` follow the
records of one history and keep their own account of who voted what and who was told what.
"""

from __future__ import annotations

from copy import copy

import msgspec

from amends_runtime.core.definition import Plan
from amends_runtime.core.effects import (
    CallParticipant,
    Effect,
    PollNow,
    PollParticipant,
    WakeAt,
)
from amends_runtime.core.messages import (
    Answered,
    InProgress,
    Message,
    RetrySaga,
    Revived,
    RuntimeRestarted,
    Wake,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    CancelRequested,
    CommitDecision,
    DecisionMade,
    HeuristicReported,
    OperatorActed,
    OperatorAction,
    Record,
    RoundPlanned,
    SagaEnded,
    SagaStarted,
    SagaState,
    StepCompensated,
    StepExecuted,
    StepGivenUp,
    StepPrepared,
    StepStuck,
    TurnCause,
    Verb,
    VoteRefused,
)
from amends_runtime.core.saga import Decision, Saga, decide, evolve, owed
from amends_runtime.core.two_phase import LOCKED, decision_of
from amends_runtime.core.waking import kept_wake_ms, rests_until_ms
from tests.core.rules import rule

__all__ = ["Minutes", "check_votes", "decide_votes"]

COMMIT, ABORT = CommitDecision.COMMIT, CommitDecision.ABORT


def decide_votes(
    plan: Plan, saga: Saga | None, message: Message, now_ms: int, epoch: int = 1
) -> Decision:
    """Decide, and check everything that can be seen of one decision."""
    decision = decide(plan, saga, message, now_ms, epoch)
    check_votes(plan, saga, message, decision)
    again = decide(plan, saga, message, now_ms, epoch)
    rule("the same state and message give the same decision", holds=again == decision)
    if isinstance(message, Wake):
        now_ms = max(now_ms, message.due_at_ms)
        overdue = [one for one in decision.saga.steps if 0 < one.mark_at_ms <= now_ms]
        rule("what is overdue is marked", holds=not overdue)
    return decision


# -- one decision ----------------------------------------------------------------------------------


def check_votes(plan: Plan, before: Saga | None, message: Message, decision: Decision) -> None:
    """Check one decision by itself. `before` is the state that it was taken in."""
    after = decision.saga
    state = before
    for record in decision.records:
        state = evolve(plan, state, record)
    rule("decide and evolve come to the same state", holds=state == after)
    if before is not None and before.ended:
        rule("terminal stays terminal", holds=not decision.records and not decision.effects)
    _check_effects(plan, before, message, decision)
    _check_answers_to_participants(before, after)
    _check_rest(plan, after)


def _check_effects(plan: Plan, before: Saga | None, message: Message, decision: Decision) -> None:
    polls = {one for one in decision.effects if isinstance(one, PollParticipant)}
    if isinstance(message, Revived):
        rule("what comes back asks again what it asked", holds=polls == {*message.polls})
    else:
        asked = isinstance(message, Answered) and isinstance(message.outcome, InProgress)
        rule("a poll follows InProgress and nothing else", holds=len(polls) <= asked)
    at_once = {one for one in decision.effects if isinstance(one, PollNow)}
    rule("only a retry asks at once", holds=not at_once or isinstance(message, RetrySaga))
    new = {one for one in decision.effects if one not in polls | at_once}
    wanted = set(owed(plan, decision.saga))
    known: set[Effect] = set()
    if before is not None and not isinstance(message, RuntimeRestarted):
        known = set(owed(plan, before))
    if isinstance(message, Revived):
        # What was waited for is waited for again, if it is not due.
        known = {one for one in known if not isinstance(one, WakeAt)}
        wanted |= {one for one in new if isinstance(one, WakeAt)}
    if new != wanted - known:  # asked first: to write all of them down takes longest
        rule(f"effects are what is owed and was not: {new}", holds=False)
    for effect in decision.effects:
        if isinstance(effect, CallParticipant | PollParticipant | PollNow):
            step = decision.saga.steps[effect.step]
            key = (step.verb, step.round, step.attempt)
            rule(
                "an effect speaks of the open attempt",
                holds=step.open and key == (effect.verb, effect.round, effect.attempt),
            )


def _check_answers_to_participants(before: Saga | None, after: Saga) -> None:
    """What GetDecision has said once stands."""
    later = _said(after, after.round + 1)
    rule("a round that has not begun is not known", holds=after.ended or later == "UNKNOWN")
    unseen = after.history_lost and after.end is SagaState.MIXED
    none = "UNKNOWN" if unseen else "ABORT"
    rule("a round that never comes is none", holds=not after.ended or later == none)
    for round_ in range(1, before.round + 1 if before is not None else 1):
        assert before is not None
        said = _said(before, round_)
        rule("a decision stands", holds=said in {"PENDING", _said(after, round_)})


def _said(saga: Saga, round_: int) -> str:
    return decision_of(saga, round_).name


def _check_rest(plan: Plan, saga: Saga) -> None:
    """Something will wake it, and it rests until then, if it has no attempt under way."""
    if saga.ended:
        rule("what has ended owes nothing", holds=not owed(plan, saga))
        return
    under_way = any(step.open for step in saga.steps)
    wakes = [effect.at_ms for effect in owed(plan, saga) if isinstance(effect, WakeAt)]
    if under_way:
        rule("it does not rest with an attempt under way", holds=not rests_until_ms(saga))
        rule("nor is that in its row", holds=not kept_wake_ms(saga))
    else:
        rule("something will wake it", holds=bool(wakes))
        rule("it rests until then", holds=rests_until_ms(saga) == min(wakes))
        rule("and no longer", holds=kept_wake_ms(saga) <= min(wakes))


# -- one history -----------------------------------------------------------------------------------


class Branch(msgspec.Struct):
    """What the minutes say of one branch, in the running round."""

    open: tuple[Verb, int, int] | None = None
    yes: bool = False
    refusal: str = ""
    may_hold: bool = False
    acknowledged: bool = False
    broken: bool = False
    marked: bool = False
    not_before_ms: int = 0
    told_since_ms: int = 0  # since the decision or the last retry
    misconfigured: int = 0


class Minutes:
    """Follow one history's records and effects, and keep their own account of each branch."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.branches = [Branch() for _ in plan.steps]
        self.round = 1
        self.decisions: dict[int, CommitDecision] = {}
        self.refused = False  # by a vote, and by nothing else
        self.stopped = False  # somebody cancelled or abandoned it
        self.lost = False  # another history may have gone on with it
        self.fencing = False  # this round is one that only that history may have had
        self.deadline_at_ms = 0
        self.highest: dict[tuple[int, Verb, int], int] = {}
        self.started: set[tuple[int, Verb, int, int]] = set()
        self.requests: dict[tuple[int, Verb, int], list[Payload | None]] = {}

    def copy(self) -> Minutes:
        """An independent copy, for a history that branches."""
        other = copy(self)
        other.branches = [copy(branch) for branch in self.branches]
        other.decisions = dict(self.decisions)
        other.highest = dict(self.highest)
        other.started = set(self.started)
        other.requests = dict(self.requests)
        return other

    def follow(self, decision: Decision) -> None:
        """Check and take in the records, then the effects, of one decision."""
        for record in decision.records:
            self.take(record)
        for effect in decision.effects:
            if isinstance(effect, CallParticipant):
                self._called(effect)
            if isinstance(effect, CallParticipant | PollParticipant):
                self._handed(decision.saga, effect)

    @property
    def decision(self) -> CommitDecision | None:
        """The running round's."""
        return self.decisions.get(self.round)

    def _called(self, effect: CallParticipant) -> None:
        key = (effect.step, effect.verb, effect.round, effect.attempt)
        rule("no call without its AttemptStarted", holds=key in self.started)
        if effect.verb is not Verb.PREPARE:
            wanted = COMMIT if effect.verb is Verb.EXECUTE else ABORT
            rule("nobody is told what is not decided", holds=self.decisions[effect.round] is wanted)

    def _handed(self, saga: Saga, effect: CallParticipant | PollParticipant) -> None:
        handed = [saga.handed(other) for other in self.plan.uses[effect.step]]
        if effect.verb is Verb.COMPENSATE:
            handed.append(saga.handed(effect.step))
        before = self.requests.setdefault((effect.step, effect.verb, effect.round), handed)
        rule("calls under one key hand over the same", holds=handed == before)

    def take(self, record: Record) -> None:
        """Check one record against those before it."""
        if isinstance(record, SagaStarted):
            self.deadline_at_ms = record.deadline_at_ms
        elif isinstance(record, AttemptStarted):
            self._started(record)
        elif isinstance(record, DecisionMade):
            self._decided(record)
        elif isinstance(record, RoundPlanned):
            self._planned(record)
        elif isinstance(record, SagaEnded):
            self._ended(record)
        elif isinstance(record, CancelRequested):
            self.stopped = True
        elif isinstance(record, OperatorActed):
            self._operated(record)
        elif isinstance(record, StepStuck):
            branch = self.branches[record.step]
            rule("only the second phase is marked", holds=record.verb is not Verb.PREPARE)
            rule("it is marked once", holds=not branch.marked)
            branch.marked = True
            policy = self.plan.steps[record.step].retry
            if record.verb is Verb.COMPENSATE:
                policy = self.plan.steps[record.step].compensation_retry
            assert policy is not None
            is_time = record.at_ms >= branch.told_since_ms + policy.give_up_after_ms
            rule("a mark has its reason", holds=is_time or branch.misconfigured >= 3)
        elif isinstance(record, StepGivenUp):
            rule("only a vote is given up", holds=self.decision is None)
        else:
            self._closed(record)  # type: ignore[arg-type] # a record that it does not know fails

    def _started(self, record: AttemptStarted) -> None:
        branch = self.branches[record.step]
        rule("a branch has one attempt open at a time", holds=branch.open is None)
        rule("an attempt is of the running round", holds=record.round == self.round)
        rule("a retry is not early", holds=record.at_ms >= branch.not_before_ms)
        branch.not_before_ms = 0
        series = (record.step, record.verb, record.round)
        rule("attempt numbers grow", holds=record.attempt > self.highest.get(series, 0))
        self.highest[series] = record.attempt
        self.started.add((*series, record.attempt))
        branch.open = (record.verb, record.round, record.attempt)
        branch.told_since_ms = branch.told_since_ms or record.at_ms
        if record.verb is Verb.PREPARE:
            rule("no vote is asked for after the decision", holds=self.decision is None)
            rule("a vote is given once", holds=not branch.yes and not branch.refusal)
            rule("nobody votes in a round that is only fenced", holds=not self.fencing)
            settings = self.plan.definition.two_phase
            assert settings is not None
            if settings.ordered:
                before = self.branches[: record.step]
                rule("one after the other", holds=all(one.yes for one in before))
            return
        wanted = COMMIT if record.verb is Verb.EXECUTE else ABORT
        rule("nobody is told but what was decided", holds=self.decision is wanted)
        rule("who has acknowledged is left alone", holds=not branch.acknowledged)
        rule("a broken promise is not asked for again", holds=not branch.broken)
        rule("only what may hold something is told", holds=branch.may_hold)

    def _decided(self, record: DecisionMade) -> None:
        rule("a decision is of the running round", holds=record.round == self.round)
        rule("one decision in a round", holds=self.decision is None)
        if record.decision is COMMIT:
            rule("COMMIT: all have voted yes", holds=all(one.yes for one in self.branches))
            in_time = not 0 < self.deadline_at_ms <= record.at_ms
            rule("COMMIT: within the prepare deadline", holds=in_time)
            rule("COMMIT: nobody has cancelled it", holds=not self.stopped)
        else:
            rule("a decision is COMMIT or ABORT", holds=record.decision is ABORT)
            self.refused = record.cause is TurnCause.REJECTED
        self.decisions[record.round] = record.decision
        for branch in self.branches:
            branch.not_before_ms = branch.told_since_ms = branch.misconfigured = 0

    def _closed(
        self,
        record: StepPrepared
        | VoteRefused
        | StepExecuted
        | StepCompensated
        | HeuristicReported
        | AttemptFailed
        | AttemptLost
        | AttemptWithdrawn,
    ) -> None:
        branch = self.branches[record.step]
        key = (record.verb, record.round, record.attempt)
        rule("what ends is what was open", holds=branch.open == key)
        branch.open = None
        voting = record.verb is Verb.PREPARE
        if isinstance(record, StepPrepared):
            branch.yes = branch.may_hold = True
        elif isinstance(record, VoteRefused):
            branch.refusal = record.failure.reason
        elif isinstance(record, StepExecuted | StepCompensated):
            branch.acknowledged, branch.marked = True, False
        elif isinstance(record, HeuristicReported):
            rule("nobody decides alone before the decision", holds=not voting)
            agrees = record.committed is (self.decision is COMMIT)
            branch.acknowledged, branch.broken = agrees, not agrees
            branch.marked = False
        elif isinstance(record, AttemptFailed):
            branch.not_before_ms = record.retry_at_ms
            branch.misconfigured = branch.misconfigured + 1 if record.misconfigured else 0
            branch.may_hold = branch.may_hold or voting
            rule("the second phase gives up nothing", holds=voting or record.retry_at_ms > 0)
        elif isinstance(record, AttemptLost):
            branch.may_hold = branch.may_hold or voting

    def _operated(self, record: OperatorActed) -> None:
        if record.action is OperatorAction.CONFIRM_RESTORE:
            rule("a restore is confirmed once", holds=not self.lost)
            self.lost = True
            for branch in self.branches:
                branch.may_hold = branch.may_hold or not branch.refusal
        elif record.action is OperatorAction.ABANDON:
            rule("what is committed is not abandoned", holds=self.decision is not COMMIT)
            self.stopped = True
        elif record.step is not None:
            branch = self.branches[record.step]
            left = not branch.acknowledged and not branch.broken
            asked = branch.open is not None and branch.open[0] is Verb.PREPARE
            rule("only what waits or is told is retried", holds=left and not asked)
            branch.marked, branch.not_before_ms, branch.misconfigured = False, 0, 0
            branch.told_since_ms = 0 if branch.open is None else record.at_ms

    def _planned(self, record: RoundPlanned) -> None:
        settings = self.plan.definition.two_phase
        assert settings is not None
        rule("a round follows an ABORT", holds=self.decision is ABORT)
        self._nothing_is_left()
        refusals = {branch.refusal for branch in self.branches} - {""}
        in_time = not 0 < self.deadline_at_ms <= record.starts_at_ms
        tried_again = self.refused and refusals == {LOCKED} and not self.stopped and in_time
        rule("a round follows LOCKED and nothing else, in time", holds=tried_again or self.lost)
        self.fencing = not tried_again
        rule("nobody broke a promise", holds=not any(one.broken for one in self.branches))
        rule("one round after the other", holds=record.round == self.round + 1)
        rule("not more than are allowed", holds=self.round <= settings.locked_retries)
        self.round = record.round
        self.branches = [Branch(may_hold=self.lost) for _ in self.branches]
        for branch in self.branches[: 1 if settings.ordered else None]:
            branch.not_before_ms = record.starts_at_ms

    def _nothing_is_left(self) -> None:
        for branch in self.branches:
            settled = branch.acknowledged or branch.broken or not branch.may_hold
            rule("nothing is under way at the end", holds=branch.open is None)
            rule("nothing may be held at the end", holds=settled)

    def _ended(self, record: SagaEnded) -> None:
        self._nothing_is_left()
        broken = any(branch.broken for branch in self.branches)
        end = SagaState.COMPLETED if self.decision is COMMIT else SagaState.COMPENSATED
        rule("what was decided is the end", holds=self.decision is not None)
        rule("a broken promise shows", holds=record.state is (SagaState.MIXED if broken else end))
