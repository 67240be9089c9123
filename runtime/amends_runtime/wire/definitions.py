"""Definitions, both ways. A zero in a duration or limit is "the default", and becomes it here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from amends.v1 import types_pb2
from amends_runtime.core import definition as core_definition
from amends_runtime.core.definition import (
    Definition,
    Kind,
    Mode,
    RetryPolicy,
    Step,
    TwoPhase,
)
from amends_runtime.errors import FieldViolation, InvalidRequest
from amends_runtime.ports import RegisteredDefinition

__all__ = [
    "KINDS_OUT",
    "MODES_OUT",
    "definition_from_proto",
    "definition_to_proto",
    "read_definition",
    "registered_to_proto",
]

_MODES: Final[dict[int, Mode]] = {
    types_pb2.MODE_UNSPECIFIED: Mode.SAGA,
    types_pb2.MODE_SAGA: Mode.SAGA,
    types_pb2.MODE_TWO_PHASE_COMMIT: Mode.TWO_PHASE_COMMIT,
}
MODES_OUT: Final = {
    Mode.SAGA: types_pb2.MODE_SAGA,
    Mode.TWO_PHASE_COMMIT: types_pb2.MODE_TWO_PHASE_COMMIT,
}
_KINDS: Final[dict[int, Kind]] = {
    types_pb2.STEP_KIND_UNSPECIFIED: Kind.COMPENSATABLE,
    types_pb2.STEP_KIND_COMPENSATABLE: Kind.COMPENSATABLE,
    types_pb2.STEP_KIND_PIVOT: Kind.PIVOT,
    types_pb2.STEP_KIND_RETRIABLE: Kind.RETRIABLE,
    types_pb2.STEP_KIND_READ_ONLY: Kind.READ_ONLY,
}
KINDS_OUT: Final = {
    Kind.COMPENSATABLE: types_pb2.STEP_KIND_COMPENSATABLE,
    Kind.PIVOT: types_pb2.STEP_KIND_PIVOT,
    Kind.RETRIABLE: types_pb2.STEP_KIND_RETRIABLE,
    Kind.READ_ONLY: types_pb2.STEP_KIND_READ_ONLY,
}
_WORK_TO_COME: Final = {
    "sleep": "durable timers",
    "wait_signal": "signals",
    "saga": "sub-sagas",
}
_ANY_NAME: Final = "unnamed"  # stands in for work that cannot be read, so that the rest still can


def definition_from_proto(message: types_pb2.Definition) -> Definition:
    """The definition that a message describes, not normalised.

    Raises InvalidRequest for what the core has no words for (no work, work of a later version,
    unknown enum values); it then names everything else that is wrong with it, too. What the core
    can say but would refuse is left to `core.definition.violations`.
    """
    definition, found = read_definition(message)
    if not found:
        return definition
    told = {violation.field for violation in found}
    found += [
        FieldViolation(v.field, v.message)
        for v in core_definition.violations(definition)
        if v.field not in told  # the core judges what was put in its place
    ]
    raise InvalidRequest(
        "INVALID_DEFINITION",
        [FieldViolation(f"definition.{v.field}", v.message) for v in found],
        {"definition": definition.name[:64], "violations": str(len(found))},
    )


def read_definition(message: types_pb2.Definition) -> tuple[Definition, list[FieldViolation]]:
    """The definition as far as the core can say it, and everything that it has no words for."""
    found: list[FieldViolation] = []
    mode = _MODES.get(message.mode)
    if mode is None:
        found.append(_unknown_enum("mode", message.mode, types_pb2.Mode.keys()))
    if message.HasField("two_phase") and mode is not Mode.TWO_PHASE_COMMIT:
        found.append(
            FieldViolation(
                "two_phase", "it has a meaning only with mode TWO_PHASE_COMMIT: leave it out"
            )
        )
    if len(message.steps) > core_definition.MAX_STEPS:
        # The rest is not even read: a request has room for hundreds of thousands.
        found.append(
            FieldViolation(
                "steps",
                f"{len(message.steps)} steps, and {core_definition.MAX_STEPS} are the most:"
                " split it into several sagas",
            )
        )
    definition = Definition(
        name=message.name,
        steps=tuple(
            _read_step(f"steps[{number}]", step, mode, found)
            for number, step in enumerate(message.steps[: core_definition.MAX_STEPS])
        ),
        mode=mode or Mode.SAGA,
        deadline_ms=message.deadline_ms,
        retention_ms=message.retention_ms,
        two_phase=_read_two_phase(message.two_phase)
        if message.HasField("two_phase") and mode is Mode.TWO_PHASE_COMMIT
        else None,
    )
    return definition, found


def _read_two_phase(message: types_pb2.TwoPhaseOptions) -> TwoPhase:
    return TwoPhase(ordered=message.ordered, locked_retries=message.locked_retries)


def _read_step(
    path: str, message: types_pb2.Step, mode: Mode | None, found: list[FieldViolation]
) -> Step:
    kind = _KINDS.get(message.kind)
    if kind is None:
        found.append(_unknown_enum(f"{path}.kind", message.kind, types_pb2.StepKind.keys()))
    work = message.WhichOneof("work")
    if work is None:
        found.append(
            FieldViolation(
                f"{path}.call", f"step {_shown(message.name)} does nothing: give it a call"
            )
        )
    elif work != "call":
        found.append(
            FieldViolation(
                f"{path}.{work}",
                f"step {_shown(message.name)} needs {_WORK_TO_COME[work]}, which are not available"
                " in this version: use a call",
            )
        )
    call = message.call
    return Step(
        name=message.name,
        participant=call.participant if work == "call" else _ANY_NAME,
        action=call.action if work == "call" else _ANY_NAME,
        kind=kind or Kind.COMPENSATABLE,
        after=tuple(message.after.names) if message.HasField("after") else None,
        uses=tuple(message.uses.names) if message.HasField("uses") else None,
        timeout_ms=call.timeout_ms or _DEFAULT_TIMEOUT_MS,
        retry=_read_policy(call.retry, _forward_retry(kind)) if call.HasField("retry") else None,
        compensation_retry=_read_policy(call.compensation_retry, _backward_retry(mode))
        if call.HasField("compensation_retry")
        else None,
    )


_DEFAULT_TIMEOUT_MS: Final = Step(name="", participant="", action="").timeout_ms


def _forward_retry(kind: Kind | None) -> RetryPolicy:
    if kind in {Kind.PIVOT, Kind.RETRIABLE}:
        return core_definition.MUST_SUCCEED_RETRY
    return core_definition.FORWARD_RETRY


def _backward_retry(mode: Mode | None) -> RetryPolicy:
    if mode is Mode.TWO_PHASE_COMMIT:
        return core_definition.FORWARD_RETRY
    return core_definition.COMPENSATION_RETRY


def _read_policy(message: types_pb2.RetryPolicy, default: RetryPolicy) -> RetryPolicy:
    return RetryPolicy(
        first_ms=message.first_ms or default.first_ms,
        factor=message.factor or default.factor,
        max_ms=message.max_ms or default.max_ms,
        give_up_after_ms=message.give_up_after_ms or default.give_up_after_ms,
    )


def _unknown_enum(field: str, value: int, names: Iterable[str]) -> FieldViolation:
    return FieldViolation(field, f"{value} is not a value of it: the values are {', '.join(names)}")


def _shown(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:64] + "…")


def definition_to_proto(definition: Definition) -> types_pb2.Definition:
    """The message that says the same; what is `None` here is absent there."""
    return types_pb2.Definition(
        name=definition.name,
        mode=MODES_OUT[definition.mode],
        steps=map(_step_to_proto, definition.steps),
        deadline_ms=definition.deadline_ms,
        retention_ms=definition.retention_ms,
        two_phase=_two_phase_to_proto(definition.two_phase),
    )


def _two_phase_to_proto(two_phase: TwoPhase | None) -> types_pb2.TwoPhaseOptions | None:
    if two_phase is None:
        return None
    return types_pb2.TwoPhaseOptions(
        ordered=two_phase.ordered, locked_retries=two_phase.locked_retries
    )


def _step_to_proto(step: Step) -> types_pb2.Step:
    return types_pb2.Step(
        name=step.name,
        kind=KINDS_OUT[step.kind],
        after=None if step.after is None else types_pb2.StepNames(names=step.after),
        uses=None if step.uses is None else types_pb2.StepNames(names=step.uses),
        call=types_pb2.CallStep(
            participant=step.participant,
            action=step.action,
            timeout_ms=step.timeout_ms,
            retry=_policy_to_proto(step.retry),
            compensation_retry=_policy_to_proto(step.compensation_retry),
        ),
    )


def _policy_to_proto(policy: RetryPolicy | None) -> types_pb2.RetryPolicy | None:
    if policy is None:
        return None
    return types_pb2.RetryPolicy(
        first_ms=policy.first_ms,
        factor=policy.factor,
        max_ms=policy.max_ms,
        give_up_after_ms=policy.give_up_after_ms,
    )


def registered_to_proto(
    registered: RegisteredDefinition, *, latest: bool
) -> types_pb2.RegisteredDefinition:
    """A registered definition. `latest`: a start that names no version gets this one."""
    return types_pb2.RegisteredDefinition(
        definition=definition_to_proto(registered.definition),
        content_hash=registered.content_hash,
        version=registered.version,
        registered_at_ms=registered.registered_at_ms,
        latest=latest,
    )
