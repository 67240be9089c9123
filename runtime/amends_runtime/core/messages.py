"""Messages: what a saga's mailbox can hold, in the imperative or as news.

`saga.decide` answers every one of them in every state; what a state does not expect is either
refused by name (`IllegalMessage`) or is a no-op whose reason stands at the rule.
"""

from __future__ import annotations

from typing import Final

import msgspec

from amends_runtime.core.effects import PollParticipant
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Failure, Verb

__all__ = [
    "BREAKER_OPEN",
    "NO_PARTICIPANT",
    "AbandonSaga",
    "Answered",
    "Broken",
    "CancelSaga",
    "Done",
    "Heuristic",
    "InProgress",
    "Message",
    "NotSent",
    "Outcome",
    "Rejected",
    "RetrySaga",
    "Revived",
    "RuntimeRestarted",
    "StartSaga",
    "Unknown",
    "Wake",
]


BREAKER_OPEN: Final = "BREAKER_OPEN"
"""A vote was not asked for: the participant's calls have been failing."""

NO_PARTICIPANT: Final = "NO_PARTICIPANT"
"""A vote was not asked for: the participant is not registered."""


class Done(msgspec.Struct, frozen=True, gc=False):
    """It took effect, now or at an earlier attempt.

    `left_out` says why the result of a commit is not here, if it was too large to be taken in: it
    is committed all the same.
    """

    result: Payload = Payload()
    left_out: Failure | None = None


class Rejected(msgspec.Struct, frozen=True, gc=False):
    """It has no effect and never will."""

    reason: str
    message: str = ""


class InProgress(msgspec.Struct, frozen=True, gc=False):
    """Not finished: ask again after so long."""

    poll_after_ms: int


class Broken(msgspec.Struct, frozen=True, gc=False):
    """The participant cannot keep the contract."""

    reason: str
    message: str = ""


class Heuristic(msgspec.Struct, frozen=True, gc=False):
    """The participant of a two-phase commit decided alone, whatever it had voted."""

    committed: bool
    reason: str
    message: str = ""


class Unknown(msgspec.Struct, frozen=True, gc=False):
    """No outcome: an error status, a time-out, or a reply that cannot be read.

    `misconfigured` marks what a retry alone is unlikely to mend: a missing method, bad credentials.
    """

    reason: str
    message: str = ""
    misconfigured: bool = False


Outcome = Done | Rejected | InProgress | Broken | Heuristic | Unknown


class StartSaga(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Begin. Only the first message of a saga; `epoch` is the runtime's."""

    saga_id: str
    content_hash: str
    input: Payload
    deadline_at_ms: int = 0
    labels: dict[str, str] = {}
    traceparent: str = ""


class Answered(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An attempt that was sent has ended. `sent_at_ms` is when it was sent for the first time.

    `held_ms`, `sent_us` and `answered_us` are those of `Timing`.

    `probe` marks one that was sent to see whether the participant is back, and nobody was there.
    """

    step: int
    verb: Verb
    round: int
    attempt: int
    sent_at_ms: int
    answered_at_ms: int
    status: str
    polls: int
    outcome: Outcome
    probe: bool = False
    held_ms: int = 0
    sent_us: int = 0
    answered_us: int = 0


class NotSent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An attempt was taken out of its lane before it was sent.

    `reason` says why, where it was not withdrawn: BREAKER_OPEN or NO_PARTICIPANT, for a vote, which
    is not to wait.
    """

    step: int
    verb: Verb
    round: int
    attempt: int
    reason: str = ""


class Wake(msgspec.Struct, frozen=True, gc=False):
    """It may be time for something. A spurious one does nothing.

    `due_at_ms` is the instant that was waited for. It has come, whatever the wall clock says by the
    time that the message is decided: a clock that stepped back in between must not make this the
    wake-up that nobody repeats.
    """

    due_at_ms: int = 0


class CancelSaga(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Turn back if that is still possible."""

    author: str = ""
    reason: str = ""


class RetrySaga(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Try a step now that is stuck or waits for its next attempt, or without `step` all of them.

    `revived` tells that deciding had failed before and works again: that alone is worth recording.
    A repeat has the same `request_id`, and does nothing; an empty one is nobody's.
    """

    step: int | None = None
    author: str
    reason: str
    revived: bool = False
    request_id: str = ""


class AbandonSaga(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """End as it is. Only a stuck saga does, unless by `force`."""

    author: str
    reason: str
    force: bool = False
    request_id: str = ""


class RuntimeRestarted(msgspec.Struct, frozen=True, gc=False):
    """The runtime that had this saga in memory is gone; so are its calls and timers.

    `restored`: the store came from a backup, which an operator has confirmed, and this was in it.
    So it may have gone on since, in a history that is lost.
    """

    restored: bool = False


class Revived(msgspec.Struct, frozen=True, gc=False):
    """The saga rested outside memory and is back: what it waits for is to be waited for again.

    `polls` are those of its attempts in progress, which were looked after meanwhile.
    """

    polls: tuple[PollParticipant, ...] = ()


Message = (
    StartSaga
    | Answered
    | NotSent
    | Wake
    | CancelSaga
    | RetrySaga
    | AbandonSaga
    | RuntimeRestarted
    | Revived
)
