"""Watching: the history of all sagas by its positions, and the wait for what comes next.

A position is told only once its commit was acknowledged, or a watcher could come back with one that
this store does not know yet. Turns of purged sagas leave gaps in the positions, and a watcher is
told how many there were: `sql/sqlite/watching.sql` numbers what it looked at, and the difference
between the two counts is what is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio

from amends_runtime.core.records import SagaState
from amends_runtime.ports import WatchedTurn, WatchedTurns, summary_after
from amends_runtime.storage.rows import Rows

__all__ = ["Head", "watched_turns"]


class Head:
    """The position of the last turn that was committed."""

    def __init__(self) -> None:
        self.seq = 0
        self._moved = anyio.Event()

    def move(self, seq: int) -> None:
        """It is there now. Wakes whoever waits for that, or for the store's end."""
        self.seq = seq
        self._moved.set()  # one event for all of them
        self._moved = anyio.Event()

    async def wait_moved(self) -> None:
        """Until the next `move`."""
        await self._moved.wait()


def watched_turns(
    rows: Sequence[Any], read: Rows, *, after_seq: int, head_seq: int, looked_at: int
) -> WatchedTurns:
    """The rows of `turns_after`, which was asked for what follows `after_seq` up to `head_seq`.

    It looked at at most `looked_at` turns.
    """
    [(through_seq, seen, matches)] = [row[:3] for row in rows if row[2] is not None]
    found = sorted((row for row in rows if row[2] is None), key=lambda row: row[0])
    if len(found) < matches:  # a limit has cut them short: the stretch ends with the last
        through_seq, seen = found[-1][0], found[-1][1]
    elif seen < looked_at:  # there is nothing more up to the head
        through_seq = max(head_seq, after_seq)
    told: list[WatchedTurn] = []
    last_seq, last_nth = after_seq, 0
    for seq, nth, _, state, past, version, row_format, data, *columns in found:
        row = read.summary(columns)
        records = read.readable(row_format, data, row.saga_id, version)
        told.append(
            WatchedTurn(
                seq,
                summary_after(
                    row,
                    version,
                    records,
                    SagaState(state) if state else row.state,
                    past_no_return=bool(past) if state else row.past_no_return,
                ),
                records,
                purged_before=(seq - last_seq) - (nth - last_nth),
            )
        )
        last_seq, last_nth = seq, nth
    purged_after = (through_seq - last_seq) - (seen - last_nth)
    return WatchedTurns(tuple(told), through_seq, head_seq, purged_after)
