"""`amends in-doubt`: who waits for whom in two-phase commits."""

# ruff: noqa: PLC0415  # what is heavy is imported by the command that runs, not by help

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from amends_runtime.cli import candidates
from amends_runtime.cli.deciding import no_two_phase_commit
from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.cli.filters import FILTERS, duration_ms
from amends_runtime.cli.options import COMMON, Common

if TYPE_CHECKING:
    from collections.abc import Collection

    import amends
    from amends_runtime.cli.doubts import Doubts, Wanted

__all__ = ["in_doubt"]


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
        await _check_names(client, wanted)
        restored = (await client.runtime()).restored
        others = None
        if saga_id is not None:
            found = await _of_one(client, saga_id)
        else:
            found = await find_doubts(client, wanted)
            if wanted.is_narrow and not found.branches:
                others = await find_doubts(client, Wanted(limit=limit))
        print_doubts(found, common, limit=limit, others=others, restored=restored)
        await note_held_back(client, common)


async def _check_names(client: amends.Client, wanted: Wanted) -> None:
    """Ends the command if a filter names what there is not: a typo must not look like an end."""
    if wanted.definition is None and wanted.participant is None:
        return
    registered = await client.definitions(all_versions=True)
    definitions = {each.name for each in registered}
    if wanted.definition is not None and wanted.definition not in definitions:
        raise _unknown("definition", wanted.definition, definitions)
    # One that is not registered any more may be waited for all the same, by a name that some
    # definition has; and by the name of a step, where a definition cannot be read here.
    participants = {each.name for each in await client.participants()}
    for each in registered:
        if each.definition is None:
            return
        participants |= {step.participant for step in each.definition.steps}
    if wanted.participant is not None and wanted.participant not in participants:
        raise _unknown("participant", wanted.participant, participants)


def _unknown(what: str, name: str, known: Collection[str]) -> Exit:
    those = f"those that there are: {', '.join(sorted(known))}" if known else "there are none"
    return Exit(ExitCode.NOT_FOUND, f"there is no {what} {name!r}; {those}")


async def _of_one(client: amends.Client, saga_id: str) -> Doubts:
    from amends_runtime.cli.doubts import Doubts, branches_of

    saga = await client.get(saga_id)
    if saga.decision is None:
        raise no_two_phase_commit(saga_id)
    registered = await client.definition(saga.definition, content_hash=saga.definition_hash)
    return Doubts(branches=tuple(branches_of(saga, registered.definition)))
