"""`amends watch`: what happens to sagas, as it happens.

1. Without an id: every turn of every saga that matches, from now on or from a resume token, until
   somebody ends it. Whoever ends it is told the token by which the next one goes on.
2. With an id: that saga's whole history so far, then its turns, until its end.
3. A turn is told once, through restarts of the runtime; the SDK's client sees to that.
"""

# ruff: noqa: PLC0415  # what is heavy is imported by the command that runs, not by help

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import stat
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from amends_runtime.cli import candidates
from amends_runtime.cli.exits import Exit, ExitCode, one_line
from amends_runtime.cli.filters import ALL, Filters
from amends_runtime.cli.options import COMMON, Common, Flag

if TYPE_CHECKING:
    import amends
    from amends.sagas import Record, Saga, WatchEvent
    from amends_runtime.cli.filters import Matching

__all__ = ["Turns", "follow", "watch"]


async def watch(
    saga_id: Annotated[str | None, Parameter(name="ID", completer=candidates.saga_ids())] = None,
    /,
    *,
    filters: Filters = ALL,
    resume: str | None = None,
    payloads: Flag = False,
    common: Common = COMMON,
) -> int:
    """Watch sagas: a line for each turn, as it is committed.

    Without an ID it watches all sagas that match, until Ctrl-C (exit code 130) or
    SIGTERM (143), and says the token with which --resume goes on: nothing is lost
    or told twice. --state means the state after the turn.

    With an ID it shows that saga's history so far and follows it to its end; the
    exit code is 0 if it completed, 6 if it ended otherwise.

    A restart of the runtime meanwhile is waited out. With -o jsonl a line is
    {"saga", "records", "resume_token", "lagged", "purged_turns"}, where a notice
    has no saga; with an ID it is a record, as amends history -o jsonl prints it.

    For example:

      amends watch --definition order --state STUCK
      amends watch order-1
      amends watch -o jsonl | jq -r 'select(.saga) | .saga.saga_id'

    Parameters
    ----------
    saga_id:
        Only this saga, until its end.
    resume:
        Go on after this token of an earlier watch. Default: from now.
    payloads:
        Also show the contents of input and results.
    """
    from amends_runtime.cli.client import connect

    if common.output == "json":
        raise Exit(ExitCode.USAGE, "-o json: a stream is not one document; write -o jsonl")
    if saga_id is not None and (resume is not None or filters != ALL):
        raise Exit(
            ExitCode.USAGE,
            f"{saga_id}: a saga's history is shown from its beginning; leave --resume and the "
            "filters out",
        )
    matching = filters.matching()
    async with connect(common) as client:
        # A runtime that cannot be reached is said at once; only then a restart is waited out.
        await (client.breakers() if saga_id is None else client.get(saga_id))
    async with connect(common, patient=True) as client:
        with _until_reader_leaves():
            if saga_id is None:
                return await _watch_all(client, matching, resume, common, payloads=payloads)
            return await _watch_one(client, saga_id, common, payloads=payloads)


async def _watch_all(
    client: amends.Client,
    matching: Matching,
    resume: str | None,
    common: Common,
    *,
    payloads: bool,
) -> int:
    from amends.errors import InvalidRequest
    from amends_runtime.cli.waiting import interruptible

    token = resume or ""

    def how_to_go_on() -> str:
        return f"to go on: --resume {token}" if token else "nothing was watched yet"

    shown = _Events(common, payloads=payloads)
    with interruptible(how_to_go_on):
        try:
            async with _watched(client, matching, resume) as events:
                async for event in events:
                    shown.print(event)
                    token = event.resume_token
        except InvalidRequest as refused:
            if [each.field for each in refused.violations] != ["resume_token"]:
                raise
            [why] = refused.violations
            said = why.message.replace("resume_token of a response before", "one that a watch said")
            raise Exit(ExitCode.USAGE, f"--resume: {said}") from refused
    raise AssertionError("a watch has no end")


async def _watch_one(client: amends.Client, saga_id: str, common: Common, *, payloads: bool) -> int:
    from amends_runtime.cli.documents import document, print_each
    from amends_runtime.cli.saga_views import why_stuck
    from amends_runtime.cli.waiting import interruptible

    turns = Turns(payloads=payloads)
    is_stuck = False
    then = f"saga {saga_id} goes on; amends watch {saga_id} shows all of it again"
    with interruptible(then):
        async for records, saga in follow(client, saga_id):
            if common.output == "jsonl":
                for record in records:
                    print_each(document(record, payloads=payloads))
            else:
                turns.print(records)
            if saga is not None and (saga.state == "STUCK") is not is_stuck:
                is_stuck = not is_stuck
                if is_stuck:
                    why = why_stuck(await client.get(saga_id))
                    sys.stderr.write(f"amends: {one_line(why)}; watching on\n")
                    sys.stderr.flush()
    saga = await client.get(saga_id)
    return ExitCode.OK if saga.completed else ExitCode.NOT_COMPLETED


async def follow(
    client: amends.Client, saga_id: str
) -> AsyncIterator[tuple[tuple[Record, ...], Saga | None]]:
    """A saga's turns from its beginning to its end: the records, and the saga after them.

    The saga is None for what lies before the present.
    """
    saga = await client.get(saga_id)
    # There is no filter for an id; of its definition few were started in the same millisecond.
    only: Matching = {
        "state": None,
        "definition": saga.definition,
        "labels": None,
        "started_from_ms": saga.started_at_ms,
        "started_before_ms": saga.started_at_ms + 1,
    }
    async with _watched(client, only, None) as events:
        # Watched from here on: what is committed after the history is read comes as an event.
        await anext(events)
        seen = 0
        history = [record async for record in client.history(saga_id)]
        saga = await client.get(saga_id)
        for version, records in groupby(history, lambda record: record.version):
            seen = version
            # What is stuck is stuck now, and not in the middle of its past.
            yield tuple(records), saga if version == saga.version else None
        if history and history[-1].kind == "SagaEnded":
            return
        async for event in events:
            if event.saga is None or event.saga.saga_id != saga_id:
                continue
            if event.records[0].version <= seen:
                continue
            yield event.records, event.saga
            if event.records[-1].kind == "SagaEnded":
                return


@asynccontextmanager
async def _watched(
    client: amends.Client, matching: Matching, resume: str | None
) -> AsyncIterator[AsyncIterator[WatchEvent]]:
    events = client.watch(**matching, resume_token=resume)
    assert isinstance(events, AsyncGenerator), "to be closed as soon as nobody reads it any more"
    async with aclosing(events):
        yield events


class _Events:
    """Events of many sagas, a line each."""

    def __init__(self, common: Common, *, payloads: bool) -> None:
        from amends.sagas import SagaState
        from amends_runtime.cli.tables import Columns

        self._common = common
        self._payloads = payloads
        self._columns = Columns(
            *("AT", "SAGA", "DEFINITION", "STATE", "WHAT HAPPENED"), expected={"STATE": SagaState}
        )
        self._begun = False
        self._lagged = False

    def print(self, event: WatchEvent) -> None:
        from amends_runtime.cli.documents import document, print_each
        from amends_runtime.cli.record_views import in_words
        from amends_runtime.cli.saga_views import listed
        from amends_runtime.cli.tables import short_instant

        if self._common.output == "jsonl":
            found = document(event, payloads=self._payloads)
            found["saga"] = None if event.saga is None else listed(event.saga)
            print_each(found)
            return
        self._say(event)
        if event.saga is not None:
            self._columns.print(
                short_instant(event.records[0].at_ms, with_ms=True),
                event.saga.saga_id,
                event.saga.definition,
                event.saga.state,
                in_words(event.records, payloads=self._payloads),
            )

    def _say(self, event: WatchEvent) -> None:
        """Says on standard error what a person should know of the watch itself."""
        said = []
        if not self._begun and sys.stderr.isatty():
            said.append("watching; Ctrl-C ends it")
        if event.lagged and not self._lagged:
            said.append("far behind what is committed; nothing is skipped, it only comes late")
        if event.purged_turns:
            said.append(
                f"{event.purged_turns} turns from before here were purged and cannot be told"
            )
        self._begun, self._lagged = True, event.lagged
        for line in said:
            sys.stderr.write(f"amends: {line}\n")
        sys.stderr.flush()


class Turns:
    """Turns of one saga, a line each."""

    def __init__(self, *, payloads: bool) -> None:
        from amends_runtime.cli.tables import Columns

        self._payloads = payloads
        self._columns = Columns("AT", "WHAT HAPPENED")

    def print(self, records: tuple[Record, ...]) -> None:
        from amends_runtime.cli.record_views import in_words
        from amends_runtime.cli.tables import short_instant

        at = short_instant(records[0].at_ms, with_ms=True)
        self._columns.print(at, in_words(records, payloads=self._payloads))


@contextlib.contextmanager
def _until_reader_leaves() -> Iterator[None]:
    """Ends the block with BrokenPipeError as soon as nobody reads standard output any more.

    As in `amends watch -o jsonl | head -1`: the next line, which would notice, may be hours away.
    """
    output = _pipe_of_output()
    if output is None:
        yield
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None, "a command is a task"
    poll = select.poll()
    poll.register(output, 0)  # errors only, which a pipe has once its reader is gone
    has_left = False

    def on_event() -> None:
        nonlocal has_left
        loop.remove_reader(output)
        if poll.poll(0):
            has_left = True
            task.cancel()

    loop.add_reader(output, on_event)
    try:
        yield
    except Exit as interrupted:
        if has_left:
            raise BrokenPipeError from interrupted
        raise
    except asyncio.CancelledError:
        if has_left:
            raise BrokenPipeError from None
        raise
    finally:
        loop.remove_reader(output)


def _pipe_of_output() -> int | None:
    try:
        output = sys.stdout.fileno()
    except OSError:  # replaced by something that is no file
        return None
    return output if stat.S_ISFIFO(os.fstat(output).st_mode) else None
