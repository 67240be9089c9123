"""The in-doubt resolver: asks the runtime about votes that were not told for long.

How to think about it
---------------------

1. The runtime tells every participant its decision, and goes on until it is answered. So nothing
   here is needed for the outcome of a saga. It is for what stays prepared because nobody tells it:
   the runtime's lane to this participant waits behind an open breaker, its address is wrong, or the
   runtime is another one by now. What is prepared holds locks and reservations all the while.
2. Only COMMIT and ABORT are carried out, and only as an answer of the runtime. An error, silence,
   an answer that cannot be read or says anything else leaves what is prepared as it is. There is no
   time limit after which a participant decides alone.
3. It is carried out by the rules of any call, in the same transaction as a row of the barrier. So
   it does not matter who comes first, the runtime or the resolver, nor whether both come.
4. A runtime that is away is asked less and less often, and its absence is one line in the log, as
   is its return. What is in doubt is read in pages, and asked a few at a time.
5. An error about one saga is that saga's: the others are asked about. Only what would be said to
   every question, or the same trouble many times in a row, makes the runtime one that is away; and
   what failed the last time is asked about last, so that it stands before nobody.
6. A vote about which the runtime says neither, or whose decision the participant's own rules refuse
   to carry out, is an *orphan*: a person has to look.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, TypeAlias

import anyio
import grpc

from amends.arguments import checked_seconds, checked_whole
from amends.client import Client
from amends.errors import (
    AmendsError,
    ApiError,
    InvalidRequest,
    NotFound,
    Unavailable,
    VoteNotSettled,
    WrongState,
)
from amends.in_doubt import PAGE, Decision, InDoubt, InDoubtSource
from amends.tls import ClientTls

logger = logging.getLogger(__name__)

DEFAULT_RUNTIME: Final = "127.0.0.1:7233"

DEFAULT_OLDER_THAN_S: Final = 30.0
"""The default prepare deadline of a two-phase commit: what is older is late."""

DEFAULT_EVERY_S: Final = 10.0
"""A look at what is in doubt is one statement where nothing is."""

DEFAULT_MAX_CONCURRENT: Final = 16
"""Questions under way: the runtime has sagas to run."""

DEFAULT_REMIND_EVERY_S: Final = 300.0
"""How often the log says again that something is still in doubt."""

ASK_TIMEOUT_S: Final = 10.0
"""For one question."""

MAX_BACKOFF_S: Final = 60.0
"""The longest wait before a runtime that is away is asked again, unless `every_s` is longer."""

MAX_SILENCES: Final = 5
"""Questions in a row that fail, with no answer between them, before it is the runtime's trouble and
not theirs."""

AWAY: Final = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
    )
)
"""What the runtime would say to every question of this participant."""

MAX_TOLD: Final = 20
"""Votes of one kind that a sweep names in the log; the others are counted."""

ORPHANS: Final = "docs/two-phase-commit.md#orphans-settling-by-hand"
"""What to do about a vote that nobody decides."""

MAX_REMEMBERED: Final = 10_000
"""Orphans that are remembered. Beyond it one may be named, and asked about, more often."""


@dataclass(frozen=True, slots=True)
class ResolverStatistics:
    """What a resolver has done and found."""

    committed: int = 0
    """Votes that it has committed, since it was made."""
    rolled_back: int = 0
    """Votes that it has rolled back, since it was made."""
    in_doubt: int = 0
    """Votes that the last sweep found older than the limit, and has not settled."""
    pending: int = 0
    """Of these: the runtime is still collecting votes."""
    orphans: int = 0
    """Of these: the runtime must not say, or knows no such two-phase commit, or the participant's
    own rules say otherwise. An operator's affair."""
    failed: int = 0
    """Of these: nobody could be asked, or what was decided failed and is tried again."""
    is_reachable: bool = True
    """Whether the runtime answered when it was asked last."""


class InDoubtResolver:
    """Asks the runtime about what has been prepared for long, and carries out what it says.

    ::

        async with serve(bank, listen, resolver=InDoubtResolver(holds, runtime="127.0.0.1:7233")):
            ...

    `sources` is a `PreparedTransactions`, a `Reservations`, or a list of such. What was prepared
    more than `older_than_s` ago is asked about, every `every_s`, at most `max_concurrent` at once.
    What waits for a decision is logged every `remind_every_s`; what the runtime does not know is
    logged once, and asked about as often.

    `runtime` and `tls` are those of `Client`. `serve` and `run` let it work beside the server;
    without them it works as long as its own ``async with``, in which the sources' barriers have to
    be open.

    Raises `TypeError` and `ValueError` for arguments that cannot be; entering it raises
    `InvalidTls`.
    """

    def __init__(
        self,
        sources: InDoubtSource | Sequence[InDoubtSource],
        runtime: str = DEFAULT_RUNTIME,
        *,
        tls: ClientTls | None = None,
        older_than_s: float = DEFAULT_OLDER_THAN_S,
        every_s: float = DEFAULT_EVERY_S,
        max_concurrent: int = DEFAULT_MAX_CONCURRENT,
        remind_every_s: float = DEFAULT_REMIND_EVERY_S,
    ) -> None:
        self._sources = tuple(sources) if isinstance(sources, Sequence) else (sources,)
        if not self._sources:
            raise ValueError("sources is empty: there is nothing that could be in doubt")
        for source in self._sources:
            missing = [name for name in ("in_doubt", "resolve") if not hasattr(source, name)]
            if missing:
                raise TypeError(
                    f"a {type(source).__name__} has no {', '.join(missing)}: give a "
                    "PreparedTransactions or a Reservations"
                )
        self._runtime = runtime
        self._client = Client(runtime, tls=tls, timeout_s=ASK_TIMEOUT_S, retry_unavailable=False)
        self._older_than_s = checked_seconds("older_than_s", older_than_s, least=0.0)
        self._every_s = checked_seconds("every_s", every_s)
        self._max_concurrent = checked_whole("max_concurrent", max_concurrent)
        if self._max_concurrent < 1:
            raise ValueError("max_concurrent must be 1 or more")
        self._remind_every_s = checked_seconds("remind_every_s", remind_every_s, least=0.0)
        self._task: asyncio.Task[None] | None = None
        self._sweeping = asyncio.Lock()
        self._failures = 0
        self._trouble = ""
        self._orphans: dict[tuple[int, str], float] = {}
        self._failing: frozenset[tuple[int, str]] = frozenset()
        self._remind_at_s = time.monotonic() + remind_every_s
        self.statistics = ResolverStatistics()
        """What it has done and found, as of its last sweep."""

    # --------------------------------------------------------------------------------- its life

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        self._task = asyncio.create_task(self._work(), name="amends in-doubt resolver")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        with anyio.CancelScope(shield=True):  # or a cancelled block would leave the channel open
            if task is not None:
                # What it is at is rolled back, or was committed whole: the barrier sees to that.
                task.cancel()
                await asyncio.wait([task])
            await self._client.__aexit__(kind, error, traceback)

    async def _work(self) -> None:
        while True:
            await anyio.sleep(self._pause_s())
            try:
                await self.sweep()
            except Exception as bug:
                # The participant serves on: without the resolver only the runtime tells it.
                logger.critical(
                    "the in-doubt resolver failed: %s", type(bug).__name__, exc_info=_quiet(bug)
                )
                self._failures += 1

    def _pause_s(self) -> float:
        if not self._failures:
            return self._every_s
        bound = max(MAX_BACKOFF_S, self._every_s)
        longest = min(bound, self._every_s * 2.0 ** min(self._failures, 30))
        # Participants of one runtime that came back must not all ask it in the same moment.
        return random.uniform(longest / 2, longest)  # noqa: S311  # spreads, guards no secret

    # ---------------------------------------------------------------------------------- a sweep

    async def sweep(self) -> ResolverStatistics:
        """Look once through everything that is in doubt, and ask about it; give `statistics`.

        It happens by itself while the resolver is open; here for whoever does not want to wait.
        """
        async with self._sweeping:
            return await self._sweep()

    async def _sweep(self) -> ResolverStatistics:
        sweep = _Sweep()
        for number, source in enumerate(self._sources):
            try:
                async for page in self._pages(source):
                    await self._ask_all(sweep, number, source, page)
            except Exception as error:  # noqa: BLE001  # a driver's error is as good as ours
                sweep.trouble = f"what is in doubt cannot be listed: {_said(error)}"
        if sweep.silences and not sweep.was_answered:
            self._give_up(sweep)
        self._failures = self._failures + 1 if sweep.trouble else 0
        self._tell(sweep)
        before = self.statistics
        self.statistics = ResolverStatistics(
            committed=before.committed + sweep.committed,
            rolled_back=before.rolled_back + sweep.rolled_back,
            in_doubt=sweep.seen - sweep.committed - sweep.rolled_back,
            pending=len(sweep.pending),
            orphans=sweep.orphans,
            failed=sweep.unasked + len(sweep.failures),
            is_reachable=not sweep.is_away,
        )
        return self.statistics

    async def _pages(self, source: InDoubtSource) -> AsyncIterator[list[InDoubt]]:
        after = ""
        while True:
            page = await source.in_doubt(self._older_than_s, after=after, limit=PAGE)
            if page:
                yield page
            if len(page) < PAGE:
                return
            after = page[-1].name

    async def _ask_all(
        self, sweep: _Sweep, number: int, source: InDoubtSource, page: Sequence[InDoubt]
    ) -> None:
        sweep.seen += len(page)
        left = iter(sorted(page, key=lambda vote: (number, vote.name) in self._failing))

        async def work() -> None:
            for vote in left:
                await self._ask(sweep, number, source, vote)

        async with anyio.create_task_group() as tasks:
            for _ in range(min(self._max_concurrent, len(page))):
                tasks.start_soon(work)

    async def _ask(self, sweep: _Sweep, number: int, source: InDoubtSource, vote: InDoubt) -> None:
        if sweep.is_away:  # no use in asking it of all the others
            sweep.unasked += 1
            return
        if time.monotonic() < self._orphans.get((number, vote.name), 0.0):
            sweep.orphans += 1
            return
        try:
            decision = await self._client.get_decision(
                vote.saga_id, vote.round, store_id=vote.store_id, incarnation=vote.incarnation
            )
        except (InvalidRequest, NotFound, ValueError) as error:
            # About this one alone, such as an id that only another runtime has.
            sweep.answer()
            sweep.orphans += 1
            sweep.oddities.append((number, vote, f"the runtime refuses the question: {error}"))
            return
        except ApiError as error:
            self._not_answered(sweep, (number, vote), error)
            return
        sweep.answer()
        match decision:
            case Decision.COMMIT | Decision.ABORT:
                await self._settle(sweep, number, source, vote, decision)
            case Decision.PENDING:
                sweep.pending.append(vote)
            case _:
                sweep.orphans += 1
                sweep.oddities.append((number, vote, _WHY_ORPHAN[decision]))

    def _not_answered(self, sweep: _Sweep, asked: tuple[int, InDoubt], error: ApiError) -> None:
        if isinstance(error, Unavailable) or error.code in AWAY:
            sweep.unasked += 1
            sweep.last_silence = str(error)
            self._give_up(sweep)
            return
        number, vote = asked
        sweep.failures.append((number, vote, f"the runtime cannot be asked about it: {error}"))
        if isinstance(error, WrongState):  # such as a history that it cannot read
            sweep.answer()
            return
        sweep.silences += 1
        sweep.last_silence = str(error)
        if sweep.silences >= MAX_SILENCES:
            self._give_up(sweep)

    def _give_up(self, sweep: _Sweep) -> None:
        sweep.is_away = True
        sweep.trouble = f"the runtime at {self._runtime} cannot be asked: {sweep.last_silence}"

    async def _settle(
        self,
        sweep: _Sweep,
        number: int,
        source: InDoubtSource,
        vote: InDoubt,
        decision: Decision,
    ) -> None:
        try:
            is_settled = await source.resolve(vote, decision)
        except VoteNotSettled as error:
            sweep.orphans += 1
            sweep.oddities.append((number, vote, str(error)))
            return
        except Exception as error:  # noqa: BLE001  # an author's handler may raise anything
            sweep.failures.append((number, vote, f"{decision} failed: {_said(error)}"))
            return
        if not is_settled:
            return  # a call of the runtime's is at it
        logger.info("%s: settled: %s", _ids(vote), decision)
        if decision is Decision.COMMIT:
            sweep.committed += 1
        else:
            sweep.rolled_back += 1

    # ----------------------------------------------------------------------------------- the log

    def _tell(self, sweep: _Sweep) -> None:
        if sweep.trouble:
            if not self._trouble:
                logger.warning("%s; what is in doubt stays so", sweep.trouble)
            self._trouble = sweep.trouble
        elif self._trouble:
            self._trouble = ""
            logger.info("the runtime at %s answers again: the resolver goes on", self._runtime)
        self._tell_oddities(sweep.oddities)
        self._tell_failures(sweep.failures, keeps=sweep.is_away)
        now_s = time.monotonic()
        if not sweep.pending:
            self._remind_at_s = now_s + self._remind_every_s
        elif now_s >= self._remind_at_s:
            self._remind_at_s = now_s + self._remind_every_s
            oldest = min(sweep.pending, key=lambda vote: vote.since_ms)
            logger.warning(
                "%d votes wait for a decision that is not made yet; the oldest: %s",
                len(sweep.pending),
                _ids(oldest),
            )

    def _tell_oddities(self, oddities: Collection[Found]) -> None:
        new = [odd for odd in oddities if _key(odd) not in self._orphans]
        again_at_s = time.monotonic() + self._remind_every_s
        for odd in oddities:
            self._orphans[_key(odd)] = again_at_s
        while len(self._orphans) > MAX_REMEMBERED:
            del self._orphans[next(iter(self._orphans))]
        _log(new, f"an orphan: it stays prepared, see to it ({ORPHANS})")

    def _tell_failures(self, failures: Collection[Found], *, keeps: bool) -> None:
        _log([one for one in failures if _key(one) not in self._failing], "tried again")
        # Those that were not asked about this time are not better for it.
        before = self._failing if keeps else frozenset()
        self._failing = before | frozenset(map(_key, failures))


Found: TypeAlias = tuple[int, InDoubt, str]
"""Number of the source, a vote in it, and what is the matter with it."""


def _key(found: Found) -> tuple[int, str]:
    number, vote, _ = found
    return number, vote.name


def _log(new: Sequence[Found], then: str) -> None:
    for _, vote, why in new[:MAX_TOLD]:
        logger.error("%s: %s; %s", _ids(vote), why, then)
    if len(new) > MAX_TOLD:
        logger.error("and %d further votes like these; %s", len(new) - MAX_TOLD, then)


def _said(error: Exception) -> str:
    """Give the message of one of our errors: only those are known to hold no payload."""
    return str(error) if isinstance(error, AmendsError) else type(error).__name__


class _Sweep:
    """What one look has found so far."""

    def __init__(self) -> None:
        self.seen = 0
        self.committed = 0
        self.rolled_back = 0
        self.unasked = 0
        self.orphans = 0
        self.pending: list[InDoubt] = []
        self.oddities: list[Found] = []
        self.failures: list[Found] = []
        self.is_away = False
        self.trouble = ""
        self.silences = 0
        """Questions that failed since the last answer."""
        self.last_silence = ""
        self.was_answered = False

    def answer(self) -> None:
        """Note that the runtime has answered, whatever it said."""
        self.silences = 0
        self.was_answered = True


_WHY_ORPHAN: Final = {
    Decision.UNKNOWN: (
        "the runtime must not say: it has another store than the one that asked for the vote, or "
        "its store was restored from a backup and nobody has confirmed that yet"
    ),
    Decision.NOT_TWO_PHASE: "the runtime has a saga of this id that is no two-phase commit",
    Decision.UNRECOGNISED: "the runtime's answer is one that this version of amends does not know",
}


def _ids(vote: InDoubt) -> str:
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(vote.since_ms / 1000))
    return (
        f"in doubt since {since}: saga={vote.saga_id} step={vote.step} round={vote.round} "
        f"({vote.what})"
    )


def _quiet(bug: Exception) -> Exception | None:
    """Give what may be logged with its traceback: at DEBUG alone, since it may quote a payload."""
    return bug if logger.isEnabledFor(logging.DEBUG) else None
