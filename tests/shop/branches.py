"""The bank's branches in this process, over databases of a test's own, driven like by a runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import amends
from amends.barrier.port import Barrier
from amends.handler import Handler
from amends.payload import JSON
from shop.bank import EAST, FEES, WEST, WITH_FEE, Branch, Transfer, account
from shop.bank_east import make_bank_east
from shop.bank_fees import make_bank_fees
from shop.bank_west import make_bank_west
from shop.bank_witnesses import Books, read_bank
from shop.server import open_shop

STORE = "01919191-9191-7191-9191-919191919191"
INCARNATION = "02929292-9292-7292-9292-929292929292"

PREPARE, COMMIT, ROLL_BACK = amends.Verb.PREPARE, amends.Verb.EXECUTE, amends.Verb.COMPENSATE


def transfer(**changes: Any) -> Transfer:
    """Give a transfer from the east to the west that nobody refuses, with some fields changed."""
    fields: dict[str, Any] = {
        "payer": account(EAST, 1),
        "payee": account(WEST, 1),
        "cents": 700,
        "fee_cents": 30,
    }
    return Transfer(**(fields | changes))


def vote_call(
    verb: amends.Verb,
    action: str,
    *,
    saga_id: str = "saga-1",
    wanted: Transfer | None = None,
    round_: int = 1,
    attempt: int = 1,
    definition: str = WITH_FEE,
) -> amends.Call:
    """Make the call of one branch of a transfer; steps are named as their actions."""
    return amends.Call(
        verb=verb,
        action=action,
        saga_id=saga_id,
        step=action,
        round=round_,
        idempotency_key=f"{STORE}/{saga_id}/{action}/{verb}/{round_}",
        store_id=STORE,
        incarnation=INCARNATION,
        definition=definition,
        two_phase=True,
        executed=verb is ROLL_BACK,
        attempt=attempt,
        input=json.dumps((wanted or transfer()).to_json()).encode(),
        content_type=JSON,
    )


class Bank:
    """The three branches with their barriers."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self.folder = folder
        self._dsn = dsn
        self._stack = AsyncExitStack()
        self.branches: Mapping[str, Branch] = {
            EAST: make_bank_east(dsn),
            WEST: make_bank_west(folder / f"{WEST}.db"),
            FEES: make_bank_fees(folder / f"{FEES}.db"),
        }

    async def __aenter__(self) -> Self:
        for name, branch in self.branches.items():
            barrier = branch.participant.barrier
            await barrier.open()
            self._stack.push_async_callback(barrier.aclose)
            await open_shop(name, barrier)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def books(self) -> dict[str, Books]:
        """Read all branches as the auditor does."""
        return read_bank(self.folder, self._dsn)

    def held(self) -> dict[str, int]:
        """Count what each branch holds, where it holds something."""
        return {name: len(each.held) for name, each in self.books().items() if each.held}

    def handlers(self, branch: str) -> dict[tuple[str, amends.Verb], Handler]:
        """Give a branch's handlers."""
        return self.branches[branch].participant.handlers()

    async def ask(
        self, branch: str, call: amends.Call, *, barrier: Barrier | None = None
    ) -> object:
        """Send one call through the branch's barrier, or another before it; gives the outcome."""
        through = barrier or self.branches[branch].participant.barrier
        return await through.run(call, self.handlers(branch).get((call.action, call.verb)))

    async def say(
        self,
        branch: str,
        verb: amends.Verb,
        action: str,
        *,
        saga_id: str = "saga-1",
        wanted: Transfer | None = None,
    ) -> str:
        """Send one call; gives ``done``, or the reason of what else was said."""
        outcome = await self.ask(branch, vote_call(verb, action, saga_id=saga_id, wanted=wanted))
        return "done" if isinstance(outcome, amends.Done) else str(getattr(outcome, "reason", ""))

    async def complete(self, saga_id: str, wanted: Transfer | None = None) -> None:
        """Let all three branches vote, and commit."""
        for verb in (PREPARE, COMMIT):
            for branch, action in STEPS:
                assert (
                    await self.say(branch, verb, action, saga_id=saga_id, wanted=wanted) == "done"
                )


STEPS = ((EAST, "debit"), (WEST, "credit"), (FEES, "collect"))
"""Of a transfer with a fee."""
