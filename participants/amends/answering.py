"""What a call is answered with: an outcome, or an error that decides nothing.

The rules that hold however a call has come: by a unary verb (`servicer.py`) or over a stream
(`exchange.py`). Only an outcome decides; every error status leaves it open and the runtime asks
again. Logs and errors name ids, never payloads; only the tracebacks of failed handlers, logged at
DEBUG, may quote one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import grpc

from amends.admission import Admission
from amends.barrier import Barrier
from amends.barrier.absent import NoBarrier
from amends.barrier.port import completes_votes
from amends.errors import AmendsError, BarrierError, HandlerFailed, NotCompensatable
from amends.handler import Handler
from amends.outcomes import Broken, Call, Heuristic, Outcome, Verb, legible
from amends.tracing import CallSpan
from amends.v1 import participant_pb2
from amends.wire import Said, call_from_wire, faults_in_call, put_outcome

logger = logging.getLogger(__name__)

MAX_SHOWN: Final = 48
"""Characters of a name that is not ours; a real one has no more."""

MAX_ERROR: Final = 4096
"""Bytes of an error's message, as gRPC writes them. A unary call's lie in its trailers, of which
gRPC takes 8 KiB: with more, the caller would be told RESOURCE_EXHAUSTED and not what happened."""

MAX_WRITTEN: Final = 4 * len("%00")
"""Bytes that gRPC writes for one character at most."""

CUT: Final = "…"
"""Ends a message that was longer."""


@dataclass(frozen=True, slots=True)
class NoOutcome:
    """The gRPC error that stands for an unknown outcome."""

    code: grpc.StatusCode
    message: str
    """For people. Whatever it is made of, every message can carry it; cut to `MAX_ERROR` bytes."""
    kind: str = ""
    """Type of the exception behind it, if there is one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", _fitting(self.message))


class Answering:
    """Admits the calls of one participant and asks its handlers, through its barrier."""

    def __init__(
        self,
        name: str,
        handlers: Mapping[tuple[str, Verb], Handler],
        barrier: Barrier,
        *,
        aliases: Collection[str],
        max_concurrent: int,
    ) -> None:
        self.admission = Admission(max_concurrent)
        self.name = name
        self._aliases = sorted(aliases)
        # An older runtime does not say whom it calls.
        self._answers_to = frozenset(("", name, *aliases))
        self._handlers = handlers
        self._barrier = barrier
        # What Execute and Compensate of an action are known by, if they have no handler.
        self._completed = frozenset(
            action for action, verb in handlers if verb is Verb.PREPARE and completes_votes(barrier)
        )

    def refuse_stranger(self, participant: str) -> NoOutcome | None:
        """Refuse what is meant for another participant than this one."""
        if participant not in self._answers_to:
            return NoOutcome(grpc.StatusCode.UNIMPLEMENTED, self._not_for_us(participant))
        return None

    def refuse_when_draining(self) -> NoOutcome | None:
        """Refuse what comes after the end has begun."""
        if self.admission.is_draining:
            return NoOutcome(
                grpc.StatusCode.UNAVAILABLE,
                f"participant {self.name} is shutting down and takes no new calls",
            )
        return None

    def refuse_when_interrupted(self) -> NoOutcome:
        """Say why calls under way have no answer when something ends the process."""
        return NoOutcome(
            grpc.StatusCode.UNAVAILABLE, f"participant {self.name} ends: its process is interrupted"
        )

    def admit(
        self,
        message: participant_pb2.Call | None,
        verb: Verb | None,
        said: Said | None = None,
        deadline_at_ms: int = 0,
    ) -> Call | NoOutcome:
        """Refuse what cannot be answered; else give the call, which then needs a place.

        `verb` is that of the method, or on a stream that of the message; None if that has none.
        `message` is None where a request has no call; `said` and `deadline_at_ms` stand for what
        the calls of a stream leave out.
        """
        refusal = self.refuse_when_draining()
        if refusal is not None:
            return refusal
        if self.admission.is_full():
            return NoOutcome(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"participant {self.name} has {self.admission.inside} calls under way or waiting; "
                "nothing was done",
            )
        if message is None:
            return NoOutcome(grpc.StatusCode.INVALID_ARGUMENT, "call is missing")
        faults = faults_in_call(message, verb, said)
        if faults:
            return NoOutcome(grpc.StatusCode.INVALID_ARGUMENT, "; ".join(faults))
        call = call_from_wire(message, said, deadline_at_ms)
        # A stream has been asked for its name by then, and a call on it names nobody.
        stranger = self.refuse_stranger(message.participant)
        if stranger is not None:
            logger.error("%s: refused: %s", _ids(call), stranger.message)
            return stranger
        return call

    async def ask(self, call: Call) -> Outcome | NoOutcome:
        """Have a call answered that holds a place.

        Raises nothing but its own cancellation, and what ends the process.
        """
        handler = self._handlers.get((call.action, call.verb))
        if handler is None and not self._knows_without_handler(call):
            return NoOutcome(grpc.StatusCode.UNIMPLEMENTED, self._unknown(call))
        try:
            outcome = await self._barrier.run(call, handler)
        except asyncio.CancelledError:
            logger.info("%s: the caller left or its deadline passed", _ids(call))
            raise
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  # whatever it is, the outcome is unknown
            return self._explain(call, error)
        if isinstance(outcome, Broken):
            logger.error("%s: broken: %s", _ids(call), outcome)
        elif isinstance(outcome, Heuristic):
            logger.error("%s: decided alone: %s", _ids(call), outcome)
        return outcome

    def _knows_without_handler(self, call: Call) -> bool:
        """Tell whether the barrier alone may have an answer."""
        if call.action in self._completed:
            return True
        if call.verb is not Verb.COMPENSATE:
            return False
        # An action without a compensation still has a barrier, which knows whether there is
        # anything to undo.
        if (call.action, Verb.EXECUTE) in self._handlers:
            return True
        # A vote that nobody here could give (its action is misspelt, or not there any more) was
        # none, and its roll back must come to an end: others' locks may wait for that.
        return call.two_phase and not call.executed and not isinstance(self._barrier, NoBarrier)

    def put(self, outcome: Outcome, message: participant_pb2.Outcome) -> NoOutcome | None:
        """Write an outcome into an empty message; what keeps it from being written is returned."""
        try:
            put_outcome(outcome, message)
        except Exception as error:  # noqa: BLE001  # an outcome that nobody can read is none
            kind = type(error).__name__
            logger.critical("an outcome cannot be sent: %s", kind)
            return NoOutcome(grpc.StatusCode.INTERNAL, f"the outcome cannot be sent: {kind}", kind)
        return None

    def _explain(self, call: Call, error: BaseException) -> NoOutcome:
        """Log why there is no outcome, and give the status that says so."""
        kind = type(error).__name__
        said = _said(error)
        # At DEBUG alone: the message of an author's exception may quote a payload.
        logger.debug("%s: the traceback of what follows", _ids(call), exc_info=error)
        match error:
            case HandlerFailed():
                logger.error("%s: outcome unknown: %s [at %s]", _ids(call), said, error.where)
                message = f"{said}; see the log of participant {self.name}"
                # What gRPC makes of a handler that raises, in every language. It says nothing about
                # the endpoint, so it opens no breaker: one action's fault is not its neighbours'.
                return NoOutcome(grpc.StatusCode.UNKNOWN, message, error.cause_type or kind)
            case NotCompensatable():
                if (call.action, Verb.EXECUTE) not in self._handlers:
                    said = self._unknown(call)
                logger.error("%s: %s", _ids(call), said)
                return NoOutcome(grpc.StatusCode.UNIMPLEMENTED, said, kind)
            case BarrierError():
                logger.error("%s: outcome unknown: %s", _ids(call), said)
                return NoOutcome(grpc.StatusCode.UNAVAILABLE, said, kind)
            case AmendsError():
                logger.error("%s: outcome unknown: %s", _ids(call), said)
                return NoOutcome(grpc.StatusCode.UNKNOWN, said, kind)
            case _:
                # A fault of our own. Its message may quote anything, so only its type is told.
                logger.critical("%s: outcome unknown: the SDK failed: %s", _ids(call), kind)
                return NoOutcome(grpc.StatusCode.INTERNAL, f"the SDK failed: {kind}", kind)

    def _not_for_us(self, participant: str) -> str:
        name = repr(self.name)
        also = f" (or {', '.join(map(repr, self._aliases))})" if self._aliases else ""
        wanted = repr(participant[:MAX_SHOWN])
        return (
            f"this is participant {name}{also}, and the call is for {wanted}: is the address of "
            f"{wanted} right? (amends participants add {wanted[1:-1]}=HOST:PORT) If it is, {name} "
            f"needs the alias {wanted}"
        )

    def _unknown(self, call: Call) -> str:
        verbs = ", ".join(f"{verb} {action}" for action, verb in sorted(self._handlers))
        return (
            f"participant {self.name} has no {call.verb} for action {call.action!r}; it has: "
            f"{verbs}"
        )


def tell(span: CallSpan, outcome: Outcome | NoOutcome) -> None:
    """Say in a call's span what it is answered with."""
    if isinstance(outcome, NoOutcome):
        span.failed(outcome.code.name, outcome.kind)
    else:
        span.decided(outcome)


def _said(error: BaseException) -> str:
    """Give the message of one of our errors, which an author may have made."""
    try:
        return _fitting(str(error))
    except Exception:  # noqa: BLE001  # a message that cannot be had is none
        return type(error).__name__


def _fitting(text: str) -> str:
    """Make a message one that gRPC takes: UTF-8, and no more than `MAX_ERROR` bytes of it."""
    text = legible(text[: MAX_ERROR + 1])
    if len(text) * MAX_WRITTEN <= MAX_ERROR:
        return text
    room = MAX_ERROR - _written(CUT)
    for place, one in enumerate(text):
        room -= _written(one)
        if room < 0:
            return text[:place] + CUT
    return text


def _written(text: str) -> int:
    """Count the bytes that gRPC writes for a character: what is not plain ASCII is quoted."""
    return 1 if " " <= text <= "~" and text != "%" else len("%00") * len(text.encode())


def _ids(call: Call) -> str:
    return (
        f"{call.verb} {call.action} saga={call.saga_id} step={call.step} round={call.round} "
        f"attempt={call.attempt}"
    )
