"""What to do about a step whose participant is not registered.

The core says that it is not and which name is near; how a runtime is told of a participant is known
out here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from amends_runtime.core.definition import STEP_NAME, Definition
from amends_runtime.errors import FieldViolation

__all__ = ["with_remedies"]


def with_remedies(
    found: Iterable[FieldViolation], definition: Definition, registered: Collection[str]
) -> list[FieldViolation]:
    """The same violations of `definition`, where a participant is missing with how to register it.

    `registered` are the participants that there are.
    """
    missing = {
        f"steps[{number}].call.participant": step.participant
        for number, step in enumerate(definition.steps)
        if STEP_NAME.fullmatch(step.participant) and step.participant not in registered
    }
    return [
        FieldViolation(each.field, f"{each.message}; {_remedy(missing[field])}")
        if (field := each.field.removeprefix("definition.")) in missing
        else each
        for each in found
    ]


def _remedy(name: str) -> str:
    return (
        f"to register it: amends participants add {name}=HOST:PORT, or [participants.{name}] in the"
        " runtime's configuration"
    )
