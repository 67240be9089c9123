"""Whatever calls meet in whatever way: sharing commits changes no answer, no effect and no row.

The same calls, in the same groups, are given to two real barriers on two real files, one of which
shares. A group is queued while the barrier's thread is busy, so all of it may share.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from amends import Broken, Call, InProgress, Rejected, Transaction, Verb
from tests.participants.till import Till, Waiting

SAGAS = [f"s{number}" for number in range(6)]


@dataclass(frozen=True)
class Asked:
    """One call: its handler does as `says` if it is run."""

    saga_id: str
    verb: Verb
    says: str
    executed: bool


def refuse(call: Call, _tx: Transaction) -> None:
    """Refuse; a compensation that does so fails."""
    raise Rejected("no", call.saga_id)


def break_off(_call: Call, _tx: Transaction) -> None:
    """Say that the contract cannot be kept."""
    raise Broken("gone")


def fail(_call: Call, _tx: Transaction) -> None:
    """Fail without an outcome."""
    raise LookupError


def roll_back_own(_call: Call, tx: Transaction) -> None:
    """Take back to a savepoint of its own, and leave it open."""
    tx.execute("SAVEPOINT own")
    tx.execute("DELETE FROM ledger")
    tx.execute("ROLLBACK TO own")


def read_others(_call: Call, tx: Transaction) -> int:
    """Answer what it sees of its own saga."""
    (count,) = tx.execute(
        "SELECT count(*) FROM ledger WHERE saga_id = ?", (_call.saga_id,)
    ).fetchone()
    assert isinstance(count, int)
    return count


BEHAVIOURS: dict[str, Any] = {
    "does": read_others,
    "refuses": refuse,
    "breaks": break_off,
    "fails": fail,
    "takes back": roll_back_own,
    "goes on": lambda _call, _tx: InProgress(after_s=1),
}

CALLS = st.builds(
    Asked,
    saga_id=st.sampled_from(SAGAS),
    verb=st.sampled_from(Verb),
    says=st.sampled_from(sorted(BEHAVIOURS)),
    executed=st.booleans(),
)
GROUPS = st.lists(st.lists(CALLS, min_size=1, max_size=8), max_size=6)


async def play(till: Till, groups: list[list[Asked]]) -> list[list[str]]:
    """Give the calls to a barrier group by group, and what they are answered."""
    said = []
    async with till.barrier:
        for group in groups:
            # The first call of a saga in a group is the one that runs: no other sets its handler.
            till.behaves = {one.saga_id: BEHAVIOURS[one.says] for one in reversed(group)}
            async with Waiting(till.barrier) as waiting:
                asked = [
                    waiting.start(till.ask(one.saga_id, one.verb, executed=one.executed))
                    for one in group
                ]
            said.append(await asyncio.gather(*asked))
    return said


@given(GROUPS)
@settings(max_examples=60, deadline=None)
def test_sharing_changes_nothing_but_the_number_of_commits(groups: list[list[Asked]]) -> None:
    """Each call is answered as if it were alone, and leaves what it would have left."""
    with tempfile.TemporaryDirectory() as folder:
        own = Till(Path(folder) / "own.db", share_commits=False)
        shared = Till(Path(folder) / "shared.db")
        assert asyncio.run(play(own, groups)) == asyncio.run(play(shared, groups))
        assert own.everything() == shared.everything()
        assert len(shared.commits()) <= len(own.commits())
