"""Who waits for whom in two-phase commits that have not ended, read with the SDK's client.

How to think about it. A branch may *hold* something from its first Prepare on until it has
acknowledged the decision: what it voted yes for, for certain; where its vote has not come, perhaps.
Whom it waits for:

1. It has voted yes and nothing is decided: for all branches whose vote is still to come.
2. It has not voted, or it is to commit or roll back: for its own participant, and nobody else.

The runtime lists sagas without their steps, so each unfinished one is asked for by itself, a few at
a time; the oldest first, since these matter if there are more than anybody wants to wait for.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import anyio

import amends
from amends.definition import Definition, Mode, StepDefinition
from amends.errors import NotFound
from amends.in_doubt import Decision
from amends.outcomes import Verb
from amends.sagas import Failure, RegisteredDefinition, Saga, SagaState, Step, StepState

__all__ = ["Branch", "Doubts", "WaitedFor", "Wanted", "branches_of", "find_doubts"]

UNFINISHED: Final = (SagaState.RUNNING, SagaState.COMPENSATING, SagaState.STUCK)
MAY_HOLD: Final = frozenset(
    (
        StepState.PREPARING,
        StepState.PREPARED,
        StepState.UNKNOWN,
        StepState.EXECUTING,
        StepState.COMPENSATING,
        StepState.STUCK,
    )
)
VOTE_TO_COME: Final = frozenset((StepState.PENDING, StepState.PREPARING))
TOLD: Final = frozenset((StepState.EXECUTED, StepState.COMPENSATED, StepState.BROKEN))
AT_ONCE: Final = 16
"""Sagas asked for at the same time: enough to hide the way there and back, and no load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One step of an unfinished two-phase commit whose participant may be holding something."""

    saga_id: str
    """The saga's id."""
    definition: str
    """Name of its definition."""
    round: int
    """The running round, from 1."""
    decision: Decision
    """Its decision; ``PENDING`` while votes are collected."""
    step: str
    """The step: the branch."""
    participant: str
    """Whose it is. Empty if the definition's content is of a newer version of amends."""
    action: str
    """Which of its actions."""
    state: StepState
    """Where the step stands."""
    voted_yes: bool
    """It holds something for certain. Else perhaps: its vote has not come."""
    since_ms: int
    """Since when it holds that. Where its vote has not come not before this: the saga's start."""
    waits_for: tuple[str, ...]
    """The participants that it waits for, in the order of the steps."""
    told: tuple[str, ...]
    """The participants of this saga that have acknowledged the decision."""
    verb: Verb | None
    """What is, or was last, asked of its participant."""
    attempt: int
    """Number of the last attempt of `verb` in this round."""
    last_error: Failure | None
    """The last failed attempt's error."""
    next_attempt_at_ms: int | None
    """When the next attempt is due."""
    stuck_since_ms: int | None
    """Since when it is said to need somebody to look; its attempts go on."""
    call_open: bool
    """A call of it lies in its participant's lane or is on the wire."""


@dataclass(slots=True)
class WaitedFor:
    """A participant that branches wait for."""

    participant: str
    since_ms: int
    """Since when the first of them does."""
    saga_ids: set[str] = field(default_factory=set)
    holds_up: dict[str, int] = field(default_factory=dict)
    """Other participants that have voted yes and wait for its vote, with how many branches."""
    last_error: Failure | None = None
    """Of the branch that has waited for the longest and has an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which branches are asked for."""

    definition: str | None = None
    participant: str | None = None
    """Those at this participant, and those that wait for it."""
    before_ms: int | None = None
    """Those that hold something since before this instant."""
    limit: int
    """The most sagas that are looked at."""

    @property
    def is_narrow(self) -> bool:
        """Whether some branches that are in doubt are not asked for."""
        return (self.definition, self.participant, self.before_ms) != (None, None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubts:
    """What was found."""

    branches: tuple[Branch, ...]
    """The oldest first."""
    not_looked_at: int = 0
    """Unfinished sagas beyond the limit, all started later than those that were looked at."""

    @property
    def sagas(self) -> int:
        """In how many sagas the branches are."""
        return len({branch.saga_id for branch in self.branches})

    def waited_for(self) -> list[WaitedFor]:
        """Whom they wait for; first the participant that somebody has waited for the longest."""
        found: dict[str, WaitedFor] = {}
        for branch in self.branches:
            for name in branch.waits_for:
                each = found.setdefault(name, WaitedFor(name, branch.since_ms))
                each.saga_ids.add(branch.saga_id)
                if branch.participant != name:
                    each.holds_up[branch.participant] = each.holds_up.get(branch.participant, 0) + 1
                elif each.last_error is None:
                    each.last_error = branch.last_error
        return list(found.values())


async def find_doubts(client: amends.Client, wanted: Wanted) -> Doubts:
    """Ask the runtime for all unfinished two-phase commits, and look into the oldest of them."""
    known = {each.content_hash: each for each in await client.definitions(all_versions=True)}
    candidates = {digest: each for digest, each in known.items() if _may_be_two_phase(each)}
    names = sorted({each.name for each in candidates.values()})
    if wanted.definition is not None:
        names = [name for name in names if name == wanted.definition]
    oldest: list[tuple[int, str]] = []  # a heap whose first is the newest of those that are kept
    count = 0
    for name in names:
        async for saga in client.list(
            state=UNFINISHED, definition=name, started_before_ms=wanted.before_ms
        ):
            if saga.definition_hash not in candidates:
                continue
            count += 1
            heapq.heappush(oldest, (-saga.started_at_ms, saga.saga_id))
            if len(oldest) > wanted.limit:
                heapq.heappop(oldest)
    found: list[Branch] = []
    ids = iter([saga_id for _, saga_id in sorted(oldest, reverse=True)])
    async with anyio.create_task_group() as tasks:
        for _ in range(min(AT_ONCE, len(oldest))):
            tasks.start_soon(_look, client, ids, known, found)
    return Doubts(
        branches=tuple(sorted(_matching(found, wanted), key=_age)),
        not_looked_at=count - len(oldest),
    )


def branches_of(saga: Saga, definition: Definition | None) -> list[Branch]:
    """The branches of a saga that may be holding something, the oldest first.

    None if it is no two-phase commit.
    """
    if saga.decision is None or saga.ended:
        return []
    asks = {step.name: step for step in definition.steps} if definition is not None else {}
    votes_to_come = _participants(asks, (s for s in saga.steps if s.state in VOTE_TO_COME))
    told = _participants(asks, (step for step in saga.steps if step.state in TOLD))
    found: list[Branch] = []
    for step in saga.steps:
        if step.state not in MAY_HOLD:
            continue
        named = asks.get(step.name)
        own = _participants(asks, [step])
        found.append(
            Branch(
                saga_id=saga.saga_id,
                definition=saga.definition,
                round=saga.round,
                decision=saga.decision,
                step=step.name,
                participant=named.participant if named else "",
                action=named.action if named else "",
                state=step.state,
                voted_yes=step.prepared_at_ms is not None,
                since_ms=step.prepared_at_ms or saga.started_at_ms,
                waits_for=votes_to_come if step.state is StepState.PREPARED else own,
                told=told,
                verb=step.verb,
                attempt=step.attempt,
                last_error=step.last_error,
                next_attempt_at_ms=step.next_attempt_at_ms,
                stuck_since_ms=step.stuck_since_ms,
                call_open=step.call_open,
            )
        )
    return sorted(found, key=_age)


def _may_be_two_phase(registered: RegisteredDefinition) -> bool:
    definition = registered.definition
    return definition is None or definition.mode is Mode.TWO_PHASE_COMMIT


async def _look(
    client: amends.Client,
    saga_ids: Iterator[str],
    known: Mapping[str, RegisteredDefinition],
    found: list[Branch],
) -> None:
    """Looks into sagas for as long as there are any; several do so at once."""
    for saga_id in saga_ids:
        try:
            saga = await client.get(saga_id)
        except NotFound:
            continue  # it has ended meanwhile, and is gone
        registered = known.get(saga.definition_hash)
        found += branches_of(saga, registered.definition if registered else None)


def _matching(branches: Iterable[Branch], wanted: Wanted) -> Iterator[Branch]:
    for branch in branches:
        is_old = wanted.before_ms is None or branch.since_ms < wanted.before_ms
        is_there = wanted.participant in (None, branch.participant, *branch.waits_for)
        if is_old and is_there:
            yield branch


def _age(branch: Branch) -> tuple[int, str]:
    return branch.since_ms, branch.saga_id


def _participants(asks: Mapping[str, StepDefinition], steps: Iterable[Step]) -> tuple[str, ...]:
    """The steps' participants, each once; of a definition that cannot be read, the steps."""
    names = [asks[step.name].participant if step.name in asks else step.name for step in steps]
    return tuple(dict.fromkeys(names))
