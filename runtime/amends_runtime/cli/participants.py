"""`amends participants list`, `add` and `remove`; without one of these words it lists."""

# ruff: noqa: PLC0415  # what is heavy is imported by the command that runs, not by help

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from amends_runtime.cli import candidates
from amends_runtime.cli.authorship import checked_reason, whoever
from amends_runtime.cli.exits import Exit, ExitCode, one_line
from amends_runtime.cli.options import COMMON, Common

if TYPE_CHECKING:
    from amends.sagas import ParticipantInfo

__all__ = ["HELP", "add", "list_", "remove"]

HELP: Final = """Who is called: list, add, re-point and remove participants.

Without a command it lists. What is added here is kept by the runtime and survives its restart."""


async def list_(*, common: Common = COMMON) -> None:
    """List participants, each with its lane and breaker.

    For example:

      amends participants list
      amends participants list -o jsonl | jq -r 'select(.calls_waiting > 0) | .name'
    """
    from amends_runtime.cli.client import connect

    async with connect(common) as client:
        found = await client.participants()
    _print(found, common)


async def add(
    participant: Annotated[str, Parameter(name="NAME=ADDRESS")],
    /,
    *,
    reason: str,
    author: str | None = None,
    common: Common = COMMON,
) -> None:
    """Add a participant, or point one to another address.

    It holds over what the configuration says, through restarts, until it is
    removed. Calls that wait for the participant leave for the new address; those
    on their way to the old one get their answer. If nothing answers at the address
    yet, that is said on standard error, and the exit code is 0 all the same.

    For example:

      amends participants add payments=10.0.0.7:7001 --reason "moved to the new rack"

    Parameters
    ----------
    participant:
        The name that definitions use, and host:port or unix:path.
    reason:
        Why; is kept with it.
    author:
        Who; is kept with it. Default: your user name.
    """
    from amends_runtime.cli.client import connect

    name, equals, address = participant.partition("=")
    if not (name and equals and address):
        raise Exit(
            ExitCode.USAGE,
            f"{participant}: write NAME=ADDRESS, as in payments=127.0.0.1:7001",
        )
    reason = checked_reason(reason, "records")
    async with connect(common) as client:
        added = await client.put_participant(name, address, author=whoever(author), reason=reason)
    if common.output == "table":
        _print([added], common)
    else:
        from amends_runtime.cli.documents import document, print_document

        print_document(document(added), common.output)
    if added.last_error:
        sys.stderr.write(
            f"amends: {name} is added, and {one_line(added.last_error)}; its calls wait until it"
            " answers: amends participants shows how it is\n"
        )


async def remove(
    name: Annotated[str, Parameter(name="NAME", completer=candidates.added_participants)],
    /,
    *,
    reason: str,
    author: str | None = None,
    common: Common = COMMON,
) -> None:
    """Remove a participant that was added, or take back that it was re-pointed.

    One that the configuration names goes back to what that says; if it is there
    already, nothing changes and the exit code is 4. Calls of one that it does not
    name wait until it is added again.

    For example:

      amends participants remove payments --reason "the move is over"

    Parameters
    ----------
    name:
        The participant's name.
    reason:
        Why; is kept.
    author:
        Who; is kept. Default: your user name.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.documents import document, print_document
    from amends_runtime.cli.tables import print_line

    reason = checked_reason(reason, "records")
    async with connect(common) as client:
        await client.remove_participant(name, author=whoever(author), reason=reason)
        left = [each for each in await client.participants() if each.name == name]
    if common.output != "table":
        now = document(left[0]) if left else None
        print_document({"name": name, "participant": now}, common.output)
    elif left:
        print_line(f"{name} is at {left[0].address} again, as the configuration says")
    else:
        print_line(f"{name} is removed; calls of its steps wait until it is added again")


def _print(participants: Sequence[ParticipantInfo], common: Common) -> None:
    from amends_runtime.cli.documents import print_list
    from amends_runtime.cli.tables import print_table

    if common.output != "table":
        print_list("participants", participants, common.output)
        return
    print_table(
        (
            *("NAME", "ADDRESS", "FROM", "BREAKER", "IN FLIGHT", "WAITING", "LIMIT"),
            *("TRANSPORT", "LAST ERROR"),
        ),
        (
            (
                each.name,
                each.address,
                "an operator" if each.by_operator else "configuration",
                each.breaker.state,
                str(each.calls_in_flight),
                str(each.calls_waiting),
                str(each.concurrency_limit),
                each.transport,
                each.last_error,
            )
            for each in participants
        ),
    )
