"""The rules of a well-formed trace see what they are there for: each is broken here."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeAlias

import pytest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.telemetry.otlp_receiver import ReceivedSpan
from tests.telemetry.trace_rules import (
    CLIENT,
    ERROR,
    INTERNAL,
    RULES,
    SERVER,
    UNSET,
    Expectation,
    assert_well_formed,
    broken_rules,
    tree,
)

TRACE = "0af7651916cd43dd8448eb211c80319c"
OTHER_TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
MS = 1_000_000

AFTER = {"charge": ("place",)}
"""The definition: place, then charge."""

AMENDS = {"service.name": "amends", "service.version": "0.1.0", "service.instance.id": "one"}

Spans: TypeAlias = dict[str, ReceivedSpan]
"""By names of the tests' own."""

Break: TypeAlias = Callable[[Spans], None]


def pairs(attributes: dict[str, Any]) -> list[KeyValue]:
    """Attributes as they travel."""
    return [
        KeyValue(
            key=key,
            value=AnyValue(int_value=value)
            if isinstance(value, int)
            else AnyValue(string_value=value),
        )
        for key, value in attributes.items()
    ]


class Maker:
    """Makes spans, each with the next id."""

    def __init__(self) -> None:
        self.spans: Spans = {}

    def add(
        self,
        key: str,
        name: str,
        kind: Span.SpanKind.ValueType,
        ms: tuple[float, float],
        below: str = "",
        *,
        resource: dict[str, str] | None = None,
        error: str = "",
        links: tuple[tuple[str, str], ...] = (),
        **attributes: Any,
    ) -> None:
        """Add a span from and to so many milliseconds; attributes have `__` where a dot is."""
        span = Span(
            trace_id=bytes.fromhex(TRACE),
            span_id=(len(self.spans) + 1).to_bytes(8, "big"),
            parent_span_id=bytes.fromhex(self.spans[below].span_id) if below else b"",
            name=name,
            kind=kind,
            start_time_unix_nano=round((1000 + ms[0]) * MS),
            end_time_unix_nano=round((1000 + ms[1]) * MS),
            attributes=pairs({name.replace("__", "."): v for name, v in attributes.items()}),
            links=[
                Span.Link(
                    trace_id=bytes.fromhex(TRACE),
                    span_id=bytes.fromhex(self.spans[to].span_id),
                    attributes=pairs({"amends.link": what}),
                )
                for what, to in links
            ],
        )
        if error:
            span.status.code = ERROR
            span.status.message = error
        self.spans[key] = ReceivedSpan(span, resource or AMENDS, "amends")

    def step(  # what stands in its attributes
        self, key: str, verb: str, step: str, ms: tuple[float, float], outcome: str, **more: Any
    ) -> None:
        """Add a step's span."""
        name = f"{'step' if verb == 'execute' else verb} {step}"
        verb = "execute" if verb == "commit" else verb
        undoes: dict[str, Any] = {"amends__undoes": step} if verb == "compensate" else {}
        about: dict[str, Any] = {
            "amends__saga_id": "order-1",
            "amends__step": step,
            "amends__participant": "bank",
            "amends__action": step,
            "amends__verb": verb,
            "amends__round": 1,
            "amends__outcome": outcome,
        }
        self.add(key, name, INTERNAL, ms, "root", **about, **undoes, **more)

    def attempt(  # as `step`
        self, key: str, below: str, ms: tuple[float, float], outcome: str, **more: Any
    ) -> None:
        """Add an attempt's span."""
        verb = self.spans[below].attributes["amends.verb"]
        about: dict[str, Any] = {
            "rpc__system__name": "grpc",
            "rpc__method": f"amends.v1.ParticipantService/{verb.capitalize()}",
            "service__peer__name": "bank",
            "amends__epoch": 1,
            "amends__outcome": outcome,
        }
        self.add(key, about["rpc__method"], CLIENT, ms, below, **about, **more)

    def server(self, key: str, below: str, ms: tuple[float, float]) -> None:
        """Add the participant's span of an attempt."""
        attempt = self.spans[below]
        step = next(s for s in self.spans.values() if s.span_id == attempt.parent_id)
        about: dict[str, Any] = {
            "rpc__system__name": "grpc",
            "rpc__method": attempt.name,
            "amends__attempt": attempt.attributes["amends.attempt"],
        }
        for name in ("saga_id", "step", "verb", "round", "participant"):
            about[f"amends__{name}"] = step.attributes[f"amends.{name}"]
        self.add(key, attempt.name, SERVER, ms, below, resource={"service.name": "bank"}, **about)


def a_saga() -> Spans:
    """Place is lost and asked again, charge polled and refused; a stuck undoing is retried."""
    maker = Maker()
    maker.add(
        "root",
        "saga order",
        INTERNAL,
        (0, 100),
        error="COMPENSATED: card_declined at charge",
        amends__saga_id="order-1",
        amends__definition="order",
        amends__definition_hash="f00d",
        amends__store_id="store",
        amends__outcome="COMPENSATED",
    )
    maker.step("place", "execute", "place", (1, 30), "done")
    maker.attempt(
        "place 1", "place", (1, 10), "lost", error="lost: x", amends__attempt=1, error__type="lost"
    )
    maker.server("bank 1", "place 1", (2, 12))
    maker.add("wait", "breaker open: bank", INTERNAL, (10, 20), "place", amends__held_ms=10)
    maker.attempt(
        "place 2", "place", (20, 30), "done", amends__attempt=2, rpc__response__status_code="OK"
    )
    maker.server("bank 2", "place 2", (21, 29))
    maker.add(
        "author", "authorise card", INTERNAL, (22, 28), "bank 2", resource={"service.name": "bank"}
    )
    maker.step("charge", "execute", "charge", (31, 50), "rejected", error="card_declined")
    maker.attempt("charge 1", "charge", (32, 50), "rejected", amends__attempt=1, amends__polls=1)
    maker.server("bank 3", "charge 1", (33, 34))
    maker.server("bank 4", "charge 1", (44, 49))
    maker.step(
        "undo", "compensate", "place", (51, 60), "stuck", error="x", links=(("undoes", "place"),)
    )
    maker.attempt("undo 1", "undo", (51, 60), "broken", error="x", amends__attempt=1,
                  error__type="x")  # fmt: skip
    maker.server("bank 5", "undo 1", (52, 59))
    maker.step(
        "undo again", "compensate", "place", (80, 90), "done",
        links=(("undoes", "place"), ("retries", "undo")),
    )  # fmt: skip
    maker.attempt("undo 2", "undo again", (81, 90), "done", amends__attempt=2)
    maker.server("bank 6", "undo 2", (82, 89))
    return maker.spans


def a_commit() -> Spans:
    """A two-phase commit: both vote yes, both are told; the participant is not traced."""
    maker = Maker()
    maker.add(
        "root",
        "saga order",
        INTERNAL,
        (0, 100),
        amends__saga_id="order-1",
        amends__definition="order",
        amends__definition_hash="f00d",
        amends__store_id="store",
        amends__outcome="COMPLETED",
    )
    attempt = {"amends__attempt": 1, "rpc__response__status_code": "OK"}
    for step, until_ms in (("debit", 20), ("credit", 30)):
        maker.step(f"ask {step}", "prepare", step, (1, until_ms), "prepared")
        maker.attempt(f"ask {step} 1", f"ask {step}", (2, until_ms), "done", **attempt)
    decided_as("root", 30, "commit")(maker.spans)
    for step in ("debit", "credit"):
        links = (("commits", f"ask {step}"),)
        maker.step(f"tell {step}", "commit", step, (30, 60), "done", links=links)
        maker.attempt(f"tell {step} 1", f"tell {step}", (31, 60), "done", **attempt)
    return maker.spans


def decided_as(key: str, ms: float, decision: str) -> Break:
    """A decision more, of the first round."""

    def do(spans: Spans) -> None:
        told = pairs({"amends.decision": decision, "amends.round": 1})
        event = spans[key].proto.events.add(name="decision made", attributes=told)
        event.time_unix_nano = round((1000 + ms) * MS)

    return do


def undecided(key: str) -> Break:
    """A root without its events."""
    return lambda spans: spans[key].proto.ClearField("events")


def test_a_well_formed_trace_breaks_no_rule() -> None:
    """All rules together, and the tree that a failure would show."""
    trace = assert_well_formed(a_saga().values(), Expectation(after=AFTER))

    lines = tree(trace.spans)
    assert lines[0].startswith("saga order ")
    assert lines[0].endswith("ERROR COMPENSATED: card_declined at charge")
    assert sum("attempt" in line for line in lines) == 5


# -- what breaks each of them ----------------------------------------------------------------------


def moved(key: str, start_ms: float, end_ms: float) -> Break:
    """Another time."""

    def do(spans: Spans) -> None:
        spans[key].proto.start_time_unix_nano = round((1000 + start_ms) * MS)
        spans[key].proto.end_time_unix_nano = round((1000 + end_ms) * MS)

    return do


def put_below(key: str, parent_id: str) -> Break:
    """Another parent, by id."""

    def do(spans: Spans) -> None:
        spans[key].proto.parent_span_id = bytes.fromhex(parent_id)

    return do


def put_below_span(key: str, parent: str) -> Break:
    """Another parent, by the tests' name of it."""
    return lambda spans: put_below(key, spans[parent].span_id)(spans)


def told(key: str, attribute: str, value: str | int) -> Break:
    """Another value of an attribute."""

    def do(spans: Spans) -> None:
        untold(key, attribute)(spans)
        spans[key].proto.attributes.extend(pairs({attribute: value}))

    return do


def untold(key: str, attribute: str) -> Break:
    """An attribute less."""

    def do(spans: Spans) -> None:
        kept = [pair for pair in spans[key].proto.attributes if pair.key != attribute]
        del spans[key].proto.attributes[:]
        spans[key].proto.attributes.extend(kept)

    return do


def of_service(key: str, **resource: str) -> Break:
    """Another sender; names have `__` where a dot is."""

    def do(spans: Spans) -> None:
        named = {name.replace("__", "."): value for name, value in resource.items()}
        spans[key] = ReceivedSpan(spans[key].proto, named, "amends")

    return do


def missing(key: str) -> Break:
    """A span that did not come."""

    def do(spans: Spans) -> None:
        del spans[key]

    return do


def set_field(key: str, field: str, value: object) -> Break:
    """Another value of a span's own field."""
    return lambda spans: setattr(spans[key].proto, field, value)


def again(key: str, **changes: object) -> Break:
    """The same span once more, perhaps changed."""

    def do(spans: Spans) -> None:
        proto = deepcopy(spans[key].proto)
        for field, value in changes.items():
            setattr(proto, field, value)
        spans[f"{key} again"] = ReceivedSpan(proto, spans[key].resource, spans[key].scope)

    return do


def unlinked(key: str) -> Break:
    """A span without its links."""

    def do(spans: Spans) -> None:
        del spans[key].proto.links[:]

    return do


def linked_to(key: str, trace_id: str, span_id: str) -> Break:
    """A link more."""

    def do(spans: Spans) -> None:
        spans[key].proto.links.add(trace_id=bytes.fromhex(trace_id), span_id=bytes.fromhex(span_id))

    return do


def failed(key: str, message: str) -> Break:
    """A span that is ERROR."""

    def do(spans: Spans) -> None:
        spans[key].proto.status.code = ERROR
        spans[key].proto.status.message = message

    return do


def all_of_trace(trace_id: bytes) -> Break:
    """All spans of another trace."""

    def do(spans: Spans) -> None:
        for each in spans.values():
            each.proto.trace_id = trace_id

    return do


def with_event(key: str, ms: float) -> Break:
    """An event more."""

    def do(spans: Spans) -> None:
        spans[key].proto.events.add(name="event", time_unix_nano=round((1000 + ms) * MS))

    return do


def with_status(key: str, code: Status.StatusCode.ValueType) -> Break:
    """Another status, which says nothing."""

    def do(spans: Spans) -> None:
        spans[key].proto.status.CopyFrom(Status(code=code))

    return do


BELOW = "participants_are_below_their_attempts"

BREAKS: list[tuple[str, str, Break]] = [
    ("there_is_a_trace", "nothing came", dict.clear),
    ("one_trace_id", "another trace", set_field("bank 2", "trace_id", bytes.fromhex(OTHER_TRACE))),
    ("one_trace_id", "short", all_of_trace(b"1")),
    ("span_ids_are_unique", "same id, other content", again("place", name="step place ")),
    ("span_ids_are_unique", "twice, and nothing died", again("place")),
    ("span_ids_are_unique", "no id", set_field("author", "span_id", b"")),
    ("one_root", "none", missing("root")),
    ("one_root", "below somebody", put_below("root", CALLER)),
    ("one_root", "two of one saga", again("root", span_id=b"12345678")),
    ("one_root", "another span without parent", put_below("author", "")),
    ("parents_are_there", "a step lost", missing("undo")),
    ("parents_are_there", "a participant's span lost", missing("bank 2")),
    ("times_are_sane", "backward", moved("wait", 20, 10)),
    ("times_are_sane", "no start", set_field("wait", "start_time_unix_nano", 0)),
    (
        "times_are_sane",
        "an event after the end",
        with_event("root", 101),
    ),
    ("children_lie_in_their_parents", "a step longer", moved("place", 1, 100.001)),
    ("children_lie_in_their_parents", "an attempt before", moved("place 1", 0.999, 10)),
    ("children_lie_in_their_parents", "a server before", moved("bank 1", -0.001, 12)),
    ("children_lie_in_their_parents", "a server outlives", moved("bank 2", 21, 31.001)),
    ("the_tree_has_its_shape", "an attempt below the root", put_below_span("place 1", "root")),
    ("the_tree_has_its_shape", "a step below a step", put_below_span("undo", "place")),
    ("the_tree_has_its_shape", "unknown", set_field("wait", "name", "something")),
    (BELOW, "below a step", put_below_span("bank 2", "place")),
    (BELOW, "another attempt", told("bank 2", "amends.attempt", 3)),
    (BELOW, "another step", told("bank 2", "amends.step", "ship")),
    (BELOW, "another saga", told("bank 2", "amends.saga_id", "x")),
    (
        BELOW,
        "another participant",
        told("bank 2", "amends.participant", "x"),
    ),
    (BELOW, "a poll unseen", missing("bank 4")),
    (
        BELOW,
        "one too many",
        again("bank 3", span_id=b"12345678"),
    ),
    (BELOW, "the runtime's", set_field("wait", "kind", SERVER)),
    ("attempts_follow_each_other", "overlap", moved("wait", 9, 20)),
    ("attempts_follow_each_other", "numbers", told("place 2", "amends.attempt", 1)),
    ("steps_follow_each_other", "charge before place is done", moved("charge", 29, 50)),
    ("steps_follow_each_other", "undone while it runs", moved("undo", 29, 60)),
    ("links_are_there", "undoes nothing", unlinked("undo")),
    ("links_are_there", "retries nothing", unlinked("undo again")),
    ("links_are_there", "says another step", told("undo", "amends.undoes", "charge")),
    ("links_lead_somewhere", "nowhere", linked_to("undo", TRACE, CALLER)),
    ("links_lead_somewhere", "another trace", linked_to("undo", OTHER_TRACE, CALLER)),
    ("services_have_names", "none", of_service("bank 2")),
    (
        "services_have_names",
        "the library's own",
        of_service("bank 2", service__name="unknown_service:python"),
    ),
    ("services_have_names", "no instance", of_service("place", service__name="amends")),
    ("kinds_are_right", "an attempt is INTERNAL", set_field("place 1", "kind", INTERNAL)),
    ("kinds_are_right", "a step is CLIENT", set_field("place", "kind", CLIENT)),
    ("failures_are_marked", "completed and failed", told("root", "amends.outcome", "COMPLETED")),
    ("failures_are_marked", "lost is no failure", with_status("place 1", UNSET)),
    ("failures_are_marked", "done is a failure", failed("place 2", "x")),
    ("failures_are_marked", "without a reason", failed("charge", "")),
    ("failures_are_marked", "without a type", untold("place 1", "error.type")),
    ("failures_are_marked", "no such outcome", told("place 2", "amends.outcome", "fine")),
    ("failures_are_marked", "OK", with_status("place", Status.STATUS_CODE_OK)),
    ("spans_say_what_they_are_about", "no saga", untold("place", "amends.saga_id")),
    ("spans_say_what_they_are_about", "no attempt", untold("place 1", "amends.attempt")),
    ("spans_say_what_they_are_about", "no outcome", untold("root", "amends.outcome")),
    ("spans_say_what_they_are_about", "another method", told("place 1", "rpc.method", "x")),
    ("spans_say_what_they_are_about", "another definition", set_field("root", "name", "saga x")),
]


@pytest.mark.parametrize(
    ("rule", "do"),
    [pytest.param(rule, do, id=f"{rule}-{what}".replace(" ", "_")) for rule, what, do in BREAKS],
)
def test_a_rule_that_is_broken_is_named(rule: str, do: Break) -> None:
    """Perhaps among others, which one fault may break, too."""
    spans = a_saga()
    do(spans)

    broken = broken_rules(spans.values(), Expectation(after=AFTER))

    assert rule in {line.partition(":")[0] for line in broken}


TOLD = "nobody_is_told_what_is_not_decided"

BREAKS_OF_COMMIT: list[tuple[str, str, Break]] = [
    (TOLD, "no decision", undecided("root")),
    (TOLD, "two decisions", decided_as("root", 90, "commit")),
    (TOLD, "told too early", moved("tell debit", 29, 60)),
    (TOLD, "told something else", set_field("tell debit", "name", "compensate debit")),
    (TOLD, "a vote after the decision", moved("ask debit", 1, 31)),
    ("links_are_there", "commits nothing", unlinked("tell debit")),
    ("steps_follow_each_other", "told while it votes", moved("ask debit", 1, 31)),
]


@pytest.mark.parametrize(
    ("rule", "do"),
    [
        pytest.param(rule, do, id=f"{rule}-{what}".replace(" ", "_"))
        for rule, what, do in BREAKS_OF_COMMIT
    ],
)
def test_a_rule_that_a_two_phase_commit_breaks_is_named(rule: str, do: Break) -> None:
    """Of a trace that broke none."""
    spans, untraced = a_commit(), Expectation(traced=False)
    assert broken_rules(spans.values(), untraced) == []
    do(spans)

    broken = broken_rules(spans.values(), untraced)

    assert rule in {line.partition(":")[0] for line in broken}


def test_every_rule_is_broken_somewhere() -> None:
    """A rule that nothing breaks shows nothing."""
    broken = {rule for rule, _, _ in [*BREAKS, *BREAKS_OF_COMMIT]}
    assert {rule.__name__ for rule in RULES} == broken


def test_what_a_caller_brings() -> None:
    """Joined, the root is below the caller's span; linked, it links there; else neither."""
    joined = a_saga()
    put_below("root", CALLER)(joined)
    assert not broken_rules(joined.values(), Expectation(caller=CALLER))
    assert broken_rules(joined.values())

    linked = a_saga()
    linked_to("root", OTHER_TRACE, CALLER)(linked)
    assert not broken_rules(linked.values(), Expectation(linked_caller=(OTHER_TRACE, CALLER)))
    assert broken_rules(linked.values())
    assert broken_rules(a_saga().values(), Expectation(linked_caller=(OTHER_TRACE, CALLER)))


def test_what_a_crash_allows() -> None:
    """The runtime's spans may come again unchanged; never changed, and no participant's."""
    crashed = Expectation(crashed=True)
    spans = a_saga()
    again("place")(spans)
    assert not broken_rules(spans.values(), crashed)

    again("place", end_time_unix_nano=1031 * MS)(spans)
    assert broken_rules(spans.values(), crashed)

    spans = a_saga()
    again("bank 2")(spans)
    assert broken_rules(spans.values(), crashed)


def test_what_a_killed_participant_takes_with_it() -> None:
    """Its spans may be missing, one that was sent may be without its parent; nobody else's."""
    spans = a_saga()
    missing("bank 2")(spans)
    assert not broken_rules(spans.values(), Expectation(lossy=frozenset({"bank"})))
    assert broken_rules(spans.values(), Expectation(lossy=frozenset({"shipping"})))


def test_a_saga_that_lives_on_has_no_root_yet() -> None:
    """Its steps are known by the root's id; once the root is there, it has ended."""
    spans = a_saga()
    assert broken_rules(spans.values(), Expectation(is_open=True))
    missing("root")(spans)
    assert not broken_rules(spans.values(), Expectation(is_open=True))


def test_a_server_span_outlives_what_nobody_waited_for() -> None:
    """A deadline that has passed, and a connection that broke; not an answer."""
    for status in ("DEADLINE_EXCEEDED", "UNAVAILABLE"):
        spans = a_saga()
        moved("bank 2", 21, 35)(spans)
        assert broken_rules(spans.values())
        told("place 2", "rpc.response.status_code", status)(spans)
        assert not broken_rules(spans.values())


def test_an_author_s_span_outlives_a_call_that_was_cancelled() -> None:
    """A handler's thread runs on; not one that was answered."""
    spans = a_saga()
    moved("author", 22, 35)(spans)
    assert broken_rules(spans.values())
    told("bank 2", "rpc.response.status_code", "CANCELLED")(spans)
    assert not broken_rules(spans.values())
