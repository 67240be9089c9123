"""Definitions in JSON.

The standard library reads the text and judges it; it does not say where things stand, so the text
is gone through once more for that, token by token, when it is known to be JSON.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from amends.definition_problems import FieldPath
from amends.formats.parsed import (
    MAX_DEPTH,
    MAX_SCALAR,
    MAX_VALUES,
    TOO_DEEP,
    TOO_LONG,
    TOO_MANY,
    Lines,
    Parsed,
    Place,
    Unreadable,
    stands_twice,
)

# A text that does not end is a token, too: else each quote in it would be looked at as a beginning.
TOKEN: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{},:]|[^\s\[\]{},:"]+', re.DOTALL)


def read(text: str) -> Parsed:
    """Read a JSON text. Raises `Unreadable`."""
    lines = Lines(text)
    _check_limits(text, lines)  # first, because json itself recurses
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise Unreadable(f"is not JSON: {error.msg}", Place(error.lineno, error.colno)) from None
    parsed = Parsed(content, {})
    _locate(text, lines, parsed)
    return parsed


def _check_limits(text: str, lines: Lines) -> None:
    depth = values = 0
    for token in TOKEN.finditer(text):
        word = token[0]
        if word in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise Unreadable(TOO_DEEP, lines.place(token.start()))
        elif word in "]}":
            depth -= 1
        elif len(word) > MAX_SCALAR and word[0] != '"':
            raise Unreadable(TOO_LONG, lines.place(token.start()))
        values += word not in "]},:"
        if values > MAX_VALUES:
            raise Unreadable(TOO_MANY, lines.place(token.start()))


class _Open:
    """A list or an object that has begun and not ended."""

    __slots__ = ("index", "key", "keys", "path")

    def __init__(self, path: FieldPath, *, is_object: bool) -> None:
        self.path = path
        self.index = 0
        self.key: str | None = None
        self.keys: dict[str, Place] | None = {} if is_object else None


def _locate(text: str, lines: Lines, parsed: Parsed) -> None:
    stack: list[_Open] = []
    for token in TOKEN.finditer(text):
        word, inner = token[0], stack[-1] if stack else None
        if word == ":":
            continue
        if word in "]}":
            stack.pop()
            continue
        if word == ",":
            assert inner is not None, "a comma stands in a list or an object"
            inner.index += 1
            inner.key = None
            continue
        place = lines.place(token.start())
        if inner is not None and inner.keys is not None and inner.key is None:
            inner.key = _text(word)
            path = (*inner.path, inner.key)
            if inner.key in inner.keys:
                parsed.problems.append(stands_twice(path, inner.keys[inner.key], place))
            inner.keys[inner.key] = parsed.places[path] = place
            continue
        if inner is None:
            path = ()
            parsed.places[path] = place
        elif inner.key is not None:
            path = (*inner.path, inner.key)
        else:
            path = (*inner.path, inner.index)
            parsed.places[path] = place
        if word in "[{":
            stack.append(_Open(path, is_object=word == "{"))


def _text(token: str) -> str:
    value: Any = json.loads(token)
    assert isinstance(value, str), "the key of an object is a text"
    return value
