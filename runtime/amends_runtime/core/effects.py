"""Effects: what is to be done once the records of a turn are durable, in the imperative.

An effect is a value, compared by content: a turn's effects are those that `saga.owed` names after
it and did not name before. Performing one twice is harmless by design (rule 6 of the semantics).
"""

from __future__ import annotations

import msgspec

from amends_runtime.core.records import Verb

__all__ = ["CallParticipant", "Effect", "PollNow", "PollParticipant", "WakeAt", "WithdrawCall"]


class CallParticipant(msgspec.Struct, frozen=True, gc=False):
    """Hand this attempt to its participant's lane."""

    step: int
    verb: Verb
    round: int
    attempt: int


class PollParticipant(msgspec.Struct, frozen=True, gc=False):
    """Ask the same attempt again at `at_ms`, after InProgress.

    `sent_at_ms` and `sent_us` are when it was sent for the first time and `held_ms` how long it had
    been held then (see `Timing`), `polls` is how often it will have been asked.
    """

    step: int
    verb: Verb
    round: int
    attempt: int
    at_ms: int
    sent_at_ms: int
    polls: int
    held_ms: int = 0
    sent_us: int = 0


class PollNow(msgspec.Struct, frozen=True, gc=False):
    """Ask this attempt at once, if it is in progress and was to be asked again much later."""

    step: int
    verb: Verb
    round: int
    attempt: int


class WithdrawCall(msgspec.Struct, frozen=True, gc=False):
    """Take this attempt out of its lane if it was never sent; the lane then answers with NotSent.

    One that is being polled is asked at its deadline at the latest; one on the wire is left to its
    reply or its deadline.
    """

    step: int
    verb: Verb
    round: int
    attempt: int


class WakeAt(msgspec.Struct, frozen=True, gc=False):
    """Send Wake at this instant. It may come early, never not at all."""

    at_ms: int


Effect = CallParticipant | PollParticipant | PollNow | WithdrawCall | WakeAt
