"""Transfers between accounts whose calls come in any order, and the books that must balance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from amends import Decision
from tests.participants.bank import COMPENSATE, EXECUTE, PREPARE, START, Bank


@dataclass(frozen=True)
class Deed:
    """Something that happens to one branch of one transfer."""

    transfer: int
    action: str
    does: str


class Courses:
    """Several transfers whose calls come in any order, as often as they like."""

    WANTS = (("a", "b", 60), ("a", "c", 60), ("b", "a", 50), ("c", "a", 1), ("a", "b", 40))

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.votes: dict[tuple[int, str], str] = {}
        self.decided: dict[int, Decision] = {}

    def details(self, transfer: int, action: str) -> dict[str, Any]:
        """Say what a transfer's call carries."""
        taken_from, given_to, cents = self.WANTS[transfer]
        account = taken_from if action == "debit" else given_to
        return {"saga_id": f"t-{transfer}", "account": account, "cents": cents}

    def decision(self, transfer: int) -> Decision:
        """Decide when somebody first wants to know: COMMIT if both votes were heard and yes."""
        heard = [self.votes.get((transfer, action)) for action in ("debit", "credit")]
        both = Decision.COMMIT if heard == ["done", "done"] else Decision.ABORT
        return self.decided.setdefault(transfer, both)

    async def do(self, deed: Deed) -> None:
        """Let it happen."""
        transfer, action = deed.transfer, deed.action
        match deed.does:
            case "prepare":
                said = await self.bank.until_said(PREPARE, action, **self.details(transfer, action))
                if transfer not in self.decided:
                    self.votes.setdefault((transfer, action), said)
            case "end":
                await self.end(transfer, action)
            case does:
                assert does == "resolve"
                for vote in await self.bank.holds.in_doubt(0):
                    if (vote.saga_id, vote.step) == (f"t-{transfer}", action):
                        await self.bank.holds.resolve(vote, self.decision(transfer))

    async def end(self, transfer: int, action: str) -> None:
        """Tell a branch the decision, as the runtime does."""
        details = self.details(transfer, action)
        if self.decision(transfer) is Decision.COMMIT:
            assert await self.bank.until_said(EXECUTE, action, **details) == "done"
        else:
            executed = self.votes.get((transfer, action)) == "done"
            said = await self.bank.until_said(COMPENSATE, action, executed=executed, **details)
            assert said == "done"

    def check(self) -> None:
        """Nothing that is there is promised twice."""
        assert min(self.bank.free().values()) >= 0, self.bank.free()

    async def finish(self) -> None:
        """End every transfer, and look into the books."""
        for transfer in range(len(self.WANTS)):
            for action in ("debit", "credit"):
                await self.end(transfer, action)
        for transfer in range(len(self.WANTS)):
            for action in ("debit", "credit"):
                await self.bank.until_said(PREPARE, action, **self.details(transfer, action))
        expected = dict(START)
        for transfer, (taken_from, given_to, cents) in enumerate(self.WANTS):
            if self.decided[transfer] is Decision.COMMIT:
                expected[taken_from] -= cents
                expected[given_to] += cents
        assert self.bank.balances() == expected
        assert self.bank.held() == []


deeds = st.builds(
    Deed,
    st.integers(0, len(Courses.WANTS) - 1),
    st.sampled_from(["debit", "credit"]),
    st.sampled_from(["prepare", "prepare", "end", "resolve"]),
)
