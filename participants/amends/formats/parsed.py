"""What the readers of all formats give, their limits, and their one error."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from amends.definition_problems import DefinitionProblem, FieldPath

MAX_DEPTH: Final = 16
"""Tables and lists in each other; a definition has four."""
MAX_VALUES: Final = 65_536
"""Keys and values in one file, aliases written out; 128 steps with every field have 40,000."""
MAX_SCALAR: Final = 512
"""Characters of a number or another bare word; Python takes long over numbers of thousands."""

TOO_DEEP: Final = f"is nested more than {MAX_DEPTH} deep here, too deeply to be a definition"
TOO_MANY: Final = f"holds more than {MAX_VALUES} keys and values, too many to be a definition"
TOO_LONG: Final = f"has a word of more than {MAX_SCALAR} characters here: put a text in quotes"


class Place(NamedTuple):
    """Where something begins in a text, in lines and characters, both from 1."""

    line: int
    column: int


START: Final = Place(1, 1)


class Unreadable(Exception):
    """A text is not of its format, or beyond a limit: what, and where."""

    def __init__(self, message: str, place: Place | None) -> None:
        self.message = message
        self.place = place
        super().__init__(message)


@dataclass(slots=True)
class Parsed:
    """The content of a text, and where it stands."""

    content: Any
    """Dictionaries, lists, texts, numbers, truth values, None."""
    places: dict[FieldPath, Place]
    """Where each thing begins: what has a key at its key, items of lists at themselves."""
    problems: list[DefinitionProblem] = field(default_factory=list)
    """What is wrong with the text although it can be read: a key that stands twice."""


class Lines:
    """Lines and columns of a text's offsets."""

    def __init__(self, text: str) -> None:
        self._starts = [0]
        at = text.find("\n")
        while at >= 0:
            self._starts.append(at + 1)
            at = text.find("\n", at + 1)

    def place(self, offset: int) -> Place:
        """Give the place of a character."""
        line = bisect_right(self._starts, offset)
        return Place(line, offset - self._starts[line - 1] + 1)


def stands_twice(path: FieldPath, first: Place, second: Place) -> DefinitionProblem:
    """Say that a table has a key twice."""
    return DefinitionProblem(
        path,
        f"stands twice in its table, first in line {first.line}: keep one of them",
        line=second.line,
        column=second.column,
    )
