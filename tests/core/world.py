"""A random, adversarial world around one saga: participants, a network, timers and a clock.

The world performs a decision's effects the way the engine and the lanes do, and then chooses what
happens next: it answers, keeps silent, repeats itself, loses its memory, wakes early. Every choice
comes from the function that it is given, so that hypothesis can shrink what it did.
"""

from __future__ import annotations

import msgspec

from amends_runtime.core.definition import Plan
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
    Broken,
    CancelSaga,
    Done,
    InProgress,
    Message,
    NotSent,
    Outcome,
    Rejected,
    RetrySaga,
    Revived,
    RuntimeRestarted,
    StartSaga,
    Unknown,
    Wake,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Record, SagaState, Verb
from amends_runtime.core.saga import Decision, Saga, fold
from amends_runtime.core.waking import rests_until_ms
from tests.core.definitions import Choose
from tests.core.rules import Ledger, decide_checked, observed_transitions, rule
from tests.core.two_phase_rules import Minutes, decide_votes

__all__ = ["START_MS", "Attempt", "World"]

START_MS = 1_000_000


class Attempt(msgspec.Struct):
    """An attempt that was handed to a lane. `sent_at_ms` of 0: it has not been sent yet."""

    step: int
    verb: Verb
    round: int
    attempt: int
    sent_at_ms: int = 0
    polls: int = 0
    poll_at_ms: int = 0
    withdrawn: bool = False

    def answered(self, outcome: Outcome, now_ms: int, *, probe: bool = False) -> Answered:
        """The message that tells of its end."""
        return Answered(
            step=self.step,
            verb=self.verb,
            round=self.round,
            attempt=self.attempt,
            sent_at_ms=self.sent_at_ms,
            answered_at_ms=now_ms,
            status=outcome.reason if isinstance(outcome, Unknown) else "OK",
            polls=self.polls,
            outcome=outcome,
            probe=probe and isinstance(outcome, Unknown) and not outcome.misconfigured,
        )


class World:
    """One saga in its world. Each message is decided, checked against all rules, and performed."""

    def __init__(self, plan: Plan, choose: Choose, deadline_ms: int = 0) -> None:
        self.plan = plan
        self.choose = choose
        self.now_ms = START_MS
        self.saga: Saga | None = None
        self.records: list[Record] = []
        self.ledger = Ledger(plan) if plan.two_phase is None else Minutes(plan)
        self.decide = decide_checked if plan.two_phase is None else decide_votes
        self.lane: list[Attempt] = []
        self.timers: list[int] = []
        self.echoes: list[Message] = []
        self.kindness = choose([1, 4, 16])  # how much likelier Done is than any other outcome
        self.impatient = choose([False, False, True])  # whether anybody cancels
        self.transitions: set[tuple[SagaState, SagaState]] = set()
        self.told: list[tuple[Message, Decision]] = []
        self.start = StartSaga(
            saga_id="s-1",
            content_hash="c",
            input=Payload(b"in"),
            deadline_at_ms=START_MS + deadline_ms if deadline_ms else 0,
        )
        self.tell(self.start)

    @property
    def state(self) -> SagaState:
        """The saga's state."""
        assert self.saga is not None
        return self.saga.state

    # -- what the runtime does ---------------------------------------------------------------------

    def tell(self, message: Message) -> Decision:
        """Give the saga a message; check the decision; perform its effects."""
        before = self.saga
        decision = self.decide(self.plan, before, message, self.now_ms)
        self.transitions |= observed_transitions(self.plan, before, decision.records)
        self.told.append((message, decision))
        self.ledger.follow(decision)
        self.records += decision.records
        self.saga = decision.saga
        rule(
            "a saga is the fold of its records",
            holds=fold(self.plan, self.records) == decision.saga,
        )
        for effect in decision.effects:
            self.perform(effect)
        return decision

    def perform(self, effect: Effect) -> None:
        """What a lane or the timers do about an effect."""
        if isinstance(effect, CallParticipant):
            attempt = Attempt(effect.step, effect.verb, effect.round, effect.attempt)
            self.lane.append(attempt)
        elif isinstance(effect, PollParticipant):
            for attempt in self.lane:
                if self._same(attempt, effect):
                    attempt.polls, attempt.poll_at_ms = effect.polls, effect.at_ms
        elif isinstance(effect, WithdrawCall):
            for attempt in self.lane:
                attempt.withdrawn |= self._same(attempt, effect)
        elif isinstance(effect, WakeAt):
            self.timers.append(effect.at_ms)

    @staticmethod
    def _same(attempt: Attempt, effect: PollParticipant | WithdrawCall) -> bool:
        key = (effect.step, effect.verb, effect.round, effect.attempt)
        return key == (attempt.step, attempt.verb, attempt.round, attempt.attempt)

    # -- what the world does -----------------------------------------------------------------------

    def answer(self, attempt: Attempt, outcome: Outcome) -> None:
        """The attempt ends, or is in progress, with this outcome."""
        probe = self.choose([False, False, True])
        message = attempt.answered(outcome, self.now_ms, probe=probe)
        self.echoes.append(message)
        if not isinstance(outcome, InProgress):
            self.lane.remove(attempt)
        self.tell(message)

    def pass_time(self, ms: int) -> None:
        """The clock goes on; nothing fires by itself."""
        self.now_ms += ms

    def wake(self) -> None:
        """The clock reaches the earliest timer and it fires; without one the wake is spurious."""
        if self.timers:
            self.timers.sort()
            self.now_ms = max(self.now_ms, self.timers.pop(0))
        self.tell(Wake())

    def withdraw(self, attempt: Attempt) -> None:
        """The lane takes an attempt back that it never sent."""
        self.lane.remove(attempt)
        self.tell(
            NotSent(
                step=attempt.step,
                verb=attempt.verb,
                round=attempt.round,
                attempt=attempt.attempt,
            )
        )

    def restart(self) -> None:
        """The runtime dies: calls and timers are gone, replies come too late or never."""
        for attempt in self.lane:
            if attempt.sent_at_ms:
                self.echoes.append(attempt.answered(Done(), self.now_ms))
        self.lane.clear()
        self.timers.clear()
        self.come_back()

    def come_back(self) -> None:
        """Another runtime has read the saga."""
        self.tell(RuntimeRestarted())

    def rests(self) -> bool:
        """Whether the saga may leave memory: what is open of it is to be asked again later."""
        assert self.saga is not None
        polled = [one.step for one in self.lane if one.poll_at_ms > self.now_ms]
        return len(polled) == len(self.lane) and rests_until_ms(self.saga, polled) > 0

    def rest(self) -> None:
        """The saga leaves memory, and comes back: its timers are gone, its polls are known."""
        self.timers.clear()
        polls = tuple(
            PollParticipant(
                step=one.step,
                verb=one.verb,
                round=one.round,
                attempt=one.attempt,
                at_ms=one.poll_at_ms,
                sent_at_ms=one.sent_at_ms,
                polls=one.polls,
            )
            for one in self.lane
        )
        self.tell(Revived(polls))

    def act(self, *, friendly: bool = False) -> None:
        """One thing happens, whatever is possible.

        A `friendly` world does nothing after which only an operator can help: nothing is broken,
        misconfigured, in progress for a day, or refused when it must succeed.
        """
        actions = ["pass time", "wake", "wake", "restart", "early wake", "start again"]
        actions += ["cancel"] * self.impatient
        actions += ["retry"] * (1 + 3 * (self.state is SagaState.STUCK))
        actions += ["abandon"] * (self.impatient and not friendly)
        actions += ["send", "not sent"] * any(not one.sent_at_ms for one in self.lane)
        actions += ["answer"] * 6 * bool(self.lane)
        actions += ["echo"] * bool(self.echoes)
        actions += ["rest"] * self.rests()
        self.happen(self.choose(actions), friendly=friendly)

    def happen(self, action: str, *, friendly: bool) -> None:
        """Let this happen."""
        if action == "pass time":
            self.pass_time(self.choose([1, 50, 700, 30_000] + [90_000_000] * (not friendly)))
        elif action == "wake":
            self.wake()
        elif action == "early wake":
            self.tell(Wake())
        elif action == "restart":
            self.restart()
        elif action == "rest":
            self.rest()
        elif action == "cancel":
            self.tell(CancelSaga(author="ann", reason="changed her mind"))
        elif action == "retry":
            step = self.choose([None, None, *range(len(self.plan.steps))])
            revived = self.choose([False] * 7 + [True])
            by = {"author": "ann", "reason": "mended", "request_id": self.choose(["", "1", "2"])}
            self.tell(RetrySaga(step=step, revived=revived, **by))
        elif action == "abandon":
            force = self.choose([False] * 7 + [True])
            self.tell(AbandonSaga(author="ann", reason="done by hand", force=force))
        elif action == "start again":
            self.tell(msgspec.structs.replace(self.start, content_hash=self.choose(["c", "d"])))
        elif action == "echo":
            self.tell(self.garbled(self.choose(self.echoes)))
        elif action == "send":
            self.choose([one for one in self.lane if not one.sent_at_ms]).sent_at_ms = self.now_ms
        elif action == "not sent":
            self.withdraw(self.choose([one for one in self.lane if not one.sent_at_ms]))
        else:
            attempt = self.choose(self.lane)
            attempt.sent_at_ms = attempt.sent_at_ms or self.now_ms
            self.answer(attempt, self.outcome(attempt, friendly=friendly))

    def garbled(self, echo: Message) -> Message:
        """An old answer again; perhaps saying something else. To an open attempt it is no echo."""
        if not isinstance(echo, Answered):
            return echo
        assert self.saga is not None
        step = self.saga.steps[echo.step]
        key = (step.verb, step.round, step.attempt)
        if step.open and key == (echo.verb, echo.round, echo.attempt):
            return Wake()
        other: Outcome = self.choose([echo.outcome, Done(), Rejected("LATE"), Broken("LATE")])
        return msgspec.structs.replace(echo, outcome=other)

    def outcome(self, attempt: Attempt, *, friendly: bool) -> Outcome:
        """What a participant could say, sensible or not."""
        outcomes: list[Outcome] = [
            *[Done(Payload(b"done"))] * self.kindness,
            Unknown("UNAVAILABLE"),
            InProgress(self.choose([-1, 0, 40, 10**12] if not friendly else [40])),
        ]
        if not friendly:
            outcomes += [
                Rejected("NO"),
                Broken("BARRIER_LOST"),
                Unknown("UNIMPLEMENTED", misconfigured=True),
            ]
        elif attempt.verb is Verb.EXECUTE and not self._must_succeed(attempt.step):
            outcomes.append(Rejected("NO"))
        return self.choose(outcomes)  # type: ignore[no-any-return]

    def _must_succeed(self, number: int) -> bool:
        assert self.saga is not None
        return self.saga.past_no_return and number != self.plan.pivot

    def calm_down(self, most: int = 1_000) -> None:
        """From now on everything is answered Done and every timer fires, until nothing is left."""
        for _ in range(most):
            if self.lane:
                attempt = self.lane[0]
                attempt.sent_at_ms = attempt.sent_at_ms or self.now_ms
                self.answer(attempt, self.calm_outcome(attempt))
            elif self.timers:
                self.wake()
            else:
                return
        rule("a world that answers comes to an end", holds=False)

    def calm_outcome(self, attempt: Attempt) -> Outcome:
        """What a participant that is well says."""
        return Done(Payload(b"done"))
