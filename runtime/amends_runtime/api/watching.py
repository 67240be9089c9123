"""WatchSagas: records of matching sagas, as they are committed.

How to think about it. The history is the feed. A watcher is a position in it and a loop of short
reads; between them it waits for a commit, and holds nothing but its position:

1. What has been read is written before anything more is read. A client that reads slowly is held
   back by gRPC's flow control, costs one page of memory, and misses nothing: what it has not read
   lies in the history. That it is far behind it is told.
2. Commits know nothing of watchers: each sets one event, however many watch.
3. Everything carries a token. Who watches for rare things is told its position by notices in
   between, so that to come back does not mean to look through everything again.
4. All watchers together read with one connection of the store's, so that they never hold up starts
   and recoveries, which read with the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import anyio
import grpc.aio
import structlog

from amends.v1 import saga_pb2
from amends_runtime import wire
from amends_runtime.actors.definitions import Definitions
from amends_runtime.api.door import Context
from amends_runtime.api.resuming import token_of
from amends_runtime.errors import Overloaded
from amends_runtime.ports import Insights, SagaFilter, StoreIdentity, WatchedTurn

__all__ = ["Watchers"]

_log = structlog.get_logger(__name__)

MAX_WATCHERS: Final = 100
"""Streams at once. Each reads what all the others read; a program that serves many people watches
once for all of them."""
PAGE_TURNS: Final = 256
"""Read at once. With the bytes below it is what a slow watcher costs in memory."""
PAGE_BYTES: Final = 1024 * 1024
"""Of records read at once; one turn always fits, and none is larger than a message may be."""
LOOKED_AT: Final = 1024
"""Turns that one read goes through for those that match: some 6 ms, in the store's own thread."""
LAGGED_TURNS: Final = 10_000
"""Behind the head by more is lagged: more than a busy second, so it is no burst."""
NOTICE_TURNS: Final = 10_000
"""After so many turns without a match a notice tells the position: to go through them again takes
some 60 ms."""
PACE_S: Final = 0.05
"""Between two reads of a watcher that has read everything, so that many commits a second are not
many reads a second for each watcher. No person sees the difference."""


class Watchers:
    """Everybody who watches."""

    def __init__(
        self, insights: Insights, definitions: Definitions, identity: StoreIdentity
    ) -> None:
        self._insights = insights
        self._definitions = definitions
        self._identity = identity
        self._count = 0
        self._one_reads = anyio.Lock()

    @contextmanager
    def another(self) -> Iterator[None]:
        """Around all of one watch. Raises Overloaded if there are too many."""
        if self._count >= MAX_WATCHERS:
            raise Overloaded(
                "TOO_MANY_WATCHERS",
                f"{MAX_WATCHERS} streams watch already, which is the limit: try again when one has"
                " ended, or watch once and hand on what comes",
                retry_after_ms=1_000,
                metadata={"limit": str(MAX_WATCHERS)},
            )
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1

    async def watch(self, where: SagaFilter, after_seq: int, context: Context) -> None:
        """Tells one client of everything that matches after a position, until it leaves."""
        try:
            await context.write(self._notice(after_seq))
            await self._follow(where, after_seq, context)
        except (grpc.aio.InternalError, grpc.aio.UsageError) as error:
            # What gRPC raises when the client leaves during a write.
            _log.debug("client_left", method="WatchSagas", error=str(error))

    async def _follow(self, where: SagaFilter, after_seq: int, context: Context) -> None:
        looked_at = PAGE_TURNS if where == SagaFilter() else LOOKED_AT
        seq = told_seq = after_seq
        while True:
            await self._insights.wait_beyond(seq)
            async with self._one_reads:
                stretch = await self._insights.turns_after(
                    seq, where, turns=PAGE_TURNS, looked_at=looked_at, size=PAGE_BYTES
                )
            for turn in stretch.turns:
                await context.write(self._told(turn))
                told_seq = turn.seq
            seq = stretch.through_seq
            if stretch.purged_after or seq - told_seq >= NOTICE_TURNS:
                await context.write(self._notice(seq, stretch.purged_after))
                told_seq = seq
            if seq >= self._insights.head_seq:
                await anyio.sleep(PACE_S)

    def _told(self, turn: WatchedTurn) -> saga_pb2.WatchSagasResponse:
        plan = self._definitions.plan(turn.saga.definition_hash)
        return saga_pb2.WatchSagasResponse(
            saga=wire.summary_to_proto(turn.saga),
            records=[
                wire.record_to_proto(plan, turn.seq, turn.saga.version, record)
                for record in turn.records
            ],
            resume_token=token_of(self._identity, turn.seq),
            lagged=self._is_lagged(turn.seq),
            purged_turns=turn.purged_before,
        )

    def _notice(self, seq: int, purged_turns: int = 0) -> saga_pb2.WatchSagasResponse:
        return saga_pb2.WatchSagasResponse(
            resume_token=token_of(self._identity, seq),
            lagged=self._is_lagged(seq),
            purged_turns=purged_turns,
        )

    def _is_lagged(self, seq: int) -> bool:
        return self._insights.head_seq - seq > LAGGED_TURNS
