"""`amends trace show` and `amends trace export`."""

# ruff: noqa: PLC0415  # what is heavy is imported by the command that runs, not by help

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from amends_runtime.cli import candidates
from amends_runtime.cli.exits import Exit, ExitCode, one_line
from amends_runtime.cli.options import COMMON, Common, Flag

if TYPE_CHECKING:
    from amends.sagas import Trace

__all__ = ["HELP", "export", "show"]

HELP: Final = """See a saga's trace: here, or in a tracing system.

The runtime makes a trace from the saga's history, so it has one for every saga,
sampled or not, however old. What participants traced themselves is not in it.

For example:

  amends trace show order-1
  amends trace export order-1 --to 127.0.0.1:4317"""

SagaId = Annotated[str, Parameter(name="ID", completer=candidates.saga_ids())]


async def show(saga_id: SagaId, /, *, common: Common = COMMON) -> None:
    """Show a saga's trace as a tree: what happened when, and how long it took.

    AT counts from the saga's start. What has not ended says so. A call without an
    answer is on the wire; or its participant has said InProgress and is asked again
    by itself; or the runtime holds it, mostly because the participant's breaker is
    open: amends breakers tells. With -o json each span has its ids, its instants
    in nanoseconds, attributes, events and links; what has not ended ends there at
    the saga's last record.

    For example:

      amends trace show order-1
      amends trace show order-1 -o json | jq '.spans[] | select(.error)'

    Parameters
    ----------
    saga_id:
        The saga's id.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.trace_views import print_trace

    async with connect(common) as client:
        trace = await client.trace(saga_id, include_open=True)
    print_trace(trace, common)


async def export(
    saga_id: SagaId,
    /,
    *more: SagaId,
    to: str | None = None,
    protocol: Literal["grpc", "http/protobuf"] | None = None,
    include_open: Flag = False,
    common: Common = COMMON,
) -> None:
    """Print sagas' traces as OTLP JSON, or send them to a collector.

    For a saga that was not sampled, one whose spans were lost, or a collector
    that was not there. Sent once more, spans have the same ids and contents as
    before.

    Without --to it prints one JSON document on one line, as collectors read it
    from files and over HTTP; -o json spreads it over many lines, -o jsonl gives
    each saga a line of its own. Nothing is sent unless --to says where: headers,
    certificates, protocol and time-out of OTEL_EXPORTER_OTLP_* count, endpoints
    do not.

    The exit code is 5 if the collector is not there or refuses a span; those
    that it took before it keeps, and sending them again does no harm. It is 3 if
    there is no saga of one of the ids; the others are printed or sent.

    For example:

      amends trace export order-1 order-2 --to 127.0.0.1:4317
      amends trace export order-1 --to localhost:4318 --protocol http/protobuf
      amends trace export order-1 > order-1.jsonl

    Parameters
    ----------
    saga_id:
        The saga's id.
    more:
        Further ones.
    to:
        HOST:PORT or URL of a collector, such as Jaeger's port 4317. Default: print.
    protocol:
        grpc (port 4317, the default), or http/protobuf (port 4318).
    include_open:
        Also spans that have not ended. They end at the saga's last record and are
        marked amends.open; a later export has others in their place.
    """
    from amends.errors import NotFound
    from amends_runtime.cli.client import connect, exit_of
    from amends_runtime.cli.otlp import destination, print_traces, send

    where = None if to is None else destination(to, protocol)
    traces: dict[str, Trace] = {}
    unknown: list[str] = []
    async with connect(common) as client:
        for each in dict.fromkeys((saga_id, *more)):
            try:
                traces[each] = await client.trace(each, include_open=include_open)
            except NotFound as error:
                unknown += exit_of(error, common.target).lines
    if not traces:
        raise Exit(ExitCode.NOT_FOUND, *unknown)
    if where is None:
        print_traces(traces.values(), common.output)
    else:
        try:
            await send(where, traces.values())
        except Exit as refused:
            raise Exit(refused.code, *refused.lines, *unknown) from None
    for each, trace in traces.items():
        did = "" if where is None else f", sent to {where}"
        left = ""
        if trace.open_spans and not include_open:
            left = f"; {trace.open_spans} more have not ended (--include-open)"
        spans = "1 span" if trace.spans == 1 else f"{trace.spans} spans"
        line = f"amends: saga {each}: trace {trace.trace_id}, {spans}{did}{left}"
        sys.stderr.write(one_line(line) + "\n")
    if unknown:
        raise Exit(ExitCode.NOT_FOUND, *unknown)
