"""`amends decision`: what is said about a vote, and never more than is known.

How to think about it. On what is said here people commit and roll back by hand. A saga's id alone
does not say which vote they have before them: another store may have asked for it, or this store in
a life that a restore has taken back. So there are two questions:

1. With a vote's own identity (store, incarnation, round), which its name in PostgreSQL has: the
   runtime is asked as its participant would ask, and the answer may be carried out.
2. By the saga's id: how that saga stands *here*. Of one that is not here nothing is said, least of
   all ABORT, and which store the answer is for is said with it.
"""

# ruff: noqa: PLC0415  # what is heavy is imported by the command that runs, not by help

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter, validators

from amends_runtime.cli import candidates
from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.cli.options import COMMON, Common

if TYPE_CHECKING:
    import amends
    from amends.in_doubt import Decision
    from amends.sagas import RuntimeInfo

__all__ = ["decision", "no_two_phase_commit"]

RESTORED: Final = "docs/operating.md, 'A store that was restored'"


@dataclass(frozen=True, slots=True)
class Vote:
    """Which vote is asked about."""

    saga_id: str
    round: int
    store_id: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class Standing:
    """What the runtime has of a saga: its history, or what is left of it after a purge."""

    known: bool
    round: int | None
    """The running round; None where it cannot be said."""


async def decision(
    saga_id: Annotated[
        str | None,
        Parameter(name="ID", completer=candidates.saga_ids("RUNNING", "COMPENSATING", "STUCK")),
    ] = None,
    /,
    *,
    gid: str | None = None,
    store_id: str | None = None,
    incarnation: str | None = None,
    round: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,  # noqa: A002
    common: Common = COMMON,
) -> None:
    """Show what a participant in doubt is answered when it asks for a decision.

    COMMIT, ABORT, PENDING while votes are collected, or UNKNOWN where this
    runtime must not guess. Before you commit or roll back by hand, ask with the
    vote's own identity: --gid with the name that pg_prepared_xacts lists, or
    --store-id, --incarnation and --round with what a reservation or your own table
    has. Then it is the participant's own question, and the answer is for that vote.

    By the saga's id alone it is how that saga stands here, in this runtime's store.
    Of one that is not here nothing is said, with exit code 3: it may be another
    store's, or have been lost with a restore.

    For example:

      amends decision --gid 'amends1|…'
      amends decision transfer-1
      amends decision transfer-1 --round 2 -o json | jq -r .decision

    Parameters
    ----------
    saga_id:
        The saga's id. With --gid it may be left out.
    gid:
        The name of a prepared transaction, as PostgreSQL lists it; in quotes.
    store_id:
        The store that asked for the vote.
    incarnation:
        The incarnation of that store then.
    round:
        Which round. Default: the running one.
    """
    from amends.in_doubt import Decision
    from amends_runtime.cli.client import connect

    given = _given(saga_id, gid, store_id, incarnation, round)
    async with connect(common) as client:
        runtime = await client.runtime()
        if isinstance(given, Vote):
            vote, standing = given, await _standing(client, given.saga_id)
        else:
            standing = await _standing(client, given)
            vote = _of_this_store(given, round, standing, runtime)
        found = await client.get_decision(
            vote.saga_id, vote.round, store_id=vote.store_id, incarnation=vote.incarnation
        )
    if found is Decision.NOT_TWO_PHASE:
        raise no_two_phase_commit(vote.saga_id)
    _print(found, vote, standing, runtime, common, by_identity=isinstance(given, Vote))


def no_two_phase_commit(saga_id: str) -> Exit:
    """How a command ends that is about two-phase commits, of a saga that is none."""
    return Exit(
        ExitCode.CONFLICT,
        f"saga {saga_id} is no two-phase commit: its steps take effect at once, and nobody is in "
        f"doubt; amends get {saga_id} shows where it stands",
    )


# -- the question ----------------------------------------------------------------------------------


def _given(
    saga_id: str | None,
    gid: str | None,
    store_id: str | None,
    incarnation: str | None,
    round_: int | None,
) -> Vote | str:
    """The vote that is identified, or a saga's id. Ends the command if it is neither."""
    from amends.barrier.prepared_id import GlobalId

    if gid is not None:
        if (store_id, incarnation, round_) != (None, None, None):
            raise Exit(
                ExitCode.USAGE,
                "--gid has store, incarnation and round in it: leave --store-id, --incarnation and "
                "--round out",
            )
        read = GlobalId.parse(gid)
        if read is None:
            raise Exit(
                ExitCode.USAGE,
                f"--gid {gid}: is no name of a vote of amends; write it in quotes, whole, as "
                "pg_prepared_xacts lists it: amends1|…|…",
            )
        life = read.life
        if saga_id not in (None, life.saga_id):
            raise Exit(
                ExitCode.USAGE,
                f"--gid is a vote of saga {life.saga_id}, not of {saga_id}: leave the id out",
            )
        return Vote(life.saga_id, life.round, life.store_id, read.incarnation)
    if saga_id is None:
        raise Exit(ExitCode.USAGE, "which? give a saga's id, or a vote's name with --gid")
    if store_id is None and incarnation is None:
        return saga_id
    if store_id is None or incarnation is None or round_ is None:
        raise Exit(
            ExitCode.USAGE,
            "--store-id, --incarnation and --round say together which vote it is: give all three",
        )
    return Vote(saga_id, round_, store_id, incarnation)


async def _standing(client: amends.Client, saga_id: str) -> Standing:
    from amends.errors import NotFound

    try:
        saga = await client.get(saga_id)
    except NotFound as missing:  # a purged one has left its decision behind
        return Standing(known=missing.reason == "SAGA_PURGED", round=None)
    return Standing(known=True, round=max(saga.round, 1))


def _of_this_store(
    saga_id: str, round_: int | None, standing: Standing, runtime: RuntimeInfo
) -> Vote:
    """A vote that this store has asked for. Ends the command where nothing may be said of it."""
    if not standing.known:
        raise Exit(
            ExitCode.NOT_FOUND,
            f"saga {saga_id} is unknown here: no saga of this id is in store {runtime.store_id}"
            + (", which was restored and not confirmed" if runtime.restored else "")
            + ". Whether a vote of it was decided can only be said with the vote's own identity: "
            "--gid with its name in pg_prepared_xacts, or --store-id, --incarnation and --round. "
            "Nobody may act on this",
        )
    asked = standing.round if round_ is None else round_
    if asked is None:
        raise Exit(
            ExitCode.USAGE,
            f"--round: is missing: saga {saga_id} was purged, and each round of it had a decision "
            "of its own; the vote says which one it is of",
        )
    return Vote(saga_id, asked, runtime.store_id, runtime.incarnation)


# -- the answer ------------------------------------------------------------------------------------


def _print(
    found: Decision,
    vote: Vote,
    standing: Standing,
    runtime: RuntimeInfo,
    common: Common,
    *,
    by_identity: bool,
) -> None:
    from amends_runtime.cli.documents import print_document
    from amends_runtime.cli.tables import print_line

    if common.output != "table":
        print_document(
            {
                "saga_id": vote.saga_id,
                "round": vote.round,
                "store_id": vote.store_id,
                "incarnation": vote.incarnation,
                "decision": str(found),
                "known": standing.known,
                "restored": runtime.restored,
            },
            common.output,
        )
        return
    print_line(f"{found} in round {vote.round}: {_meaning(found, vote, standing, runtime)}")
    if not by_identity:
        print_line(
            f"said of what store {vote.store_id} has asked for in its incarnation "
            f"{vote.incarnation}; before you act by hand, ask about the vote itself: --gid"
        )


def _meaning(found: Decision, vote: Vote, standing: Standing, runtime: RuntimeInfo) -> str:
    from amends.in_doubt import Decision

    match found:
        case Decision.COMMIT:
            return "all are to commit"
        case Decision.ABORT if not standing.known:
            return (
                "all are to roll back; the store that asked for this vote has no such saga, so "
                "nothing was decided"
            )
        case Decision.ABORT:
            return "all are to roll back"
        case Decision.PENDING:
            return "votes are being collected, and the decision will come"
        case Decision.UNKNOWN:
            why = _why_unknown(vote, standing, runtime)
            return f"nothing may be said, and who has voted keeps what it holds: {why}"
        case _:
            return "update amends: this version does not know it"


def _why_unknown(vote: Vote, standing: Standing, runtime: RuntimeInfo) -> str:
    if vote.store_id != runtime.store_id:
        return (
            f"store {vote.store_id} asked for this vote, and this runtime has store "
            f"{runtime.store_id}. Ask the runtime that has the other; if that is lost for ever, "
            "see docs/two-phase-commit.md, 'When a participant is lost for ever'"
        )
    is_ours = vote.incarnation == runtime.incarnation
    is_in_history = vote.round <= (standing.round or vote.round)
    if runtime.restored and (is_in_history or not is_ours):
        return (
            "this store was restored, and nobody has confirmed it. It may have been decided after "
            f"the backup was made. Compare what the participants hold first: {RESTORED}"
        )
    if is_in_history:
        return (
            f"another copy of this store asked for this vote, as incarnation {vote.incarnation}: "
            "then ask the runtime that has that one. Or this store did before it was restored, and "
            "the saga that is here was started anew under the same id: then see what the other "
            "branches did (docs/two-phase-commit.md, 'Orphans: settling by hand')"
        )
    return f"this history has no round {vote.round} of it"
