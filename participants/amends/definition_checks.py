"""What can be judged of a definition without the runtime, and in which words.

A check raises `InvalidDefinition` with what is wrong, or returns lines about it; `collected`
gathers several of them, so that a person hears of everything at once.
"""

from __future__ import annotations

import difflib
import enum
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple, TypeGuard, TypeVar

from amends.errors import InvalidDefinition

STEP_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,47}")
DEFINITION_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}")

MAX_DURATION_MS: Final = 2**53
"""Beyond this a float no longer holds every millisecond; the runtime's own limits are lower."""

SHOWN: Final = 64
"""Characters of a wrong value that a message repeats: enough to find it in a file."""


def check_name(value: object, form: re.Pattern[str], what: str, further: int) -> None:
    """Refuse what is no name of that form: a letter and so many further characters."""
    if not (isinstance(value, str) and form.fullmatch(value)):
        rule = f"a lower-case letter, then up to {further} of a-z 0-9 _ -"
        raise InvalidDefinition([f"{what} must be {rule}; it is {shown(value)}"])


def seconds(value: object) -> float | None:
    """Judge a duration, and give it rounded to milliseconds; None is the default."""
    if value is None:
        return None
    if not is_number(value):
        raise InvalidDefinition([f"must be a number of seconds, not {shown(value)}"])
    milliseconds = round(value * 1000)
    if milliseconds < 1:
        raise InvalidDefinition(
            [f"must be at least 0.001 seconds, not {shown(value)}; leave it out for the default"]
        )
    if milliseconds > MAX_DURATION_MS:
        raise InvalidDefinition([f"is too long: {shown(value)} seconds"])
    return milliseconds / 1000


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
    raise InvalidDefinition([f"{shown(value)} is not known; {nearest(near, known, 'kinds')}"])


def names_of_steps(value: object) -> tuple[str, ...] | None:
    """Judge a list of names of steps; None is the default, a name alone is a list of one."""
    if value is None:
        return None
    if isinstance(value, str):
        return (value,)  # one step; taken as a list it would be one step per letter
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise InvalidDefinition([f"must be a list of step names, not {shown(value)}"])


def given_names(names: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Give names of steps as a tuple, which is judged later; None is the default."""
    if names is None or isinstance(names, str):
        return names_of_steps(names)
    try:
        return tuple(names)
    except TypeError:
        raise InvalidDefinition(
            [f"after and uses must be lists of step names, not {shown(names)}"]
        ) from None


def repeated_names(names: Iterable[str]) -> list[str]:
    """List the names that are there more than once."""
    return [
        f"{step_label(name)}: the name is used {count} times; step names are unique"
        for name, count in Counter(names).items()
        if count > 1
    ]


class References(NamedTuple):
    """Which other steps a step names."""

    name: str
    after: tuple[str, ...] | None
    uses: tuple[str, ...] | None


def references_in(tables: Iterable[object]) -> list[References]:
    """Give the references of the tables of a file, as far as they can be read."""
    found = []
    for table in tables:
        if isinstance(table, Mapping) and isinstance(name := table.get("name"), str):
            after = uses = None
            with suppress(InvalidDefinition):
                after = names_of_steps(table.get("after"))
            with suppress(InvalidDefinition):
                uses = names_of_steps(table.get("uses"))
            found.append(References(name, after, uses))
    return found


def unknown_references(steps: Collection[References]) -> list[str]:
    """List the references to steps that there are not, and of steps to themselves."""
    known = {step.name for step in steps}
    problems = []
    for step in steps:
        for where, names in (("after", step.after), ("uses", step.uses)):
            for name in names or ():
                if name == step.name:
                    problems.append(f"{step_label(step.name)}: {where} names the step itself")
                elif name not in known:
                    near = nearest(name, [n for n in known if n != step.name], "steps")
                    problems.append(
                        f"{step_label(step.name)}: {where} names {shown(name)}, which is no "
                        f"step; {near}"
                    )
    return problems


def nearest(wrong: object, known: Collection[str], what: str) -> str:
    """Say which of the known names was perhaps meant, or which there are."""
    near = difflib.get_close_matches(str(wrong)[:SHOWN], known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"the {what} are: {', '.join(sorted(known)[:12])}" if known else f"there are no {what}"


def step_label(name: object) -> str:
    """Say of which step a line is."""
    return f"step {shown(name)}"


def shown(value: object) -> str:
    """Give a wrong value as a message shows it."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def raise_if(problems: list[str], definition: object = "") -> None:
    """Raise if there are problems."""
    if problems:
        raise InvalidDefinition(problems, definition if isinstance(definition, str) else "")


@contextmanager
def collected(problems: list[str], prefix: str = "") -> Iterator[None]:
    """Add the problems of an `InvalidDefinition` to a list instead of letting it out."""
    try:
        yield
    except InvalidDefinition as invalid:
        problems += [prefix + problem for problem in invalid.problems]
