"""Any sequence of calls of a two-phase commit, with crashes and a resolver: a vote stays a vote.

The world is that of `test_verdict_properties.py`, whose effect is a commit here.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from amends.barrier.verdict import (
    Answer,
    Question,
    Replay,
    RowState,
    Run,
    Settlement,
    judge,
    settle,
)
from amends.outcomes import Broken, Done, Heuristic, Outcome, Rejected, Verb
from amends.v1 import participant_pb2
from amends.wire import outcome_from_wire, outcome_to_wire
from tests.participants.test_verdict_properties import Attempt, Crash, Says, World


@dataclass(frozen=True)
class Asked:
    """An attempt, and who makes it: the runtime, or the participant's own resolver."""

    attempt: Attempt
    by_resolver: bool
    reports: bool
    """The handler says that it has decided alone, if it may say that."""


@dataclass
class Branch(World):
    """One life of a two-phase commit."""

    voted: bool = False
    """The runtime has heard the yes vote."""

    def ask(self, asked: Asked) -> Outcome | None:
        """Answer as the barrier does; ``None`` if the caller hears nothing."""
        attempt = asked.attempt
        verb = attempt.verb
        question = Question(
            verb,
            None if asked.by_resolver else verb.encode(),
            executed=verb is Verb.COMPENSATE and self.voted and not asked.by_resolver,
            two_phase=verb is not Verb.PREPARE,
        )
        match judge(question, self.rows):
            case Replay(reply=reply):
                outcome = outcome_from_wire(participant_pb2.Outcome.FromString(reply))
                return outcome if attempt.crash is Crash.NOWHERE else None
            case Answer(outcome=outcome, writes=writes):
                nothing = Settlement(keeps_effect=False, writes=writes)
                return self.end(attempt, question, nothing, outcome)
            case Run():
                if verb is Verb.EXECUTE:
                    assert Verb.PREPARE in self.done(), "nobody commits what was not voted for"
                if verb is Verb.COMPENSATE:
                    assert Verb.EXECUTE not in self.done(), "nobody undoes a commit"
                said = self.run(attempt)
                if asked.reports and verb is not Verb.PREPARE:
                    said = Heuristic(committed=True, reason="by_hand")
                if said is None:
                    return None
                return self.end(attempt, question, settle(question, self.rows, said), said)


questions = st.builds(
    Asked,
    st.builds(Attempt, st.sampled_from(Verb), st.sampled_from(Says), st.sampled_from(Crash)),
    st.booleans(),
    st.booleans(),
).filter(lambda asked: not (asked.by_resolver and asked.attempt.verb is Verb.PREPARE))


@given(st.lists(questions, max_size=14))
def test_a_branch_is_committed_once_or_never_and_says_the_same_for_ever(
    sequence: list[Asked],
) -> None:
    """No commit without a vote, none after the fence, no undoing of one; answers are stable."""
    branch = Branch()
    said: dict[Verb, Outcome] = {}
    for asked in sequence:
        verb = asked.attempt.verb
        was_committed = branch.effect == 1
        heard = branch.ask(asked)
        assert branch.effect in (0, 1)
        assert branch.reserved in (0, 1)
        if was_committed:
            assert branch.effect == 1
        compensated = branch.rows.get(Verb.COMPENSATE)
        if compensated is not None and compensated.state is RowState.DONE:
            assert (branch.effect, branch.reserved) == (0, 0)
        match heard:
            case Done() if verb is Verb.PREPARE:
                branch.voted = True
                assert branch.reserved == 1
            case Done() if verb is Verb.EXECUTE:
                assert branch.effect == 1
            case Done():
                assert branch.effect == 0
            case Broken(reason="vote_lost"):
                assert Verb.PREPARE not in branch.done()
                continue
            case _:
                pass
        if isinstance(heard, Done | Rejected | Heuristic):
            before = said.setdefault(verb, heard)
            if verb is Verb.PREPARE and compensated is not None and isinstance(before, Done):
                assert isinstance(heard, Rejected)
            else:
                assert outcome_to_wire(heard) == outcome_to_wire(before)
