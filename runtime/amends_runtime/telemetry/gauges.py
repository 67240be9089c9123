"""The gauges: what can only be looked at, and the event loop's lag.

How to think about it. A scrape comes in another thread, at any moment, and must not touch what the
loop is changing. So the loop looks by itself, every few seconds, and leaves what it saw as one
`Snapshot` that is never changed again; a reader takes the whole of it, and all its numbers are of
one look.

1. Looking never blocks: the sagas are surveyed in slices, sizes of files come from `stat` (the
   database's files are never opened here: closing one would drop SQLite's locks on it).
2. Looking stays cheap: after a look that held the loop for long the next one is so much later that
   it takes no more than `SHARE` of the time.
3. An onlooker's bug is not the runtime's: a look that fails is logged, and the next one comes.
4. The lag is measured by a timer of its own, because a look that waits its turn says nothing of how
   long others do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Protocol

import anyio
import msgspec
import structlog

from amends_runtime.core.breaker import Breaker, BreakerState
from amends_runtime.core.records import SagaState
from amends_runtime.ports import StoreIdentity
from amends_runtime.telemetry.metrics import (
    BREAKER_STATE,
    IN_DOUBT,
    LANE_IN_FLIGHT,
    LANE_LIMIT,
    LANE_WAITING,
    MAILBOX_FULLEST,
    MAILBOX_MESSAGES,
    OLDEST_IN_DOUBT,
    RECOVERY_DURATION,
    RECOVERY_RUNNING,
    RECOVERY_SAGAS,
    REQUESTS_REFUSED,
    RUNTIME_EPOCH,
    RUNTIME_INFO,
    SAGA_ACTIVE,
    SAGA_PARKED,
    SAGA_QUARANTINED,
    SAGA_STUCK,
    SAGA_UNREADABLE,
    SAGA_WITHOUT_WAKE_UP,
    STEP_IN_DOUBT,
    STORE_SIZE,
    TELEMETRY_SPANS,
    TURNS_BACKLOG,
    WAL_SIZE,
    Metric,
    Metrics,
    Snapshot,
    word,
)

__all__ = ["Gauges", "LaneReading", "RecoveryReading", "Sources", "SurveyReading"]

_log = structlog.get_logger(__name__)

LOOK_EVERY_S: Final = 5.0  # a third of a usual scrape's interval: what it shows is never old
SHARE: Final = 0.02  # of the time, and so of the loop, that looking may take
LAG_EVERY_S: Final = 0.5  # a hundred samples within the minute that an alert asks about


# -- what it looks at ------------------------------------------------------------------------------


class SurveyReading(Protocol):
    """What the supervisor says of the sagas in memory; see `actors.survey`."""

    @property
    def active(self) -> Mapping[SagaState, int]: ...
    @property
    def parked(self) -> Mapping[SagaState, int]: ...
    @property
    def stuck(self) -> int: ...
    @property
    def in_doubt(self) -> int: ...
    @property
    def branches_in_doubt(self) -> int: ...
    @property
    def oldest_in_doubt_s(self) -> float: ...
    @property
    def without_wake_up(self) -> int: ...
    @property
    def unreadable(self) -> int: ...
    @property
    def quarantined(self) -> int: ...
    @property
    def backlog(self) -> int: ...
    @property
    def messages(self) -> int: ...
    @property
    def fullest(self) -> int: ...
    @property
    def held_s(self) -> float: ...


class RecoveryReading(Protocol):
    """How far recovery is; see `actors.recovery`."""

    @property
    def running(self) -> bool: ...
    @property
    def sagas(self) -> int: ...
    @property
    def duration_s(self) -> float: ...


class LaneReading(Protocol):
    """What a participant's lane says of itself; see `dispatch.lanes`."""

    @property
    def name(self) -> str: ...
    @property
    def breaker(self) -> Breaker: ...
    @property
    def waiting(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def limit(self) -> int: ...


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """Whom it asks. None of them may block; `survey` alone may wait.

    `sizes` answers with the bytes of the database and of its log, `spans` with how many spans came
    to which end, `refused` with how many requests were refused for which reason.
    """

    survey: Callable[[], Awaitable[SurveyReading]]
    recovery: Callable[[], RecoveryReading]
    refused: Callable[[], Mapping[str, int]]
    lanes: Callable[[], Sequence[LaneReading]]
    sizes: Callable[[], tuple[int, int]]
    spans: Callable[[], Mapping[str, int]]
    identity: Callable[[], StoreIdentity]
    version: str


# -- looking ---------------------------------------------------------------------------------------


class Gauges:
    """Looks, and leaves what it saw in `metrics.snapshot`."""

    def __init__(self, metrics: Metrics, sources: Sources) -> None:
        self._metrics = metrics
        self._sources = sources
        self._held_s = 0.0  # how long the last look held the loop

    async def look(self) -> None:
        """Looks now. Raises nothing but cancellation."""
        try:
            self._metrics.snapshot = await self._taken()
        except Exception:  # noqa: BLE001  # see rule 3
            _log.exception("gauges_failed")

    async def run(self) -> None:
        """Looks every few seconds, for as long as the runtime lives."""
        while True:
            await self.look()
            await anyio.sleep(max(LOOK_EVERY_S, self._held_s / SHARE))

    async def run_lag(self) -> None:
        """Measures how late the loop is, for as long as the runtime lives."""
        # The loop's own clock stands still while the machine sleeps, which is nobody's lag.
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + LAG_EVERY_S
            await anyio.sleep(LAG_EVERY_S)
            self._metrics.loop_lag.record(max(0.0, loop.time() - due_s))

    async def _taken(self) -> Snapshot:
        sources = self._sources
        survey = await sources.survey()
        self._held_s = survey.held_s
        recovery, identity = sources.recovery(), sources.identity()
        store_bytes, wal_bytes = sources.sizes()
        spans, lanes = sources.spans(), sources.lanes()
        single: dict[Metric, float] = {
            MAILBOX_MESSAGES: survey.messages,
            MAILBOX_FULLEST: survey.fullest,
            TURNS_BACKLOG: survey.backlog,
            WAL_SIZE: wal_bytes,
            STORE_SIZE: store_bytes,
            SAGA_STUCK: survey.stuck,
            STEP_IN_DOUBT: survey.in_doubt,
            IN_DOUBT: survey.branches_in_doubt,
            OLDEST_IN_DOUBT: survey.oldest_in_doubt_s,
            SAGA_WITHOUT_WAKE_UP: survey.without_wake_up,
            SAGA_UNREADABLE: survey.unreadable,
            SAGA_QUARANTINED: survey.quarantined,
            RECOVERY_SAGAS: recovery.sagas,
            RECOVERY_RUNNING: int(recovery.running),
            RECOVERY_DURATION: recovery.duration_s,
            RUNTIME_EPOCH: identity.epoch,
        }
        return {
            **{metric: {(): value} for metric, value in single.items()},
            RUNTIME_INFO: {(sources.version, identity.store_id): 1},
            SAGA_ACTIVE: {(word(state),): count for state, count in survey.active.items()},
            SAGA_PARKED: {(word(state),): survey.parked.get(state, 0) for state in survey.active},
            REQUESTS_REFUSED: {
                (reason.lower(),): count for reason, count in sources.refused().items()
            },
            TELEMETRY_SPANS: {(result,): count for result, count in spans.items()},
            LANE_WAITING: {(lane.name,): lane.waiting for lane in lanes},
            LANE_IN_FLIGHT: {(lane.name,): lane.in_flight for lane in lanes},
            LANE_LIMIT: {(lane.name,): lane.limit for lane in lanes},
            BREAKER_STATE: {
                (lane.name, word(state)): int(lane.breaker.state is state)
                for lane in lanes
                for state in BreakerState
            },
        }
