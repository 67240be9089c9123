"""Makes go wrong what the switches say, and writes down each time that it did.

It stands between the wire and the barrier, so the services' own code knows nothing of it, and what
goes wrong goes wrong where it does in life: before the transaction, in it, or after its commit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

import anyio

import amends
from amends.barrier.port import completes_votes
from amends.handler import Handler
from amends.outcomes import Outcome
from shop import bank
from shop.catalogue import ACTIONS
from shop.switches import Fault, SwitchBoard

_FILE_MODE: Final = 0o644

LOOK_EVERY_S: Final = 0.02
"""How often who is held looks whether the switches have changed."""

_OPERATIONS: Final = {
    amends.Verb.PREPARE: "prepare",
    amends.Verb.EXECUTE: "commit",
    amends.Verb.COMPENSATE: "roll_back",
}
"""What a branch's verbs are called in the switches, before the action's name."""

_CONTRARY: Final = {
    amends.Verb.EXECUTE: amends.Verb.COMPENSATE,
    amends.Verb.COMPENSATE: amends.Verb.EXECUTE,
}


class FaultLog:
    """The faults that struck, one JSON object a line; survives a kill of the process.

    Each line has `at_ms` (UTC), `service`, `fault`, and, except for ``down``, `operation`,
    `saga_id`, `step` and `attempt`.
    """

    def __init__(self, path: Path, service: str) -> None:
        self._service = service
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, _FILE_MODE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def write(self, fault: str, operation: str = "", call: amends.Call | None = None) -> None:
        """Write down that a fault struck."""
        line: dict[str, Any] = {
            "at_ms": time.time_ns() // 1_000_000,
            "service": self._service,
            "fault": fault,
        }
        if call is not None:
            line |= {
                "operation": operation,
                "saga_id": call.saga_id,
                "step": call.step,
                "attempt": call.attempt,
            }
        # One write of one line: whatever is killed, the lines before it stay whole.
        os.write(self._file, json.dumps(line).encode() + b"\n")


def count_faults(path: Path) -> Counter[str]:
    """Count the faults in a log as ``"charge lose_reply"`` and ``"payments down"``.

    A missing log is one without faults. A last line that a kill has cut off is not counted.
    """
    return Counter(
        f"{entry.get('operation') or entry['service']} {entry['fault']}" for entry in _read(path)
    )


def broken_votes(paths: Iterable[Path]) -> set[str]:
    """Name the sagas of which a branch was made to break its vote, by the logs of the faults.

    It is written down before it is done: of one that was killed in between, nothing is broken yet.
    """
    return {
        entry["saga_id"]
        for path in paths
        for entry in _read(path)
        if entry["fault"] == Fault.BREAK_VOTE
    }


def _read(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


class FaultyBarrier:
    """A barrier behind which things go wrong as the switches say.

    `handlers` are the participant's: whoever breaks a vote needs the one of the contrary verb.
    """

    def __init__(
        self,
        inner: amends.Barrier,
        board: SwitchBoard,
        log: FaultLog,
        *,
        handlers: Mapping[tuple[str, amends.Verb], Handler] = MappingProxyType({}),
    ) -> None:
        self._inner = inner
        self._board = board
        self._log = log
        self._handlers = handlers
        self.transaction_types = inner.transaction_types
        self.completes_votes = completes_votes(inner)

    async def open(self) -> None:
        """Open the barrier behind."""
        await self._inner.open()

    async def aclose(self) -> None:
        """Close the barrier behind."""
        await self._inner.aclose()

    async def write(self, work: Callable[[Any], Any]) -> Any:
        """Run `work` in a transaction of the barrier behind, if it has such."""
        inner: Any = self._inner
        return await inner.write(work)

    async def run(self, call: amends.Call, handler: Handler | None) -> Outcome:
        """Answer one call as the barrier behind does, unless a fault strikes."""
        operation = _operation(call)
        if operation is None or call.from_resolver:  # which is no call on any wire
            return await self._inner.run(call, handler)
        attempt = f"{call.saga_id}/{call.step}/{call.round}/{call.attempt}"
        if self._strikes(Fault.SLOW, operation, attempt, call):
            await anyio.sleep(self._board.slow_s(operation))
        await self._hold(Fault.HOLD, operation, attempt, call)
        if self._strikes(Fault.FAIL_BEFORE, operation, attempt, call):
            raise amends.BarrierError("a switch says so: nothing was done")
        if self._strikes(Fault.BREAK_VOTE, operation, attempt, call):
            await self._break_vote(call)
        if handler is not None and call.verb is _DECLINED_AT[call.two_phase]:
            handler = self._declining(handler, operation)
        outcome = await self._inner.run(call, handler)
        if isinstance(outcome, amends.InProgress):
            return outcome
        if self._strikes(Fault.LOSE_REPLY, operation, attempt, call):
            # What a caller sees whose connection broke: UNAVAILABLE, and no outcome.
            raise amends.BarrierError("a switch says so: it was done, and the reply is lost")
        await self._hold(Fault.HOLD_REPLY, operation, attempt, call)
        return outcome

    async def _hold(self, fault: Fault, operation: str, what: str, call: amends.Call) -> None:
        """Wait until the switches change, if they say so."""
        version = self._board.version()
        if self._strikes(fault, operation, what, call):
            # The file's next change sets no event of ours.
            while self._board.version() == version:  # noqa: ASYNC110
                await anyio.sleep(LOOK_EVERY_S)

    async def _break_vote(self, call: amends.Call) -> None:
        """Do the contrary of what was decided, as somebody would who is tired of waiting.

        The barrier behind then answers the call as it does in life. If there is nothing that could
        be broken, such as a vote that was no, this does nothing.
        """
        verb = _CONTRARY[call.verb]
        contrary = dataclasses.replace(
            call,
            verb=verb,
            idempotency_key=f"{call.store_id}/{call.saga_id}/{call.step}/{verb}/{call.round}",
            executed=True,
            from_resolver=True,
        )
        handler = self._handlers.get((call.action, verb))
        await self._inner.run(contrary, handler)

    def _declining(self, handler: Handler, operation: str) -> Handler:
        """Let the handler refuse where the switches say so; the barrier keeps the refusal."""
        function = handler.function

        def decline(call: amends.Call) -> None:
            step = f"{call.saga_id}/{call.step}/{call.round}"
            if self._strikes(Fault.DECLINE, operation, step, call):
                raise amends.Rejected(_refusal(call.action), "a switch says so")

        def decline_or_answer(call: amends.Call, *transaction: object) -> object:
            decline(call)
            return function(call, *transaction)

        async def decline_or_answer_async(call: amends.Call, *transaction: object) -> object:
            decline(call)
            answer: Any = function(call, *transaction)
            return await answer

        chosen = decline_or_answer_async if handler.is_async else decline_or_answer
        return dataclasses.replace(handler, function=chosen)

    def _strikes(self, fault: Fault, operation: str, what: str, call: amends.Call) -> bool:
        strikes = self._board.strikes(fault, operation, what)
        if strikes:
            self._log.write(fault, operation, call)
        return strikes


_DECLINED_AT: Final = {False: amends.Verb.EXECUTE, True: amends.Verb.PREPARE}
"""The verb that may be refused, by whether it is a two-phase commit."""


def _operation(call: amends.Call) -> str | None:
    """Name what a call does as the switches do; None for what nobody here knows."""
    if call.action in bank.REFUSALS:
        return f"{_OPERATIONS[call.verb]}_{call.action}"
    action = ACTIONS.get(call.action)
    if action is None:
        return None
    return action.undo if call.verb is amends.Verb.COMPENSATE else action.effect


def _refusal(action: str) -> str:
    return bank.REFUSALS[action] if action in bank.REFUSALS else ACTIONS[action].refusal
