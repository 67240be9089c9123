"""What a participant is asked, and what it can say.

A handler is given a `Call` and answers with an outcome:

===============================================  =================================================
the handler                                      the outcome
===============================================  =================================================
returns ``None``, JSON-able, bytes, `Payload`    `Done` with that result
returns ``Done(…)``                              `Done`
raises ``Rejected("card_declined", "…")``        `Rejected`: no effect, now or ever
returns ``InProgress(after_s=2)``                `InProgress`: ask again then
raises ``Broken("ledger_lost", "…")``            `Broken`: an operator must look
raises ``Heuristic(False, "expired")``           `Heuristic`: decided alone (two-phase commit)
raises anything else                             none: a gRPC error, *outcome unknown*
===============================================  =================================================

What is raised otherwise is named in the log by its type and its frames; its traceback is there at
level DEBUG alone, since its message may quote a payload.

Rejected, Broken and Heuristic may be returned as well as raised.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from amends.errors import InvalidOutcome, PayloadError
from amends.payload import Payload, encode

MAX_REASON: Final = 128
"""A reason is a word for programs; the runtime stores it with every step that ends in one."""

MAX_MESSAGE: Final = 4096
"""A message is a paragraph for people; a stack trace in it would bloat the saga's history."""


class Verb(enum.StrEnum):
    """What a participant is asked to do with an action."""

    PREPARE = "prepare"
    """Vote (two-phase commit only)."""
    EXECUTE = "execute"
    """Do it; in two-phase commit: commit."""
    COMPENSATE = "compensate"
    """Undo it; in two-phase commit: roll back."""


class Cause(enum.StrEnum):
    """Why a saga turned back."""

    UNSPECIFIED = "unspecified"
    """The runtime did not say."""
    REJECTED = "rejected"
    """A participant refused a step."""
    GAVE_UP = "gave_up"
    """A step's retries were used up and its outcome is unknown."""
    DEADLINE = "deadline"
    """The saga's deadline passed."""
    CANCELLED = "cancelled"
    """Somebody cancelled it."""
    WAIT_TIMED_OUT = "wait_timed_out"
    """A signal or child did not come in time."""
    CHILD_COMPENSATED = "child_compensated"
    """A child saga ended compensated."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why the saga turned back, for a compensation that wants to know."""

    cause: Cause
    """The kind of cause."""
    step: str
    """The step that caused it; empty for a deadline or a cancellation."""
    code: str
    """For programs: the participant's reason, for example ``card_declined``; may be empty."""
    message: str
    """For people; may be empty."""


class _Rest:
    """Where a call has what it came with and nobody has asked for yet; see `wire.py`."""

    __slots__ = ("_rest",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(_Rest):
    """One attempt of one verb of one step, as a handler sees it.

    Every attempt of the same verb, step and round has the same `idempotency_key`; pass it on to
    systems that cannot share your transaction. Its `repr` shows no payload.
    """

    verb: Verb
    """What is asked."""
    action: str
    """The business operation, for example ``charge``."""
    saga_id: str
    """The saga."""
    step: str
    """The step of the saga's definition."""
    round: int
    """Life of the step, from 1; a second begins only after a definite refusal."""
    idempotency_key: str
    """``store/saga/step/verb/round``; Compensate finds Execute's as `execute_key`."""
    store_id: str
    """Identity of the runtime's store; keeps two runtimes apart that share a participant."""
    input: bytes = field(default=b"", repr=False)
    """The saga's input."""
    content_type: str = ""
    """What the input is, for example ``application/json``."""
    results: Mapping[str, Payload] = field(default_factory=dict, repr=False)
    """Results of the earlier steps that this one uses, by step. Not to be changed."""
    executed: bool = False
    """Compensate only: the runtime has recorded `Done` for this step. False means *perhaps*."""
    own_result: Payload | None = field(default=None, repr=False)
    """Compensate only: what this step's Execute answered, if the runtime knows it."""
    reason: Reason | None = None
    """Compensate only: why the saga turned back."""
    attempt: int = 1
    """Number of the attempt, from 1. Not part of the key."""
    poll: bool = False
    """Asked again after `InProgress`, not sent for the first time."""
    deadline_at_ms: int = 0
    """When the runtime stops waiting for this attempt's reply, UTC; 0 if it did not say."""
    epoch: int = 0
    """Epoch of the runtime that sent it."""
    definition: str = ""
    """Name of the saga's definition."""
    two_phase: bool = False
    """The call belongs to a two-phase commit, in which Execute means commit."""
    traceparent: str = ""
    """W3C trace context of the attempt."""
    tracestate: str = ""
    """W3C trace state of the attempt."""
    incarnation: str = ""
    """Incarnation of the runtime's store."""
    oldest_open_at_ms: int = 0
    """When the oldest saga that is still open was started, UTC; 0 if unknown."""
    from_resolver: bool = False
    """Not sent by the runtime: this participant's own resolver has asked the runtime for its
    decision, and carries it out. See `InDoubtResolver`."""

    if not TYPE_CHECKING:  # or every misspelt attribute would pass

        def __getattr__(self, name: str) -> object:
            """Read a field when it is asked for the first time: most calls need few of them."""
            if name not in type(self).__dataclass_fields__:
                raise AttributeError(f"a Call has no {name!r}", name=name, obj=self)
            value = self._rest(name)
            object.__setattr__(self, name, value)
            return value

    @property
    def execute_key(self) -> str:
        """The `idempotency_key` that Execute of this step and round has; its own in Execute.

        By it a compensation finds in another system what its step's Execute may have done there.
        """
        if self.verb is Verb.EXECUTE:
            return self.idempotency_key
        return f"{self.store_id}/{self.saga_id}/{self.step}/{Verb.EXECUTE}/{self.round}"

    def json(self) -> Any:
        """Give the saga's input as JSON; no input is ``None``. Raises `PayloadError`."""
        return Payload(self.input, self.content_type).json()

    def result_json(self, step: str) -> Any:
        """Give the JSON result of an earlier step.

        Raises `PayloadError` if it is not JSON, or if this step is not handed that result: then
        the definition's `uses` (default: all steps that this one comes after) does not name it.
        """
        if step not in self.results:
            handed = ", ".join(self.results) or "none"
            raise PayloadError(
                f"step {self.step!r} is not handed a result of {step!r} (it is handed: {handed}); "
                "see `after` and `uses` in the definition"
            )
        return self.results[step].json()

    def own_result_json(self) -> Any:
        """Give this step's own result as JSON, in a compensation; ``None`` if it is not known."""
        return None if self.own_result is None else self.own_result.json()


@dataclass(frozen=True, slots=True, init=False)
class Done:
    """The action took effect, now or at an earlier attempt.

    Takes any value that `amends.payload.encode` takes; raises its `PayloadError`.
    """

    result: Payload | None
    """Handed to later steps and to the step's own compensation."""

    def __init__(self, result: object = None) -> None:
        object.__setattr__(self, "result", None if result is None else encode(result))


def legible(text: str) -> str:
    """Give a text that every message can carry; half a character becomes a question mark."""
    return text.encode(errors="replace").decode()


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and 0 < len(value) <= MAX_REASON


class _Refusal(Exception):
    """What all of these have in common: a reason for programs, a message for people.

    Raises `InvalidOutcome` for a reason that is none; a message that is too long is cut.
    """

    def __init__(self, reason: str, message: str = "") -> None:
        if not _is_word(reason):
            raise InvalidOutcome(
                f"the reason of {type(self).__name__} is for programs: 1 to {MAX_REASON} ASCII "
                "characters, for example card_declined"
            )
        text = legible(str(message))
        self.reason = reason
        """For programs, for example ``card_declined``."""
        self.message = text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
        """For people; cut to `MAX_MESSAGE` characters. Shown in the history: no secrets."""
        super().__init__(self.reason, self.message)

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}" if self.message else self.reason


class Rejected(_Refusal):
    """Definite: this action has no effect and never will have; the saga turns back.

    Everything that the handler wrote in its transaction is rolled back. Not an answer to
    Compensate, which must succeed in the end.
    """


class Broken(_Refusal):
    """The participant cannot keep its contract; the step is stuck until an operator looks.

    Everything that the handler wrote in its transaction is rolled back, and nothing is stored.
    """


class Heuristic(_Refusal):
    """The participant decided alone, after its vote.

    An answer to Execute and Compensate of a two-phase commit, and to nothing else. Say it when
    something outside the protocol has committed or rolled back what was prepared: a person, or a
    limit of the system behind it. `committed` says which, whatever the runtime asked for. Where
    that is contrary to its decision the runtime records and shows it at once, the other
    participants are still told the decision, and the saga ends ``MIXED``.

    It reports what has happened and is no way to make it happen: everything that the handler wrote
    in its transaction is rolled back, and the report is stored, so that a repeated call is answered
    the same.
    """

    def __init__(self, committed: bool, reason: str, message: str = "") -> None:  # noqa: FBT001
        if not isinstance(committed, bool):
            raise InvalidOutcome(
                "Heuristic(committed, reason): say True if the participant committed alone, False "
                "if it rolled back"
            )
        super().__init__(reason, message)
        self.committed = committed
        """True if it committed, False if it rolled back."""
        self.args = (committed, self.reason, self.message)  # what a copy is made of

    def __str__(self) -> str:
        return f"{'committed' if self.committed else 'rolled back'} alone: {super().__str__()}"


@dataclass(frozen=True, slots=True)
class InProgress:
    """Not finished: the runtime is to ask again with the same key and attempt.

    Nothing that the handler wrote in its transaction is kept.
    """

    after_s: float = 1.0
    """When to ask again, in seconds from now; at least 1 ms and at most a day is waited."""

    def __post_init__(self) -> None:
        # Wider than its annotation: what an author without a type checker may give.
        after_s: object = self.after_s
        if isinstance(after_s, bool) or not isinstance(after_s, int | float):
            kind = type(after_s).__name__
            raise InvalidOutcome(f"InProgress(after_s=…): a {kind} is no number of seconds")
        if not 0 <= after_s < math.inf:
            raise InvalidOutcome(f"InProgress(after_s={after_s}): give finite seconds from now")


Outcome: TypeAlias = Done | Rejected | InProgress | Broken | Heuristic
"""What a participant says of an attempt."""
