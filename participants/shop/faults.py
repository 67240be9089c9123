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
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import anyio

import amends
from amends.handler import Handler
from amends.outcomes import Outcome
from shop.catalogue import ACTIONS
from shop.switches import Fault, SwitchBoard

_FILE_MODE: Final = 0o644


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
    counted: Counter[str] = Counter()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return counted
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        counted[f"{entry.get('operation') or entry['service']} {entry['fault']}"] += 1
    return counted


class FaultyBarrier:
    """A barrier behind which things go wrong as the switches say."""

    def __init__(self, inner: amends.Barrier, board: SwitchBoard, log: FaultLog) -> None:
        self._inner = inner
        self._board = board
        self._log = log
        self.transaction_types = inner.transaction_types

    async def open(self) -> None:
        """Open the barrier behind."""
        await self._inner.open()

    async def aclose(self) -> None:
        """Close the barrier behind."""
        await self._inner.aclose()

    async def run(self, call: amends.Call, handler: Handler | None) -> Outcome:
        """Answer one call as the barrier behind does, unless a fault strikes."""
        operation = _operation(call)
        if operation is None:
            return await self._inner.run(call, handler)
        attempt = f"{call.saga_id}/{call.step}/{call.round}/{call.attempt}"
        if self._strikes(Fault.SLOW, operation, attempt, call):
            await anyio.sleep(self._board.slow_s(operation))
        if self._strikes(Fault.FAIL_BEFORE, operation, attempt, call):
            raise amends.BarrierError("a switch says so: nothing was done")
        if handler is not None and call.verb is amends.Verb.EXECUTE:
            handler = self._declining(handler, operation)
        outcome = await self._inner.run(call, handler)
        if not isinstance(outcome, amends.InProgress) and self._strikes(
            Fault.LOSE_REPLY, operation, attempt, call
        ):
            # What a caller sees whose connection broke: UNAVAILABLE, and no outcome.
            raise amends.BarrierError("a switch says so: it was done, and the reply is lost")
        return outcome

    def _declining(self, handler: Handler, operation: str) -> Handler:
        """Let the handler refuse where the switches say so; the barrier keeps the refusal."""
        assert not handler.is_async, "the shop's handlers are `def`"
        function = handler.function

        def decline_or_answer(call: amends.Call, *transaction: object) -> object:
            step = f"{call.saga_id}/{call.step}/{call.round}"
            if self._strikes(Fault.DECLINE, operation, step, call):
                raise amends.Rejected(ACTIONS[call.action].refusal, "a switch says so")
            return function(call, *transaction)

        return dataclasses.replace(handler, function=decline_or_answer)

    def _strikes(self, fault: Fault, operation: str, what: str, call: amends.Call) -> bool:
        strikes = self._board.strikes(fault, operation, what)
        if strikes:
            self._log.write(fault, operation, call)
        return strikes


def _operation(call: amends.Call) -> str | None:
    """Name what a call does as the ledger does; None for what the shop doesn't know."""
    action = ACTIONS.get(call.action)
    if action is None:
        return None
    return action.undo if call.verb is amends.Verb.COMPENSATE else action.effect
