"""A real Jaeger shows a saga as one trace: what was sent is read back through its HTTP API.

    JAEGER_OTLP=127.0.0.1:4317 JAEGER_QUERY=http://127.0.0.1:16686 \
        make test ARGS=tests/acceptance/test_jaeger.py

with the Jaeger of deploy/compose/compose.yaml, or any other of version 2. Without these variables
the tests that need it are reported as skipped; what reads Jaeger's answers is tested in any case.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import pytest

from amends import RecordKind
from shop.catalogue import DECLINED_CARD
from tests.acceptance.traced import shop_that_traces, traced_world, world_of
from tests.acceptance.world import PATIENCE_S
from tests.telemetry.otlp_receiver import Received as Decoded
from tests.telemetry.otlp_receiver import ReceivedSpan, Request, receiving
from tests.telemetry.trace_rules import CLIENT, INTERNAL, SERVER

OTLP: Final = os.environ.get("JAEGER_OTLP", "")
QUERY: Final = os.environ.get("JAEGER_QUERY", "").rstrip("/")

LOOK_EVERY_S: Final = 0.5
"""How often Jaeger is asked: it tells nobody when a trace is complete."""

HTTP_TIMEOUT_S: Final = 5.0

PAGE: Final = Path(__file__).parents[2] / "docs" / "observing.md"

KINDS: Final = {INTERNAL: "internal", CLIENT: "client", SERVER: "server"}

needs_jaeger = pytest.mark.skipif(
    not (OTLP and QUERY),
    reason="no Jaeger: set JAEGER_OTLP=HOST:4317 and JAEGER_QUERY=http://HOST:16686",
)


@needs_jaeger
async def test_a_real_jaeger_shows_completed_and_compensated_sagas(tmp_path: Path) -> None:
    """Every span under its service and parent, links to what is undone, and no warning."""
    async with (
        shop_that_traces(tmp_path, OTLP) as (processes, services),
        world_of(processes, services) as world,
    ):
        completed = await world.start()
        compensated = await world.start(card=DECLINED_CARD)
        for started in (completed, compensated):
            await world.end(started)
        for started in (completed, compensated):
            trace = await world.client.trace(started.saga_id)
            sent = Decoded()
            sent.add(Request("traces", "grpc", {}, trace.traces_data))
            await shown_well(trace.trace_id, sent.spans())


@needs_jaeger
async def test_a_real_jaeger_finds_what_the_page_says_to_search_for(tmp_path: Path) -> None:
    """Each line of its table finds the sagas that it names, and not one that went well."""
    async with (
        shop_that_traces(tmp_path, OTLP) as (processes, services),
        world_of(processes, services) as world,
    ):
        labelled = await world.client.start(
            "thoughtful", labels={"region": "eu"}, timeout_s=PATIENCE_S
        )
        well = await world.start()
        refused = await world.start(card=DECLINED_CARD)
        await labelled.result(timeout_s=PATIENCE_S)
        for started in (well, refused):
            await world.end(started)

        world.switch(orders={"confirm": {"decline": {"next": 1}}})
        mended = await world.start()
        await world.wait_record(mended.saga_id, RecordKind.STEP_STUCK, "confirm")
        await mended.retry(author="ada", reason="the shop is open again")
        await world.end(mended)
        abandoned = await world.client.start("regretted", timeout_s=PATIENCE_S)
        await world.wait_record(abandoned.saga_id, RecordKind.STEP_STUCK)
        await abandoned.abandon(author="ada", reason="settled by hand")

        world.switch(payments={"charge": {"lose_reply": {"next": 1}}})
        retried = await world.start()
        await world.end(retried)

        world.switch(payments={"charge": {"slow": {"next": 1}, "slow_s": 2}})
        struck = world.strikes("payments", "charge slow")
        killed = await world.start()
        await world.wait_strike("payments", "charge slow", after=struck)
        world.runtime.kill()
        await world.runtime.start()
        await world.end(killed)

        expected = {
            "amends.saga_id=order-1": well,
            "amends.outcome=COMPENSATED": refused,
            "amends.outcome=ABANDONED": abandoned,
            "amends.outcome=stuck": mended,
            "amends.outcome=lost": killed,
            "amends.outcome=rejected amends.step=charge": refused,
            "amends.label.region=eu": labelled,
            "amends.outcome=unknown service.peer.name=payments": retried,
        }
        page = PAGE.read_text(encoding="utf-8")
        searches = re.findall(r"^\| `(\S+=[^`]+)` \|", page, re.MULTILINE)
        assert set(searches) | {"amends.outcome=ABANDONED"} == set(expected)
        good = await world.client.trace(well.saga_id)
        for search, started in expected.items():
            trace = await world.client.trace(started.saga_id)
            words = search.replace("order-1", started.saga_id)
            found = await found_at_last(words, trace.trace_id)
            assert started is well or good.trace_id not in found, search


async def found_at_last(words: str, trace_id: str) -> set[str]:
    """Search with what one types into Jaeger's *Tags* until a trace is found; give all."""
    give_up_at_s = time.monotonic() + PATIENCE_S
    while True:
        found = await anyio.to_thread.run_sync(searched, words)
        if trace_id in found:
            return found
        assert time.monotonic() < give_up_at_s, f"{words} does not find {trace_id}"
        await anyio.sleep(LOOK_EVERY_S)


def searched(words: str) -> set[str]:
    """Give the ids of the traces of service amends that have a span with all of these tags."""
    tags = json.dumps(dict(word.split("=", 1) for word in words.split()))
    query = urllib.parse.urlencode({"service": "amends", "tags": tags, "limit": 1500})
    with urllib.request.urlopen(  # noqa: S310  # ours
        f"{QUERY}/api/traces?{query}", timeout=HTTP_TIMEOUT_S
    ) as answer:
        return {trace["traceID"] for trace in json.load(answer)["data"]}


async def shown_well(trace_id: str, sent: list[ReceivedSpan]) -> None:
    """Ask Jaeger until it shows the trace as it is; raises AssertionError with what is wrong."""
    give_up_at_s = time.monotonic() + PATIENCE_S
    while True:
        document = await anyio.to_thread.run_sync(asked, trace_id)
        wrong = list(faults(document, sent))
        if not wrong:
            return
        assert time.monotonic() < give_up_at_s, "\n".join(wrong)
        await anyio.sleep(LOOK_EVERY_S)


def asked(trace_id: str) -> dict[str, Any]:
    """Give what Jaeger says of a trace; nothing if it does not know it."""
    url = f"{QUERY}/api/traces/{trace_id}"
    try:
        with urllib.request.urlopen(url, timeout=HTTP_TIMEOUT_S) as answer:  # noqa: S310  # ours
            document: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 404:  # it takes a moment until it can be found
            return {"data": []}
        raise
    return document


def faults(document: dict[str, Any], sent: Iterable[ReceivedSpan]) -> Iterator[str]:
    """Tell how what Jaeger shows differs from what the runtime has sent.

    Of the participants' spans, that each attempt has one, of that participant.
    """
    traces = document.get("data") or []
    if len(traces) != 1:
        yield f"{len(traces)} traces"
        return
    (trace,) = traces
    shown = {each["spanID"]: each for each in trace["spans"]}
    services = {key: each["serviceName"] for key, each in trace["processes"].items()}
    for each in trace["spans"]:
        for warning in each.get("warnings") or []:
            yield f"{each['operationName']}: {warning}"
    for span in sent:
        found = shown.get(span.span_id)
        if found is None:
            yield f"{span.name} ({span.span_id}) is missing"
            continue
        yield from _differences(span, found, services[found["processID"]])
        if span.proto.kind == CLIENT and span.attributes["amends.outcome"] in {"done", "rejected"}:
            served = {
                services[each["processID"]]
                for each in trace["spans"]
                if (span.span_id, "CHILD_OF") in _references(each)
            }
            if served != {span.attributes["service.peer.name"]}:
                yield f"{span.name} ({span.span_id}): below it are spans of {served or 'nobody'}"


def _differences(span: ReceivedSpan, found: dict[str, Any], service: str) -> Iterator[str]:
    tags = {tag["key"]: tag["value"] for tag in found["tags"]}
    parents = [(span.parent_id, "CHILD_OF")] if span.parent_id else []
    links = [(link.span_id.hex(), "FOLLOWS_FROM") for link in span.proto.links]
    start_us = span.proto.start_time_unix_nano // 1000
    took_us = (span.proto.end_time_unix_nano - span.proto.start_time_unix_nano) // 1000
    for what, wanted, is_so in (
        ("name", span.name, found["operationName"]),
        ("service", "amends", service),
        ("kind", KINDS[span.proto.kind], tags.get("span.kind")),
        ("error", bool(span.proto.status.code), bool(tags.get("error", False))),
        ("references", sorted(parents + links), sorted(_references(found))),
        ("outcome", span.attributes.get("amends.outcome"), tags.get("amends.outcome")),
        ("saga", span.attributes.get("amends.saga_id"), tags.get("amends.saga_id")),
        ("start", start_us, found["startTime"]),
        ("duration", took_us, found["duration"]),
        ("events", len(span.proto.events), len(found.get("logs") or [])),
    ):
        if wanted != is_so:
            yield f"{span.name} ({span.span_id}): its {what} is {is_so}, not {wanted}"


def _references(shown: dict[str, Any]) -> list[tuple[str, str]]:
    return [(each["spanID"], each["refType"]) for each in shown.get("references") or []]


# -- the reader itself -----------------------------------------------------------------------------


def as_jaeger_shows_it(spans: list[ReceivedSpan]) -> dict[str, Any]:
    """Give the JSON of Jaeger's API, as its documentation maps OTLP to it."""
    services = sorted({each.service for each in spans})
    return {
        "data": [
            {
                "traceID": spans[0].trace_id,
                "spans": [_shown(each, f"p{services.index(each.service)}") for each in spans],
                "processes": {
                    f"p{number}": {"serviceName": name} for number, name in enumerate(services)
                },
                "warnings": None,
            }
        ]
    }


def _shown(span: ReceivedSpan, process: str) -> dict[str, Any]:
    proto = span.proto
    tags = {**span.attributes, "span.kind": KINDS[proto.kind]}
    if proto.status.code:
        tags |= {"error": True, "otel.status_description": proto.status.message}
    links = [("FOLLOWS_FROM", link.span_id.hex()) for link in proto.links]
    parents = [("CHILD_OF", span.parent_id)] if span.parent_id else []
    return {
        "spanID": span.span_id,
        "operationName": span.name,
        "references": [
            {"refType": kind, "traceID": span.trace_id, "spanID": span_id}
            for kind, span_id in (*parents, *links)
        ],
        "startTime": proto.start_time_unix_nano // 1000,
        "duration": (proto.end_time_unix_nano - proto.start_time_unix_nano) // 1000,
        "tags": [{"key": key, "value": value} for key, value in tags.items()],
        "logs": [{"timestamp": event.time_unix_nano // 1000} for event in proto.events],
        "processID": process,
        "warnings": None,
    }


async def test_the_reader_sees_what_jaeger_would_show_wrongly(tmp_path: Path) -> None:
    """With spans of real processes, in Jaeger's format; a real Jaeger is in the test above."""
    async with receiving() as receiver, traced_world(tmp_path, receiver) as traced:
        started = await traced.world.start(card=DECLINED_CARD)
        await traced.world.end(started)
        trace = await traced.well_formed(started.saga_id)
        told = await traced.client.trace(started.saga_id)
    sent = Decoded()
    sent.add(Request("traces", "grpc", {}, told.traces_data))
    good = as_jaeger_shows_it(list(trace.received))
    assert list(faults(good, sent.spans())) == []
    assert list(faults({"data": []}, sent.spans())) == ["0 traces"]

    for what, key, value in (
        ("warnings", "warnings", ["invalid parent span IDs=1; skipping clock skew adjustment"]),
        ("references", "references", []),
        ("service", "processID", "p1"),
        ("name", "operationName", "x"),
        ("start", "startTime", 0),
        ("tags", "tags", []),
        ("id", "spanID", "0000000000000001"),
    ):
        bad = deepcopy(good)
        links = [each for each in bad["data"][0]["spans"] if len(each["references"]) > 1]
        links[0][key] = value
        assert list(faults(bad, sent.spans())), what
    alone = deepcopy(good)
    alone["data"][0]["spans"] = [
        each for each in alone["data"][0]["spans"] if each["processID"] == "p0"
    ]
    assert alone["data"][0]["processes"]["p0"]["serviceName"] == "amends"
    assert any("nobody" in line for line in faults(alone, sent.spans()))
