"""Any sequence of attempts with any crashes has the effect at most once, and never after a fence.

The database is a dict and a transaction a copy of it; `judge` and `settle` are the real ones.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from amends.barrier.verdict import (
    Answer,
    Question,
    Replay,
    Row,
    RowState,
    Run,
    Settlement,
    Write,
    judge,
    settle,
)
from amends.outcomes import Broken, Done, Heuristic, InProgress, Outcome, Rejected, Verb
from amends.v1 import participant_pb2
from amends.wire import outcome_from_wire, outcome_to_wire


class Crash(enum.Enum):
    """Where the process dies in an attempt."""

    NOWHERE = "nowhere"
    BEFORE_COMMIT = "before the commit"
    BEFORE_REPLY = "after the commit, before the reply"


class Says(enum.Enum):
    """What the handler does, if it is run."""

    DONE = "done"
    REJECTED = "rejected"
    UNFINISHED = "in progress"
    BROKEN = "broken"
    RAISES = "raises"


@dataclass(frozen=True)
class Attempt:
    verb: Verb
    says: Says
    crash: Crash


@dataclass
class World:
    """One life: the rows, the effect, and what the runtime has heard."""

    rows: dict[Verb, Row] = field(default_factory=dict)
    effect: int = 0
    reserved: int = 0
    heard_done: bool = False

    def attempt(self, attempt: Attempt) -> Outcome | None:
        """Answer an attempt as the barrier does; ``None`` if the caller hears nothing."""
        executed = attempt.verb is Verb.COMPENSATE and self.heard_done
        question = Question(attempt.verb, attempt.verb.encode(), executed)
        verdict = judge(question, self.rows)
        match verdict:
            case Replay(reply=reply):
                outcome = outcome_from_wire(participant_pb2.Outcome.FromString(reply))
                return outcome if attempt.crash is Crash.NOWHERE else None
            case Answer(outcome=outcome, writes=writes):
                return self.end(
                    attempt, question, Settlement(keeps_effect=False, writes=writes), outcome
                )
            case Run():
                said = self.run(attempt)
                if said is None:
                    return None
                return self.end(attempt, question, settle(question, self.rows, said), said)

    def end(
        self, attempt: Attempt, question: Question, settlement: Settlement, outcome: Outcome
    ) -> Outcome | None:
        if attempt.crash is Crash.BEFORE_COMMIT:
            return None
        if settlement.keeps_effect:
            self.effect, self.reserved = self.after(attempt.verb)
        self.commit(question, settlement.writes, outcome)
        return None if attempt.crash is Crash.BEFORE_REPLY else outcome

    def run(self, attempt: Attempt) -> Outcome | None:
        match attempt.says:
            case Says.DONE:
                return Done({"effect": str(attempt.verb)})
            case Says.REJECTED:
                # A refused compensation is the author's bug and an error on the wire.
                return None if attempt.verb is Verb.COMPENSATE else Rejected("no")
            case Says.UNFINISHED:
                return InProgress(1)
            case Says.BROKEN:
                return Broken("broken")
            case Says.RAISES:
                return None

    def after(self, verb: Verb) -> tuple[int, int]:
        match verb:
            case Verb.PREPARE:
                return self.effect, self.reserved + 1
            case Verb.EXECUTE:
                return self.effect + 1, self.reserved
            case Verb.COMPENSATE:
                return self.effect - (Verb.EXECUTE in self.done()), self.reserved - (
                    Verb.PREPARE in self.done()
                )

    def done(self) -> set[Verb]:
        return {verb for verb, row in self.rows.items() if row.state is RowState.DONE}

    def commit(self, question: Question, writes: tuple[Write, ...], outcome: Outcome) -> None:
        for write in writes:
            assert write.verb not in self.rows, "the unique index would refuse a second row"
            own = write.verb is question.verb
            reply = outcome_to_wire(outcome).SerializeToString() if own else None
            self.rows[write.verb] = Row(write.state, question.request_hash if own else None, reply)


def attempts(verbs: list[Verb]) -> st.SearchStrategy[list[Attempt]]:
    """Draw sequences of attempts."""
    return st.lists(
        st.builds(Attempt, st.sampled_from(verbs), st.sampled_from(Says), st.sampled_from(Crash)),
        max_size=12,
    )


@given(attempts([Verb.EXECUTE, Verb.COMPENSATE]))
def test_the_net_effect_is_none_or_one_and_none_after_a_fence(sequence: list[Attempt]) -> None:
    """Whatever is repeated, lost, late or killed: never twice, and never after Compensate."""
    check(sequence)


@given(attempts(list(Verb)))
def test_the_same_holds_with_votes(sequence: list[Attempt]) -> None:
    """Prepare is fenced and undone like Execute."""
    check(sequence)


def check(sequence: list[Attempt]) -> None:
    """Play a sequence, and look at the world after each attempt."""
    world = World()
    fenced = False
    said: dict[Verb, Outcome] = {}
    for attempt in sequence:
        heard = world.attempt(attempt)
        fenced = fenced or Verb.COMPENSATE in world.rows
        assert world.effect in (0, 1)
        assert world.reserved in (0, 1)
        if fenced:
            assert (world.effect, world.reserved) == (0, 0)
        match heard:
            case Done() if attempt.verb is Verb.COMPENSATE:
                assert fenced
            case Done():
                assert not fenced
                assert attempt.verb in world.done()
                world.heard_done = world.heard_done or attempt.verb is Verb.EXECUTE
            case Rejected():
                assert attempt.verb is not Verb.COMPENSATE
                assert attempt.verb not in world.done() or fenced
            case Broken(reason=reason):
                assert reason == "broken", "without a purge or a change, no rule is broken"
            case Heuristic():
                raise AssertionError("nobody votes here, nor decides alone")
            case InProgress() | None:
                continue
        check_stable(attempt.verb, heard, said, fenced=fenced)


def check_stable(
    verb: Verb, heard: Outcome | None, said: dict[Verb, Outcome], *, fenced: bool
) -> None:
    """A deciding answer stays what it was, except that a fence turns Done into a refusal."""
    if not isinstance(heard, Done | Rejected):
        return
    before = said.setdefault(verb, heard)
    if isinstance(before, Done) and verb is not Verb.COMPENSATE and fenced:
        assert isinstance(heard, Rejected)
        assert heard.reason == "fenced"
    else:
        assert outcome_to_wire(heard) == outcome_to_wire(before)
