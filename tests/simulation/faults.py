"""What can go wrong, how often it does, and how often it did.

Every schedule has a weather of its own: each kind of fault is absent, rare or frequent in it, so
that faults meet in ever other combinations, and also strike alone (swarm testing: A. Groce and
others, "Swarm Testing", 2012). Whether one strikes is drawn even where its kind is switched off or
the storm is over: so a schedule takes the same course up to the first difference.
"""

from __future__ import annotations

import enum
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

__all__ = ["INCIDENTS", "OBSERVED", "RATES", "VOTE_RATES", "Fault", "Faults", "draw_weather"]

T = TypeVar("T")


class Fault(enum.Enum):
    """Kinds of faults, in the words of the report."""

    # Between the runtime and its participants.
    DELAY = "message delayed"
    LOSE_REQUEST = "request lost"
    REFUSE = "connection refused"
    LOSE_REPLY = "reply lost after the effect"
    DUPLICATE = "request delivered twice"
    LATE = "request delivered after its deadline"
    LATE_COPY = "copy delivered seconds later"
    REORDER = "message overtook another"
    CUT_REPLY = "reply cut: error status though done"
    EMPTY_REPLY = "reply without an outcome though done"

    # On a stream, where there is one.
    STREAM_REFUSED = "stream not offered: the unary verbs instead"
    STREAM_HANGS = "stream taken, and never opened"
    STREAM_BREAKS_BEFORE = "stream broke, its calls never arrived"
    STREAM_BREAKS_AFTER = "stream broke with replies on it"
    STREAM_DRAINS = "stream drained"
    STREAM_STALLS = "stream stalled"
    STREAM_UNREADABLE = "message of a stream unreadable"
    CREDITS_TAKEN = "credits of a stream taken back for a while"
    CREDITS_RUN_OUT = "credits of a stream used up"
    REPLIES_SHUFFLED = "replies on a stream in another order"

    # At a participant.
    FAIL = "handler failed before its commit"
    SLOW_HANDLER = "handler outlived its caller's deadline"
    PARTICIPANT_CRASH = "participant crashed"
    CRASH_IN_HANDLER = "participant crashed inside a transaction"
    PARTICIPANT_DOWN = "participant down for a while"
    IN_PROGRESS = "InProgress answered"
    GONE_AT_WORK = "participant gone after InProgress, its saga stopped meanwhile"
    HELD = "call found its step held"
    REJECT = "Rejected answered"
    BROKEN = "Broken answered"
    MISCONFIGURED = "misconfigured endpoint"
    REJECT_COMPENSATION = "compensation Rejected, against the contract"
    FENCED = "late call met the fence"
    BREAKER_OPEN = "breaker opened"
    LONG_OUTAGE = "participant down for more than ten minutes"
    POLL_WAITS = "poll waits, and its saga turned back or was abandoned"

    # At a branch of a two-phase commit.
    VOTE_NO = "voted no"
    LOCKED = "voted LOCKED: another commit held it"
    FOREIGN_LOCK = "voted LOCKED: somebody else held it"
    DEADLOCK = "two commits held what the other one needed"
    SLOW_VOTE = "InProgress answered to Prepare"
    LATE_VOTE = "late Prepare met the fence of its abort"
    DIED_BEFORE_COMMIT = "branch died before its transaction's commit"
    DIED_AFTER_COMMIT = "branch died between its commit and its reply"
    VOTE_LOST = "vote broken: the branch lost what it had voted for"
    COMMIT_REFUSED = "vote broken: the branch refused to commit"
    ALONE_CONTRARY = "vote broken: the branch decided alone, and otherwise"
    ALONE_AGREEING = "branch decided alone, as it was decided"
    ASKED = "branch in doubt asked for the decision"
    ASKED_OLD = "branch in doubt asked a replaced runtime"
    TOLD_EARLIER = "branch carried out a decision that it had asked for"
    NEXT_ROUND = "commit tried again in a new round"

    # The runtime.
    CRASH_BEFORE_COMMIT = "runtime killed before a commit"
    CRASH_AFTER_WRITE = "runtime killed between a commit's write and its answer"
    CRASH_AFTER_COMMIT = "runtime killed after a commit, before any effect"
    CRASH_AMONG_EFFECTS = "runtime killed among the effects of a commit"
    CRASH_BEFORE_CALL = "runtime killed before a call left"
    CRASH_AFTER_REPLY = "runtime killed when a reply arrived"
    CRASH_ANYWHERE = "runtime killed at any instant"
    CRASH_IN_RECOVERY = "runtime killed during recovery"
    PAUSE = "runtime paused"
    TAKEOVER = "second runtime took a paused one's store"
    TAKEOVER_ALIVE = "second runtime took a living one's store"
    OWNERSHIP_LOST = "runtime ended: it had lost its store"
    PARKED = "runtime was seen with parked sagas"
    CLOCK_FORWARD = "wall clock set forward"
    CLOCK_BACK = "wall clock set back"

    # The store.
    SLOW_COMMIT = "slow commit"
    COMMIT_FAILED_WRITTEN = "commit failed although written"
    COMMIT_FAILED = "commit failed and not written"
    REOPEN_FAILED = "reopening failed"
    STORE_LOST = "reopening failed after a write of an operator's"
    READ_FAILED = "read failed"

    # Clients.
    CLIENT_REQUEST_LOST = "client's request lost"
    CLIENT_REPLY_LOST = "client's reply lost"
    START_REPEATED = "StartSaga repeated"
    START_OTHER_CONTENT = "StartSaga repeated with other content"
    CANCEL = "CancelSaga"
    RETRY = "RetrySaga that tried something again"
    ABANDON = "AbandonSaga that ended a saga"
    CANCEL_COMMIT = "CancelSaga that aborted a two-phase commit"
    RETRY_COMMIT = "RetrySaga that told a branch at once"
    ABORT = "AbandonSaga that aborted a two-phase commit"
    OPERATION_REPEATED = "operator's request repeated, though answered"
    MOVE = "participant moved by an operator"
    REMOVE = "participant removed by an operator, for a while"
    REGISTER = "definition registered by an operator"
    NOT_REGISTERED = "start refused, its participant was removed"
    OVERLOADED = "start refused, too many sagas"


RATES: Mapping[Fault, float] = {
    Fault.DELAY: 0.15,
    Fault.LOSE_REQUEST: 0.06,
    Fault.REFUSE: 0.06,
    Fault.LOSE_REPLY: 0.08,
    Fault.DUPLICATE: 0.08,
    Fault.LATE: 0.05,
    Fault.LATE_COPY: 0.06,
    Fault.CUT_REPLY: 0.08,
    Fault.EMPTY_REPLY: 0.03,
    Fault.STREAM_REFUSED: 0.08,
    Fault.STREAM_HANGS: 0.03,
    Fault.STREAM_BREAKS_BEFORE: 0.06,
    Fault.STREAM_BREAKS_AFTER: 0.06,
    Fault.STREAM_DRAINS: 0.06,
    Fault.STREAM_STALLS: 0.05,
    Fault.STREAM_UNREADABLE: 0.02,
    Fault.CREDITS_TAKEN: 0.06,
    Fault.FAIL: 0.08,
    Fault.SLOW_HANDLER: 0.04,
    Fault.IN_PROGRESS: 0.12,
    Fault.GONE_AT_WORK: 0.6,
    Fault.REJECT: 0.05,
    Fault.BROKEN: 0.01,
    Fault.MISCONFIGURED: 0.02,
    Fault.REJECT_COMPENSATION: 0.03,
    Fault.CRASH_IN_HANDLER: 0.02,
    Fault.CRASH_BEFORE_COMMIT: 0.02,
    Fault.CRASH_AFTER_WRITE: 0.02,
    Fault.CRASH_AFTER_COMMIT: 0.02,
    Fault.CRASH_AMONG_EFFECTS: 0.02,
    Fault.CRASH_BEFORE_CALL: 0.02,
    Fault.CRASH_AFTER_REPLY: 0.02,
    Fault.CRASH_IN_RECOVERY: 0.15,
    Fault.SLOW_COMMIT: 0.05,
    Fault.COMMIT_FAILED_WRITTEN: 0.03,
    Fault.COMMIT_FAILED: 0.03,
    Fault.REOPEN_FAILED: 0.3,
    Fault.STORE_LOST: 0.3,
    Fault.READ_FAILED: 0.1,
    Fault.OPERATION_REPEATED: 0.3,
    Fault.CLIENT_REQUEST_LOST: 0.15,
    Fault.CLIENT_REPLY_LOST: 0.15,
}
"""How often a kind strikes, each time that it can, in the middling weather."""

VOTE_RATES: Mapping[Fault, float] = {
    Fault.VOTE_NO: 0.05,
    Fault.FOREIGN_LOCK: 0.05,
    Fault.DIED_BEFORE_COMMIT: 0.02,
    Fault.DIED_AFTER_COMMIT: 0.02,
    Fault.VOTE_LOST: 0.02,
    Fault.ALONE_CONTRARY: 0.02,
    Fault.ALONE_AGREEING: 0.02,
    Fault.ASKED: 0.4,
    Fault.COMMIT_REFUSED: 0.05,
}
"""The same, of what strikes two-phase commits alone."""

INCIDENTS: Sequence[Fault] = (
    Fault.PARTICIPANT_CRASH,
    Fault.PARTICIPANT_DOWN,
    Fault.CRASH_ANYWHERE,
    Fault.PAUSE,
    Fault.TAKEOVER,
    Fault.TAKEOVER_ALIVE,
    Fault.CLOCK_FORWARD,
    Fault.CLOCK_BACK,
    Fault.MOVE,
    Fault.REMOVE,
    Fault.REGISTER,
)
"""Kinds that a schedule plans for an instant of their own."""

OBSERVED: Sequence[Fault] = (
    Fault.REORDER,
    Fault.CREDITS_RUN_OUT,
    Fault.REPLIES_SHUFFLED,
    Fault.HELD,
    Fault.FENCED,
    Fault.BREAKER_OPEN,
    Fault.NOT_REGISTERED,
    Fault.LONG_OUTAGE,
    Fault.POLL_WAITS,
    Fault.OWNERSHIP_LOST,
    Fault.PARKED,
    Fault.LOCKED,
    Fault.DEADLOCK,
    Fault.SLOW_VOTE,
    Fault.LATE_VOTE,
    Fault.ASKED_OLD,
    Fault.TOLD_EARLIER,
    Fault.NEXT_ROUND,
    Fault.CANCEL_COMMIT,
    Fault.RETRY_COMMIT,
    Fault.ABORT,
    Fault.RETRY,
    Fault.ABANDON,
    Fault.OVERLOADED,
)
"""Kinds that nobody plans: they come of the others, and are counted when they are seen."""

ABSENT = 0.4
"""How probable it is that a kind is absent from a schedule's weather."""

INTENSITIES = (0.4, 1.0, 1.0, 3.0)


def draw_weather(chance: random.Random, rates: Mapping[Fault, float] = RATES) -> dict[Fault, float]:
    """Draw for each kind how often it strikes in one schedule."""
    weather = {}
    for fault, rate in rates.items():
        absent, intensity = chance.random() < ABSENT, chance.choice(INTENSITIES)
        weather[fault] = 0.0 if absent else rate * intensity
    return weather


class Faults:
    """The one source of chance while a schedule runs, and the count of what struck.

    `off` names kinds that never strike. A test that wants certain faults at certain points makes a
    subclass: the world asks `strikes` at every such point, in a fixed order, and `between` for
    every duration. `where` names the point, for people and for such tests.
    """

    def __init__(
        self,
        chance: random.Random,
        weather: Mapping[Fault, float] | None = None,
        off: Collection[Fault] = (),
    ) -> None:
        self.chance = chance
        self.weather = dict(weather or {})
        self.off = frozenset(off)
        self.fired: Counter[Fault] = Counter()
        self.is_calm = False
        self.tell: Callable[[Fault, str], None] = _nobody

    def strikes(self, fault: Fault, where: str = "") -> bool:
        """Say whether a fault strikes here and now; it is counted if it does."""
        drawn = self.chance.random() < self.weather.get(fault, 0.0)
        if not drawn or self.is_calm or fault in self.off:
            return False
        self.count(fault, where)
        return True

    def count(self, fault: Fault, where: str = "") -> None:
        """Count a fault that has struck."""
        self.fired[fault] += 1
        self.tell(fault, where)

    def between(self, low: float, high: float) -> float:
        """Draw a duration, in seconds."""
        return low + (high - low) * self.chance.random()

    def pick(self, what: Sequence[T]) -> T:
        """Draw one of several."""
        return what[int(self.chance.random() * len(what))]


def _nobody(fault: Fault, where: str) -> None:
    """Nobody is told."""
