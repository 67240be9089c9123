"""`amends in-doubt` and `decision`: two-phase commits that wait, and what is decided about them."""

# ruff: noqa: PLC0415  # what is heavy is imported by the command that runs, not by help

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from amends_runtime.cli import candidates
from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.cli.filters import FILTERS, duration_ms
from amends_runtime.cli.options import COMMON, Common

if TYPE_CHECKING:
    import amends
    from amends_runtime.cli.doubts import Doubts

__all__ = ["decision", "in_doubt"]

SagaId = Annotated[
    str,
    Parameter(name="ID", completer=candidates.saga_ids("RUNNING", "COMPENSATING", "STUCK")),
]


async def in_doubt(
    saga_id: Annotated[
        str | None,
        Parameter(name="ID", completer=candidates.saga_ids("RUNNING", "COMPENSATING", "STUCK")),
    ] = None,
    /,
    *,
    definition: Annotated[
        str | None, Parameter(completer=candidates.definitions, group=FILTERS)
    ] = None,
    participant: Annotated[str | None, Parameter(group=FILTERS)] = None,
    older_than: Annotated[str | None, Parameter(group=FILTERS)] = None,
    limit: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 1000,
    common: Common = COMMON,
) -> None:
    """Show who waits for whom in two-phase commits, since when, and holding what.

    Listed is each branch whose participant may be holding something: for certain
    from its yes vote on, perhaps while its vote has not come. It holds that until
    it has acknowledged the decision. Who has voted yes and hears of no decision
    waits for the votes of others; who is to commit or roll back waits for its own
    participant to answer. Below is who is waited for, and whom that holds up.

    Of what waits for longer than a minute, see to the participant: bring it back,
    or say where it is now (amends participants add). Attempts go on by themselves;
    amends retry tries at once. While nothing is decided, amends cancel aborts.
    After that nothing is skipped and nothing forced: for a participant that is
    lost for ever, a stand-in under its name answers what became of its branch, and
    the saga ends MIXED with the others finished. docs/operating.md says how.

    For example:

      amends in-doubt
      amends in-doubt --participant east --older-than 30s
      amends in-doubt -o json | jq .waited_for

    Parameters
    ----------
    saga_id:
        Only this saga.
    definition:
        Only sagas of this definition.
    participant:
        Only branches at this participant, or that wait for it.
    older_than:
        Only what is held for longer than this: 30s, 15m, 2h, 3d.
    limit:
        Look at so many sagas, the oldest first.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.doubt_views import print_doubts
    from amends_runtime.cli.doubts import Wanted, find_doubts
    from amends_runtime.cli.held_back import note_held_back

    before_ms = None
    if older_than is not None:
        before_ms = time.time_ns() // 1_000_000 - duration_ms(older_than, "--older-than")
    if saga_id is not None and (definition, participant, older_than) != (None, None, None):
        raise Exit(ExitCode.USAGE, f"{saga_id}: is one saga; leave the filters out")
    wanted = Wanted(
        definition=definition, participant=participant, before_ms=before_ms, limit=limit
    )
    async with connect(common) as client:
        if saga_id is None:
            found = await find_doubts(client, wanted)
        else:
            found = await _of_one(client, saga_id)
        print_doubts(found, common, limit=limit)
        await note_held_back(client, common)


async def _of_one(client: amends.Client, saga_id: str) -> Doubts:
    from amends_runtime.cli.doubts import Doubts, branches_of

    saga = await client.get(saga_id)
    if saga.decision is None:
        raise _no_two_phase_commit(saga_id)
    registered = await client.definition(saga.definition, content_hash=saga.definition_hash)
    return Doubts(branches=tuple(branches_of(saga, registered.definition)))


async def decision(
    saga_id: SagaId,
    /,
    *,
    round: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,  # noqa: A002
    common: Common = COMMON,
) -> None:
    """Show what a participant in doubt is answered when it asks for a decision.

    COMMIT, ABORT, PENDING while votes are collected, or UNKNOWN where this runtime
    must not guess. Of a saga that it has never seen the answer is ABORT: nothing was
    decided there. Asked is with the store and incarnation of this runtime, so the
    answer is not one for what another runtime has prepared.

    For example:

      amends decision transfer-1
      amends decision transfer-1 --round 2 -o json | jq -r .decision

    Parameters
    ----------
    saga_id:
        The saga's id.
    round:
        Which round. Default: the running one.
    """
    from amends.errors import NotFound
    from amends.in_doubt import Decision
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.doubt_views import print_decision

    async with connect(common) as client:
        known = True
        try:
            saga = await client.get(saga_id)
        except NotFound:  # it may have left its decision behind when it was purged
            known = False
            running = 1
        else:
            running = max(saga.round, 1)
        asked = running if round is None else round
        runtime = await client.runtime()
        found = await client.get_decision(
            saga_id, asked, store_id=runtime.store_id, incarnation=runtime.incarnation
        )
    if found is Decision.NOT_TWO_PHASE:
        raise _no_two_phase_commit(saga_id)
    print_decision(saga_id, asked, found, common, known=known)


def _no_two_phase_commit(saga_id: str) -> Exit:
    return Exit(
        ExitCode.CONFLICT,
        f"saga {saga_id} is no two-phase commit: its steps take effect at once, and nobody is in "
        f"doubt; amends get {saga_id} shows where it stands",
    )
