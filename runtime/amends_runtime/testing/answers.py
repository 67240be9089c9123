"""What a scripted action can answer, besides what a real one can.

==============================  ====================================================================
answer                          what happens
==============================  ====================================================================
a value, ``amends.Done(…)``     the action takes effect
``amends.Rejected("…")``        it is refused: no effect
``amends.InProgress(5)``        not finished; asked again after that time
``amends.Broken("…")``          the contract cannot be kept: the step is stuck; as a vote it is a
                                no, and after one the vote is broken
``amends.Heuristic(True, "…")`` it has decided alone after its vote: committed, or rolled back
``Status("UNAVAILABLE")``       a gRPC error; nothing took effect, but nobody can know that
``NoReply()``                   nothing comes back before the deadline; nothing took effect
``LostReply(value)``            it takes effect, and the reply gets lost; asked again, the barrier
                                answers
``Slow(seconds, answer)``       it works for so long, also if nobody waits for it any more, and then
                                answers
==============================  ====================================================================
"""

from __future__ import annotations

import difflib
import inspect
import math
from dataclasses import dataclass
from typing import Final, TypeAlias

import grpc

import amends
from amends.payload import encode
from amends_runtime.testing.errors import InvalidScript

__all__ = ["LostReply", "NoReply", "Prepared", "Slow", "Status", "prepared"]

_STATUSES: Final = tuple(sorted(code.name for code in grpc.StatusCode if code.name != "OK"))


@dataclass(frozen=True, slots=True)
class Status:
    """The call ends with a gRPC error status and nothing took effect. The runtime cannot know that.

    Raises `InvalidScript` for a name that is no error status.
    """

    name: str = "UNAVAILABLE"
    """The status, for example ``UNAVAILABLE``, ``UNIMPLEMENTED`` or ``UNKNOWN``."""
    message: str = ""
    """What the participant says with it."""

    def __post_init__(self) -> None:
        if self.name not in _STATUSES:
            near = difflib.get_close_matches(str(self.name).upper(), _STATUSES, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"they are: {', '.join(_STATUSES)}"
            raise InvalidScript(f"{self.name!r} is not a gRPC error status; {known}")


@dataclass(frozen=True, slots=True)
class NoReply:
    """Nothing comes back before the attempt's deadline, and nothing took effect."""


@dataclass(frozen=True, slots=True)
class LostReply:
    """The action takes effect as `answer` says, and the connection breaks before the reply.

    Asked again, the barrier answers what was lost, and that arrives.
    """

    answer: object = None
    """A value, `amends.Done` or `amends.Rejected`."""


@dataclass(frozen=True, slots=True)
class Slow:
    """The action works for `seconds` and then answers, whether or not the runtime still waits.

    Asked again meanwhile, the barrier answers InProgress. An effect that comes after the attempt's
    deadline is one that the runtime hears of only by asking again.
    """

    seconds: float
    """How long it works, in virtual time."""
    answer: object = None
    """Any other answer."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise InvalidScript(f"Slow({self.seconds}): give finite seconds")


Prepared: TypeAlias = (
    amends.Done
    | amends.Rejected
    | amends.InProgress
    | amends.Broken
    | amends.Heuristic
    | Status
    | NoReply
    | LostReply
    | Slow
)
"""An answer in which plain values have become Done."""


def prepared(answer: object, verb: amends.Verb) -> Prepared:
    """The answer, checked for the verb that it is for.

    Raises `InvalidScript`, and `amends.PayloadError` for a value that cannot be a result.
    """
    match answer:
        case amends.Rejected() if verb is amends.Verb.COMPENSATE:
            raise InvalidScript(
                "a compensation cannot be refused: let it fail for a while, Status(…), or for good,"
                " amends.Broken(…)"
            )
        case amends.Heuristic() if verb is amends.Verb.PREPARE:
            raise InvalidScript(
                "a vote is not decided alone: amends.Heuristic is an answer to Execute and"
                " Compensate of a two-phase commit"
            )
        case amends.Heuristic():
            return answer
        case amends.Done() | amends.Rejected() | amends.InProgress() | amends.Broken():
            return answer
        case Status() | NoReply():
            return answer
        case LostReply(answer=inner):
            settled = prepared(inner, verb)
            if not isinstance(settled, amends.Done | amends.Rejected):
                raise InvalidScript(
                    "a LostReply is made of what decides: a value, Done or Rejected, not of"
                    f" {type(inner).__name__}"
                )
            return LostReply(settled)
        case Slow(seconds=seconds, answer=inner):
            worked = prepared(inner, verb)
            if isinstance(worked, Slow):
                return Slow(seconds + worked.seconds, worked.answer)
            return Slow(seconds, worked)
        case None:
            return amends.Done()
        case BaseException() | type():
            raise InvalidScript(
                f"{answer!r} is not an answer: an instance of amends.Rejected or amends.Broken is;"
                " anything else that a handler may raise, let a handler raise it"
            )
        case _ if inspect.isroutine(answer):
            raise InvalidScript(
                "a function is not an answer: use it as a handler, as in"
                ' `@participant.execute("charge")`'
            )
        case _:
            return amends.Done(encode(answer))
