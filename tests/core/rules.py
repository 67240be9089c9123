"""What must hold of every decision, checked without trusting the code that decides.

`check_decision` looks at one call of `decide`. `Ledger` follows the records of one saga and keeps
its own account of what each step may have done in the world; it knows the definition's graph from
its `after` lists and not from the plan. Both raise `RuleBroken` with the rule in words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from copy import copy

import msgspec

from amends_runtime.core.definition import Kind, Plan
from amends_runtime.core.effects import (
    CallParticipant,
    Effect,
    PollParticipant,
    WakeAt,
    WithdrawCall,
)
from amends_runtime.core.messages import (
    AbandonSaga,
    Answered,
    InProgress,
    Message,
    Rejected,
    Revived,
    RuntimeRestarted,
    StartSaga,
)
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    OperatorActed,
    OperatorAction,
    Record,
    SagaEnded,
    SagaState,
    SagaTurnedBack,
    StepCompensated,
    StepExecuted,
    StepRejected,
    StepStuck,
    Verb,
)
from amends_runtime.core.saga import Decision, Phase, Saga, StepStatus, decide, evolve, owed

__all__ = ["Ledger", "RuleBroken", "check_decision", "decide_checked", "observed_transitions"]


class RuleBroken(AssertionError):
    """A rule does not hold."""


def rule(text: str, *, holds: bool) -> None:
    """Raise if it does not hold."""
    if not holds:
        raise RuleBroken(text)


def decide_checked(
    plan: Plan, saga: Saga | None, message: Message, now_ms: int, epoch: int = 1
) -> Decision:
    """Decide, and check everything that can be seen of one decision."""
    decision = decide(plan, saga, message, now_ms, epoch)
    check_decision(plan, saga, message, decision)
    again = decide(plan, saga, message, now_ms, epoch)
    rule("the same state and message give the same decision", holds=again == decision)
    return decision


# -- one decision ----------------------------------------------------------------------------------


def check_decision(plan: Plan, before: Saga | None, message: Message, decision: Decision) -> None:
    """Check one decision by itself. `before` is the state that it was taken in."""
    after = decision.saga
    state = before
    for record in decision.records:
        state = evolve(plan, state, record)
    rule("decide and evolve come to the same state", holds=state == after)
    _check_effects(plan, before, message, decision)
    _check_turning(plan, before, message, decision)
    if before is not None and before.ended:
        rule("terminal stays terminal", holds=not decision.records and not decision.effects)
    rule("something will wake it, or it says that it is stuck", holds=_is_awake(plan, after))


def _is_awake(plan: Plan, saga: Saga) -> bool:
    if saga.ended or saga.state is SagaState.STUCK:
        return True
    if saga.phase is Phase.FORWARD and any(step.status is StepStatus.STUCK for step in saga.steps):
        return any(step.open or step.retry_at_ms for step in saga.steps)
    return any(step.open or step.retry_at_ms for step in saga.steps) and bool(owed(plan, saga))


def _check_effects(plan: Plan, before: Saga | None, message: Message, decision: Decision) -> None:
    after = decision.saga
    polls = [effect for effect in decision.effects if isinstance(effect, PollParticipant)]
    if isinstance(message, Revived):
        same = Counter(polls) == Counter(message.polls)
        rule("a saga that comes back asks again what it asked", holds=same)
    else:
        rule(
            "a poll follows InProgress and nothing else",
            holds=len(polls)
            <= (isinstance(message, Answered) and isinstance(message.outcome, InProgress)),
        )
    others = [effect for effect in decision.effects if not isinstance(effect, PollParticipant)]
    expected = Counter(owed(plan, after))
    if before is not None and not isinstance(message, RuntimeRestarted):
        expected -= Counter(owed(plan, before))
    if isinstance(message, Revived):
        # What it waited for is waited for again, but for what is due.
        assert before is not None
        expected += Counter(
            effect
            for effect in others
            if isinstance(effect, WakeAt) and effect in owed(plan, before)
        )
    if isinstance(message, AbandonSaga) and decision.records:
        assert before is not None
        expected = Counter(_withdrawals(before))
    if Counter(others) != expected:  # asked first: to write all of them down takes longest
        instead = f"{others} instead of {list(expected.elements())}"
        rule(f"effects are what is owed and was not: {instead}", holds=False)
    for effect in decision.effects:
        if isinstance(effect, CallParticipant | PollParticipant):
            rule("an effect speaks of the open attempt", holds=_is_open(after, effect))


def _withdrawals(saga: Saga) -> list[Effect]:
    """What is taken back of a saga that is abandoned."""
    return [
        WithdrawCall(number, step.verb, step.round, step.attempt)
        for number, step in enumerate(saga.steps)
        if step.open
    ]


def _is_open(saga: Saga, effect: CallParticipant | PollParticipant) -> bool:
    step = saga.steps[effect.step]
    key = (step.verb, step.round, step.attempt)
    return step.open and key == (effect.verb, effect.round, effect.attempt)


def _check_turning(plan: Plan, before: Saga | None, message: Message, decision: Decision) -> None:
    backward = before is not None and before.phase is not Phase.FORWARD
    for record in decision.records:
        if isinstance(record, AttemptStarted) and record.verb is Verb.EXECUTE:
            rule("no forward attempt after turning back", holds=not backward)
        if isinstance(record, SagaTurnedBack):
            if before is not None and before.past_no_return:
                rule(
                    "past the point of no return only the pivot's rejection turns back",
                    holds=isinstance(message, Answered)
                    and message.step == plan.pivot
                    and isinstance(message.outcome, Rejected),
                )
            backward = True
    if before is None or isinstance(message, StartSaga):
        return
    rule(
        "no way back to forward",
        holds=before.phase is Phase.FORWARD or decision.saga.phase is not Phase.FORWARD,
    )


def observed_transitions(
    plan: Plan, before: Saga | None, records: Iterable[Record]
) -> set[tuple[SagaState, SagaState]]:
    """The changes of the saga's state, record by record."""
    found = set()
    for record in records:
        after = evolve(plan, before, record)
        if before is not None and before.state is not after.state:
            found.add((before.state, after.state))
        before = after
    return found


# -- one history -----------------------------------------------------------------------------------


class Account(msgspec.Struct):
    """What the ledger knows of one step."""

    open: tuple[Verb, int, int] | None = None
    may_have_run: bool = False
    compensated: bool = False
    executed: bool = False
    stuck: Verb | None = None
    refused: bool = False
    round: int = 1
    running_until_ms: int = 0
    not_before_ms: int = 0


class Ledger:
    """Follows one saga's records and effects, and keeps its own account of each step."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.accounts = [Account() for _ in plan.steps]
        self.highest: dict[tuple[int, Verb, int], int] = {}
        self.started: set[tuple[int, Verb, int, int]] = set()
        self.descendants = _descendants(plan)

    def copy(self) -> Ledger:
        """An independent copy, for a history that branches."""
        other = Ledger.__new__(Ledger)
        other.plan = self.plan
        other.accounts = [copy(account) for account in self.accounts]
        other.highest = dict(self.highest)
        other.started = set(self.started)
        other.descendants = self.descendants
        return other

    def follow(self, decision: Decision) -> None:
        """Check and take in the records, then the effects, of one decision."""
        for record in decision.records:
            self.take(record)
        for effect in decision.effects:
            self.see(effect)

    def see(self, effect: Effect) -> None:
        """Check an effect against the records so far."""
        if isinstance(effect, CallParticipant):
            key = (effect.step, effect.verb, effect.round, effect.attempt)
            rule("no call without its AttemptStarted", holds=key in self.started)

    def take(self, record: Record) -> None:
        """Check one record against those before it."""
        if isinstance(record, AttemptStarted):
            self._started(record)
        elif isinstance(record, SagaTurnedBack):
            for account in self.accounts:
                account.not_before_ms = 0  # what follows is no retry
        elif isinstance(record, SagaEnded):
            self._ended(record)
        elif isinstance(
            record,
            StepExecuted
            | StepRejected
            | StepCompensated
            | AttemptFailed
            | AttemptLost
            | AttemptWithdrawn,
        ):
            self._closed(record)
        elif isinstance(record, StepStuck):
            account = self.accounts[record.step]
            rule("a step with an attempt under way is not stuck", holds=account.open is None)
            account.stuck = record.verb
        elif isinstance(record, OperatorActed) and record.action is OperatorAction.RETRY:
            self._retried(record)

    def _retried(self, record: OperatorActed) -> None:
        if record.step is None:
            return
        account = self.accounts[record.step]
        waits = account.open is None and not account.compensated
        rule("only a step that is stuck or waits is retried", holds=waits)
        anew = account.refused and account.stuck is Verb.EXECUTE
        rule(
            "a new round follows a refusal, and nothing else",
            holds=record.round == account.round + anew,
        )
        account.round = record.round
        account.stuck = None
        account.refused = account.refused and not anew
        account.not_before_ms = 0

    def _started(self, record: AttemptStarted) -> None:
        account = self.accounts[record.step]
        rule("a step has one attempt open at a time", holds=account.open is None)
        rule("an attempt is of its step's round", holds=record.round == account.round)
        executing = record.verb is Verb.EXECUTE
        rule("a refused round is not asked again", holds=not (executing and account.refused))
        rule("a stuck step is left alone", holds=not executing or account.stuck is None)
        rule("a retry is not early", holds=record.at_ms >= account.not_before_ms)
        account.not_before_ms = 0
        account.open = (record.verb, record.round, record.attempt)
        series = (record.step, record.verb, record.round)
        rule("attempt numbers grow", holds=record.attempt > self.highest.get(series, 0))
        self.highest[series] = record.attempt
        self.started.add((*series, record.attempt))
        if record.verb is Verb.EXECUTE:
            for other in self.plan.waits_for[record.step]:
                rule("a step waits for those before it", holds=self.accounts[other].executed)
        else:
            self._compensation_started(record, account)

    def _compensation_started(self, record: AttemptStarted, account: Account) -> None:
        rule("only what may have run is compensated", holds=account.may_have_run)
        kind = self.plan.steps[record.step].kind
        rule("only compensatable steps are compensated", holds=kind is Kind.COMPENSATABLE)
        rule("what is compensated is left alone", holds=not account.compensated)
        rule(
            "a step is not compensated while a lost attempt of its own may still be running",
            holds=record.at_ms >= account.running_until_ms,
        )
        for other in self.descendants[record.step]:
            rule(
                "compensation in reverse dependency order: nothing after it is open or owes",
                holds=self.accounts[other].open is None and not self._owes(other),
            )

    def _closed(
        self,
        record: StepExecuted
        | StepRejected
        | StepCompensated
        | AttemptFailed
        | AttemptLost
        | AttemptWithdrawn,
    ) -> None:
        account = self.accounts[record.step]
        rule("what ends was open", holds=account.open is not None)
        assert account.open is not None
        verb, round_, attempt = account.open
        rule(
            "what ends is what was open", holds=(record.round, record.attempt) == (round_, attempt)
        )
        account.open = None
        if isinstance(record, AttemptFailed):
            account.not_before_ms = record.retry_at_ms
        if verb is Verb.COMPENSATE:
            account.compensated = isinstance(record, StepCompensated)
        elif isinstance(record, StepExecuted):
            account.executed = account.may_have_run = True
            account.running_until_ms = 0
        elif isinstance(record, StepRejected):
            account.running_until_ms = 0
            account.refused = True
        elif isinstance(record, AttemptFailed):
            account.may_have_run = True
        elif isinstance(record, AttemptLost):
            account.may_have_run = True
            timeout_ms = self.plan.steps[record.step].timeout_ms
            account.running_until_ms = max(account.running_until_ms, record.at_ms + timeout_ms)

    def _ended(self, record: SagaEnded) -> None:
        if record.state is SagaState.ABANDONED:
            return  # as it is: that is the meaning of it
        none_open = all(account.open is None for account in self.accounts)
        rule("nothing is under way at the end", holds=none_open)
        if record.state is SagaState.COMPLETED:
            done = all(account.executed for account in self.accounts)
            rule("COMPLETED: every step is executed", holds=done)
            undone = any(account.compensated for account in self.accounts)
            rule("COMPLETED: no step is compensated", holds=not undone)
        else:
            rule(
                "COMPENSATED: everything compensatable that may have run is compensated",
                holds=not any(self._owes(number) for number in range(len(self.accounts))),
            )

    def _owes(self, number: int) -> bool:
        account = self.accounts[number]
        kind = self.plan.steps[number].kind
        return kind is Kind.COMPENSATABLE and account.may_have_run and not account.compensated


def _descendants(plan: Plan) -> list[set[int]]:
    """All steps that wait for each step, worked out from the definition's own words."""
    steps = plan.definition.steps
    names = [step.name for step in steps]
    below: list[set[int]] = [set() for _ in steps]
    for number, step in enumerate(steps):
        for name in step.after or ():
            below[names.index(name)].add(number)
        if step.kind is Kind.RETRIABLE and all(other.kind is not Kind.PIVOT for other in steps):
            for other, before in enumerate(steps):
                if before.kind is Kind.COMPENSATABLE:
                    below[other].add(number)
    for _ in steps:
        for found in below:
            found.update(*(below[other] for other in list(found)))
    return below
