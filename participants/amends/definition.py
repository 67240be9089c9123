"""Definitions: what a saga consists of, written in Python or read from a file.

::

    order = (
        amends.Definition("order", deadline_s=60)
        .step("reserve", "inventory", "reserve")
        .step("charge", "payments", "charge", timeout_s=5, retry=amends.Retry(give_up_after_s=30))
        .pivot("ship", "shipping", "ship")
        .retriable("notify", "orders", "notify")
    )
    registered = await client.register(order)

    transfer = (
        amends.Definition("transfer", mode=amends.Mode.TWO_PHASE_COMMIT, locked_retries=3)
        .step("debit", "east", "debit")
        .step("credit", "west", "credit")
    )

A `Definition` never changes: each of its methods returns a new one with one more step. What can be
judged here (types, kinds, names, references) is judged as early as possible, and everything that is
wrong is said at once; the rules of the graph are the runtime's, which has the last word.

Durations are seconds, exact to the millisecond.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from amends.definition_checks import (
    DEFINITION_NAME,
    STEP_NAME,
    References,
    check_action,
    check_branches,
    check_locked_retries,
    check_name,
    check_two_phase_step,
    check_yes_or_no,
    drawn_order,
    given_names,
    is_number,
    member,
    names_of_steps,
    references_in,
    repeated_names,
    seconds,
    unknown_references,
    wrong_keys,
)
from amends.definition_problems import (
    DefinitionProblem,
    collected,
    problem,
    raise_if,
    shown,
)
from amends.definition_source import DefinitionSource, parse_source, read_source
from amends.v1 import types_pb2


class Mode(enum.StrEnum):
    """How a saga reaches everything or nothing."""

    SAGA = "SAGA"
    """Steps take effect one after another; what took effect is compensated when it turns back."""
    TWO_PHASE_COMMIT = "TWO_PHASE_COMMIT"
    """All participants vote first, then one decision is carried out by all."""


class StepKind(enum.StrEnum):
    """What a step means for turning back."""

    COMPENSATABLE = "COMPENSATABLE"
    """Can be undone by its compensation."""
    PIVOT = "PIVOT"
    """The point of no return: the saga turns back only if this step is refused."""
    RETRIABLE = "RETRIABLE"
    """Comes after the point of no return and must succeed in the end."""
    READ_ONLY = "READ_ONLY"
    """Has no effect, so there is nothing to undo."""


@dataclass(frozen=True, slots=True)
class Retry:
    """When to try again, and when to stop trying. What is left out is the runtime's default.

    The wait before a further attempt is drawn between 0 and a bound, which grows from `first_s` by
    `factor` with each failed attempt. Raises `InvalidDefinition`.
    """

    first_s: float | None = None
    """Bound of the first wait. Default 0.1 s."""
    factor: float | None = None
    """Growth of the bound, at least 1. Default 2."""
    max_s: float | None = None
    """The bound never grows beyond this. Default 30 s."""
    give_up_after_s: float | None = None
    """Stop when attempts and the waits between them took this long together. Default 5 min; 24 h
    for compensations and for pivot and retriable steps. In a two-phase commit 5 min for all: after
    it an attempt to commit or roll back is shown to an operator, and repeated all the same."""

    def __post_init__(self) -> None:
        problems: list[DefinitionProblem] = []
        for name in ("first_s", "max_s", "give_up_after_s"):
            with collected(problems, name):
                object.__setattr__(self, name, seconds(getattr(self, name)))
        if self.factor is not None and not (is_number(self.factor) and self.factor >= 1):
            problems.append(
                DefinitionProblem(
                    ("factor",), f"must be a number of at least 1, not {shown(self.factor)}"
                )
            )
        raise_if(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDefinition:
    """One step of a definition: a call of a participant's action. Raises `InvalidDefinition`."""

    name: str
    """Unique in the definition: a lower-case letter, then up to 47 of ``a-z 0-9 _ -``."""
    participant: str
    """Registered name of the participant. Never an address."""
    action: str
    """The business operation inside that participant, for example ``charge``."""
    kind: StepKind = StepKind.COMPENSATABLE
    """What it means for turning back."""
    after: tuple[str, ...] | None = None
    """Steps that must be done first. None: the step before it in the list; empty: none."""
    uses: tuple[str, ...] | None = None
    """Earlier steps whose results it is handed. None: all that it comes after."""
    timeout_s: float | None = None
    """Per attempt, from the moment it is sent. Default 10 s."""
    retry: Retry | None = None
    """Backoff and give-up of the action itself."""
    compensation_retry: Retry | None = None
    """The same for its compensation."""

    def __post_init__(self) -> None:
        problems: list[DefinitionProblem] = []
        with collected(problems, "name"):
            check_name(self.name, STEP_NAME, 47)
        with collected(problems, "participant"):
            check_name(self.participant, STEP_NAME, 47)
        with collected(problems, "action"):
            check_action(self.action)
        with collected(problems, "kind"):
            object.__setattr__(self, "kind", member(StepKind, self.kind))
        for name in ("after", "uses"):
            with collected(problems, name):
                object.__setattr__(self, name, names_of_steps(getattr(self, name)))
        with collected(problems, "timeout_s"):
            object.__setattr__(self, "timeout_s", seconds(self.timeout_s))
        for name in ("retry", "compensation_retry"):
            value: object = getattr(self, name)
            if value is not None and not isinstance(value, Retry):
                message = f"must be an amends.Retry, not {shown(value)}"
                problems.append(DefinitionProblem((name,), message))
        step: object = self.name
        raise_if([each.within(step=step if isinstance(step, str) else "") for each in problems])


@dataclass(frozen=True, slots=True)
class Definition:
    """An immutable description of a saga.

    Raises `InvalidDefinition` when it is made wrongly; references between steps are judged when it
    is complete, in `to_proto` (which `Client.register` calls).
    """

    name: str
    """A lower-case letter, then up to 63 of ``a-z 0-9 _ -``."""
    mode: Mode = field(default=Mode.SAGA, kw_only=True)
    """How it reaches all or nothing."""
    deadline_s: float | None = field(default=None, kw_only=True)
    """From its start; then the saga turns back, if it still can. None: no deadline; in a two-phase
    commit 30 s, within which all must have voted."""
    retention_s: float | None = field(default=None, kw_only=True)
    """How long an ended saga stays readable. None: for ever."""
    ordered: bool = field(default=False, kw_only=True)
    """Two-phase commit only: votes are asked for in the order of the steps, each with the results
    of those before it, and not all at once. One order of locks everywhere prevents deadlocks."""
    locked_retries: int = field(default=0, kw_only=True)
    """Two-phase commit only: how often the whole is tried again, in a new round, when it was
    refused as ``LOCKED`` alone. At most 100, and not after the deadline."""
    steps: tuple[StepDefinition, ...] = field(default=(), kw_only=True)
    """Its steps, in order."""

    def __post_init__(self) -> None:
        problems: list[DefinitionProblem] = []
        with collected(problems, "name"):
            check_name(self.name, DEFINITION_NAME, 63)
        with collected(problems, "mode"):
            object.__setattr__(self, "mode", member(Mode, self.mode))
        for name in ("deadline_s", "retention_s"):
            with collected(problems, name):
                object.__setattr__(self, name, seconds(getattr(self, name)))
        with collected(problems, "ordered"):
            check_yes_or_no(self.ordered)
        with collected(problems, "locked_retries"):
            check_locked_retries(self.locked_retries)
        steps: tuple[object, ...] = tuple(self.steps)
        object.__setattr__(self, "steps", steps)
        problems += [
            DefinitionProblem(
                ("steps", number), f"must be an amends.StepDefinition, not {shown(step)}"
            )
            for number, step in enumerate(steps)
            if not isinstance(step, StepDefinition)
        ]
        problems += repeated_names(
            (number, step.name)
            for number, step in enumerate(steps)
            if isinstance(step, StepDefinition)
        )
        problems += self._problems_of_mode()
        raise_if(problems, self.name)

    def _problems_of_mode(self) -> list[DefinitionProblem]:
        """List what has no meaning in this mode."""
        mode: object = self.mode  # which may be one that there is not: then nothing is known
        if mode is Mode.SAGA:
            return [
                DefinitionProblem(
                    (name,),
                    "it has a meaning only with mode TWO_PHASE_COMMIT: leave it out, or say that "
                    "mode",
                )
                for name in ("ordered", "locked_retries")
                if getattr(self, name)
            ]
        if mode is not Mode.TWO_PHASE_COMMIT:
            return []
        problems: list[DefinitionProblem] = []
        given: tuple[object, ...] = self.steps
        steps = [step for step in given if isinstance(step, StepDefinition)]
        with collected(problems, "steps"):
            check_branches(len(steps))
        drawn = drawn_order([step.name for step in steps], ordered=self.ordered)
        for number, (step, order) in enumerate(zip(steps, drawn, strict=True)):
            with collected(problems, "steps", number, step=step.name):
                is_usual = step.kind is StepKind.COMPENSATABLE
                kind = None if is_usual else str(step.kind).lower()
                check_two_phase_step(kind, order, after=step.after, uses=step.uses)
        return problems

    # -- building ------------------------------------------------------------------------------

    def step(
        self,
        name: str,
        participant: str,
        action: str,
        *,
        after: str | Iterable[str] | None = None,
        uses: str | Iterable[str] | None = None,
        timeout_s: float | None = None,
        retry: Retry | None = None,
        compensation_retry: Retry | None = None,
    ) -> Definition:
        """Return this definition with one more step, which its participant can compensate.

        `after` are the steps that must be done first; by default the step before it in the list, so
        that a plain list is sequential; an empty one starts at once. `uses` are the earlier steps
        whose results it is handed; by default all that it comes after. A two-phase commit has
        neither: see `ordered`. The rest is as in `StepDefinition`. Raises `InvalidDefinition`.
        """
        return self._with(
            StepDefinition(
                name=name,
                participant=participant,
                action=action,
                after=given_names(after),
                uses=given_names(uses),
                timeout_s=timeout_s,
                retry=retry,
                compensation_retry=compensation_retry,
            )
        )

    def pivot(
        self,
        name: str,
        participant: str,
        action: str,
        *,
        after: str | Iterable[str] | None = None,
        uses: str | Iterable[str] | None = None,
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> Definition:
        """Return this definition with the point of no return as one more step.

        There is at most one, and all compensatable steps come before it. From its first attempt on
        the saga turns back only if this step is refused. Arguments as in `step`.
        """
        return self._with(
            StepDefinition(
                name=name,
                participant=participant,
                action=action,
                kind=StepKind.PIVOT,
                after=given_names(after),
                uses=given_names(uses),
                timeout_s=timeout_s,
                retry=retry,
            )
        )

    def retriable(
        self,
        name: str,
        participant: str,
        action: str,
        *,
        after: str | Iterable[str] | None = None,
        uses: str | Iterable[str] | None = None,
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> Definition:
        """Return this definition with one more step that must succeed in the end.

        It comes after the pivot; without one, after all compensatable steps. Arguments as in
        `step`.
        """
        return self._with(
            StepDefinition(
                name=name,
                participant=participant,
                action=action,
                kind=StepKind.RETRIABLE,
                after=given_names(after),
                uses=given_names(uses),
                timeout_s=timeout_s,
                retry=retry,
            )
        )

    def read_only(
        self,
        name: str,
        participant: str,
        action: str,
        *,
        after: str | Iterable[str] | None = None,
        uses: str | Iterable[str] | None = None,
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> Definition:
        """Return this definition with one more step that has no effect and is never undone.

        Arguments as in `step`.
        """
        return self._with(
            StepDefinition(
                name=name,
                participant=participant,
                action=action,
                kind=StepKind.READ_ONLY,
                after=given_names(after),
                uses=given_names(uses),
                timeout_s=timeout_s,
                retry=retry,
            )
        )

    def _with(self, step: StepDefinition) -> Definition:
        return replace(self, steps=(*self.steps, step))

    # -- files ---------------------------------------------------------------------------------

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Definition:
        """Read a definition file: ``.yaml`` or ``.yml``, ``.toml``, ``.json``; one per file.

        Raises `InvalidDefinition` with everything that is wrong, each with file, line and column;
        `OSError` if the file cannot be read; `ModuleNotFoundError` for YAML where the extra is
        not installed: ``pip install 'amends[yaml]'``.
        """
        return definition_of(read_source(path))

    @classmethod
    def from_yaml(cls, text: str) -> Definition:
        """Read a definition from a text in YAML. Raises as `from_file`, with lines."""
        return definition_of(parse_source(text, "YAML"))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Definition:
        """Make a definition of what a YAML, TOML or JSON file holds.

        Keys are the names of the fields of `Definition`, `StepDefinition` and `Retry`; ``kind`` and
        ``mode`` may be in lower case. Raises `InvalidDefinition` with everything that is wrong; an
        unknown key is wrong, and the message names the known one that is nearest.
        """
        definition, problems = _from_dict(content)
        raise_if(problems, _name_in(content))
        assert definition is not None
        return definition

    def to_dict(self) -> dict[str, Any]:
        """Give the content of a file, as `from_dict` reads it; what is left out is not in it."""
        return _without_none(
            name=self.name,
            mode=str(self.mode),
            deadline_s=self.deadline_s,
            retention_s=self.retention_s,
            ordered=self.ordered if self.mode is Mode.TWO_PHASE_COMMIT else None,
            locked_retries=self.locked_retries if self.mode is Mode.TWO_PHASE_COMMIT else None,
            steps=[_step_to_dict(step) for step in self.steps],
        )

    # -- the contract --------------------------------------------------------------------------

    def to_proto(self) -> types_pb2.Definition:
        """Give the message of the contract.

        Raises `InvalidDefinition` if a step refers to one that there is not.
        """
        references = [
            References(number, step.name, step.after, step.uses)
            for number, step in enumerate(self.steps)
        ]
        raise_if(unknown_references(references), self.name)
        return types_pb2.Definition(
            name=self.name,
            mode=types_pb2.Mode.Value(f"MODE_{self.mode}"),
            steps=[_step_to_proto(step) for step in self.steps],
            deadline_ms=_to_ms(self.deadline_s),
            retention_ms=_to_ms(self.retention_s),
            two_phase=types_pb2.TwoPhaseOptions(
                ordered=self.ordered, locked_retries=self.locked_retries
            )
            if self.mode is Mode.TWO_PHASE_COMMIT
            else None,
        )

    @classmethod
    def from_proto(cls, message: types_pb2.Definition) -> Definition:
        """Read the message of the contract.

        A runtime writes all defaults down. Of a two-phase commit the order of its steps, which
        `ordered` says, is left out again. Raises `InvalidDefinition` if it holds something that
        this version of the SDK cannot express.
        """
        problems: list[DefinitionProblem] = []
        steps: list[StepDefinition] = []
        is_two_phase = message.mode == types_pb2.MODE_TWO_PHASE_COMMIT
        for number, step in enumerate(message.steps):
            with collected(problems, "steps", number, step=step.name):
                steps.append(_step_from_proto(step))
        if message.mode not in _MODES:
            problems.append(DefinitionProblem(("mode",), f"{int(message.mode)} {_UNKNOWN_TO_SDK}"))
        if message.HasField("two_phase") and not is_two_phase:
            problems.append(DefinitionProblem(("two_phase",), _UNKNOWN_TO_SDK))
        raise_if(problems, message.name)
        if is_two_phase:
            steps = _without_order(steps, ordered=message.two_phase.ordered)
        return cls(
            message.name,
            mode=_MODES[message.mode],
            deadline_s=_from_ms(message.deadline_ms),
            retention_s=_from_ms(message.retention_ms),
            ordered=message.two_phase.ordered,
            locked_retries=message.two_phase.locked_retries,
            steps=tuple(steps),
        )


def definition_of(source: DefinitionSource) -> Definition:
    """Make a definition of what a file holds.

    Raises `InvalidDefinition` with everything that is wrong, each with its place.
    """
    told = {each.path for each in source.problems}
    definition, found = _from_dict(source.content)
    # What stands at or in a place that is to be written in another way is judged after that.
    found = [
        each for each in found if not any(each.path[: n + 1] in told for n in range(len(each.path)))
    ]
    problems = [*source.problems, *found]
    placed = sorted(map(source.placed, problems), key=place_of)
    raise_if(placed, _name_in(source.content), source.file)
    assert definition is not None
    return definition


def place_of(found: DefinitionProblem) -> tuple[int, int]:
    """Give the key by which the problems of a file are in the order of its text."""
    return (found.line or 0, found.column or 0)


MAX_STEPS_IN_FILE: Final = 128
"""The runtime's own limit."""
_UNKNOWN_TO_SDK: Final = "is not known to this version of the SDK: update amends"
_OPTIONS: Final = ("mode", "deadline_s", "retention_s", "ordered", "locked_retries")
_KEYS: Final = ("name", *_OPTIONS, "steps")
_STEP_KEYS: Final = (
    "name",
    "participant",
    "action",
    "kind",
    "after",
    "uses",
    "timeout_s",
    "retry",
    "compensation_retry",
)
_RETRY_KEYS: Final = ("first_s", "factor", "max_s", "give_up_after_s")

_MODES: Final = {
    types_pb2.MODE_UNSPECIFIED: Mode.SAGA,
    types_pb2.MODE_SAGA: Mode.SAGA,
    types_pb2.MODE_TWO_PHASE_COMMIT: Mode.TWO_PHASE_COMMIT,
}
_KINDS: Final = {
    types_pb2.STEP_KIND_UNSPECIFIED: StepKind.COMPENSATABLE,
    types_pb2.STEP_KIND_COMPENSATABLE: StepKind.COMPENSATABLE,
    types_pb2.STEP_KIND_PIVOT: StepKind.PIVOT,
    types_pb2.STEP_KIND_RETRIABLE: StepKind.RETRIABLE,
    types_pb2.STEP_KIND_READ_ONLY: StepKind.READ_ONLY,
}


# -- files -------------------------------------------------------------------------------------


def _from_dict(content: object) -> tuple[Definition | None, list[DefinitionProblem]]:
    """Make a definition of a table, and say everything that is wrong with it."""
    if not isinstance(content, Mapping):
        message = f"a definition must be a table of keys, not {shown(content)}"
        return None, [DefinitionProblem((), message)]
    problems = wrong_keys(content, _KEYS, required=("name", "steps"))
    steps: list[StepDefinition] = []
    tables = content.get("steps", [])
    if not isinstance(tables, list | tuple):
        problems.append(
            DefinitionProblem(("steps",), f"must be a list of tables, not {shown(tables)}")
        )
    elif len(tables) > MAX_STEPS_IN_FILE:
        # The rest is not even read: a file has room for hundreds of thousands.
        with collected(problems, "steps"):
            _check_steps_in_file(len(tables), content.get("mode"))
    else:
        for number, table in enumerate(tables):
            with collected(problems, "steps", number):
                steps.append(_step_from_dict(table))
        # Of all tables, not of the steps made: one that is wrong may still be referred to, and may
        # itself refer to what there is not.
        references = references_in(tables)
        problems += repeated_names((each.number, each.name) for each in references)
        problems += unknown_references(references)
    definition = None
    if "name" in content:
        options = {key: content[key] for key in _OPTIONS if key in content}
        with collected(problems):
            definition = Definition(content["name"], **options)
    if problems or definition is None:
        return None, problems
    with collected(problems):  # what a step may have depends on the mode
        definition = replace(definition, steps=tuple(steps))
    return definition, problems


def _check_steps_in_file(count: int, mode: object) -> None:
    """Refuse more steps than any definition may have, by the limit of the mode that is meant."""
    if isinstance(mode, str) and mode.upper() == Mode.TWO_PHASE_COMMIT:
        check_branches(count)
    raise problem(
        f"{count} steps, and {MAX_STEPS_IN_FILE} are the most: split it into several sagas"
    )


def _name_in(content: object) -> object:
    return content.get("name") if isinstance(content, Mapping) else ""


def _step_from_dict(table: object) -> StepDefinition:
    if not isinstance(table, Mapping):
        raise problem(f"must be a table of keys, not {shown(table)}")
    required = ("name", "participant", "action")
    problems = wrong_keys(table, _STEP_KEYS, required)
    values = {key: table[key] for key in _STEP_KEYS if key in table}
    for key in ("retry", "compensation_retry"):
        if values.get(key) is not None:
            with collected(problems, key):
                values[key] = _retry_from_dict(values.pop(key))
    # A stand-in for what is missing, so that what is there is judged as well.
    stand_ins = {key: "missing" for key in required if key not in values}
    step = None
    with collected(problems):
        step = StepDefinition(**{**stand_ins, **values})
    name = table.get("name")
    raise_if([each.within(step=name if isinstance(name, str) else "") for each in problems])
    assert step is not None
    return step


def _retry_from_dict(table: object) -> Retry:
    if not isinstance(table, Mapping):
        raise problem(f"must be a table of keys, not {shown(table)}")
    problems = wrong_keys(table, _RETRY_KEYS)
    retry = None
    with collected(problems):
        retry = Retry(**{key: table[key] for key in _RETRY_KEYS if key in table})
    raise_if(problems)
    assert retry is not None
    return retry


def _step_to_dict(step: StepDefinition) -> dict[str, Any]:
    return _without_none(
        name=step.name,
        participant=step.participant,
        action=step.action,
        kind=str(step.kind),
        after=None if step.after is None else list(step.after),
        uses=None if step.uses is None else list(step.uses),
        timeout_s=step.timeout_s,
        retry=_retry_to_dict(step.retry),
        compensation_retry=_retry_to_dict(step.compensation_retry),
    )


def _retry_to_dict(retry: Retry | None) -> dict[str, Any] | None:
    if retry is None:
        return None
    return _without_none(**{key: getattr(retry, key) for key in _RETRY_KEYS})


def _without_none(**values: object) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


# -- the contract ------------------------------------------------------------------------------


def _without_order(steps: list[StepDefinition], *, ordered: bool) -> list[StepDefinition]:
    """Leave out what a runtime has drawn for the steps of a two-phase commit, and nothing else."""
    drawn = drawn_order([step.name for step in steps], ordered=ordered)
    return [
        replace(
            step,
            after=None if step.after == order.after else step.after,
            uses=None if step.uses == order.uses else step.uses,
        )
        for step, order in zip(steps, drawn, strict=True)
    ]


def _step_to_proto(step: StepDefinition) -> types_pb2.Step:
    return types_pb2.Step(
        name=step.name,
        kind=types_pb2.StepKind.Value(f"STEP_KIND_{step.kind}"),
        after=None if step.after is None else types_pb2.StepNames(names=step.after),
        uses=None if step.uses is None else types_pb2.StepNames(names=step.uses),
        call=types_pb2.CallStep(
            participant=step.participant,
            action=step.action,
            timeout_ms=_to_ms(step.timeout_s),
            retry=_retry_to_proto(step.retry),
            compensation_retry=_retry_to_proto(step.compensation_retry),
        ),
    )


def _retry_to_proto(retry: Retry | None) -> types_pb2.RetryPolicy | None:
    if retry is None:
        return None
    return types_pb2.RetryPolicy(
        first_ms=_to_ms(retry.first_s),
        factor=retry.factor or 0,
        max_ms=_to_ms(retry.max_s),
        give_up_after_ms=_to_ms(retry.give_up_after_s),
    )


def _step_from_proto(message: types_pb2.Step) -> StepDefinition:
    work = message.WhichOneof("work")
    if work != "call":
        raise problem(_UNKNOWN_TO_SDK, str(work or "work"))
    if message.kind not in _KINDS:
        raise problem(f"{int(message.kind)} {_UNKNOWN_TO_SDK}", "kind")
    call = message.call
    return StepDefinition(
        name=message.name,
        participant=call.participant,
        action=call.action,
        kind=_KINDS[message.kind],
        after=tuple(message.after.names) if message.HasField("after") else None,
        uses=tuple(message.uses.names) if message.HasField("uses") else None,
        timeout_s=_from_ms(call.timeout_ms),
        retry=_retry_from_proto(call.retry) if call.HasField("retry") else None,
        compensation_retry=(
            _retry_from_proto(call.compensation_retry)
            if call.HasField("compensation_retry")
            else None
        ),
    )


def _retry_from_proto(message: types_pb2.RetryPolicy) -> Retry:
    return Retry(
        first_s=_from_ms(message.first_ms),
        factor=message.factor or None,
        max_s=_from_ms(message.max_ms),
        give_up_after_s=_from_ms(message.give_up_after_ms),
    )


def _to_ms(seconds: float | None) -> int:
    return 0 if seconds is None else round(seconds * 1000)


def _from_ms(milliseconds: int) -> float | None:
    return milliseconds / 1000 if milliseconds else None
