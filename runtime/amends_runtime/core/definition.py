"""Definitions: what a saga consists of, and every rule by which one is refused.

How to think about it. A definition is a graph of steps. Going forward, a step starts when all that
it waits for is done. Going backward, a step is undone when everything that came after it is. The
*point of no return* is where the graph stops being undoable:

1. Before it lie the COMPENSATABLE steps; each can be undone.
2. The PIVOT is the point itself. There is at most one in the whole definition; every compensatable
   step is an ancestor of it and every retriable one a descendant, so at the moment that the pivot
   is tried, everything undoable is done and nothing that must succeed has begun.
3. Without a pivot the first RETRIABLE step is the point. No compensatable step may come after a
   retriable one, and every retriable step waits for all compensatable ones, drawn or not.
4. READ_ONLY steps have no effect. They may stand anywhere and are never undone.

`violations()` names everything that is wrong at once; `normalise()` writes all defaults down, so
that two texts with one meaning have one content hash and no later change of a default changes a
running saga; `Plan` is the normalised definition with its graph worked out, by step number.
"""

from __future__ import annotations

import difflib
import enum
import hashlib
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

import msgspec

__all__ = [
    "MAX_PARALLEL",
    "MAX_STEPS",
    "Definition",
    "Kind",
    "Mode",
    "Plan",
    "RetryPolicy",
    "Step",
    "TwoPhase",
    "Violation",
    "content_hash",
    "normalise",
    "violations",
]

MAX_STEPS = 128  # one history turn of the widest definition stays far below the payload bound
MAX_PARALLEL = 64  # a saga may not fill a participant's lane by itself
MAX_DURATION_MS = 10 * 365 * 24 * 3600 * 1000  # ten years: keeps every sum of instants inside int64
MIN_TIMEOUT_MS = 1
MAX_VIOLATIONS = 100  # nobody mends more at once, and a hostile definition must not cost seconds
MAX_SHOWN = 64  # characters of a wrong name that a message repeats

STEP_NAME = re.compile(r"[a-z][a-z0-9_-]{0,47}")
DEFINITION_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
ACTION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


class Mode(enum.Enum):
    """How a saga reaches everything or nothing."""

    SAGA = "SAGA"
    TWO_PHASE_COMMIT = "TWO_PHASE_COMMIT"


class Kind(enum.Enum):
    """What a step means for turning back."""

    COMPENSATABLE = "COMPENSATABLE"
    PIVOT = "PIVOT"
    RETRIABLE = "RETRIABLE"
    READ_ONLY = "READ_ONLY"


class RetryPolicy(msgspec.Struct, frozen=True):
    """When to try again and when to stop. All durations in milliseconds."""

    first_ms: int = 100
    factor: float = 2.0
    max_ms: int = 30_000
    give_up_after_ms: int = 300_000


HOURS_24_MS = 24 * 3600 * 1000
FORWARD_RETRY = RetryPolicy()
MUST_SUCCEED_RETRY = RetryPolicy(give_up_after_ms=HOURS_24_MS)
COMPENSATION_RETRY = RetryPolicy(give_up_after_ms=HOURS_24_MS)
PREPARE_DEADLINE_MS = 30_000  # of a two-phase commit that names none: its participants hold locks
MAX_LOCKED_RETRIES = 100  # the prepare deadline ends them long before


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One call step. `None` means "the default"; `normalise()` leaves none behind.

    A field that is added later must default to `None`, so that old content keeps its hash.
    """

    name: str
    participant: str
    action: str
    kind: Kind = Kind.COMPENSATABLE
    after: tuple[str, ...] | None = None
    uses: tuple[str, ...] | None = None
    timeout_ms: int = 10_000
    retry: RetryPolicy | None = None
    compensation_retry: RetryPolicy | None = None


class TwoPhase(msgspec.Struct, frozen=True, kw_only=True):
    """What only a two-phase commit has.

    ordered         votes are asked for in the order of the list, and not all at once
    locked_retries  how often the whole is tried again after a vote of LOCKED
    """

    ordered: bool = False
    locked_retries: int = 0


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """An immutable description of a saga. `deadline_ms` and `retention_ms` of 0 mean none.

    `two_phase` is there in mode TWO_PHASE_COMMIT, once it is normalised, and in no other.
    """

    name: str
    steps: tuple[Step, ...]
    mode: Mode = Mode.SAGA
    deadline_ms: int = 0
    retention_ms: int = 0
    two_phase: TwoPhase | None = None


class Violation(msgspec.Struct, frozen=True):
    """One reason to refuse a definition.

    `field` is the path of what is wrong in the terms of the API, for example `steps[2].after`;
    `step` its step's name, or empty; `message` says what is wrong and how to mend it.
    """

    field: str
    step: str
    message: str


def normalise(definition: Definition) -> Definition:
    """The same definition with every default written out. Total: works on refused ones too."""
    if definition.mode is Mode.TWO_PHASE_COMMIT:
        return _normalise_two_phase(definition)
    order = {step.name: number for number, step in enumerate(definition.steps)}

    def in_order(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(set(names), key=lambda name: (order.get(name, len(order)), name)))

    steps = []
    before: tuple[str, ...] = ()
    for step in definition.steps:
        must_succeed = step.kind in (Kind.PIVOT, Kind.RETRIABLE)
        steps.append(
            msgspec.structs.replace(
                step,
                after=in_order(before if step.after is None else step.after),
                retry=_policy(step.retry, MUST_SUCCEED_RETRY if must_succeed else FORWARD_RETRY),
                compensation_retry=_policy(step.compensation_retry, COMPENSATION_RETRY),
            )
        )
        before = (step.name,)
    ancestors = _ancestors(_waits_for(steps))
    steps = [
        msgspec.structs.replace(
            step, uses=in_order(ancestors[step.name] if step.uses is None else step.uses)
        )
        for step in steps
    ]
    return msgspec.structs.replace(definition, steps=tuple(steps))


def _normalise_two_phase(definition: Definition) -> Definition:
    """The order of the list, or none at all, is drawn as `after`: one graph for both modes."""
    two_phase = definition.two_phase or TwoPhase()
    names = tuple(step.name for step in definition.steps)
    steps = [
        msgspec.structs.replace(
            step,
            after=names[max(0, number - 1) : number] if two_phase.ordered else (),
            uses=names[:number] if two_phase.ordered else (),
            retry=_policy(step.retry, FORWARD_RETRY),
            # Locks are held meanwhile: a day, as for a saga's compensation, would be no warning.
            compensation_retry=_policy(step.compensation_retry, FORWARD_RETRY),
        )
        for number, step in enumerate(definition.steps)
    ]
    return msgspec.structs.replace(
        definition,
        steps=tuple(steps),
        two_phase=two_phase,
        deadline_ms=definition.deadline_ms or PREPARE_DEADLINE_MS,
    )


def _policy(policy: RetryPolicy | None, default: RetryPolicy) -> RetryPolicy:
    if policy is None:
        return default
    return msgspec.structs.replace(policy, factor=float(policy.factor))  # 2 and 2.0 are one content


def content_hash(definition: Definition) -> str:
    """SHA-256, in lower-case hex, of the normalised content. Equal meaning, equal hash."""
    content = msgspec.to_builtins(normalise(definition))
    for part in (content, *content["steps"]):
        for field in [field for field, value in part.items() if value is None]:
            del part[field]  # a field that a later version added: absent is what it was
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()


def violations(
    definition: Definition, participants: Collection[str] | None = None
) -> list[Violation]:
    """Everything that is wrong with a definition, in the order of its text. Empty: it is valid.

    Where the registered `participants` are given, a step that names another one is refused too.
    """
    found = list(itertools.islice(_field_violations(definition), MAX_VIOLATIONS))
    if participants is not None:
        found += _participant_violations(definition, participants)
    if _is_graph(definition.steps):
        found += _graph_violations(normalise(definition))
    numbers = {f"steps[{number}]": number for number in range(len(definition.steps))}
    return sorted(found, key=lambda one: numbers.get(one.field.partition(".")[0], -1))


def _is_graph(steps: Sequence[Step]) -> bool:
    """Whether it is clear who waits for whom; else the rules of the graph mean nothing."""
    names = {step.name for step in steps}
    if len(names) < len(steps) or not 0 < len(steps) <= MAX_STEPS:
        return False
    return all(set(step.after or ()) <= names - {step.name} for step in steps)


# -- fields ----------------------------------------------------------------------------------------


def _field_violations(definition: Definition) -> Iterator[Violation]:
    if not DEFINITION_NAME.fullmatch(definition.name):
        yield Violation(
            "name",
            "",
            f"{_shown(definition.name)} is not a definition name:"
            " use a lower-case letter, then up to 63 of a-z 0-9 _ -",
        )
    if definition.mode is Mode.TWO_PHASE_COMMIT:
        yield from _two_phase_violations(definition)
    elif definition.two_phase is not None:
        yield Violation(
            "two_phase",
            "",
            "it has a meaning only with mode TWO_PHASE_COMMIT: leave it out, or say that mode",
        )
    for field in ("deadline_ms", "retention_ms"):
        value = getattr(definition, field)
        if not 0 <= value <= MAX_DURATION_MS:
            yield Violation(
                field,
                "",
                f"{value} is out of range: 1 to {MAX_DURATION_MS} ms; leave it out for the default",
            )
    if not definition.steps:
        yield Violation("steps", "", "a definition needs at least one step")
    if len(definition.steps) > MAX_STEPS:
        if definition.mode is not Mode.TWO_PHASE_COMMIT:  # else it was said: of branches it is half
            yield Violation(
                "steps",
                "",
                f"{len(definition.steps)} steps; at most {MAX_STEPS}: split it into several sagas",
            )
        return
    names = [step.name for step in definition.steps]
    for number, step in enumerate(definition.steps):
        yield from _step_violations(f"steps[{number}]", step, names, names[:number])


def _two_phase_violations(definition: Definition) -> Iterator[Violation]:
    """What a two-phase commit does not have: it has no graph, and nothing of it stays behind."""
    normal = normalise(definition)
    assert normal.two_phase is not None, "normalised"
    if not 0 <= normal.two_phase.locked_retries <= MAX_LOCKED_RETRIES:
        yield Violation(
            "two_phase.locked_retries",
            "",
            f"{normal.two_phase.locked_retries} is out of range: 0 to {MAX_LOCKED_RETRIES}",
        )
    if len(definition.steps) > MAX_PARALLEL:
        yield Violation(
            "steps",
            "",
            f"{len(definition.steps)} branches; a two-phase commit has at most {MAX_PARALLEL}, for"
            " all are told its decision at once, in whatever order they vote: let one participant"
            " do more in one branch",
        )
    for number, (step, drawn) in enumerate(zip(definition.steps, normal.steps, strict=True)):
        if step.kind is not Kind.COMPENSATABLE:
            yield Violation(
                f"steps[{number}].kind",
                step.name,
                f"in a two-phase commit every step votes and can be rolled back; {step.kind.value}"
                " has a meaning only in mode SAGA: leave it out",
            )
        # A normalised definition has them, and may be registered again as it is.
        for field, order in (("after", step.after), ("uses", step.uses)):
            if order not in (None, getattr(drawn, field)):
                yield Violation(
                    f"steps[{number}].{field}",
                    step.name,
                    "a two-phase commit asks all participants at once, or with two_phase.ordered"
                    f" in the order of the list: leave `{field}` out",
                )


def _step_violations(
    path: str, step: Step, names: Sequence[str], names_before: Sequence[str]
) -> Iterator[Violation]:
    def wrong(field: str, message: str) -> Violation:
        return Violation(f"{path}.{field}", step.name, message)

    name_rule = "use a lower-case letter, then up to 47 of a-z 0-9 _ -"
    if not STEP_NAME.fullmatch(step.name):
        yield wrong("name", f"{_shown(step.name)} is not a step name: {name_rule}")
    elif step.name in names_before:
        yield wrong(
            "name", f"{_shown(step.name)} is used twice: step names are unique in a definition"
        )
    if not STEP_NAME.fullmatch(step.participant):
        yield wrong(
            "call.participant",
            f"{_shown(step.participant)} is not a participant's name (never an address):"
            f" {name_rule}",
        )
    if not ACTION_NAME.fullmatch(step.action):
        yield wrong(
            "call.action",
            f"{_shown(step.action)} is not an action name:"
            " use a letter, then up to 63 of A-Z a-z 0-9 _ . -",
        )
    if not MIN_TIMEOUT_MS <= step.timeout_ms <= HOURS_24_MS:
        yield wrong(
            "call.timeout_ms",
            f"{step.timeout_ms} is out of range: {MIN_TIMEOUT_MS} to {HOURS_24_MS} ms",
        )
    for field in ("retry", "compensation_retry"):
        policy = getattr(step, field)
        if policy is not None:
            for part, message in _policy_violations(policy):
                yield wrong(f"call.{field}.{part}", message)
    for field in ("after", "uses"):
        for other in getattr(step, field) or ():
            if other == step.name:
                yield wrong(field, f"step {_shown(step.name)} names itself")
            elif other not in names:
                yield wrong(
                    field, f"there is no step {_shown(other)}; {_known(other, names, 'steps')}"
                )


def _policy_violations(policy: RetryPolicy) -> Iterator[tuple[str, str]]:
    for part in ("first_ms", "max_ms", "give_up_after_ms"):
        value = getattr(policy, part)
        if not 1 <= value <= MAX_DURATION_MS:
            yield part, f"{value} is out of range: 1 to {MAX_DURATION_MS} ms"
    if not 1.0 <= policy.factor <= 100.0:  # also refuses NaN
        yield "factor", f"{policy.factor} is out of range: 1 to 100"
    if policy.max_ms < policy.first_ms:
        yield "max_ms", f"{policy.max_ms} is below first_ms, which is {policy.first_ms}"


def _participant_violations(
    definition: Definition, participants: Collection[str]
) -> Iterator[Violation]:
    for number, step in enumerate(definition.steps):
        if STEP_NAME.fullmatch(step.participant) and step.participant not in participants:
            known = (
                _known(step.participant, sorted(participants), "participants")
                if participants
                else "there are none"
            )
            yield Violation(
                f"steps[{number}].call.participant",
                step.name,
                f"participant {_shown(step.participant)} is not registered; {known}",
            )


# -- graph -----------------------------------------------------------------------------------------


def _graph_violations(definition: Definition) -> Iterator[Violation]:
    steps = definition.steps
    path = {step.name: f"steps[{number}]" for number, step in enumerate(steps)}
    cycles = _cycles(steps)
    for cycle in cycles:
        yield Violation(
            f"{path[cycle[0]]}.after",
            cycle[0],
            f"steps wait for each other: {' -> '.join([*cycle, cycle[0]])};"
            " take one of these out of `after`",
        )
    if cycles:
        return
    ancestors = _ancestors(_waits_for(steps))
    for step in steps:
        for other in step.uses or ():
            if other != step.name and other in path and other not in ancestors[step.name]:
                yield Violation(
                    f"{path[step.name]}.uses",
                    step.name,
                    f"step {_shown(step.name)} uses {_shown(other)} but does not come after it:"
                    f" add {_shown(other)} to its `after`",
                )
    is_wide = definition.mode is Mode.SAGA and len(steps) > MAX_PARALLEL
    width = _width(steps) if is_wide else 0  # of branches there are no more, and it is said above
    if width > MAX_PARALLEL:
        yield Violation(
            "steps",
            "",
            f"up to {width} steps could run at once; at most {MAX_PARALLEL}:"
            " let some wait for others",
        )
    if definition.mode is Mode.SAGA:  # elsewhere no step is a point of no return
        yield from _no_return_violations(steps, _ancestors(_drawn(steps)), path)


def _no_return_violations(
    steps: Sequence[Step], ancestors: dict[str, set[str]], path: dict[str, str]
) -> Iterator[Violation]:
    pivots = [step for step in steps if step.kind is Kind.PIVOT]
    for extra in pivots[1:]:
        yield Violation(
            f"{path[extra.name]}.kind",
            extra.name,
            f"{_shown(pivots[0].name)} is the pivot already: a definition has at most one;"
            " make this one RETRIABLE",
        )
    if len(pivots) > 1:
        return
    for step in steps:
        if pivots:
            pivot = pivots[0].name
            if step.kind is Kind.COMPENSATABLE and step.name not in ancestors[pivot]:
                yield Violation(
                    f"{path[step.name]}.kind",
                    step.name,
                    f"the pivot {_shown(pivot)} does not wait for this compensatable step: it could"
                    " still fail when nothing can be undone; put it before the pivot, or make it"
                    " RETRIABLE after it",
                )
            if step.kind is Kind.RETRIABLE and pivot not in ancestors[step.name]:
                yield Violation(
                    f"{path[step.name]}.kind",
                    step.name,
                    "a retriable step cannot be undone, so it must come after the pivot"
                    f" {_shown(pivot)}: add it to `after`, or make this step COMPENSATABLE",
                )
        elif step.kind is Kind.COMPENSATABLE:
            blocking = sorted(
                other.name
                for other in steps
                if other.kind is Kind.RETRIABLE and other.name in ancestors[step.name]
            )
            if blocking:
                yield Violation(
                    f"{path[step.name]}.kind",
                    step.name,
                    f"it comes after the retriable step {_shown(blocking[0])}, which cannot be"
                    " undone: move it before, or make it RETRIABLE",
                )


def _cycles(steps: Sequence[Step]) -> list[list[str]]:
    """Cycles of `after`, none of which share a step; none at all only where there is none."""
    drawn = _drawn(steps)
    cycles: list[list[str]] = []
    while cycle := _cycle(drawn):
        cycles.append(cycle)
        drawn = {
            name: tuple(other for other in others if other not in cycle)
            for name, others in drawn.items()
            if name not in cycle
        }
    return cycles


def _cycle(after: dict[str, tuple[str, ...]]) -> list[str]:
    """One cycle, in order, or nothing. Depth-first with three colours, without recursion."""
    done: set[str] = set()
    for root, others_of_root in after.items():
        trail: list[str] = []
        on_trail: set[str] = set()
        stack: list[tuple[str, Iterator[str]]] = []
        if root in done:
            continue
        stack.append((root, iter(others_of_root)))
        trail.append(root)
        on_trail.add(root)
        while stack:
            name, others = stack[-1]
            following = next((other for other in others if other not in done), None)
            if following is None:
                stack.pop()
                trail.pop()
                on_trail.discard(name)
                done.add(name)
            elif following in on_trail:
                return trail[trail.index(following) :]
            else:
                stack.append((following, iter(after[following])))
                trail.append(following)
                on_trail.add(following)
    return []


def _drawn(steps: Sequence[Step]) -> dict[str, tuple[str, ...]]:
    """For each step of normalised ones those that it names in `after`."""
    return {step.name: step.after or () for step in steps}


def _waits_for(steps: Sequence[Step]) -> dict[str, tuple[str, ...]]:
    """For each step of normalised ones all that it waits for: what is drawn, and rule 3's gate."""
    if any(step.kind is Kind.PIVOT for step in steps):
        return _drawn(steps)
    gate = tuple(step.name for step in steps if step.kind is Kind.COMPENSATABLE)
    return {
        step.name: (step.after or ()) + (gate if step.kind is Kind.RETRIABLE else ())
        for step in steps
    }


def _ancestors(after: dict[str, tuple[str, ...]]) -> dict[str, set[str]]:
    """For each step every known step that it comes after, directly or not; ends on cycles too."""
    found: dict[str, set[str]] = {}
    for name, others in after.items():
        seen: set[str] = set()
        stack = list(others)
        while stack:
            other = stack.pop()
            if other in seen or other not in after:
                continue
            seen.add(other)
            stack.extend(after[other])
        found[name] = seen
    return found


def _width(steps: Sequence[Step]) -> int:
    """The most steps that can be under way at once: the largest set without one that waits.

    Dilworth: it equals the number of steps minus a maximum matching of the "comes after" relation.
    Kuhn's augmenting paths are quick enough for 128 steps.
    """
    ancestors = _ancestors(_waits_for(steps))
    match: dict[str, str] = {}

    def augment(name: str, tried: set[str]) -> bool:
        for other in ancestors[name]:
            if other not in tried:
                tried.add(other)
                if other not in match or augment(match[other], tried):
                    match[other] = name
                    return True
        return False

    return len(steps) - sum(augment(step.name, set()) for step in steps)


def _known(wrong: str, names: Sequence[str], what: str) -> str:
    # A name that could not be one is near to none, and the comparison takes the product of lengths.
    near = difflib.get_close_matches(wrong, names, n=1) if len(wrong) <= MAX_SHOWN else []
    return (
        f"did you mean {_shown(near[0])}?"
        if near
        else f"the {what} are " + ", ".join(map(_shown, names[:8]))
    )


def _shown(name: str) -> str:
    return repr(name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "…")


# -- plan ------------------------------------------------------------------------------------------


class Plan:
    """A valid definition with its graph worked out. Steps are numbered in the order of the list.

    Built once per content hash and shared by all of its sagas; never changed after.

    definition, content_hash   the normalised content and its name
    steps, step_names          its steps, and their names, by number
    participants               those that its steps call, by name
    waits_for[n]               steps that must be done before n starts: `after`, and for a retriable
                               step of a definition without pivot also all compensatable steps
    dependents[n]              steps that wait for n, directly
    descendants[n]             bit set of all steps that wait for n, directly or not
    uses[n]                    steps whose results n is handed
    roots                      steps that wait for nothing
    pivot                      number of the pivot, or None
    two_phase                  the settings of a two-phase commit; None: the mode is SAGA
    longest_wait_ms            what a step may have to wait for its next attempt: a backoff, or the
                               time-out of one that was lost
    longest_budget_ms          the longest that a step is tried or told, by its policies
    """

    __slots__ = (
        "content_hash",
        "definition",
        "dependents",
        "descendants",
        "longest_budget_ms",
        "longest_wait_ms",
        "number_of",
        "participants",
        "pivot",
        "roots",
        "step_names",
        "steps",
        "two_phase",
        "uses",
        "waits_for",
    )

    def __init__(self, definition: Definition) -> None:
        definition = normalise(definition)
        steps = definition.steps
        self.definition = definition
        self.two_phase = definition.two_phase
        self.content_hash = content_hash(definition)
        self.steps = steps
        self.step_names = tuple(step.name for step in steps)
        self.participants = tuple(sorted({step.participant for step in steps}))
        self.number_of = {step.name: number for number, step in enumerate(steps)}
        self.longest_wait_ms = max(map(_longest_wait_ms, steps))
        self.longest_budget_ms = max(map(_longest_budget_ms, steps))
        self.pivot = next((n for n, step in enumerate(steps) if step.kind is Kind.PIVOT), None)
        waits_for = [
            tuple(sorted({self.number_of[name] for name in names}))
            for names in _waits_for(steps).values()
        ]
        self.waits_for = tuple(waits_for)
        self.dependents = tuple(
            tuple(m for m in range(len(steps)) if n in waits_for[m]) for n in range(len(steps))
        )
        self.descendants = tuple(self._descendants(n) for n in range(len(steps)))
        self.uses = tuple(tuple(self.number_of[name] for name in step.uses or ()) for step in steps)
        self.roots = tuple(n for n in range(len(steps)) if not waits_for[n])

    def _descendants(self, number: int) -> int:
        found = 0
        stack = list(self.dependents[number])
        while stack:
            other = stack.pop()
            if not found >> other & 1:
                found |= 1 << other
                stack.extend(self.dependents[other])
        return found


def _longest_wait_ms(step: Step) -> int:
    policies = (step.retry, step.compensation_retry)
    return max(step.timeout_ms, *(policy.max_ms for policy in policies if policy is not None))


def _longest_budget_ms(step: Step) -> int:
    policies = (step.retry, step.compensation_retry)
    return max(policy.give_up_after_ms for policy in policies if policy is not None)
