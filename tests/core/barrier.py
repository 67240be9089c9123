"""A model of participants behind a barrier, on a network that loses, repeats and delivers late.

The model follows the table of barrier verdicts: per key one row, written together with the effect
or the refusal; Compensate claims the forward row as its fence.
"""

from __future__ import annotations

import msgspec

from amends_runtime.core.definition import Kind, Plan
from amends_runtime.core.messages import Broken, Done, InProgress, Outcome, Rejected, Unknown
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Verb
from tests.core.definitions import Choose
from tests.core.world import Attempt, World

__all__ = ["MoneyWorld"]


class MoneyWorld(World):
    """A world whose participants move one coin per step, forward and back.

    `balance` counts per step: +1 for its effect, -1 for undoing it. What a participant answers is
    true; what the network does with calls and replies is anything.
    """

    def __init__(self, plan: Plan, choose: Choose, deadline_ms: int = 0) -> None:
        self.balance = [0] * len(plan.steps)
        self.rows: dict[tuple[int, Verb, int], Outcome] = {}
        self.network: list[tuple[Attempt, bool]] = []  # sent, with what it said of `executed`
        super().__init__(plan, choose, deadline_ms)

    def outcome(self, attempt: Attempt, *, friendly: bool) -> Outcome:
        """The call arrives never, once or twice; of its reply nothing may be left."""
        executed = self._send(attempt)
        reply = None
        for _ in range(self.choose([1, 1, 1, 0, 2])):
            reply = self._arrive(attempt, executed=executed)
        if reply is None:
            misconfigured = self.choose([False, True])
            return Unknown("UNIMPLEMENTED" if misconfigured else "UNAVAILABLE", "", misconfigured)
        kept = self.choose(["reply", "reply", "reply", "lost", "in progress"])
        if kept == "lost":
            return Unknown("DEADLINE_EXCEEDED")
        return InProgress(20) if kept == "in progress" else reply

    def calm_outcome(self, attempt: Attempt) -> Outcome:
        """The call arrives, and so does the reply."""
        return self._arrive(attempt, executed=self._send(attempt))

    def restart(self) -> None:
        """What was sent stays in the network."""
        for attempt in self.lane:
            if attempt.sent_at_ms:
                self._send(attempt)
        super().restart()

    def happen(self, action: str, *, friendly: bool) -> None:
        """Now and then something old arrives first."""
        if self.network and self.choose([False, False, True]):
            attempt, executed = self.choose(self.network)
            self._arrive(attempt, executed=executed)
        super().happen(action, friendly=friendly)

    def deliver_everything_again(self) -> None:
        """Whatever was ever sent arrives once more."""
        for attempt, executed in self.network:
            self._arrive(attempt, executed=executed)

    def balances(self) -> set[int]:
        """The balances of all steps that move money."""
        moving = (step for step in range(len(self.balance)) if self._moves_money(step))
        return {self.balance[step] for step in moving}

    def _send(self, attempt: Attempt) -> bool:
        assert self.saga is not None
        executed = self.saga.steps[attempt.step].executed
        self.network.append((msgspec.structs.replace(attempt), executed))
        return executed

    def _arrive(self, attempt: Attempt, *, executed: bool) -> Outcome:
        key = (attempt.step, attempt.verb, attempt.round)
        if key not in self.rows:
            if attempt.verb is Verb.EXECUTE:
                self.rows[key] = self._execute(attempt.step)
            else:
                self.rows[key] = self._compensate(attempt, executed=executed)
        return self.rows[key]

    def _execute(self, step: int) -> Outcome:
        if self.choose([True] * 8 + [False]):
            self.balance[step] += self._moves_money(step)
            return Done(Payload(b"coin"))
        return Rejected("NO_FUNDS")

    def _moves_money(self, step: int) -> bool:
        return self.plan.steps[step].kind is not Kind.READ_ONLY

    def _compensate(self, attempt: Attempt, *, executed: bool) -> Outcome:
        forward = (attempt.step, Verb.EXECUTE, attempt.round)
        if forward not in self.rows:
            if executed:
                return Broken("BARRIER_LOST")
            self.rows[forward] = Rejected("FENCED")
        elif isinstance(self.rows[forward], Done):
            self.balance[attempt.step] -= 1
        return Done()
