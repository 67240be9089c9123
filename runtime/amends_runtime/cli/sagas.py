"""`amends start`, `get`, `list`, `history`, `wait` and `cancel`."""

# ruff: noqa: PLC0415  # what is heavy is imported by the command that runs, not by help

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter, validators

from amends_runtime.cli import candidates
from amends_runtime.cli.authorship import checked_reason, whoever
from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.cli.filters import ALL, Filters
from amends_runtime.cli.options import COMMON, Common, Flag, Labels, parse_pairs

if TYPE_CHECKING:
    from amends.sagas import Saga

__all__ = ["cancel", "get", "history", "list_", "start", "wait"]

MAX_INPUT_BYTES: Final = (
    64 * 1024 * 1024
)  # read at most so much of a file; the runtime has the word


SagaId = Annotated[str, Parameter(name="ID", completer=candidates.saga_ids())]
Positive = Annotated[float | None, Parameter(validator=validators.Number(gt=0))]


async def start(
    definition: Annotated[str, Parameter(name="DEFINITION", completer=candidates.definitions)],
    /,
    *,
    input_: Annotated[
        str | None, Parameter(name=("--input", "-i"), allow_leading_hyphen=True)
    ] = None,
    content_type: str | None = None,
    id_: Annotated[str | None, Parameter(name="--id")] = None,
    label: Labels = (),
    deadline: Positive = None,
    definition_hash: str | None = None,
    wait: Flag = False,
    timeout: Positive = None,
    payloads: Flag = False,
    common: Common = COMMON,
) -> int:
    """Start a saga.

    With an --id of your own it is safe to repeat: the same id and content
    never start a second one. Ctrl-C or SIGTERM ends the command, and not the
    saga; its id is said then.

    Without --wait the exit code is 0 once the start is durable. With --wait it
    is 0 if the saga completed, 6 if it ended otherwise, 5 if --timeout passed
    first (it goes on then).

    For example:

      amends start order --input '{"sku": "A", "amount": 3}' --id order-1
      amends start order --input @order.json --wait --timeout 30
      generate | amends start order --input - --label region=eu -o json

    Parameters
    ----------
    definition:
        Name of a registered definition.
    input_:
        JSON, @FILE or - for standard input: handed to every step.
    content_type:
        Take the input as it is, as bytes of this type, instead of as JSON.
    id_:
        The saga's id: up to 128 of A-Z a-z 0-9 . _ : -. Default: a new UUID.
    label:
        KEY=VALUE, for filters; may be repeated.
    deadline:
        Seconds until it turns back by itself. Default: the definition's.
    definition_hash:
        Content hash of the version wanted, or its first 8 or more characters. Default: the latest.
    wait:
        Wait for its end.
    timeout:
        With --wait: at most so many seconds.
    payloads:
        Also show the contents of input and results.
    """
    from amends.ids import new_saga_id
    from amends_runtime.cli.client import connect, whole_hash
    from amends_runtime.cli.saga_views import print_saga
    from amends_runtime.cli.waiting import interruptible, wait_for_end

    if timeout is not None and not wait:
        raise Exit(ExitCode.USAGE, "--timeout: bounds --wait; add --wait, or leave it out")
    labels = parse_pairs(label, "--label", "KEY=VALUE")
    content = _read_input(input_, content_type)
    # Made here, so that whoever interrupts the command still learns it.
    saga_id = new_saga_id() if id_ is None else id_
    then = f"amends wait {saga_id} waits for its end, amends get {saga_id} shows it"
    known = "may have been started, and goes on if it was"
    # One for both: in between the signal would end the command without a word.
    with interruptible(lambda: f"saga {saga_id} {known}; {then}"):
        async with connect(common) as client:
            if definition_hash is not None:
                definition_hash = await whole_hash(
                    client, definition, definition_hash, "--definition-hash"
                )
            started = await client.start(
                definition,
                content,
                saga_id=saga_id,
                labels=labels or None,
                deadline_s=deadline,
                definition_hash=definition_hash,
            )
            known = "has been started and goes on"
        saga = started.saga
        if wait and not saga.ended:
            saga = await wait_for_end(saga, common, timeout_s=timeout)
    print_saga(saga, common, payloads=payloads)
    return _code_of_end(saga) if wait else ExitCode.OK


async def get(saga_id: SagaId, /, *, payloads: Flag = False, common: Common = COMMON) -> None:
    """Show one saga: where it stands, step by step.

    NEXT is what a step waits for. Where that is its participant's answer, the call
    has been sent; or the participant works on it, has said InProgress, and is asked
    again by itself; or the runtime holds the call, mostly because the participant's
    breaker is open: amends breakers tells, and amends participants shows how many
    calls are in flight and how many wait.

    For example:

      amends get order-1
      amends get order-1 --payloads -o json

    Parameters
    ----------
    saga_id:
        The saga's id.
    payloads:
        Also show the contents of input and results.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.held_back import note_held_back
    from amends_runtime.cli.saga_views import print_saga

    async with connect(common) as client:
        saga = await client.get(saga_id)
        print_saga(saga, common, payloads=payloads)
        if saga.decision is not None and not saga.ended:
            await note_held_back(client, common)


async def list_(
    *,
    filters: Filters = ALL,
    limit: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 100,
    common: Common = COMMON,
) -> None:
    """List sagas, newest first.

    For example:

      amends list --state STUCK
      amends list --definition order --label region=eu --started-from 2h
      amends list --limit 100000 -o jsonl | jq -r .saga_id

    Parameters
    ----------
    limit:
        At most so many.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.documents import print_document, print_each
    from amends_runtime.cli.saga_views import listed, print_saga_table

    matching = filters.matching()
    found: list[Saga] = []
    printed = 0
    more = False
    async with connect(common) as client:
        # One more than asked for tells whether there are more.
        async for saga in client.list(**matching, limit=limit + 1):
            if len(found) + printed == limit:
                more = True
                break
            if common.output == "jsonl":
                print_each(listed(saga))
                printed += 1
            else:
                found.append(saga)
    if common.output == "json":
        print_document({"sagas": [listed(saga) for saga in found], "more": more}, "json")
        return
    if common.output == "table":
        print_saga_table(found)
        _say_what_is_stuck(found)
    if more:
        sys.stderr.write(f"amends: there are more; --limit {limit * 10} shows more of them\n")


def _say_what_is_stuck(sagas: Sequence[Saga]) -> None:
    """Says on standard error what can be done about sagas in a list that are STUCK."""
    stuck = [saga.saga_id for saga in sagas if saga.state == "STUCK"]
    if not stuck:
        return
    first = stuck[0]
    what = f"{first} is STUCK" if len(stuck) == 1 else f"{len(stuck)} are STUCK, such as {first}"
    sys.stderr.write(
        f"amends: {what}: amends get {first} shows why and what can be done; "
        f"amends retry {first} --reason WHY tries again\n"
    )


async def history(saga_id: SagaId, /, *, payloads: Flag = False, common: Common = COMMON) -> None:
    """Show what happened to a saga: every record, oldest first.

    For example:

      amends history order-1
      amends history order-1 -o jsonl | jq 'select(.kind == "AttemptFailed")'

    Parameters
    ----------
    saga_id:
        The saga's id.
    payloads:
        Also show the contents of input and results.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.record_views import print_records

    async with connect(common) as client:
        await print_records(saga_id, client.history(saga_id), common, payloads=payloads)


async def wait(
    saga_id: SagaId,
    /,
    *,
    timeout: Positive = None,
    payloads: Flag = False,
    common: Common = COMMON,
) -> int:
    """Wait until a saga has ended, then show it.

    The exit code is 0 if it completed, 6 if it ended otherwise, 5 if --timeout
    passed first. A restart of the runtime meanwhile does no harm. A saga that
    is stuck is said on standard error, once, and waited for all the same.

    For example:

      amends wait order-1 --timeout 60

    Parameters
    ----------
    saga_id:
        The saga's id.
    timeout:
        At most so many seconds. Default: as long as it takes.
    payloads:
        Also show the contents of input and results.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.saga_views import print_saga
    from amends_runtime.cli.waiting import wait_for_end

    async with connect(common) as client:
        saga = await client.get(saga_id)
    if not saga.ended:
        saga = await wait_for_end(saga, common, timeout_s=timeout)
    print_saga(saga, common, payloads=payloads)
    return _code_of_end(saga)


async def cancel(
    saga_id: Annotated[
        str, Parameter(name="ID", completer=candidates.saga_ids("RUNNING", "STUCK"))
    ],
    /,
    *,
    reason: str,
    author: str | None = None,
    common: Common = COMMON,
) -> None:
    """Turn a saga back: what has taken effect is compensated.

    Past the pivot it is too late: the exit code is 4 then, and nothing changes.
    While the pivot is being tried, the request is recorded and the pivot's
    outcome decides. A two-phase commit is aborted, unless COMMIT is decided.

    For example:

      amends cancel order-1 --reason "customer called"

    Parameters
    ----------
    saga_id:
        The saga's id.
    reason:
        Why; lands in the history.
    author:
        Who; lands in the history. Default: your user name.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.saga_views import print_cancelled

    reason = checked_reason(reason, "history")
    async with connect(common) as client:
        cancelled = await client.cancel(saga_id, reason=reason, author=whoever(author))
    print_cancelled(cancelled, common)


# -- input -----------------------------------------------------------------------------------------


def _read_input(given: str | None, content_type: str | None) -> object:
    """What to start a saga with. The content itself is never part of an error."""
    if given is None:
        if content_type is not None:
            raise Exit(ExitCode.USAGE, "--content-type: is the type of --input; give one")
        return None
    content = _read_source(given)
    if content_type is not None:
        from amends.payload import Payload

        return Payload(content, content_type)
    try:
        return json.loads(content)
    except UnicodeDecodeError:
        where = "is not UTF-8"
    except json.JSONDecodeError as error:
        where = f"is not JSON: {error.msg} at line {error.lineno} column {error.colno}"
    except (ValueError, RecursionError):
        where = "is not JSON that can be read"
    raise Exit(
        ExitCode.USAGE,
        f'--input: {where}; quote it for the shell, as in --input \'{{"sku": "A"}}\', or say what '
        "it is with --content-type",
    )


def _read_source(given: str) -> bytes:
    try:
        if given == "-":
            content = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
        elif given.startswith("@"):
            with Path(given[1:]).open("rb") as file:
                content = file.read(MAX_INPUT_BYTES + 1)
        else:
            return os.fsencode(given)
    except FileNotFoundError:
        raise Exit(
            ExitCode.USAGE, f"--input {given}: there is no such file; check the path"
        ) from None
    except OSError as error:
        raise Exit(ExitCode.USAGE, f"--input {given}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_INPUT_BYTES:
        raise Exit(ExitCode.USAGE, f"--input {given}: is larger than {MAX_INPUT_BYTES} bytes")
    return content


def _code_of_end(saga: Saga) -> ExitCode:
    return ExitCode.OK if saga.completed else ExitCode.NOT_COMPLETED
