"""What is wrong with a definition: where it stands, what it is, how to mend it.

A check raises `InvalidDefinition` with what it found; `collected` gathers several of them, and adds
where each was found, so that a person hears of everything at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from amends.errors import InvalidDefinition

FieldPath: TypeAlias = tuple[str | int, ...]
"""The way to a field, by keys and by numbers from 0, such as ``("steps", 2, "timeout_s")``."""

SHOWN: Final = 64
"""Characters of a wrong value that a message repeats: enough to find it in a file."""
PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_PROBLEMS: Final = 100
"""Nobody mends more at once, and a hostile file must not cost seconds."""


@dataclass(frozen=True, slots=True)
class DefinitionProblem:
    """One thing that is wrong with a definition; as text, one line for a person."""

    path: FieldPath
    """Which field: keys, and numbers in lists from 0. Empty: the definition as a whole."""
    message: str
    """What is wrong with it, and how to mend it."""
    step: str = ""
    """Name of the step that it is about, as it stands there; empty if it is about none."""
    file: str = ""
    """The file as it was named; empty if the definition comes from none."""
    line: int | None = None
    """Line of the field in its text, from 1, or of the nearest thing around it."""
    column: int | None = None
    """Where in that line it begins, in characters, from 1."""

    @property
    def field(self) -> str:
        """The path as text, for example ``steps[2].retry.first_s``."""
        return dotted(self.path)

    def within(self, *outer: str | int, step: str = "") -> DefinitionProblem:
        """Give the same problem as one of a field further out."""
        return replace(self, path=(*outer, *self.path), step=self.step or step)

    def __str__(self) -> str:
        place = ""
        if self.line is not None:
            place = f"{self.file}:{self.line}" if self.file else f"line {self.line}"
            if self.column is not None:
                place += f":{self.column}" if self.file else f", column {self.column}"
        elif self.file:
            place = self.file
        inside = self.path
        label = f"step {shown(self.step)}" if self.step else ""
        if len(inside) > 1 and inside[0] == "steps":
            label = label or dotted(inside[:2])
            inside = inside[2:]
        return ": ".join(part for part in (place, label, dotted(inside), self.message) if part)


def dotted(path: FieldPath) -> str:
    """Give a path as text; a key that could not be one of ours as a value is shown."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if PLAIN_KEY.fullmatch(part) else shown(part)
            text += f".{name}" if text else name
    return text


def shown(value: object) -> str:
    """Give a wrong value as a message shows it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, a list in itself
        return f"a huge {type(value).__name__}"
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def problem(message: str, *path: str | int) -> InvalidDefinition:
    """Make the error of one problem."""
    return InvalidDefinition([DefinitionProblem(path, message)])


def raise_if(
    problems: Sequence[DefinitionProblem], definition: object = "", file: str = ""
) -> None:
    """Raise if there are problems: the first hundred of them, and how many more there are."""
    if not problems:
        return
    told = list(problems[:MAX_PROBLEMS])
    if more := len(problems) - len(told):
        message = f"and {more} more problems; mend these first"
        told.append(DefinitionProblem((), message, file=file))
    name = definition if isinstance(definition, str) and len(definition) <= SHOWN else ""
    raise InvalidDefinition(told, name)


@contextmanager
def collected(
    problems: list[DefinitionProblem], *outer: str | int, step: object = ""
) -> Iterator[None]:
    """Add the problems of an `InvalidDefinition` to a list, as those of the field `outer`."""
    try:
        yield
    except InvalidDefinition as invalid:
        of = step if isinstance(step, str) else ""
        problems += [each.within(*outer, step=of) for each in invalid.details]
