"""Transcripts: a saga's life as a page that people read and the core plays.

A transcript is a text file:

    One paragraph that says what the reader is about to see.

    definition
      reserve: inventory.reserve
      charge: payments.charge timeout=5s give-up=1m
      ship: shipping.ship PIVOT

    # Why the next thing happens, where that is not plain.
    > at 20ms answered reserve#1 Done
      StepExecuted reserve#1
      AttemptStarted charge#1
      call charge#1
      state RUNNING: reserve EXECUTED, charge EXECUTING, ship PENDING

A line that begins with `>` is a message. Under it stands what the core made of it: the records in
CamelCase, the effects in lower case, the sender's answer if there is one, and the state. All times
are counted from the saga's start; `charge#2` is the second attempt of the step `charge`, and
`charge#2/1` the first of its second round.

A step may name its kind (COMPENSATABLE where none is named), `after=a,b` (`after=-`: nothing),
`timeout=`, `give-up=` and `compensation-give-up=`. A definition of a two-phase commit begins with
`TWO_PHASE_COMMIT [ordered] [locked-retries=N]`; then the state says what GetDecision would, too.
The messages are:

    start [deadline T]                      start again [with other content]
    answered [VERB] STEP#N OUTCOME          not sent [VERB] STEP#N [REASON]
    wake [due T]      restarted [after a restore]   revived      cancel AUTHOR: REASON
    retry [STEP ]AUTHOR: REASON [(REQUEST)] abandon [by force ]AUTHOR: REASON

where VERB is `prepare` or `compensate`, and OUTCOME is `Done [SIZE bytes]`, `Rejected REASON`,
`InProgress poll after T`, `Broken REASON`, `Heuristic (committed | rolled-back) REASON` or
`Unknown REASON [misconfigured | probe]`, each followed by `sent at T` if the call waited in its
lane.
Every message may be preceded by `at T`; when a file is updated, `at ?` becomes the next due time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

import msgspec

from amends_runtime.core.definition import (
    Definition,
    Kind,
    Mode,
    Plan,
    RetryPolicy,
    Step,
    TwoPhase,
    violations,
)
from amends_runtime.core.effects import (
    CallParticipant,
    Effect,
    PollNow,
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
    Heuristic,
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
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    CancelRequested,
    DecisionMade,
    HeuristicReported,
    OperatorActed,
    Record,
    RoundPlanned,
    SagaEnded,
    SagaStarted,
    SagaTurnedBack,
    StepCompensated,
    StepExecuted,
    StepGivenUp,
    StepPrepared,
    StepRejected,
    StepStuck,
    Verb,
    VoteRefused,
)
from amends_runtime.core.saga import Decision, Saga
from amends_runtime.core.two_phase import decision_of
from tests.core.rules import Ledger, decide_checked
from tests.core.two_phase_rules import Minutes, decide_votes

__all__ = ["play"]

START_MS = 1_000_000_000


def play(text: str) -> str:
    """Play the messages of a transcript and return it as it should read.

    Raises ValueError, with the line's number, for a line that cannot be understood, and RuleBroken
    if the core breaks a rule on the way.
    """
    head, _, rest = text.partition("\ndefinition\n")
    if not head.strip() or not rest:
        raise ValueError("a transcript begins with a paragraph, then `definition` and its steps")
    steps: list[Step] = []
    two_phase: TwoPhase | None = None
    comments: list[str] = []
    player: Player | None = None
    out = [head.rstrip(), "", "definition"]
    first_line = head.count("\n") + 3
    for number, line in enumerate(rest.splitlines(), first_line):
        try:
            if line.startswith("#"):
                comments.append(line)
            elif line.startswith(">"):
                player = player or Player(_plan(steps, two_phase))
                out += ["", *comments, *player.play(line)]
                comments = []
            elif player is None and line.startswith("  TWO_PHASE_COMMIT"):
                two_phase = _two_phase(line.split()[1:])
                out.append(line.rstrip())
            elif player is None and line.strip():
                steps.append(_step(line))
                out.append(line.rstrip())
        except (KeyError, StopIteration, ValueError) as error:
            raise ValueError(f"line {number}: {line!r}: {error}") from error
    if player is None:
        raise ValueError("there is no message: lines that begin with `>`")
    return "\n".join([*out, *([""] * bool(comments)), *comments, ""])


# -- the definition --------------------------------------------------------------------------------


def _step(line: str) -> Step:
    found = re.fullmatch(r"  ([a-z-]+): +([a-z]+)\.([a-z_]+)((?: +\S+)*)", line)
    if found is None:
        raise ValueError("a step reads `  name: participant.action OPTION ...`")
    name, participant, action, options = found.groups()
    fields: dict[str, object] = {}
    for option in options.split():
        key, _, value = option.partition("=")
        if key in Kind.__members__:
            fields["kind"] = Kind[key]
        elif key == "after":
            fields["after"] = () if value == "-" else tuple(value.split(","))
        elif key == "timeout":
            fields["timeout_ms"] = _ms(value)
        elif key in {"give-up", "compensation-give-up"}:
            field = "retry" if key == "give-up" else "compensation_retry"
            fields[field] = RetryPolicy(give_up_after_ms=_ms(value))
        else:
            raise ValueError(f"{option!r} is no option of a step")
    step = Step(name=name, participant=participant, action=action)
    return msgspec.structs.replace(step, **fields)


def _two_phase(options: list[str]) -> TwoPhase:
    ordered, retries = False, 0
    for option in options:
        key, _, value = option.partition("=")
        if key == "ordered":
            ordered = True
        elif key == "locked-retries":
            retries = int(value)
        else:
            raise ValueError(f"{option!r} is no option of a two-phase commit")
    return TwoPhase(ordered=ordered, locked_retries=retries)


def _plan(steps: list[Step], two_phase: TwoPhase | None) -> Plan:
    mode = Mode.SAGA if two_phase is None else Mode.TWO_PHASE_COMMIT
    definition = Definition(name="order", steps=tuple(steps), mode=mode, two_phase=two_phase)
    wrong = violations(definition)
    if wrong:
        raise ValueError(f"the definition is refused: {wrong}")
    return Plan(definition)


# -- playing ---------------------------------------------------------------------------------------


class Player:
    """Plays one saga message by message, as engine and lanes would."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ledger = Ledger(plan) if plan.two_phase is None else Minutes(plan)
        self.decide = decide_checked if plan.two_phase is None else decide_votes
        self.saga: Saga | None = None
        self.now_ms = START_MS
        self.epoch = 1
        self.sent_at_ms: dict[tuple[int, Verb, int, int], int] = {}
        self.polls: dict[tuple[int, Verb, int, int], int] = {}
        self.polled: dict[tuple[int, Verb, int, int], PollParticipant] = {}
        self.due: list[int] = []

    def play(self, line: str) -> Iterator[str]:
        """Give the message of this line to the saga; the line and what came of it."""
        words = line.removeprefix(">").strip()
        at = re.match(r"at (\S+) ", words)
        if at is not None:
            words = words.removeprefix(at[0])
            self.now_ms = self._next_due() if at[1] == "?" else START_MS + _ms(at[1])
        message = self._message(words)
        decision = self.decide(self.plan, self.saga, message, self.now_ms, self.epoch)
        self.ledger.follow(decision)
        self.saga = decision.saga
        self._note(decision.effects)
        yield f"> at {_instant(self.now_ms)} {words}" if at is not None else f"> {words}"
        yield from self._shown(decision)

    def _next_due(self) -> int:
        return min(due for due in self.due if due > self.now_ms)

    def _note(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            if isinstance(effect, CallParticipant):
                self.sent_at_ms[_key(effect)] = self.now_ms
            elif isinstance(effect, PollParticipant):
                self.polls[_key(effect)] = effect.polls
                self.polled[_key(effect)] = effect
                self.due.append(effect.at_ms)
            elif isinstance(effect, WakeAt):
                self.due.append(effect.at_ms)

    def _message(self, words: str) -> Message:
        if words.startswith("start"):
            return _start(words, self.plan.definition.deadline_ms)
        if wake := re.fullmatch(r"wake(?: due (\S+))?", words):
            return Wake(START_MS + _ms(wake[1])) if wake[1] else Wake()
        if words == "revived":
            return self._revived()
        if words.startswith("restarted"):
            self.epoch += 1
            self.due.clear()
            return RuntimeRestarted(restored=words == "restarted after a restore")
        if cancel := re.fullmatch(r"cancel ([a-z]+): (.+)", words):
            return CancelSaga(author=cancel[1], reason=cancel[2])
        if retry := re.fullmatch(r"retry ([a-z-]+ )?([a-z]+): (.+?)(?: \((\w+)\))?", words):
            number = self.plan.number_of[retry[1].strip()] if retry[1] else None
            author, reason, request_id = retry[2], retry[3], retry[4] or ""
            return RetrySaga(step=number, author=author, reason=reason, request_id=request_id)
        if abandon := re.fullmatch(r"abandon (by force )?([a-z]+): (.+)", words):
            return AbandonSaga(author=abandon[2], reason=abandon[3], force=bool(abandon[1]))
        about = re.fullmatch(
            r"(answered|not sent) (prepare |compensate )?([a-z-]+)#(?:(\d+)/)?(\d+)(?: (.+))?",
            words,
        )
        if about is None:
            raise ValueError("this is no message")
        verb = Verb[about[2].strip().upper()] if about[2] else Verb.EXECUTE
        step, round_, attempt = self.plan.number_of[about[3]], int(about[4] or 1), int(about[5])
        if about[1] == "not sent":
            reason = about[6] or ""
            return NotSent(step=step, verb=verb, round=round_, attempt=attempt, reason=reason)
        what, _, sent_at = about[6].partition(" sent at ")
        outcome = _outcome(what)
        key = (step, verb, round_, attempt)
        return Answered(
            step=step,
            verb=verb,
            round=round_,
            attempt=attempt,
            sent_at_ms=START_MS + _ms(sent_at) if sent_at else self.sent_at_ms[key],
            answered_at_ms=self.now_ms,
            status=outcome.reason if isinstance(outcome, Unknown) else "OK",
            polls=self.polls.get(key, 0),
            outcome=outcome,
            probe=what.endswith(" probe"),
        )

    def _revived(self) -> Revived:
        """What is in progress was looked after meanwhile."""
        assert self.saga is not None
        keys = {
            (number, step.verb, step.round, step.attempt)
            for number, step in enumerate(self.saga.steps)
            if step.open
        }
        return Revived(tuple(poll for key, poll in self.polled.items() if key in keys))

    # -- showing -----------------------------------------------------------------------------------

    def _shown(self, decision: Decision) -> Iterator[str]:
        for record in decision.records:
            yield f"  {self._record(record)}"
        for effect in decision.effects:
            yield f"  {self._effect(effect)}"
        if not decision.records and not decision.effects:
            yield "  (nothing)"
        if decision.answer is not None:
            yield f"  answer {decision.answer.name}"
        steps = zip(self.plan.steps, decision.saga.steps, strict=True)
        statuses = ", ".join(f"{step.name} {state.status.name}" for step, state in steps)
        yield f"  state {decision.saga.state.name}{_decided(decision.saga)}: {statuses}"

    def _record(self, record: Record) -> str:
        name = type(record).__name__
        if isinstance(record, SagaStarted):
            deadline = record.deadline_at_ms
            return f"{name} deadline at {_instant(deadline)}" if deadline else name
        if isinstance(record, SagaTurnedBack):
            step = "" if record.step is None else f" step={self.plan.steps[record.step].name}"
            return f"{name} cause={record.cause.name}{step}"
        if isinstance(record, SagaEnded):
            return f"{name} {record.state.name}"
        if isinstance(record, DecisionMade):
            step = "" if record.step is None else f" step={self.plan.steps[record.step].name}"
            cause = "" if record.cause is None else f" cause={record.cause.name}{step}"
            return f"{name} {record.decision.name}{cause}"
        if isinstance(record, RoundPlanned):
            return f"{name} {record.round} from {_instant(record.starts_at_ms)}"
        if isinstance(record, CancelRequested):
            return f"{name} by {record.author}: {record.reason}"
        if isinstance(record, OperatorActed):
            step = "" if record.step is None else f" {self.plan.steps[record.step].name}"
            round_ = f" round {record.round}" if record.round else ""
            return f"{name} {record.action.name}{step}{round_} by {record.author}: {record.reason}"
        return f"{name} {self._step_record(record)}"

    def _step_record(
        self,
        record: AttemptStarted
        | StepExecuted
        | StepRejected
        | StepCompensated
        | StepPrepared
        | VoteRefused
        | HeuristicReported
        | AttemptFailed
        | AttemptLost
        | AttemptWithdrawn
        | StepGivenUp
        | StepStuck,
    ) -> str:
        name = self.plan.steps[record.step].name
        if isinstance(record, StepGivenUp):
            return f"{name} after {_duration(record.spent_ms)}"
        if isinstance(record, StepStuck):
            return f"{_verb(record.verb)}{name} {record.failure.reason}"
        if isinstance(record, StepExecuted | StepCompensated | StepPrepared):
            failure = record.failure if isinstance(record, StepExecuted) else None
            left_out = f", its result left out: {failure.reason}" if failure else ""
            return f"{name}#{_number(record)}{_polls(record.timing.polls)}{left_out}"
        if isinstance(record, StepRejected | VoteRefused):
            return f"{name}#{_number(record)} {record.failure.reason}"
        attempt = f"{_verb(record.verb)}{name}#{_number(record)}"
        if isinstance(record, HeuristicReported):
            did = {True: "committed", False: "rolled back", None: "nobody knows"}[record.committed]
            return f"{attempt} {did}: {record.failure.reason}"
        if isinstance(record, AttemptFailed):
            retry = f", retry at {_instant(record.retry_at_ms)}" if record.retry_at_ms else ""
            misconfigured = ", misconfigured" if record.misconfigured else ""
            misconfigured += ", probe" if record.probe else ""
            return f"{attempt} {record.failure.reason}{misconfigured}{retry}"
        return attempt

    def _effect(self, effect: Effect) -> str:
        if isinstance(effect, WakeAt):
            return f"wake at {_instant(effect.at_ms)}"
        name = self.plan.steps[effect.step].name
        attempt = f"{_verb(effect.verb)}{name}#{_number(effect)}"
        if isinstance(effect, PollParticipant):
            return f"poll {attempt} at {_instant(effect.at_ms)}"
        if isinstance(effect, PollNow):
            return f"poll {attempt} at once"
        return f"{'withdraw' if isinstance(effect, WithdrawCall) else 'call'} {attempt}"


def _decided(saga: Saga) -> str:
    """What GetDecision would say of a two-phase commit."""
    if not saga.round:
        return ""
    decision = decision_of(saga, saga.round).name
    return f" ({decision})" if saga.round == 1 else f" (round {saga.round}, {decision})"


def _start(words: str, deadline_ms: int) -> StartSaga:
    found = re.fullmatch(r"start(?: deadline (\S+)| again( with other content)?)?", words)
    if found is None:
        raise ValueError("this is no message")
    return StartSaga(
        saga_id="s-1",
        content_hash="other" if found[2] else "same",
        input=Payload(b"{}", "application/json"),
        deadline_at_ms=START_MS + (_ms(found[1]) if found[1] else deadline_ms)
        if found[1] or deadline_ms
        else 0,
    )


def _outcome(words: str) -> Outcome:
    name, _, rest = words.partition(" ")
    if name == "Done":
        size = re.fullmatch(r"(\d+) bytes", rest)
        return Done(Payload(bytes(int(size[1]) if size else 0)))
    if name == "InProgress":
        return InProgress(_ms(rest.removeprefix("poll after ")))
    if name == "Rejected":
        return Rejected(rest)
    if name == "Broken":
        return Broken(rest)
    if name == "Heuristic":
        did, _, reason = rest.partition(" ")
        return Heuristic({"committed": True, "rolled-back": False}[did], reason)
    if name == "Unknown":
        reason, _, misconfigured = rest.partition(" ")
        return Unknown(reason, misconfigured=misconfigured == "misconfigured")
    raise ValueError(f"{name!r} is no outcome")


class _Numbered(Protocol):
    """A record or effect about one attempt."""

    @property
    def round(self) -> int: ...
    @property
    def attempt(self) -> int: ...


def _number(about: _Numbered) -> str:
    return f"{about.round}/{about.attempt}" if about.round > 1 else f"{about.attempt}"


def _key(effect: CallParticipant | PollParticipant) -> tuple[int, Verb, int, int]:
    return effect.step, effect.verb, effect.round, effect.attempt


def _polls(count: int) -> str:
    return f" after {count} poll{'s' * (count > 1)}" if count else ""


def _verb(verb: Verb) -> str:
    return "" if verb is Verb.EXECUTE else f"{verb.name.lower()} "


# -- times -----------------------------------------------------------------------------------------

_TIME = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d{1,3})?)s)?(?:(\d+)ms)?")


def _ms(text: str) -> int:
    """Read a time such as `20ms`, `1.5s`, `2m`, `24h` or `24h10ms`."""
    found = _TIME.fullmatch(text)
    if found is None or not text:
        raise ValueError(f"{text!r} is no time")
    hours, minutes, seconds, ms = found.groups()
    total = 3_600_000 * int(hours or 0) + 60_000 * int(minutes or 0) + int(ms or 0)
    return total + round(1_000 * float(seconds or 0))


def _duration(ms: int) -> str:
    hours, ms = divmod(ms, 3_600_000)
    minutes, ms = divmod(ms, 60_000)
    text = (f"{hours}h" if hours else "") + (f"{minutes}m" if minutes else "")
    if ms >= 1_000:
        return f"{text}{ms / 1_000:g}s"
    return f"{text}{ms}ms" if ms or not text else text


def _instant(at_ms: int) -> str:
    return _duration(at_ms - START_MS)
