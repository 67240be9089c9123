"""`amends retry`, `abandon` and `confirm-restore`: what only a person can decide."""

# ruff: noqa: PLC0415  # what is heavy is imported by the command that runs, not by help

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from amends_runtime.cli import candidates
from amends_runtime.cli.authorship import checked_reason, whoever
from amends_runtime.cli.exits import Exit, ExitCode, one_line
from amends_runtime.cli.options import COMMON, Common, Flag

if TYPE_CHECKING:
    from amends.errors import WrongState
    from amends.sagas import RuntimeInfo, Saga

__all__ = ["abandon", "confirm_restore", "retry"]

Yes = Annotated[Flag, Parameter(name=("--yes", "-y"))]

SagaId = Annotated[str, Parameter(name="ID", completer=candidates.saga_ids("STUCK"))]


async def retry(
    saga_id: SagaId,
    /,
    *,
    reason: str,
    step: str | None = None,
    author: str | None = None,
    common: Common = COMMON,
) -> None:
    """Try a saga now: what is stuck again, what waits for its next attempt at once.

    Each such step is tried under the same key, so that what took effect does not
    take effect twice; or, where its participant had refused for good, in a new
    round with a key of its own. Its time for retries begins anew, and its
    participant's breaker, if it is open, is probed at once. The exit code is 4 if no
    step is stuck or waits.

    For example:

      amends retry order-1 --reason "the ledger is back"
      amends retry order-1 --step charge --reason "card was unblocked"

    Parameters
    ----------
    saga_id:
        The saga's id.
    reason:
        Why; lands in the history.
    step:
        Only this step. Default: all that are stuck or wait for their next attempt.
    author:
        Who; lands in the history. Default: your user name.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.saga_views import print_retried

    reason = checked_reason(reason, "history")
    async with connect(common) as client:
        saga = await client.retry(saga_id, step=step, author=whoever(author), reason=reason)
    print_retried(saga, common)


async def abandon(
    saga_id: SagaId,
    /,
    *,
    reason: str,
    author: str | None = None,
    force: Flag = False,
    yes: Yes = False,
    common: Common = COMMON,
) -> None:
    """End a stuck saga as it is: nothing more is tried, and nothing is undone.

    It ends ABANDONED, for good. The steps whose effects may remain are named:
    whatever is to be done about them is yours. At a terminal you are asked
    first; elsewhere --yes is needed.

    A saga that is not stuck is left alone, with exit code 4; --force abandons it
    all the same. amends cancel undoes what was done, and is mostly what is meant.

    A two-phase commit that is not decided is aborted instead, and rolled back. One
    that is decided is left alone, with exit code 4: who has voted yes must be told.

    For example:

      amends abandon order-1 --reason "refunded by hand, ticket 4711"
      amends abandon order-1 --reason "refunded by hand" --yes -o json | jq .remaining_steps

    Parameters
    ----------
    saga_id:
        The saga's id.
    reason:
        Why; lands in the history.
    author:
        Who; lands in the history. Default: your user name.
    force:
        Also a saga that is not stuck.
    yes:
        Do not ask.
    """
    from amends.errors import WrongState
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.saga_views import print_abandoned

    reason = checked_reason(reason, "history")
    if not yes and not sys.stdin.isatty():
        raise Exit(
            ExitCode.USAGE,
            "--yes: is missing: it ends the saga for good, and there is no terminal to ask at",
        )
    async with connect(common) as client:
        if not yes:
            _confirm(await client.get(saga_id))
        try:
            abandoned = await client.abandon(
                saga_id, author=whoever(author), reason=reason, force=force
            )
        except WrongState as refused:
            if refused.reason != "NOT_STUCK":
                raise
            raise Exit(ExitCode.CONFLICT, _not_stuck(saga_id, refused)) from refused
    print_abandoned(abandoned, common)


def _not_stuck(saga_id: str, refused: WrongState) -> str:
    """The runtime's refusal, in the words of the command line."""
    state = refused.metadata.get("state", "not stuck")
    return (
        f"saga {saga_id} is {state} and not stuck, so it was left alone; amends cancel {saga_id} "
        "--reason WHY turns it back, and --force abandons it all the same"
    )


def _confirm(saga: Saga) -> None:
    """Asks at the terminal. Ends the command unless the answer is yes."""
    steps = ", ".join(f"{step.name} {step.state}" for step in saga.steps if step.state != "PENDING")
    sys.stderr.write(
        f"saga {one_line(saga.saga_id)} is {saga.state}"
        + (f" ({one_line(steps)})" if steps else "")
        + ".\nAbandon it? "
        + (
            "It ends as it is, for good, and nothing is undone."
            if saga.decision is None
            else "If it is not decided, it is aborted, and what was prepared is rolled back."
        )
        + " [y/N] "
    )
    if not _is_answered_yes():
        raise Exit(ExitCode.USAGE, f"saga {saga.saga_id} is left as it is")


def _is_answered_yes() -> bool:
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# -- a restored store ------------------------------------------------------------------------------


async def confirm_restore(
    *,
    reason: str,
    author: str | None = None,
    yes: Yes = False,
    common: Common = COMMON,
) -> None:
    """Say that a store which was restored from a backup is to be believed as it is.

    Until then two-phase commits from before the restore are held back: nothing about
    them is decided, and nobody is called. Participants that were prepared before it
    are answered UNKNOWN, and keep what they hold. From then on the commits go on, and
    participants are told what the store knows: of a commit that is not in the backup,
    ABORT, although it may have been decided COMMIT and carried out elsewhere after the
    backup was made. So look at what the participants hold first. At a terminal you are
    shown the incarnation and asked; elsewhere --yes is needed. It lasts, also over
    restarts.

    For example:

      amends confirm-restore --reason "backup of 03:00, participants compared"

    Parameters
    ----------
    reason:
        Why; lands in the audit table.
    author:
        Who; lands in the audit table. Default: your user name.
    yes:
        Do not ask.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.documents import print_document
    from amends_runtime.cli.tables import print_line

    reason = checked_reason(reason, "audit table")
    if not yes and not sys.stdin.isatty():
        raise Exit(
            ExitCode.USAGE,
            "--yes: is missing: what participants are told cannot be taken back, and there is no "
            "terminal to ask at",
        )
    async with connect(common) as client:
        found = await client.runtime()
        if found.restored and not yes:
            _confirm_store(found)
        # Also if it is not: it may have been confirmed by another at this moment.
        confirmed = await client.confirm_restore(
            found.incarnation, author=whoever(author), reason=reason
        )
    if common.output != "table":
        print_document({"incarnation": found.incarnation, "confirmed": confirmed}, common.output)
    elif confirmed:
        print_line(f"incarnation {found.incarnation} is confirmed")
    else:
        print_line(f"there is nothing to confirm: incarnation {found.incarnation} is believed")


def _confirm_store(found: RuntimeInfo) -> None:
    """Asks at the terminal. Ends the command unless the answer is yes."""
    sys.stderr.write(
        f"store {found.store_id} was restored from a backup; its incarnation is now "
        f"{found.incarnation}.\nConfirm it? Participants are then told to roll back what it does "
        "not know of. [y/N] "
    )
    if not _is_answered_yes():
        raise Exit(ExitCode.USAGE, f"incarnation {found.incarnation} is not confirmed")
