"""Random worlds around one two-phase commit: one whose participants say anything, an honest one."""

from __future__ import annotations

import msgspec

from amends_runtime.core.definition import Plan
from amends_runtime.core.messages import (
    Broken,
    Done,
    Heuristic,
    InProgress,
    NotSent,
    Outcome,
    Rejected,
    RuntimeRestarted,
    Unknown,
    Wake,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Verb
from amends_runtime.core.two_phase import LOCKED
from tests.core.definitions import Choose
from tests.core.voters import Life, answer, told
from tests.core.world import Attempt, World

__all__ = ["HonestWorld", "VotingWorld"]


class VotingWorld(World):
    """A world that says anything, breaks promises among it, and whose clock jumps both ways."""

    def __init__(self, plan: Plan, choose: Choose, deadline_ms: int = 0) -> None:
        self.silence = choose([1, 4, 16])  # how much likelier no answer is than a strange one
        super().__init__(plan, choose, deadline_ms)

    def wake(self) -> None:
        """The earliest timer fires, whatever the wall clock says; without one it is spurious."""
        self.timers.sort()
        due_at_ms = self.timers.pop(0) if self.timers else 0
        if self.choose([True, True, False]):
            self.now_ms = max(self.now_ms, due_at_ms)
        self.tell(Wake(due_at_ms))

    def happen(self, action: str, *, friendly: bool) -> None:
        """Now and then the clock steps back."""
        if action == "pass time" and self.choose([False, False, True]):
            self.pass_time(-self.choose([1, 700, 30_000]))
        else:
            super().happen(action, friendly=friendly)

    def come_back(self) -> None:
        """Now and then over a store that was restored, and has lost what came after."""
        self.tell(RuntimeRestarted(restored=self.choose([False, False, False, True])))

    def withdraw(self, attempt: Attempt) -> None:
        """The lane hands an attempt back, perhaps for the breaker that is open."""
        reason = self.choose(["", "BREAKER_OPEN"]) if attempt.verb is Verb.PREPARE else ""
        self.lane.remove(attempt)
        self.tell(
            NotSent(
                step=attempt.step,
                verb=attempt.verb,
                round=attempt.round,
                attempt=attempt.attempt,
                reason=reason,
            )
        )

    def outcome(self, attempt: Attempt, *, friendly: bool) -> Outcome:
        """What a participant could say, sensible or not. A friendly one keeps its promises."""
        asked = attempt.verb is Verb.PREPARE
        outcomes: list[Outcome] = [
            *[Done(Payload(b"done"))] * self.kindness * (3 if asked else 1),
            *[Unknown("UNAVAILABLE")] * self.silence,
            Unknown("UNIMPLEMENTED", misconfigured=True),
            InProgress(self.choose([-1, 0, 40, 10**12] if not friendly else [40])),
        ]
        if asked:
            outcomes += [Rejected("NO_FUNDS"), Rejected(LOCKED), Rejected(LOCKED)]
            outcomes += [Broken("STORE_LOST"), Heuristic(False, "gave_up")]
        elif friendly:
            outcomes.append(Heuristic(attempt.verb is Verb.EXECUTE, "agreed"))
        else:
            outcomes += [Rejected("NO"), Broken("VOTE_LOST")]
            outcomes.append(Heuristic(self.choose([False, True]), "by_hand"))
        return self.choose(outcomes)  # type: ignore[no-any-return]


class HonestWorld(VotingWorld):
    """A world whose participants keep the contract, on a network that loses, repeats and is late.

    `lives` says where each branch stands in each round. A participant that asks GetDecision, as the
    SDK does for what it holds for long, does as it is told.
    """

    def __init__(self, plan: Plan, choose: Choose, deadline_ms: int = 0) -> None:
        self.lives: dict[tuple[int, int], Life] = {}
        self.network: list[tuple[Attempt, bool]] = []  # sent, with what it said of the vote
        super().__init__(plan, choose, deadline_ms)

    def outcome(self, attempt: Attempt, *, friendly: bool) -> Outcome:
        """The call arrives never, once or twice; of its reply nothing may be left."""
        voted = self._send(attempt)
        reply = None
        for _ in range(self.choose([1, 1, 1, 0, 2])):
            reply = self._arrive(attempt, voted=voted)
        if reply is None:
            misconfigured = self.choose([False, True])
            return Unknown("UNIMPLEMENTED" if misconfigured else "UNAVAILABLE", "", misconfigured)
        kept = self.choose(["reply", "reply", "reply", "lost", "in progress"])
        if kept == "lost":
            return Unknown("DEADLINE_EXCEEDED")
        return InProgress(20) if kept == "in progress" else reply

    def calm_outcome(self, attempt: Attempt) -> Outcome:
        """The call arrives, and so does the reply."""
        return self._arrive(attempt, voted=self._send(attempt))

    def restart(self) -> None:
        """What was sent stays in the network."""
        for attempt in self.lane:
            if attempt.sent_at_ms:
                self._send(attempt)
        super().restart()

    def happen(self, action: str, *, friendly: bool) -> None:
        """Now and then something old arrives first, or somebody asks what was decided."""
        if self.network and self.choose([False, False, True]):
            attempt, voted = self.choose(self.network)
            self._arrive(attempt, voted=voted)
        if self.choose([False, False, False, True]):
            self.resolve()
        super().happen(action, friendly=friendly)

    def deliver_everything_again(self) -> None:
        """Whatever was ever sent arrives once more."""
        for attempt, voted in self.network:
            self._arrive(attempt, voted=voted)

    def resolve(self) -> None:
        """Whoever is in doubt asks GetDecision, and does as it is told."""
        assert self.saga is not None
        for (step, round_), life in self.lives.items():
            verb = told(self.saga, round_)
            if life is Life.HOLDS and verb is not None:
                self.lives[step, round_], _ = answer(life, verb, Life.HOLDS, voted=True)

    def check_atomicity(self) -> None:
        """In no round has one branch committed and another one not voted yes, or rolled back."""
        for round_ in {round_ for _, round_ in self.lives}:
            lives = [self.lives.get((n, round_), Life.NEW) for n in range(len(self.plan.steps))]
            if Life.COMMITTED in lives:
                assert set(lives) <= {Life.COMMITTED, Life.HOLDS}, lives

    def _send(self, attempt: Attempt) -> bool:
        assert self.saga is not None
        voted = self.saga.steps[attempt.step].prepared_at_ms > 0
        self.network.append((msgspec.structs.replace(attempt), voted))
        return voted

    def _arrive(self, attempt: Attempt, *, voted: bool) -> Outcome:
        key = (attempt.step, attempt.round)
        vote = self.choose([Life.HOLDS] * 8 + [Life.REFUSED, Life.WAS_LOCKED])
        life = self.lives.get(key, Life.NEW)
        self.lives[key], said = answer(life, attempt.verb, vote, voted=voted)
        self.check_atomicity()
        return said
