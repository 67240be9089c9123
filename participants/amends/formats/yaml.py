"""Definitions in YAML.

Only the parser of PyYAML is used, never its constructors: it gives events with their places, and
what they mean is decided here. How to think about it:

1. YAML's readers disagree about unquoted words: ``no`` is a text or false, ``010`` is 10 or 8,
   ``1:30`` is 90 or a text. We take only what all of them read alike, and for the rest ask for
   quotes or digits, instead of guessing what was meant.
2. A key is a text, whatever it looks like; one that stands twice in a table is wrong.
3. Anchors, aliases and merge keys (``<<``) are for writing a retry policy once. They are written
   out while the values are counted, so a few lines cannot become millions; an alias cannot hold
   itself. What came through an alias stands where its text stands.
4. Tags are refused: they ask for types that a definition has no use for.
5. One file holds one definition, so a second document is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from amends.definition_problems import SHOWN, DefinitionProblem, FieldPath, shown
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
    stands_twice,
)

NULL: Final = frozenset({"~", "null", "Null", "NULL"})
TRUE_OR_FALSE: Final = re.compile(
    "(?:true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)"
)
TRUTH: Final = {
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}
YES_OR_NO: Final[frozenset[FieldPath]] = frozenset({("ordered",)})
"""The fields that take a truth value. Everywhere else a name is meant, and to be put in quotes."""
INT: Final = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
FLOAT: Final = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
INFINITE: Final = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
ODD_NUMBER: Final = re.compile(
    r"[-+]?(?:0[0-9_.eE+-]*[0-9_]|0o[0-7_]+|0x[0-9a-fA-F_]+|0b[01_]+|[0-9][0-9_]*(?:\.[0-9_]*)?)"
)
SIXTIES: Final = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")
DATE: Final = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt \t].*)?")
MERGE: Final = "<<"
MAX_SAID: Final = 200  # characters of the parser's message, which may repeat the text


def read(text: str) -> Parsed:
    """Read a YAML text. Raises `Unreadable`."""
    try:
        root = _Composer(yaml.parse(text, Loader=yaml.SafeLoader)).document()
    except yaml.reader.ReaderError as error:
        raise Unreadable(
            f"is not YAML: the character U+{ord(text[error.position]):04X} may not stand in it",
            Lines(text).place(error.position),
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Unreadable(f"is not YAML: {_said(error)}", _place(mark) if mark else None) from None
    except RecursionError:  # of the parser, which has no limit of its own
        raise Unreadable(TOO_DEEP, None) from None
    parsed = Parsed(None, {(): root.place if root else START})
    if root is not None:
        parsed.content = _Writer(parsed).value(root, (), 0)
    return parsed


def _place(mark: Any) -> Place:
    assert mark is not None, "events have their places"
    return Place(mark.line + 1, mark.column + 1)


def _said(error: yaml.MarkedYAMLError) -> str:
    said = ", ".join(part for part in (error.context, error.problem) if part)[:MAX_SAID]
    if "'\\t'" in said:
        said += "; indent with spaces, YAML takes no tabs"
    elif "mapping values are not allowed here" in said:
        said += "; is the line indented as the others, and a text with a colon in quotes?"
    return said


# -- events to nodes ---------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Node:
    place: Place


@dataclass(slots=True, eq=False)
class _Scalar(_Node):
    text: str
    is_plain: bool
    """Not in quotes and no block of text, so that it may mean something else than text."""


@dataclass(slots=True, eq=False)
class _Collection(_Node):
    items: list[_Node] = field(default_factory=list)
    is_open: bool = True


class _List(_Collection):
    pass


class _Table(_Collection):
    """Its items are keys and values in turn."""


class _Composer:
    """Makes nodes of events; an alias is the very node that has its anchor."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._anchors: dict[str, _Node] = {}
        self._count = 0

    def document(self) -> _Node | None:
        """The one document, or None where there is none."""
        root: _Node | None = None
        documents = 0
        open_ones: list[_Collection] = []
        for event in self._events:
            place = _place(event.start_mark)
            node: _Node
            match event:
                case yaml.DocumentStartEvent():
                    documents += 1
                    if documents > 1:
                        raise Unreadable(
                            "a second document begins here: write one definition per file", place
                        )
                    continue
                case yaml.CollectionEndEvent():
                    open_ones.pop().is_open = False
                    continue
                case yaml.AliasEvent():
                    node = self._aliased(event, place)
                case yaml.ScalarEvent():
                    node = _Scalar(place, event.value, is_plain=event.style is None)
                case yaml.SequenceStartEvent():
                    node = _List(place)
                case yaml.MappingStartEvent():
                    node = _Table(place)
                case _:
                    continue
            self._count += 1
            if self._count > MAX_VALUES:
                raise Unreadable(TOO_MANY, place)
            if not isinstance(event, yaml.AliasEvent):
                _refuse_tag(event, place)
                if event.anchor is not None:
                    self._anchors[event.anchor] = node
            if open_ones:
                open_ones[-1].items.append(node)
            else:
                root = node
            if isinstance(node, _Collection) and not isinstance(event, yaml.AliasEvent):
                open_ones.append(node)
                if len(open_ones) > MAX_DEPTH:
                    raise Unreadable(TOO_DEEP, place)
        return root

    def _aliased(self, event: yaml.AliasEvent, place: Place) -> _Node:
        name = event.anchor or ""
        node = self._anchors.get(name)
        if node is None:
            name = _cut(name)
            raise Unreadable(f"the alias *{name} stands for nothing: put &{name} before it", place)
        if isinstance(node, _Collection) and node.is_open:
            raise Unreadable(f"the alias *{_cut(name)} stands inside what it stands for", place)
        return node


def _refuse_tag(event: yaml.NodeEvent, place: Place) -> None:
    tag = getattr(event, "tag", None)
    if tag is not None:
        name = tag.replace("tag:yaml.org,2002:", "!!")
        raise Unreadable(
            f"the tag {shown(name)} is not taken in definitions: leave it out, and put texts in "
            "quotes",
            place,
        )


# -- nodes to values ---------------------------------------------------------------------------


class _Writer:
    """Writes nodes out as plain values, with the place of each."""

    def __init__(self, parsed: Parsed) -> None:
        self._parsed = parsed
        self._count = 0
        self._told: set[DefinitionProblem] = set()

    def value(self, node: _Node, path: FieldPath, depth: int) -> Any:
        """The value of a node that stands at this path."""
        self._counted(node)
        if depth > MAX_DEPTH:
            raise Unreadable(TOO_DEEP, node.place)
        match node:
            case _Scalar():
                return self._scalar(node, path)
            case _List():
                values = []
                for number, item in enumerate(node.items):
                    inner = (*path, number)
                    self._parsed.places[inner] = item.place
                    values.append(self.value(item, inner, depth + 1))
                return values
            case _Table():
                table = {}
                for key, (name, item) in self._entries(node, path).items():
                    inner = (*path, key)
                    self._parsed.places[inner] = name.place
                    table[key] = self.value(item, inner, depth + 1)
                return table
            case _:
                raise AssertionError(f"{type(node).__name__} is no node")

    def _entries(
        self, table: _Table, path: FieldPath, depth: int = 0
    ) -> dict[str, tuple[_Node, _Node]]:
        """A table's keys and values; what it merges in comes after its own."""
        if depth > MAX_DEPTH:
            raise Unreadable(TOO_DEEP, table.place)
        own: dict[str, tuple[_Node, _Node]] = {}
        merged: list[_Table] = []
        for key, item in zip(table.items[::2], table.items[1::2], strict=True):
            self._counted(key)
            if not isinstance(key, _Scalar):
                raise Unreadable("a key is a text, not a table or a list", key.place)
            if key.is_plain and key.text == MERGE:
                merged += _to_merge(item)
            elif key.text in own:
                first = own[key.text][0].place
                self._wrong(stands_twice((*path, key.text), first, key.place))
            else:
                own[key.text] = (key, item)
        for other in merged:
            for name, entry in self._entries(other, path, depth + 1).items():
                own.setdefault(name, entry)
        return own

    def _scalar(self, node: _Scalar, path: FieldPath) -> Any:
        text = node.text
        if not node.is_plain:
            return text
        if len(text) > MAX_SCALAR and not _is_long_text(text):
            raise Unreadable(TOO_LONG, node.place)
        if text in NULL:
            return None
        if not text:
            self._ask(node, path, "has no value; leave the key out for the default, [] is no step")
        elif TRUE_OR_FALSE.fullmatch(text):
            if path in YES_OR_NO:
                return TRUTH.get(text, text)  # of the other words the field itself is refused
            self._ask(
                node,
                path,
                f"{text} is a truth value to some readers of YAML; if it is a name, put it in "
                f"quotes: '{text}'",
            )
        elif INT.fullmatch(text):
            return int(text)
        elif FLOAT.fullmatch(text):
            return float(text)
        elif INFINITE.fullmatch(text):
            if text[-1] in "nN":
                return math.nan
            return -math.inf if text[0] == "-" else math.inf
        elif SIXTIES.fullmatch(text):
            self._ask(
                node,
                path,
                f"{_cut(text)} counts in sixties to some readers of YAML; write the seconds, or "
                "put it in quotes",
            )
        elif DATE.fullmatch(text):
            self._ask(
                node, path, f"{shown(text)} is a date to readers of YAML; if not, put it in quotes"
            )
        elif ODD_NUMBER.fullmatch(text):
            self._ask(
                node,
                path,
                f"readers of YAML disagree about the number {_cut(text)}; write it in decimal "
                "digits alone, or put it in quotes",
            )
        return text

    def _ask(self, node: _Scalar, path: FieldPath, message: str) -> None:
        """Note that a value has to be written in another way."""
        place = self._parsed.places.get(path, node.place)
        self._wrong(DefinitionProblem(path, message, line=place.line, column=place.column))

    def _wrong(self, found: DefinitionProblem) -> None:
        if found not in self._told:  # a table that is merged in twice
            self._told.add(found)
            self._parsed.problems.append(found)

    def _counted(self, node: _Node) -> None:
        self._count += 1
        if self._count > MAX_VALUES:
            raise Unreadable(TOO_MANY, node.place)


def _to_merge(item: _Node) -> list[_Table]:
    tables = item.items if isinstance(item, _List) else [item]
    found = [table for table in tables if isinstance(table, _Table)]
    if len(found) != len(tables):
        raise Unreadable("<< takes a table, or a list of tables", item.place)
    return found


def _cut(word: str) -> str:
    return word if len(word) <= SHOWN else word[:SHOWN] + "…"


def _is_long_text(text: str) -> bool:
    """Whether it is surely no number: those are judged by patterns, which take their time."""
    return not re.match(r"[-+.0-9]", text)
