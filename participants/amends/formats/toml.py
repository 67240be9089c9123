"""Definitions in TOML.

The standard library reads the text and judges it; it does not say where things stand. A locator of
our own does, and knows only as much of TOML as that takes: headers, keys, and where values end. How
to think about it:

1. It never judges. What is no TOML the library refuses; there the locator stops where it is.
2. It goes first, for the limits: the library recurses into lists, and takes the square of the time
   for a key of many parts.
3. Where it stopped it knows nothing, and then the nearest table that it knows is named: a place
   that holds what is wrong, never one that does not.
"""

from __future__ import annotations

import re
import tomllib
from typing import Final

from amends.definition_problems import FieldPath
from amends.formats.parsed import (
    MAX_DEPTH,
    MAX_SCALAR,
    MAX_VALUES,
    START,
    TOO_DEEP,
    TOO_LONG,
    TOO_MANY,
    Lines,
    Parsed,
    Place,
    Unreadable,
)

SPACE: Final = re.compile(r"[ \t]*")
BLANK: Final = re.compile(r"(?:[ \t\n]++|#[^\n]*+)*+")  # between items of a list, and between lines
BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
TEXT: Final = re.compile(
    r"""
    \"{3} (?: [^"\\]++ | \\. | "{1,2} (?!") )*+ "{3,5}  # may end with quotes of its own
    | '{3} (?: [^']++ | '{1,2} (?!') )*+ '{3,5}
    | " (?: [^"\\\n]++ | \\. )*+ "
    | ' [^'\n]* '
    """,
    re.DOTALL | re.VERBOSE,
)
WORD: Final = re.compile(r"[^,\[\]{}#\n\"']+")  # numbers, truth values, dates (with spaces)
AT: Final = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", re.DOTALL)


def read(text: str) -> Parsed:
    """Read a TOML text. Raises `Unreadable`."""
    text = text.replace("\r\n", "\n")  # as the library does
    places = _Locator(text).places()
    try:
        return Parsed(tomllib.loads(text), places)
    except tomllib.TOMLDecodeError as error:
        found = AT.fullmatch(str(error))
        what = found[1] if found else str(error)
        if found is None or found[2] is None:
            place = Lines(text).place(len(text.rstrip()))
            what += " at the end"
        else:
            place = Place(int(found[2]), int(found[3]))
        raise Unreadable(f"is not TOML: {what}", place) from None


class _Stopped(Exception):
    """What stands here is no TOML, or none that the locator knows."""


class _Locator:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._lines = Lines(text)
        self._places: dict[FieldPath, Place] = {(): START}
        self._lengths: dict[FieldPath, int] = {}  # of the lists that [[headers]] have made
        self._count = 0  # of keys and values

    def places(self) -> dict[FieldPath, Place]:
        """Go through the text once."""
        table: FieldPath = ()
        try:
            while True:
                self._skip(BLANK)
                if self._at == len(self._text):
                    break
                if self._text.startswith("[[", self._at):
                    table = self._header("[[", "]]")
                elif self._text.startswith("[", self._at):
                    table = self._header("[", "]")
                else:
                    self._entry(table, 1 + len(table))
        except _Stopped:
            pass
        return self._places

    def _header(self, opening: str, closing: str) -> FieldPath:
        """A line such as ``[a.b]`` or ``[[steps]]``: gives the path of the table that it begins."""
        place = self._here()
        self._take(opening)
        self._skip(SPACE)
        path: FieldPath = ()
        parts = self._key()
        for number, (part, _) in enumerate(parts):
            path = (*path, part)
            self._places.setdefault(path, place)
            if number + 1 == len(parts) and opening == "[[":
                self._lengths[path] = self._lengths.get(path, 0) + 1
            if path in self._lengths:
                path = (*path, self._lengths[path] - 1)  # a header speaks of the latest one
        self._places[path] = place  # its own header, where [a.b] came before [a]
        self._take(closing)
        return path

    def _entry(self, table: FieldPath, depth: int) -> None:
        """A key, dotted or not, and its value; `depth` is the number of tables and lists around."""
        path = table
        parts = self._key()
        for part, place in parts:
            path = (*path, part)
            self._places.setdefault(path, place)
        self._take("=")
        self._skip(SPACE)
        self._value(path, depth + len(parts) - 1)

    def _key(self) -> list[tuple[str, Place]]:
        """The parts of a key, each with its place."""
        parts: list[tuple[str, Place]] = []
        while True:
            if len(parts) == MAX_DEPTH:
                raise Unreadable(TOO_DEEP, self._here())
            self._counted()
            place = self._here()
            if found := BARE_KEY.match(self._text, self._at):
                parts.append((found[0], place))
            elif (found := TEXT.match(self._text, self._at)) and not found[0].startswith(
                ('"""', "'''")
            ):
                parts.append((_text(found[0]), place))
            else:
                raise _Stopped
            self._at = found.end()
            self._skip(SPACE)
            if not self._text.startswith(".", self._at):
                return parts
            self._at += 1
            self._skip(SPACE)

    def _value(self, path: FieldPath, depth: int) -> None:
        self._counted()
        if depth + self._text.startswith(("[", "{"), self._at) > MAX_DEPTH:
            raise Unreadable(TOO_DEEP, self._here())
        if self._text.startswith("[", self._at):
            self._list(path, depth + 1)
        elif self._text.startswith("{", self._at):
            self._inline_table(path, depth + 1)
        elif found := TEXT.match(self._text, self._at):
            self._at = found.end()
        elif found := WORD.match(self._text, self._at):
            if len(found[0].strip()) > MAX_SCALAR:
                raise Unreadable(TOO_LONG, self._here())
            self._at = found.end()
        else:
            raise _Stopped

    def _list(self, path: FieldPath, depth: int) -> None:
        self._take("[")
        number = 0
        while not self._ends_with("]"):
            item = (*path, number)
            self._places[item] = self._here()
            self._value(item, depth)
            number += 1
            self._separator("]")

    def _inline_table(self, path: FieldPath, depth: int) -> None:
        self._take("{")
        while not self._ends_with("}"):
            self._entry(path, depth)
            self._separator("}")

    def _ends_with(self, closing: str) -> bool:
        self._skip(BLANK)
        if not self._text.startswith(closing, self._at):
            return False
        self._at += 1
        return True

    def _separator(self, closing: str) -> None:
        self._skip(BLANK)
        if not self._text.startswith(closing, self._at):
            self._take(",")

    def _counted(self) -> None:
        self._count += 1
        if self._count > MAX_VALUES:
            raise Unreadable(TOO_MANY, self._here())

    def _take(self, word: str) -> None:
        if not self._text.startswith(word, self._at):
            raise _Stopped
        self._at += len(word)

    def _skip(self, what: re.Pattern[str]) -> None:
        found = what.match(self._text, self._at)
        assert found is not None, "both patterns match nothing, too"
        self._at = found.end()

    def _here(self) -> Place:
        return self._lines.place(self._at)


def _text(quoted: str) -> str:
    try:
        (key,) = tomllib.loads(f"{quoted} = 0")
    except tomllib.TOMLDecodeError:
        raise _Stopped from None
    return key
