"""What can be judged of a definition without the runtime, and in which words."""

from __future__ import annotations

import difflib
import enum
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Final, NamedTuple, TypeGuard, TypeVar

from amends.definition_problems import (
    MAX_PROBLEMS,
    SHOWN,
    DefinitionProblem,
    FieldPath,
    problem,
    raise_if,
    shown,
)
from amends.errors import InvalidDefinition

STEP_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,47}")
DEFINITION_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}")

MAX_COUNT: Final = 2**31 - 1
"""More does not fit the contract; the runtime's own limits are lower."""
MAX_BRANCHES: Final = 64
"""The runtime's own limit: all branches of a two-phase commit are told its decision at once."""
MAX_LOCKED_RETRIES: Final = 100
"""The runtime's own limit: the prepare deadline ends them long before."""
MAX_DURATION_MS: Final = 2**53
"""Beyond this a float no longer holds every millisecond; the runtime's own limits are lower."""


def check_name(value: object, form: re.Pattern[str], further: int) -> None:
    """Refuse what is no name of that form: a letter and so many further characters."""
    if not (isinstance(value, str) and form.fullmatch(value)):
        rule = f"a lower-case letter, then up to {further} of a-z 0-9 _ -"
        raise problem(f"must be {rule}; it is {shown(value)}")


def check_action(value: object) -> None:
    """Refuse what cannot be sent as the name of an action; its form is the runtime's rule."""
    if not (isinstance(value, str) and value):
        raise problem(f"must be a name, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise problem(f"holds half a character, which cannot be sent: {shown(value)}") from None


def seconds(value: object) -> float | None:
    """Judge a duration, and give it rounded to milliseconds; None is the default."""
    if value is None:
        return None
    if not is_number(value):
        raise problem(f"must be a number of seconds, not {shown(value)}")
    if value > MAX_DURATION_MS / 1000:  # before it is multiplied: a float has an end
        raise problem(f"is too long: {shown(value)} seconds")
    milliseconds = round(value * 1000)
    if milliseconds < 1:
        raise problem(
            f"must be at least 0.001 seconds, not {shown(value)}; leave it out for the default"
        )
    return milliseconds / 1000


def check_yes_or_no(value: object) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise problem(f"must be true or false, not {shown(value)}")


def check_whole(value: object) -> None:
    """Refuse what is no count; the most that it may be is the runtime's rule."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise problem(f"must be a whole number from 0, not {shown(value)}")


def check_locked_retries(value: object) -> None:
    """Refuse what is no count, or more than there may be."""
    check_whole(value)
    if isinstance(value, int) and value > MAX_LOCKED_RETRIES:
        raise problem(f"{value} is out of range: 0 to {MAX_LOCKED_RETRIES}")


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether it is a finite number; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False


_Member = TypeVar("_Member", bound=enum.StrEnum)


def member(kind: type[_Member], value: object) -> _Member:
    """Find a member by its name, in upper or lower case."""
    if isinstance(value, str) and value.upper() in kind.__members__:
        return kind[value.upper()]
    known = [name.lower() for name in kind.__members__]
    near = value.lower() if isinstance(value, str) else value
    raise problem(f"{shown(value)} is not known; {nearest(near, known, 'values')}")


def names_of_steps(value: object) -> tuple[str, ...] | None:
    """Judge a list of names of steps; None is the default, a name alone is a list of one."""
    if value is None:
        return None
    if isinstance(value, str):
        return (value,)  # one step; taken as a list it would be one step per letter
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise problem(f"must be a list of step names, not {shown(value)}")


def given_names(names: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Give names of steps as a tuple, which is judged later; None is the default."""
    if names is None or isinstance(names, str):
        return names_of_steps(names)
    try:
        return tuple(names)
    except TypeError:
        raise problem(f"after and uses must be lists of step names, not {shown(names)}") from None


def repeated_names(names: Iterable[tuple[int, str]]) -> list[DefinitionProblem]:
    """List the steps whose name a step before them has. Given are their numbers and names."""
    seen: set[str] = set()
    found = []
    for number, name in names:
        if name in seen:
            path: FieldPath = ("steps", number, "name")
            message = "a step before it has the same name; step names are unique"
            found.append(DefinitionProblem(path, message, name))
        seen.add(name)
    return found


class References(NamedTuple):
    """Which other steps a step names."""

    number: int
    """Its place in the list of steps, from 0."""
    name: str
    after: tuple[str, ...] | None
    uses: tuple[str, ...] | None


def references_in(tables: Iterable[object]) -> list[References]:
    """Give the references of the tables of a file, as far as they can be read."""
    found = []
    for number, table in enumerate(tables):
        if isinstance(table, Mapping) and isinstance(name := table.get("name"), str):
            after = uses = None
            with suppress(InvalidDefinition):
                after = names_of_steps(table.get("after"))
            with suppress(InvalidDefinition):
                uses = names_of_steps(table.get("uses"))
            found.append(References(number, name, after, uses))
    return found


class Order(NamedTuple):
    """What a step of a two-phase commit waits for, and whose results it is handed."""

    after: tuple[str, ...]
    uses: tuple[str, ...]


def drawn_order(names: Sequence[str], *, ordered: bool) -> list[Order]:
    """Give the order of a two-phase commit's steps: that of the list, or none at all."""
    if not ordered:
        return [Order((), ())] * len(names)
    return [
        Order(tuple(names[max(0, number - 1) : number]), tuple(names[:number]))
        for number in range(len(names))
    ]


def check_branches(count: int) -> None:
    """Refuse more branches than a two-phase commit may have."""
    if count > MAX_BRANCHES:
        raise problem(
            f"{count} branches; a two-phase commit has at most {MAX_BRANCHES}, for all are told "
            "its decision at once, in whatever order they vote: let one participant do more in one "
            "branch"
        )


def check_two_phase_step(
    kind: str | None,
    drawn: Order,
    *,
    after: tuple[str, ...] | None,
    uses: tuple[str, ...] | None,
) -> None:
    """Refuse what a step of a two-phase commit does not have: a `kind`, and an order of its own.

    A runtime's own definition has the order that is `drawn`, and may be given as it is.
    """
    problems: list[DefinitionProblem] = []
    if kind is not None:
        message = (
            f"in a two-phase commit every step votes and can be rolled back; {kind} has a meaning "
            "only in mode SAGA: leave it out"
        )
        problems.append(DefinitionProblem(("kind",), message))
    for name, given, order in (("after", after, drawn.after), ("uses", uses, drawn.uses)):
        if given not in (None, order):
            message = (
                "a two-phase commit asks all participants at once, or with `ordered` in the order "
                f"of the list: leave `{name}` out"
            )
            problems.append(DefinitionProblem((name,), message))
    raise_if(problems)


def unknown_references(steps: Collection[References]) -> list[DefinitionProblem]:
    """List the references to steps that there are not, and of steps to themselves."""
    return list(islice(_unknown_references(steps), MAX_PROBLEMS))


def _unknown_references(steps: Collection[References]) -> Iterator[DefinitionProblem]:
    known = dict.fromkeys(step.name for step in steps)  # in order, so that a near one is the same
    for step in steps:
        others = [name for name in known if name != step.name]
        for where, names in (("after", step.after), ("uses", step.uses)):
            for number, name in enumerate(names or ()):
                # Its own place, which a name that stands alone does not have: then the key's.
                path: FieldPath = ("steps", step.number, where, number)
                if name == step.name:
                    yield DefinitionProblem(path, "is the step itself: leave it out", step.name)
                elif name not in known:
                    near = nearest(name, others, "steps")
                    yield DefinitionProblem(
                        path, f"there is no step {shown(name)}; {near}", step.name
                    )


def wrong_keys(
    table: Mapping[Any, Any], known: Collection[str], required: Iterable[str] = ()
) -> list[DefinitionProblem]:
    """List the keys of a table that it must not have, and those that it lacks."""
    found = [
        DefinitionProblem(
            (key if isinstance(key, str) else shown(key),),
            f"is not a known key; {nearest(key, known, 'keys')}",
        )
        for key in islice((key for key in table if key not in known), MAX_PROBLEMS)
    ]
    return found + [
        DefinitionProblem((key,), "is missing: add it") for key in required if key not in table
    ]


def nearest(wrong: object, known: Collection[str], what: str) -> str:
    """Say which of the known names was perhaps meant, or which there are."""
    text = wrong[:SHOWN] if isinstance(wrong, str) else shown(wrong)
    near = difflib.get_close_matches(text, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    if not known:
        return f"there are no {what}"
    return f"the {what} are: {', '.join(name[:SHOWN] for name in sorted(known)[:12])}"
