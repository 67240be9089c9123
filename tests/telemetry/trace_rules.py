"""What a saga's trace must be like, as a collector has received it.

How to think about it
---------------------

A trace is judged by its spans alone, as they came over the wire, with what a test knows beside
them (`Expectation`). Each rule is a function that tells what breaks it; `broken_rules` asks all of
them.

1. Within one process clocks are one: what the runtime makes is nested and ordered to the
   nanosecond. Between two processes of one machine `CLOCKS_NS` is tolerated.
2. A participant's span may outlive its attempt where the runtime stopped waiting: the attempt was
   lost, its deadline passed, or its connection broke. It may not begin before the attempt did. So
   may an author's own span where the participant's call was cancelled: a thread runs on.
3. A span that the runtime has sent never changes. After its death it may come twice, then with the
   same content.
4. What a killed participant had not sent is lost with it, also where a span of its own is the
   parent of one that was sent. The runtime loses nothing, because it has its history.

A trace of the runtime looks like this::

    saga order                                  INTERNAL   the root
      step charge                               INTERNAL
        breaker open: payments                  INTERNAL   or `queued: payments`
        amends.v1.ParticipantService/Execute    CLIENT     an attempt
          amends.v1.ParticipantService/Execute  SERVER     the participant's, one for each poll, too
            authorise card                      INTERNAL   the author's own
      compensate charge                         INTERNAL   linked to `step charge`

In a two-phase commit's there is `prepare charge`, and then `commit charge` or `compensate charge`,
which are linked to it; its root has an event for each decision.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, TypeAlias

from opentelemetry.proto.trace.v1 import trace_pb2

from tests.telemetry.otlp_receiver import ReceivedSpan, plain

CLOCKS_NS: Final = 1_000_000
"""How far two processes of one machine may read the same clock apart: a millisecond."""

INTERNAL: Final = trace_pb2.Span.SPAN_KIND_INTERNAL
SERVER: Final = trace_pb2.Span.SPAN_KIND_SERVER
CLIENT: Final = trace_pb2.Span.SPAN_KIND_CLIENT
UNSET: Final = trace_pb2.Status.STATUS_CODE_UNSET
ERROR: Final = trace_pb2.Status.STATUS_CODE_ERROR

ROUND: Final = "amends.round"

RPC: Final = "amends.v1.ParticipantService/"

STEP_NAMES: Final = ("step ", "prepare ", "commit ", "compensate ")
WAIT_NAMES: Final = ("breaker open: ", "queued: ")

NOBODY_WAITS: Final = frozenset({"DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED"})
"""gRPC statuses after which a participant may still be at work."""

OUTCOMES: Final = frozenset({"done", "rejected", "unknown", "lost", "broken"})


class Seen(ReceivedSpan):
    """A span that was received, as the rules ask for it."""

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """What it says of itself."""
        return plain(self.proto.attributes)

    @property
    def is_error(self) -> bool:
        """Whether it is shown as failed."""
        return self.proto.status.code == ERROR

    def text(self, key: str) -> str:
        """Give an attribute as text; empty if it is not there."""
        return str(self.attributes.get(key, ""))

    def number(self, key: str) -> int:
        """Give an attribute that is a whole number; 0 if it is not there."""
        return int(self.attributes.get(key, 0))

    def __str__(self) -> str:
        return f"{self.service}: {self.name} ({self.span_id})"


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a test knows of a trace beside its spans."""

    runtime: str = "amends"
    """The runtime's service name."""

    caller: str = ""
    """The id of the span that the trace was joined under, in hex; it was not received."""

    linked_caller: tuple[str, str] | None = None
    """Trace and span id of a caller that the root links to instead."""

    is_open: bool = False
    """The saga has not ended: its root, and steps under way, have not come."""

    crashed: bool = False
    """The runtime died, so what it had sent may have come twice."""

    lossy: frozenset[str] = frozenset()
    """Services that were killed: spans of theirs may be missing."""

    traced: bool = True
    """The participants send spans, too."""

    after: Mapping[str, Collection[str]] = field(default_factory=dict)
    """The steps that each step waits for, as in the definition."""


class Trace:
    """The spans of one trace, equal ones once, and ways through them."""

    def __init__(self, received: Iterable[ReceivedSpan], known: Expectation) -> None:
        self.received = [Seen(each.proto, each.resource, each.scope) for each in received]
        self.known = known
        once = {each.proto.SerializeToString(deterministic=True): each for each in self.received}
        self.spans = sorted(once.values(), key=_times)
        self.by_id = {each.span_id: each for each in self.spans}
        self.of_runtime = [each for each in self.spans if each.service == known.runtime]
        self.roots = [each for each in self.of_runtime if each.name.startswith("saga ")]
        self.steps = [each for each in self.of_runtime if each.name.startswith(STEP_NAMES)]
        self.attempts = [each for each in self.of_runtime if each.proto.kind == CLIENT]
        self.servers = [each for each in self.spans if each.proto.kind == SERVER]

    def parent(self, each: Seen) -> Seen | None:
        """Give a span's parent, if it was received."""
        return self.by_id.get(each.parent_id)

    def children(self, each: Seen) -> list[Seen]:
        """Give the spans below one, oldest first."""
        return [child for child in self.spans if child.parent_id == each.span_id]


def _times(each: Seen) -> tuple[int, int]:
    return each.proto.start_time_unix_nano, each.proto.end_time_unix_nano


Rule: TypeAlias = Callable[[Trace], Iterator[str]]


# -- the rules -------------------------------------------------------------------------------------


def there_is_a_trace(trace: Trace) -> Iterator[str]:
    """Spans came, of the runtime, too."""
    if not trace.of_runtime:
        yield f"no span of {trace.known.runtime} came, of {len(trace.spans)} in all"


def one_trace_id(trace: Trace) -> Iterator[str]:
    """All spans have the same trace id, of 16 bytes."""
    ids = {each.trace_id for each in trace.spans}
    if len(ids) > 1:
        yield f"several trace ids: {', '.join(sorted(ids))}"
    for trace_id in ids:
        if len(trace_id) != 32 or not trace_id.strip("0"):
            yield f"{trace_id!r} is no trace id"


def span_ids_are_unique(trace: Trace) -> Iterator[str]:
    """Each id is one span; after a crash the same one may have come again, unchanged."""
    contents: defaultdict[str, set[bytes]] = defaultdict(set)
    for each in trace.received:
        contents[each.span_id].add(each.proto.SerializeToString(deterministic=True))
        if len(each.span_id) != 16 or not each.span_id.strip("0"):
            yield f"{each}: {each.span_id!r} is no span id"
    for span_id, different in contents.items():
        if len(different) > 1:
            yield f"{trace.by_id[span_id]}: came with {len(different)} different contents"
    for span_id, times in Counter(each.span_id for each in trace.received).items():
        each = trace.by_id[span_id]
        may_repeat = trace.known.crashed and each.service == trace.known.runtime
        if times > 1 and not may_repeat:
            yield f"{each}: came {times} times, and nothing died"


def one_root(trace: Trace) -> Iterator[str]:
    """A saga has one root; it hangs below the caller's span, or below nothing."""
    sagas = Counter(each.text("amends.saga_id") for each in trace.roots)
    for saga_id, roots in sagas.items():
        if roots > 1:
            yield f"{roots} roots of saga {saga_id}"
    if not trace.roots and not trace.known.is_open:
        yield "no root"
    if trace.roots and trace.known.is_open:
        yield f"{trace.roots[0]}: came before the saga ended"
    for each in trace.roots:
        if each.parent_id != trace.known.caller:
            yield (
                f"{each}: is below {each.parent_id or 'nothing'}, not below"
                f" {trace.known.caller or 'nothing'}"
            )
    for each in trace.spans:
        if not each.parent_id and each not in trace.roots:
            yield f"{each}: a second root"


def parents_are_there(trace: Trace) -> Iterator[str]:
    """Every parent was received, or is the caller's span."""
    for each in trace.spans:
        if not each.parent_id or each.parent_id == trace.known.caller or trace.parent(each):
            continue
        of_runtime = each.service == trace.known.runtime or each.proto.kind == SERVER
        # Until they end, the root and the steps under way are only known by their ids.
        if of_runtime and trace.known.is_open:
            continue
        if not of_runtime and each.service in trace.known.lossy:
            continue
        yield f"{each}: its parent {each.parent_id} did not come"


def times_are_sane(trace: Trace) -> Iterator[str]:
    """No span ends before it starts, and none starts at the beginning of time."""
    for each in trace.spans:
        start, end = each.proto.start_time_unix_nano, each.proto.end_time_unix_nano
        if start == 0:
            yield f"{each}: has no start"
        if end < start:
            yield f"{each}: ends {start - end} ns before it starts"
        for event in each.proto.events:
            if not start <= event.time_unix_nano <= end:
                yield f"{each}: its event {event.name!r} is outside of it"


def children_lie_in_their_parents(trace: Trace) -> Iterator[str]:
    """No child begins before its parent; none outlives it, but where nobody waited (see 2)."""
    for each in trace.spans:
        parent = trace.parent(each)
        if parent is None:
            continue
        is_ours = each.service == parent.service == trace.known.runtime
        tolerance = 0 if is_ours else CLOCKS_NS
        early = parent.proto.start_time_unix_nano - each.proto.start_time_unix_nano
        late = each.proto.end_time_unix_nano - parent.proto.end_time_unix_nano
        if early > tolerance:
            yield f"{each}: begins {early} ns before {parent}"
        if late > tolerance and not _nobody_waited(each, parent):
            yield f"{each}: ends {late} ns after {parent}"


def _nobody_waited(each: Seen, parent: Seen) -> bool:
    if SERVER not in {each.proto.kind, parent.proto.kind}:
        return False
    return (
        parent.text("error.type") in {"lost", "abandoned"}
        or parent.text("rpc.response.status_code") in NOBODY_WAITS
    )


def the_tree_has_its_shape(trace: Trace) -> Iterator[str]:
    """Root, steps, attempts and waits, participants: each below what it belongs to."""
    for each in trace.of_runtime:
        parent = trace.parent(each)
        if each in trace.roots or parent is None:
            continue
        if each in trace.steps:
            belongs = parent in trace.roots
        elif each in trace.attempts or each.name.startswith(WAIT_NAMES):
            belongs = parent in trace.steps
        else:
            yield f"{each}: nobody knows what it is"
            continue
        if not belongs or (each in trace.steps and not _same(each, parent, "amends.saga_id")):
            yield f"{each}: does not belong below {parent}"


def participants_are_below_their_attempts(trace: Trace) -> Iterator[str]:
    """A SERVER span is that participant's of that attempt; an answered attempt has one a poll."""
    about = ("amends.saga_id", "amends.step", "amends.verb", "amends.round")
    for each in trace.servers:
        parent = trace.parent(each)
        step = parent and trace.parent(parent)
        if each.service == trace.known.runtime:
            yield f"{each}: a SERVER span of the runtime"
        elif parent is None:
            continue  # said by `parents_are_there`, where it must be
        elif parent not in trace.attempts:
            yield f"{each}: is below {parent}, which is no attempt"
        elif (
            parent.name != each.name
            or not _same(each, parent, "amends.attempt")
            or (step is not None and not _same(each, step, *about))
        ):
            yield f"{each}: is not the call of {parent}"
        elif parent.text("service.peer.name") != each.text("amends.participant"):
            yield f"{each}: is not of {parent.text('service.peer.name')}"
    if not trace.known.traced:
        return
    for attempt in trace.attempts:
        served = [each for each in trace.children(attempt) if each.proto.kind == SERVER]
        asked = 1 + attempt.number("amends.polls")
        is_answered = attempt.text("amends.outcome") in {"done", "rejected", "broken"}
        is_lossy = attempt.text("service.peer.name") in trace.known.lossy
        if len(served) > asked and attempt.text("amends.outcome") != "lost":
            yield f"{attempt}: asked {asked} times, and {len(served)} SERVER spans are below it"
        if is_answered and not is_lossy and len(served) < asked:
            yield f"{attempt}: answered {asked} times, and only {len(served)} SERVER spans came"


def _same(one: Seen, other: Seen, *keys: str) -> bool:
    return all(key in one.attributes for key in keys) and all(
        one.attributes[key] == other.attributes.get(key) for key in keys
    )


def attempts_follow_each_other(trace: Trace) -> Iterator[str]:
    """Attempts of one step are numbered anew in each life, and none begins before the last ended.

    A wait in the lane is over when its attempt is sent.
    """
    for step in trace.steps:
        attempts = [each for each in trace.children(step) if each in trace.attempts]
        numbers = [each.number("amends.attempt") for each in attempts]
        if any(one >= other for one, other in pairwise(numbers)):
            yield f"{step}: its attempts come in the order {numbers}"
        for before, behind in pairwise(trace.children(step)):
            if before.proto.end_time_unix_nano > behind.proto.start_time_unix_nano:
                yield f"{behind}: begins before {before} has ended"


def steps_follow_each_other(trace: Trace) -> Iterator[str]:
    """A step begins when those that it waits for are done; undoing goes the other way."""
    spans: defaultdict[str, list[Seen]] = defaultdict(list)
    for each in trace.steps:
        spans[each.name].append(each)
    for step in {each.text("amends.step") for each in trace.steps}:
        yield from _in_order(spans[f"step {step}"], spans[f"compensate {step}"])
        for votes in _grouped(spans[f"prepare {step}"], "amends.round"):
            told = [*spans[f"commit {step}"], *spans[f"compensate {step}"]]
            yield from _in_order(votes, [each for each in told if _same(each, votes[0], ROUND)])
    for step, waits_for in trace.known.after.items():
        pairs = [
            pair
            for before in waits_for
            for pair in (
                (f"step {before}", f"step {step}"),
                (f"compensate {step}", f"compensate {before}"),
            )
        ]
        for before, behind in pairs:
            yield from _in_order(spans[before], spans[behind])


def _in_order(before: Sequence[Seen], behind: Sequence[Seen]) -> Iterator[str]:
    for first in before:
        for second in behind:
            if first.proto.end_time_unix_nano > second.proto.start_time_unix_nano:
                yield f"{second}: begins before {first} has ended"


def nobody_is_told_what_is_not_decided(trace: Trace) -> Iterator[str]:
    """A round of a two-phase commit has one decision; commits wait for it and for all votes."""
    for root in trace.roots:
        steps = [each for each in trace.steps if each.parent_id == root.span_id]
        votes = [each for each in steps if each.name.startswith("prepare ")]
        decided: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
        for event in root.proto.events:
            if event.name == "decision made":
                told = plain(event.attributes)
                what = str(told["amends.decision"]), event.time_unix_nano
                decided[str(told[ROUND])].append(what)
        for of_round in _grouped(votes, ROUND):
            decisions = decided[of_round[0].text(ROUND)]
            if len(decisions) != 1:
                yield f"{root}: round {of_round[0].text(ROUND)} has the decisions {decisions}"
        for each in steps:
            wanted = {"commit": "commit", "compensate": "abort"}.get(each.name.partition(" ")[0])
            decisions = decided[each.text(ROUND)]
            if wanted is None or not votes:
                continue
            if not any(what == wanted and at <= _times(each)[0] for what, at in decisions):
                yield f"{each}: nothing was decided before it, but {decisions}"
            if wanted == "commit":
                of_round = [vote for vote in votes if _same(vote, each, ROUND)]
                yield from _in_order(of_round, [each])


def links_are_there(trace: Trace) -> Iterator[str]:
    """A compensation links the step that it undoes, a step's next life the one before it.

    In a two-phase commit both ends of a branch link its vote of the same round; a restored store
    may have lost that vote.
    """
    for each in trace.steps:
        if each.name.startswith("compensate "):
            undone = each.text("amends.undoes")
            forward = _votes_of(trace, each)
            forward += [step for step in trace.steps if step.name == f"step {undone}"]
            if undone != each.text("amends.step"):
                yield f"{each}: says that it undoes {undone!r}"
            lost = _has_lost_history(trace)
            if lost and not forward:
                if any(_of_link(link) == "undoes" for link in each.proto.links):
                    yield f"{each}: undoes what did not come"
            elif not (trace.known.is_open and not forward):
                yield from _link_missing(each, "undoes", forward[-1:])
        if each.name.startswith("commit "):
            yield from _link_missing(each, "commits", _votes_of(trace, each)[-1:])
    for lives in _grouped(trace.steps, "amends.saga_id", "amends.step", "amends.verb"):
        for before, behind in pairwise(lives):
            yield from _link_missing(behind, "retries", [before])


def _has_lost_history(trace: Trace) -> bool:
    events = [event for root in trace.roots for event in root.proto.events]
    return any(
        (one.key, one.value.string_value) == ("amends.action", "confirm_restore")
        for event in events
        for one in event.attributes
    )


def _votes_of(trace: Trace, each: Seen) -> list[Seen]:
    name = f"prepare {each.text('amends.step')}"
    return [vote for vote in trace.steps if vote.name == name and _same(vote, each, ROUND)]


def _link_missing(each: Seen, what: str, to: Sequence[Seen]) -> Iterator[str]:
    linked = [link.span_id.hex() for link in each.proto.links if _of_link(link) == what]
    if not to or linked != [to[0].span_id]:
        wanted = to[0].span_id if to else "a span that did not come"
        yield f"{each}: the link {what!r} is to {', '.join(linked) or 'nothing'}, not to {wanted}"


def links_lead_somewhere(trace: Trace) -> Iterator[str]:
    """Every link of the runtime is to a span of this trace; the root's to its caller, too."""
    caller = trace.known.linked_caller
    for each in trace.of_runtime:
        outside = [link for link in each.proto.links if link.trace_id != each.proto.trace_id]
        for link in each.proto.links:
            if link.trace_id != each.proto.trace_id:
                continue
            if link.span_id.hex() not in trace.by_id and not trace.known.is_open:
                yield f"{each}: links {link.span_id.hex()}, which did not come"
        others = [(link.trace_id.hex(), link.span_id.hex()) for link in outside]
        wanted = [caller] if caller is not None and each in trace.roots else []
        if others != wanted:
            yield f"{each}: links of other traces are {others}, not {wanted}"


def services_have_names(trace: Trace) -> Iterator[str]:
    """Whoever sends says who it is, and the runtime which one of its deaths and versions."""
    for each in trace.spans:
        if not each.service or each.service.startswith("unknown_service"):
            yield f"{each}: of no service"
    for each in trace.of_runtime:
        for key in ("service.version", "service.instance.id"):
            if not each.resource.get(key):
                yield f"{each}: its resource has no {key}"
        if each.scope != "amends":
            yield f"{each}: its scope is {each.scope!r}"


def kinds_are_right(trace: Trace) -> Iterator[str]:
    """An attempt is CLIENT, all else of the runtime INTERNAL."""
    for each in trace.of_runtime:
        wanted = CLIENT if each.name.startswith(RPC) else INTERNAL
        if each.proto.kind != wanted:
            yield f"{each}: is of kind {trace_pb2.Span.SpanKind.Name(each.proto.kind)}"


def failures_are_marked(trace: Trace) -> Iterator[str]:
    """What failed is ERROR and says why; what did not is left unset, as libraries should."""
    for each in trace.of_runtime:
        if each.proto.status.code not in {UNSET, ERROR}:
            yield f"{each}: has status {each.proto.status.code}"
        if each.is_error and not each.proto.status.message:
            yield f"{each}: failed, and does not say why"
    for each in trace.attempts:
        outcome = each.text("amends.outcome")
        if outcome not in OUTCOMES:
            yield f"{each}: its outcome is {outcome!r}"
        if each.is_error != (outcome in {"unknown", "lost", "broken"}):
            yield f"{each}: {outcome}, and its status is {each.proto.status.code}"
        if each.is_error and not each.text("error.type"):
            yield f"{each}: failed, and has no error.type"
    for each in trace.roots:
        if each.is_error == (each.text("amends.outcome") == "COMPLETED"):
            yield f"{each}: {each.text('amends.outcome')!r} and status {each.proto.status.code}"


def spans_say_what_they_are_about(trace: Trace) -> Iterator[str]:
    """Each has the attributes by which it is searched for."""
    wanted: list[tuple[Iterable[Seen], tuple[str, ...]]] = [
        (
            trace.roots,
            (
                "amends.saga_id",
                "amends.definition",
                "amends.definition_hash",
                "amends.store_id",
                "amends.outcome",
            ),
        ),
        (
            trace.steps,
            (
                "amends.saga_id",
                "amends.step",
                "amends.participant",
                "amends.action",
                "amends.verb",
                "amends.round",
                "amends.outcome",
            ),
        ),
        (trace.attempts, ("amends.attempt", "amends.epoch", "amends.outcome", "service.peer.name")),
        (trace.servers, ("amends.saga_id", "amends.step", "amends.attempt", "amends.participant")),
    ]
    for spans, keys in wanted:
        for each in spans:
            missing = [key for key in keys if key not in each.attributes]
            if missing:
                yield f"{each}: has no {', '.join(missing)}"
    for each in (*trace.attempts, *trace.servers):
        if each.text("rpc.system.name") != "grpc" or each.text("rpc.method") != each.name:
            yield f"{each}: is not named as a call"
    for each in trace.roots:
        if each.name != f"saga {each.text('amends.definition')}":
            yield f"{each}: is of {each.text('amends.definition')!r}"


RULES: Final[tuple[Rule, ...]] = (
    there_is_a_trace,
    one_trace_id,
    span_ids_are_unique,
    one_root,
    parents_are_there,
    times_are_sane,
    children_lie_in_their_parents,
    the_tree_has_its_shape,
    participants_are_below_their_attempts,
    attempts_follow_each_other,
    steps_follow_each_other,
    nobody_is_told_what_is_not_decided,
    links_are_there,
    links_lead_somewhere,
    services_have_names,
    kinds_are_right,
    failures_are_marked,
    spans_say_what_they_are_about,
)


# -- asking them -----------------------------------------------------------------------------------


def broken_rules(spans: Iterable[ReceivedSpan], known: Expectation | None = None) -> list[str]:
    """Tell everything that is wrong with one trace, as ``rule: what``; nothing if it is right."""
    trace = Trace(spans, known or Expectation())
    return [f"{rule.__name__}: {what}" for rule in RULES for what in rule(trace)]


def assert_well_formed(spans: Iterable[ReceivedSpan], known: Expectation | None = None) -> Trace:
    """Raise AssertionError with all that is wrong and the whole tree, or give the trace."""
    trace = Trace(spans, known or Expectation())
    broken = broken_rules(trace.received, trace.known)
    assert not broken, "\n".join([*broken, "", *tree(trace.spans)])
    return trace


def tree(spans: Sequence[Seen]) -> list[str]:
    """Draw a trace, a line for each span: indented, with its duration and what became of it."""
    ids = {each.span_id for each in spans}
    below: defaultdict[str, list[Seen]] = defaultdict(list)
    for each in sorted(spans, key=_times):
        below[each.parent_id if each.parent_id in ids else ""].append(each)
    lines: list[str] = []

    def draw(each: Seen, depth: int) -> None:
        took_ms = (each.proto.end_time_unix_nano - each.proto.start_time_unix_nano) / 1e6
        ended = each.text("amends.outcome")
        why = f"  ERROR {each.proto.status.message}".rstrip() if each.is_error else ""
        attempt = f" attempt {each.number('amends.attempt')}" if each.proto.kind == CLIENT else ""
        name = f"{'  ' * depth}{each.name}{attempt}"
        kind = trace_pb2.Span.SpanKind.Name(each.proto.kind).removeprefix("SPAN_KIND_")
        lines.append(f"{name:<54} {each.service:<10} {kind:<8} {took_ms:10.3f} ms  {ended}{why}")
        lines.extend(f"{'  ' * depth}  * {event.name}" for event in each.proto.events)
        for child in below[each.span_id]:
            draw(child, depth + 1)

    for root in below[""]:
        draw(root, 0)
    return lines


def _of_link(link: trace_pb2.Span.Link) -> str:
    return str(plain(link.attributes).get("amends.link", ""))


def _grouped(spans: Iterable[Seen], *keys: str) -> list[list[Seen]]:
    """Put spans together that agree in `keys`, in the order in which they have them."""
    groups: defaultdict[tuple[str, ...], list[Seen]] = defaultdict(list)
    for each in spans:
        groups[tuple(each.text(key) for key in keys)].append(each)
    return list(groups.values())
